"""The one table of policy cases, for the tests of `policy` and `policy_divergence`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import ral_kernels as rk
from tests.ops.attention_cases import AttentionCase

OWN_TENSORS = ("span_bias", "head_weights")  # options that have gradients


@dataclass(frozen=True)
class PolicyInputs:
    """The inputs of one call: `attention_policy(q, k, **options)`."""

    q: Tensor
    k: Tensor
    options: dict[str, Any]

    def requires_grad_(self) -> PolicyInputs:
        for tensor in self.differentiable().values():
            tensor.requires_grad_()
        return self

    def differentiable(self) -> dict[str, Tensor]:
        """The tensors that have gradients, by name."""
        own = {name: self.options[name] for name in OWN_TENSORS if name in self.options}
        return {"q": self.q, "k": self.k, **own}

    def to(self, dtype: torch.dtype) -> PolicyInputs:
        """The same values in `dtype`, detached; options keep at least float32, as the op does."""
        options = dict(self.options)
        for name in OWN_TENSORS:
            if name in options:
                wide = torch.float64 if dtype == torch.float64 else torch.float32
                options[name] = options[name].detach().to(wide, copy=True)
        q, k = (x.detach().to(dtype, copy=True) for x in (self.q, self.k))
        return PolicyInputs(q, k, options)

    @property
    def rows(self) -> slice:
        """The chosen rows with bounds >= 0."""
        rows = self.options.get("rows")
        rows = slice(None) if rows is None else rows if isinstance(rows, slice) else slice(*rows)
        start, stop, _ = rows.indices(self.q.shape[2])
        return slice(start, stop)


@dataclass(frozen=True)
class PolicyCase:
    """Shapes as in `AttentionCase`, whose options are those of `attention_policy`, and a scope."""

    base: AttentionCase
    scope: str = "none"  # none | first_half | batch | spans | everything | nothing
    peaked: bool = False  # every row looks at its own key
    head_weights: str = "none"  # none | heads | samples | zeros | one | wide

    @property
    def name(self) -> str:
        return self.base.name

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> PolicyInputs:
        drawn = self.base.inputs(dtype, seed=seed)
        q, k, options = drawn.q, drawn.k, dict(drawn.options)
        options.setdefault("is_causal", True)
        if drawn.spans is not None:
            options["spans"] = drawn.spans
        if self.peaked:
            own = drawn.k[:, :, -q.shape[2] :].repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            q = (0.1 * q + 2 * own).to(dtype)  # scores of own keys near 2 sqrt(D)
        inputs = PolicyInputs(q, k, options)
        bias = options.get("span_bias")
        if bias is not None and bias.shape[-2] != 1:
            options["span_bias"] = bias[..., inputs.rows, :].contiguous()
        n = self.base.seqlen_k
        if self.scope == "first_half":
            options["scope"] = torch.arange(n) < n // 2
        elif self.scope == "batch":
            generator = torch.Generator().manual_seed(seed + 1)
            options["scope"] = torch.rand(self.base.batch_size, n, generator=generator) < 0.6
        elif self.scope == "spans":
            options["scope"] = rk.Spans(torch.where(torch.arange(n) % 3 == 0, -1, 0), 1)
        elif self.scope == "everything":
            options["scope"] = torch.ones(n, dtype=torch.bool)
        elif self.scope == "nothing":
            options["scope"] = torch.zeros(n, dtype=torch.bool)
        if self.head_weights != "none":
            weights = draw_weights(self.head_weights, self.base.batch_size, q.shape[1], seed)
            options["head_weights"] = weights.to(
                torch.float64 if dtype == torch.float64 else torch.float32
            )
        return inputs


def draw_weights(kind: str, samples: int, num_heads: int, seed: int = 0) -> Tensor:
    """head_weights [H], or [samples, H] for "samples"; "zeros" and "one" have heads that are 0."""
    generator = torch.Generator().manual_seed(seed + 2)
    shape = (samples, num_heads) if kind == "samples" else (num_heads,)
    weights = 3 * torch.rand(shape, generator=generator)
    if kind == "zeros":
        weights[: (num_heads + 1) // 2] = 0
    elif kind == "one":
        weights[:-1] = 0
    elif kind == "wide":
        weights *= 10.0 ** torch.arange(-num_heads, num_heads, 2)
    return weights


def _case(
    name: str,
    seqlen_q: int,
    seqlen_k: int,
    scope: str = "none",
    peaked: bool = False,
    head_weights: str = "none",
    **base: Any,
) -> PolicyCase:
    base.setdefault("head_dim", 32)
    return PolicyCase(AttentionCase(name, seqlen_q, seqlen_k, **base), scope, peaked, head_weights)


# fmt: off
TOKEN_CASES: tuple[PolicyCase, ...] = (  # a policy over keys
    # sizes
    _case("empty_batch", 5, 7, batch_size=0),
    _case("no_rows", 0, 7, batch_size=2),
    _case("no_keys", 5, 0, batch_size=2),
    _case("length_1", 1, 1),  # its own key alone: nothing is valid
    _case("length_2", 2, 2, num_heads=4, num_kv_heads=2),
    _case("decode", 1, 241, num_heads=8, num_kv_heads=2),
    _case("whole_sequence", 61, 61, batch_size=2, num_heads=4, num_kv_heads=2),
    _case("off_blocks", 127, 241, batch_size=2),
    _case("chunked_prefill", 70, 500),
    _case("more_queries_than_keys", 61, 7),
    _case("long_keys", 7, 500, num_heads=4, num_kv_heads=4),
    # heads
    _case("mha", 61, 127, num_heads=3, num_kv_heads=3),
    _case("gqa_7", 33, 127, num_heads=14, num_kv_heads=2),
    _case("mqa", 33, 130, batch_size=2, num_heads=8, num_kv_heads=1),
    _case("one_head", 33, 61, num_heads=1, num_kv_heads=1),
    # head dims
    *(_case(f"head_dim_{d}", 33, 127, head_dim=d) for d in (16, 37, 64, 80, 128, 192, 256)),
    # layouts
    _case("layout_bthd", 61, 127, batch_size=2, num_heads=4, num_kv_heads=2, layout="bthd"),
    _case("layout_strided", 61, 127, batch_size=2, num_heads=4, num_kv_heads=2, layout="strided"),
    _case("layout_mixed", 61, 127, batch_size=2, num_heads=4, num_kv_heads=2, layout="mixed"),
    # rows
    _case("rows_last", 130, 250, options={"rows": slice(-5, None)}),
    _case("rows_middle", 130, 127, num_heads=4, num_kv_heads=2, options={"rows": (61, 68)}),
    _case("rows_first", 61, 61, options={"rows": (0, 3)}),
    _case("rows_none", 61, 127, options={"rows": (7, 7)}),
    # scope, own key, padding
    _case("scope_first_half", 61, 127, scope="first_half"),
    _case("scope_batch", 33, 127, batch_size=3, scope="batch"),
    _case("scope_spans", 33, 127, scope="spans"),
    _case("scope_nothing", 33, 61, scope="nothing"),
    _case("with_self", 61, 127, options={"exclude_self": False}),
    _case("padding_left", 61, 61, batch_size=3, key_padding="left"),
    _case("padding_right", 33, 127, batch_size=3, key_padding="right"),
    _case("padding_everything", 33, 127, batch_size=2, key_padding="everything"),
    # visibility
    _case("not_causal", 61, 127, options={"is_causal": False}),
    _case("window_causal", 61, 250, options={"window": 40}),
    _case("window_0", 33, 61, options={"window": 0}),  # its own key alone
    _case("window_both", 61, 61, options={"window": (9, 5), "is_causal": False}),
    # scale, soft cap, extremes
    _case("softcap", 61, 127, options={"softcap": 2.0}),
    _case("scale", 61, 127, options={"scale": 0.3}),
    _case("large_scores", 33, 250, scores="large", options={"scale": 1.0, "exclude_self": False}),
    _case("increasing_scores", 33, 500, scores="increasing"),
    _case("peaked_on_self", 61, 127, head_dim=64, peaked=True),
    _case("together", 70, 130, batch_size=3, num_heads=6, num_kv_heads=2, scope="batch",
        key_padding="left", layout="mixed",
        options={"rows": (3, 69), "window": 100, "softcap": 3.0, "scale": 0.25}),
)
SPAN_CASES: tuple[PolicyCase, ...] = (  # a policy over spans
    _case("spans_empty_batch", 5, 7, batch_size=0, spans="equal"),
    _case("spans_no_keys", 5, 0, spans="equal"),
    _case("spans_equal", 61, 127, batch_size=2, spans="equal", num_spans=7),
    _case("spans_ragged", 70, 500, spans="ragged", num_spans=40),
    _case("spans_gaps", 61, 250, spans="gaps", num_spans=9),
    _case("spans_unsorted", 61, 127, spans="unsorted", num_spans=13),
    _case("spans_batch", 33, 127, batch_size=3, spans="batch", num_spans=5),
    _case("span_of_one_key", 61, 127, spans="single_key", num_spans=3),
    _case("span_of_everything", 33, 127, spans="everything", num_spans=1),
    _case("1000_spans", 7, 1500, spans="equal", num_spans=1000),
    _case("span_bias_full", 61, 127, batch_size=2, spans="equal", span_bias="full"),
    _case("span_bias_per_row", 61, 127, spans="gaps", span_bias="per_row",
        options={"rows": (5, 40)}),
    _case("span_bias_per_span", 33, 127, batch_size=2, num_heads=4, num_kv_heads=2,
        spans="unsorted", num_spans=11, span_bias="per_span"),
    _case("span_bias_softcap", 33, 127, spans="ragged", span_bias="full",
        options={"softcap": 1.5}),
    _case("spans_wider_scope", 61, 127, spans="gaps", scope="everything"),
    _case("spans_narrower_scope", 61, 127, spans="equal", scope="first_half"),
    _case("spans_padding", 33, 127, batch_size=3, spans="equal", key_padding="left",
        span_bias="full"),
    _case("spans_window", 61, 127, spans="equal", options={"window": 20, "exclude_self": False}),
)
WEIGHTED_CASES: tuple[PolicyCase, ...] = (  # weighted heads, over keys
    _case("weights_gqa_7", 33, 127, num_heads=14, num_kv_heads=2, head_weights="heads"),
    _case("weights_samples", 61, 61, batch_size=3, num_heads=4, num_kv_heads=2,
        key_padding="left", head_weights="samples"),
    _case("weights_zeros", 127, 241, batch_size=2, num_heads=3, num_kv_heads=3,
        head_weights="zeros"),
    _case("weights_one", 33, 130, num_heads=8, num_kv_heads=1, head_weights="one"),
    _case("weights_wide", 7, 500, num_heads=4, num_kv_heads=4, head_weights="wide"),
    _case("weights_together", 70, 130, batch_size=3, num_heads=6, num_kv_heads=2, scope="batch",
        key_padding="left", layout="mixed", head_weights="samples",
        options={"rows": (3, 69), "window": 100, "softcap": 3.0, "scale": 0.25}),
)
WEIGHTED_SPAN_CASES: tuple[PolicyCase, ...] = (
    _case("weights_spans", 61, 127, batch_size=2, num_heads=4, num_kv_heads=2, spans="unsorted",
        num_spans=13, head_weights="zeros"),
    _case("weights_span_bias", 33, 127, batch_size=2, num_heads=4, num_kv_heads=2, spans="equal",
        span_bias="full", head_weights="samples"),
)
# fmt: on
CASES = TOKEN_CASES + SPAN_CASES
BY_NAME = {case.name: case for case in CASES + WEIGHTED_CASES + WEIGHTED_SPAN_CASES}
# One of each kind, for tests over many dtypes or divergences where a case takes seconds.
FEW = ("length_2", "gqa_7", "head_dim_37", "layout_strided", "padding_left", "window_both",
    "softcap", "large_scores", "peaked_on_self", "spans_unsorted", "span_bias_per_row")  # fmt: skip


def snapshot_inputs(
    case: PolicyCase, inputs: PolicyInputs, other_model: bool, other_head_dim: int = 20
) -> PolicyInputs:
    """q and k of a reference for `inputs`: another draw, if asked for of another shape of model."""
    base = case.base
    if other_model:
        base = replace(base, num_heads=6, num_kv_heads=3, head_dim=other_head_dim, layout="bhtd")
    drawn = replace(case, base=base).inputs(inputs.q.dtype, seed=7)
    options = {k: v for k, v in inputs.options.items() if k not in OWN_TENSORS}
    if "head_weights" in inputs.options:
        own = drawn.options["head_weights"]
        options["head_weights"] = own if other_model else inputs.options["head_weights"].detach()
    return PolicyInputs(drawn.q, drawn.k, options)
