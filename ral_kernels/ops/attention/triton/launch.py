"""Launches of the Triton kernels of `attention`: arguments, scratch, splits over keys."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ....runtime import triton_runtime
from ....runtime.triton_rows import Rows, SpanValues, constant
from ....runtime.triton_runtime import INTERPRETER, Tile
from ....runtime.triton_spans import has_short_spans, num_blocks, num_span_blocks, span_blocks
from ..arguments import AttentionArgs
from . import tiles
from .bwd_kv_kernels import (
    attention_bwd_delta_kernel,
    attention_bwd_dkdv_kernel,
    attention_bwd_join_kernel,
)
from .bwd_q_kernels import attention_bwd_dq_kernel
from .fwd_kernels import attention_fwd_combine_kernel, attention_fwd_kernel
from .parameters import (
    NO_SPAN_TABLE,
    AttnMask,
    KeySplits,
    Masks,
    Packed,
    Padding,
    Programs,
    RowTerms,
    Score,
    Sizes,
    SpanRows,
    SpanTable,
    TileSizes,
    Window,
)

LOG2E = math.log2(math.e)
DECODED_TOKENS = 16  # up to 16 queries a sequence, one program takes all heads of a kv head
FLOAT32_PART = 32  # features in one matrix product of float32
BLOCKS_PER_SPLIT = 4  # at least, because a split writes and reads partial results
PROGRAMS_PER_MULTIPROCESSOR = 2  # of dk and dv: fewer leave the last ones to run alone
TABLE_KEYS = 64  # at most, in a block of the table of spans for dk and dv
MARGIN = 128  # queries in the widest block of dk and dv
ROWS_JOINED = 32  # keys in a program that joins parts of dk or dv


def _power_of_2(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def _num_sequences(args: AttentionArgs) -> int | None:
    return None if args.cu_seqlens_q is None else args.cu_seqlens_q.numel() - 1


def _precision() -> str:
    """How float32 is multiplied: in three products of tf32, whose sum has float32's accuracy."""
    return "ieee" if triton_runtime.interpreted() else "tf32x3"


def _as_bytes(mask: Tensor) -> Tensor:
    """Booleans are read as bytes."""
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def _masks(args: AttentionArgs) -> Masks:
    attn_mask = padding = None
    if args.attn_mask is not None:
        b, h, t, n = args.attn_mask.stride()
        is_bool = constant(args.attn_mask.dtype == torch.bool)
        attn_mask = AttnMask(_as_bytes(args.attn_mask), b, h, t, n, is_bool)
    if args.key_padding_mask is not None:
        padding = Padding(_as_bytes(args.key_padding_mask), *args.key_padding_mask.stride())
    longest = args.seqlen_q + args.seqlen_k  # a window beyond it must not overflow int32
    window = Window(
        min(args.window_left, longest),
        min(args.window_right, longest),
        constant(args.window_left >= 0),
        constant(args.window_right >= 0),
        constant(args.top_left),
    )
    return Masks(SpanValues.of(args.span_bias), attn_mask, padding, window)


def _common_arguments(args: AttentionArgs) -> dict[str, Any]:
    """Arguments of the forward and of both backward kernels, but for tiles and span tables."""
    factor = LOG2E if args.softcap == 0.0 else 1 / args.softcap
    return {
        "q": Rows.of(args.q),
        "k": Rows.of(args.k),
        "v": Rows.of(args.v),
        "masks": _masks(args),
        "packed": Packed(args.cu_seqlens_q, args.cu_seqlens_k, _num_sequences(args) or 0),
        "sizes": Sizes(args.num_heads, args.num_kv_heads, args.seqlen_q, args.seqlen_k),
        "span_rows": SpanRows(args.num_spans, args.row_start, args.row_stop),
        "score": Score(
            args.scale, args.scale * factor, args.softcap * LOG2E, constant(args.softcap != 0.0)
        ),
    }


@functools.lru_cache(1024)
def _tile_sizes(
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    block_q: int,
    block_k: int,
    group: int,
    mixed_q: int,
    mixed_stages: int | None,
    by_tensor: bool,
    precision: str,
) -> TileSizes:
    is_wide = dtype == torch.float32
    block_d, block_dv = _power_of_2(head_dim), _power_of_2(head_dim_v)
    part = FLOAT32_PART if is_wide else 256
    sizes = TileSizes(
        HEAD_DIM=head_dim,
        HEAD_DIM_V=head_dim_v,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        PART_D=min(block_d, part),
        PART_DV=min(block_dv, part),
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        TABLE_K=table_keys(block_k),
        MIXED_Q=mixed_q,
        MIXED_STAGES=mixed_stages,
        GROUP=group,
        TERMS=3 if is_wide else 2,
        BY_TENSOR=by_tensor,
        PRECISION=precision,
    )
    return TileSizes(*map(constant, sizes))


