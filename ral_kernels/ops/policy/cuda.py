"""CUDA C++ backend of `policy_divergence`: calls ral_cuda."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import replace

from torch import Tensor

from ral_kernels.runtime import cuda_library
from ral_kernels.runtime.c_interface import pointer, tensor_struct

from . import divergence_c_structs as c_structs
from .arguments import PolicyArgs
from .c_structs import Bundle, DivergenceParams, SideStruct
from .divergence_arguments import PolicyDivergenceArgs

# Floats that ∂D/∂p of a chunk of rows, with the parts of U, may take; 64 rows are a chunk even if
# they take more.
CHUNK = 8 * 2**20

only_on_request = cuda_library.only_on_request


@functools.cache
def _library() -> ctypes.CDLL:
    structs = (SideStruct, DivergenceParams)
    return cuda_library.checked("ral_cuda_policy_struct_sizes", structs)


def available() -> str | None:
    """None if the kernels work on this machine, else the reason why not."""
    return cuda_library.available(_library)


def can_run(args: PolicyDivergenceArgs) -> str | None:
    """None if this backend can run `args`, else the reason why not."""
    reason = cuda_library.cannot_run(args.policy.q, args.policy.k)
    return has_no_kernel(args) if reason is None else reason


def has_no_kernel(args: PolicyDivergenceArgs) -> str | None:
    """Why these options have no kernel, on whatever device; None if they have one."""
    policy, reference = args.policy, args.reference
    for name, given in (
        ("span_bias", policy.span_bias is not None),
        ("softcap", policy.softcap != 0 or reference.softcap != 0),
    ):
        if given:
            return f"it goes without {name}"
    reason = cuda_library.cannot_compute(policy.q, policy.k)
    if reason is None:
        reason = cuda_library.cannot_compute(reference.q, reference.k)
        reason = None if reason is None else f"of the reference, {reason}"
    return reason


def _prepared(args: PolicyDivergenceArgs) -> PolicyDivergenceArgs:
    aligned, policy, reference = cuda_library.aligned, args.policy, args.reference
    prefix = reference.k_prefix
    return replace(
        args,
        policy=replace(policy, q=aligned(policy.q), k=aligned(policy.k)),
        reference=replace(
            reference,
            q=aligned(reference.q),
            k=aligned(reference.k),
            k_prefix=None if prefix is None else aligned(prefix),
        ),
    )


def _run(op: str, name: str, params: DivergenceParams, policy: PolicyArgs) -> None:
    """Call the entry point `name` with the scratch memory that it asks for."""
    library, call, limit = _library(), ctypes.byref(params), ctypes.c_int64(CHUNK)
    count = getattr(library, f"{name}_scratch")
    count.restype = ctypes.c_int64
    scratch = cuda_library.scratch(policy.q, count(call, limit))
    with cuda_library.on_device_of(policy.q):
        status = getattr(library, name)(
            call,
            limit,
            ctypes.c_void_p(scratch.data_ptr()),
            ctypes.c_void_p(cuda_library.stream(policy.q)),
        )
    cuda_library.raise_for_status(op, status, q=policy.q, k=policy.k)


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
    args = _prepared(args)
    bundle = Bundle(args.policy, norm, z)
    params = c_structs.params(bundle, args, ref_norm, ref_z, u, w)
    params.value = pointer(value)
    _run("attention_divergence", "ral_cuda_policy_divergence_fwd", params, args.policy)


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
    args = _prepared(args)
    bundle = Bundle(args.policy, norm, z)
    params = c_structs.params(bundle, args, ref_norm, ref_z, u, w)
    params.dvalue = pointer(dvalue)
    params.dq = tensor_struct(dq)
    params.dk = tensor_struct(dk)
    _run("attention_divergence", "ral_cuda_policy_divergence_bwd", params, args.policy)


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
    args = _prepared(args)
    bundle = Bundle(args.policy, None, None)
    params = c_structs.params(bundle, args, ref_norm, ref_z, None, None)
    params.reference_normalised = normalised
    params.value = pointer(value)
    params.dvalue = pointer(weights)
    params.dq = tensor_struct(dq)
    params.dk = tensor_struct(dk)
    _run("ral_loss", "ral_cuda_policy_divergence_loss", params, args.policy)
