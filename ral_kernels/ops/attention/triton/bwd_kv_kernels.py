"""The backward Triton kernels of `attention` for delta, dk and dv; bwd_q_kernels.py has dq.

Comments cite the equations of README.md. Each gradient is summed inside one program, in a fixed
order: no atomics.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ....runtime.triton_blocks import (
    block_number,
    block_ranges,
    blocks_of_loop,
    neighbours,
    part_of_ranges,
)
from ....runtime.triton_rows import Head, head_of, load_rows, store_rows
from ....runtime.triton_softmax import LOG2E
from ....runtime.triton_spans import MIXED, NO_SPAN, blocks_of_sequence, sequence_of_span_blocks
from .marginals import (
    SpanBlock,
    entry_of,
    gathered_bias,
    here,
    keys_of_slots,
    moved_spans,
    opaque_zero,
    spans_of_places,
    spans_of_slots,
    uniform_shares,
)
from .scores import (
    HeadMasks,
    Place,
    Queries,
    add_weighted_rows,
    dot_rows,
    exist,
    in_window,
    length_of,
    locate,
    padding_of,
    real_keys,
    row_tile,
    scores,
    spans_of_keys,
)


@triton.jit
def attention_bwd_delta_kernel(
    out,
    marginals_ptr,
    lse_ptr,
    dout,
    dmarginals_ptr,
    dlse_ptr,
    terms,
    num_heads,
    seqlen_q,
    span_rows,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Equation (10), and what else RowTerms holds. One program: BLOCK_Q queries of one head.

    In a fully masked row δ is 0, and +inf for lse makes every weight exactly 0.
    """
    num_blocks = tl.cdiv(seqlen_q, BLOCK_Q)
    bh = (tl.program_id(0) // num_blocks).to(tl.int64)
    b, h = bh // num_heads, bh % num_heads
    tokens = tl.program_id(0) % num_blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    exists = tokens < seqlen_q
    lse = tl.load(lse_ptr + bh * seqlen_q + tokens, mask=exists, other=float("-inf"))
    mask_q = exists & (lse > float("-inf"))  # a row that sees no key is a constant
    head_ptr = terms.ptr + bh * terms.stride_h
    tl.store(head_ptr + tokens, tl.where(mask_q, lse * LOG2E, float("inf")), mask=exists)
    delta = tl.zeros([BLOCK_Q], tl.float32)
    if dout is not None:
        # [BLOCK_Q, BLOCK_DV]
        dout_rows = load_rows(head_of(dout, b, h), tokens, mask_q, 0, HEAD_DIM_V, BLOCK_DV)
        out_rows = load_rows(head_of(out, b, h), tokens, mask_q, 0, HEAD_DIM_V, BLOCK_DV)
        delta += tl.sum(dout_rows.to(tl.float32) * out_rows.to(tl.float32), 1)
    if dmarginals_ptr is not None:
        mask_rows = mask_q & (tokens >= span_rows.start) & (tokens < span_rows.stop)
        rows = (
            bh * (span_rows.stop - span_rows.start) + tokens - span_rows.start
        ) * span_rows.num_spans
        for start in range(0, span_rows.num_spans, BLOCK_S):
            columns = start + tl.arange(0, BLOCK_S)
            offsets = rows[:, None] + columns[None, :]
            mask = mask_rows[:, None] & (columns < span_rows.num_spans)[None, :]
            # [BLOCK_Q, BLOCK_S]
            dm = tl.load(dmarginals_ptr + offsets, mask=mask, other=0.0)
            delta += tl.sum(dm * tl.load(marginals_ptr + offsets, mask=mask, other=0.0), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + bh * seqlen_q + tokens, mask=mask_q, other=0.0)
    head_ptr += seqlen_q
    tl.store(head_ptr + tokens, delta, mask=exists)
    if dmarginals_ptr is not None:
        head_ptr += seqlen_q
        places = tokens - terms.first
        exists = exists & (places >= 0) & (places < terms.num_rows)
        for start in range(0, span_rows.num_spans, BLOCK_S):
            columns = start + tl.arange(0, BLOCK_S)
            mask_s = columns < span_rows.num_spans
            # [BLOCK_Q, BLOCK_S]
            mask = mask_rows[:, None] & mask_s[None, :]
            dm = tl.load(dmarginals_ptr + rows[:, None] + columns[None, :], mask=mask, other=0.0)
            offsets = places[:, None] + columns.to(tl.int64)[None, :] * terms.num_rows
            mask = exists[:, None] & mask_s[None, :]
            tl.store(head_ptr + offsets, delta[:, None] - dm, mask=mask)


@triton.jit
def weights_and_gradient(
    dot,  # q kᵀ
    dp,
    bias,
    lse_log2,
    delta,
    place,
    masks,
    head_masks,
    score,
    IS_EDGE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Equations (5) and (11): p, ds and the derivative of the soft cap."""
    HAS_MASK: tl.constexpr = masks.attn_mask is not None or masks.padding is not None
    if HAS_MASK or score.HAS_CAP or masks.span_bias is not None:
        s, dcap = scores(dot, bias, place, masks, head_masks, score, IS_EDGE, TRANSPOSED)
        # s <= lse, but not by much where a mask of finfo.min has rounded both.
        p = tl.exp2(tl.minimum(s - lse_log2, 0.0))
    else:
        dcap = 1.0
        if IS_EDGE:
            dot = tl.where(in_window(place, masks, TRANSPOSED), dot, float("-inf"))
        p = tl.exp2(dot * score.scale - lse_log2)
    # A weight of exactly 0 is a constant: 0 · (inf or NaN) must not get through.
    ds = tl.where(p == 0.0, 0.0, p * (dp - delta))
    return p, ds, dcap


@triton.jit
def offsets_to_deltas(key_spans, terms, seqlen_q):
    """How far after a query's δ that of RowTerms for each span stands; 0 for -1."""
    offsets = seqlen_q - terms.first + key_spans.to(tl.int64) * terms.num_rows
    return tl.where(key_spans >= 0, offsets, 0)


@triton.jit
def load_deltas(delta_ptr, offsets, mask_q):
    """[len(offsets), BLOCK_Q]; 0 of queries that do not exist."""
    pointers = delta_ptr[None, :] + offsets[:, None]
    return tl.load(pointers, mask=mask_q[None, :], other=0.0)


@triton.jit
def query_blocks(
    ranges, tile, IS_EDGE: tl.constexpr, IS_MIXED: tl.constexpr, IS_ONLY: tl.constexpr
):  # fmt: skip
    """The query blocks of one loop, or with IS_ONLY of both. With IS_MIXED it takes parts."""
    if IS_ONLY:
        PARTS: tl.constexpr = tile.BLOCK_Q // tile.MIXED_Q if IS_MIXED else 1
        blocks = ranges.whole
        return neighbours(blocks.first * PARTS, (blocks.last - blocks.first) * PARTS)
    else:
        return blocks_of_loop(ranges, IS_EDGE)


@triton.jit
def add_key_gradients(
    dk,
    dv,
    blocks,
    k,
    v,
    k_positions,
    queries,
    HAS_DOUT: tl.constexpr,
    diagonal,
    kinds,
    spans,
    terms,
    span_rows,
    seqlen_q,
    span_bias_ptr,
    attn_mask_ptr,
    padding_ptr,
    masks,
    score,
    tile,
    IS_EDGE: tl.constexpr,
    IS_MIXED: tl.constexpr,
):
    """The query blocks of one loop and head. Tiles are [BLOCK_K, BLOCK_Q]: pᵀ, dsᵀ."""
    BLOCK_Q: tl.constexpr = tile.MIXED_Q if IS_MIXED else tile.BLOCK_Q
    HAS_SHARES: tl.constexpr = terms.first is not None
    offs = tl.arange(0, BLOCK_Q)
    key_spans, to_deltas = 0, 0
    if IS_MIXED:
        key_spans = spans_of_places(kinds, spans, tile.BLOCK_K, tile.TABLE_K)
    if HAS_SHARES:
        if not IS_MIXED:
            key_spans = spans_of_slots(kinds, tile.BLOCK_K // tile.TABLE_K)
        to_deltas = offsets_to_deltas(key_spans, terms, seqlen_q)
    for i in tl.range(0, blocks.number, num_stages=tile.MIXED_STAGES if IS_MIXED else None):
        block = block_number(i, blocks, IS_EDGE)
        first_token = (queries.start + block * BLOCK_Q).to(tl.int64)
        q_positions = block * BLOCK_Q + offs
        q_tokens = queries.start + q_positions
        mask_q = exist(q_positions, queries.length, IS_EDGE)
        place = Place(q_positions, mask_q, k_positions, k.rows, k.mask, diagonal)
        # [BLOCK_Q, BLOCK_D]
        q = row_tile(queries.q, q_tokens, mask_q, tile.HEAD_DIM, tile.PART_D)
        # [BLOCK_Q]
        lse_log2_ptr = queries.lse_log2_ptr + q_tokens
        delta_ptr = queries.delta_ptr + q_tokens
        # In whole blocks all queries exist; another number than 0 would take a select each.
        lse_log2 = tl.load(lse_log2_ptr, mask=mask_q, other=float("inf") if IS_EDGE else 0.0)
        dp = tl.zeros([tile.BLOCK_K, BLOCK_Q], tl.float32)
        if HAS_SHARES:  # (9): δ without the gradient of the marginal
            # The interpreter splats no condition.
            at = tl.zeros_like(to_deltas) + first_token
            has_marginals = (at < span_rows.stop) & (at + BLOCK_Q > span_rows.start)
            delta_m = load_deltas(delta_ptr, tl.where(has_marginals, to_deltas, 0), mask_q)
            if not IS_MIXED:
                delta_m = keys_of_slots(delta_m, tile.BLOCK_K, tile.TABLE_K)
        else:
            delta_m = load_deltas(delta_ptr, tl.zeros([1], tl.int64), mask_q)
        bias = 0.0
        if masks.span_bias is not None:
            bias_ptr = span_bias_ptr + first_token * masks.span_bias.stride_t
            rows = offs.to(tl.int64) * masks.span_bias.stride_t
            stride_s = masks.span_bias.stride_s
            if IS_MIXED:
                bias = gathered_bias(key_spans, bias_ptr, rows, stride_s, mask_q)
            else:
                bias = uniform_shares(
                    kinds, bias_ptr, rows, stride_s, mask_q, tile.BLOCK_K, tile.TABLE_K, True, True
                )
        dot = tl.zeros([tile.BLOCK_K, BLOCK_Q], tl.float32)
        dot = dot_rows(dot, k, q, tile.HEAD_DIM, tile.PART_D, tile.PRECISION)
        if HAS_DOUT:
            # [BLOCK_Q, BLOCK_DV]
            dout = row_tile(queries.dout, q_tokens, mask_q, tile.HEAD_DIM_V, tile.PART_DV)
            dp = dot_rows(dp, v, dout, tile.HEAD_DIM_V, tile.PART_DV, tile.PRECISION)  # (9)
        mask_offsets = q_tokens.to(tl.int64)
        if masks.attn_mask is not None:
            mask_offsets *= masks.attn_mask.stride_t
        p, ds, dcap = weights_and_gradient(
            dot, dp, bias, lse_log2[None, :], delta_m, place, masks,
            HeadMasks(attn_mask_ptr, mask_offsets, padding_ptr), score, IS_EDGE, True,
        )  # fmt: skip
        if HAS_DOUT:
            dv = add_weighted_rows(  # (8)
                dv, p, dout, tile.HEAD_DIM_V, tile.BLOCK_DV, tile.PART_DV, tile.PRECISION
            )
        dx = ds * dcap  # (13)
        dk = add_weighted_rows(  # (15)
            dk, dx, q, tile.HEAD_DIM, tile.BLOCK_D, tile.PART_D, tile.PRECISION
        )
    return dk, dv


class KeysOfProgram(NamedTuple):
    """The keys whose gradients a program forms."""

    sequence: Any
    start: Any  # of the sequence
    length: Any
    positions: Any
    mask: Any
    first: Any  # the lowest position, and the highest: lower than the first without a key
    last: Any
    kinds: Any  # of the blocks of the table of spans that they are
    is_mixed: Any
    spans: Any  # SpanBlock of these
    num_places: Any  # of the table from there on, in the sequence


@triton.jit
def keys_of_program(spans, packed, b, program, seqlen_k, tile):
    """Neighbours, or with spans the keys of one block of their table, or of two."""
    offs = tl.arange(0, tile.BLOCK_K)
    if spans.entries_ptr is None:
        sequence, start, length, block = locate(
            packed.cu_seqlens_k_ptr, packed.num_sequences, seqlen_k, program, tile.BLOCK_K
        )
        first = block * tile.BLOCK_K
        positions = first + offs
        last = tl.minimum(first + tile.BLOCK_K, length) - 1
        return KeysOfProgram(
            sequence, start, length, positions, positions < length, first, last, (NO_SPAN,), False,
            SpanBlock(0, 0, 0, 0, 0), 0,
        )  # fmt: skip
    else:
        SLOTS: tl.constexpr = tile.BLOCK_K // tile.TABLE_K
        IS_PACKED: tl.constexpr = packed.cu_seqlens_k_ptr is not None
        if IS_PACKED:
            sequence, start, length, program = sequence_of_span_blocks(
                packed.cu_seqlens_k_ptr, packed.num_sequences, program, tile.TABLE_K, SLOTS
            )
        else:
            sequence, start, length = program * 0, program * 0, program * 0 + seqlen_k
        block = program * SLOTS
        number = blocks_of_sequence(spans, b * spans.key_stride_b + start, length)
        table = spans_of_keys(spans, b, sequence, start, IS_PACKED, tile.TABLE_K)
        found = (block + offs // tile.TABLE_K) < number
        places = table.positions_ptr + block * tile.TABLE_K + offs
        positions = tl.load(places, mask=found, other=-1)
        last = tl.max(positions, 0)
        first = tl.min(tl.where(positions >= 0, positions, 1 << 30), 0)
        kind, _ = entry_of(table, block, True)
        kinds = (kind,)
        is_mixed = kind == MIXED
        if SLOTS == 2:
            other, _ = entry_of(table, block + 1, True)
            other = tl.where(block + 1 < number, other, NO_SPAN)
            kinds = (kind, other)  # type: ignore[assignment]
            is_mixed = is_mixed | (other == MIXED)
        return KeysOfProgram(
            sequence, start, length, positions, positions >= 0, first, last, kinds, is_mixed,
            moved_spans(table, block, tile.TABLE_K), (number - block) * tile.TABLE_K,
        )  # fmt: skip


@triton.jit
def ranges_of_queries(keys, length_q, splits, masks, tile):
    """Which blocks of queries see some of the keys, and which of these see all of them."""
    diagonal = 0 if masks.window.TOP_LEFT else keys.length - length_q
    low, full_low = 0, 0
    high, full_high = length_q, length_q
    first_key, last_key = keys.first - diagonal, keys.last - diagonal
    if masks.window.HAS_RIGHT:
        low, full_low = first_key - masks.window.right, last_key - masks.window.right
    if masks.window.HAS_LEFT:
        high = tl.minimum(length_q, last_key + masks.window.left + 1)
        full_high = tl.minimum(length_q, first_key + masks.window.left + 1)
    ranges = block_ranges(low, high, full_low, full_high, tile.BLOCK_Q)
    if splits.ranges is not None:
        ranges = part_of_ranges(ranges, tl.program_id(1) % splits.ranges, splits.ranges)
    return ranges


@triton.jit
def keys_again(spans, packed, num_k_blocks, sizes, tile):
    """`keys_of_program`, formed where it is called: its numbers take no registers before."""
    program = tl.program_id(0) + opaque_zero(False)
    b = (program // num_k_blocks // sizes.num_kv_heads).to(tl.int64)
    return keys_of_program(spans, packed, b, program % num_k_blocks, sizes.seqlen_k, tile)


@triton.jit
def write_key_gradients(
    k,
    v,
    dk,
    dv,
    keys,
    first_head,
    last_head,
    ranges,
    b,
    kv_head,
    q,
    dout,
    terms,
    q_start,
    length_q,
    diagonal,
    padding_ptr,
    masks,
    sizes,
    splits,
    span_rows,
    score,
    tile,
    num_k_blocks,
    spans,
    packed,
    HAS_SPANS: tl.constexpr,
    IS_MIXED: tl.constexpr,
):
    """dk and dv of a program's keys from the query blocks `ranges` of heads [first, last)."""
    # Wide tiles have no registers to keep numbers of the keys. With more arguments this takes more.
    IS_PLAIN: tl.constexpr = masks.span_bias is None and masks.attn_mask is None
    IS_PACKED: tl.constexpr = packed.cu_seqlens_k_ptr is not None
    FORMS_AGAIN: tl.constexpr = HAS_SPANS and IS_PLAIN and not IS_PACKED and tile.BLOCK_Q > 16
    dk_sum = tl.zeros([tile.BLOCK_K, tile.BLOCK_D], tl.float32)
    dv_sum = tl.zeros([tile.BLOCK_K, tile.BLOCK_DV], tl.float32)
    for head in range(first_head, last_head):
        h = tl.cast(head, tl.int64)
        if FORMS_AGAIN and not IS_MIXED:
            ranges = ranges_of_queries(
                keys_again(spans, packed, num_k_blocks, sizes, tile), length_q, splits, masks, tile
            )
        head_ptr = terms.ptr + (b * sizes.num_heads + h) * terms.stride_h
        queries = Queries(
            head_of(q, b, h), head_of(dout, b, h), head_ptr, head_ptr + sizes.seqlen_q, q_start,
            length_q,
        )  # fmt: skip
        # With a bias the second of two loops spills.
        IS_ONLY: tl.constexpr = IS_MIXED or masks.span_bias is not None
        for IS_EDGE in tl.static_range(1 if IS_ONLY else 0, 2):
            dk_sum, dv_sum = add_key_gradients(
                dk_sum, dv_sum, query_blocks(ranges, tile, IS_EDGE, IS_MIXED, IS_ONLY), k, v,
                keys.positions, queries, dout is not None, diagonal, keys.kinds, keys.spans,
                terms, span_rows, sizes.seqlen_q, head_of(masks.span_bias, b, h).ptr,
                head_of(masks.attn_mask, b, h).ptr, padding_ptr, masks, score, tile, IS_EDGE,
                IS_MIXED,
            )  # fmt: skip

    # Formed here: numbers in the layout of the stores would take registers in the loops.
    if HAS_SPANS:
        if FORMS_AGAIN:
            keys = keys_again(spans, packed, num_k_blocks, sizes, tile)
        offs = here(tl.arange(0, tile.BLOCK_K).to(tl.int64))
        found = offs < keys.num_places
        positions = tl.load(keys.spans.positions_ptr + offs, mask=found, other=-1).to(tl.int64)
        mask_k = positions >= 0
    else:
        positions = here(keys.positions.to(tl.int64))
        mask_k = positions < keys.length
    k_tokens = keys.start + positions
    part = tl.program_id(1).to(tl.int64)
    dk_head, dv_head = head_of(dk, b, kv_head), head_of(dv, b, kv_head)
    if splits.dk_stride is not None:
        dk_head = Head(dk_head.ptr + part * splits.dk_stride, dk_head.stride)
    store_rows(dk_head, k_tokens, mask_k, dk_sum * score.tau, 0, tile.HEAD_DIM, tile.BLOCK_D)
    if dout is not None:
        if splits.dv_stride is not None:
            dv_head = Head(dv_head.ptr + part * splits.dv_stride, dv_head.stride)
        store_rows(dv_head, k_tokens, mask_k, dv_sum, 0, tile.HEAD_DIM_V, tile.BLOCK_DV)


@triton.jit
def attention_bwd_dkdv_kernel(
    q,
    k,
    v,
    dout,
    terms,
    dk,
    dv,
    spans,
    masks,
    packed,
    sizes,
    num_k_blocks,
    splits,
    span_rows,
    score,
    tile,
):
    """One program: BLOCK_K keys of a kv head, over queries of the heads that read it.

    With splits it takes some of these heads, and of their queries one range.
    """
    pid = tl.program_id(0)
    k_block = pid % num_k_blocks
    pid = pid // num_k_blocks
    kv_head = (pid % sizes.num_kv_heads).to(tl.int64)
    b = (pid // sizes.num_kv_heads).to(tl.int64)
    keys = keys_of_program(spans, packed, b, k_block, sizes.seqlen_k, tile)
    q_start, length_q = length_of(packed.cu_seqlens_q_ptr, keys.sequence, sizes.seqlen_q)
    if keys.first > keys.last:
        return

    k_start, length_k, k_positions, mask_k = keys.start, keys.length, keys.positions, keys.mask
    k_tokens = k_start + k_positions
    padding_ptr = padding_of(masks, b)
    # 0 · NaN is NaN: padding keys are not read.
    real = real_keys(masks, padding_ptr, k_tokens, mask_k)
    # [BLOCK_K, BLOCK_D], [BLOCK_K, BLOCK_DV]
    k_tile = row_tile(head_of(k, b, kv_head), k_tokens, real, tile.HEAD_DIM, tile.PART_D)
    v_tile = row_tile(head_of(v, b, kv_head), k_tokens, real, tile.HEAD_DIM_V, tile.PART_DV)

    diagonal = 0 if masks.window.TOP_LEFT else length_k - length_q
    ranges = ranges_of_queries(keys, length_q, splits, masks, tile)
    head_split = tl.program_id(1)
    if splits.ranges is not None:
        head_split = head_split // splits.ranges

    group = sizes.num_heads // sizes.num_kv_heads
    heads_per_split = tl.cdiv(group, splits.heads)
    last_head = (kv_head.to(tl.int32) + 1) * group
    first_head = last_head - group + head_split * heads_per_split
    last_head = tl.minimum(first_head + heads_per_split, last_head)
    HAS_SPANS: tl.constexpr = spans.entries_ptr is not None
    # A branch around all of it, because a product in a branch takes registers in the loops.
    if keys.is_mixed if HAS_SPANS else False:
        write_key_gradients(
            k_tile, v_tile, dk, dv, keys, first_head, last_head, ranges, b, kv_head, q, dout,
            terms, q_start, length_q, diagonal, padding_ptr, masks, sizes, splits, span_rows, score,
            tile, num_k_blocks, spans, packed, HAS_SPANS, True,
        )  # fmt: skip
    else:
        write_key_gradients(
            k_tile, v_tile, dk, dv, keys, first_head, last_head, ranges, b, kv_head, q, dout,
            terms, q_start, length_q, diagonal, padding_ptr, masks, sizes, splits, span_rows, score,
            tile, num_k_blocks, spans, packed, HAS_SPANS, False,
        )  # fmt: skip


@triton.jit
def attention_bwd_join_kernel(
    partial_ptr,  # float32 [parts, B, Hk, N, D]
    x,
    num_kv_heads,
    seqlen_k,
    num_parts,
    part_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_K rows of dk or dv of one kv head, all parts, in their order."""
    num_k_blocks = tl.cdiv(seqlen_k, BLOCK_K)
    bh = (tl.program_id(0) // num_k_blocks).to(tl.int64)
    tokens = tl.program_id(0) % num_k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = tokens < seqlen_k
    part = partial_ptr + bh * seqlen_k * HEAD_DIM
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for _ in range(0, num_parts):
        # [BLOCK_K, BLOCK_D]
        total += load_rows(Head(part, HEAD_DIM), tokens, mask_k, 0, HEAD_DIM, BLOCK_D)
        part += part_stride
    store_rows(
        head_of(x, bh // num_kv_heads, bh % num_kv_heads), tokens, mask_k, total, 0, HEAD_DIM,
        BLOCK_D,
    )  # fmt: skip
