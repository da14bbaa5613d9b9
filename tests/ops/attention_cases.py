"""The one table of `attention` cases, for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import ral_kernels as rk


@dataclass(frozen=True)
class AttentionInputs:
    """The inputs of one call: `rk.attention(q, k, v, spans, **options)`."""

    q: Tensor
    k: Tensor
    v: Tensor
    spans: rk.Spans | None
    options: dict[str, Any]  # the keyword arguments of `rk.attention`, without `backend`

    def requires_grad_(self) -> AttentionInputs:
        for tensor in self.differentiable().values():
            tensor.requires_grad_()
        return self

    def differentiable(self) -> dict[str, Tensor]:
        """The tensors that have gradients, by name."""
        tensors = {"q": self.q, "k": self.k, "v": self.v}
        if "span_bias" in self.options:
            tensors["span_bias"] = self.options["span_bias"]
        return tensors

    def to(self, dtype: torch.dtype) -> AttentionInputs:
        """The same values in `dtype`, detached: inputs for a float64 reference or a baseline."""
        options = {
            name: value.detach().to(dtype)
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in self.options.items()
        }
        q, k, v = (tensor.detach().to(dtype) for tensor in (self.q, self.k, self.v))
        return AttentionInputs(q, k, v, self.spans, options)


@dataclass(frozen=True)
class AttentionCase:
    """A shape and its options; `inputs` draws tensors for it."""

    name: str
    seqlen_q: int
    seqlen_k: int
    batch_size: int = 1
    num_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 64
    head_dim_v: int | None = None  # None: head_dim
    # none | equal | ragged | single_key | everything | gaps | unsorted | batch
    spans: str = "none"
    num_spans: int = 4
    span_bias: str = "none"  # none | full | per_row | per_span
    attn_mask: str = "none"  # none | bool | float | minus_infinity | finfo_min | empty_rows
    key_padding: str = "none"  # none | left | right | everything
    layout: str = "bhtd"  # bhtd | bthd (transposed view) | strided (gaps between rows) | mixed
    scores: str = "normal"  # normal | large (±1e4) | increasing (along the keys)
    options: dict[str, Any] = field(default_factory=dict)  # is_causal, scale, window, softcap, rows

    def inputs(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
    ) -> AttentionInputs:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        head_dim_v = self.head_dim if self.head_dim_v is None else self.head_dim_v
        q = normal(self.batch_size, self.num_heads, self.seqlen_q, self.head_dim)
        k = normal(self.batch_size, self.num_kv_heads, self.seqlen_k, self.head_dim)
        v = normal(self.batch_size, self.num_kv_heads, self.seqlen_k, head_dim_v)
        if self.scores == "large":
            # 32 in each of two factors and a scale of 1: |s| of the order of 1e4.
            q, k = q * 32, k * 32 / self.head_dim**0.5 * 8
        elif self.scores == "increasing":
            # Every key block holds a new row maximum, so that each one rescales what came before.
            k = k.abs() * torch.linspace(0.1, 4, self.seqlen_k)[:, None]
            q = q.abs()
        layouts = [self.layout] * 3 if self.layout != "mixed" else ["bthd", "bhtd", "strided"]
        q, k, v = (
            _lay_out(tensor.to(device, dtype), layout)
            for tensor, layout in zip((q, k, v), layouts, strict=True)
        )
        options = dict(self.options)
        spans = self._spans(generator, device)
        if spans is not None and self.span_bias != "none":
            shape = {
                "full": (self.batch_size, self.num_heads, self.seqlen_q, spans.num_spans),
                "per_row": (self.seqlen_q, spans.num_spans),
                "per_span": (self.batch_size, 1, 1, spans.num_spans),
            }[self.span_bias]
            # Leaf and float32, as the op takes it; a half-precision bias is one more
            # (differentiable) conversion.
            bias = normal(*shape).to(
                device, torch.float64 if dtype == torch.float64 else torch.float32
            )
            options["span_bias"] = bias
        if self.attn_mask != "none":
            options["attn_mask"] = self._attn_mask(generator).to(device)
        if self.key_padding != "none":
            options["key_padding_mask"] = self._key_padding_mask().to(device)
        return AttentionInputs(q, k, v, spans, options)

    def _spans(self, generator: torch.Generator, device: torch.device | str) -> rk.Spans | None:
        n, s = self.seqlen_k, self.num_spans
        if self.spans == "none":
            return None
        if self.spans == "equal":
            ids = torch.arange(n) * s // max(n, 1)
        elif self.spans == "ragged":  # contiguous, cut at random places, some spans empty
            cuts = torch.randint(0, n + 1, (s - 1,), generator=generator).sort().values
            ids = torch.searchsorted(cuts, torch.arange(n), right=True)
        elif (
            self.spans == "single_key"
        ):  # span 0 is one key in the middle, everything else has none
            ids = torch.full((n,), -1)
            ids[n // 2] = 0
        elif self.spans == "everything":
            ids = torch.zeros(n, dtype=torch.int64)
        elif self.spans == "gaps":  # text between frames
            ids = torch.arange(n) * (2 * s) // max(n, 1)
            ids = torch.where(ids % 2 == 0, ids // 2, -1)
        elif self.spans == "unsorted":
            ids = torch.randint(-1, s, (n,), generator=generator)
        elif self.spans == "batch":
            ids = torch.randint(-1, s, (self.batch_size, n), generator=generator).sort(-1).values
            ids = torch.where(torch.arange(self.batch_size)[:, None] % 2 == 0, ids, ids.flip(-1))
        else:
            raise ValueError(self.spans)
        return rk.Spans(ids.to(device), s)

    def _attn_mask(self, generator: torch.Generator) -> Tensor:
        b, h, t, n = self.batch_size, self.num_heads, self.seqlen_q, self.seqlen_k
        if self.attn_mask == "float":
            return torch.randn(b, 1, t, n, generator=generator)
        visible = torch.rand(b, h, t, n, generator=generator) < 0.7
        if self.attn_mask == "empty_rows":
            visible[:, :, ::3] = False
        if self.attn_mask in ("bool", "empty_rows"):
            return visible
        if self.attn_mask == "minus_infinity":
            return torch.zeros(b, h, t, n).masked_fill(~visible, float("-inf"))
        if self.attn_mask == "finfo_min":
            visible[..., 0] = True
            return torch.zeros(b, h, t, n).masked_fill(~visible, torch.finfo(torch.float32).min)
        raise ValueError(self.attn_mask)

    def _key_padding_mask(self) -> Tensor:
        position = torch.arange(self.seqlen_k)
        # Sample b has 3 + 5 b padded keys.
        padding = 3 + 5 * torch.arange(self.batch_size)[:, None]
        if self.key_padding == "left":
            return position >= padding
        if self.key_padding == "right":
            return position < self.seqlen_k - padding
        if self.key_padding == "everything":
            mask = (position >= 0).repeat(self.batch_size, 1)
            mask[-1] = False  # the last sample has no real key at all
            return mask
        raise ValueError(self.key_padding)


def _lay_out(tensor: Tensor, layout: str) -> Tensor:
    if layout == "bhtd":
        return tensor
    if layout == "bthd":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if (
        layout == "strided"
    ):  # rows 7 elements apart from each other, heads and batch in the wrong order
        b, h, t, d = tensor.shape
        buffer = torch.full(
            (h, t, b, d + 7), float("nan"), dtype=tensor.dtype, device=tensor.device
        )
        view = buffer.permute(2, 0, 1, 3)[..., 3 : 3 + d]
        view.copy_(tensor)
        return view
    raise ValueError(layout)


# The CPU kernels work in blocks of 64, 128 or 192 query columns (queries x group) and 120, 192, 240
# or 512 keys in groups of 6 or 32: the lengths below lie on, next to and far off these.
# fmt: off
CASES: tuple[AttentionCase, ...] = (
    # sizes
    AttentionCase("empty_batch", 5, 7, batch_size=0, spans="equal"),
    AttentionCase("no_queries", 0, 7, batch_size=2, spans="equal"),
    AttentionCase("no_keys", 5, 0, batch_size=2, spans="equal"),
    AttentionCase("length_1", 1, 1, spans="everything", num_spans=1),
    AttentionCase("decode", 1, 241, num_heads=8, num_kv_heads=2, spans="equal",
        options={"is_causal": True}),
    AttentionCase("decode_mha", 1, 241, num_heads=3, num_kv_heads=3, head_dim=37, head_dim_v=131,
        spans="ragged"),
    AttentionCase("decode_gqa_7", 1, 367, num_heads=7, head_dim=128,
        spans="unsorted", num_spans=13, options={"is_causal": True}),
    AttentionCase("decode_gqa_5", 1, 130, num_heads=5, head_dim=72, head_dim_v=104, spans="ragged"),
    AttentionCase("decode_6_queries", 3, 125, batch_size=2, head_dim=37, spans="gaps",
        options={"is_causal": True}),
    AttentionCase("decode_with_options", 2, 250, batch_size=2, num_heads=4, num_kv_heads=2,
        layout="strided", spans="gaps", span_bias="full", key_padding="right",
        options={"is_causal": True, "window": 190, "softcap": 2.0}),
    AttentionCase("decode_increasing", 2, 500, num_heads=4, scores="increasing",
        spans="equal", num_spans=8),
    AttentionCase("decode_5_6", 5, 6, head_dim=16, spans="equal"),
    AttentionCase("prefill_61", 61, 61, batch_size=2, spans="ragged", options={"is_causal": True}),
    AttentionCase("on_blocks", 128, 240, spans="equal", num_spans=8),
    AttentionCase("off_blocks", 127, 241, batch_size=2, spans="equal", num_spans=7),
    AttentionCase("chunked_prefill", 130, 500, spans="gaps", options={"is_causal": True}),
    AttentionCase("more_queries_than_keys", 61, 7, spans="equal", options={"is_causal": True}),
    AttentionCase("long_keys", 7, 500, num_heads=4, num_kv_heads=4, spans="equal", num_spans=16),
    # heads
    AttentionCase("mha", 61, 127, num_heads=3, num_kv_heads=3, spans="equal"),
    AttentionCase("gqa_2", 61, 127, num_heads=4, num_kv_heads=2, spans="equal",
        options={"is_causal": True}),
    AttentionCase("gqa_7", 61, 127, num_heads=14, num_kv_heads=2, head_dim=32, spans="equal"),
    AttentionCase("mqa", 33, 130, batch_size=2, num_heads=8, num_kv_heads=1, head_dim=32,
        spans="equal"),
    # head dims
    *(
        AttentionCase(f"head_dim_{d}", 61, 127, head_dim=d, spans="equal",
            options={"is_causal": True})
        for d in (16, 32, 80, 96, 128, 192, 256)
    ),
    AttentionCase("head_dim_odd", 61, 127, head_dim=37, spans="equal"),
    AttentionCase("head_dim_v_smaller", 61, 127, head_dim=96, head_dim_v=72, spans="equal"),
    AttentionCase("head_dim_v_larger", 61, 127, head_dim=48, head_dim_v=131, spans="equal"),
    # layouts
    AttentionCase("layout_bthd", 61, 127, batch_size=2, num_heads=4, num_kv_heads=2, layout="bthd",
        spans="equal"),
    AttentionCase("layout_strided", 61, 127, batch_size=2, num_heads=4, num_kv_heads=2,
        layout="strided"),
    AttentionCase("layout_mixed", 61, 127, batch_size=2, num_heads=4, num_kv_heads=2,
        layout="mixed", spans="equal"),
    # spans
    AttentionCase("no_spans", 61, 127, options={"is_causal": True}),
    AttentionCase("span_of_one_key", 61, 127, spans="single_key", num_spans=3),
    AttentionCase("span_of_everything", 61, 127, spans="everything", num_spans=1),
    AttentionCase("keys_without_span", 61, 500, spans="gaps", num_spans=9),
    AttentionCase("unsorted_spans", 61, 250, spans="unsorted", num_spans=13,
        options={"is_causal": True}),
    AttentionCase("unsorted_few_spans", 130, 260, spans="unsorted", num_spans=3,
        options={"is_causal": True}),
    AttentionCase("short_spans_in_a_window", 130, 400, spans="gaps", num_spans=60, head_dim=32,
        span_bias="full", options={"is_causal": True, "window": 150}),
    AttentionCase("ragged_spans", 130, 500, spans="ragged", num_spans=40),
    AttentionCase("1000_spans", 33, 1500, spans="equal", num_spans=1000, head_dim=32),
    AttentionCase("1000_unsorted_spans", 33, 500, spans="unsorted", num_spans=1000, head_dim=32),
    AttentionCase("batch_spans", 61, 127, batch_size=3, spans="batch", num_spans=5),
    # span bias
    AttentionCase("span_bias_full", 61, 127, batch_size=2, spans="equal", span_bias="full"),
    AttentionCase("span_bias_per_row", 61, 127, batch_size=2, spans="gaps", span_bias="per_row",
        options={"is_causal": True}),
    AttentionCase("span_bias_per_span", 61, 250, batch_size=2, num_heads=4, num_kv_heads=2,
        spans="unsorted", num_spans=11, span_bias="per_span"),
    AttentionCase("span_bias_softcap", 61, 127, spans="ragged", span_bias="full",
        options={"softcap": 1.5}),
    # In few keys and few spans the roundings of out do not average out.
    AttentionCase("span_bias_in_a_window", 140, 61, spans="equal", span_bias="full",
        options={"window": (3, 2)}),
    AttentionCase("span_bias_rows_middle", 130, 127, num_heads=4, num_kv_heads=2, spans="gaps",
        num_spans=3, span_bias="per_row", options={"rows": (61, 68), "window": (9, 0)}),
    AttentionCase("span_bias_one_span", 61, 127, spans="everything", num_spans=1,
        span_bias="full"),
    AttentionCase("span_bias_1000", 7, 1500, spans="equal", num_spans=1000, head_dim=32,
        span_bias="full"),
    # masks
    AttentionCase("mask_bool", 61, 127, batch_size=2, attn_mask="bool", spans="equal"),
    AttentionCase("mask_float", 61, 127, batch_size=2, attn_mask="float", spans="equal",
        options={"is_causal": True}),
    AttentionCase("mask_minus_infinity", 61, 127, attn_mask="minus_infinity", spans="equal"),
    AttentionCase("mask_finfo_min", 61, 127, attn_mask="finfo_min", spans="equal"),
    AttentionCase("fully_masked_rows", 61, 127, attn_mask="empty_rows", spans="equal",
        span_bias="full"),
    AttentionCase("padding_left", 61, 127, batch_size=3, key_padding="left", spans="equal",
        options={"is_causal": True}),
    AttentionCase("padding_right", 61, 250, batch_size=3, key_padding="right", spans="equal"),
    AttentionCase("padding_everything", 33, 127, batch_size=2, key_padding="everything",
        spans="equal", span_bias="per_row"),
    # windows
    AttentionCase("window_causal", 130, 250, spans="equal", options={"is_causal": True,
        "window": 40}),
    AttentionCase("window_left", 130, 250, spans="equal", options={"window": (17, None)}),
    AttentionCase("window_right", 130, 250, spans="equal", options={"window": (-1, 5)}),
    AttentionCase("window_both", 250, 250, spans="equal", options={"window": 9}),
    AttentionCase("window_0", 61, 61, spans="equal", options={"window": 0}),
    AttentionCase("window_over_blocks", 150, 1540, num_heads=1, head_dim=32, spans="gaps",
        options={"window": (560, 3)}),
    AttentionCase("window_empty_rows", 250, 61, spans="equal", options={"window": (3, 2)}),
    # soft cap, scale, rows
    AttentionCase("softcap", 61, 127, spans="equal", options={"softcap": 2.0, "is_causal": True}),
    AttentionCase("scale", 61, 127, spans="equal", options={"scale": 0.3}),
    AttentionCase("rows_last", 130, 250, spans="equal", span_bias="full",
        options={"rows": slice(-5, None), "is_causal": True}),
    AttentionCase("rows_middle", 130, 127, num_heads=4, num_kv_heads=2, spans="equal",
        options={"rows": (61, 68)}),
    AttentionCase("rows_far", 300, 130, num_heads=2, num_kv_heads=1, spans="equal",
        options={"rows": (205, 213)}),  # most blocks of queries have none of them
    AttentionCase("rows_none", 61, 127, spans="equal", options={"rows": (7, 7)}),
    # extremes
    AttentionCase("large_scores", 61, 250, scores="large", spans="equal", options={"scale": 1.0}),
    AttentionCase("increasing_scores", 61, 500, scores="increasing", spans="equal", num_spans=8),
    AttentionCase("increasing_for_long", 61, 1700, num_heads=4, head_dim=40, head_dim_v=80,
        scores="increasing", spans="ragged", num_spans=30, options={"is_causal": True}),
)
# fmt: on
BY_NAME = {case.name: case for case in CASES}
