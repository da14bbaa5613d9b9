"""CPU backend of `divergence`: calls ral_cpu."""

from __future__ import annotations

import ctypes
import functools

import torch

from ...runtime import checks, cpu_library
from ...runtime.backends import Backend
from ...runtime.c_interface import address
from .arguments import KINDS, DivergenceArgs, DivergenceOutputs
from .c_structs import Params


@functools.cache
def _library() -> ctypes.CDLL:
    return cpu_library.checked("ral_cpu_policy_struct_sizes", (None, None, Params))


class CpuDivergence(Backend[DivergenceArgs, DivergenceOutputs]):
    """A C++ kernel that sweeps over each row once (csrc/cpu/policy/divergence_fwd.h)."""

    def available(self) -> str | None:
        return cpu_library.available(_library)

    def can_run(self, args: DivergenceArgs) -> str | None:
        reason = cpu_library.cannot_run(args.p)
        if reason is None and args.p.dtype != torch.float32:
            return f"supports float32; got {checks.dtype_name(args.p.dtype)}"
        return reason

    def fwd(self, args: DivergenceArgs, outputs: DivergenceOutputs) -> None:
        cpu_library.expect_writes(outputs.dp, outputs.dr)
        params = Params(
            num_rows=args.p.shape[0],
            length=args.p.shape[1],
            p=address(args.p),
            r=address(args.r),
            value=address(outputs.value),
            dp=address(outputs.dp),
            dr=address(outputs.dr),
            kind=KINDS.index(args.kind),
            isa=cpu_library.chosen_isa(),
            num_threads=torch.get_num_threads(),
        )
        status = _library().ral_cpu_divergence_fwd(ctypes.byref(params))
        cpu_library.raise_for_status("divergence", status, p=args.p)
