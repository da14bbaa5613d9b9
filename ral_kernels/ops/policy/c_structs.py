"""The structs of csrc/include/ral/policy.h, filled from the arguments of both ops."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

from torch import Tensor

from ...runtime.c_interface import (
    DTYPES,
    BroadcastStruct,
    TensorStruct,
    address,
    broadcast_struct,
    tensor_struct,
)
from ..divergence.arguments import KINDS
from .arguments import PolicyArgs, PolicyDivergenceArgs, ReferenceArgs, TargetArgs


class SideStruct(ctypes.Structure):
    """`ral_policy_side`: the queries and keys of one policy."""

    _fields_ = [
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("shared_prefix", c_int64),
        ("num_prefixes", c_int64),
        ("window_left", c_int64),
        ("window_right", c_int64),
        ("q", TensorStruct),
        ("k", TensorStruct),
        ("k_prefix", TensorStruct),
        ("prefix_index", c_void_p),
        ("span_bias", BroadcastStruct),
        ("head_weights", c_void_p),
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
        ("total_rows", c_int64),
        ("row_length", c_int64),
        ("num_sequences", c_int64),
        ("max_rows", c_int64),
        ("max_keys", c_int64),
        ("cu_seqlens_q", c_void_p),
        ("cu_seqlens_k", c_void_p),
        ("query_starts", c_void_p),
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


class Params(ctypes.Structure):
    """`ral_policy_params`."""

    _fields_ = [
        ("common", CommonStruct),
        ("policy", SideStruct),
        ("p", c_void_p),
        ("dp", c_void_p),
        ("dq", TensorStruct),
        ("dk", TensorStruct),
        ("dspan_bias", c_void_p),
        ("dhead_weights", c_void_p),
    ]


class SpanLists(ctypes.Structure):
    """`ral_policy_span_lists`: the keys of each span."""

    _fields_ = [
        ("keys", c_void_p),
        ("starts", c_void_p),
        ("is_shared", c_int32),
    ]


class TargetStruct(ctypes.Structure):
    """`ral_policy_target`: distributions that rows share."""

    _fields_ = [
        ("values", c_void_p),
        ("ids", c_void_p),
        ("index", c_void_p),
        ("num_targets", c_int64),
        ("length", c_int64),
        ("first_key", c_int64),
    ]


class DivergenceParams(ctypes.Structure):
    """`ral_policy_divergence_params`."""

    structs: CallStructs  # keeps alive the tensors that pointers lead to

    _fields_ = [
        ("common", CommonStruct),
        ("policy", SideStruct),
        ("reference", SideStruct),
        ("target", TargetStruct),
        ("kind", c_int32),
        ("reference_normalised", c_int32),
        ("value", c_void_p),
        ("u", c_void_p),
        ("w", c_void_p),
        ("dvalue", c_void_p),
        ("dq", TensorStruct),
        ("dk", TensorStruct),
        ("dhead_weights", c_void_p),
    ]


class CallStructs:
    """The structs of one call, and the copies of tensors that they point into.

    Args:
        args: the caller keeps its tensors alive.
        norm, z: the policy's statistics; None where the library does not return them.
        isa, num_threads: of the CPU library.
    """

    def __init__(
        self,
        args: PolicyArgs,
        norm: Tensor | None,
        z: Tensor | None,
        isa: int = 0,
        num_threads: int = 0,
    ) -> None:
        self._kept: list[Tensor] = []
        ids, ids_stride = self._rows(args.span_ids)
        scope, scope_stride = self._rows(args.scope)
        padding, padding_stride = self._rows(args.key_padding_mask)
        self.common = CommonStruct(
            batch_size=args.batch_size,
            num_rows=args.num_rows,
            seqlen_k=args.seqlen_k,
            num_spans=args.num_spans,
            query_start=args.query_start,
            total_rows=args.num_rows,
            row_length=args.num_outcomes,
            num_sequences=args.num_sequences,
            max_rows=args.max_rows,
            max_keys=args.max_keys,
            cu_seqlens_q=self._offsets(args.cu_seqlens_q),
            cu_seqlens_k=self._offsets(args.cu_seqlens_k),
            query_starts=self._offsets(args.query_starts),
            span_ids=ids,
            span_ids_stride_b=ids_stride,
            scope=scope,
            scope_stride_b=scope_stride,
            key_padding_mask=padding,
            key_padding_mask_stride_b=padding_stride,
            exclude_self=args.exclude_self,
            isa=isa,
            num_threads=num_threads,
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
            head_weights=address(args.head_weights),
            norm=address(norm),
            z=address(z),
            scale=args.scale,
            softcap=args.softcap,
            dtype=DTYPES[args.q.dtype],
        )

    def _offsets(self, x: Tensor | None) -> int | None:
        """The address of contiguous offsets."""
        if x is not None and not x.is_contiguous():
            x = x.contiguous()
            self._kept.append(x)
        return address(x)

    def _rows(self, x: Tensor | None) -> tuple[int | None, int]:
        """The address of [N], [1, N] or [B, N] with unit last stride, and the stride of samples."""
        if x is None:
            return None, 0
        if x.stride(-1) != 1:
            x = x.contiguous()
            self._kept.append(x)
        shared = x.dim() == 1 or x.shape[0] == 1
        return address(x), 0 if shared else x.stride(0)


def divergence_params(
    structs: CallStructs,
    args: PolicyDivergenceArgs,
    reference_norm: Tensor | None,
    reference_z: Tensor | None,
    u: Tensor | None,
    w: Tensor | None,
) -> DivergenceParams:
    """The inputs and statistics of a call; the caller adds what its pass reads and writes."""
    params = DivergenceParams(
        common=structs.common,
        policy=structs.policy,
        reference=_reference_struct(args.reference, reference_norm, reference_z),
        target=_target_struct(args.target),
        kind=KINDS.index(args.kind),
        u=address(u),
        w=address(w),
    )
    params.structs = structs
    return params


def _reference_struct(
    reference: ReferenceArgs, norm: Tensor | None, z: Tensor | None
) -> SideStruct:
    if reference.q is None:
        return SideStruct(z=address(z))
    return SideStruct(
        num_heads=reference.num_heads,
        num_kv_heads=reference.num_kv_heads,
        head_dim=reference.head_dim,
        shared_prefix=reference.prefix_length,
        num_prefixes=0 if reference.k_prefix is None else reference.k_prefix.shape[0],
        window_left=reference.window_left,
        window_right=reference.window_right,
        q=tensor_struct(reference.q),
        k=tensor_struct(reference.k),
        k_prefix=tensor_struct(reference.k_prefix),
        prefix_index=address(reference.prefix_index),
        head_weights=address(reference.head_weights),
        norm=address(norm),
        z=address(z),
        scale=reference.scale,
        softcap=reference.softcap,
        dtype=DTYPES[reference.q.dtype],
    )


def _target_struct(target: TargetArgs) -> TargetStruct:
    return TargetStruct(
        values=address(target.values),
        ids=address(target.ids),
        index=address(target.index),
        num_targets=target.num_targets,
        length=target.length,
    )
