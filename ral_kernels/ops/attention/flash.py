"""Drop-ins: `attention` with the signatures and semantics of flash-attn 2.8."""

from __future__ import annotations

import numbers
from itertools import pairwise
from typing import Any, Literal, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from ...runtime import checks
from ...spans import Spans
from .. import qkv
from .drop_in import refuse_dropout
from .interface import call_attention


class FlashOptions(TypedDict, total=False):
    """The options that change no result's type, for the overloads below."""

    softmax_scale: float | None
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    alibi_slopes: Tensor | None
    deterministic: bool


# Each function has five forms: plain, with marginals, with probabilities, with both, and with a
# flag that is not known before it runs.


@overload
def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = ...,
    softmax_scale: float | None = ..., causal: bool = ..., window_size: tuple[int, int] = ...,
    softcap: float = ..., alibi_slopes: Tensor | None = ..., deterministic: bool = ...,
    return_attn_probs: Literal[False] = ..., *, spans: None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = ...,
    *, return_attn_probs: Literal[False] = ..., spans: Spans, **options: Unpack[FlashOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = ...,
    *, return_attn_probs: Literal[True], spans: None = ..., **options: Unpack[FlashOptions],
) -> tuple[Tensor, Tensor, None]: ...  # fmt: skip
@overload
def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = ...,
    *, return_attn_probs: Literal[True], spans: Spans, **options: Unpack[FlashOptions],
) -> tuple[Tensor, Tensor, None, Tensor]: ...  # fmt: skip
@overload
def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = ...,
    *, return_attn_probs: bool, spans: Spans | None = ..., **options: Unpack[FlashOptions],
) -> Any: ...  # fmt: skip
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    spans: Spans | None = None,
) -> Any:
    """`flash_attn.flash_attn_func` ([B, S, H, D], bottom-right causal), plus marginals.

    The backward is deterministic whatever `deterministic` says. Dropout and ALiBi are not
    supported. A query that sees no key has lse = -inf (flash-attn: +inf). A negative bound of
    `window_size`, and a `softcap` that is not > 0, mean none.

    Returns:
        out [B, T, H, Dv]; with return_attn_probs (out, softmax_lse [B, H, T], None), as flash-attn
        returns without dropout; with spans the marginals [B, H, T, num_spans] come last.
    """
    return _padded(
        "flash_attn_func", q, k, v, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, return_attn_probs, spans,
    )  # fmt: skip


@overload
def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor, dropout_p: float = ...,
    softmax_scale: float | None = ..., causal: bool = ..., window_size: tuple[int, int] = ...,
    softcap: float = ..., alibi_slopes: Tensor | None = ..., deterministic: bool = ...,
    return_attn_probs: Literal[False] = ..., *, spans: None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor, dropout_p: float = ...,
    *, return_attn_probs: Literal[False] = ..., spans: Spans, **options: Unpack[FlashOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor, dropout_p: float = ...,
    *, return_attn_probs: Literal[True], spans: None = ..., **options: Unpack[FlashOptions],
) -> tuple[Tensor, Tensor, None]: ...  # fmt: skip
@overload
def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor, dropout_p: float = ...,
    *, return_attn_probs: Literal[True], spans: Spans, **options: Unpack[FlashOptions],
) -> tuple[Tensor, Tensor, None, Tensor]: ...  # fmt: skip
@overload
def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor, dropout_p: float = ...,
    *, return_attn_probs: bool, spans: Spans | None = ..., **options: Unpack[FlashOptions],
) -> Any: ...  # fmt: skip
def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    spans: Spans | None = None,
) -> Any:
    """`flash_attn_func` with keys and values in one tensor [B, S, 2, Hk, D]."""
    op = "flash_attn_kvpacked_func"
    k, v = _unbind(op, "kv", kv, "[B, S, 2, Hk, D]")
    return _padded(
        op, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        return_attn_probs, spans,
    )  # fmt: skip