def table_keys(block_k: int) -> int:
    """Keys in a block of the table of spans for a tile of dk and dv, which may be of two blocks.

    So on sm_90 all kernels of a call read the same table.
    """
    return block_k if block_k <= TABLE_KEYS else block_k // 2


def _sizes(
    args: AttentionArgs,
    block_q: int,
    block_k: int,
    group: int = 1,
    mixed_q: int | None = None,
    mixed_stages: int | None = None,
    by_tensor: bool = False,
) -> TileSizes:
    head_dims = (args.head_dim, args.head_dim_v)
    sizes = (block_q, block_k, group, mixed_q or block_q, mixed_stages, by_tensor)
    return _tile_sizes(args.q.dtype, *head_dims, *sizes, _precision())


def _span_table(args: AttentionArgs, block_k: int, wanted: bool) -> SpanTable:
    """The table of spans for blocks of `block_k` keys; None where there is nothing to look up."""
    if not wanted or args.span_ids is None or args.seqlen_k == 0:
        return NO_SPAN_TABLE
    table = span_blocks(
        args.span_ids, block_k, args.cu_seqlens_k, has_short_spans(args.seqlen_k, args.num_spans)
    )
    return SpanTable(
        table.entries,
        table.positions,
        table.counts,
        table.ids,
        table.local,
        table.whole_before,
        table.short_before,
        table.gathered_before,
        table.blocks if table.samples > 1 else 0,
        args.seqlen_k if table.samples > 1 else 0,
    )


def num_span_programs(seqlen_k: int, num_sequences: int | None, block_k: int) -> int:
    """Programs of dk and dv over the keys: see `sequence_of_span_blocks`."""
    blocks = num_span_blocks(seqlen_k, num_sequences, table_keys(block_k))
    return math.ceil(blocks * table_keys(block_k) / block_k) + (num_sequences or 0)


def _tile(
    kernel: str, args: AttentionArgs, run: Callable[[Tile], None], needs_spans: bool = False
) -> Tile:
    """The tile of a kernel: the table's, or with RAL_AUTOTUNE=1 the fastest."""
    architecture = triton_runtime.architecture(args.q.device)
    size = tiles.head_dim_class(args.head_dim, args.head_dim_v)
    has_attn_mask = args.attn_mask is not None
    is_biased = args.span_bias is not None or has_attn_mask
    key = (architecture, args.q.dtype, size, is_biased)
    is_packed = args.cu_seqlens_q is not None
    is_short = has_short_spans(args.seqlen_k, args.num_spans)
    best = tiles.tile(kernel, *key, needs_spans, is_packed, is_short, has_attn_mask)
    has_spans = args.num_spans > 0
    return triton_runtime.tuned(
        f"attention_{kernel}",
        (*key, has_spans, is_short),
        best,
        functools.partial(tiles.candidates, best),
        run,
        args.q.device,
    )


