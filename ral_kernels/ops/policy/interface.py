"""The `policy` op: public function, checks, torch.library ops and the choice of a backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...runtime import backends, checks
from ...runtime.backends import BackendName, DifferentiableBackend
from ...spans import Spans
from .. import allocation, packing, qkv, schema
from ..packing import PackedRows
from .arguments import PolicyArgs, PolicyGradients, PolicyOutputs
from .cpu import CpuPolicy
from .cuda import CudaPolicy
from .reference import TorchPolicy
from .triton import TritonPolicy

BACKENDS: dict[str, DifferentiableBackend[PolicyArgs, PolicyOutputs, PolicyGradients]] = {
    "cuda": CudaPolicy(),
    "triton": TritonPolicy(),
    "cpu": CpuPolicy(),
    "reference": TorchPolicy(),
}
backends.register("policy", BACKENDS)


def attention_policy(
    q: Tensor,
    k: Tensor,
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
    """Where a layer attends, as a distribution over keys or spans for each chosen row.

        α = mean_h w_h softmax(scale * q kᵀ)        p_i = α_i / Σ_{j valid} α_j  for valid i, else 0

    (README.md of this folder, equations 1 to 8; eq. (1) of arXiv 2602.04884, where the valid keys
    are those before the row's own and all w_h are 1). A row's valid keys are those it sees that are
    in the scope and not its own. Over spans, p_s is the sum over the valid keys of the span. The
    softmax is over all keys that the row sees. Everything accumulates in float32 and repeats bit
    for bit. The op keeps the inputs, `p` and float32 statistics [2, B, H, T] and [B, T] for the
    backward, but no [H, T, N] tensor.

    A row without valid keys, or whose weight on them underflows to 0, is 0 and has no gradient. An
    element of p that is exactly 0 is a constant: a gradient that arrives there counts as 0.

    Args:
        q: [B, H, Tq, D] queries after RoPE, in float32, bfloat16 or float16 (float64 on the
            reference backend), unit last stride. Query t stands at key N - Tq + t, its own key.
        k: [B, Hk, N, D] keys; H is a multiple of Hk, and query head h reads key head h // (H / Hk).
        rows: the T queries that get a policy, as a slice of step 1 or (start, stop); default all.
        spans: a policy over spans instead of keys.
        span_bias: floating, broadcastable to [B, H, T, S] with T the chosen rows; added to the
            scores of a span's keys after the soft cap. Needs spans.
        head_weights: floating [H], or [B, H] (packed: [n, H]), finite, >= 0 and some > 0: how much
            each head counts in the mean, of which only ratios matter. Default: all alike. A head of
            weight 0 is left out. Values on a GPU are not checked: wrong ones give rows of NaN.
        scope: which keys the policy is over: bool [N] or [B, N], or Spans, for the keys in some
            span. Default: with spans the keys in some span, otherwise all. With both spans and a
            wider scope, rows sum to the share of the spans in the scope.
        exclude_self: leave out each row's own key.
        is_causal: a row sees keys up to its own.
        scale: factor on q kᵀ, finite and > 0; default 1/sqrt(D).
        window: keys a row sees around its own: (left, right) with None or -1 for no bound; an int w
            means (w, w), or (w, 0) with is_causal.
        softcap: c > 0 turns scores into c * tanh(scores / c).
        key_padding_mask: bool [B, N], True = a real key.
        cu_seqlens_q: int32 [n + 1], on the device of q or on the CPU: q is [1, H, Tq, D] and holds
            the queries of n sequences one after another, those of sequence i from offset i to
            offset i + 1. Its query t stands at key N_i - Tq_i + t of its own N_i keys. `rows` is
            then a slice or (start, stop) for each sequence, relative to its own queries. Without
            rows, queries after the last offset give rows of 0.
        cu_seqlens_k: int32 [n + 1], the same of k [1, Hk, N, D]; both or neither. `spans` and
            `scope` are then of all keys, [N] or [1, N]. Each row sees its own sequence alone, and
            no other work is done. Offsets on a GPU are read by the host, which waits. They break a
            graph of `torch.compile`, unless it captures scalar outputs.
        backend: name of a backend, or None for the first that can run the call.

    Returns:
        p, float32 [B, T, N], or [B, T, S] with spans; differentiable in q, k, span_bias and
        head_weights. Packed without spans it is [1, T, max N_i]: columns are positions in the row's
        own sequence, 0 after its keys.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, device or value.
        NotImplementedError: the requested backend cannot run this call, or no backend can.
        RuntimeError: the requested backend is missing on this machine.
    """
    op = "attention_policy"
    args = resolve_call(
        op, q, k, rows=rows, spans=spans, span_bias=span_bias, head_weights=head_weights,
        scope=scope, exclude_self=exclude_self, is_causal=is_causal, scale=scale, window=window,
        softcap=softcap, key_padding_mask=key_padding_mask, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip
    return call_policy(args, backends.check_backend(op, backend))


def resolve_call(
    op: str,
    q: Any,
    k: Any,
    *,
    rows: Any,
    spans: Any,
    span_bias: Any,
    scope: Any,
    exclude_self: Any,
    is_causal: Any,
    scale: Any,
    window: Any,
    softcap: Any,
    key_padding_mask: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    head_weights: Any = None,
) -> PolicyArgs:
    """Check the arguments that the public functions share; `op` is the caller, for messages.

    The tensors of the result are still part of the autograd graph.
    """
    q, k, _ = qkv.autocast_inputs(q, k, k)
    qkv.check_qkv(op, q, k, k, spans)  # k in place of v, which a policy does not have
    checks.check_flag(op, "exclude_self", exclude_self)
    checks.check_flag(op, "is_causal", is_causal)
    packed = packing.resolve(op, q, k, cu_seqlens_q, cu_seqlens_k, rows)
    query_start = 0
    if packed is None:
        start, stop = checks.resolve_rows(op, rows, q.shape[2])
        query_start = k.shape[2] - q.shape[2] + start
    scale = checks.resolve_scale(op, scale, q.shape[3])
    window_left, window_right = checks.resolve_window(op, window, is_causal)
    softcap = checks.resolve_softcap(op, softcap)
    if packed is not None:
        q = packed.chosen(q)
    elif rows is not None:
        q = q[:, :, start:stop]
    if span_bias is not None:
        span_bias = qkv.prepare_span_bias(op, span_bias, spans, q)
    if head_weights is not None:
        samples = q.shape[0] if packed is None else packed.num_sequences
        head_weights = qkv.prepare_head_weights(op, head_weights, q, samples, packed is not None)
    if key_padding_mask is not None:
        if packed is not None:
            raise ValueError(
                f"{op}: key_padding_mask is not supported with cu_seqlens_k, because packed "
                "sequences have no padding; use scope to leave out keys"
            )
        qkv.check_key_padding_mask(op, key_padding_mask, k)
    return PolicyArgs(
        q=q,
        k=k,
        span_ids=None if spans is None else spans.ids,
        span_bias=span_bias,
        head_weights=head_weights,
        scope=_resolve_scope(op, scope, spans, k),
        key_padding_mask=key_padding_mask,
        cu_seqlens_q=None if packed is None else packed.cu_seqlens_q,
        cu_seqlens_k=None if packed is None else packed.cu_seqlens_k,
        query_starts=None if packed is None else packed.query_starts,
        num_spans=0 if spans is None else spans.num_spans,
        query_start=query_start,
        scale=scale,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        exclude_self=exclude_self,
        max_rows=0 if packed is None else packed.max_rows,
        max_keys=0 if packed is None else packed.max_keys,
    )


def _resolve_scope(op: str, scope: Any, spans: Spans | None, k: Tensor) -> Tensor | None:
    """The scope as bool [B or 1, N]; None for every key."""
    wanted = "None, Spans or a bool tensor [N] or [B, N]"
    if scope is None:
        if spans is None:
            return None
        scope = spans  # rows over spans sum to 1
    if isinstance(scope, Spans):
        scope = scope.ids >= 0
    checks.check_tensor(op, "scope", scope, wanted)
    if scope.dtype != torch.bool:
        raise TypeError(
            f"{op}: scope must be {wanted} (True = in the scope); got "
            f"{checks.dtype_name(scope.dtype)}"
        )
    batch_size, seqlen_k = k.shape[0], k.shape[2]
    if (
        scope.dim() not in (1, 2)
        or scope.shape[-1] != seqlen_k
        or (scope.dim() == 2 and scope.shape[0] != batch_size)
    ):
        raise ValueError(
            f"{op}: scope must be [N] or [B, N] with B={batch_size}, N={seqlen_k}; got "
            f"{tuple(scope.shape)}"
        )
    checks.check_same_device(op, "scope", scope, k, "k")
    return scope if scope.dim() == 2 else scope[None]


def call_policy(args: PolicyArgs, backend: str) -> Tensor:
    """Call the op with checked arguments."""
    p, _, _ = policy_fwd(args, backend)
    return p


_SIGNATURE = schema.Signature(PolicyArgs)


def _allocate_outputs(args: PolicyArgs) -> PolicyOutputs:
    batch_size, num_heads, num_rows, _ = args.q.shape
    dtype = allocation.accumulation_dtype(args.q)
    new_empty = allocation.new_empty
    return PolicyOutputs(
        p=new_empty(args.q, (batch_size, num_rows, args.num_outcomes), dtype),
        norm=new_empty(args.q, (2, batch_size, num_heads, num_rows), dtype),
        z=new_empty(args.q, (batch_size, num_rows), dtype),
    )


def _allocate_gradients(
    args: PolicyArgs, wants_dspan_bias: bool, wants_dhead_weights: bool
) -> tuple[Tensor, ...]:
    return (
        allocation.empty_like_layout(args.q, args.head_dim),
        allocation.empty_like_layout(args.k, args.head_dim),
        allocation.if_wanted(args.q, args.span_bias, wants_dspan_bias),
        allocation.if_wanted(args.q, args.head_weights, wants_dhead_weights),
    )


def _policy_fwd(args: PolicyArgs, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """-> (p, norm, z), as in PolicyOutputs.

    `norm` keeps digits of the weights that a float32 lse would round away.
    """
    outputs = _allocate_outputs(args)
    chosen = backends.choose("policy", BACKENDS, args, backend)
    results = outputs.p, outputs.norm, outputs.z
    if outputs.p.numel() == 0 or args.sees_nothing:  # empty calls never reach a backend
        for result in results:
            result.zero_()
    else:
        chosen.fwd(args, outputs)
    return results


def _policy_fwd_fake(args: PolicyArgs, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _allocate_outputs(args)
    return outputs.p, outputs.norm, outputs.z


def _policy_bwd(
    args: PolicyArgs,
    backend: str,
    p: Tensor,
    norm: Tensor,
    z: Tensor,
    dp: Tensor,
    wants_dspan_bias: bool,
    wants_dhead_weights: bool,
) -> tuple[Tensor, ...]:
    """-> (dq, dk, dspan_bias, dhead_weights), of shape [0] what is not wanted."""
    gradients = _allocate_gradients(args, wants_dspan_bias, wants_dhead_weights)
    chosen = backends.choose("policy", BACKENDS, args, backend)
    if p.numel() == 0 or args.sees_nothing:
        for gradient in gradients:
            gradient.zero_()
        return gradients
    dq, dk, dspan_bias, dhead_weights = gradients
    chosen.bwd(
        args,
        PolicyOutputs(p, norm, z),
        PolicyGradients(
            dp.contiguous(),
            dq,
            dk,
            dspan_bias if wants_dspan_bias else None,
            dhead_weights if wants_dhead_weights else None,
        ),
    )
    return gradients


def _policy_bwd_fake(
    args: PolicyArgs, backend: str, *results_and_gradients: Any
) -> tuple[Tensor, ...]:
    return _allocate_gradients(args, *results_and_gradients[-2:])


def _backward(ctx: Any, dp: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if dp is None:  # norm and z reach no user, so no gradient arrives there
        return _SIGNATURE.gradients()
    args, backend, outputs = _SIGNATURE.saved(ctx)
    wanted = [ctx.needs_input_grad[_SIGNATURE.index(x)] for x in ("span_bias", "head_weights")]
    dq, dk, *others = policy_bwd(args, backend, *outputs, dp, *wanted)
    dspan_bias, dhead_weights = (x if y else None for x, y in zip(others, wanted, strict=True))
    return _SIGNATURE.gradients(q=dq, k=dk, span_bias=dspan_bias, head_weights=dhead_weights)


policy_fwd = schema.define_with_args(
    "policy_fwd",
    _SIGNATURE,
    "",
    3,
    _policy_fwd,
    _policy_fwd_fake,
    (_SIGNATURE.save, _backward),
)
policy_bwd = schema.define_with_args(
    "policy_bwd",
    _SIGNATURE,
    "Tensor p, Tensor norm, Tensor z, Tensor dp, bool wants_dspan_bias, bool wants_dhead_weights",
    4,
    _policy_bwd,
    _policy_bwd_fake,
)
