"""Drop-ins: `attention` with the signatures and semantics of flash-attn 2.8."""

from __future__ import annotations

import numbers
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...runtime import checks
from ...spans import Spans
from .. import qkv
from .drop_in import refuse_dropout
from .interface import call_attention


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
    _refuse(op, block_table=block_table)
    return _packed(
        op, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs, spans,
    )  # fmt: skip


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


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """`flash_attn.flash_attn_with_kvcache`: attention of new queries over a cache of keys.

    Sample b has L = cache_seqlens[b] keys, and T_new more where k and v are given: they are
    written into the cache, in place, at L. Query t of T stands at key L + T_new - T + t. There is
    no backward, as in flash-attn. Rotary embeddings, ALiBi and paged caches are not supported. If
    lengths differ between samples, a bool mask [B, T, S] says which keys count.

    Args:
        q: [B, T, H, D].
        k_cache: [C, S, Hk, D], v_cache [C, S, Hk, Dv]: room for S keys each of C samples.
        k: [B, T_new, Hk, D] and v [B, T_new, Hk, Dv], the keys and values to append; or both None.
        cache_seqlens: keys in the cache: one number, or integers [B]; None for all S. Checked in
            CPU memory, trusted on a GPU.
        cache_batch_idx: integers [B], the sample of the cache of each query; None for 0 to B - 1.
            Attention then reads a copy of these samples.
        cache_leftpad: integers [B], how many of the first keys are padding.
        num_splits: accepted and not used.

    Returns:
        out [B, T, H, Dv]; with return_softmax_lse (out, softmax_lse [B, H, T]).
    """
    op = "flash_attn_with_kvcache"
    _refuse(
        op, rotary_cos=rotary_cos, rotary_sin=rotary_sin, block_table=block_table,
        alibi_slopes=alibi_slopes,
    )  # fmt: skip
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        _check_rank(op, name, tensor, "[B, S, H, D]")
    batch_size, seqlen_q, capacity = q.shape[0], q.shape[1], k_cache.shape[1]
    of_samples: dict[str, Any] = {
        "cache_batch_idx": cache_batch_idx,
        "cache_leftpad": cache_leftpad,
    }
    seqlens: Any = capacity if cache_seqlens is None else checks.to_number(cache_seqlens)
    if isinstance(seqlens, Tensor):
        of_samples["cache_seqlens"] = seqlens
    elif checks.is_int(seqlens):
        seqlens = checks.to_int(seqlens)
    else:
        raise TypeError(
            f"{op}: cache_seqlens must be None, an int or an integer tensor [B]; got "
            f"{type(seqlens).__name__}"
        )
    seqlen_new = _check_new_keys(op, k, v, k_cache, v_cache, batch_size)
    room = capacity - seqlen_new
    limits = {"cache_batch_idx": k_cache.shape[0] - 1, "cache_leftpad": capacity}
    for name, per_sample in of_samples.items():
        if per_sample is not None:
            _check_of_samples(op, name, per_sample, q, limits.get(name, room))
    if not isinstance(seqlens, Tensor) and not 0 <= seqlens <= room:
        raise ValueError(
            f"{op}: cache_seqlens must lie in 0 to {room}, the cache without the new keys; got "
            f"{seqlens}"
        )

    window: Any = _window(op, window_size, causal)
    scale, cap = _scale(op, softmax_scale, q.shape[3]), _softcap(op, softcap)
    caches = (
        (k_cache, v_cache)
        if cache_batch_idx is None
        else (x[:1].expand(batch_size, -1, -1, -1) for x in (k_cache, v_cache))
    )
    views = tuple(qkv.unit_last_stride(x).transpose(1, 2) for x in (q, *caches))
    qkv.check_qkv(op, views[0], views[1], views[2], None, names=("q", "k_cache", "v_cache"))

    if k is not None and v is not None:  # after every check: a call that raises writes nothing
        sample = (
            torch.arange(batch_size, device=q.device)
            if cache_batch_idx is None
            else cache_batch_idx.long()
        )
        first = seqlens.long()[:, None] if isinstance(seqlens, Tensor) else seqlens
        places = first + torch.arange(seqlen_new, device=q.device).expand(batch_size, -1)
        k_cache[sample[:, None], places] = k
        v_cache[sample[:, None], places] = v
    if cache_batch_idx is not None:
        k_cache, v_cache = k_cache[cache_batch_idx.long()], v_cache[cache_batch_idx.long()]
    seqlens = seqlens + seqlen_new
    mask = None
    if isinstance(seqlens, Tensor):
        # Query t is aligned with key `seqlens - T + t` of its own sample.
        own = seqlens.long()[:, None] - seqlen_q + torch.arange(seqlen_q, device=q.device)
        key = torch.arange(capacity, device=q.device)
        mask = (key < seqlens.long()[:, None, None]).expand(-1, seqlen_q, -1)
        if window[0] >= 0:
            mask = mask & (key >= own[..., None] - window[0])
        if window[1] >= 0:
            mask = mask & (key <= own[..., None] + window[1])
        window = (-1, -1)
    else:
        k_cache, v_cache = k_cache[:, :seqlens], v_cache[:, :seqlens]
    if cache_leftpad is not None:
        real = torch.arange(k_cache.shape[1], device=q.device) >= cache_leftpad[:, None, None]
        mask = real if mask is None else mask & real
    q, k_cache, v_cache = (qkv.unit_last_stride(x).transpose(1, 2) for x in (q, k_cache, v_cache))
    out, _, lse = call_attention(
        op,
        q,
        k_cache,
        v_cache,
        None,
        scale=scale,
        window=window,
        softcap=cap,
        attn_mask=None if mask is None else mask[:, None],
    )
    out = out.transpose(1, 2)
    return (out, lse) if return_softmax_lse else out


