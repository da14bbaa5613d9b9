"""Drop-in: `attention` with the signature and semantics of PyTorch's own."""

from __future__ import annotations

import math
from typing import Any, overload

import torch
from torch import Tensor

from ...runtime import checks
from ...spans import Spans
from .. import qkv
from .interface import call_attention, is_causal_bias


def refuse_dropout(op: str, dropout_p: Any) -> None:
    if dropout_p != 0:
        raise NotImplementedError(
            f"{op}: dropout is not supported: dropout_p must be 0.0; got {dropout_p!r}"
        )


@overload
def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = ...,
    dropout_p: float = ..., is_causal: bool = ..., scale: float | None = ...,
    enable_gqa: bool = ..., *, spans: None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = ...,
    dropout_p: float = ..., is_causal: bool = ..., scale: float | None = ...,
    enable_gqa: bool = ..., *, spans: Spans,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
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
            scores; or a `CausalBias` of torch.nn.attention.bias.
        is_causal: query i sees keys up to i; not together with attn_mask.
        enable_gqa: allows Hq to be a multiple of Hk.
        spans: [S], or [B, S] with B the product of the dimensions before the heads; adds the
            marginals to the result.

    Returns:
        out [..., Hq, L, Ev]; with spans (out, marginals), marginals [..., Hq, L, num_spans].
    """
    op = "scaled_dot_product_attention"
    # The usual call comes first: it passes every check of the loop.
    plain = checks.is_plain(query) and checks.is_plain(key) and checks.is_plain(value)
    as_is = plain and _are_bhtd(query, key, value)
    if not as_is:
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            checks.check_tensor(op, name, tensor, "a tensor of two or more dimensions")
            if tensor.dim() < 2:
                raise ValueError(
                    f"{op}: {name} must have two or more dimensions; got {tuple(tensor.shape)}"
                )
        as_is = _are_bhtd(query, key, value)
    refuse_dropout(op, dropout_p)
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

    lead: tuple[int, ...] = query.shape[:2]
    if not as_is:
        if enable_gqa:
            key, value = _share_kv_heads(op, query, key, value)
        lead = _broadcast_lead(op, query, key, value, enable_gqa)
    if attn_mask is not None and not is_causal_bias(attn_mask):
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
        scale=checks.resolve_scale(op, checks.to_number(scale), q.shape[3]),
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
        if tensor.dim() < 3 or _heads(tensor) < 1 or num_heads % _heads(tensor) != 0:
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
    tensor = qkv.unit_last_stride(tensor)
    if tensor.dim() == 2:
        tensor = tensor[None]
    num_heads = (lead[-1] if lead else 1) if same_heads else tensor.shape[-3]
    batch = lead[:-1]
    tensor = tensor.expand(*batch, num_heads, *tensor.shape[-2:])
    # Not flatten(): a batch of no dimensions is a batch of one.
    return tensor if len(batch) == 1 else tensor.reshape(math.prod(batch), *tensor.shape[-3:])
