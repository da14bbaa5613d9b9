"""CPU backend of `policy`: fills the structs of csrc/include/ral/policy.h and calls ral_cpu."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from ral_kernels.runtime import cpu_library
from ral_kernels.runtime.c_interface import pointer, tensor_struct

from .arguments import PolicyArgs
from .c_structs import Bundle, DivergenceParams, Params

supported_isas = cpu_library.supported_isas


@functools.cache
def library() -> ctypes.CDLL:
    cpu_library.check_struct_sizes("ral_cpu_policy_struct_sizes", (Params, DivergenceParams, None))
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


def bundle_of(args: PolicyArgs, norm: Tensor | None, z: Tensor | None) -> Bundle:
    """The structs of a call, with the variant and the threads to run it on."""
    return Bundle(args, norm, z, cpu_library.chosen_isa(), torch.get_num_threads())


def fwd(args: PolicyArgs, p: Tensor, norm: Tensor, z: Tensor) -> None:
    """Write the policy, norm and z."""
    cpu_library.expect_writes(p)
    bundle = bundle_of(args, norm, z)
    params = Params(common=bundle.common, policy=bundle.policy, p=pointer(p))
    status = library().ral_cpu_policy_fwd(ctypes.byref(params))
    cpu_library.raise_for_status("attention_policy", status, q=args.q, k=args.k)


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
    cpu_library.expect_writes(dq, dk, dspan_bias)
    bundle = bundle_of(args, norm, z)
    params = Params(
        common=bundle.common,
        policy=bundle.policy,
        dp=pointer(dp),
        dq=tensor_struct(dq),
        dk=tensor_struct(dk),
        dspan_bias=pointer(dspan_bias),
    )
    status = library().ral_cpu_policy_bwd(ctypes.byref(params))
    cpu_library.raise_for_status("attention_policy", status, q=args.q, k=args.k)
