"""Triton backend of `attention`: says what it can run, and imports the kernels when it runs."""

from __future__ import annotations

from ....runtime import triton_runtime
from ....runtime.backends import DifferentiableBackend
from ..arguments import AttentionArgs, AttentionGradients, AttentionOutputs


class TritonAttention(
    triton_runtime.TritonChoice,
    DifferentiableBackend[AttentionArgs, AttentionOutputs, AttentionGradients],
):
    """Triton kernels of this folder."""

    def can_run(self, args: AttentionArgs) -> str | None:
        reason = triton_runtime.cannot_run(args.q, args.k, args.v, args.attn_mask)
        if reason is not None:
            return reason
        if max(args.head_dim, args.head_dim_v) > 256:
            return (
                f"head dims above 256 are not supported; got {args.head_dim} and {args.head_dim_v}"
            )
        masked = args.attn_mask is not None or args.key_padding_mask is not None
        if args.cu_seqlens_q is not None and masked:
            return "attn_mask and key_padding_mask are not supported with packed sequences"
        return None

    def fwd(self, args: AttentionArgs, outputs: AttentionOutputs) -> None:
        from .launch import launch_fwd

        launch_fwd(args, outputs.out, outputs.marginals, outputs.lse)

    def bwd(
        self, args: AttentionArgs, outputs: AttentionOutputs, gradients: AttentionGradients
    ) -> None:
        from .launch import launch_bwd

        launch_bwd(
            args,
            outputs.out,
            outputs.marginals,
            outputs.lse,
            gradients.dout,
            gradients.dmarginals,
            gradients.dlse,
            gradients.dq,
            gradients.dk,
            gradients.dv,
            gradients.dspan_bias,
        )
