"""Triton backend of `divergence`: what it can run, and its launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ral_kernels.runtime import triton_runtime

from ..arguments import DivergenceArgs

available = triton_runtime.available
only_on_request = triton_runtime.only_on_request


def can_run(args: DivergenceArgs) -> str | None:
    """None if this backend can run `args`, else the reason why not."""
    reason = triton_runtime.cannot_run(args.p)
    if reason is None and args.p.dtype != torch.float32:
        return f"it computes float32; got {args.p.dtype}"
    return reason


def fwd(
    p: Tensor, r: Tensor, kind: str, value: Tensor, dp: Tensor | None, dr: Tensor | None
) -> None:
    """Write the value of each row and, where given, dp and dr for a gradient of 1."""
    from . import kernels

    kernels.fwd(p, r, kind, value, dp, dr)