def _num_splits(args: AttentionArgs, programs: int, block_k: int) -> int:
    """Over how many programs to split the keys of a row: enough to fill the GPU."""
    sequences = _num_sequences(args) or 1
    blocks = math.ceil(args.seqlen_k / sequences / block_k)
    wanted = triton_runtime.num_multiprocessors(args.q.device) // programs
    return max(1, min(wanted, blocks // BLOCKS_PER_SPLIT))


def key_splits(group: int, q_blocks: int, programs: int, multiprocessors: int) -> tuple[int, int]:
    """(parts over heads, parts over ranges of queries) of dk and dv: enough to fill the GPU.

    Heads are split first: each reads queries of its own.

    Args:
        group: query heads that read a kv head.
        q_blocks: blocks of queries of a sequence.
        programs: how many there are with one part.
        multiprocessors: of the GPU.
    """
    wanted = math.ceil(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors / programs)
    wanted = max(1, min(wanted, group * q_blocks // BLOCKS_PER_SPLIT))
    heads = math.ceil(group / max(group // wanted, 1))
    return heads, math.ceil(wanted / heads)


def launch_fwd(args: AttentionArgs, out: Tensor, marginals: Tensor, lse: Tensor) -> None:
    """Write out, marginals and lse."""
    is_decoding = args.seqlen_q <= DECODED_TOKENS * (_num_sequences(args) or 1)

    def run(tile: Tile) -> None:
        _launch_fwd(args, out, marginals, lse, tile, is_decoding)

    has_spans = args.span_ids is not None and (marginals.numel() > 0 or args.span_bias is not None)
    run(_tile("decode" if is_decoding else "fwd", args, run, has_spans))


def _matrix(x: Tensor, rows: int) -> Any:
    """A descriptor of tiles [rows, D] of all heads; None where their rows form no matrix."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    batch_size, heads, length, head_dim = x.shape
    b, h, t, _ = x.stride()
    if t < head_dim:  # rows overlap
        return None
    side_by_side = h % t != 0  # a row of the matrix is a token with all of its heads
    is_matrix = b % t == 0 and (not side_by_side or h * (heads - 1) + head_dim <= t)
    is_aligned = (
        x.data_ptr() % 16 == 0 and h * x.element_size() % 16 == t * x.element_size() % 16 == 0
    )
    if not is_matrix or not is_aligned or _power_of_2(head_dim) != head_dim or x.numel() == 0:
        return None
    last = b * (batch_size - 1) + t * (length - 1) + (0 if side_by_side else h * (heads - 1))
    width = head_dim + (h * (heads - 1) if side_by_side else 0)
    return TensorDescriptor(x, [last // t + 1, width], [t, 1], [rows, head_dim])


def _by_tensor(args: AttentionArgs, tile: Tile, block_q: int, is_decoding: bool) -> dict[str, Any]:
    """Arguments of the forward that read q, k and v by tensor descriptors; none of them if not.

    They are read so with RAL_TRITON_TMA=1, on Hopper, where tiles are whole: without
    decoding, spans and padding, in 16 bits, with head dims that are powers of two. Spans leave the
    kernel no registers for it.
    """
    found = [None] * 3
    if (
        os.environ.get("RAL_TRITON_TMA", "0") == "1"
        and triton_runtime.architecture(args.q.device) in ("sm_90", INTERPRETER)
        and not is_decoding
        and args.num_spans == 0
        and args.key_padding_mask is None
        and args.q.dtype != torch.float32
    ):
        inputs = ((args.q, block_q), (args.k, tile.block_k), (args.v, tile.block_k))
        found = [_matrix(x, rows) for x, rows in inputs]
    if None in found:
        found = [None] * 3
    return dict(zip(("q_tensor", "k_tensor", "v_tensor"), found, strict=True))


def _launch_fwd(
    args: AttentionArgs,
    out: Tensor,
    marginals: Tensor,
    lse: Tensor,
    tile: Tile,
    is_decoding: bool,
) -> None:
    sequences = _num_sequences(args)
    group = args.num_heads // args.num_kv_heads if is_decoding else 1
    block_q = max(tile.block_q, _power_of_2(group))
    q_blocks = num_blocks(args.seqlen_q, block_q // group, sequences)
    programs = q_blocks * (args.num_heads // group) * args.batch_size
    num_splits = _num_splits(args, programs, tile.block_k) if is_decoding else 1
    has_marginals = marginals.numel() > 0

    results, partial = (out, lse, marginals), num_splits > 1
    if partial:
        out, lse, marginals = (
            torch.empty((num_splits, *x.shape), dtype=torch.float32, device=x.device)
            for x in results
        )
    if has_marginals:
        marginals.zero_()  # kernels add to it
    stride_split, *strides = out.stride() if partial else (0, *out.stride())
    # Where the loop at the edge, pipelined, needs more registers than there are.
    is_crowded = has_marginals and (
        triton_runtime.architecture(args.q.device) != "sm_90" or
        args.span_bias is not None or sequences is not None or args.q.dtype != torch.bfloat16
        or not 64 < max(args.head_dim, args.head_dim_v) <= 128
    )  # fmt: skip
    by_tensor = _by_tensor(args, tile, block_q, is_decoding)
    sizes = _sizes(
        args, block_q, tile.block_k, group, mixed_stages=1 if is_crowded else None,
        by_tensor=by_tensor["q_tensor"] is not None,
    )  # fmt: skip
    arguments = {
        **_common_arguments(args),
        **by_tensor,
        "out": Rows(out, *strides[:3]),
        "lse_ptr": lse,
        "marginals_ptr": marginals if has_marginals else None,
        "spans": _span_table(args, tile.block_k, has_marginals or args.span_bias is not None),
        "programs": Programs(q_blocks, args.batch_size, num_splits, stride_split),
        "tile": sizes,
    }
    # A loop over keys that reads only values in parts cannot be pipelined.
    only_v = args.head_dim <= sizes.PART_D.value and args.head_dim_v > sizes.PART_DV.value
    num_stages = 1 if only_v else tile.num_stages
    grid = (programs * num_splits,)
    triton_runtime.launch(attention_fwd_kernel, grid, arguments, tile.num_warps, num_stages)
    if not partial:
        return
    arguments = {
        "partial_out_ptr": out,
        "partial_lse_ptr": lse,
        "partial_marginals_ptr": marginals if has_marginals else None,
        "out": Rows.of(results[0]),
        "lse_ptr": results[1],
        "marginals_ptr": results[2] if has_marginals else None,
        "batch_size": args.batch_size,
        "num_heads": args.num_heads,
        "seqlen_q": args.seqlen_q,
        "num_splits": num_splits,
        "span_rows": SpanRows(args.num_spans, args.row_start, args.row_stop),
        "HEAD_DIM_V": args.head_dim_v,
        "BLOCK_DV": _power_of_2(args.head_dim_v),
        "BLOCK_S": min(_power_of_2(max(args.num_spans, 1)), 256),
    }
    rows = args.batch_size * args.num_heads * args.seqlen_q
    triton_runtime.launch(attention_fwd_combine_kernel, (rows,), arguments, 4, 1)


def _may_have_empty_rows(args: AttentionArgs) -> bool:
    """Whether there can be a query that sees no key. No value is read."""
    masks = (args.attn_mask, args.key_padding_mask, args.span_bias, args.cu_seqlens_q)
    if any(mask is not None for mask in masks):
        return True
    is_aligned = args.top_left or args.seqlen_q <= args.seqlen_k
    return args.window_left >= 0 or (args.window_right >= 0 and not is_aligned)


def _parts_of(x: Tensor, parts: int, args: AttentionArgs) -> Tensor:
    """Room for parts of dk or dv; 0 where keys may belong to no sequence and no program writes."""
    new = torch.empty if args.cu_seqlens_k is None else torch.zeros
    return new((parts, *x.shape), dtype=torch.float32, device=x.device)


def _join(partial: Tensor, x: Tensor) -> None:
    """Write the sum of the parts."""
    batch_size, num_kv_heads, seqlen_k, head_dim = x.shape
    arguments = {
        "partial_ptr": partial,
        "x": Rows.of(x),
        "num_kv_heads": num_kv_heads,
        "seqlen_k": seqlen_k,
        "num_parts": partial.shape[0],
        "part_stride": partial.stride(0),
        "HEAD_DIM": head_dim,
        "BLOCK_D": _power_of_2(head_dim),
        "BLOCK_K": ROWS_JOINED,
    }
    programs = batch_size * num_kv_heads * math.ceil(seqlen_k / ROWS_JOINED)
    triton_runtime.launch(attention_bwd_join_kernel, (programs,), arguments, 4, 1)


def _row_terms(args: AttentionArgs, has_dmarginals: bool) -> RowTerms:
    """Room for RowTerms. A block of queries that has marginals ends at most MARGIN rows after."""
    first, num_rows, size = None, 0, 2 * args.seqlen_q
    if has_dmarginals:
        first = max(args.row_start - MARGIN, 0)
        num_rows = min(args.row_stop + MARGIN, args.seqlen_q) - first
        size += args.num_spans * num_rows
    x = torch.empty(
        (args.batch_size, args.num_heads, size), dtype=torch.float32, device=args.q.device
    )
    return RowTerms(x, size, first, num_rows)


def launch_bwd(
    args: AttentionArgs,
    out: Tensor,
    marginals: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dmarginals: Tensor | None,
    dlse: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dspan_bias: Tensor | None,
) -> None:
    """Write dq, dk, dv and, if there is one, dspan_bias."""
    if dmarginals is not None and dmarginals.numel() == 0:
        dmarginals = None
    if dout is not None and _may_have_empty_rows(args):
        # An empty row may get inf or NaN, and 0 · NaN is NaN: its weights of 0 would not hide it.
        dout = dout.masked_fill((lse == float("-inf"))[..., None], 0.0)
    terms = _row_terms(args, dmarginals is not None)
    arguments = {
        "out": Rows.of(out),
        "marginals_ptr": marginals,
        "lse_ptr": lse,
        "dout": Rows.of(dout),
        "dmarginals_ptr": dmarginals,
        "dlse_ptr": dlse,
        "terms": terms,
        "num_heads": args.num_heads,
        "seqlen_q": args.seqlen_q,
        "span_rows": SpanRows(args.num_spans, args.row_start, args.row_stop),
        "HEAD_DIM_V": args.head_dim_v,
        "BLOCK_DV": _power_of_2(args.head_dim_v),
        "BLOCK_Q": 32,
        "BLOCK_S": min(_power_of_2(max(args.num_spans, 1)), 64),
    }
    programs = args.batch_size * args.num_heads * math.ceil(args.seqlen_q / 32)
    triton_runtime.launch(attention_bwd_delta_kernel, (programs,), arguments, 4, 1)

    sequences = _num_sequences(args)
    needs_spans = dmarginals is not None or args.span_bias is not None
    common = {
        **_common_arguments(args),
        "dout": Rows.of(dout),
        "terms": terms,
    }
    if dout is None:
        dv.zero_()  # (8): a loss on marginals alone has no gradient for the values

    # Triton 3.6 cannot pipeline a loop with matrix products in a branch; with 3.7.1 it spills.
    mixed_stages = 1 if needs_spans else None

    def run_dkdv(tile: Tile) -> None:
        assert tile.block_q <= MARGIN, "a block would read RowTerms of another span"
        k_blocks = num_blocks(args.seqlen_k, tile.block_k, sequences)
        programs = args.batch_size * args.num_kv_heads * k_blocks
        heads, ranges = key_splits(
            args.num_heads // args.num_kv_heads,
            math.ceil(args.seqlen_q / (sequences or 1) / tile.block_q),
            programs,
            triton_runtime.num_multiprocessors(args.q.device),
        )
        # Half the queries where a product in a branch takes registers.
        mixed_q = max(tile.block_q // 2, 16) if needs_spans else tile.block_q
        spans = _span_table(args, table_keys(tile.block_k), needs_spans)
        if spans is not NO_SPAN_TABLE:  # more programs, of which some find no keys
            k_blocks = num_span_programs(args.seqlen_k, sequences, tile.block_k)
            programs = args.batch_size * args.num_kv_heads * k_blocks
        parts = heads * ranges
        joined = [dk] if dout is None else [dk, dv]
        partial = joined if parts == 1 else [_parts_of(x, parts, args) for x in joined]
        strides = [None if parts == 1 else x.stride(0) for x in (partial[0], partial[-1])]
        arguments = {
            **common,
            "dk": Rows(partial[0], *partial[0].stride()[-4:-1]),
            "dv": Rows(partial[-1], *partial[-1].stride()[-4:-1]),
            "spans": spans,
            "num_k_blocks": k_blocks,
            "splits": KeySplits(heads, ranges if ranges > 1 else None, *strides),
            "tile": _sizes(args, tile.block_q, tile.block_k, 1, mixed_q, mixed_stages),
        }
        kernel = attention_bwd_dkdv_kernel
        grid = (programs, parts)
        triton_runtime.launch(kernel, grid, arguments, tile.num_warps, tile.num_stages)
        if parts > 1:
            for parts_of_x, x in zip(partial, joined, strict=True):
                _join(parts_of_x, x)

    def run_dq(tile: Tile) -> None:
        weights = None
        if dspan_bias is not None:
            dspan_bias.zero_()  # the kernel adds to both
            weights = torch.zeros_like(dspan_bias)
        q_blocks = num_blocks(args.seqlen_q, tile.block_q, sequences)
        arguments = {
            **common,
            "dmarginals_ptr": dmarginals,
            "dq": Rows.of(dq),
            "dspan_bias_ptr": dspan_bias,
            "weights_ptr": weights,
            "dlse_ptr": None if dspan_bias is None else dlse,
            "spans": _span_table(args, tile.block_k, needs_spans),
            "num_q_blocks": q_blocks,
            "tile": _sizes(args, tile.block_q, tile.block_k, mixed_stages=mixed_stages),
        }
        grid = (args.batch_size * args.num_heads * q_blocks,)
        kernel = attention_bwd_dq_kernel
        triton_runtime.launch(kernel, grid, arguments, tile.num_warps, tile.num_stages)

    run_dkdv(_tile("bwd_dkdv", args, run_dkdv, needs_spans))
    run_dq(_tile("bwd_dq", args, run_dq, needs_spans))
