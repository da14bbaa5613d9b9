"""CUDA C++ backend of `policy_divergence`: calls ral_cuda."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from torch import Tensor

from ...runtime import cuda_library
from ...runtime.backends import DifferentiableBackend
from ...runtime.c_interface import address, tensor_struct
from .arguments import (
    LossOutputs,
    PolicyDivergenceArgs,
    PolicyDivergenceGradients,
    PolicyDivergenceOutputs,
)
from .c_structs import CallStructs, DivergenceParams, SideStruct, divergence_params
from .chunks import Packing, chunks_of_sequences, clear_packed

# How many floats ∂D/∂p of a chunk of rows may take, together with the parts of U. A chunk of 64
# rows may take more.
CHUNK = 8 * 2**20
ALL = slice(None)


@functools.cache
def _library() -> ctypes.CDLL:
    structs = (SideStruct, DivergenceParams)
    return cuda_library.checked("ral_cuda_policy_struct_sizes", structs)


def _prepared(args: PolicyDivergenceArgs) -> PolicyDivergenceArgs:
    def aligned(x: Tensor | None) -> Tensor | None:
        return None if x is None else cuda_library.aligned(x)

    policy, reference = args.policy, args.reference
    q, k, prefix = map(aligned, (reference.q, reference.k, reference.k_prefix))
    return replace(
        args,
        policy=replace(policy, q=cuda_library.aligned(policy.q), k=cuda_library.aligned(policy.k)),
        reference=replace(reference, q=q, k=k, k_prefix=prefix),
    )


def _run(op: str, name: str, params: DivergenceParams, part: _Part) -> None:
    """Call the entry point `name` with the scratch memory that it asks for."""
    policy = part.args.policy
    params.target.first_key = part.keys.start or 0  # a target has the keys of the whole call
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
            ("softcap", policy.softcap != 0 or reference.softcap != 0),
        ):
            if given:
                return f"{name} is not supported"
        reason = cuda_library.cannot_compute(policy.q, policy.k)
        if reason is None and reference.q is not None and reference.k is not None:
            reason = cuda_library.cannot_compute(reference.q, reference.k)
            reason = None if reason is None else f"reference policy: {reason}"
        return reason

    def fwd(self, args: PolicyDivergenceArgs, outputs: PolicyDivergenceOutputs) -> None:
        clear_packed(args.policy, *_tensors_of(outputs))
        for part in _parts(args):
            own = PolicyDivergenceOutputs(*map(part.statistics, _tensors_of(outputs)))
            params = _params(part.args, own)
            params.value = address(own.value)
            _run("attention_divergence", "ral_cuda_policy_divergence_fwd", params, part)
            for whole, written in zip(_tensors_of(outputs), _tensors_of(own), strict=True):
                part.keep(written, whole)

    def bwd(
        self,
        args: PolicyDivergenceArgs,
        outputs: PolicyDivergenceOutputs,
        gradients: PolicyDivergenceGradients,
    ) -> None:
        clear_packed(args.policy, gradients.dq, gradients.dk, gradients.dhead_weights)
        for part in _parts(args):
            own = PolicyDivergenceOutputs(*map(part.statistics, _tensors_of(outputs)))
            dvalue = part.statistics(gradients.dvalue)
            params = _params(part.args, own)
            params.dvalue = address(dvalue)
            params.dq = tensor_struct(gradients.dq[:, :, part.rows])
            params.dk = tensor_struct(gradients.dk[:, :, part.keys])
            dhead_weights = part.head_weights(gradients.dhead_weights)
            params.dhead_weights = address(dhead_weights)
            _run("attention_divergence", "ral_cuda_policy_divergence_bwd", params, part)
            part.add(dhead_weights, gradients.dhead_weights)

    def loss(
        self, args: PolicyDivergenceArgs, weights: Tensor, normalised: bool, outputs: LossOutputs
    ) -> None:
        kept = [outputs.value]
        kept += [] if normalised else [outputs.reference_norm, outputs.reference_z]
        clear_packed(args.policy, outputs.dq, outputs.dk, outputs.dhead_weights, *kept)
        for part in _parts(args):
            structs = CallStructs(part.args.policy, None, None)
            value, weight = part.statistics(outputs.value), part.statistics(weights)
            norm, z = map(part.statistics, (outputs.reference_norm, outputs.reference_z))
            params = divergence_params(structs, part.args, norm, z, None, None)
            params.reference_normalised = normalised
            params.value = address(value)
            params.dvalue = address(weight)
            params.dq = tensor_struct(outputs.dq[:, :, part.rows])
            params.dk = tensor_struct(outputs.dk[:, :, part.keys])
            dhead_weights = part.head_weights(outputs.dhead_weights)
            params.dhead_weights = address(dhead_weights)
            _run("ral_loss", "ral_cuda_policy_divergence_loss", params, part)
            part.add(dhead_weights, outputs.dhead_weights)
            for whole, written in zip(kept, (value, norm, z), strict=False):
                part.keep(written, whole)


@dataclass(frozen=True)
class _Part:
    """A call of the library: all of a call, or some sequences of a packed one."""

    args: PolicyDivergenceArgs
    rows: slice
    keys: slice
    sequences: slice

    def statistics(self, x: Tensor) -> Tensor:
        """[..., T] of the part's rows, contiguous as the library takes it."""
        if self.rows == ALL:
            return x
        own = x[..., self.rows]
        return cuda_library.scratch(x, *own.shape).copy_(own)

    def keep(self, own: Tensor, x: Tensor) -> None:
        """Put what the library wrote to `statistics(x)` into x."""
        if self.rows != ALL:
            x[..., self.rows] = own

    def head_weights(self, x: Tensor | None) -> Tensor | None:
        """Memory for the part of a gradient [B or S, H], which `add` adds to x."""
        if x is None or self.sequences == ALL:
            return x
        return cuda_library.scratch(x, *x[self.sequences].shape)

    def add(self, own: Tensor | None, x: Tensor | None) -> None:
        """Add what the library wrote to `head_weights(x)`. A sequence may be in several parts."""
        if own is not None and x is not None and self.sequences != ALL:
            x[self.sequences] += own


