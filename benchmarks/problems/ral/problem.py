"""The token-level RAL loss of a layer: the problem of the ral objective.

    L = E_t[A_t JSD(p_t || r_t)]      eq. (2) of arXiv 2602.04884, forward and backward to q and k

p is the policy of q and k, and r the reference policy: the same q and k a small step away, as in
the second gradient step on the same rollouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...harness.inputs import Heads, LayerInputs, random_layer
from ...harness.objective import Problem

DEFAULT_ROWS = 256
STEP = 0.05  # of the reference from the policy: noise on q and k, relative to their RMS


class ResponseRows(Problem):
    """What problems have in common whose loss is over the last T of N queries."""

    @property
    def num_rows(self) -> int:
        return self.q.shape[2]

    @property
    def pairs(self) -> int:
        seen = self.seqlen * self.num_rows - self.num_rows * (self.num_rows - 1) // 2
        return self.q.shape[1] * seen

    def inputs(self) -> tuple[Tensor, ...]:
        return self.q, self.k

    def output_gradients(self, gated: bool) -> tuple[Tensor, ...]:
        return (torch.ones((), device=self.q.device),)

    def judged(self, name: str, output: Tensor) -> Tensor:
        return output


@dataclass(frozen=True)
class RalProblem(ResponseRows):
    """One size: the last T of N queries are the response."""

    q: Tensor  # [1, H, T, D], the response's
    k: Tensor  # [1, Hk, N, D]
    reference_q: Tensor  # as q
    reference_k: Tensor  # as k
    # [1, H, N - T, D], the queries before the response: for those who compute the whole layer
    prompt_q: Tensor
    reference_prompt_q: Tensor
    advantages: Tensor  # float32 [1, T], of both signs
    span_ids: Tensor  # int32 [N], -1 = text
    num_spans: int

    def tiny(self) -> RalProblem:
        return random_problem([32, 32], 16, self.heads, self.q.dtype, "cpu")


def make_problem(layer: LayerInputs, rows: int | None = None) -> RalProblem:
    """The last `rows` queries of a layer, a reference policy one step away, and fixed advantages.

    The first query of a sequence sees no key but its own and has no policy; it is left out.
    """
    generator = torch.Generator().manual_seed(30)

    def a_step_away(x: Tensor) -> Tensor:
        noise = torch.randn(x.transpose(1, 2).shape, generator=generator).transpose(1, 2)
        rms = x.float().square().mean().sqrt()
        return (x.float() + STEP * rms * noise.to(x.device)).to(x.dtype)

    def of_its_own(x: Tensor) -> Tensor:
        """A copy of a part of q, token-major as the whole."""
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    q, k = layer.q, layer.k
    seqlen = k.shape[2]
    rows = min(DEFAULT_ROWS if rows is None else rows, seqlen - 1)
    reference_q, reference_k = a_step_away(q), a_step_away(k)
    return RalProblem(
        q=of_its_own(q[:, :, seqlen - rows :]),
        k=k,
        reference_q=of_its_own(reference_q[:, :, seqlen - rows :]),
        reference_k=reference_k,
        prompt_q=of_its_own(q[:, :, : seqlen - rows]),
        reference_prompt_q=of_its_own(reference_q[:, :, : seqlen - rows]),
        # a mean well off 0, or the terms of the loss would cancel and hide errors from the gate
        advantages=(torch.randn(1, rows, generator=generator) + 0.5).to(q.device),
        span_ids=layer.spans.ids.to(q.device),
        num_spans=layer.spans.num_spans,
    )


def random_problem(
    span_lengths: Sequence[int], rows: int, heads: Heads, dtype: torch.dtype, device: str
) -> RalProblem:
    return make_problem(random_layer(span_lengths, heads, dtype, device), rows)
