"""Causal self-attention with span marginals: the problem of the attention objective."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

import ral_kernels as rk

from ...harness.inputs import Heads, LayerInputs, random_layer
from ...harness.layouts import spans_of
from ...harness.objective import Problem

ALL_ROWS_UP_TO = 600  # keys; below this length the float64 gate looks at every query
GATE_ROWS = 128


@dataclass(frozen=True)
class AttentionProblem(Problem):
    """One size: T = N, and the loss <out, dout> + <marginals, dmarginals>."""

    q: Tensor  # [1, H, N, D]
    k: Tensor  # [1, Hk, N, D]
    v: Tensor  # [1, Hk, N, D]
    span_ids: Tensor  # int32 [N], -1 = text
    num_spans: int
    dout: Tensor  # [1, H, N, D], the gradient of the loss in out
    dmarginals: Tensor  # float32 [1, H, N, S], and in the marginals
    gate_rows: Tensor  # int64 [R] ascending: the queries that are held against float64

    @cached_property
    def spans(self) -> rk.Spans:
        return rk.Spans(self.span_ids, self.num_spans)

    @cached_property
    def one_hot(self) -> Tensor:
        """[N, S] in the dtype of v: column s is 1 on the keys of span s."""
        spans = torch.arange(self.num_spans, device=self.v.device)
        return (self.span_ids[:, None] == spans).to(self.v.dtype)

    @property
    def pairs(self) -> int:
        return self.q.shape[1] * self.seqlen * (self.seqlen + 1) // 2

    def inputs(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v

    def output_gradients(self, gated: bool) -> tuple[Tensor, ...]:
        """Dout and dmarginals; `gated` with every row outside the gate set to zero."""
        if not gated:
            return self.dout, self.dmarginals
        keep = torch.zeros(self.seqlen, 1, dtype=torch.bool, device=self.q.device)
        keep[self.gate_rows] = True
        # multiplying keeps the token-major memory of dout, which torch.where would not
        return self.dout * keep, self.dmarginals * keep

    def judged(self, name: str, output: Tensor) -> Tensor:
        return output.index_select(2, self.gate_rows)

    def tiny(self) -> AttentionProblem:
        return random_problem([32, 32], self.heads, self.q.dtype, "cpu")


def make_problem(layer: LayerInputs, rows: int | None = None) -> AttentionProblem:
    """Complete q, k, v with fixed random output gradients and the rows of the gate."""
    assert rows is None
    generator = torch.Generator().manual_seed(20)
    q, k, v, spans = layer.q, layer.k, layer.v, layer.spans
    seqlen, num_heads = q.shape[2], q.shape[1]
    # token-major memory, as q itself and as the gradient that a model's output projection sends
    # back
    dout = torch.randn(1, seqlen, num_heads, v.shape[3], generator=generator).transpose(1, 2)
    dmarginals = torch.randn(1, num_heads, seqlen, spans.num_spans, generator=generator)
    gate_rows = rows_of_gate(seqlen, generator)
    return AttentionProblem(
        q=q,
        k=k,
        v=v,
        span_ids=spans.ids.to(q.device),
        num_spans=spans.num_spans,
        dout=dout.to(q.device, q.dtype),
        dmarginals=dmarginals.to(q.device),
        gate_rows=gate_rows.to(q.device),
    )


def rows_of_gate(seqlen: int, generator: torch.Generator) -> Tensor:
    """The queries that are compared with float64, int64 [R] ascending."""
    if seqlen <= ALL_ROWS_UP_TO:
        return torch.arange(seqlen)
    # the first and last query always: the shortest and the longest sums
    inner = torch.randperm(seqlen - 2, generator=generator)[: GATE_ROWS - 2] + 1
    return torch.cat([torch.tensor([0, seqlen - 1]), inner]).sort().values


def in_layout(problem: AttentionProblem, *, layout: str) -> AttentionProblem:
    return with_spans(problem, spans_of(layout, problem.seqlen))


def with_spans(problem: AttentionProblem, spans: rk.Spans) -> AttentionProblem:
    """The same q, k, v and dout with other spans, and a fixed random dmarginals for them."""
    device = problem.q.device
    shape = (1, problem.heads.num_heads, problem.seqlen, spans.num_spans)
    # Drawn on the device: on a GPU with thousands of spans the CPU would take seconds.
    generator = torch.Generator(device).manual_seed(21)
    return dataclasses.replace(
        problem,
        span_ids=spans.ids.to(device),
        num_spans=spans.num_spans,
        dmarginals=torch.randn(shape, generator=generator, device=device),
    )


def random_problem(
    span_lengths: Sequence[int], heads: Heads, dtype: torch.dtype, device: str
) -> AttentionProblem:
    return make_problem(random_layer(span_lengths, heads, dtype, device))
