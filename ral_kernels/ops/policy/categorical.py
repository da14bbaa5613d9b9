"""`policy_loss`: the RAL objective of a categorical choice that is not attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...runtime import backends, checks
from ...runtime.backends import BackendName
from ..divergence.arguments import Kind
from ..divergence.interface import call_divergence, check_kind
from .loss import Reduction, check_reduction, reduced, weighted_sum

_OP = "policy_loss"


def policy_loss(
    policy: Tensor,
    reference: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    logits: bool,
    kind: Kind = "jsd",
    reduction: Reduction = "token_mean",
    backend: BackendName | None = None,
) -> Tensor:
    """The RAL objective of any choice among K options: experts, documents, tools.

        L = E_t[A_t D(p_t ‖ r_t)]       (eq. (2) of arXiv 2602.04884, D is `divergence`)

    The paper's choice is where to attend, for which `ral_loss` is; the equation asks only for a
    distribution. Minimising it keeps a row with A > 0 near the reference and pushes one with A < 0
    away. Where the policy equals the reference, the gradient is exactly zero, and the value is that
    of the divergence: exactly zero for jsd, kl and reverse_kl. So it acts from the second step on
    the same choices, or against another reference.

    The gradient lacks a constant in each row, which means nothing to rows that sum to 1.

    Softmax, divergence and sum accumulate in float32 (float64 if the policy or the reference is),
    and repeat bit for bit. The softmax keeps its rows and the divergence its gradient for the
    backward.

    Args:
        policy: floating [B, ..., K], a row for each choice of B sequences, such as [B, T, K]. It
            gets the gradient.
        reference: the rows that it is compared with, of the same shape and in the same form, which
            may be another dtype. It gets no gradient.
        advantages: floating [B] or [B, ...], of either sign, without gradient.
        mask: bool [B, ...], True = a row that counts; default all. A masked row has no gradient and
            may hold anything, NaN too. If all are masked the loss is exactly 0.
        logits: what `policy` and `reference` hold: True for logits, of which -inf marks an option
            that is not there; False for probabilities, elements >= 0 (not checked).
        kind: as in `divergence`.
        reduction: "token_mean" over the rows that count; "sequence_mean", the mean over the B
            sequences with such rows of each one's mean; or "sum".
        backend: name of a backend of `divergence`, or None for the first that can run the call.

    Returns:
        The loss, a scalar in float32 (float64 if the policy or the reference is).

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, device or value.
        NotImplementedError: advantages that require grad, or no backend can run this call.
        RuntimeError: the requested backend is missing on this machine.
    """
    requested = backends.check_backend(_OP, backend)
    check_kind(_OP, kind)
    check_reduction(_OP, reduction)
    checks.check_flag(_OP, "logits", logits)
    _check_rows(policy, reference)
    advantages, counts = _resolve(policy, advantages, mask)
    reference = reference.detach()
    if mask is not None:
        # Not only a weight of 0: a masked row may be NaN, and its gradient would be, too.
        policy, reference = (torch.where(counts[..., None], x, 0.0) for x in (policy, reference))
    dtype = torch.promote_types(torch.promote_types(policy.dtype, reference.dtype), torch.float32)
    p, r = (x.softmax(-1, dtype=dtype) if logits else x.to(dtype) for x in (policy, reference))
    value = call_divergence(p, r, kind, requested)
    if kind != "jsd":
        # Rows sum to 1, so a constant in the gradient, such as the 1 of log(p/r) + 1, means
        # nothing. The softmax would cancel it only up to rounding.
        mass = p.sum(-1).masked_fill(value.isinf(), 0.0)
        constant = mass - mass.detach()
        value = value - constant if kind == "kl" else value + constant
    per_sequence = (counts.shape[0], counts[:1].numel())
    counts = counts.reshape(per_sequence)
    weights = torch.where(counts, advantages.to(dtype).reshape(per_sequence), 0.0)
    return weighted_sum(value.reshape(per_sequence), reduced(weights, counts, reduction))


def _check_rows(policy: Any, reference: Any) -> None:
    for name, tensor in (("policy", policy), ("reference", reference)):
        checks.check_tensor(_OP, name, tensor, "a [B, ..., K] tensor")
        if not tensor.is_floating_point():
            raise TypeError(
                f"{_OP}: {name} must be floating; got {checks.dtype_name(tensor.dtype)}"
            )
    if policy.dim() < 2:
        raise ValueError(f"{_OP}: policy must be [B, ..., K]; got {tuple(policy.shape)}")
    if reference.shape != policy.shape:
        raise ValueError(
            f"{_OP}: reference must have policy's shape {tuple(policy.shape)}; got "
            f"{tuple(reference.shape)}"
        )
    checks.check_same_device(_OP, "reference", reference, policy, "policy")


def _resolve(policy: Tensor, advantages: Any, mask: Any) -> tuple[Tensor, Tensor]:
    """-> (advantages, rows that count), both in the shape of the rows."""
    rows = policy.shape[:-1]
    checks.check_tensor(_OP, "advantages", advantages, "a [B] or [B, ...] tensor")
    if not advantages.is_floating_point():
        raise TypeError(
            f"{_OP}: advantages must be floating; got {checks.dtype_name(advantages.dtype)}"
        )
    # not `in`, which under torch.compile does not find sizes that are symbolic
    if not (advantages.shape == rows[:1] or advantages.shape == rows):
        raise ValueError(
            f"{_OP}: advantages must be [B] = {tuple(rows[:1])} or in the shape of the rows, "
            f"{tuple(rows)}; got {tuple(advantages.shape)}"
        )
    checks.check_same_device(_OP, "advantages", advantages, policy, "policy")
    if advantages.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            f"{_OP}: advantages get no gradient, so they must not require grad; use "
            "advantages.detach()"
        )
    if advantages.dim() < len(rows):
        advantages = advantages.view(-1, *(1 for _ in rows[1:]))
    if mask is None:
        mask = torch.ones(rows, dtype=torch.bool, device=policy.device)
    else:
        checks.check_tensor(_OP, "mask", mask, "None or a bool [B, ...] tensor")
        if mask.dtype != torch.bool:
            raise TypeError(
                f"{_OP}: mask must be bool (True = a row that counts); got "
                f"{checks.dtype_name(mask.dtype)}"
            )
        if mask.shape != rows:
            raise ValueError(
                f"{_OP}: mask must be in the shape of the rows, {tuple(rows)}; got "
                f"{tuple(mask.shape)}"
            )
        checks.check_same_device(_OP, "mask", mask, policy, "policy")
    return advantages.expand(rows), mask
