"""The `attention` op: public function, checks, torch.library ops and the choice of a backend."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import TypeVar, Unpack

from ...runtime import backends, checks
from ...runtime.backends import BackendName, DifferentiableBackend
from ...spans import Spans
from .. import allocation, qkv, schema
from .arguments import AttentionArgs, AttentionGradients, AttentionOutputs
from .cpu import CpuAttention
from .cuda import CudaAttention
from .reference import TorchAttention
from .triton import TritonAttention

BACKENDS: dict[str, DifferentiableBackend[AttentionArgs, AttentionOutputs, AttentionGradients]] = {
    "cuda": CudaAttention(),
    "triton": TritonAttention(),
    "cpu": CpuAttention(),
    "reference": TorchAttention(),
}
backends.register("attention", BACKENDS)


Marginals = TypeVar("Marginals", bound="Tensor | None", default="Tensor | None", covariant=True)

if TYPE_CHECKING or sys.version_info >= (3, 11):

    class AttentionOutput(NamedTuple, Generic[Marginals]):
        """What `attention` returns.

        out: [B, H, T, Dv] in q's dtype.
        marginals: float32 [B, H, R, S], or [B, R, S] with head_reduction; None without spans.
        lse: float32 [B, H, T], natural logarithm.
        """

        out: Tensor
        marginals: Marginals
        lse: Tensor

else:  # where a NamedTuple cannot be generic

    class AttentionOutput(NamedTuple):
        """As above."""

        out: Tensor
        marginals: Tensor | None
        lse: Tensor


class AttentionOptions(TypedDict, total=False):
    """The options of `attention`, for its two forms."""

    span_bias: Tensor | None
    attn_mask: Tensor | None
    is_causal: bool
    scale: float | None
    key_padding_mask: Tensor | None
    window: int | tuple[int | None, int | None] | None
    softcap: float | None
    rows: slice | tuple[int, int] | None
    head_reduction: Literal["mean"] | None
    backend: BackendName | None


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, **options: Unpack[AttentionOptions]
) -> AttentionOutput[Tensor]: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, spans: None = None, **options: Unpack[AttentionOptions]
) -> AttentionOutput[None]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Spans | None = None,
    *,
    span_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    rows: slice | tuple[int, int] | None = None,
    head_reduction: Literal["mean"] | None = None,
    backend: BackendName | None = None,
) -> AttentionOutput[Any]:
    """Attention that also returns how much of it went to each span of keys, differentiably.

        s = softcap(scale * q kᵀ) + span_bias[σ] + attn_mask        p = softmax(s)
        out = p v        marginals[..., s] = Σ_{i: σ(i) = s} p[..., i]        lse = log Σ exp(s)

    (README.md of this folder, equations 1 to 7; the marginals are the attention policy of arXiv
    2602.04884 summed over spans). The compiled backends never store the matrix p: their memory
    beyond the outputs does not grow with T * N. Everything accumulates in float32 and repeats bit
    for bit. The op keeps the inputs, `out`, `marginals` and `lse` for the backward. Gradients flow
    from all three outputs into q, k, v and `span_bias`; they are not differentiable again.

    A query that sees no key gives out = 0, lse = -inf, marginals = 0, and has no gradient.

    Args:
        q: [B, H, T, D] queries in float32, bfloat16 or float16 (float64 on the reference backend),
            unit last stride.
        k: [B, Hk, N, D] keys; H is a multiple of Hk, and query head h reads key head h // (H / Hk).
        v: [B, Hk, N, Dv] values.
        spans: which key belongs to which of S spans; None for no marginals.
        span_bias: floating, broadcastable to [B, H, T, S]; added to the scores of a span's keys
            after the soft cap, in natural units. ∂lse/∂span_bias are the marginals.
        attn_mask: broadcastable to [B, H, T, N]; bool (True = attend), or floating (float32 or q's
            dtype), added to the scores. It gets no gradient. A `CausalBias` of
            torch.nn.attention.bias is causal attention in its alignment.
        is_causal: query t of T sees keys up to N - T + t (bottom-right aligned).
        scale: factor on q kᵀ, finite and > 0; default 1/sqrt(D).
        key_padding_mask: bool [B, N], True = a real key, as in a boolean attn_mask.
        window: keys a query sees around its diagonal position N - T + t: (left, right) with None or
            -1 for no bound; an int w means (w, w), or (w, 0) with is_causal.
        softcap: c > 0 turns scores into c * tanh(scores / c).
        rows: the R queries that get marginals, as a slice of step 1 or (start, stop); default all.
            `out` and `lse` always cover every query.
        head_reduction: "mean" averages the marginals over heads.
        backend: name of a backend, or None for the first that can run the call. See
            `available_backends`.

    Returns:
        AttentionOutput(out, marginals, lse), with out in the memory layout of q.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, device or value.
        NotImplementedError: the requested backend cannot run this call, or no backend can; or
            attn_mask requires grad.
        RuntimeError: the requested backend is missing on this machine.
    """
    q, k, v = qkv.autocast_inputs(q, k, v)
    qkv.check_qkv("attention", q, k, v, spans)
    checks.check_flag("attention", "is_causal", is_causal)
    if head_reduction is not None and head_reduction != "mean":
        raise ValueError(
            f"attention: head_reduction must be None or 'mean'; got {head_reduction!r}"
        )
    out, marginals, lse = call_attention(
        "attention",
        q,
        k,
        v,
        spans,
        span_bias=span_bias,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        scale=checks.resolve_scale("attention", scale, q.shape[3]),
        window=checks.resolve_window("attention", window, is_causal),
        softcap=checks.resolve_softcap("attention", softcap),
        rows=checks.resolve_rows("attention", rows, q.shape[2]),
        backend=backends.check_backend("attention", backend),
    )
    if marginals is not None and head_reduction is not None:
        marginals = marginals.mean(dim=1)
    return AttentionOutput(out, marginals, lse)


def _prepare_attn_mask(op: str, attn_mask: Any, q: Tensor, k: Tensor) -> Tensor:
    checks.check_tensor(
        op, "attn_mask", attn_mask, "None or a tensor broadcastable to [B, H, T, N]"
    )
    if attn_mask.dtype not in (torch.bool, torch.float32, q.dtype):
        raise TypeError(
            f"{op}: attn_mask must be bool (True = attend), float32 or q's dtype "
            f"{checks.dtype_name(q.dtype)}; got {checks.dtype_name(attn_mask.dtype)}"
        )
    shape = (*q.shape[:3], k.shape[2])
    checks.check_broadcastable(op, "attn_mask", attn_mask, shape, "[B, H, T, N]")
    checks.check_same_device(op, "attn_mask", attn_mask, q, "q")
    if attn_mask.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            f"{op}: attn_mask gets no gradient, so it must not require grad; use span_bias for a "
            "differentiable bias, or attn_mask.detach()"
        )
    return attn_mask.expand(shape)


def is_causal_bias(attn_mask: Any) -> bool:
    """Whether it is one of torch.nn.attention.bias, a mask that is known by its name."""
    if type(attn_mask) is Tensor or not isinstance(attn_mask, Tensor):
        return False
    from torch.nn.attention.bias import CausalBias

    return isinstance(attn_mask, CausalBias)


def _causal_alignment(op: str, bias: Any, q: Tensor, k: Tensor, window: tuple[int, int]) -> bool:
    """Whether a `CausalBias` aligns the first query with the first key, and not the last ones."""
    sizes = (bias.seq_len_q, bias.seq_len_kv)
    if sizes[0] != q.shape[2] or sizes[1] != k.shape[2]:
        raise ValueError(
            f"{op}: attn_mask must be a CausalBias of {q.shape[2]} queries and {k.shape[2]} keys; "
            f"got one of {sizes[0]} and {sizes[1]}"
        )
    top_left = sizes[0] != sizes[1] and bias.variant.name == "UPPER_LEFT"
    if top_left and window != (-1, -1):
        raise ValueError(
            f"{op}: attn_mask must not be causal_upper_left with is_causal or a window, which are "
            f"aligned to the lower right; got {sizes[0]} queries and {sizes[1]} keys"
        )
    return top_left


def call_attention(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Spans | None,
    *,
    scale: float,
    window: tuple[int, int],
    softcap: float,
    rows: tuple[int, int] | None = None,
    span_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    top_left: bool = False,
    backend: str = "",
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Call the op with tensors that passed `qkv.check_qkv` and options that are resolved.

    The drop-ins call it too; `op` is the name of the public function, for messages.
    """
    if span_bias is not None:
        span_bias = qkv.prepare_span_bias(op, span_bias, spans, q)
    if is_causal_bias(attn_mask):
        top_left = _causal_alignment(op, attn_mask, q, k, window)
        window, attn_mask = (window[0], 0), None
    elif attn_mask is not None:
        attn_mask = _prepare_attn_mask(op, attn_mask, q, k)
    if key_padding_mask is not None:
        qkv.check_key_padding_mask(op, key_padding_mask, k)
    row_start, row_stop = (0, q.shape[2]) if rows is None else rows
    has_spans = spans is not None and spans.num_spans > 0
    args = AttentionArgs(
        q=q,
        k=k,
        v=v,
        span_ids=spans.ids if spans is not None and has_spans else None,
        span_bias=span_bias if has_spans else None,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        num_spans=spans.num_spans if spans is not None else 0,
        scale=scale,
        window_left=window[0],
        window_right=window[1],
        top_left=top_left,
        softcap=softcap,
        row_start=row_start,
        row_stop=row_stop,
    )
    out, marginals, lse = attention_fwd(args, backend)
    return out, None if spans is None else marginals, lse


