"""CUDA C++ backend of `policy` and `policy_divergence`: calls ral_cuda."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
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
    PolicyGradients,
    PolicyOutputs,
)
from .c_structs import (
    CallStructs,
    DivergenceParams,
    Params,
    SideStruct,
    SpanLists,
    divergence_params,
)
from .chunks import Packing, chunks_of_sequences, clear_packed

# How many floats the rows of a chunk may take, over keys, together with the parts of U. A chunk of
# 64 rows may take more.
CHUNK = 8 * 2**20
ALL = slice(None)


@functools.cache
def _library() -> ctypes.CDLL:
    structs = (SideStruct, Params, DivergenceParams, SpanLists)
    return cuda_library.checked("ral_cuda_policy_struct_sizes", structs)


def _isa(q: Tensor) -> int:
    """`isa` of a call: RAL_CUDA_HOPPER where those kernels are on, else RAL_CUDA_ANY."""
    return int(q.is_cuda and cuda_library.hopper() is None)


def _run(
    op: str, name: str, params: Params | DivergenceParams, part: _Part, *others: object
) -> None:
    """Call the entry point `name` with the scratch memory that it asks for."""
    policy = part.policy
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
            *others,
        )
    cuda_library.raise_for_status(op, status, q=policy.q, k=policy.k)


def _has_no_kernel(policy: PolicyArgs, *softcaps: float) -> str | None:
    """Why these options have no kernel, on whatever device; None if they have one."""
    if policy.span_bias is not None:
        return "span_bias is not supported"
    if policy.softcap != 0 or any(softcaps):
        return "softcap is not supported"
    return cuda_library.cannot_compute(policy.q, policy.k)


class CudaPolicy(DifferentiableBackend[PolicyArgs, PolicyOutputs, PolicyGradients]):
    """CUDA C++ kernels of csrc/cuda/policy."""

    def available(self) -> str | None:
        return cuda_library.available(_library)

    def only_on_request(self) -> str | None:
        return cuda_library.only_on_request()

    def can_run(self, args: PolicyArgs) -> str | None:
        return cuda_library.cannot_run(args.q, args.k) or self.has_no_kernel(args)

    def has_no_kernel(self, args: PolicyArgs) -> str | None:
        """Why these options have no kernel, on whatever device; None if they have one."""
        return _has_no_kernel(args)

    def fwd(self, args: PolicyArgs, outputs: PolicyOutputs) -> None:
        clear_packed(args, outputs.p, outputs.norm, outputs.z)
        for part in _parts(args):
            p = part.outcomes(outputs.p)
            norm, z = map(part.statistics, (outputs.norm, outputs.z))
            structs = CallStructs(part.policy, norm, z, _isa(args.q))
            params = Params(common=structs.common, policy=structs.policy, p=address(p))
            lists = None if args.span_ids is None else span_lists(part.policy)
            pointer = None if lists is None else ctypes.byref(_lists_struct(*lists, part.policy))
            _run("attention_policy", "ral_cuda_policy_fwd", params, part, pointer)
            part.keep_outcomes(p, outputs.p)
            part.keep(norm, outputs.norm)
            part.keep(z, outputs.z)

    def bwd(self, args: PolicyArgs, outputs: PolicyOutputs, gradients: PolicyGradients) -> None:
        clear_packed(args, gradients.dq, gradients.dk, gradients.dhead_weights)
        for part in _parts(args):
            p, dp = map(part.outcomes, (outputs.p, gradients.dp))
            norm, z = map(part.statistics, (outputs.norm, outputs.z))
            dhead_weights = part.head_weights(gradients.dhead_weights)
            structs = CallStructs(part.policy, norm, z)
            params = Params(
                common=structs.common,
                policy=structs.policy,
                p=address(p),
                dp=address(dp),
                dq=tensor_struct(gradients.dq[:, :, part.rows]),
                dk=tensor_struct(gradients.dk[:, :, part.keys]),
                dhead_weights=address(dhead_weights),
            )
            _run("attention_policy", "ral_cuda_policy_bwd", params, part)
            part.add(dhead_weights, gradients.dhead_weights)


def span_lists(args: PolicyArgs) -> tuple[Tensor, Tensor]:
    """The keys of each span, as `ral_policy_span_lists` has them: (keys, starts), int32."""
    ids, num_spans = args.span_ids, args.num_spans
    assert ids is not None
    positions = torch.arange(args.seqlen_k, device=ids.device, dtype=torch.int32)
    if args.cu_seqlens_k is None:
        ids = ids.reshape(-1, args.seqlen_k)
        num_lists = ids.shape[0]
        lists = torch.arange(num_lists, device=ids.device)[:, None]
        keys = positions.expand_as(ids)
    else:
        num_lists = args.num_sequences
        lists = torch.searchsorted(args.cu_seqlens_k[1:], positions, right=True)
        keys = positions - args.cu_seqlens_k[lists]
    belongs = (ids >= 0) & (lists < num_lists)  # not a key after the last sequence
    numbers = torch.where(belongs, lists * num_spans + ids, -1).flatten()
    numbers, order = numbers.sort(stable=True)
    bounds = torch.arange(num_lists * num_spans + 1, device=ids.device)
    starts = torch.searchsorted(numbers, bounds, out_int32=True)
    return keys.flatten()[order], starts


def _lists_struct(keys: Tensor, starts: Tensor, args: PolicyArgs) -> SpanLists:
    is_shared = not args.is_packed and starts.shape[0] == args.num_spans + 1
    return SpanLists(keys=address(keys), starts=address(starts), is_shared=is_shared)


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
        reference = args.reference
        reason = _has_no_kernel(args.policy, reference.softcap)
        if reason is None and reference.q is not None and reference.k is not None:
            reason = cuda_library.cannot_compute(reference.q, reference.k)
            reason = None if reason is None else f"reference policy: {reason}"
        return reason

    def fwd(self, args: PolicyDivergenceArgs, outputs: PolicyDivergenceOutputs) -> None:
        clear_packed(args.policy, *_tensors_of(outputs))
        for part in _parts(args.policy):
            of_part = _of_part(args, part)
            own = PolicyDivergenceOutputs(*map(part.statistics, _tensors_of(outputs)))
            params = _params(of_part, own)
            params.value = address(own.value)
            _run_divergence("attention_divergence", "ral_cuda_policy_divergence_fwd", params, part)
            for whole, written in zip(_tensors_of(outputs), _tensors_of(own), strict=True):
                part.keep(written, whole)

    def bwd(
        self,
        args: PolicyDivergenceArgs,
        outputs: PolicyDivergenceOutputs,
        gradients: PolicyDivergenceGradients,
    ) -> None:
        clear_packed(args.policy, gradients.dq, gradients.dk, gradients.dhead_weights)
        for part in _parts(args.policy):
            of_part = _of_part(args, part)
            own = PolicyDivergenceOutputs(*map(part.statistics, _tensors_of(outputs)))
            dvalue = part.statistics(gradients.dvalue)
            params = _params(of_part, own)
            params.dvalue = address(dvalue)
            params.dq = tensor_struct(gradients.dq[:, :, part.rows])
            params.dk = tensor_struct(gradients.dk[:, :, part.keys])
            dhead_weights = part.head_weights(gradients.dhead_weights)
            params.dhead_weights = address(dhead_weights)
            _run_divergence("attention_divergence", "ral_cuda_policy_divergence_bwd", params, part)
            part.add(dhead_weights, gradients.dhead_weights)

    def loss(
        self, args: PolicyDivergenceArgs, weights: Tensor, normalised: bool, outputs: LossOutputs
    ) -> None:
        kept = [outputs.value]
        kept += [] if normalised else [outputs.reference_norm, outputs.reference_z]
        clear_packed(args.policy, outputs.dq, outputs.dk, outputs.dhead_weights, *kept)
        for part in _parts(args.policy):
            of_part = _of_part(args, part)
            structs = CallStructs(part.policy, None, None, _isa(args.policy.q))
            value, weight = part.statistics(outputs.value), part.statistics(weights)
            norm, z = map(part.statistics, (outputs.reference_norm, outputs.reference_z))
            params = divergence_params(structs, of_part, norm, z, None, None)
            params.reference_normalised = normalised
            params.value = address(value)
            params.dvalue = address(weight)
            params.dq = tensor_struct(outputs.dq[:, :, part.rows])
            params.dk = tensor_struct(outputs.dk[:, :, part.keys])
            dhead_weights = part.head_weights(outputs.dhead_weights)
            params.dhead_weights = address(dhead_weights)
            _run_divergence("ral_loss", "ral_cuda_policy_divergence_loss", params, part)
            part.add(dhead_weights, outputs.dhead_weights)
            for whole, written in zip(kept, (value, norm, z), strict=False):
                part.keep(written, whole)


@dataclass(frozen=True)
class _Part:
    """A call of the library: all of a call, or some sequences of a packed one."""

    policy: PolicyArgs
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

    def outcomes(self, x: Tensor) -> Tensor:
        """[B, T, outcomes] of the part's rows, contiguous and as long as its own."""
        if self.rows == ALL:
            return x
        own = x[:, self.rows, : self.policy.num_outcomes]
        return cuda_library.scratch(x, *own.shape).copy_(own)

    def keep_outcomes(self, own: Tensor, x: Tensor) -> None:
        """Put what the library wrote to `outcomes(x)` into x."""
        if self.rows != ALL:
            x[:, self.rows, : self.policy.num_outcomes] = own

    def head_weights(self, x: Tensor | None) -> Tensor | None:
        """Memory for the part of a gradient [B or S, H], which `add` adds to x."""
        if x is None or self.sequences == ALL:
            return x
        return cuda_library.scratch(x, *x[self.sequences].shape)

    def add(self, own: Tensor | None, x: Tensor | None) -> None:
        """Add what the library wrote to `head_weights(x)`. A sequence may be in several parts."""
        if own is not None and x is not None and self.sequences != ALL:
            x[self.sequences] += own


