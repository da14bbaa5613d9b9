"""Triton backend of `attention`: chooses tiles, allocates scratch and launches the kernels."""

from __future__ import annotations

from torch import Tensor

from ral_kernels.runtime import triton_runtime

from ..arguments import AttentionArgs

available = triton_runtime.available
only_on_request = triton_runtime.only_on_request


def can_run(args: AttentionArgs) -> str | None:
    """None if this backend can run `args`, else the reason why not."""
    if max(args.head_dim, args.head_dim_v) > 256:
        return f"head dims go up to 256; got {args.head_dim} and {args.head_dim_v}"
    masked = args.attn_mask is not None or args.key_padding_mask is not None
    if args.cu_seqlens_q is not None and masked:
        return "packed sequences go without attn_mask and key_padding_mask"
    return triton_runtime.cannot_run(args.q, args.k, args.v, args.attn_mask)


def fwd(args: AttentionArgs, out: Tensor, marginals: Tensor, lse: Tensor) -> None:
    """Write out, marginals and lse."""
    from .launch import launch_fwd

    launch_fwd(args, out, marginals, lse)


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
    """Write dq, dk, dv and, if there is one, dspan_bias."""
    from .launch import launch_bwd

    launch_bwd(args, out, marginals, lse, dout, dmarginals, dlse, dq, dk, dv, dspan_bias)
