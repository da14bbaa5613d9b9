"""The `policy_divergence` op: `attention_divergence` and the op that streams it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ...runtime import backends, checks
from ...runtime.backends import BackendName, DifferentiableBackend
from ...snapshot import AttentionSnapshot
from ...spans import Spans
from ...targets import AttentionTarget
from .. import allocation, qkv, schema
from ..divergence.arguments import Kind
from ..divergence.interface import call_divergence, check_kind
from ..packing import PackedRows
from .arguments import (
    LossOutputs,
    PolicyArgs,
    PolicyDivergenceArgs,
    PolicyDivergenceGradients,
    PolicyDivergenceOutputs,
    ReferenceArgs,
    TargetArgs,
)
from .cpu import CpuPolicyDivergence
from .cuda import CudaPolicyDivergence
from .interface import call_policy, resolve_call
from .reference import TorchPolicyDivergence, renormalised
from .triton import TritonPolicyDivergence


class PolicyDivergenceBackend(
    DifferentiableBackend[PolicyDivergenceArgs, PolicyDivergenceOutputs, PolicyDivergenceGradients],
    Protocol,
):
    """A backend that also forms the loss together with its gradients."""

    def loss(
        self,
        args: PolicyDivergenceArgs,
        weights: Tensor,
        normalised: bool,
        outputs: LossOutputs,
        /,
    ) -> None:
        """Write the divergence of each row, and the gradients of its sum weighted by `weights`.

        Args:
            weights: [B, T] contiguous.
            normalised: `reference_norm` and `reference_z` are known: read them, do not write them.
                Never with a target.
        """
        ...


BACKENDS: dict[str, PolicyDivergenceBackend] = {
    "cuda": CudaPolicyDivergence(),
    "triton": TritonPolicyDivergence(),
    "cpu": CpuPolicyDivergence(),
    "reference": TorchPolicyDivergence(),
}
backends.register("policy_divergence", BACKENDS)


def attention_divergence(
    q: Tensor,
    k: Tensor,
    reference: Tensor | AttentionSnapshot | AttentionTarget,
    kind: Kind = "jsd",
    *,
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
    """How far each row's attention policy is from a reference policy.

        D_t = divergence(attention_policy(q, k, ...)_t, r_t)

    (divergence.md of this folder; eq. (2) of arXiv 2602.04884 without the advantage.) Against an
    `AttentionSnapshot` without spans, both policies are formed tile by tile. On the compiled
    backends no tensor then has a T x N extent, forward or backward. A policy equal to its snapshot
    gives exactly 0.0 (cross_entropy: its entropy) with exactly zero gradients. Against an
    `AttentionTarget` without spans the policy is streamed alike. A dense reference policy is
    compared with `attention_policy`'s result. Everything accumulates in float32 and repeats bit for
    bit. The streamed form keeps the inputs and float32 statistics of size [B, H, T] for the
    backward.

    kl and reverse_kl are Σ p log(p/r) − p + r and Σ r log(r/p) − r + p: the same for rows that sum
    to 1, and ≥ 0 for others. cross_entropy is −Σ r log p, with the gradient of reverse_kl by the
    policy. A row without valid keys in either policy gives 0 and has no gradient. A row whose value
    is infinite has no gradient.

    Args:
        q, k: the policy, as in `attention_policy`.
        rows, spans, span_bias, head_weights, scope, exclude_self: as there.
        is_causal, scale, window, softcap, key_padding_mask, cu_seqlens_q, cu_seqlens_k: as there.
        reference: the reference policy: rows [B, T, N], or [B, T, S] with spans, in any floating
            dtype; or an `AttentionSnapshot` of the same batch, keys and row positions, with heads
            and head dim of its own. A snapshot brings its own span_bias, is_causal, scale, window
            and softcap; spans, scope, exclude_self and key_padding_mask of this call hold for both.
            So do head_weights, as constants, if the snapshot has none.
            Packed, it has the same sequences, and dense rows are [1, T, max N_i] or [1, T, S].
            Or an `AttentionTarget`, distributions that rows share, over the keys or spans of the
            call. With T > 1, a tensor [B, 1, N] or [B, 1, S] stands for `AttentionTarget(tensor)`.
        kind: "jsd", "kl" (of the policy from the reference), "reverse_kl" or "cross_entropy".
        backend: name of a backend, or None for the first that can run the call.

    Returns:
        D, float32 [B, T]; differentiable in q, k, span_bias, head_weights and in `reference` if it
        holds dense rows.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, device or value.
        NotImplementedError: the requested backend cannot run this call, or no backend can.
        RuntimeError: the requested backend is missing on this machine.
    """
    op = "attention_divergence"
    args = resolve_call(
        op, q, k, rows=rows, spans=spans, span_bias=span_bias, head_weights=head_weights,
        scope=scope, exclude_self=exclude_self, is_causal=is_causal, scale=scale, window=window,
        softcap=softcap, key_padding_mask=key_padding_mask, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip
    reference = shared_by_rows(reference, args)
    return divergence_of(op, args, reference, kind, backends.check_backend(op, backend))


def divergence_of(op: str, args: PolicyArgs, reference: Any, kind: Any, backend: str) -> Tensor:
    """`policy`, then `divergence`, for dense rows and spans; else the op that streams both."""
    check_kind(op, kind)
    streamed = streaming_args(op, args, reference, kind)
    if streamed is not None:
        value: Tensor = policy_divergence_fwd(streamed, backend)[0]
        return value
    if isinstance(reference, AttentionSnapshot):
        reference = _span_policy_of(op, reference, args, backend)
    elif isinstance(reference, AttentionTarget):
        reference = span_rows_of(_target_args(reference, args), args)
    return composed(call_policy(args, backend), reference, kind, backend)


def streaming_args(
    op: str, args: PolicyArgs, reference: Any, kind: str
) -> PolicyDivergenceArgs | None:
    """The arguments of the ops that stream both policies; None if dense rows are compared.

    The reference is checked either way.
    """
    if isinstance(reference, AttentionSnapshot):
        check_snapshot(op, reference, args)
        return None if args.span_ids is not None else _against_snapshot(args, reference, kind)
    if isinstance(reference, AttentionTarget):
        _check_target(op, reference, args)
        return None if args.span_ids is not None else _against_target(args, reference, kind)
    _check_dense(op, reference, args)
    return None


def shared_by_rows(reference: Any, args: PolicyArgs) -> Any:
    """The reference of a call; a floating tensor [B, 1, N or S] for T > 1 rows as a target."""
    is_shared = (
        isinstance(reference, Tensor)
        and reference.is_floating_point()
        and reference.dim() == 3
        and reference.shape[1] == 1
        and args.num_rows > 1
    )
    return AttentionTarget(reference) if is_shared else reference


def composed(p: Tensor, r: Tensor, kind: str, backend: str) -> Tensor:
    """The divergence of two materialised policies, with the conventions of the streamed one."""
    value = call_divergence(p, r, kind, backend)
    if kind == "cross_entropy":
        # Its value stands as defined. Only its gradient gets the constant that is taken out below.
        mass = p.sum(-1).masked_fill(value.isinf(), 0.0)
        value = value + (mass - mass.detach())
    elif kind != "jsd":
        # Adding − p + r (or p − r) takes the constant out of the gradient by p, such as the 1 of
        # log(p/r) + 1. The renormalisation of p would cancel it only up to rounding. Rows of
        # infinite value stay without a gradient.
        excess = (p - r.to(p.dtype)).sum(-1).masked_fill(value.isinf(), 0.0)
        value = value - excess if kind == "kl" else value + excess
    nowhere = (p == 0).all(-1) | (r == 0).all(-1)
    return value.masked_fill(nowhere, 0.0)


def _check_dense(op: str, reference: Any, args: PolicyArgs) -> None:
    wanted = "a [B, T, N] or [B, T, S] tensor, an AttentionSnapshot or an AttentionTarget"
    checks.check_tensor(op, "reference", reference, wanted)
    if not reference.is_floating_point():
        raise TypeError(
            f"{op}: reference must be floating, an AttentionSnapshot or an AttentionTarget; got "
            f"{checks.dtype_name(reference.dtype)}"
        )
    shape = (args.batch_size, args.num_rows, args.num_outcomes)
    if reference.shape != shape:
        keys = "max N_i" if args.is_packed else "N"
        dims = f"[B, T, {keys}]" if args.span_ids is None else "[B, T, S]"
        raise ValueError(f"{op}: reference must be {dims} = {shape}; got {tuple(reference.shape)}")
    checks.check_same_device(op, "reference", reference, args.q, "q")


def check_snapshot(op: str, snapshot: AttentionSnapshot, args: PolicyArgs) -> None:
    snapshot.check()
    sizes = [
        ("of batch size B", snapshot.batch_size, args.batch_size),
        ("of T rows, T", snapshot.num_rows, args.num_rows),
        ("over N keys, N", snapshot.seqlen_k, args.seqlen_k),
    ]
    if args.is_packed or snapshot.is_packed:
        _check_packed_alike(op, snapshot, args)
    else:
        sizes.append(("whose rows start at key", snapshot.query_start, args.query_start))
    for what, got, wanted in sizes:
        if got != wanted:
            raise ValueError(f"{op}: reference must be a snapshot {what}={wanted}; got {got}")
    checks.check_same_device(op, "reference", snapshot.q, args.q, "q")
    if snapshot.span_bias is not None and args.span_ids is None:
        raise ValueError(f"{op}: reference has a span_bias, which needs spans; got spans=None")
    taken = args.head_weights is not None and snapshot.head_weights is None
    if taken and snapshot.q.shape[1] != args.num_heads:
        raise ValueError(
            f"{op}: reference must have head_weights of its own, or H={args.num_heads} heads, for "
            f"which those of the call hold; got {snapshot.q.shape[1]} heads"
        )


def _check_packed_alike(op: str, snapshot: AttentionSnapshot, args: PolicyArgs) -> None:
    """Both must hold the same sequences, with the same rows at the same keys."""
    for is_packed, name in ((args.is_packed, "reference"), (snapshot.is_packed, "the call")):
        if not is_packed:
            raise ValueError(
                f"{op}: reference must be packed if the call is, both with cu_seqlens_q and "
                f"cu_seqlens_k; got {name} alone packed"
            )
    for name in ("cu_seqlens_q", "cu_seqlens_k", "query_starts"):
        got, wanted = getattr(snapshot, name), getattr(args, name)
        if got is wanted or not checks.has_values(wanted):
            continue
        checks.check_same_device(op, "reference", got, wanted, "q")
        if got.shape != wanted.shape:
            raise ValueError(
                f"{op}: reference must be a snapshot of S={args.num_sequences} sequences; got "
                f"{snapshot.num_sequences}"
            )
        if not torch.equal(got, wanted):
            i = int((got != wanted).nonzero()[0])
            raise ValueError(
                f"{op}: reference must be a snapshot of the same sequences, {name}[{i}]="
                f"{int(wanted[i])}; got {int(got[i])}"
            )


@torch.no_grad()
def _span_policy_of(op: str, snapshot: AttentionSnapshot, args: PolicyArgs, backend: str) -> Tensor:
    """The snapshot's policy over the spans and scope of the call, [B, T, S]."""
    span_bias = snapshot.span_bias
    if span_bias is not None:
        shape = (*snapshot.q.shape[:3], args.num_spans)
        checks.check_broadcastable(op, "reference.span_bias", span_bias, shape, "[B, H, T, S]")
        span_bias = span_bias.to(allocation.accumulation_dtype(snapshot.q)).expand(shape)
    policy = replace(
        args,
        q=snapshot.q,
        k=snapshot.materialised_k(),
        span_bias=span_bias,
        head_weights=_head_weights_of(snapshot, args),
        scale=snapshot.scale,
        window_left=snapshot.window_left,
        window_right=snapshot.window_right,
        softcap=snapshot.softcap,
    )
    return call_policy(policy, backend)


