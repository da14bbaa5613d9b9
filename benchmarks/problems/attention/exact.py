"""The judge: attention, marginals and gradients in float64 on some rows, never N x N.

It is plain PyTorch under autograd and shares no code with the package. So a contestant of the
package is not compared with its own reference backend. With output gradients that are zero outside
the chosen rows, these rows give the exact dq, dk and dv of the whole problem.
"""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor

from ...harness.layouts import FRAME_TOKENS
from .problem import AttentionProblem, in_layout


def exact(problem: AttentionProblem, *, with_marginals: bool) -> dict[str, Tensor]:
    """The gate's rows of out and marginals, and the gradients of the loss on them, in float64.

    Args:
        problem: causal self-attention with spans.
        with_marginals: whether the loss depends on the marginals too, or on out alone.

    Returns:
        out [1, H, R, D], marginals [1, H, R, S], dq [1, H, N, D], dk and dv [1, Hk, N, D]; and the
        scalars slack_dq and slack_dk: the relative error that one rounding of `out` to the inputs'
        dtype causes in them through delta = rowsum(dout * out), as in every flash backward. It
        grows with length where attention is flat: delta's error is multiplied by the mean key,
        which cancels in the exact sums.
    """
    rows = problem.gate_rows
    group = problem.heads.num_heads // problem.heads.num_kv_heads
    masked = torch.arange(problem.seqlen, device=rows.device) > rows[:, None]  # [R, N]
    one_hot = problem.one_hot.double()
    eps, scale = torch.finfo(problem.q.dtype).eps, problem.heads.head_dim**-0.5
    noise = {"slack_dq": 0.0, "slack_dk": 0.0}  # squared norms
    parts: dict[str, list[Tensor]] = {name: [] for name in ("out", "marginals", "dq", "dk", "dv")}
    for kv_head in range(problem.heads.num_kv_heads):  # one at a time: G x R x N numbers live
        heads = slice(kv_head * group, (kv_head + 1) * group)
        q = problem.q[0, heads].index_select(1, rows).double().requires_grad_()  # [G, R, D]
        k = problem.k[0, kv_head].double().requires_grad_()  # [N, D]
        v = problem.v[0, kv_head].double().requires_grad_()
        scores = (q @ k.T * scale).masked_fill(masked, -torch.inf)
        probabilities = scores.softmax(-1)
        out, marginals = probabilities @ v, probabilities @ one_hot
        dout = problem.dout[0, heads].index_select(1, rows).double()
        loss = (out * dout).sum()
        if with_marginals:
            dmarginals = problem.dmarginals[0, heads].index_select(1, rows).double()
            loss = loss + (marginals * dmarginals).sum()
        dq_rows, dk, dv = torch.autograd.grad(loss, (q, k, v))
        with torch.no_grad():
            # rounding to nearest: a standard deviation of about eps / 4 of each element
            ddelta = eps / 4 * scale * (dout * out).norm(dim=-1, keepdim=True)  # [G, R, 1]
            noise["slack_dq"] += float(((probabilities @ k) * ddelta).square().sum())
            spread = probabilities.square().sum(-1, keepdim=True) * q.square().sum(-1, keepdim=True)
            noise["slack_dk"] += float((spread * ddelta.square()).sum())
        dq = torch.zeros_like(problem.q[0, heads], dtype=torch.float64)
        dq[:, rows] = dq_rows
        for name, part in (("out", out), ("marginals", marginals), ("dq", dq)):
            parts[name].append(part.detach())
        parts["dk"].append(dk[None])
        parts["dv"].append(dv[None])
    found = {name: torch.cat(tensors)[None] for name, tensors in parts.items()}
    for name, squared in noise.items():
        size = found[name.removeprefix("slack_")].norm()
        found[name] = torch.tensor(squared, dtype=torch.float64, device=size.device).sqrt() / size
    return found


def exact_answers(problem: AttentionProblem, which: Set[str]) -> dict[str, dict[str, Tensor]]:
    """Answers: "all" for the loss on out and marginals, "out_only" for the loss on out alone.

    The name of a layout stands for "all" with its spans.
    """
    answers = {}
    for name in sorted(which):
        judged = in_layout(problem, layout=name) if name in FRAME_TOKENS else problem
        answers[name] = exact(judged, with_marginals=name != "out_only")
    return answers
