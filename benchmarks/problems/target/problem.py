"""Response rows and the keys that they should attend to: the problem of the target objective.

    L = E_t[w_t CE(r_t, p_t)],   CE = -sum r log p       forward and backward to q and k

p_t is the policy of row t. r_t has the weights of a few marked keys, such as a box in an image, the
same for every row. It is restricted to the keys before the row and renormalised there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...harness.inputs import Heads, LayerInputs, random_layer
from ..ral.problem import DEFAULT_ROWS, ResponseRows

MARKED = 16  # one key in so many has weight


@dataclass(frozen=True)
class TargetProblem(ResponseRows):
    """One size: the last T of N queries are the response."""

    q: Tensor  # [1, H, T, D], the response's
    k: Tensor  # [1, Hk, N, D]
    values: Tensor  # float32 [1, 1, K], the weights of the marked keys
    ids: Tensor  # int64 [1, 1, K]
    weights: Tensor  # float32 [1, T] > 0
    span_ids: Tensor  # int32 [N], -1 = text
    num_spans: int

    @property
    def dense(self) -> Tensor:
        """float32 [1, 1, N], the weights of all keys."""
        zeros = torch.zeros(1, 1, self.seqlen, device=self.q.device)
        return zeros.scatter(-1, self.ids, self.values)

    def tiny(self) -> TargetProblem:
        return random_problem([32, 32], 16, self.heads, self.q.dtype, "cpu")


def make_problem(layer: LayerInputs, rows: int | None = None) -> TargetProblem:
    """The last `rows` queries of a layer, a run of marked keys in the first half, and weights."""
    generator = torch.Generator().manual_seed(31)
    q, k = layer.q, layer.k
    seqlen = k.shape[2]
    rows = min(DEFAULT_ROWS if rows is None else rows, seqlen // 2)
    count = max(seqlen // MARKED, 1)
    return TargetProblem(
        q=q[:, :, seqlen - rows :].transpose(1, 2).contiguous().transpose(1, 2),
        k=k,
        values=(torch.rand(1, 1, count, generator=generator) + 0.1).to(q.device),
        ids=torch.arange(seqlen // 8, seqlen // 8 + count, device=q.device)[None, None],
        weights=(torch.rand(1, rows, generator=generator) + 0.5).to(q.device),
        span_ids=layer.spans.ids.to(q.device),
        num_spans=layer.spans.num_spans,
    )


def random_problem(
    span_lengths: Sequence[int], rows: int, heads: Heads, dtype: torch.dtype, device: str
) -> TargetProblem:
    return make_problem(random_layer(span_lengths, heads, dtype, device), rows)