def _head_weights_of(snapshot: AttentionSnapshot, args: PolicyArgs) -> Tensor | None:
    """The snapshot's own, or those of the call; equal weights come out equal bit for bit."""
    own = snapshot.head_weights
    if own is None:
        return None if args.head_weights is None else args.head_weights.detach()
    own = own.to(allocation.accumulation_dtype(args.q))
    return qkv.floored(own) if qkv.is_learned(args.head_weights) else own


def _against_snapshot(
    args: PolicyArgs, snapshot: AttentionSnapshot, kind: str
) -> PolicyDivergenceArgs:
    reference = ReferenceArgs(
        q=snapshot.q,
        k=snapshot.k,
        k_prefix=snapshot.k_prefix,
        prefix_index=snapshot.prefix_index,
        head_weights=_head_weights_of(snapshot, args),
        scale=snapshot.scale,
        window_left=snapshot.window_left,
        window_right=snapshot.window_right,
        softcap=snapshot.softcap,
    )
    # torch.compile does not trace a default factory
    return PolicyDivergenceArgs(args, reference, kind, TargetArgs(None, None, None))


def _check_target(op: str, target: AttentionTarget, args: PolicyArgs) -> None:
    target.check()
    checks.check_same_device(op, "reference", target.values, args.q, "q")
    if target.batch_size != args.batch_size:
        raise ValueError(
            f"{op}: reference must be a target of batch size B={args.batch_size}; got "
            f"{target.batch_size}"
        )
    if args.span_ids is None:
        target.check_length(op, "N", args.seqlen_k)
    else:
        target.check_length(op, "S", args.num_spans)
    if target.index is not None:
        shape = (args.batch_size, args.num_rows)
        if target.index.shape != shape:
            raise ValueError(
                f"{op}: reference.index must be [B, T] = {shape}; got {tuple(target.index.shape)}"
            )
    elif not (target.num_targets == 1 or _one_a_sequence(target, args)):
        wanted = f"G=1 or G=S={args.num_sequences}" if args.is_packed else "G=1"
        raise ValueError(
            f"{op}: reference without an index must be a target of {wanted}; got "
            f"G={target.num_targets}"
        )


