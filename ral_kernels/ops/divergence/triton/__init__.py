"""Triton backend of `divergence`: says what it can run, and imports the kernels when it runs."""

from __future__ import annotations

import torch

from ....runtime import triton_runtime
from ....runtime.backends import Backend
from ..arguments import DivergenceArgs, DivergenceOutputs


class TritonDivergence(triton_runtime.TritonChoice, Backend[DivergenceArgs, DivergenceOutputs]):
    """Triton kernels of this folder."""

    def can_run(self, args: DivergenceArgs) -> str | None:
        reason = triton_runtime.cannot_run(args.p)
        if reason is None and args.p.dtype != torch.float32:
            return f"it computes float32; got {args.p.dtype}"
        return reason

    def fwd(self, args: DivergenceArgs, outputs: DivergenceOutputs) -> None:
        from . import kernels

        kernels.fwd(args.p, args.r, args.kind, outputs.value, outputs.dp, outputs.dr)
