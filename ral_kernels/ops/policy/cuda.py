"""CUDA C++ backend of `policy_divergence`: calls ral_cuda."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import replace

from torch import Tensor

from ...runtime import cuda_library
from ...runtime.backends import DifferentiableBackend
from ...runtime.c_interface import address, tensor_struct
from .arguments import (
    LossOutputs,
    PolicyArgs,
    PolicyDivergenceArgs,
    PolicyDivergenceGradients,
    PolicyDivergenceOutputs,
)
from .c_structs import CallStructs, DivergenceParams, SideStruct, divergence_params

# How many floats ∂D/∂p of a chunk of rows may take, together with the parts of U. A chunk of 64
# rows may take more.
CHUNK = 8 * 2**20


@functools.cache
def _library() -> ctypes.CDLL:
    structs = (SideStruct, DivergenceParams)
    return cuda_library.checked("ral_cuda_policy_struct_sizes", structs)


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


class CudaPolicyDivergence(
    DifferentiableBackend[PolicyDivergenceArgs, PolicyDivergenceOutputs, PolicyDivergenceGradients]
):
    """CUDA C++ kernels of csrc/cuda/policy."""

    def available(self) -> str | None:
        return cuda_library.available(_library)

    def only_on_request(self) -> str | None:
        return cuda_library.only_on_request()

    def can_run(self, args: PolicyDivergenceArgs) -> str | None:
        return cuda_library.cannot_run(args.policy.q, args.policy.k) or self.has_no_kernel(args)

    def has_no_kernel(self, args: PolicyDivergenceArgs) -> str | None:
        """Why these options have no kernel, on whatever device; None if they have one."""
        policy, reference = args.policy, args.reference
        for name, given in (
            ("span_bias", policy.span_bias is not None),
            ("cu_seqlens_q (packed sequences)", policy.is_packed),
            ("softcap", policy.softcap != 0 or reference.softcap != 0),
        ):
            if given:
                return f"{name} is not supported"
        reason = cuda_library.cannot_compute(policy.q, policy.k)
        if reason is None:
            reason = cuda_library.cannot_compute(reference.q, reference.k)
            reason = None if reason is None else f"reference policy: {reason}"
        return reason

    def fwd(self, args: PolicyDivergenceArgs, outputs: PolicyDivergenceOutputs) -> None:
        args = _prepared(args)
        params = _params(args, outputs)
        params.value = address(outputs.value)
        _run("attention_divergence", "ral_cuda_policy_divergence_fwd", params, args.policy)

    def bwd(
        self,
        args: PolicyDivergenceArgs,
        outputs: PolicyDivergenceOutputs,
        gradients: PolicyDivergenceGradients,
    ) -> None:
        args = _prepared(args)
        params = _params(args, outputs)
        params.dvalue = address(gradients.dvalue)
        params.dq = tensor_struct(gradients.dq)
        params.dk = tensor_struct(gradients.dk)
        _run("attention_divergence", "ral_cuda_policy_divergence_bwd", params, args.policy)

    def loss(
        self, args: PolicyDivergenceArgs, weights: Tensor, normalised: bool, outputs: LossOutputs
    ) -> None:
        args = _prepared(args)
        structs = CallStructs(args.policy, None, None)
        params = divergence_params(
            structs, args, outputs.reference_norm, outputs.reference_z, None, None
        )
        params.reference_normalised = normalised
        params.value = address(outputs.value)
        params.dvalue = address(weights)
        params.dq = tensor_struct(outputs.dq)
        params.dk = tensor_struct(outputs.dk)
        _run("ral_loss", "ral_cuda_policy_divergence_loss", params, args.policy)


def _params(args: PolicyDivergenceArgs, outputs: PolicyDivergenceOutputs) -> DivergenceParams:
    structs = CallStructs(args.policy, outputs.norm, outputs.z)
    return divergence_params(
        structs, args, outputs.reference_norm, outputs.reference_z, outputs.u, outputs.w
    )
