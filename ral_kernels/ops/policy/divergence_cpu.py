"""CPU backend of `policy_divergence`: both policies are streamed, neither is stored."""

from __future__ import annotations

import ctypes

from torch import Tensor

from ral_kernels.runtime import cpu_library
from ral_kernels.runtime.c_interface import pointer, tensor_struct

from . import cpu as policy_cpu
from . import divergence_c_structs as c_structs
from .divergence_arguments import PolicyDivergenceArgs

supported_isas = cpu_library.supported_isas
available = policy_cpu.available


def can_run(args: PolicyDivergenceArgs) -> str | None:
    """None if this backend can run `args`, else the reason why not."""
    reason = policy_cpu.can_run(args.policy)
    if reason is not None:
        return reason
    if args.reference.q.dtype not in cpu_library.COMPUTED:
        return (
            "it computes float32, bfloat16 and float16; got a reference in "
            f"{args.reference.q.dtype}"
        )
    return None


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
    bundle = policy_cpu.bundle_of(args.policy, norm, z)
    params = c_structs.params(bundle, args, ref_norm, ref_z, u, w)
    params.value = pointer(value)
    status = policy_cpu.library().ral_cpu_policy_divergence_fwd(ctypes.byref(params))
    cpu_library.raise_for_status("attention_divergence", status, q=args.policy.q, k=args.policy.k)


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
    assert dspan_bias is None
    cpu_library.expect_writes(dq, dk)
    bundle = policy_cpu.bundle_of(args.policy, norm, z)
    params = c_structs.params(bundle, args, ref_norm, ref_z, u, w)
    params.dvalue = pointer(dvalue)
    params.dq = tensor_struct(dq)
    params.dk = tensor_struct(dk)
    status = policy_cpu.library().ral_cpu_policy_divergence_bwd(ctypes.byref(params))
    cpu_library.raise_for_status("attention_divergence", status, q=args.policy.q, k=args.policy.k)


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
    cpu_library.expect_writes(dq, dk)
    bundle = policy_cpu.bundle_of(args.policy, None, None)
    params = c_structs.params(bundle, args, ref_norm, ref_z, None, None)
    params.reference_normalised = normalised
    params.value = pointer(value)
    params.dvalue = pointer(weights)
    params.dq = tensor_struct(dq)
    params.dk = tensor_struct(dk)
    status = policy_cpu.library().ral_cpu_policy_loss(ctypes.byref(params))
    cpu_library.raise_for_status("ral_loss", status, q=args.policy.q, k=args.policy.k)