def _one_a_sequence(target: AttentionTarget, args: PolicyArgs) -> bool:
    return args.is_packed and target.num_targets == args.num_sequences


def _target_args(target: AttentionTarget, args: PolicyArgs) -> TargetArgs:
    """The target over keys, or over spans if the call has them, as backends receive it."""
    length = args.seqlen_k if args.span_ids is None else args.num_spans
    values, ids, index = target.values, target.ids, target.index
    if index is None and _one_a_sequence(target, args):
        own = args.sequence_of_rows()
        index = torch.where(own < args.num_sequences, own, -1).to(torch.int32)
    elif index is None:
        shape = (args.batch_size, args.num_rows)
        index = torch.zeros(shape, dtype=torch.int32, device=args.q.device)
    # Kernels read one target and one key at least.
    missing = (0, int(ids is not None and values.shape[2] == 0), 0, int(values.shape[1] == 0))
    if any(missing):
        values = torch.nn.functional.pad(values, missing)
        ids = None if ids is None else torch.nn.functional.pad(ids, missing, value=-1)
    if ids is not None and not checks.has_values(ids):
        values, ids = torch.where(ids < length, values, 0.0), torch.where(ids < length, ids, -1)
    return TargetArgs(values.to(allocation.accumulation_dtype(args.q)), ids, index)


