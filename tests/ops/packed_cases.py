"""Packed sequences for the tests of `policy` and `policy_divergence`, and each sequence alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import ral_kernels as rk
from tests.ops.policy_cases import PolicyInputs, draw_weights
from tests.ops.policy_eager import eager_policy

Lengths = tuple[tuple[int, int], ...]


def offsets(lengths: tuple[int, ...] | list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0)]).int()


@dataclass(frozen=True)
class PackedInputs(PolicyInputs):
    """`attention_policy(q, k, **options)`, whose options hold the offsets."""

    @property
    def packing(self) -> dict[str, Any]:
        names = ("cu_seqlens_q", "cu_seqlens_k", "rows")
        return {name: self.options[name] for name in names if name in self.options}

    def to(self, dtype: torch.dtype) -> PackedInputs:
        moved = PolicyInputs(self.q, self.k, self.options).to(dtype)
        return PackedInputs(moved.q, moved.k, moved.options)

    def requires_grad_(self) -> PackedInputs:
        super().requires_grad_()
        return self

    def sequences(self) -> list[PolicyInputs]:
        """Each sequence as a call of its own, on views of the same tensors."""
        bounds = [self.options[name].tolist() for name in ("cu_seqlens_q", "cu_seqlens_k")]
        rows = self.options.get("rows", [slice(None)] * (len(bounds[0]) - 1))
        found, row = [], 0
        for i, ((a, b), (c, d), chosen) in enumerate(
            zip(*map(pairwise, bounds), rows, strict=True)
        ):
            options = {k: v for k, v in self.options.items() if not k.startswith("cu_seqlens")}
            own = PolicyInputs(self.q[:, :, a:b], self.k[:, :, c:d], {**options, "rows": chosen})
            count = len(range(b - a)[own.rows])
            if "spans" in options:
                spans = options["spans"]
                own.options["spans"] = rk.Spans(spans.ids.flatten()[c:d], spans.num_spans)
            if "scope" in options:
                own.options["scope"] = options["scope"].flatten()[c:d]
            if "span_bias" in options and options["span_bias"].shape[2] > 1:
                own.options["span_bias"] = options["span_bias"][:, :, row : row + count]
            if "head_weights" in options and options["head_weights"].dim() == 2:
                own.options["head_weights"] = options["head_weights"][i]
            found.append(own)
            row += count
        return found

    def join(self, parts: list[Tensor]) -> Tensor:
        """[1, T_i, N_i or S] of each sequence as [1, T, max N_i or S], with 0 elsewhere."""
        longest = max((x.shape[2] for x in parts), default=0)
        if "spans" in self.options:
            longest = self.options["spans"].num_spans
        padded = [torch.nn.functional.pad(x, (0, longest - x.shape[2])) for x in parts]
        tail = 0 if "rows" in self.options else self.q.shape[2] - int(
            self.options["cu_seqlens_q"][-1]
        )  # fmt: skip
        return torch.cat([*padded, self.q.new_zeros(1, tail, longest)], dim=1)

    def eager(self) -> tuple[Tensor, Tensor]:
        """(p, lse of every row that has one) by `eager_policy`, sequence by sequence."""
        found = [eager_policy(x) for x in self.sequences()]
        lse = [x.flatten() for _, x in found]
        return self.join([p for p, _ in found]), torch.cat([*lse, torch.zeros(0)])


@dataclass(frozen=True)
class PackedCase:
    name: str
    lengths: Lengths  # queries and keys of each sequence
    rows: tuple[Any, ...] | None = None
    tail: tuple[int, int] = (0, 0)  # tokens after the last offset
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    num_spans: int = 0
    span_bias: str = "none"  # none | full | per_span
    scope: bool = False
    token_major: bool = False
    head_weights: str = "none"  # as in PolicyCase
    options: dict[str, Any] = field(default_factory=dict)

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> PackedInputs:
        generator = torch.Generator().manual_seed(seed)

        def draw(heads: int, tokens: int) -> Tensor:
            x = torch.randn(1, tokens, heads, self.head_dim, generator=generator).to(dtype)
            return x.transpose(1, 2) if self.token_major else x.transpose(1, 2).contiguous()

        tokens_q = sum(t for t, _ in self.lengths) + self.tail[0]
        tokens_k = sum(n for _, n in self.lengths) + self.tail[1]
        q, k = draw(self.num_heads, tokens_q), draw(self.num_kv_heads, tokens_k)
        options: dict[str, Any] = {
            "is_causal": True,
            **self.options,
            "cu_seqlens_q": offsets([t for t, _ in self.lengths]),
            "cu_seqlens_k": offsets([n for _, n in self.lengths]),
        }
        if self.rows is not None:
            options["rows"] = self.rows
        if self.num_spans:
            ids = torch.randint(-1, self.num_spans, (tokens_k,), generator=generator)
            options["spans"] = rk.Spans(ids, self.num_spans)
        inputs = PackedInputs(q, k, options)
        if self.span_bias != "none":
            full = self.span_bias == "full"
            num_rows = sum(len(range(x.q.shape[2])[x.rows]) for x in inputs.sequences())
            num_rows += 0 if self.rows is not None else self.tail[0]
            shape = (1, *((self.num_heads, num_rows) if full else (1, 1)), self.num_spans)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            options["span_bias"] = torch.randn(shape, generator=generator).to(wide)
        if self.head_weights != "none":
            weights = draw_weights(self.head_weights, len(self.lengths), self.num_heads, seed)
            options["head_weights"] = weights
        if self.scope:
            options["scope"] = torch.rand(tokens_k, generator=generator) < 0.6
        return inputs

    def snapshot_inputs(self, dtype: torch.dtype) -> PackedInputs:
        """q and k of another model over the same sequences."""
        other = replace(
            self, num_heads=6, num_kv_heads=3, head_dim=20, num_spans=0, span_bias="none"
        )
        return other.inputs(dtype, seed=7)  # with head weights of its own, if any


# Without rows, without keys, of one row, with more queries than keys, off the blocks.
RAGGED: Lengths = ((5, 9), (0, 4), (1, 1), (9, 9), (3, 0), (7, 5), (61, 127), (1, 33))
ROWS = ((2, 5), (0, 0), (0, 1), slice(-4, None), (1, 3), slice(None), slice(20, 40), (0, 1))
SHORT = tuple((i % 4, (5 * i) % 7) for i in range(14))

# fmt: off
CASES: tuple[PackedCase, ...] = (
    PackedCase("ragged", RAGGED),
    PackedCase("rows", RAGGED, rows=ROWS),
    PackedCase("tail", RAGGED, tail=(3, 7)),
    PackedCase("tail_with_rows", RAGGED, rows=ROWS, tail=(3, 7)),
    PackedCase("many_short", SHORT),
    PackedCase("one_sequence", ((70, 130),)),
    PackedCase("gqa_7", RAGGED, num_heads=14, head_dim=64),
    PackedCase("mha_37", RAGGED, num_heads=3, num_kv_heads=3, head_dim=37),
    PackedCase("token_major", RAGGED, rows=ROWS, token_major=True),
    PackedCase("scope", RAGGED, tail=(2, 3), scope=True),
    PackedCase("with_self", RAGGED, options={"exclude_self": False}),
    PackedCase("not_causal", RAGGED, options={"is_causal": False}),
    PackedCase("window", RAGGED, options={"window": 20}),
    PackedCase("window_both", RAGGED, options={"window": (9, 5), "is_causal": False}),
    PackedCase("softcap", RAGGED, options={"softcap": 2.0, "scale": 0.3}),
    PackedCase("spans", RAGGED, tail=(3, 2), num_spans=5),
    PackedCase("span_bias", RAGGED, rows=ROWS, num_spans=9, span_bias="full"),
    PackedCase("bias_per_span", RAGGED, tail=(3, 2), num_spans=9, span_bias="per_span",
        scope=True, options={"softcap": 1.5}),
)
WEIGHTED: tuple[PackedCase, ...] = (
    PackedCase("weights", RAGGED, rows=ROWS, tail=(3, 7), head_weights="zeros"),
    PackedCase("weights_of_sequences", RAGGED, tail=(3, 7), head_weights="samples"),
    PackedCase("weights_softcap", SHORT, head_weights="samples", options={"softcap": 2.0}),
    PackedCase("weights_span_bias", RAGGED, rows=ROWS, num_spans=9, span_bias="full",
        head_weights="samples"),
)
# fmt: on
EMPTY = (  # nothing sees anything
    PackedCase("no_sequences", (), tail=(4, 5)),
    PackedCase("no_rows", ((0, 4), (0, 9))),
    PackedCase("no_keys", ((4, 0), (9, 0))),
)
BY_NAME = {case.name: case for case in CASES}
TOKEN_NAMES = tuple(case.name for case in CASES if case.num_spans == 0)
