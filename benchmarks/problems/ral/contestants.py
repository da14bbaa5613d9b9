"""The contestants: the RAL loss of this package, and what a PyTorch user would do instead.

Every contestant is written as a careful user would write it, and none is made slower on purpose.
All get q and k of policy and reference policy and compute both policies on the clock; only
`ral_again` may reuse results. Masks, and the copy of the reference policy's q and k in an
`AttentionSnapshot`, are made before the clock starts. `prepare` gets the problem and returns
`loss(q, k) -> (loss,)`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ral_kernels.ops.divergence import divergence
from ral_kernels.ops.policy import attention_policy, ral_loss
from ral_kernels.runtime.backends import BackendName
from ral_kernels.snapshot import AttentionSnapshot

from ...harness.objective import Contestant
from ..attention.contestants import no_cuda_kernels
from .problem import RalProblem

Loss = Callable[[Tensor, Tensor], "tuple[Tensor]"]
TINY = torch.finfo(torch.float32).tiny


def ral(problem: RalProblem, *, backend: BackendName | None = None) -> Loss:
    """The streaming loss, at the first comparison with a snapshot."""
    snapshot = AttentionSnapshot(problem.reference_q, problem.reference_k)

    def loss(q: Tensor, k: Tensor) -> tuple[Tensor]:
        # A view of all samples: what a snapshot remembers of a comparison is not passed on to it,
        # so that the reference policy is computed on the clock, as for all contestants.
        return (ral_loss(q, k, snapshot[:], problem.advantages, backend=backend),)

    return loss


def ral_again(problem: RalProblem) -> Loss:
    """The same in a later inner step on the same rollouts: the snapshot has its normalisers."""
    snapshot = AttentionSnapshot(problem.reference_q, problem.reference_k)

    def loss(q: Tensor, k: Tensor) -> tuple[Tensor]:
        return (ral_loss(q, k, snapshot, problem.advantages),)

    with torch.enable_grad():
        loss(problem.q.detach().requires_grad_(), problem.k.detach().requires_grad_())
    return loss


def ral_dense(problem: RalProblem) -> Loss:
    """The same from the parts: both policies as [T, N] rows, and their divergence."""

    def loss(q: Tensor, k: Tensor) -> tuple[Tensor]:
        with torch.no_grad():
            r = attention_policy(problem.reference_q, problem.reference_k)
        p = attention_policy(q, k)
        return ((problem.advantages * divergence(p, r)).mean(),)

    return loss


def _jsd(p: Tensor, r: Tensor) -> Tensor:
    """Over the last dimension. `TINY` in place of 0 keeps 0 / 0 out of xlogy and its gradient."""
    m = ((p + r) / 2).clamp_min(TINY)
    terms = [torch.xlogy(x, (x / m).clamp_min(TINY)) for x in (p, r)]
    return (terms[0] + terms[1]).sum(-1) / 2


def last_rows_policy(q: Tensor, k: Tensor, ahead: Tensor) -> Tensor:
    """[1, R, N'] of the last R of N' tokens; `ahead` [>= R, >= R] is true above the diagonal.

    The query heads of a kv head are rows of one matmul, so k is not repeated. The mask covers only
    the square of keys of the rows' own tokens. The softmax is float32.
    """
    rows, keys, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    grouped = q.unflatten(1, (-1, group)).flatten(2, 3)  # [1, Hk, G * R, D]
    scores = (grouped * q.shape[3] ** -0.5 @ k.mT).unflatten(2, (group, rows))
    scores[..., keys - rows :].masked_fill_(ahead[:rows, :rows], -torch.inf)
    mean = scores.softmax(-1, dtype=torch.float32).mean((1, 2))
    own = torch.arange(rows, device=q.device)
    mean = mean.index_put((own.new_zeros(rows), own, keys - rows + own), mean.new_zeros(()))
    return mean / mean.sum(-1, keepdim=True)


def chunked(problem: RalProblem, *, chunk_rows: int) -> Loss:
    """Rows in chunks against the keys that they see, each recomputed in the backward."""
    ahead = torch.ones(chunk_rows, chunk_rows, dtype=torch.bool, device=problem.q.device).triu(1)

    def chunk(q: Tensor, k: Tensor, r_q: Tensor, r_k: Tensor, advantages: Tensor) -> Tensor:
        with torch.no_grad():
            r = last_rows_policy(r_q, r_k, ahead)
        return (advantages * _jsd(last_rows_policy(q, k, ahead), r)).sum()

    def others(rows: slice, keys: slice) -> tuple[Tensor, ...]:
        return (
            problem.reference_q[:, :, rows],
            problem.reference_k[:, :, keys],
            problem.advantages[:, rows],
        )

    return mean_of_chunks(chunk, others, chunk_rows)


def mean_of_chunks(
    chunk: Callable[..., Tensor],
    others: Callable[[slice, slice], tuple[Tensor, ...]],
    chunk_rows: int,
) -> Loss:
    """The mean over rows of what `chunk` sums over some, each chunk recomputed in the backward.

    Args:
        chunk: gets q of its rows, k of the keys up to its last row, and `others`.
        others: further inputs, from these rows and keys.
        chunk_rows: rows of a chunk.
    """

    def loss(q: Tensor, k: Tensor) -> tuple[Tensor]:
        num_rows, before = q.shape[2], k.shape[2] - q.shape[2]
        parts = []
        for start in range(0, num_rows, chunk_rows):
            stop = min(start + chunk_rows, num_rows)
            rows, keys = slice(start, stop), slice(0, before + stop)
            inputs = (q[:, :, rows], k[:, :, keys], *others(rows, keys))
            parts.append(
                checkpoint(chunk, *inputs, use_reentrant=False, preserve_rng_state=False)
                if torch.is_grad_enabled()
                else chunk(*inputs)
            )
        return (torch.stack(parts).sum() / num_rows,)

    return loss


def eager(problem: RalProblem) -> Loss:
    """What public snippets do: `output_attentions` of the layer for both policies, then eq. (1).

    The [H, N, N] maps have the dtype of the model, as transformers returns them. The own key is
    masked, heads are averaged, rows are renormalised. The JSD is computed for every row, and a
    completion mask keeps the rows of the response.
    """
    group = problem.heads.num_heads // problem.heads.num_kv_heads
    scale, seqlen, num_rows = problem.heads.head_dim**-0.5, problem.seqlen, problem.num_rows
    dtype, device = problem.q.dtype, problem.q.device
    lowest = torch.finfo(dtype).min
    mask = torch.full((seqlen, seqlen), lowest, dtype=dtype, device=device).triu(1)
    itself = torch.eye(seqlen, dtype=torch.bool, device=device)
    response = torch.zeros(1, seqlen, device=device)
    response[:, -num_rows:] = 1
    advantages = response.clone()
    advantages[:, -num_rows:] = problem.advantages

    def policy(prompt_q: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q, k = torch.cat([prompt_q, q], 2), k.repeat_interleave(group, 1)
        scores = q @ k.mT * scale + mask
        maps = scores.softmax(-1, dtype=torch.float32).to(dtype)
        mean = maps.masked_fill(itself, 0.0).mean(1, dtype=torch.float32)
        return mean / mean.sum(-1, keepdim=True).clamp_min(1e-8)

    def loss(q: Tensor, k: Tensor) -> tuple[Tensor]:
        with torch.no_grad():
            r = policy(problem.reference_prompt_q, problem.reference_q, problem.reference_k)
        weighted = advantages * _jsd(policy(problem.prompt_q, q, k), r) * response
        return (weighted.sum() / response.sum(),)

    return loss


def _full_matrix(problem: RalProblem) -> int:
    return problem.heads.num_heads * problem.seqlen**2


def eager_bytes(problem: RalProblem, backward: bool) -> int:
    # Measured on CPU, bytes an element of [H, N, N]. In float32 conversions cost nothing.
    if problem.q.dtype == torch.float32:
        return _full_matrix(problem) * 14
    return _full_matrix(problem) * (15 if backward else 11)


def wrong(problem: RalProblem) -> Loss:
    """Deliberately wrong, to show that the gate works: another divergence."""
    snapshot = AttentionSnapshot(problem.reference_q, problem.reference_k)

    def loss(q: Tensor, k: Tensor) -> tuple[Tensor]:
        return (ral_loss(q, k, snapshot, problem.advantages, kind="kl"),)

    return loss


# rows -> where it takes part unasked
CHUNKS = {16: ("cpu", "cuda"), 64: ("cpu", "cuda"), 256: ("cuda",)}
CONTESTANTS = (
    Contestant("ral", "ral_kernels, ral_loss", ral, ours=True),
    Contestant(
        "ral_cuda",
        "ral_loss in CUDA C++",
        functools.partial(ral, backend="cuda"),
        on=("cuda",),
        refuse=no_cuda_kernels,
        ours=True,
    ),
    Contestant("ral_again", "ral_loss, known snapshot", ral_again, ours=True),
    Contestant("ral_dense", "ral_kernels, dense rows", ral_dense, ours=True),
    *(
        Contestant(
            f"chunked_{rows}",
            f"chunked {rows}, checkpointed",
            functools.partial(chunked, chunk_rows=rows),
            on=on,
        )
        for rows, on in CHUNKS.items()
    ),
    Contestant(
        "eager", "eager, full maps of the layer", eager, bytes_needed=eager_bytes, work=_full_matrix
    ),
    Contestant("wrong", "deliberately wrong", wrong, on=()),
)
