"""Triton backend of `policy`: what it can run, and its launches."""

from __future__ import annotations

from torch import Tensor

from ral_kernels.runtime import triton_runtime

from ..arguments import PolicyArgs

MAX_HEAD_DIM = 256

available = triton_runtime.available
only_on_request = triton_runtime.only_on_request


def can_run(args: PolicyArgs) -> str | None:
    """None if this backend can run `args`, else the reason why not."""
    if args.head_dim > MAX_HEAD_DIM:
        return f"head dims go up to {MAX_HEAD_DIM}; got {args.head_dim}"
    return triton_runtime.cannot_run(args.q, args.k, args.span_bias)


def fwd(args: PolicyArgs, p: Tensor, norm: Tensor, z: Tensor) -> None:
    """Write the policy, norm and z."""
    from . import fwd_launch

    fwd_launch.fwd(args, p, norm, z)


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
    """Write dq, dk and, if there is one, dspan_bias. p is not read: P_h shows where it is 0."""
    from . import bwd_launch

    bwd_launch.bwd(args, norm, z, dp, dq, dk, dspan_bias)
