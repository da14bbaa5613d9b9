"""CUDA C++ backend of `attention`: calls ral_cuda."""

from __future__ import annotations

import ctypes
import functools
import logging
import math
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ...runtime import cuda_library
from ...runtime.backends import DifferentiableBackend
from . import c_structs
from .arguments import AttentionArgs, AttentionGradients, AttentionOutputs

logger = logging.getLogger(__name__)

# Kernels have 64, 128 or 256 columns; some for all GPUs have 96. A head dim takes the next of them.
HEAD_DIMS = range(8, 257, 8)
WIDE_SHARED_BYTES = 128 << 10  # of the largest CTA of 256 columns, that for dq

# Of the kernel for dk and dv. That for sm_80 has half the keys, and a multiprocessor holds two.
KEYS_OF_CTA, QUERIES_OF_TILE = 128, 64
TILES_OF_PART = 16  # fewest tiles of queries that are worth sums of their own

# Of the forward in parts of the keys.
FEW_QUERIES = 64  # of a CTA
KEYS_OF_PART = 256  # fewest that are worth results of their own
MOST_SCRATCH = 16 << 20  # floats


@functools.cache
def _library() -> ctypes.CDLL:
    structs = (c_structs.Params, c_structs.Outputs, c_structs.Gradients)
    return cuda_library.checked("ral_cuda_attention_struct_sizes", structs)


def _prepared(args: AttentionArgs) -> AttentionArgs:
    args = c_structs.with_unit_stride(args)
    q, k, v = (cuda_library.aligned(x) for x in (args.q, args.k, args.v))
    return replace(args, q=q, k=k, v=v)


def _launch(entry: str, args: AttentionArgs, *rest: object) -> int:
    """Run the kernels for Hopper if they are on and take the call, else those for sm_80."""
    given = (
        c_structs.params(args),
        *rest,
        ctypes.c_void_p(cuda_library.stream(args.q)),
    )
    if args.q.is_cuda and cuda_library.hopper() is None:
        status: int = getattr(_library(), f"{entry}_sm90")(*given)
        if status != cuda_library.NOT_TAKEN:
            return status
        why = _library().ral_cuda_failed_kernel().decode()
        logger.debug("%s: the kernels for Hopper do not take this call: %s", entry, why)
    status = getattr(_library(), entry)(*given)
    return status


def _launch_parts(args: AttentionArgs, outputs: AttentionOutputs, parts: int) -> int:
    size = outputs.lse.numel() * (columns(args) + 2) + outputs.marginals.numel()
    scratch = cuda_library.scratch(outputs.lse, parts * size)
    status: int = _library().ral_cuda_attention_fwd_split(
        c_structs.params(args),
        c_structs.outputs(outputs),
        parts,
        ctypes.c_void_p(scratch.data_ptr()),
        ctypes.c_void_p(cuda_library.stream(args.q)),
    )
    return status