@overload
def flash_attn_qkvpacked_func(
    qkv: Tensor, dropout_p: float = ...,
    softmax_scale: float | None = ..., causal: bool = ..., window_size: tuple[int, int] = ...,
    softcap: float = ..., alibi_slopes: Tensor | None = ..., deterministic: bool = ...,
    return_attn_probs: Literal[False] = ..., *, spans: None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def flash_attn_qkvpacked_func(
    qkv: Tensor, dropout_p: float = ...,
    *, return_attn_probs: Literal[False] = ..., spans: Spans, **options: Unpack[FlashOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def flash_attn_qkvpacked_func(
    qkv: Tensor, dropout_p: float = ...,
    *, return_attn_probs: Literal[True], spans: None = ..., **options: Unpack[FlashOptions],
) -> tuple[Tensor, Tensor, None]: ...  # fmt: skip
@overload
def flash_attn_qkvpacked_func(
    qkv: Tensor, dropout_p: float = ...,
    *, return_attn_probs: Literal[True], spans: Spans, **options: Unpack[FlashOptions],
) -> tuple[Tensor, Tensor, None, Tensor]: ...  # fmt: skip
@overload
def flash_attn_qkvpacked_func(
    qkv: Tensor, dropout_p: float = ...,
    *, return_attn_probs: bool, spans: Spans | None = ..., **options: Unpack[FlashOptions],
) -> Any: ...  # fmt: skip
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    spans: Spans | None = None,
) -> Any:
    """`flash_attn_func` with queries, keys and values in one tensor [B, S, 3, H, D]."""
    op = "flash_attn_qkvpacked_func"
    q, k, v = _unbind(op, "qkv", qkv, "[B, S, 3, H, D]")
    return _padded(
        op, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        return_attn_probs, spans,
    )  # fmt: skip


@overload
def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = ...,
    softmax_scale: float | None = ..., causal: bool = ..., window_size: tuple[int, int] = ...,
    softcap: float = ..., alibi_slopes: Tensor | None = ..., deterministic: bool = ...,
    return_attn_probs: Literal[False] = ..., block_table: None = ..., *, spans: None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = ...,
    *, return_attn_probs: Literal[False] = ..., spans: Spans, **options: Unpack[FlashOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = ...,
    *, return_attn_probs: Literal[True], spans: None = ..., **options: Unpack[FlashOptions],
) -> tuple[Tensor, Tensor, None]: ...  # fmt: skip
@overload
def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = ...,
    *, return_attn_probs: Literal[True], spans: Spans, **options: Unpack[FlashOptions],
) -> tuple[Tensor, Tensor, None, Tensor]: ...  # fmt: skip
@overload
def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = ...,
    *, return_attn_probs: bool, spans: Spans | None = ..., **options: Unpack[FlashOptions],
) -> Any: ...  # fmt: skip
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    spans: Spans | None = None,
) -> Any:
    """`flash_attn.flash_attn_varlen_func` (packed [total, H, D]), plus marginals.

    Dropout, ALiBi and block_table are not supported. The values of `cu_seqlens_q` and
    `cu_seqlens_k` are checked in CPU memory. On a GPU a check would wait for the device, so they
    are trusted there, as in flash-attn.

    Args:
        cu_seqlens_q: int32 [number of sequences + 1], from 0 to total_q, never decreasing;
            cu_seqlens_k likewise.
        max_seqlen_q: at least the longest sequence of queries; max_seqlen_k likewise.
        spans: ids [total_k]. Every query has the same num_spans; spans of other sequences get 0.

    Returns:
        out [total_q, H, Dv]; with return_attn_probs (out, softmax_lse [H, total_q], None); with
        spans the marginals [H, total_q, num_spans] come last.
    """
    op = "flash_attn_varlen_func"
    refuse(op, block_table=block_table)
    return _packed(
        op, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs, spans,
    )  # fmt: skip


@overload
def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float = ...,
    softmax_scale: float | None = ..., causal: bool = ..., window_size: tuple[int, int] = ...,
    softcap: float = ..., alibi_slopes: Tensor | None = ..., deterministic: bool = ...,
    return_attn_probs: Literal[False] = ..., *, spans: None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float = ...,
    *, return_attn_probs: Literal[False] = ..., spans: Spans, **options: Unpack[FlashOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float = ...,
    *, return_attn_probs: Literal[True], spans: None = ..., **options: Unpack[FlashOptions],
) -> tuple[Tensor, Tensor, None]: ...  # fmt: skip
@overload
def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float = ...,
    *, return_attn_probs: Literal[True], spans: Spans, **options: Unpack[FlashOptions],
) -> tuple[Tensor, Tensor, None, Tensor]: ...  # fmt: skip
@overload
def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float = ...,
    *, return_attn_probs: bool, spans: Spans | None = ..., **options: Unpack[FlashOptions],
) -> Any: ...  # fmt: skip
def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    spans: Spans | None = None,
) -> Any:
    """`flash_attn_varlen_func` with keys and values in one tensor [total_k, 2, Hk, D]."""
    op = "flash_attn_varlen_kvpacked_func"
    k, v = _unbind(op, "kv", kv, "[total_k, 2, Hk, D]")
    return _packed(
        op, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs, spans,
    )  # fmt: skip


