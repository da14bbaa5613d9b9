"""The judge: the RAL loss and its gradients in float64, some rows at a time.

It is plain PyTorch under autograd and shares no code with the package. So a contestant of the
package is not compared with its own reference backend.
"""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor

from .problem import RalProblem

ROWS = 32  # at a time: H x ROWS x N numbers live, a few times over


def exact_answers(problem: RalProblem, which: Set[str]) -> dict[str, dict[str, Tensor]]:
    """The one answer there is, "all"."""
    return {name: exact(problem) for name in sorted(which)}


def exact(problem: RalProblem) -> dict[str, Tensor]:
    """The loss and the gradients in q and k.

    Policy and reference policy are a small step apart, so the loss is a difference of nearly equal
    numbers. PyTorch rounds the scores to the inputs' dtype between the matmul and the softmax, and
    so the maps that a model returns. It rounds p / m, which is close to 1, to float32. None of this
    is a mistake. The slack is the error that this rounding causes in otherwise exact arithmetic.
    Kernels that keep scores in float32 and avoid cancellation are far below it.

    Returns:
        loss (scalar), dq, dk; size_loss = E_t[|A_t| JSD_t], for a loss whose terms nearly cancel;
        and the relative errors slack_loss, slack_dq, slack_dk.
    """
    found, values = _loss(problem, None)
    rounded, rounded_values = _loss(problem, problem.q.dtype)
    weights = problem.advantages[0].double().abs() / problem.num_rows
    found["size_loss"] = (weights * values).sum()
    # of each term, not of the sum, in which errors may cancel by luck
    found["slack_loss"] = (weights * (rounded_values - values).abs()).sum() / found["size_loss"]
    for name in ("dq", "dk"):
        found[f"slack_{name}"] = (rounded[name] - found[name]).norm() / found[name].norm()
    return found


def _loss(problem: RalProblem, rounding: torch.dtype | None) -> tuple[dict[str, Tensor], Tensor]:
    """Loss and gradients, and the JSD of each row; `rounding` of scores and probabilities."""
    device, num_rows = problem.q.device, problem.num_rows
    k = problem.k[0].double().requires_grad_()  # [Hk, N, D]
    reference_k = problem.reference_k[0].double()
    dk = torch.zeros_like(k)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    parts: dict[str, list[Tensor]] = {"dq": [], "values": []}
    for start in range(0, num_rows, ROWS):
        rows = slice(start, min(start + ROWS, num_rows))
        own = torch.arange(num_rows, device=device)[rows] + problem.seqlen - num_rows
        q = problem.q[0, :, rows].double().requires_grad_()  # [H, R, D]
        with torch.no_grad():
            r = exact_policy(problem.reference_q[0, :, rows].double(), reference_k, own, rounding)
        p = exact_policy(q, k, own, rounding)
        valid = torch.arange(problem.seqlen, device=device) < own[:, None]
        m = torch.where(valid, (p + r) / 2, 1.0)
        p, r = torch.where(valid, p, 1.0), torch.where(valid, r, 1.0)
        ratios = [_rounded(x / m, None if rounding is None else torch.float32) for x in (p, r)]
        terms = p * ratios[0].log() + r * ratios[1].log()
        values = torch.where(valid, terms, 0.0).sum(-1) / 2
        part = (problem.advantages[0, rows].double() * values).sum() / num_rows
        dq, dk_part = torch.autograd.grad(part, (q, k))
        dk += dk_part
        loss += part.detach()
        parts["dq"].append(dq)
        parts["values"].append(values.detach())
    dq = torch.cat(parts["dq"], 1)
    return {"loss": loss, "dq": dq[None], "dk": dk[None]}, torch.cat(parts["values"])


def exact_policy(q: Tensor, k: Tensor, own: Tensor, rounding: torch.dtype | None) -> Tensor:
    """[R, N] of the rows whose own keys are `own`."""
    keys = torch.arange(k.shape[1], device=k.device)
    grouped = q.unflatten(0, (k.shape[0], -1))  # [Hk, G, R, D]
    scores = _rounded(grouped @ k[:, None].mT * q.shape[-1] ** -0.5, rounding)
    scores = scores.masked_fill(keys > own[:, None], -torch.inf)
    mean = (
        _rounded(scores.softmax(-1), rounding).mean((0, 1)).masked_fill(keys == own[:, None], 0.0)
    )
    return mean / mean.sum(-1, keepdim=True)


def _rounded(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The values of `dtype`, the gradient of x."""
    return x if dtype is None else x + (x.to(dtype).double() - x).detach()