def _check_new_keys(
    op: str, k: Any, v: Any, k_cache: Tensor, v_cache: Tensor, batch_size: int
) -> int:
    """How many keys are to be appended."""
    if (k is None) != (v is None):
        raise ValueError(f"{op}: k and v must be given together, or neither; got one of them")
    if k is None:
        return 0
    seqlen_new = 0
    for name, tensor, cache in (("k", k, k_cache), ("v", v, v_cache)):
        _check_rank(op, name, tensor, "[B, S, H, D]")
        seqlen_new = tensor.shape[1] if name == "k" else seqlen_new
        shape = (batch_size, seqlen_new, *cache.shape[2:])
        if tensor.shape != shape:
            raise ValueError(f"{op}: {name} must be {shape}; got {tuple(tensor.shape)}")
        if tensor.dtype != cache.dtype:
            raise TypeError(
                f"{op}: {name} must have {name}_cache's dtype {checks.dtype_name(cache.dtype)}; "
                f"got {checks.dtype_name(tensor.dtype)}"
            )
        checks.check_same_device(op, name, tensor, cache, f"{name}_cache")
    return seqlen_new


def _check_of_samples(op: str, name: str, tensor: Any, q: Tensor, most: int) -> None:
    """An integer tensor [B] with values from 0 to `most`."""
    checks.check_tensor(op, name, tensor, "None or an integer tensor [B]")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} must be int32; got {checks.dtype_name(tensor.dtype)}")
    if tensor.shape != q.shape[:1]:
        raise ValueError(f"{op}: {name} must be [B] = {(q.shape[0],)}; got {tuple(tensor.shape)}")
    checks.check_same_device(op, name, tensor, q, "q")
    if tensor.device.type != "cpu" or not checks.has_values(tensor) or tensor.numel() == 0:
        return
    low, high = (int(x) for x in tensor.aminmax())
    if low < 0 or high > most:
        raise ValueError(f"{op}: {name} must lie in 0 to {most}; got values from {low} to {high}")


def _unbind(op: str, name: str, tensor: Any, dims: str) -> tuple[Tensor, ...]:
    """The parts of a packed tensor, in its third dimension from the last."""
    _check_rank(op, name, tensor, dims)
    count = 3 if " 3," in dims else 2
    if tensor.shape[-3] != count:
        raise ValueError(f"{op}: {name} must be {dims}; got {tuple(tensor.shape)}")
    return tensor.unbind(-3)


def _check_rank(op: str, name: str, tensor: Any, dims: str) -> None:
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
    _refuse(op, alibi_slopes=alibi_slopes)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_rank(op, name, tensor, "[B, S, H, D]")
    window = _window(op, window_size, causal)
    q, k, v = (qkv.unit_last_stride(x).transpose(1, 2) for x in qkv.autocast_inputs(q, k, v))
    qkv.check_qkv(op, q, k, v, spans)
    out, marginals, lse = call_attention(
        op,
        q,
        k,
        v,
        spans,
        scale=_scale(op, softmax_scale, q.shape[3]),
        window=window,
        softcap=_softcap(op, softcap),
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
    _refuse(op, alibi_slopes=alibi_slopes)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_rank(op, name, tensor, "[total, H, D]")
    window = _window(op, window_size, causal)
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
        scale=_scale(op, softmax_scale, q.shape[3]),
        window=window,
        softcap=_softcap(op, softcap),
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


def _window(op: str, window_size: Any, causal: Any) -> tuple[int, int]:
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


def _scale(op: str, softmax_scale: Any, head_dim: int) -> float:
    scale = checks.to_number(softmax_scale)
    return checks.resolve_scale(op, scale, head_dim, name="softmax_scale")


def _softcap(op: str, softcap: Any) -> float:
    softcap = checks.to_number(softcap)
    number = isinstance(softcap, (numbers.Real, torch.SymInt, torch.SymFloat))
    return checks.resolve_softcap(op, None if number and softcap <= 0 else softcap)


def _refuse(op: str, **options: Any) -> None:
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
