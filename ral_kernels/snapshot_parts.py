"""The parts of an `AttentionSnapshot`: their names, and what every way in checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .ops import packing, qkv
from .runtime import checks

OP = "AttentionSnapshot"
PACKING = ("cu_seqlens_q", "cu_seqlens_k", "query_starts")
TENSORS = ("q", "k", "k_prefix", "prefix_index", "span_bias", "head_weights", *PACKING)
OPTIONS = ("query_start", "scale", "window_left", "window_right", "softcap")
EXACT = ("prefix_index", "span_bias", "head_weights", *PACKING)  # tensors that keep their dtype


def check_parts(
    op: str, tensors: Mapping[str, Any], options: Mapping[str, Any], *, read_values: bool
) -> None:
    """Check that parts form a snapshot: kernels rely on it, whichever way the parts came."""
    for what, got, needed, known in (
        ("tensors", tensors, ("q", "k"), TENSORS),
        ("options", options, OPTIONS, OPTIONS),
    ):
        wrong = [x for x in needed if x not in got] or sorted(set(got) - set(known), key=str)
        if wrong:
            raise ValueError(
                f"{op}: {what} must hold {', '.join(needed)} and nothing but {', '.join(known)}; "
                f"{wrong[0]} is {'unknown' if wrong[0] in got else 'missing'}"
            )
    q, k, bias = tensors["q"], tensors["k"], tensors.get("span_bias")
    k_prefix, index = tensors.get("k_prefix"), tensors.get("prefix_index")
    qkv.check_qkv(op, q, k, k, None)  # k in place of v: the same checks
    if (k_prefix is None) != (index is None):
        names = ("k_prefix", "prefix_index") if index is None else ("prefix_index", "k_prefix")
        raise ValueError(f"{op}: {names[0]} needs {names[1]}; got none")
    if k_prefix is not None and index is not None:
        checks.check_tensor(op, "k_prefix", k_prefix, "a [P, Hk, N0, D] tensor")
        if k_prefix.dtype != k.dtype:
            raise TypeError(
                f"{op}: k_prefix must have k's dtype {checks.dtype_name(k.dtype)}; got "
                f"{checks.dtype_name(k_prefix.dtype)}"
            )
        if k_prefix.dim() != 4 or k_prefix.shape[1::2] != k.shape[1::2]:
            raise ValueError(
                f"{op}: k_prefix must be [P, Hk, N0, D] with Hk={k.shape[1]}, D={k.shape[3]}; got "
                f"{tuple(k_prefix.shape)}"
            )
        checks.check_same_device(op, "k_prefix", k_prefix, q, "q")
        check_prefix_index(op, index, k_prefix, read_values=read_values)
        if index.dtype != torch.int64:
            raise TypeError(
                f"{op}: prefix_index must be int64; got {checks.dtype_name(index.dtype)}"
            )
        if index.shape != q.shape[:1]:
            raise ValueError(
                f"{op}: prefix_index must be [B] with B={q.shape[0]}; got {tuple(index.shape)}"
            )
    if bias is not None:
        checks.check_tensor(op, "span_bias", bias, "None or a [B, H, T, S] tensor")
        if bias.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{op}: span_bias must be float32 or float64; got {checks.dtype_name(bias.dtype)}"
            )
        if bias.dim() != 4 or bias.shape[0] != q.shape[0]:
            raise ValueError(
                f"{op}: span_bias must be [B, H, T, S] with B={q.shape[0]}; got {tuple(bias.shape)}"
            )
        shape = (*q.shape[:3], bias.shape[3])
        checks.check_broadcastable(op, "span_bias", bias, shape, "[B, H, T, S]")
        checks.check_same_device(op, "span_bias", bias, q, "q")
    _check_packing(op, tensors, read_values=read_values)
    if tensors.get("head_weights") is not None:
        _check_head_weights(op, tensors, read_values=read_values)
    _check_options(op, options)


def _check_packing(op: str, tensors: Mapping[str, Any], *, read_values: bool) -> None:
    given = [name for name in PACKING if tensors.get(name) is not None]
    if not given:
        return
    q = tensors["q"]
    if len(given) < len(PACKING):
        missing = next(name for name in PACKING if name not in given)
        raise ValueError(f"{op}: {given[0]} needs {missing}; got none")
    if tensors.get("k_prefix") is not None:
        raise ValueError(f"{op}: k_prefix is not supported with {given[0]}; got both")
    if q.shape[0] != 1:
        raise ValueError(f"{op}: q must be [1, H, T, D] with {given[0]}; got {tuple(q.shape)}")
    for name in given:
        what, least = ("[S]", 0) if name == "query_starts" else ("[S + 1]", 1)
        packing.check_offsets(op, name, tensors[name], q, what, least)
        checks.check_same_device(op, name, tensors[name], q, "q")
    count = tensors["query_starts"].shape[0]
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        if tensors[name].shape[0] != count + 1:
            raise ValueError(
                f"{op}: {name} must be [S + 1] with S={count}, the length of query_starts; got "
                f"{tuple(tensors[name].shape)}"
            )
        if read_values and checks.has_values(tensors[name]):
            side = "q" if name == "cu_seqlens_q" else "k"
            packing.lengths(op, name, tensors[name], tensors[side].shape[2], side)


def _check_head_weights(op: str, tensors: Mapping[str, Any], *, read_values: bool) -> None:
    weights, q, starts = (tensors.get(x) for x in ("head_weights", "q", "query_starts"))
    assert isinstance(q, Tensor)
    checks.check_tensor(op, "head_weights", weights, "None or a [B, H] tensor")
    assert isinstance(weights, Tensor)
    if weights.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{op}: head_weights must be float32 or float64; got {checks.dtype_name(weights.dtype)}"
        )
    shape = (q.shape[0] if starts is None else starts.shape[0], q.shape[1])
    if weights.shape != shape:
        dims = "[B, H]" if starts is None else "[S, H]"
        raise ValueError(f"{op}: head_weights must be {dims} = {shape}; got {tuple(weights.shape)}")
    checks.check_same_device(op, "head_weights", weights, q, "q")
    if read_values:
        qkv.check_head_weights(op, weights)


def _check_options(op: str, options: Mapping[str, Any]) -> None:
    for name, low in (
        ("query_start", -checks.FARTHEST),
        ("window_left", -1),
        ("window_right", -1),
    ):
        value = options[name]
        if not checks.is_int(value):
            raise TypeError(f"{op}: {name} must be an int; got {type(value).__name__}")
        if not low <= value <= checks.FARTHEST:
            raise ValueError(f"{op}: {name} must lie in [{low}, {checks.FARTHEST}]; got {value}")
    if options["scale"] is None or options["softcap"] is None:
        raise TypeError(f"{op}: scale and softcap must be numbers; got None")
    checks.resolve_scale(op, options["scale"], 1)
    softcap = options["softcap"]
    if type(softcap) not in (int, float) or softcap != 0:  # 0 = no soft cap
        checks.resolve_softcap(op, softcap)


def check_prefix_index(op: str, index: Any, k_prefix: Tensor, *, read_values: bool = True) -> None:
    checks.check_tensor(op, "prefix_index", index, "an int64 [B] tensor")
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"{op}: prefix_index must be integer; got {checks.dtype_name(index.dtype)}")
    checks.check_same_device(op, "prefix_index", index, k_prefix, "k_prefix")
    count = k_prefix.shape[0]
    if not read_values or index.numel() == 0 or not checks.has_values(index):
        return
    low, high = (int(value) for value in torch.aminmax(index))
    if low < 0 or high >= count:
        raise ValueError(
            f"{op}: prefix_index must lie in [0, {count}); got values from {low} to {high}"
        )


def check_dtype(dtype: Any) -> None:
    if dtype is not None and dtype not in qkv.DTYPES:
        wanted = ", ".join(checks.dtype_name(x) for x in qkv.DTYPES)
        raise TypeError(f"{OP}: dtype must be None or one of {wanted}; got {dtype!r}")


def resolve_span_bias(span_bias: Any, q: Tensor) -> Tensor | None:
    """The bias as [B, 1 or H, 1 or T, S], so that it can be indexed along the batch."""
    if span_bias is None:
        return None
    checks.check_tensor(
        OP, "span_bias", span_bias, "None or a tensor broadcastable to [B, H, T, S]"
    )
    if not span_bias.is_floating_point():
        raise TypeError(
            f"{OP}: span_bias must be floating; got {checks.dtype_name(span_bias.dtype)}"
        )
    if span_bias.dim() < 1:
        raise ValueError(f"{OP}: span_bias must have a last dimension S; got a scalar")
    shape = (*q.shape[:3], span_bias.shape[-1])
    checks.check_broadcastable(OP, "span_bias", span_bias, shape, "[B, H, T, S]")
    checks.check_same_device(OP, "span_bias", span_bias, q, "q")
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    bias = span_bias.detach().to(dtype)
    while bias.dim() < 4:
        bias = bias[None]
    return bias.expand(shape[0], -1, -1, -1)


def check_prefix(k: Tensor, group_size: Any, shared_prefix: Any) -> None:
    """Check that `k` has groups of samples with equal keys at the start."""
    batch_size, _, seqlen_k, _ = k.shape
    for name, value, low in (("group_size", group_size, 1), ("shared_prefix", shared_prefix, 0)):
        if not checks.is_int(value):
            raise TypeError(f"{OP}: {name} must be an int; got {type(value).__name__}")
        if value < low:
            raise ValueError(f"{OP}: {name} must be >= {low}; got {value}")
    if batch_size % group_size != 0:
        raise ValueError(
            f"{OP}: group_size must divide the batch size B={batch_size}; got {group_size}"
        )
    if shared_prefix > seqlen_k:
        raise ValueError(f"{OP}: shared_prefix must be at most N={seqlen_k}; got {shared_prefix}")
    if group_size == 1 or shared_prefix == 0 or not checks.has_values(k):
        return
    prefix = k[:, :, :shared_prefix].unflatten(0, (-1, group_size))
    for i in range(1, group_size):
        if not torch.equal(prefix[:, i], prefix[:, 0]):
            raise ValueError(
                f"{OP}: shared_prefix must cover keys that are equal within a group, N0="
                f"{shared_prefix}; sample {i} of a group of {group_size} differs from sample 0 by "
                f"up to {float((prefix[:, i] - prefix[:, 0]).abs().max()):.3g}"
            )
