"""CPU backend of `attention`: calls ral_cpu."""

from __future__ import annotations

import ctypes
import functools

import torch

from ...runtime import cpu_library
from ...runtime.backends import DifferentiableBackend
from . import c_structs
from .arguments import AttentionArgs, AttentionGradients, AttentionOutputs


@functools.cache
def _library() -> ctypes.CDLL:
    return cpu_library.checked(
        "ral_cpu_attention_struct_sizes",
        (c_structs.Params, c_structs.Outputs, c_structs.Gradients),
    )


def _params(args: AttentionArgs) -> bytes:
    return c_structs.params(args, cpu_library.chosen_isa(), torch.get_num_threads())


class CpuAttention(DifferentiableBackend[AttentionArgs, AttentionOutputs, AttentionGradients]):
    """C++ kernels of csrc/cpu/attention, in the variant of this processor's instruction set."""

    def available(self) -> str | None:
        return cpu_library.available(_library)

    def can_run(self, args: AttentionArgs) -> str | None:
        return cpu_library.cannot_run(args.q)

    def fwd(self, args: AttentionArgs, outputs: AttentionOutputs) -> None:
        cpu_library.expect_writes(outputs.out, outputs.marginals, outputs.lse)
        args = c_structs.with_unit_stride(args)
        status = _library().ral_cpu_attention_fwd(_params(args), c_structs.outputs(outputs))
        cpu_library.raise_for_status("attention", status, q=args.q, k=args.k, v=args.v)

    def bwd(
        self, args: AttentionArgs, outputs: AttentionOutputs, gradients: AttentionGradients
    ) -> None:
        cpu_library.expect_writes(gradients.dq, gradients.dk, gradients.dv, gradients.dspan_bias)
        args = c_structs.with_unit_stride(args)
        status = _library().ral_cpu_attention_bwd(
            _params(args),
            c_structs.outputs(outputs),
            c_structs.gradients(gradients),
        )
        cpu_library.raise_for_status("attention", status, q=args.q, k=args.k, v=args.v)
