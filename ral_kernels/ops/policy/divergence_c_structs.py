"""The structs of csrc/include/ral/policy.h, filled from `PolicyDivergenceArgs`."""

from __future__ import annotations

from torch import Tensor

from ral_kernels.ops.divergence.arguments import KINDS
from ral_kernels.runtime.c_interface import DTYPES, pointer, tensor_struct

from .c_structs import Bundle, DivergenceParams, SideStruct
from .divergence_arguments import PolicyDivergenceArgs


def params(
    bundle: Bundle,
    args: PolicyDivergenceArgs,
    ref_norm: Tensor | None,
    ref_z: Tensor | None,
    u: Tensor | None,
    w: Tensor | None,
) -> DivergenceParams:
    """The inputs and statistics of a call; the caller adds what its pass reads and writes."""
    reference = args.reference
    side = SideStruct(
        num_heads=reference.num_heads,
        num_kv_heads=reference.num_kv_heads,
        head_dim=reference.head_dim,
        shared_prefix=reference.prefix_length,
        window_left=reference.window_left,
        window_right=reference.window_right,
        q=tensor_struct(reference.q),
        k=tensor_struct(reference.k),
        k_prefix=tensor_struct(reference.k_prefix),
        prefix_index=pointer(reference.prefix_index),
        norm=pointer(ref_norm),
        z=pointer(ref_z),
        scale=reference.scale,
        softcap=reference.softcap,
        dtype=DTYPES[reference.q.dtype],
    )
    return DivergenceParams(
        common=bundle.common,
        policy=bundle.policy,
        reference=side,
        kind=KINDS.index(args.kind),
        u=pointer(u),
        w=pointer(w),
    )
