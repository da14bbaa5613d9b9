"""`ral_loss`, and the op that forms it together with its gradients while both sides stream."""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
from torch import Tensor

from ...runtime import backends, checks
from ...runtime.backends import BackendName
from ...snapshot import AttentionSnapshot
from ...spans import Spans
from ...targets import AttentionTarget
from .. import allocation, qkv, schema
from ..divergence.arguments import Kind
from ..divergence.interface import check_kind, scaled_gradient
from ..packing import PackedRows
from .arguments import LossOutputs, PolicyArgs, PolicyDivergenceArgs
from .divergence import (
    BACKENDS,
    SIGNATURE,
    allocate_gradients,
    divergence_of,
    shared_by_rows,
    streaming_args,
)
from .interface import resolve_call

Reduction = Literal["token_mean", "sequence_mean", "sum"]
REDUCTIONS: tuple[Reduction, ...] = ("token_mean", "sequence_mean", "sum")


def ral_loss(
    q: Tensor,
    k: Tensor,
    reference: Tensor | AttentionSnapshot | AttentionTarget,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    kind: Kind = "jsd",
    reduction: Reduction = "token_mean",
    rows: slice | tuple[int, int] | PackedRows | None = None,
    spans: Spans | None = None,
    span_bias: Tensor | None = None,
    head_weights: Tensor | None = None,
    scope: Tensor | Spans | None = None,
    exclude_self: bool = True,
    is_causal: bool = True,
    scale: float | None = None,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: BackendName | None = None,
) -> Tensor:
    """The RAL objective: the divergence from a reference policy, weighted by the advantage.

        L = E_t[A_t D_t]        (eq. (2) of arXiv 2602.04884; D_t is `attention_divergence`)

    Against a snapshot or a target without spans, the forward forms the loss together with the
    gradients, if any are wanted (divergence.md of this folder). It then keeps dq and dk and nothing
    of size T·N, and the backward only multiplies them. float16 takes the backward of
    `attention_divergence`.

    Minimising it keeps a row with A > 0 near the reference policy and pushes one with A < 0 away.
    For a policy equal to its snapshot, the gradient is exactly zero, and the value except for
    cross_entropy. So it acts from the second step on the same rollouts, or against another
    reference.

    Args:
        q, k, reference, kind and the other options: as in `attention_divergence`. The gradients
            formed in the forward include that of head_weights, if it is wanted.
        advantages: floating [B] or [B, T], of either sign; it gets no gradient. Packed, [S] (one a
            sequence) or [1, T].
        mask: bool [B, T], True = a token that counts; default all. A masked token has no gradient,
            and if all are masked the loss is exactly 0.
        reduction: "token_mean" over the tokens that count, as the paper's E_t; "sequence_mean", the
            mean over sequences with such tokens of each one's mean; or "sum". Packed, a sequence
            is one of cu_seqlens_q.

    Returns:
        The loss, a float32 scalar.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: as `attention_divergence`;
            NotImplementedError also for advantages that require grad.
    """
    op = "ral_loss"
    args = resolve_call(
        op, q, k, rows=rows, spans=spans, span_bias=span_bias, head_weights=head_weights,
        scope=scope, exclude_self=exclude_self, is_causal=is_causal, scale=scale, window=window,
        softcap=softcap, key_padding_mask=key_padding_mask, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip
    weights = row_weights(op, advantages, mask, reduction, args)
    requested = backends.check_backend(op, backend)
    reference = shared_by_rows(reference, args)
    if isinstance(reference, (AttentionSnapshot, AttentionTarget)) and _fuses(args):
        check_kind(op, kind)
        streamed = streaming_args(op, args, reference, kind)
        assert streamed is not None
        return _fused_loss(streamed, reference, requested, weights)
    return weighted_sum(divergence_of(op, args, reference, kind, requested), weights)


def check_reduction(op: str, reduction: Any) -> None:
    if not isinstance(reduction, str):
        raise TypeError(
            f"{op}: reduction must be one of {', '.join(REDUCTIONS)}; got "
            f"{type(reduction).__name__}"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"{op}: reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}"
        )


def row_weights(op: str, advantages: Any, mask: Any, reduction: Any, args: PolicyArgs) -> Tensor:
    """[B, T]: what each row's divergence is multiplied by, from checked arguments of a loss."""
    check_reduction(op, reduction)
    advantages = _resolve_advantages(op, advantages, args)
    _check_mask(op, mask, args)
    advantages = advantages.to(allocation.accumulation_dtype(args.q))
    return _row_weights(advantages, mask, reduction, args)


def _resolve_advantages(op: str, advantages: Any, args: PolicyArgs) -> Tensor:
    """The advantages as [B, T]."""
    checks.check_tensor(op, "advantages", advantages, "a [B] or [B, T] tensor")
    if not advantages.is_floating_point():
        raise TypeError(
            f"{op}: advantages must be floating; got {checks.dtype_name(advantages.dtype)}"
        )
    sequences, rows = args.num_sequences, (args.batch_size, args.num_rows)
    # not `in`, which under torch.compile does not find sizes that are symbolic
    if not (advantages.shape == (sequences,) or advantages.shape == rows):
        shapes = "[S] or [1, T] with S" if args.is_packed else "[B] or [B, T] with B"
        raise ValueError(
            f"{op}: advantages must be {shapes}={sequences}, T={rows[1]}; got "
            f"{tuple(advantages.shape)}"
        )
    checks.check_same_device(op, "advantages", advantages, args.q, "q")
    if advantages.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            f"{op}: advantages get no gradient, so they must not require grad; use "
            "advantages.detach()"
        )
    if advantages.dim() == 1 and args.is_packed:
        return torch.cat([advantages, advantages.new_zeros(1)])[args.sequence_of_rows()]
    return (advantages[:, None] if advantages.dim() == 1 else advantages).expand(rows)


