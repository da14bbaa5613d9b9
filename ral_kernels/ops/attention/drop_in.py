"""Drop-ins: `attention` with the signatures and semantics of PyTorch and of flash-attn."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ral_kernels.ops import qkv
from ral_kernels.runtime import checks
from ral_kernels.spans import Spans

from .interface import call_attention


def _refuse_dropout(op: str, dropout_p: Any) -> None:
    if dropout_p != 0:
        raise NotImplementedError(
            f"{op}: dropout is not supported: dropout_p must be 0.0; got {dropout_p!r}"
        )


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    spans: Spans | None = None,
) -> Any:
    """`torch.nn.functional.scaled_dot_product_attention`, with marginals on request.

    Unlike in `attention`, `is_causal` is aligned to the top left for L != S, as in PyTorch.
    Dropout, gradients of `attn_mask` and a scale that is not > 0 are not supported.

    Args:
        query: [..., Hq, L, E], or [L, E]. Leading dimensions of all three broadcast.
        key: [..., Hk, S, E].
        value: [..., Hk, S, Ev].
        attn_mask: broadcastable to [..., L, S], bool (True = attend) or floating, added to the
            scores.
        is_causal: query i sees keys up to i; not together with attn_mask.
        enable_gqa: allows Hq to be a multiple of Hk.
        spans: [S], or [B, S] with B the product of the dimensions before the heads; adds the
            marginals to the result.

    Returns:
        out [..., Hq, L, Ev]; with spans (out, marginals), marginals [..., Hq, L, num_spans].
    """
    op = "scaled_dot_product_attention"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.check_tensor(op, name, tensor, "a tensor of two or more dimensions")
        if tensor.dim() < 2:
            raise ValueError(
                f"{op}: {name} must have two or more dimensions; got {tuple(tensor.shape)}"
            )
    _refuse_dropout(op, dropout_p)
    checks.check_flag(op, "is_causal", is_causal)
    checks.check_flag(op, "enable_gqa", enable_gqa)
    if is_causal and attn_mask is not None:
        raise ValueError(
            f"{op}: attn_mask must be None with is_causal=True; got {type(attn_mask).__name__}"
        )
    query, key, value = qkv.autocast_inputs(query, key, value)
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"{op}: key must be [..., S, E] with E={query.shape[-1]}; got {tuple(key.shape)}"
        )
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(
            f"{op}: value must be [..., S, Ev] with S={key.shape[-2]}; got {tuple(value.shape)}"
        )

    as_is = _are_bhtd(query, key, value)
    lead: tuple[int, ...] = query.shape[:2]
    if not as_is:
        if enable_gqa:
            key, value = _share_kv_heads(op, query, key, value)
        lead = _broadcast_lead(op, query, key, value, enable_gqa)
    if attn_mask is not None:
        checks.check_tensor(op, "attn_mask", attn_mask, "None or a tensor")
        shape = (*lead, query.shape[-2], key.shape[-2])
        checks.check_broadcastable(op, "attn_mask", attn_mask, shape, "[..., L, S]")
        if attn_mask.dim() > 4:
            attn_mask = attn_mask.expand(shape).flatten(0, -4)
    q, k, v = query, key, value
    if not as_is:
        q = _as_bhtd(query, lead, same_heads=True)
        kv_heads_of_one = not enable_gqa and lead and _heads(key) == 1 and _heads(value) == 1
        same_heads = not (enable_gqa or kv_heads_of_one)
        k, v = _as_bhtd(key, lead, same_heads), _as_bhtd(value, lead, same_heads)
    qkv.check_qkv(op, q, k, v, spans, names=("query", "key", "value"))
    out, marginals, _ = call_attention(
        op,
        q,
        k,
        v,
        spans,
        attn_mask=attn_mask,
        scale=checks.resolve_scale(op, scale, q.shape[3]),
        window=(-1, 0 if is_causal else -1),
        softcap=0.0,
        top_left=True,
    )
    if not as_is:
        out = out.reshape(*lead, *out.shape[2:])
    if marginals is None:
        return out
    return out, marginals.reshape(*lead, *marginals.shape[2:])


def _are_bhtd(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether all three are [B, H, ., .], of one B and one H, with unit last strides."""
    shape = query.shape
    return (
        len(shape) == 4
        and shape[:2] == key.shape[:-2] == value.shape[:-2]
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    )


def _heads(tensor: Tensor) -> int:
    return tensor.shape[-3] if tensor.dim() > 2 else 1


