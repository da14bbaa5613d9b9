"""The backward Triton kernels of `attention` for delta, dk and dv; bwd_q_kernels.py has dq.

Comments cite the equations of README.md. Each gradient is summed inside one program, in a fixed
order: no atomics.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from ....runtime.triton_blocks import block_number, block_ranges, blocks_of_loop
from ....runtime.triton_rows import Head, head_of, load_rows, store_rows
from .marginals import here, kind_of, moved_spans, shares
from .scores import (
    HeadMasks,
    Place,
    Queries,
    add_weighted_rows,
    backward_lse_log2,
    dot_rows,
    exist,
    in_window,
    length_of,
    locate,
    padding_of,
    real_keys,
    row_tile,
    scores,
)


@triton.jit
def attention_bwd_delta_kernel(
    out,
    marginals_ptr,
    lse_ptr,
    dout,
    dmarginals_ptr,
    dlse_ptr,
    delta_ptr,
    num_heads,
    seqlen_q,
    span_rows,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Equation (10), 0 in fully masked rows. One program: BLOCK_Q queries of one head."""
    num_blocks = tl.cdiv(seqlen_q, BLOCK_Q)
    bh = (tl.program_id(0) // num_blocks).to(tl.int64)
    b, h = bh // num_heads, bh % num_heads
    tokens = tl.program_id(0) % num_blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    mask_q = tokens < seqlen_q
    lse = tl.load(lse_ptr + bh * seqlen_q + tokens, mask=mask_q, other=float("-inf"))
    mask_q = mask_q & (lse > float("-inf"))  # a row that sees no key is a constant
    delta = tl.zeros([BLOCK_Q], tl.float32)
    if dout.ptr is not None:
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
    tl.store(delta_ptr + bh * seqlen_q + tokens, delta, mask=tokens < seqlen_q)


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
    HAS_MASK: tl.constexpr = masks.attn_mask.ptr is not None or masks.padding.ptr is not None
    if HAS_MASK or score.HAS_CAP or masks.span_bias.ptr is not None:
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
    kind,
    spans,
    dmarginals_ptr,
    span_rows,
    span_bias_ptr,
    attn_mask_ptr,
    padding_ptr,
    masks,
    score,
    tile,
    IS_EDGE: tl.constexpr,
):
    """The query blocks of one loop and head. Tiles are [BLOCK_K, BLOCK_Q]: pᵀ, dsᵀ."""
    for i in range(0, blocks.number):
        block = block_number(i, blocks, IS_EDGE)
        q_positions = block * tile.BLOCK_Q + tl.arange(0, tile.BLOCK_Q)
        q_tokens = queries.start + q_positions
        mask_q = exist(q_positions, queries.length, IS_EDGE)
        place = Place(q_positions, mask_q, k_positions, k.rows, k.mask, diagonal)
        # [BLOCK_Q, BLOCK_D]
        q = row_tile(queries.q, q_tokens, mask_q, tile.HEAD_DIM, tile.PART_D)
        # [BLOCK_Q]
        lse = tl.load(queries.lse_ptr + q_tokens, mask=mask_q, other=float("-inf"))
        delta = tl.load(queries.delta_ptr + q_tokens, mask=mask_q, other=0.0)
        dp = tl.zeros([tile.BLOCK_K, tile.BLOCK_Q], tl.float32)
        if dmarginals_ptr is not None:  # (9)
            mask_rows = mask_q & (q_tokens >= span_rows.start) & (q_tokens < span_rows.stop)
            dp = shares(
                kind, spans, dmarginals_ptr, q_tokens.to(tl.int64) * span_rows.num_spans, 1,
                mask_rows, k.mask, tile.BLOCK_Q, tile.BLOCK_K, tile.TERMS, True, False,
            )  # fmt: skip
        bias = 0.0
        if masks.span_bias.ptr is not None:
            bias = shares(
                kind, spans, span_bias_ptr, q_tokens.to(tl.int64) * masks.span_bias.stride_t,
                masks.span_bias.stride_s, mask_q, k.mask, tile.BLOCK_Q, tile.BLOCK_K, 3, True,
                True,
            )  # fmt: skip
        dot = tl.zeros([tile.BLOCK_K, tile.BLOCK_Q], tl.float32)
        dot = dot_rows(dot, k, q, tile.HEAD_DIM, tile.PART_D, tile.PRECISION)
        if HAS_DOUT:
            # [BLOCK_Q, BLOCK_DV]
            dout = row_tile(queries.dout, q_tokens, mask_q, tile.HEAD_DIM_V, tile.PART_DV)
            dp = dot_rows(dp, v, dout, tile.HEAD_DIM_V, tile.PART_DV, tile.PRECISION)  # (9)
        mask_offsets = q_tokens.to(tl.int64) * masks.attn_mask.stride_t
        p, ds, dcap = weights_and_gradient(
            dot, dp, bias, backward_lse_log2(lse)[None, :], delta[None, :], place, masks,
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


@triton.jit
def attention_bwd_dkdv_kernel(
    q,
    k,
    v,
    dout,
    lse_ptr,
    delta_ptr,
    dmarginals_ptr,
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
    sequence, k_start, length_k, block = locate(
        packed.cu_seqlens_k_ptr, packed.num_sequences, sizes.seqlen_k, k_block, tile.BLOCK_K
    )
    q_start, length_q = length_of(packed.cu_seqlens_q_ptr, sequence, sizes.seqlen_q)
    if block * tile.BLOCK_K >= length_k:
        return

    k_positions = block * tile.BLOCK_K + tl.arange(0, tile.BLOCK_K)
    k_tokens = k_start + k_positions
    mask_k = k_positions < length_k
    padding_ptr = padding_of(masks, b)
    # 0 · NaN is NaN: padding keys are not read.
    real = real_keys(masks, padding_ptr, k_tokens, mask_k)
    # [BLOCK_K, BLOCK_D], [BLOCK_K, BLOCK_DV]
    k_tile = row_tile(head_of(k, b, kv_head), k_tokens, real, tile.HEAD_DIM, tile.PART_D)
    v_tile = row_tile(head_of(v, b, kv_head), k_tokens, real, tile.HEAD_DIM_V, tile.PART_DV)
    block_spans = moved_spans(
        spans, b * spans.stride_b + k_block,
        b * spans.local_stride_b + k_start + block * tile.BLOCK_K, tile.BLOCK_K,
    )  # fmt: skip
    kind = kind_of(block_spans, spans.kinds_ptr is not None)

    # Which queries see some of the keys, and which of these see all of them?
    diagonal = 0 if masks.window.TOP_LEFT else length_k - length_q
    low, full_low = 0, 0
    high, full_high = length_q, length_q
    first_key = block * tile.BLOCK_K - diagonal
    last_key = tl.minimum(block * tile.BLOCK_K + tile.BLOCK_K, length_k) - 1 - diagonal
    if masks.window.HAS_RIGHT:
        low, full_low = first_key - masks.window.right, last_key - masks.window.right
    if masks.window.HAS_LEFT:
        high = tl.minimum(length_q, last_key + masks.window.left + 1)
        full_high = tl.minimum(length_q, first_key + masks.window.left + 1)
    first, first_full, last_full, last = block_ranges(low, high, full_low, full_high, tile.BLOCK_Q)
    split = tl.program_id(1)
    head_split = split
    if splits.ranges is not None:
        head_split = split // splits.ranges
        blocks_per_range = tl.cdiv(last - first, splits.ranges)
        first = tl.minimum(first + split % splits.ranges * blocks_per_range, last)
        last = tl.minimum(first + blocks_per_range, last)
        first_full = tl.minimum(tl.maximum(first_full, first), last)
        last_full = tl.minimum(tl.maximum(last_full, first_full), last)

    dk_sum = tl.zeros([tile.BLOCK_K, tile.BLOCK_D], tl.float32)
    dv_sum = tl.zeros([tile.BLOCK_K, tile.BLOCK_DV], tl.float32)
    group = sizes.num_heads // sizes.num_kv_heads
    heads_per_split = tl.cdiv(group, splits.heads)
    last_head = (kv_head.to(tl.int32) + 1) * group
    first_head = last_head - group + head_split * heads_per_split
    for head in range(first_head, tl.minimum(first_head + heads_per_split, last_head)):
        h = tl.cast(head, tl.int64)
        rows = (b * sizes.num_heads + h) * sizes.seqlen_q
        queries = Queries(
            head_of(q, b, h), head_of(dout, b, h), lse_ptr + rows, delta_ptr + rows, q_start,
            length_q,
        )  # fmt: skip
        head_dmarginals_ptr = dmarginals_ptr
        if dmarginals_ptr is not None:
            num_rows = span_rows.stop - span_rows.start
            first_row = (b * sizes.num_heads + h) * num_rows - span_rows.start
            head_dmarginals_ptr = dmarginals_ptr + first_row * span_rows.num_spans
        for IS_EDGE in tl.static_range(2):
            dk_sum, dv_sum = add_key_gradients(
                dk_sum, dv_sum, blocks_of_loop(first, first_full, last_full, last, IS_EDGE),
                k_tile, v_tile, k_positions, queries, dout.ptr is not None, diagonal, kind,
                block_spans, head_dmarginals_ptr, span_rows, head_of(masks.span_bias, b, h).ptr,
                head_of(masks.attn_mask, b, h).ptr, padding_ptr, masks, score, tile, IS_EDGE,
            )  # fmt: skip

    # Formed here: numbers in the layout of the stores would take registers in the loops.
    positions = here(k_positions.to(tl.int64))
    k_tokens, mask_k = k_start + positions, positions < length_k
    part = tl.program_id(1).to(tl.int64)
    dk_head, dv_head = head_of(dk, b, kv_head), head_of(dv, b, kv_head)
    if splits.dk_stride is not None:
        dk_head = Head(dk_head.ptr + part * splits.dk_stride, dk_head.stride)
    store_rows(dk_head, k_tokens, mask_k, dk_sum * score.tau, 0, tile.HEAD_DIM, tile.BLOCK_D)
    if dout.ptr is not None:
        if splits.dv_stride is not None:
            dv_head = Head(dv_head.ptr + part * splits.dv_stride, dv_head.stride)
        store_rows(dv_head, k_tokens, mask_k, dv_sum, 0, tile.HEAD_DIM_V, tile.BLOCK_DV)


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