def _parts(policy: PolicyArgs) -> Iterator[_Part]:
    """Calls whose scratch is bounded. The library itself cuts a call that is not packed.

    It takes packed sequences in one chunk, because it does not know where they end.
    """
    policy = replace(policy, q=cuda_library.aligned(policy.q), k=cuda_library.aligned(policy.k))
    everything = _Part(policy, ALL, ALL, ALL)
    packing = Packing.of(policy)
    if packing is None:
        yield everything
        return
    num_rows = policy.num_rows
    sizes = num_rows, policy.max_keys, policy.seqlen_k
    for chunk in chunks_of_sequences(packing, *sizes, limit=CHUNK, block_q=num_rows):
        if chunk.packing is packing:
            yield everything
            return
        rows, keys, own = chunk.rows, chunk.keys, chunk.packing
        part = replace(
            policy,
            q=policy.q[:, :, rows],
            k=policy.k[:, :, keys],
            span_ids=None if policy.span_ids is None else policy.span_ids[..., keys],
            scope=None if policy.scope is None else policy.scope[:, keys],
            head_weights=_rows_of(policy.head_weights, chunk.sequences),
            cu_seqlens_q=None if own is None else own.row_offsets,
            cu_seqlens_k=None if own is None else own.key_offsets,
            query_starts=None if own is None else own.query_starts,
            query_start=chunk.query_start,
            max_rows=0 if own is None else min(policy.max_rows, rows.stop - rows.start),
            max_keys=0 if own is None else chunk.seqlen_k,
        )
        yield _Part(part, rows, keys, chunk.sequences)


