"""CPU backend of `policy` and `policy_divergence`: calls ral_cpu."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from ...runtime import checks, cpu_library
from ...runtime.backends import DifferentiableBackend
from ...runtime.c_interface import address, tensor_struct
from .arguments import (
    LossOutputs,
    PolicyArgs,
    PolicyDivergenceArgs,
    PolicyDivergenceGradients,
    PolicyDivergenceOutputs,
    PolicyGradients,
    PolicyOutputs,
)
from .c_structs import CallStructs, DivergenceParams, Params, divergence_params


@functools.cache
def _library() -> ctypes.CDLL:
    return cpu_library.checked("ral_cpu_policy_struct_sizes", (Params, DivergenceParams, None))


def _structs_of(args: PolicyArgs, norm: Tensor | None, z: Tensor | None) -> CallStructs:
    """The structs of a call, with the variant and the threads to run it on."""
    return CallStructs(args, norm, z, cpu_library.chosen_isa(), torch.get_num_threads())


class CpuPolicy(DifferentiableBackend[PolicyArgs, PolicyOutputs, PolicyGradients]):
    """C++ kernels of csrc/cpu/policy."""

    def available(self) -> str | None:
        return cpu_library.available(_library)

    def can_run(self, args: PolicyArgs) -> str | None:
        return cpu_library.cannot_run(args.q)

    def fwd(self, args: PolicyArgs, outputs: PolicyOutputs) -> None:
        cpu_library.expect_writes(outputs.p)
        structs = _structs_of(args, outputs.norm, outputs.z)
        params = Params(common=structs.common, policy=structs.policy, p=address(outputs.p))
        status = _library().ral_cpu_policy_fwd(ctypes.byref(params))
        cpu_library.raise_for_status("attention_policy", status, q=args.q, k=args.k)

    def bwd(self, args: PolicyArgs, outputs: PolicyOutputs, gradients: PolicyGradients) -> None:
        cpu_library.expect_writes(gradients.dq, gradients.dk, gradients.dspan_bias)
        structs = _structs_of(args, outputs.norm, outputs.z)
        params = Params(
            common=structs.common,
            policy=structs.policy,
            dp=address(gradients.dp),
            dq=tensor_struct(gradients.dq),
            dk=tensor_struct(gradients.dk),
            dspan_bias=address(gradients.dspan_bias),
            dhead_weights=address(gradients.dhead_weights),
        )
        status = _library().ral_cpu_policy_bwd(ctypes.byref(params))
        cpu_library.raise_for_status("attention_policy", status, q=args.q, k=args.k)


class CpuPolicyDivergence(
    DifferentiableBackend[PolicyDivergenceArgs, PolicyDivergenceOutputs, PolicyDivergenceGradients]
):
    """The same kernels over both policies. They stream both and store neither."""

    def available(self) -> str | None:
        return cpu_library.available(_library)

    def can_run(self, args: PolicyDivergenceArgs) -> str | None:
        reason = cpu_library.cannot_run(args.policy.q)
        if reason is None and args.reference.q is not None:
            dtype = args.reference.q.dtype
            if dtype not in cpu_library.COMPUTED:
                return (
                    "supports float32, bfloat16 and float16; got a reference policy in "
                    f"{checks.dtype_name(dtype)}"
                )
        return reason

    def fwd(self, args: PolicyDivergenceArgs, outputs: PolicyDivergenceOutputs) -> None:
        params = _params(args, outputs)
        params.value = address(outputs.value)
        self._call("ral_cpu_policy_divergence_fwd", "attention_divergence", params, args)

    def bwd(
        self,
        args: PolicyDivergenceArgs,
        outputs: PolicyDivergenceOutputs,
        gradients: PolicyDivergenceGradients,
    ) -> None:
        cpu_library.expect_writes(gradients.dq, gradients.dk)
        params = _params(args, outputs)
        params.dvalue = address(gradients.dvalue)
        params.dq = tensor_struct(gradients.dq)
        params.dk = tensor_struct(gradients.dk)
        params.dhead_weights = address(gradients.dhead_weights)
        self._call("ral_cpu_policy_divergence_bwd", "attention_divergence", params, args)

    def loss(
        self, args: PolicyDivergenceArgs, weights: Tensor, normalised: bool, outputs: LossOutputs
    ) -> None:
        cpu_library.expect_writes(outputs.dq, outputs.dk)
        structs = _structs_of(args.policy, None, None)
        params = divergence_params(
            structs, args, outputs.reference_norm, outputs.reference_z, None, None
        )
        params.reference_normalised = normalised
        params.value = address(outputs.value)
        params.dvalue = address(weights)
        params.dq = tensor_struct(outputs.dq)
        params.dk = tensor_struct(outputs.dk)
        params.dhead_weights = address(outputs.dhead_weights)
        self._call("ral_cpu_policy_loss", "ral_loss", params, args)

    def _call(
        self, entry: str, op: str, params: DivergenceParams, args: PolicyDivergenceArgs
    ) -> None:
        status = getattr(_library(), entry)(ctypes.byref(params))
        cpu_library.raise_for_status(op, status, q=args.policy.q, k=args.policy.k)


def _params(args: PolicyDivergenceArgs, outputs: PolicyDivergenceOutputs) -> DivergenceParams:
    structs = _structs_of(args.policy, outputs.norm, outputs.z)
    return divergence_params(
        structs, args, outputs.reference_norm, outputs.reference_z, outputs.u, outputs.w
    )