_SIGNATURE = schema.Signature(AttentionArgs)


def _allocate_outputs(args: AttentionArgs) -> AttentionOutputs:
    q = args.q
    batch_size, num_heads, seqlen_q, _ = q.shape
    dtype = allocation.accumulation_dtype(q)
    return AttentionOutputs(
        out=allocation.empty_like_layout(q, args.head_dim_v),
        marginals=allocation.new_empty(
            q, (batch_size, num_heads, args.row_stop - args.row_start, args.num_spans), dtype
        ),
        lse=allocation.new_empty(q, (batch_size, num_heads, seqlen_q), dtype),
    )


def _allocate_gradients(
    args: AttentionArgs, wants_dspan_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, span_bias = args.q, args.span_bias
    assert span_bias is not None or not wants_dspan_bias
    shape = span_bias.shape if span_bias is not None and wants_dspan_bias else (0,)
    return (
        allocation.empty_like_layout(q, args.head_dim),
        allocation.empty_like_layout(args.k, args.head_dim),
        allocation.empty_like_layout(args.v, args.head_dim_v),
        allocation.new_empty(q, shape, allocation.accumulation_dtype(q)),
    )


def _attention_fwd(args: AttentionArgs, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """-> (out, marginals, lse)."""
    outputs = _allocate_outputs(args)
    chosen = backends.choose("attention", BACKENDS, args, backend)
    empty = outputs.out.numel() == 0 or args.seqlen_k == 0
    if empty or args.cu_seqlens_q is not None:
        # No backend gets an empty call, or writes to tokens that belong to no packed sequence.
        outputs.out.zero_()
        outputs.marginals.zero_()
        outputs.lse.fill_(float("-inf"))
    if not empty:
        chosen.fwd(args, outputs)
    return outputs.out, outputs.marginals, outputs.lse


def _attention_fwd_fake(args: AttentionArgs, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _allocate_outputs(args)
    return outputs.out, outputs.marginals, outputs.lse


def _attention_bwd(
    args: AttentionArgs,
    backend: str,
    out: Tensor,
    marginals: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dmarginals: Tensor | None,
    dlse: Tensor | None,
    wants_dspan_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> (dq, dk, dv, dspan_bias), the last of shape [0] if it is not wanted.

    A gradient of None counts as zero, and its share of the work is skipped.
    """
    gradients = _allocate_gradients(args, wants_dspan_bias)
    chosen = backends.choose("attention", BACKENDS, args, backend)
    empty = out.numel() == 0 or args.seqlen_k == 0
    if empty or args.cu_seqlens_q is not None:
        for gradient in gradients:
            gradient.zero_()
    if empty:
        return gradients
    # Autograd passes any strides, e.g. all zero from `out.sum()`. Backends get a unit last stride.
    if dout is not None and dout.shape[3] > 1 and dout.stride(3) != 1:
        dout = dout.contiguous()
    if dmarginals is not None:
        dmarginals = dmarginals.contiguous() if args.num_spans > 0 else None
    if dlse is not None:
        dlse = dlse.contiguous()
    dq, dk, dv, dspan_bias = gradients
    chosen.bwd(
        args,
        AttentionOutputs(out, marginals, lse),
        AttentionGradients(
            dout, dmarginals, dlse, dq, dk, dv, dspan_bias if wants_dspan_bias else None
        ),
    )
    return gradients


def _attention_bwd_fake(
    args: AttentionArgs, backend: str, *results_and_gradients: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _allocate_gradients(args, wants_dspan_bias=results_and_gradients[-1])


def _backward(
    ctx: Any, dout: Tensor | None, dmarginals: Tensor | None, dlse: Tensor | None
) -> tuple[Tensor | None, ...]:
    args, backend, outputs = _SIGNATURE.saved(ctx)
    wants_dspan_bias = ctx.needs_input_grad[_SIGNATURE.index("span_bias")]
    dq, dk, dv, dspan_bias = attention_bwd(
        args, backend, *outputs, dout, dmarginals, dlse, wants_dspan_bias
    )
    return _SIGNATURE.gradients(
        q=dq, k=dk, v=dv, span_bias=dspan_bias if wants_dspan_bias else None
    )


attention_fwd = schema.define_with_args(
    "attention_fwd",
    _SIGNATURE,
    "",
    3,
    _attention_fwd,
    _attention_fwd_fake,
    (_SIGNATURE.save, _backward),
)
attention_bwd = schema.define_with_args(
    "attention_bwd",
    _SIGNATURE,
    "Tensor out, Tensor marginals, Tensor lse, Tensor? dout, Tensor? dmarginals, Tensor? dlse, "
    "bool wants_dspan_bias",
    4,
    _attention_bwd,
    _attention_bwd_fake,
)