def _rows_of(head_weights: Tensor | None, sequences: slice) -> Tensor | None:
    return None if head_weights is None else head_weights[sequences]


def _tensors_of(outputs: PolicyDivergenceOutputs) -> list[Tensor]:
    return [getattr(outputs, field.name) for field in fields(outputs)]


def _of_part(args: PolicyDivergenceArgs, part: _Part) -> PolicyDivergenceArgs:
    """The part's policy, with the same rows and keys of what it is compared with."""
    reference, target = args.reference, args.target
    if reference.q is not None and reference.k is not None:
        prefix = reference.k_prefix
        reference = replace(
            reference,
            q=cuda_library.aligned(reference.q[:, :, part.rows]),
            k=cuda_library.aligned(reference.k[:, :, part.keys]),
            k_prefix=None if prefix is None else cuda_library.aligned(prefix),
            head_weights=_rows_of(reference.head_weights, part.sequences),
        )
    if target.index is not None:
        target = replace(target, index=target.index[:, part.rows])
    return replace(args, policy=part.policy, reference=reference, target=target)


def _params(args: PolicyDivergenceArgs, outputs: PolicyDivergenceOutputs) -> DivergenceParams:
    structs = CallStructs(args.policy, outputs.norm, outputs.z, _isa(args.policy.q))
    return divergence_params(
        structs, args, outputs.reference_norm, outputs.reference_z, outputs.u, outputs.w
    )


def _run_divergence(op: str, name: str, params: DivergenceParams, part: _Part) -> None:
    params.target.first_key = part.keys.start or 0  # a target has the keys of the whole call
    _run(op, name, params, part)