@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float = ...,
    softmax_scale: float | None = ..., causal: bool = ..., window_size: tuple[int, int] = ...,
    softcap: float = ..., alibi_slopes: Tensor | None = ..., deterministic: bool = ...,
    return_attn_probs: Literal[False] = ..., *, spans: None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float = ...,
    *, return_attn_probs: Literal[False] = ..., spans: Spans, **options: Unpack[FlashOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float = ...,
    *, return_attn_probs: Literal[True], spans: None = ..., **options: Unpack[FlashOptions],
) -> tuple[Tensor, Tensor, None]: ...  # fmt: skip
@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float = ...,
    *, return_attn_probs: Literal[True], spans: Spans, **options: Unpack[FlashOptions],
) -> tuple[Tensor, Tensor, None, Tensor]: ...  # fmt: skip
@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float = ...,
    *, return_attn_probs: bool, spans: Spans | None = ..., **options: Unpack[FlashOptions],
) -> Any: ...  # fmt: skip
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    spans: Spans | None = None,
) -> Any:
    """`flash_attn_varlen_func` with queries, keys and values in one tensor [total, 3, H, D]."""
    op = "flash_attn_varlen_qkvpacked_func"
    q, k, v = _unbind(op, "qkv", qkv, "[total, 3, H, D]")
    return _packed(
        op, q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, return_attn_probs, spans, suffixes=("", ""),
    )  # fmt: skip


def _unbind(op: str, name: str, tensor: Any, dims: str) -> tuple[Tensor, ...]:
    """The parts of a packed tensor, in its third dimension from the last."""
    check_rank(op, name, tensor, dims)
    count = 3 if " 3," in dims else 2
    if tensor.shape[-3] != count:
        raise ValueError(f"{op}: {name} must be {dims}; got {tuple(tensor.shape)}")
    return tensor.unbind(-3)


def check_rank(op: str, name: str, tensor: Any, dims: str) -> None:
    checks.check_tensor(op, name, tensor, f"a {dims} tensor")
    if tensor.dim() != dims.count(",") + 1:
        raise ValueError(f"{op}: {name} must be {dims}; got {tuple(tensor.shape)}")


def _padded(
    op: str,
    q: Any,
    k: Any,
    v: Any,
    dropout_p: Any,
    softmax_scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    alibi_slopes: Any,
    return_attn_probs: bool,
    spans: Any,
) -> Any:
    """The functions on [B, S, H, D]."""
    refuse_dropout(op, dropout_p)
    refuse(op, alibi_slopes=alibi_slopes)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_rank(op, name, tensor, "[B, S, H, D]")
    window = window_of(op, window_size, causal)
    q, k, v = (qkv.unit_last_stride(x).transpose(1, 2) for x in qkv.autocast_inputs(q, k, v))
    qkv.check_qkv(op, q, k, v, spans)
    out, marginals, lse = call_attention(
        op,
        q,
        k,
        v,
        spans,
        scale=scale_of(op, softmax_scale, q.shape[3]),
        window=window,
        softcap=softcap_of(op, softcap),
    )
    return _result(out.transpose(1, 2), lse, marginals, return_attn_probs)