def key_splits(args: AttentionArgs, multiprocessors: int) -> tuple[int, int]:
    """(parts of a group's heads, ranges of queries) over which sums for dk and dv are split.

    Parts fill the GPU where kv heads and blocks of keys are too few: two CTAs a multiprocessor at
    most, each with enough to do. Heads are split first, because a CTA walks over heads one by one.
    Under a narrow window the queries are not split: those that see a block of keys would be in few
    of the ranges.
    `python -m benchmarks.codegen.schedule` shows what the rule gains.
    """
    sequences = 1 if args.cu_seqlens_q is None else args.cu_seqlens_q.numel() - 1
    ctas = args.batch_size * args.num_kv_heads * math.ceil(args.seqlen_k / KEYS_OF_CTA)
    queries = seen = args.seqlen_q / max(sequences, 1)
    if args.window_left >= 0 and args.window_right >= 0:
        seen = min(queries, args.window_left + args.window_right + KEYS_OF_CTA)
    group = args.num_heads // args.num_kv_heads
    tiles = math.ceil(seen / QUERIES_OF_TILE)
    wanted = min(2 * multiprocessors // max(ctas, 1), group * tiles // TILES_OF_PART)
    heads = max(1, min(wanted, group))
    return heads, 1 if 2 * seen <= queries else max(1, wanted // heads)


def heads_as_queries(
    args: AttentionArgs, outputs: AttentionOutputs
) -> tuple[AttentionArgs, AttentionOutputs]:
    """The same call of one query, with the heads of a group as the queries of their kv head.

    So a CTA reads keys and values once for the group. What the query sees by position becomes all
    keys there are. All tensors are views.
    """
    shape = (args.num_kv_heads, args.num_heads // args.num_kv_heads)
    position = 0 if args.top_left else args.seqlen_k - 1
    first = 0 if args.window_left < 0 else max(0, position - args.window_left)
    stop = args.seqlen_k if args.window_right < 0 else position + args.window_right + 1
    if args.seqlen_q != 1 or args.cu_seqlens_q is not None or shape[1] == 1 or first >= stop:
        return args, outputs

    def keys(x: Tensor, dim: int = -1) -> Tensor:
        return x.narrow(dim, first, min(stop, args.seqlen_k) - first)

    def rows(x: Tensor) -> Tensor:
        return x.squeeze(2).unflatten(1, shape)

    def if_any(change: Callable[[Tensor], Tensor], x: Tensor | None) -> Tensor | None:
        return None if x is None else change(x)

    has_row = args.num_rows == 1
    packed = replace(
        args, q=rows(args.q), k=keys(args.k, 2), v=keys(args.v, 2),
        span_ids=if_any(keys, args.span_ids), span_bias=if_any(rows, args.span_bias),
        attn_mask=if_any(lambda x: keys(rows(x)), args.attn_mask),
        key_padding_mask=if_any(keys, args.key_padding_mask), window_left=-1, window_right=-1,
        top_left=False, row_start=0, row_stop=shape[1] if has_row else 0,
    )  # fmt: skip
    marginals = rows(outputs.marginals) if has_row else outputs.marginals[:, : shape[0]]
    lse = outputs.lse.view(-1, *shape)
    return packed, replace(outputs, out=rows(outputs.out), lse=lse, marginals=marginals)


def key_parts(args: AttentionArgs, multiprocessors: int) -> int:
    """Parts of the keys that fill the GPU where queries are few, as in decoding."""
    sequences = 1 if args.cu_seqlens_q is None else args.cu_seqlens_q.numel() - 1
    ctas = args.batch_size * args.num_heads * max(sequences, 1)
    if args.seqlen_q > FEW_QUERIES * max(sequences, 1):
        return 1
    rows = args.batch_size * args.num_heads * max(args.seqlen_q, 1)
    parts = min(
        2 * multiprocessors // max(ctas, 1),
        args.seqlen_k // max(sequences, 1) // KEYS_OF_PART,
        MOST_SCRATCH // (rows * (columns(args) + 2 + args.num_spans)),
    )
    return max(1, parts)


def columns(args: AttentionArgs) -> int:
    """The most columns of the kernels that may run the call."""
    widest = max(args.head_dim, args.head_dim_v)
    return 64 if widest <= 64 else 128 if widest <= 128 else 256


class CudaAttention(DifferentiableBackend[AttentionArgs, AttentionOutputs, AttentionGradients]):
    """CUDA C++ kernels of csrc/cuda/attention."""

    def available(self) -> str | None:
        return cuda_library.available(_library)

    def only_on_request(self) -> str | None:
        return cuda_library.only_on_request()

    def can_run(self, args: AttentionArgs) -> str | None:
        reason = cuda_library.cannot_run(args.q, args.k, args.v, head_dims=HEAD_DIMS)
        reason = reason or self.has_no_kernel(args)
        if reason is None and columns(args) == 256:
            reason = cuda_library.has_too_little_shared_memory(args.q, WIDE_SHARED_BYTES)
        return reason

    def has_no_kernel(self, args: AttentionArgs) -> str | None:
        """Why these options have no kernel, on whatever device; None if they have one."""
        if args.cu_seqlens_q is not None and args.key_padding_mask is not None:
            return "key_padding_mask is not supported with packed sequences"
        return cuda_library.cannot_compute(args.q, args.k, args.v, head_dims=HEAD_DIMS)

    def fwd(self, args: AttentionArgs, outputs: AttentionOutputs) -> None:
        """Write out, lse and marginals.

        Scratch, for a few queries (`key_parts`): what each part of the keys gives in float32, at
        most 64 MiB.
        """
        args, outputs = heads_as_queries(_prepared(args), outputs)
        parts = key_parts(args, cuda_library.multiprocessors(args.q))
        with cuda_library.on_device_of(args.q):
            if parts > 1:
                status = _launch_parts(args, outputs, parts)
            else:
                status = _launch("ral_cuda_attention_fwd", args, c_structs.outputs(outputs))
        cuda_library.raise_for_status("attention", status, q=args.q, k=args.k, v=args.v)

    def bwd(
        self, args: AttentionArgs, outputs: AttentionOutputs, gradients: AttentionGradients
    ) -> None:
        """Write dq, dk, dv and, if it is wanted, dspan_bias.

        Scratch: 2 B H T floats, with dspan_bias B H T S more, and with several parts
        (`key_splits`) 2 B Hk N `columns` each.
        """
        args = _prepared(args)
        if gradients.dout is not None:
            gradients = replace(gradients, dout=cuda_library.aligned(gradients.dout))
        splits = key_splits(args, cuda_library.multiprocessors(args.q))
        parts = math.prod(splits)
        size = 2 * outputs.lse.numel()  # delta, lse in base 2
        if gradients.dspan_bias is not None:
            size += gradients.dspan_bias.numel()
        size = math.ceil(size / 4) * 4
        if parts > 1:
            size += parts * 2 * args.batch_size * args.num_kv_heads * args.seqlen_k * columns(args)
        scratch = cuda_library.scratch(outputs.lse, size)
        with cuda_library.on_device_of(args.q):
            status = _launch(
                "ral_cuda_attention_bwd",
                args,
                c_structs.outputs(outputs),
                c_structs.gradients(gradients),
                *splits,
                ctypes.c_void_p(scratch.data_ptr()),
            )
        cuda_library.raise_for_status("attention", status, q=args.q, k=args.k, v=args.v)
