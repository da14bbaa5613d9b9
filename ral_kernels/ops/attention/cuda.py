"""CUDA C++ backend of `attention`: calls ral_cuda."""

from __future__ import annotations

import ctypes
import functools
import logging
from dataclasses import replace

from torch import Tensor

from ral_kernels.runtime import cuda_library

from . import c_structs
from .arguments import AttentionArgs

logger = logging.getLogger(__name__)
only_on_request = cuda_library.only_on_request


@functools.cache
def _library() -> ctypes.CDLL:
    structs = (c_structs.Params, c_structs.Outputs, c_structs.Gradients)
    return cuda_library.checked("ral_cuda_attention_struct_sizes", structs)


def available() -> str | None:
    """None if the kernels work on this machine, else the reason why not."""
    return cuda_library.available(_library)


def can_run(args: AttentionArgs) -> str | None:
    """None if this backend can run `args`, else the reason why not."""
    reason = cuda_library.cannot_run(args.q, args.k, args.v)
    return has_no_kernel(args) if reason is None else reason


def has_no_kernel(args: AttentionArgs) -> str | None:
    """Why these options have no kernel, on whatever device; None if they have one."""
    if args.head_dim != args.head_dim_v:
        return f"head dims of k and v must be equal; got {args.head_dim} and {args.head_dim_v}"
    for name, given in (
        ("span_bias", args.span_bias is not None),
        ("attn_mask", args.attn_mask is not None),
        ("softcap", args.softcap != 0),
    ):
        if given:
            return f"it goes without {name}"
    if args.cu_seqlens_q is not None and args.key_padding_mask is not None:
        return "packed sequences go without key_padding_mask"
    return cuda_library.cannot_compute(args.q, args.k, args.v)


def _prepared(args: AttentionArgs) -> AttentionArgs:
    args = c_structs.with_unit_stride(args)
    q, k, v = (cuda_library.aligned(x) for x in (args.q, args.k, args.v))
    return replace(args, q=q, k=k, v=v)


def fwd(args: AttentionArgs, out: Tensor, marginals: Tensor, lse: Tensor) -> None:
    """Write out, marginals and lse."""
    args = _prepared(args)
    outputs = c_structs.outputs(out, marginals, lse)
    with cuda_library.on_device_of(args.q):
        status = _launch("ral_cuda_attention_fwd", args, ctypes.byref(outputs))
    cuda_library.raise_for_status("attention", status, q=args.q, k=args.k, v=args.v)


def _launch(entry: str, args: AttentionArgs, *rest: object) -> int:
    """By the kernels for Hopper where they are on and take the call, else by those for sm_80."""
    given = (
        ctypes.byref(c_structs.params(args)),
        *rest,
        ctypes.c_void_p(cuda_library.stream(args.q)),
    )
    if args.q.is_cuda and cuda_library.hopper() is None:
        status: int = getattr(_library(), f"{entry}_sm90")(*given)
        if status != cuda_library.NOT_TAKEN:
            return status
        why = _library().ral_cuda_failed_kernel().decode()
        logger.debug("%s: not by the kernels for Hopper, which do not take %s", entry, why)
    status = getattr(_library(), entry)(*given)
    return status


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
    """Write dq, dk and dv. `dspan_bias` is None: there is no bias here."""
    assert dspan_bias is None
    args = _prepared(args)
    if dout is not None:
        dout = cuda_library.aligned(dout)
    outputs = c_structs.outputs(out, marginals, lse)
    gradients = c_structs.gradients(dout, dmarginals, dlse, dq, dk, dv, None)
    # delta and lse in base 2
    scratch = cuda_library.scratch(lse, 2, *lse.shape)
    with cuda_library.on_device_of(args.q):
        status = _launch(
            "ral_cuda_attention_bwd",
            args,
            ctypes.byref(outputs),
            ctypes.byref(gradients),
            ctypes.c_void_p(scratch.data_ptr()),
        )
    cuda_library.raise_for_status("attention", status, q=args.q, k=args.k, v=args.v)