def _against_target(args: PolicyArgs, target: AttentionTarget, kind: str) -> PolicyDivergenceArgs:
    nothing = ReferenceArgs(None, None, None, None, None, args.scale, -1, -1, 0.0)
    return PolicyDivergenceArgs(args, nothing, kind, _target_args(target, args))


def target_args(op: str, target: AttentionTarget, args: PolicyArgs) -> TargetArgs:
    """Check a call's target: as backends receive it."""
    _check_target(op, target, args)
    return _target_args(target, args)


def span_rows_of(target: TargetArgs, args: PolicyArgs) -> Tensor:
    """The target of each row over the spans of the call, renormalised: [B, T, S]."""
    every = torch.ones((), dtype=torch.bool, device=args.q.device)
    return renormalised(target, slice(None), every, args.num_spans)[0]


SIGNATURE = schema.Signature(PolicyDivergenceArgs)


def _allocate_outputs(args: PolicyDivergenceArgs) -> PolicyDivergenceOutputs:
    q = args.policy.q
    batch_size, num_heads, num_rows, _ = q.shape
    per_row = (batch_size, num_rows)
    per_head = (batch_size, num_heads, num_rows)
    per_reference_head = (batch_size, args.reference.num_heads, num_rows)
    dtype = allocation.accumulation_dtype(q)
    shapes = (
        per_row, (2, *per_head), per_row, (2, *per_reference_head), per_row, per_head, per_head
    )  # fmt: skip
    return PolicyDivergenceOutputs(*(allocation.new_empty(q, shape, dtype) for shape in shapes))


