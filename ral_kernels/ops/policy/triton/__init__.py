"""Triton backend of `policy` and `policy_divergence`.

It says what it can run, and imports the kernels when it runs.
"""

from __future__ import annotations

from torch import Tensor

from ....runtime import triton_runtime
from ....runtime.backends import DifferentiableBackend
from ..arguments import (
    LossOutputs,
    PolicyArgs,
    PolicyDivergenceArgs,
    PolicyDivergenceGradients,
    PolicyDivergenceOutputs,
    PolicyGradients,
    PolicyOutputs,
)

MAX_HEAD_DIM = 256


def _cannot_run(args: PolicyArgs) -> str | None:
    if args.head_dim > MAX_HEAD_DIM:
        return f"head dims above {MAX_HEAD_DIM} are not supported; got {args.head_dim}"
    return triton_runtime.cannot_run(args.q, args.k, args.span_bias)


class TritonPolicy(
    triton_runtime.TritonChoice, DifferentiableBackend[PolicyArgs, PolicyOutputs, PolicyGradients]
):
    """Triton kernels of this folder."""

    def can_run(self, args: PolicyArgs) -> str | None:
        return _cannot_run(args)

    def fwd(self, args: PolicyArgs, outputs: PolicyOutputs) -> None:
        from . import fwd_launch

        fwd_launch.fwd(args, outputs.p, outputs.norm, outputs.z)

    def bwd(self, args: PolicyArgs, outputs: PolicyOutputs, gradients: PolicyGradients) -> None:
        """Write the gradients. `p` is not read, because P_h shows where it is 0."""
        from . import bwd_launch

        bwd_launch.bwd(
            args,
            outputs.norm,
            outputs.z,
            gradients.dp,
            gradients.dq,
            gradients.dk,
            gradients.dspan_bias,
            gradients.dhead_weights,
        )


class TritonPolicyDivergence(
    triton_runtime.TritonChoice,
    DifferentiableBackend[PolicyDivergenceArgs, PolicyDivergenceOutputs, PolicyDivergenceGradients],
):
    """The same kernels over both policies, in chunks of rows."""

    def can_run(self, args: PolicyDivergenceArgs) -> str | None:
        reason = _cannot_run(args.policy)
        if reason is not None:
            return reason
        q, k, head_dim = args.reference.q, args.reference.k, args.reference.head_dim
        if q is None or k is None:
            return None  # a target, in float32 as the statistics are
        if head_dim > MAX_HEAD_DIM:
            return (
                f"head dims above {MAX_HEAD_DIM} are not supported; got a reference with {head_dim}"
            )
        return triton_runtime.cannot_run(q, k)

    def fwd(self, args: PolicyDivergenceArgs, outputs: PolicyDivergenceOutputs) -> None:
        from . import divergence_launch

        divergence_launch.fwd(
            args,
            outputs.value,
            outputs.norm,
            outputs.z,
            outputs.reference_norm,
            outputs.reference_z,
            outputs.u,
            outputs.w,
        )

    def bwd(
        self,
        args: PolicyDivergenceArgs,
        outputs: PolicyDivergenceOutputs,
        gradients: PolicyDivergenceGradients,
    ) -> None:
        from . import divergence_launch

        divergence_launch.bwd(
            args,
            outputs.norm,
            outputs.z,
            outputs.reference_norm,
            outputs.reference_z,
            outputs.u,
            outputs.w,
            gradients.dvalue,
            gradients.dq,
            gradients.dk,
            gradients.dhead_weights,
        )

    def loss(
        self, args: PolicyDivergenceArgs, weights: Tensor, normalised: bool, outputs: LossOutputs
    ) -> None:
        from . import divergence_launch

        divergence_launch.loss(
            args,
            weights,
            outputs.reference_norm,
            outputs.reference_z,
            normalised,
            outputs.value,
            outputs.dq,
            outputs.dk,
            outputs.dhead_weights,
        )