def _check_mask(op: str, mask: Any, args: PolicyArgs) -> None:
    if mask is None:
        return
    checks.check_tensor(op, "mask", mask, "None or a bool [B, T] tensor")
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{op}: mask must be bool (True = a token that counts); got "
            f"{checks.dtype_name(mask.dtype)}"
        )
    shape = (args.batch_size, args.num_rows)
    if mask.shape != shape:
        raise ValueError(f"{op}: mask must be [B, T] = {shape}; got {tuple(mask.shape)}")
    checks.check_same_device(op, "mask", mask, args.q, "q")


def _row_weights(
    advantages: Tensor, mask: Tensor | None, reduction: str, args: PolicyArgs
) -> Tensor:
    """[B, T]: what each row's divergence is multiplied by; 0 for a token that does not count."""
    counts = torch.ones_like(advantages, dtype=torch.bool) if mask is None else mask
    if args.is_packed:
        sequence = args.sequence_of_rows()
        counts = counts & (sequence < args.num_sequences)
    weights = torch.where(counts, advantages, 0.0)
    if not args.is_packed or reduction != "sequence_mean":
        return reduced(weights, counts, reduction)
    # Integers, so that the order in which a GPU adds them changes nothing.
    tokens = torch.zeros(args.num_sequences + 1, dtype=torch.int64, device=weights.device)
    tokens = tokens.index_add(0, sequence[0], counts[0].long())
    return weights / tokens.clamp(min=1)[sequence] / (tokens > 0).sum().clamp(min=1)


def reduced(weights: Tensor, counts: Tensor, reduction: str) -> Tensor:
    """Weights [B, T] under which a sum over tokens is the reduction's mean over those that count.

    Args:
        weights: of each token's value, 0 for one that does not count.
        counts: bool [B, T].
        reduction: one of `REDUCTIONS`.
    """
    if reduction == "sum":
        return weights
    if reduction == "token_mean":
        return weights / counts.sum().clamp(min=1)
    tokens = counts.sum(-1, keepdim=True)
    return weights / tokens.clamp(min=1) / (tokens > 0).sum().clamp(min=1)


def weighted_sum(value: Tensor, weights: Tensor) -> Tensor:
    # Rows of weight 0 are left out, not multiplied: 0 * inf would be NaN, here or in the gradient.
    used = weights != 0
    return torch.where(used, torch.where(used, value, 0.0) * weights, 0.0).sum()


def _fuses(args: PolicyArgs) -> bool:
    """Whether a loss whose reference streams is to be formed together with its gradients."""
    inputs = (args.q, args.k, args.head_weights)
    wants_gradient = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in inputs
    )
    # In float16 a gradient would underflow before loss scaling could reach it.
    return wants_gradient and args.span_ids is None and args.q.dtype != torch.float16