def _tensors_of(outputs: PolicyDivergenceOutputs) -> tuple[Tensor, ...]:
    return tuple(getattr(outputs, field.name) for field in fields(outputs))


def allocate_gradients(
    args: PolicyDivergenceArgs, wants_dhead_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dhead_weights), the last of shape [0] if it is not wanted."""
    q, k = args.policy.q, args.policy.k
    return (
        allocation.empty_like_layout(q, args.policy.head_dim),
        allocation.empty_like_layout(k, args.policy.head_dim),
        allocation.if_wanted(q, args.policy.head_weights, wants_dhead_weights),
    )


def _policy_divergence_fwd(args: PolicyDivergenceArgs, backend: str) -> tuple[Tensor, ...]:
    """-> the fields of PolicyDivergenceOutputs."""
    outputs = _allocate_outputs(args)
    chosen = backends.choose("policy_divergence", BACKENDS, args, backend)
    results = _tensors_of(outputs)
    if args.policy.sees_nothing:  # never reaches a backend
        for result in results:
            result.zero_()
    else:
        chosen.fwd(args, outputs)
    return results


def _policy_divergence_fwd_fake(args: PolicyDivergenceArgs, backend: str) -> tuple[Tensor, ...]:
    return _tensors_of(_allocate_outputs(args))


def _policy_divergence_bwd(
    args: PolicyDivergenceArgs, backend: str, *more: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """-> as `allocate_gradients`. The reference gets no gradient."""
    *statistics, dvalue, wants_dhead_weights = more
    results = allocate_gradients(args, wants_dhead_weights)
    chosen = backends.choose("policy_divergence", BACKENDS, args, backend)
    if args.policy.sees_nothing:
        for result in results:
            result.zero_()
        return results
    # No backward reads the value: dvalue stands in its place.
    outputs = PolicyDivergenceOutputs(dvalue, *statistics)
    dq, dk, dhead_weights = results
    gradients = PolicyDivergenceGradients(
        dvalue.contiguous(), dq, dk, dhead_weights if wants_dhead_weights else None
    )
    chosen.bwd(args, outputs, gradients)
    return results


def _policy_divergence_bwd_fake(
    args: PolicyDivergenceArgs, backend: str, *more: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return allocate_gradients(args, wants_dhead_weights=more[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    SIGNATURE.save(ctx, inputs, outputs[1:])


def _backward(ctx: Any, dvalue: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if dvalue is None:
        return SIGNATURE.gradients()
    args, backend, statistics = SIGNATURE.saved(ctx)
    wanted = ctx.needs_input_grad[SIGNATURE.index("head_weights")]
    dq, dk, dhead_weights = policy_divergence_bwd(args, backend, *statistics, dvalue, wanted)
    return SIGNATURE.gradients(q=dq, k=dk, head_weights=dhead_weights if wanted else None)


policy_divergence_fwd = schema.define_with_args(
    "policy_divergence_fwd",
    SIGNATURE,
    "",
    7,
    _policy_divergence_fwd,
    _policy_divergence_fwd_fake,
    (_setup_context, _backward),
)
policy_divergence_bwd = schema.define_with_args(
    "policy_divergence_bwd",
    SIGNATURE,
    "Tensor norm, Tensor z, Tensor reference_norm, Tensor reference_z, Tensor u, Tensor w, "
    "Tensor dvalue, bool wants_dhead_weights",
    3,
    _policy_divergence_bwd,
    _policy_divergence_bwd_fake,
)
