"""CPU backend of `attention`: calls ral_cpu."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from ral_kernels.runtime import cpu_library

from . import c_structs
from .arguments import AttentionArgs

supported_isas = cpu_library.supported_isas


@functools.cache
def _library() -> ctypes.CDLL:
    cpu_library.check_struct_sizes(
        "ral_cpu_attention_struct_sizes",
        (c_structs.Params, c_structs.Outputs, c_structs.Gradients),
    )
    return cpu_library.library()


def available() -> str | None:
    """None if the compiled library is there, else the reason why not."""
    try:
        _library()
    except RuntimeError as error:
        return str(error)
    return None


def can_run(args: AttentionArgs) -> str | None:
    """None if this backend can run `args`, else the reason why not."""
    if args.q.device.type != "cpu":
        return f"it needs CPU tensors; got {args.q.device}"
    if args.q.dtype not in cpu_library.COMPUTED:
        return f"it computes float32, bfloat16 and float16; got {args.q.dtype}"
    return None


def _params(args: AttentionArgs) -> c_structs.Params:
    return c_structs.params(args, cpu_library.chosen_isa(), torch.get_num_threads())


def fwd(args: AttentionArgs, out: Tensor, marginals: Tensor, lse: Tensor) -> None:
    """Write out, marginals and lse."""
    cpu_library.expect_writes(out, marginals, lse)
    args = c_structs.with_unit_stride(args)
    outputs = c_structs.outputs(out, marginals, lse)
    status = _library().ral_cpu_attention_fwd(ctypes.byref(_params(args)), ctypes.byref(outputs))
    cpu_library.raise_for_status("attention", status, q=args.q, k=args.k, v=args.v)


def bwd(
    args: AttentionArgs,
    out: Tensor,
    marginals: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dmarginals: Tensor | None,
    dlse: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dspan_bias: Tensor | None,
) -> None:
    """Write dq, dk, dv and, where asked for, dspan_bias."""
    cpu_library.expect_writes(dq, dk, dv, dspan_bias)
    args = c_structs.with_unit_stride(args)
    outputs = c_structs.outputs(out, marginals, lse)
    gradients = c_structs.gradients(dout, dmarginals, dlse, dq, dk, dv, dspan_bias)
    status = _library().ral_cpu_attention_bwd(
        ctypes.byref(_params(args)), ctypes.byref(outputs), ctypes.byref(gradients)
    )
    cpu_library.raise_for_status("attention", status, q=args.q, k=args.k, v=args.v)
