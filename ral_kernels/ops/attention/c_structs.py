"""The structs of csrc/include/ral/attention.h, filled from `AttentionArgs`."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import replace

from ...runtime.c_interface import (
    DTYPES,
    BroadcastStruct,
    TensorStruct,
    address,
    broadcast_fields,
    packer,
    tensor_fields,
)
from .arguments import AttentionArgs, AttentionGradients, AttentionOutputs


class Params(ctypes.Structure):
    """`ral_attention_params`."""

    _fields_ = [
        ("batch_size", c_int64),
        ("num_sequences", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("seqlen_q", c_int64),
        ("seqlen_k", c_int64),
        ("head_dim", c_int64),
        ("head_dim_v", c_int64),
        ("num_spans", c_int64),
        ("row_start", c_int64),
        ("row_stop", c_int64),
        ("window_left", c_int64),
        ("window_right", c_int64),
        ("q", TensorStruct),
        ("k", TensorStruct),
        ("v", TensorStruct),
        ("span_ids", c_void_p),
        ("span_ids_stride_b", c_int64),
        ("span_bias", BroadcastStruct),
        ("attn_mask", BroadcastStruct),
        ("key_padding_mask", c_void_p),
        ("key_padding_mask_stride_b", c_int64),
        ("cu_seqlens_q", c_void_p),
        ("cu_seqlens_k", c_void_p),
        ("scale", c_float),
        ("softcap", c_float),
        ("dtype", c_int32),
        ("attn_mask_dtype", c_int32),
        ("top_left", c_int32),
        ("isa", c_int32),
        ("num_threads", c_int32),
    ]


class Outputs(ctypes.Structure):
    """`ral_attention_outputs`."""

    _fields_ = [("out", TensorStruct), ("marginals", c_void_p), ("lse", c_void_p)]


class Gradients(ctypes.Structure):
    """`ral_attention_gradients`."""

    _fields_ = [
        ("dout", TensorStruct),
        ("dmarginals", c_void_p),
        ("dlse", c_void_p),
        ("dq", TensorStruct),
        ("dk", TensorStruct),
        ("dv", TensorStruct),
        ("dspan_bias", c_void_p),
    ]


_pack_params, _pack_outputs, _pack_gradients = map(packer, (Params, Outputs, Gradients))


def params(args: AttentionArgs, isa: int = 0, num_threads: int = 0) -> bytes:
    """The inputs of a call as pointers: the caller's `args` must keep every tensor alive.

    Args:
        args: with unit stride in ids, key padding and cu_seqlens (`with_unit_stride`).
        isa, num_threads: of the CPU library.
    """
    ids, padding, mask = args.span_ids, args.key_padding_mask, args.attn_mask
    cu_seqlens_q = args.cu_seqlens_q
    batch_size, num_heads, seqlen_q, head_dim = args.q.shape
    _, num_kv_heads, seqlen_k, head_dim_v = args.v.shape
    return _pack_params(
        batch_size=batch_size,
        num_sequences=batch_size if cu_seqlens_q is None else cu_seqlens_q.numel() - 1,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        num_spans=args.num_spans,
        row_start=args.row_start,
        row_stop=args.row_stop,
        window_left=args.window_left,
        window_right=args.window_right,
        q=tensor_fields(args.q),
        k=tensor_fields(args.k),
        v=tensor_fields(args.v),
        span_ids=address(ids),
        span_ids_stride_b=ids.stride(0) if ids is not None and ids.dim() == 2 else 0,
        span_bias=broadcast_fields(args.span_bias),
        attn_mask=broadcast_fields(mask),
        key_padding_mask=address(padding),
        key_padding_mask_stride_b=padding.stride(0) if padding is not None else 0,
        cu_seqlens_q=address(cu_seqlens_q),
        cu_seqlens_k=address(args.cu_seqlens_k),
        scale=args.scale,
        softcap=args.softcap,
        dtype=DTYPES[args.q.dtype],
        attn_mask_dtype=DTYPES[mask.dtype] if mask is not None else 0,
        top_left=args.top_left,
        isa=isa,
        num_threads=num_threads,
    )


def outputs(x: AttentionOutputs) -> bytes:
    return _pack_outputs(
        out=tensor_fields(x.out), marginals=address(x.marginals), lse=address(x.lse)
    )


def gradients(x: AttentionGradients) -> bytes:
    return _pack_gradients(
        dout=tensor_fields(x.dout),
        dmarginals=address(x.dmarginals),
        dlse=address(x.dlse),
        dq=tensor_fields(x.dq),
        dk=tensor_fields(x.dk),
        dv=tensor_fields(x.dv),
        dspan_bias=address(x.dspan_bias),
    )


def with_unit_stride(args: AttentionArgs) -> AttentionArgs:
    """`args` with unit stride in ids, key padding and cu_seqlens, which the libraries expect."""
    if args.span_ids is None and args.key_padding_mask is None and args.cu_seqlens_q is None:
        return args
    changes = {
        name: x.contiguous()
        for name in ("span_ids", "key_padding_mask", "cu_seqlens_q", "cu_seqlens_k")
        if (x := getattr(args, name)) is not None and x.stride(-1) != 1
    }
    return replace(args, **changes) if changes else args
