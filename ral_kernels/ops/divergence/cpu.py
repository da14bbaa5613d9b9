"""CPU backend of `divergence`: one sweep over each row in C++ (csrc/cpu/policy/divergence_fwd.h)."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from ral_kernels.runtime import cpu_library
from ral_kernels.runtime.c_interface import pointer

from .arguments import KINDS, DivergenceArgs
from .c_structs import Params

supported_isas = cpu_library.supported_isas


@functools.cache
def _library() -> ctypes.CDLL:
    cpu_library.check_struct_sizes("ral_cpu_policy_struct_sizes", (None, None, Params))
    return cpu_library.library()


def available() -> str | None:
    """None if the compiled library is there, else the reason why not."""
    try:
        _library()
    except RuntimeError as error:
        return str(error)
    return None


def can_run(args: DivergenceArgs) -> str | None:
    """None if this backend can run `args`, else the reason why not."""
    if args.p.device.type != "cpu":
        return f"it needs CPU tensors; got {args.p.device}"
    if args.p.dtype != torch.float32:
        return f"it computes float32; got {args.p.dtype}"
    return None


def fwd(
    p: Tensor, r: Tensor, kind: str, value: Tensor, dp: Tensor | None, dr: Tensor | None
) -> None:
    """Write the value of each row and, where asked for, the gradients for a gradient of 1."""
    cpu_library.expect_writes(dp, dr)
    params = Params(
        num_rows=p.shape[0],
        length=p.shape[1],
        p=pointer(p),
        r=pointer(r),
        value=pointer(value),
        dp=pointer(dp),
        dr=pointer(dr),
        kind=KINDS.index(kind),
        isa=cpu_library.chosen_isa(),
        num_threads=torch.get_num_threads(),
    )
    status = _library().ral_cpu_divergence_fwd(ctypes.byref(params))
    cpu_library.raise_for_status("divergence", status, p=p)
