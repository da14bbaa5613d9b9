"""CPU backend of `policy`: fills the structs of csrc/include/ral/policy.h and calls ral_cpu."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from .. import cpu_library
from ..cpu_library import BroadcastStruct, TensorStruct, broadcast_struct, pointer, tensor_struct
from .arguments import PolicyArgs

supported_isas = cpu_library.supported_isas


class SideStruct(ctypes.Structure):
    """`ral_policy_side`: the queries and keys of one policy."""

    _fields_ = [
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("shared_prefix", c_int64),
        ("window_left", c_int64),
        ("window_right", c_int64),
        ("q", TensorStruct),
        ("k", TensorStruct),
        ("k_prefix", TensorStruct),
        ("prefix_index", c_void_p),
        ("span_bias", BroadcastStruct),
        ("norm", c_void_p),
        ("z", c_void_p),
        ("scale", c_float),
        ("softcap", c_float),
        ("dtype", c_int32),
    ]


class CommonStruct(ctypes.Structure):
    """`ral_policy_common`: what both policies of a comparison share."""

    _fields_ = [
        ("batch_size", c_int64),
        ("num_rows", c_int64),
        ("seqlen_k", c_int64),
        ("num_spans", c_int64),
        ("query_start", c_int64),
        ("span_ids", c_void_p),
        ("span_ids_stride_b", c_int64),
        ("scope", c_void_p),
        ("scope_stride_b", c_int64),
        ("key_padding_mask", c_void_p),
        ("key_padding_mask_stride_b", c_int64),
        ("exclude_self", c_int32),
        ("isa", c_int32),
        ("num_threads", c_int32),
    ]


class _Params(ctypes.Structure):
    _fields_ = [
        ("common", CommonStruct),
        ("policy", SideStruct),
        ("p", c_void_p),
        ("dp", c_void_p),
        ("dq", TensorStruct),
        ("dk", TensorStruct),
        ("dspan_bias", c_void_p),
    ]


class DivergenceParams(ctypes.Structure):
    """`ral_policy_divergence_params`."""

    _fields_ = [
        ("common", CommonStruct),
        ("policy", SideStruct),
        ("reference", SideStruct),
        ("kind", c_int32),
        ("reference_normalised", c_int32),
        ("value", c_void_p),
        ("u", c_void_p),
        ("w", c_void_p),
        ("dvalue", c_void_p),
        ("dq", TensorStruct),
        ("dk", TensorStruct),
    ]


class ElementParams(ctypes.Structure):
    """`ral_divergence_params`."""

    _fields_ = [
        ("num_rows", c_int64),
        ("length", c_int64),
        ("p", c_void_p),
        ("r", c_void_p),
        ("value", c_void_p),
        ("dp", c_void_p),
        ("dr", c_void_p),
        ("kind", c_int32),
        ("isa", c_int32),
        ("num_threads", c_int32),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    cpu_library.check_struct_sizes(
        "ral_cpu_policy_struct_sizes", (_Params, DivergenceParams, ElementParams)
    )
    return cpu_library.library()


def available() -> str | None:
    """None if the compiled library is there, else the reason why not."""
    try:
        library()
    except RuntimeError as error:
        return str(error)
    return None


def can_run(args: PolicyArgs) -> str | None:
    """None if this backend can run `args`, else the reason why not."""
    if args.q.device.type != "cpu":
        return f"it needs CPU tensors; got {args.q.device}"
    if args.q.dtype not in cpu_library.COMPUTED:
        return f"it computes float32, bfloat16 and float16; got {args.q.dtype}"
    return None


class Bundle:
    """The structs of one call, and the copies of tensors that they point into."""

    def __init__(self, args: PolicyArgs, norm: Tensor | None, z: Tensor | None) -> None:
        self._kept: list[Tensor] = []
        self.shapes = f"q {tuple(args.q.shape)}, k {tuple(args.k.shape)}"
        ids, ids_stride = self._rows(args.span_ids)
        scope, scope_stride = self._rows(args.scope)
        padding, padding_stride = self._rows(args.key_padding_mask)
        self.common = CommonStruct(
            batch_size=args.batch_size,
            num_rows=args.num_rows,
            seqlen_k=args.seqlen_k,
            num_spans=args.num_spans,
            query_start=args.query_start,
            span_ids=ids,
            span_ids_stride_b=ids_stride,
            scope=scope,
            scope_stride_b=scope_stride,
            key_padding_mask=padding,
            key_padding_mask_stride_b=padding_stride,
            exclude_self=args.exclude_self,
            isa=cpu_library.chosen_isa(),
            num_threads=torch.get_num_threads(),
        )
        self.policy = SideStruct(
            num_heads=args.num_heads,
            num_kv_heads=args.num_kv_heads,
            head_dim=args.head_dim,
            window_left=args.window_left,
            window_right=args.window_right,
            q=tensor_struct(args.q),
            k=tensor_struct(args.k),
            span_bias=broadcast_struct(args.span_bias),
            norm=pointer(norm),
            z=pointer(z),
            scale=args.scale,
            softcap=args.softcap,
            dtype=cpu_library.DTYPES[args.q.dtype],
        )

    def _rows(self, x: Tensor | None) -> tuple[int | None, int]:
        """Address of [N], [1, N] or [B, N], made unit-stride, and the stride between samples."""
        if x is None:
            return None, 0
        if x.stride(-1) != 1:
            x = x.contiguous()
            self._kept.append(x)
        shared = x.dim() == 1 or x.shape[0] == 1
        return pointer(x), 0 if shared else x.stride(0)


def fwd(args: PolicyArgs, p: Tensor, norm: Tensor, z: Tensor) -> None:
    """Write the policy, norm and z."""
    bundle = Bundle(args, norm, z)
    params = _Params(common=bundle.common, policy=bundle.policy, p=pointer(p))
    status = library().ral_cpu_policy_fwd(ctypes.byref(params))
    cpu_library.raise_for_status("attention_policy", status, bundle.shapes)


def bwd(
    args: PolicyArgs,
    p: Tensor,
    norm: Tensor,
    z: Tensor,
    dp: Tensor,
    dq: Tensor,
    dk: Tensor,
    dspan_bias: Tensor | None,
) -> None:
    """Write dq, dk and, where asked for, dspan_bias."""
    bundle = Bundle(args, norm, z)
    params = _Params(
        common=bundle.common,
        policy=bundle.policy,
        dp=pointer(dp),
        dq=tensor_struct(dq),
        dk=tensor_struct(dk),
        dspan_bias=pointer(dspan_bias),
    )
    status = library().ral_cpu_policy_bwd(ctypes.byref(params))
    cpu_library.raise_for_status("attention_policy", status, bundle.shapes)
