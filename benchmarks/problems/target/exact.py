"""The judge: the loss and its gradients in float64, some rows at a time.

It is plain PyTorch under autograd and shares no code with the package.
"""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor

from ..ral.exact import ROWS, exact_policy
from .problem import TargetProblem


def exact_answers(problem: TargetProblem, which: Set[str]) -> dict[str, dict[str, Tensor]]:
    """The one answer there is, "all"."""
    return {name: exact(problem) for name in sorted(which)}


def exact(problem: TargetProblem) -> dict[str, Tensor]:
    """The loss, and dq and dk."""
    device, num_rows = problem.q.device, problem.num_rows
    k = problem.k[0].double().requires_grad_()  # [Hk, N, D]
    values = problem.dense[0, 0].double()
    dk, dq = torch.zeros_like(k), []
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, num_rows, ROWS):
        rows = slice(start, min(start + ROWS, num_rows))
        own = torch.arange(num_rows, device=device)[rows] + problem.seqlen - num_rows
        q = problem.q[0, :, rows].double().requires_grad_()  # [H, R, D]
        p = exact_policy(q, k, own, None)
        valid = torch.arange(problem.seqlen, device=device) < own[:, None]
        r = torch.where(valid, values, 0.0)
        r = r / r.sum(-1, keepdim=True)
        terms = -r * torch.where(valid, p, 1.0).log()
        part = (problem.weights[0, rows].double() * terms.sum(-1)).sum() / num_rows
        dq_part, dk_part = torch.autograd.grad(part, (q, k))
        dq.append(dq_part)
        dk += dk_part
        loss += part.detach()
    return {"loss": loss, "dq": torch.cat(dq, 1)[None], "dk": dk[None]}