def _share_kv_heads(op: str, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value with equally many heads: under enable_gqa PyTorch lets them differ."""
    num_heads = _heads(query)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dim() < 3 or num_heads % max(_heads(tensor), 1) != 0:
            raise ValueError(
                f"{op}: {name} must have heads that divide Hq={num_heads} with enable_gqa=True; "
                f"got {tuple(tensor.shape)}"
            )
    if _heads(key) == _heads(value):
        return key, value
    return (
        key.repeat_interleave(num_heads // _heads(key), dim=-3),
        value.repeat_interleave(num_heads // _heads(value), dim=-3),
    )


def _broadcast_lead(
    op: str, query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[int, ...]:
    """The leading dimensions of the result, [..., Hq]."""
    leads: list[tuple[int, ...]] = [tensor.shape[:-2] for tensor in (query, key, value)]
    if enable_gqa:  # _share_kv_heads compared heads; the result has those of query
        leads = [(*lead[:-1], _heads(query)) for lead in leads]
    try:
        return tuple(torch.broadcast_shapes(*leads))
    except RuntimeError:
        hint = "" if enable_gqa else " (grouped heads need enable_gqa=True)"
        raise ValueError(
            f"{op}: query, key and value must have leading dimensions that broadcast{hint}; "
            f"got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        ) from None


def _as_bhtd(tensor: Tensor, lead: tuple[int, ...], same_heads: bool) -> Tensor:
    """[..., heads, L, E] as [B, H, T, D]; heads are expanded too if `same_heads`."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    if tensor.dim() == 2:
        tensor = tensor[None]
    num_heads = (lead[-1] if lead else 1) if same_heads else tensor.shape[-3]
    batch = lead[:-1]
    tensor = tensor.expand(*batch, num_heads, *tensor.shape[-2:])
    # Not flatten(): a batch of no dimensions is a batch of one.
    return tensor if len(batch) == 1 else tensor.reshape(math.prod(batch), *tensor.shape[-3:])


def _flash_window(op: str, window_size: Any, causal: Any) -> tuple[int, int]:
    checks.check_flag(op, "causal", causal)
    if not isinstance(window_size, (tuple, list)):
        raise TypeError(
            f"{op}: window_size must be (left, right); got {type(window_size).__name__}"
        )
    return checks.resolve_window(op, window_size, causal, name="window_size")


def _flash_softcap(op: str, softcap: Any) -> float:
    # flash-attn writes "no soft cap" as 0.0
    return checks.resolve_softcap(op, None if softcap == 0 else softcap)


def _refuse_flash_options(op: str, dropout_p: Any, alibi_slopes: Any) -> None:
    _refuse_dropout(op, dropout_p)
    if alibi_slopes is not None:
        raise NotImplementedError(
            f"{op}: alibi_slopes is not supported: it must be None; got "
            f"{type(alibi_slopes).__name__}"
        )


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
    supported. A query that sees no key has lse = -inf (flash-attn: +inf).

    Returns:
        out [B, T, H, Dv]; with return_attn_probs (out, softmax_lse [B, H, T], None), as flash-attn
        returns without dropout; with spans the marginals [B, H, T, num_spans] come last.
    """
    op = "flash_attn_func"
    _refuse_flash_options(op, dropout_p, alibi_slopes)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.check_tensor(op, name, tensor, "a [B, S, H, D] tensor")
        if tensor.dim() != 4:
            raise ValueError(f"{op}: {name} must be [B, S, H, D]; got {tuple(tensor.shape)}")
    window = _flash_window(op, window_size, causal)
    q, k, v = (tensor.transpose(1, 2) for tensor in qkv.autocast_inputs(q, k, v))
    qkv.check_qkv(op, q, k, v, spans)
    out, marginals, lse = call_attention(
        op,
        q,
        k,
        v,
        spans,
        scale=checks.resolve_scale(op, softmax_scale, q.shape[3], name="softmax_scale"),
        window=window,
        softcap=_flash_softcap(op, softcap),
    )
    return _flash_result(out.transpose(1, 2), lse, marginals, return_attn_probs)


def _flash_result(
    out: Tensor, lse: Tensor, marginals: Tensor | None, return_attn_probs: bool
) -> Any:
    result = (out, lse, None) if return_attn_probs else (out,)
    if marginals is not None:
        result = (*result, marginals)
    return result if len(result) > 1 else out


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
    _refuse_flash_options(op, dropout_p, alibi_slopes)
    if block_table is not None:
        raise NotImplementedError(
            f"{op}: block_table is not supported: it must be None; got {type(block_table).__name__}"
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.check_tensor(op, name, tensor, "a [total, H, D] tensor")
        if tensor.dim() != 3:
            raise ValueError(f"{op}: {name} must be [total, H, D]; got {tuple(tensor.shape)}")
    window = _flash_window(op, window_size, causal)
    if spans is not None and isinstance(spans, Spans) and spans.ids.dim() != 1:
        raise ValueError(
            f"{op}: spans must have ids [total_k]={k.shape[0]}; got {tuple(spans.ids.shape)}"
        )
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in qkv.autocast_inputs(q, k, v))
    qkv.check_qkv(op, q, k, v, spans)
    _check_cu_seqlens(op, "q", cu_seqlens_q, max_seqlen_q, q)
    _check_cu_seqlens(op, "k", cu_seqlens_k, max_seqlen_k, k)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
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
        scale=checks.resolve_scale(op, softmax_scale, q.shape[3], name="softmax_scale"),
        window=window,
        softcap=_flash_softcap(op, softcap),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    marginals = None if marginals is None else marginals[0]
    return _flash_result(out[0].transpose(0, 1), lse[0], marginals, return_attn_probs)


def _check_cu_seqlens(op: str, side: str, cu_seqlens: Any, max_seqlen: Any, tensor: Tensor) -> None:
    name = f"cu_seqlens_{side}"
    total = tensor.shape[2]
    checks.check_tensor(op, name, cu_seqlens, "an int32 tensor [number of sequences + 1]")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{op}: {name} must be int32; got {checks.dtype_name(cu_seqlens.dtype)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"{op}: {name} must be [number of sequences + 1]; got {tuple(cu_seqlens.shape)}"
        )
    checks.check_same_device(op, name, cu_seqlens, tensor, side)
    if not checks.is_int(max_seqlen):
        raise TypeError(f"{op}: max_seqlen_{side} must be an int; got {type(max_seqlen).__name__}")
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
            f"{op}: max_seqlen_{side} must be at least the longest sequence, {max(lengths)}; got "
            f"{max_seqlen}"
        )
