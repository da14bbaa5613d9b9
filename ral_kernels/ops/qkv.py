"""Checks and prepares the inputs that ops share: q, k, v, spans, their bias, key padding."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..runtime import checks
from ..spans import Spans
from .allocation import accumulation_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_COLUMNS = 32
_LEAST_HEAD_WEIGHT = 2.0**-60  # invisible in a policy


def autocast_inputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast, q, k and v in its dtype, as PyTorch does for its own attention."""
    if not isinstance(q, Tensor) or q.is_meta:
        return q, k, v
    if not torch.is_autocast_enabled("cpu" if q.is_cpu else q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    if not all(isinstance(x, Tensor) and x.dtype in checks.HALF_OR_FLOAT for x in (q, k, v)):
        return q, k, v
    return q.to(dtype), k.to(dtype), v.to(dtype)


def full_precision(q: Tensor) -> torch.autocast:
    """A context in which a caller's autocast does not round float32 matrix products."""
    return torch.autocast(q.device.type, enabled=False)


def unit_last_stride(x: Tensor) -> Tensor:
    """`x`, or a copy of it where its last stride is not 1."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def check_qkv(
    op: str, q: Any, k: Any, v: Any, spans: Any, names: tuple[str, str, str] = ("q", "k", "v")
) -> None:
    """Check q, k, v and spans, in the layout [B, H, T, D]. Messages use the caller's `names`."""
    name_q, name_k, name_v = names
    checks.check_tensor(op, name_q, q, "a [B, H, T, D] tensor")
    checks.check_tensor(op, name_k, k, "a [B, Hk, N, D] tensor")
    checks.check_tensor(op, name_v, v, "a [B, Hk, N, Dv] tensor")
    if q.dim() != 4:
        raise ValueError(f"{op}: {name_q} must be [B, H, T, D]; got {tuple(q.shape)}")
    dtype = q.dtype
    if dtype not in DTYPES:
        raise TypeError(
            f"{op}: {name_q} must be float32, bfloat16, float16 (or float64, reference backend "
            f"only); got {checks.dtype_name(dtype)}"
        )
    batch_size, num_heads, _, head_dim = q.shape
    if num_heads < 1 or head_dim < 1:
        raise ValueError(
            f"{op}: {name_q} must be [B, H, T, D] with H >= 1 and D >= 1; got {tuple(q.shape)}"
        )
    device = q.device
    for name, tensor in ((name_k, k), (name_v, v)):
        if tensor.dtype != dtype:
            raise TypeError(
                f"{op}: {name} must have {name_q}'s dtype {checks.dtype_name(dtype)}; got "
                f"{checks.dtype_name(tensor.dtype)}"
            )
        if tensor.device != device:
            checks.check_same_device(op, name, tensor, q, name_q)
    shape_k, shape_v = k.shape, v.shape
    if len(shape_k) != 4 or shape_k[0] != batch_size or shape_k[3] != head_dim:
        raise ValueError(
            f"{op}: {name_k} must be [B, Hk, N, D] with B={batch_size}, D={head_dim}; got "
            f"{tuple(shape_k)}"
        )
    _, num_kv_heads, seqlen_k, _ = shape_k
    if num_kv_heads < 1 or num_heads % num_kv_heads != 0:
        raise ValueError(
            f"{op}: {name_k} must have a number of heads Hk that divides H={num_heads}; got "
            f"Hk={num_kv_heads}"
        )
    if len(shape_v) != 4 or shape_v[:3] != shape_k[:3] or shape_v[3] < 1:
        raise ValueError(
            f"{op}: {name_v} must be [B, Hk, N, Dv] with B={batch_size}, Hk={num_kv_heads}, "
            f"N={seqlen_k}, Dv >= 1; got {tuple(shape_v)}"
        )
    for name, tensor in ((name_q, q), (name_k, k), (name_v, v)):
        checks.check_unit_last_stride(op, name, tensor)
    if spans is not None:
        if not isinstance(spans, Spans):
            raise TypeError(f"{op}: spans must be None or Spans; got {type(spans).__name__}")
        spans.check()
        ids = spans.ids
        if ids.shape[-1] != seqlen_k or (ids.dim() == 2 and ids.shape[0] != batch_size):
            raise ValueError(
                f"{op}: spans must have ids [N] or [B, N] with B={batch_size}, N={seqlen_k}; got "
                f"{tuple(ids.shape)}"
            )
        checks.check_same_device(op, "spans", ids, q, name_q)


def prepare_span_bias(op: str, span_bias: Any, spans: Spans | None, q: Tensor) -> Tensor:
    """`span_bias` in float32 (float64 with float64 q), expanded: autograd sums its gradient."""
    checks.check_tensor(
        op, "span_bias", span_bias, "None or a tensor broadcastable to [B, H, T, S]"
    )
    if spans is None:
        raise ValueError(f"{op}: span_bias needs spans; got spans=None")
    if not span_bias.is_floating_point():
        raise TypeError(
            f"{op}: span_bias must be floating; got {checks.dtype_name(span_bias.dtype)}"
        )
    shape = (*q.shape[:3], spans.num_spans)
    checks.check_broadcastable(op, "span_bias", span_bias, shape, "[B, H, T, S]")
    checks.check_same_device(op, "span_bias", span_bias, q, "q")
    span_bias = span_bias.to(accumulation_dtype(q))
    if span_bias.numel() != 1 or not span_bias.requires_grad:
        return span_bias.expand(shape)
    # PyTorch gives each of its threads a share of a sum to one number, so that rounding depends on
    # how many there are. A sum to 32 numbers is one thread's, and so is that of the 32.
    copies = math.prod(shape)
    columns = span_bias.reshape(1).expand(_COLUMNS)
    return columns.repeat(copies // _COLUMNS + 1)[:copies].view(shape)


def prepare_head_weights(
    op: str, head_weights: Any, q: Tensor, samples: int, packed: bool = False
) -> Tensor:
    """x / mean_h(x) in float32 (float64 with float64 q): [samples, H] contiguous, differentiable.

    Values on the CPU are checked. Elsewhere the host would wait for them, and as little can be read
    under `torch.compile`: a sample whose weights are not valid then gets NaN.
    """
    num_heads = q.shape[1]
    dims = "[H] or [S, H]" if packed else "[H] or [B, H]"
    checks.check_tensor(op, "head_weights", head_weights, f"None or a floating tensor {dims}")
    if not head_weights.is_floating_point():
        raise TypeError(
            f"{op}: head_weights must be floating; got {checks.dtype_name(head_weights.dtype)}"
        )
    shape = (samples, num_heads)
    if not (head_weights.shape == shape[1:] or head_weights.shape == shape):
        raise ValueError(
            f"{op}: head_weights must be {dims} with {dims[-5]}={samples}, H={num_heads}; got "
            f"{tuple(head_weights.shape)}"
        )
    checks.check_same_device(op, "head_weights", head_weights, q, "q")
    x = head_weights.to(accumulation_dtype(q))
    valid = check_head_weights(op, x)
    x = x / x.amax(-1, keepdim=True).detach()  # so that their sum cannot overflow
    weights = torch.where(valid, x / x.mean(-1, keepdim=True), math.nan).expand(shape).contiguous()
    return floored(weights) if is_learned(weights) else weights


def check_head_weights(op: str, x: Tensor) -> Tensor:
    """Which samples have valid weights, bool [..., 1]. Values on the CPU are checked."""
    valid = ((x >= 0) & (x < math.inf)).all(-1, keepdim=True) & (x > 0).any(-1, keepdim=True)
    if x.device.type == "cpu" and checks.has_values(x) and not valid.all():
        wrong = x.reshape(-1, x.shape[-1])[~valid.flatten()][0]
        raise ValueError(
            f"{op}: head_weights must be finite and >= 0, and some of them > 0; got "
            f"{wrong.tolist()}"
        )
    return valid


def is_learned(head_weights: Tensor | None) -> bool:
    """Whether the gradient of head weights is wanted, so that `floored` raised them."""
    return head_weights is not None and head_weights.requires_grad and torch.is_grad_enabled()


def floored(head_weights: Tensor) -> Tensor:
    """Weights of at least 2⁻⁶⁰, with the gradient of those given.

    The gradient of a head's weight is formed from what the weight multiplies, so it must not be 0.
    """
    return head_weights + (_LEAST_HEAD_WEIGHT - head_weights).clamp(min=0.0).detach()


def check_key_padding_mask(op: str, key_padding_mask: Any, k: Tensor) -> None:
    checks.check_tensor(op, "key_padding_mask", key_padding_mask, "None or a bool [B, N] tensor")
    if key_padding_mask.dtype != torch.bool:
        raise TypeError(
            f"{op}: key_padding_mask must be bool (True = a real key); got "
            f"{checks.dtype_name(key_padding_mask.dtype)}"
        )
    shape = (k.shape[0], k.shape[2])
    if key_padding_mask.shape != shape:
        raise ValueError(
            f"{op}: key_padding_mask must be [B, N] = {shape}; got {tuple(key_padding_mask.shape)}"
        )
    checks.check_same_device(op, "key_padding_mask", key_padding_mask, k, "k")