def _packed(
    op: str,
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    dropout_p: Any,
    softmax_scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    alibi_slopes: Any,
    return_attn_probs: bool,
    spans: Any,
    suffixes: tuple[str, str] = ("_q", "_k"),
) -> Any:
    """The functions on [total, H, D]; `suffixes` of cu_seqlens and max_seqlen, for messages."""
    refuse_dropout(op, dropout_p)
    refuse(op, alibi_slopes=alibi_slopes)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_rank(op, name, tensor, "[total, H, D]")
    window = window_of(op, window_size, causal)
    if spans is not None and isinstance(spans, Spans) and spans.ids.dim() != 1:
        raise ValueError(
            f"{op}: spans must have ids [total_k]={k.shape[0]}; got {tuple(spans.ids.shape)}"
        )
    q, k, v = (qkv.unit_last_stride(x).transpose(0, 1)[None] for x in qkv.autocast_inputs(q, k, v))
    qkv.check_qkv(op, q, k, v, spans)
    _check_cu_seqlens(op, suffixes[0], cu_seqlens_q, max_seqlen_q, q)
    _check_cu_seqlens(op, suffixes[1], cu_seqlens_k, max_seqlen_k, k)
    if cu_seqlens_k.shape[0] != cu_seqlens_q.shape[0]:
        raise ValueError(
            f"{op}: cu_seqlens_k must have the length of cu_seqlens_q, {cu_seqlens_q.shape[0]}; "
            f"got {cu_seqlens_k.shape[0]}"
        )
    out, marginals, lse = call_attention(
        op,
        q,
        k,
        v,
        spans,
        scale=scale_of(op, softmax_scale, q.shape[3]),
        window=window,
        softcap=softcap_of(op, softcap),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    marginals = None if marginals is None else marginals[0]
    return _result(out[0].transpose(0, 1), lse[0], marginals, return_attn_probs)


def _check_cu_seqlens(
    op: str, suffix: str, cu_seqlens: Any, max_seqlen: Any, tensor: Tensor
) -> None:
    name = f"cu_seqlens{suffix}"
    total = tensor.shape[2]
    side = suffix.removeprefix("_") or "qkv"
    checks.check_tensor(op, name, cu_seqlens, "an int32 tensor [number of sequences + 1]")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{op}: {name} must be int32; got {checks.dtype_name(cu_seqlens.dtype)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"{op}: {name} must be [number of sequences + 1]; got {tuple(cu_seqlens.shape)}"
        )
    checks.check_same_device(op, name, cu_seqlens, tensor, side)
    integer = (torch.int32, torch.int64)
    is_tensor = isinstance(max_seqlen, Tensor)
    if not (
        max_seqlen.dim() == 0 and max_seqlen.dtype in integer
        if is_tensor
        else checks.is_int(max_seqlen)
    ):
        raise TypeError(f"{op}: max_seqlen{suffix} must be an int; got {type(max_seqlen).__name__}")
    if not checks.has_values(cu_seqlens) or cu_seqlens.device.type != "cpu":
        return
    bounds = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != total or any(length < 0 for length in lengths):
        raise ValueError(
            f"{op}: {name} must start at 0, never decrease and end at {total}, the tokens of "
            f"{side}; got {bounds}"
        )
    if max_seqlen < max(lengths, default=0):
        raise ValueError(
            f"{op}: max_seqlen{suffix} must be at least the longest sequence, {max(lengths)}; got "
            f"{max_seqlen}"
        )


def window_of(op: str, window_size: Any, causal: Any) -> tuple[int, int]:
    """(left, right), where flash-attn takes any negative bound as none."""
    causal = _flag(causal)
    checks.check_flag(op, "causal", causal)
    if hasattr(window_size, "tolist"):  # a tensor or an array
        window_size = window_size.tolist()
    if not isinstance(window_size, (tuple, list)):
        raise TypeError(
            f"{op}: window_size must be (left, right); got {type(window_size).__name__}"
        )
    bounds = [checks.to_number(bound) for bound in window_size]
    bounds = [-1 if checks.is_int(bound) and bound < 0 else bound for bound in bounds]
    return checks.resolve_window(op, bounds, causal, name="window_size")


def _flag(value: Any) -> Any:
    """numpy's bools, and 0 and 1, as bool."""
    is_flag = type(value).__name__ in ("bool", "bool_") or (checks.is_int(value) and 0 <= value < 2)
    return bool(value) if is_flag else value


def scale_of(op: str, softmax_scale: Any, head_dim: int) -> float:
    scale = checks.to_number(softmax_scale)
    return checks.resolve_scale(op, scale, head_dim, name="softmax_scale")


def softcap_of(op: str, softcap: Any) -> float:
    softcap = checks.to_number(softcap)
    number = isinstance(softcap, (numbers.Real, torch.SymInt, torch.SymFloat))
    return checks.resolve_softcap(op, None if number and softcap <= 0 else softcap)


def refuse(op: str, **options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise NotImplementedError(
                f"{op}: {name} is not supported: it must be None; got {type(value).__name__}"
            )


def _result(out: Tensor, lse: Tensor, marginals: Tensor | None, return_attn_probs: bool) -> Any:
    result = (out, lse, None) if return_attn_probs else (out,)
    if marginals is not None:
        result = (*result, marginals)
    return result if len(result) > 1 else out
