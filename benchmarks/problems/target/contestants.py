"""The contestants: a target in this package, and what a PyTorch user would do instead.

Every contestant is written as a careful user would write it, and none is made slower on purpose.
Targets are made before the clock starts, as masks are. `prepare` gets the problem and returns
`loss(q, k) -> (loss,)`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import ral_kernels as rk

from ...harness.objective import Contestant
from ..ral.contestants import CHUNKS, Loss, last_rows_policy, mean_of_chunks
from .problem import TargetProblem


def _against(problem: TargetProblem, target: rk.AttentionTarget | Tensor) -> Loss:
    def loss(q: Tensor, k: Tensor) -> tuple[Tensor]:
        return (rk.ral_loss(q, k, target, problem.weights, kind="cross_entropy"),)

    return loss


def sparse(problem: TargetProblem) -> Loss:
    """The marked keys alone."""
    return _against(problem, rk.AttentionTarget(problem.values, problem.ids))


def dense(problem: TargetProblem) -> Loss:
    """The same with a weight for each key."""
    return _against(problem, rk.AttentionTarget(problem.dense))


def _rows(problem: TargetProblem, device: torch.device) -> Tensor:
    """[1, T, N]: the target of each row."""
    own = torch.arange(problem.seqlen - problem.num_rows, problem.seqlen, device=device)
    seen = torch.arange(problem.seqlen, device=device) < own[:, None]
    rows = problem.dense * seen
    return rows / rows.sum(-1, keepdim=True)


def dense_rows(problem: TargetProblem) -> Loss:
    """From the parts: both as [T, N] rows, and their divergence."""
    return _against(problem, _rows(problem, problem.q.device))


def chunked(problem: TargetProblem, *, chunk_rows: int) -> Loss:
    """Rows in chunks against the keys that they see, each recomputed in the backward."""
    ahead = torch.ones(chunk_rows, chunk_rows, dtype=torch.bool, device=problem.q.device).triu(1)
    values = problem.dense[0, 0]

    def chunk(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
        rows, keys = q.shape[2], k.shape[2]
        own = torch.arange(keys - rows, keys, device=q.device)
        r = values[:keys] * (torch.arange(keys, device=q.device) < own[:, None])
        r = r / r.sum(-1, keepdim=True)
        p = last_rows_policy(q, k, ahead)
        logs = p.clamp_min(torch.finfo(torch.float32).tiny).log()
        return -(weights * (r * logs).sum(-1)).sum()

    return mean_of_chunks(chunk, lambda rows, keys: (problem.weights[:, rows],), chunk_rows)


def wrong(problem: TargetProblem) -> Loss:
    """Deliberately wrong, to show that the gate works: keys beside the marked ones."""
    return _against(problem, rk.AttentionTarget(problem.values, problem.ids + 1))


CONTESTANTS = (
    Contestant("target", "ral_kernels, marked keys", sparse, ours=True),
    Contestant("target_dense", "ral_kernels, all keys", dense, ours=True),
    Contestant("target_rows", "ral_kernels, dense rows", dense_rows, ours=True),
    *(
        Contestant(
            f"chunked_{rows}",
            f"chunked {rows}, checkpointed",
            functools.partial(chunked, chunk_rows=rows),
            on=on,
        )
        for rows, on in CHUNKS.items()
    ),
    Contestant("wrong", "deliberately wrong", wrong, on=()),
)
