"""Triton backend of `policy_divergence`: both policies are streamed, neither is stored."""

from __future__ import annotations

from torch import Tensor

from ral_kernels.runtime import triton_runtime

from .. import triton as policy_backend
from ..divergence_arguments import PolicyDivergenceArgs

available = triton_runtime.available
only_on_request = triton_runtime.only_on_request


def can_run(args: PolicyDivergenceArgs) -> str | None:
    """None if this backend can run `args`, else the reason why not."""
    reason = policy_backend.can_run(args.policy)
    if reason is not None:
        return reason
    limit = policy_backend.MAX_HEAD_DIM
    if args.reference.head_dim > limit:
        return f"head dims go up to {limit}; got a reference with {args.reference.head_dim}"
    return triton_runtime.cannot_run(args.reference.q, args.reference.k)


def fwd(
    args: PolicyDivergenceArgs,
    value: Tensor,
    norm: Tensor,
    z: Tensor,
    ref_norm: Tensor,
    ref_z: Tensor,
    u: Tensor,
    w: Tensor,
) -> None:
    """Write the divergence of each row and the statistics that the backward starts from."""
    from . import divergence_launch

    divergence_launch.fwd(args, value, norm, z, ref_norm, ref_z, u, w)


def bwd(
    args: PolicyDivergenceArgs,
    norm: Tensor,
    z: Tensor,
    ref_norm: Tensor,
    ref_z: Tensor,
    u: Tensor,
    w: Tensor,
    dvalue: Tensor,
    dq: Tensor,
    dk: Tensor,
    dspan_bias: Tensor | None,
) -> None:
    """Write the gradients of q and k. `dspan_bias` is None: there are no spans here."""
    from . import divergence_launch

    assert dspan_bias is None
    divergence_launch.bwd(args, norm, z, ref_norm, ref_z, u, w, dvalue, dq, dk)


def loss(
    args: PolicyDivergenceArgs,
    weights: Tensor,
    ref_norm: Tensor,
    ref_z: Tensor,
    normalised: bool,
    value: Tensor,
    dq: Tensor,
    dk: Tensor,
) -> None:
    """Write the divergence of each row, and the gradients of its sum weighted by `weights`.

    `ref_norm` and `ref_z` are read if `normalised`, and written otherwise.
    """
    from . import divergence_launch

    divergence_launch.loss(args, weights, ref_norm, ref_z, normalised, value, dq, dk)
