"""CPU backend of `divergence`: one sweep over each row in C++ (csrc/cpu/divergence_fwd.h)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ral_kernels.policy import cpu as policy_cpu
from ral_kernels.policy.c_structs import ElementParams
from ral_kernels.runtime import cpu_library
from ral_kernels.runtime.c_interface import pointer

from .arguments import KINDS, DivergenceArgs

supported_isas = cpu_library.supported_isas
available = policy_cpu.available


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
    params = ElementParams(
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
    status = policy_cpu.library().ral_cpu_divergence_fwd(ctypes.byref(params))
    cpu_library.raise_for_status("divergence", status, p=p)