def _parts(args: PolicyDivergenceArgs) -> Iterator[_Part]:
    """Calls whose scratch is bounded. The library itself cuts a call that is not packed.

    It takes packed sequences in one chunk, because it does not know where they end.
    """
    packing = Packing.of(args.policy)
    if packing is None:
        yield _Part(_prepared(args), ALL, ALL, ALL)
        return
    policy, reference = args.policy, args.reference
    num_rows = policy.num_rows
    sizes = num_rows, policy.max_keys, policy.seqlen_k
    for chunk in chunks_of_sequences(packing, *sizes, limit=CHUNK, block_q=num_rows):
        if chunk.packing is packing:
            yield _Part(_prepared(args), ALL, ALL, ALL)
            return
        rows, keys, own = chunk.rows, chunk.keys, chunk.packing
        part = replace(
            policy,
            q=policy.q[:, :, rows],
            k=policy.k[:, :, keys],
            scope=None if policy.scope is None else policy.scope[:, keys],
            head_weights=_rows_of(policy.head_weights, chunk.sequences),
            cu_seqlens_q=None if own is None else own.row_offsets,
            cu_seqlens_k=None if own is None else own.key_offsets,
            query_starts=None if own is None else own.query_starts,
            query_start=chunk.query_start,
            max_rows=0 if own is None else min(policy.max_rows, rows.stop - rows.start),
            max_keys=0 if own is None else chunk.seqlen_k,
        )
        of_reference, target = reference, args.target
        if reference.q is not None and reference.k is not None:
            of_reference = replace(
                reference,
                q=reference.q[:, :, rows],
                k=reference.k[:, :, keys],
                head_weights=_rows_of(reference.head_weights, chunk.sequences),
            )
        if target.index is not None:
            target = replace(target, index=target.index[:, rows])
        whole = replace(args, policy=part, reference=of_reference, target=target)
        yield _Part(_prepared(whole), rows, keys, chunk.sequences)


def _rows_of(head_weights: Tensor | None, sequences: slice) -> Tensor | None:
    return None if head_weights is None else head_weights[sequences]


def _tensors_of(outputs: PolicyDivergenceOutputs) -> list[Tensor]:
    return [getattr(outputs, field.name) for field in fields(outputs)]


def _params(args: PolicyDivergenceArgs, outputs: PolicyDivergenceOutputs) -> DivergenceParams:
    structs = CallStructs(args.policy, outputs.norm, outputs.z)
    return divergence_params(
        structs, args, outputs.reference_norm, outputs.reference_z, outputs.u, outputs.w
    )
