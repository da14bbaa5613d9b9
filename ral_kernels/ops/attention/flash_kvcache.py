"""Drop-in: attention over a cache of keys, with the signature of flash-attn 2.8."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from ...runtime import checks
from .. import qkv
from .flash import check_rank, refuse, scale_of, softcap_of, window_of
from .interface import call_attention


@overload
def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = ..., v: Tensor | None = ...,
    rotary_cos: None = ..., rotary_sin: None = ..., cache_seqlens: int | Tensor | None = ...,
    cache_batch_idx: Tensor | None = ..., cache_leftpad: Tensor | None = ...,
    block_table: None = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., rotary_interleaved: bool = ...,
    alibi_slopes: None = ..., num_splits: int = ...,
    return_softmax_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = ..., v: Tensor | None = ...,
    rotary_cos: None = ..., rotary_sin: None = ..., cache_seqlens: int | Tensor | None = ...,
    cache_batch_idx: Tensor | None = ..., cache_leftpad: Tensor | None = ...,
    block_table: None = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., rotary_interleaved: bool = ...,
    alibi_slopes: None = ..., num_splits: int = ...,
    *, return_softmax_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
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
    refuse(
        op, rotary_cos=rotary_cos, rotary_sin=rotary_sin, block_table=block_table,
        alibi_slopes=alibi_slopes,
    )  # fmt: skip
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_rank(op, name, tensor, "[B, S, H, D]")
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

    window: Any = window_of(op, window_size, causal)
    scale, cap = scale_of(op, softmax_scale, q.shape[3]), softcap_of(op, softcap)
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
        check_rank(op, name, tensor, "[B, S, H, D]")
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