def _fused_loss(
    args: PolicyDivergenceArgs,
    reference: AttentionSnapshot | AttentionTarget,
    backend: str,
    weights: Tensor,
) -> Tensor:
    # The snapshot keeps its normalisers: every inner step compares the same rollouts with it. Those
    # of a target are quickly formed.
    snapshot = reference if isinstance(reference, AttentionSnapshot) else None
    policy = args.policy
    keeps = snapshot is not None and checks.has_values(policy.q)
    # How a backend computes the reference policy may depend on the policy's dtype.
    kernels = f"{backend} {os.environ.get('RAL_CPU_ISA', '')} {policy.q.dtype}"
    head_weights = args.reference.head_weights
    given = snapshot.find_normalisers(policy, head_weights, kernels) if snapshot and keeps else None
    loss, *_, norm, z = policy_divergence_loss(
        args, backend, weights, *(given or (None, None)), qkv.is_learned(policy.head_weights)
    )
    if snapshot and keeps and given is None:
        snapshot.keep_normalisers(policy, head_weights, kernels, norm.detach(), z.detach())
    result: Tensor = loss
    return result


def _allocate(
    args: PolicyDivergenceArgs, normalised: bool, wants_dhead_weights: bool
) -> tuple[Tensor, ...]:
    q, rows = args.policy.q, args.policy.num_rows
    per_row = (0, 0) if normalised else (args.policy.batch_size, rows)
    per_head = (0, 0, 0, 0) if normalised else (2, per_row[0], args.reference.num_heads, rows)
    dtype = allocation.accumulation_dtype(q)
    loss, norm, z = (allocation.new_empty(q, shape, dtype) for shape in ((), per_head, per_row))
    return loss, *allocate_gradients(args, wants_dhead_weights), norm, z


def _policy_divergence_loss(
    args: PolicyDivergenceArgs,
    backend: str,
    weights: Tensor,
    given_norm: Tensor | None,
    given_z: Tensor | None,
    wants_dhead_weights: bool,
) -> tuple[Tensor, ...]:
    """-> (loss, dq, dk, dhead_weights, reference_norm, reference_z).

    The loss is the sum over rows of weight times divergence. dhead_weights is of shape [0] if it is
    not wanted. The last two are the reference policy's statistics, which a later call may receive.
    They are empty if this call received them.
    """
    weights = weights.contiguous()
    normalised = given_norm is not None
    results = _allocate(args, normalised, wants_dhead_weights)
    loss, dq, dk, dhead_weights, norm, z = results
    chosen = backends.choose("policy_divergence", BACKENDS, args, backend)
    if args.policy.sees_nothing:  # never reaches a backend
        for result in results:
            result.zero_()
        return results
    value = allocation.new_empty(weights, weights.shape, weights.dtype)
    if given_norm is not None and given_z is not None:
        norm, z = given_norm, given_z
    wanted = dhead_weights if wants_dhead_weights else None
    chosen.loss(args, weights, normalised, LossOutputs(value, norm, z, dq, dk, wanted))
    loss.copy_(weighted_sum(value, weights))
    return results


def _policy_divergence_loss_fake(
    args: PolicyDivergenceArgs,
    backend: str,
    weights: Tensor,
    given_norm: Tensor | None,
    given_z: Tensor | None,
    wants_dhead_weights: bool,
) -> tuple[Tensor, ...]:
    return _allocate(args, given_norm is not None, wants_dhead_weights)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*outputs[1:4])
    ctx.wants_dhead_weights = inputs[-1]


def _backward(ctx: Any, dloss: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    rest = (None,) * 4  # weights, the reference policy's statistics, what is wanted
    if dloss is None:
        return *SIGNATURE.gradients(), *rest
    dq, dk, dhead_weights = (scaled_gradient(x, dloss) for x in ctx.saved_tensors)
    given = dhead_weights if ctx.wants_dhead_weights else None
    return *SIGNATURE.gradients(q=dq, k=dk, head_weights=given), *rest


policy_divergence_loss = schema.define_with_args(
    "policy_divergence_loss",
    SIGNATURE,
    "Tensor weights, Tensor? reference_norm, Tensor? reference_z, bool wants_dhead_weights",
    6,
    _policy_divergence_loss,
    _policy_divergence_loss_fake,
    (_setup_context, _backward),
)
