"""The judge: attention, marginals and gradients in float64 on some rows, never N x N.

It is plain PyTorch under autograd and shares no code with the package, so that a contestant of the
package is not held against its own reference. With output gradients that are zero outside the
chosen rows, these rows give the exact dq, dk and dv of the whole problem.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .inputs import Problem

# Largest relative error (Frobenius norm) that still counts as right: a few roundings of the inputs'
# own dtype. It tells a wrong answer from a right one; how close the right ones come stands in the
# table.
TOLERANCE = {
    torch.float64: {"forward": 1e-10, "gradient": 1e-9},
    torch.float32: {"forward": 2e-5, "gradient": 1e-4},
    torch.bfloat16: {"forward": 1.5e-2, "gradient": 3e-2},
    torch.float16: {"forward": 2e-3, "gradient": 5e-3},
}
GRADIENTS = ("dq", "dk", "dv")


def gate_gradients(problem: Problem) -> tuple[Tensor, Tensor]:
    """dout and dmarginals of the problem with every row outside the gate set to zero."""
    keep = torch.zeros(problem.seqlen, 1, dtype=torch.bool, device=problem.q.device)
    keep[problem.gate_rows] = True
    # multiplying keeps the token-major memory of dout, which torch.where would not
    return problem.dout * keep, problem.dmarginals * keep


def exact(problem: Problem, *, with_marginals: bool) -> dict[str, Tensor]:
    """The gate's rows of out and marginals, and the gradients of the loss on them, in float64.

    Args:
        problem: causal self-attention with spans.
        with_marginals: whether the loss looks at the marginals too, or at out alone.

    Returns:
        out [1, H, R, D], marginals [1, H, R, S], dq [1, H, N, D], dk and dv [1, Hk, N, D]; and the
        scalars slack_dq and slack_dk: the relative error that one rounding of `out` to the inputs'
        dtype causes in them by way of delta = rowsum(dout * out), as in every flash backward. It
        grows with length where attention is flat: delta's error meets the mean key, which the exact
        sums cancel.
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


def relative_errors(
    got: Mapping[str, Tensor | None], wanted: Mapping[str, Tensor]
) -> dict[str, float]:
    """||got - wanted|| / ||wanted|| of every tensor that is there; NaN where the answer is."""
    errors = {}
    for name, tensor in got.items():
        if tensor is None:
            continue
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"gate: {name} must be {tuple(wanted[name].shape)}; got {tuple(tensor.shape)}"
            )
        difference = tensor.detach().double() - wanted[name]
        errors[name] = float(difference.norm() / wanted[name].norm())
    return errors


def verdict(
    errors: Mapping[str, float], dtype: torch.dtype, wanted: Mapping[str, Tensor] | None = None
) -> str | None:
    """None when every error is within `TOLERANCE` plus thrice its slack, or which are not."""
    bad = []
    for name, error in errors.items():
        bound = TOLERANCE[dtype]["gradient" if name in GRADIENTS else "forward"]
        if wanted is not None and f"slack_{name}" in wanted:
            bound += 3 * float(wanted[f"slack_{name}"])
        if not error <= bound:  # also true of NaN
            bad.append(f"{name} error {error:.1e} > {bound:.1e}")
    return ", ".join(bad) or None
