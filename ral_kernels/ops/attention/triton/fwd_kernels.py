"""The forward Triton kernel of `attention`, and the one that combines splits over the keys.

Comments cite the equations of README.md.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from ....runtime.triton_blocks import block_number, block_ranges, part_of_ranges
from ....runtime.triton_rows import Head, head_of, store_rows
from ....runtime.triton_softmax import stabiliser
from ....runtime.triton_spans import MIXED, NO_SPAN, span_block_ranges
from .marginals import (
    HEADROOM,
    Sums,
    add_mixed_block,
    begun_exponent,
    bias_of_tile,
    entry_of,
    here,
    leave_span,
    moved_spans,
    opaque_zero,
    relative_weight,
    scale_rows,
)
from .scores import (
    EDGE,
    LN2,
    SHORT,
    Keys,
    Place,
    add_weighted_rows,
    blocks_of_keys,
    dot_rows,
    in_window,
    keys_of_block,
    length_of,
    locate,
    masks_of_rows,
    real_keys,
    row_tile,
    scores,
    spans_of_keys,
    tensor_of,
    tensor_tile,
)


@triton.jit
def attend(
    state,  # acc, normaliser, m and, for the marginals, exponent, run, run_kind
    blocks,
    q,
    q_positions,
    keys,
    diagonal,
    HAS_SPANS: tl.constexpr,
    HAS_SHORT: tl.constexpr,
    sums,
    has_rows,
    span_bias_rows,
    masks,
    head_masks,
    score,
    tile,
    IS_EDGE: tl.constexpr,
    IS_SHORT: tl.constexpr,
):
    """The key blocks of one loop: flash attention, and sums over spans.

    With IS_EDGE the blocks need a mask. With IS_SHORT they are short: neighbours in several spans.
    """
    MAY_MIX: tl.constexpr = IS_EDGE or IS_SHORT
    HAS_LEFT: tl.constexpr = masks.window.HAS_LEFT
    # A block at an edge may hold rows of other heads: their values would be multiplied by 0.
    BY_TENSOR: tl.constexpr = tile.BY_TENSOR and not IS_EDGE
    HAS_BIAS: tl.constexpr = masks.span_bias is not None
    HAS_MASK: tl.constexpr = masks.attn_mask is not None or masks.padding is not None
    GENERAL: tl.constexpr = score.HAS_CAP or HAS_MASK or HAS_BIAS  # more than a scale and a window
    acc, normaliser, m, exponent, run, run_kind = state
    if IS_SHORT and sums.ptr is not None:  # noqa: SIM102 (known when compiled; the next is not)
        if has_rows:
            exponent = begun_exponent(exponent, m)
            leave_span(sums, run_kind, run * relative_weight(exponent, m), True)
            run = tl.zeros_like(run)
            run_kind = MIXED
    # Formed here: what several loops share would take registers in all of them.
    offsets = here(tl.arange(0, tile.BLOCK_K).to(tl.int64))
    zero = opaque_zero(False)
    kind, first_key = entry_of(
        keys.spans, block_number(zero, blocks, IS_EDGE, HAS_SPANS, HAS_SHORT, HAS_LEFT), HAS_SPANS
    )
    for i in tl.range(0, blocks.number, num_stages=tile.MIXED_STAGES if MAY_MIX else None):
        block = block_number(i, blocks, IS_EDGE, HAS_SPANS, HAS_SHORT, HAS_LEFT)
        k_positions, mask_k, k_head, v_head, rows = keys_of_block(
            keys, block, first_key, offsets, tile.BLOCK_K, IS_EDGE, HAS_SPANS
        )
        k_tokens = keys.start + k_positions
        place = Place(q_positions, q.mask, k_positions, k_tokens, mask_k, diagonal)
        block_spans = moved_spans(keys.spans, block, tile.BLOCK_K)
        if sums.ptr is not None and not IS_SHORT:  # noqa: SIM102 (known when compiled)
            if has_rows & (kind != run_kind):
                exponent = begun_exponent(exponent, m)
                leave_span(sums, run_kind, run * relative_weight(exponent, m), IS_EDGE)
                run = tl.zeros_like(run)
                run_kind = kind
        bias = 0.0
        if HAS_BIAS:
            bias = bias_of_tile(
                kind, block_spans, masks.span_bias.ptr, span_bias_rows, masks.span_bias.stride_s,
                q.mask, tile.BLOCK_K, MAY_MIX,
            )  # fmt: skip
        # [BLOCK_K, BLOCK_D]
        if BY_TENSOR:
            k = tensor_tile(keys.k_tensor, keys.start + block * tile.BLOCK_K)
        else:
            k = row_tile(k_head, rows, mask_k, tile.HEAD_DIM, tile.PART_D)
        dot = tl.zeros([tile.BLOCK_Q, tile.BLOCK_K], tl.float32)
        dot = dot_rows(dot, q, k, tile.HEAD_DIM, tile.PART_D, tile.PRECISION)
        if GENERAL:
            s, _ = scores(dot, bias, place, masks, head_masks, score, IS_EDGE, False)
            m_new = tl.maximum(m, tl.max(s, 1))
            stable = stabiliser(m_new)
            p = tl.exp2(s - stable[:, None])
        else:
            if IS_EDGE:
                dot = tl.where(in_window(place, masks, False), dot, float("-inf"))
            # Scaling waits for the subtraction: one FMA.
            m_new = tl.maximum(m, tl.max(dot, 1) * score.scale)
            stable = stabiliser(m_new)
            p = tl.exp2(dot * score.scale - stable[:, None])
        alpha = tl.exp2(m - stable)
        row_sum = tl.sum(p, 1)
        normaliser = normaliser * alpha + row_sum
        m = m_new
        # 0 · NaN is NaN: values of padding keys are not read.
        mask_v = real_keys(masks, head_masks.padding_ptr, k_tokens, mask_k)
        # [BLOCK_K, BLOCK_DV]
        if BY_TENSOR:
            v = tensor_tile(keys.v_tensor, keys.start + block * tile.BLOCK_K)
        else:
            v = row_tile(v_head, rows, mask_v, tile.HEAD_DIM_V, tile.PART_DV)
        acc = add_weighted_rows(  # (6)
            acc * alpha[:, None], p, v, tile.HEAD_DIM_V, tile.BLOCK_DV, tile.PART_DV,
            tile.PRECISION,
        )  # fmt: skip

        if sums.ptr is not None:  # (7)
            if not IS_SHORT:
                run = run * alpha + row_sum
            if MAY_MIX:  # noqa: SIM102 (known when compiled; the next is not)
                if has_rows & (IS_SHORT or kind == MIXED):
                    exponent = begun_exponent(exponent, m)
                    weight = relative_weight(exponent, m)
                    add_mixed_block(sums, p, weight, block_spans, tile.BLOCK_K, tile.TERMS)
        # One block ahead: nothing waits for this load.
        next_block = block_number(i + 1, blocks, IS_EDGE, HAS_SPANS, HAS_SHORT, HAS_LEFT)
        kind, first_key = entry_of(keys.spans, next_block, HAS_SPANS)
    return acc, normaliser, m, exponent, run, run_kind


@triton.jit
def attend_all(
    ranges,
    q,
    q_positions,
    keys,
    diagonal,
    HAS_SPANS: tl.constexpr,
    HAS_SHORT: tl.constexpr,
    sums,
    has_rows,
    exponent,
    span_bias_rows,
    masks,
    head_masks,
    score,
    tile,
):
    """All key blocks, from nothing but an exponent."""
    acc = tl.zeros([tile.BLOCK_Q, tile.BLOCK_DV], tl.float32)
    normaliser = tl.zeros([tile.BLOCK_Q], tl.float32)
    m = tl.full([tile.BLOCK_Q], float("-inf"), tl.float32)
    run_kind = ranges.whole.first * 0 + NO_SPAN
    state = acc, normaliser, m, exponent, normaliser, run_kind
    # A branch in one loop would cost registers.
    for LOOP in tl.static_range(3):
        if LOOP != SHORT or HAS_SHORT:
            state = attend(
                state, blocks_of_keys(ranges, masks, LOOP, HAS_SHORT), q, q_positions, keys,
                diagonal, HAS_SPANS, HAS_SHORT, sums, has_rows, span_bias_rows, masks, head_masks,
                score, tile, LOOP == EDGE, LOOP == SHORT,
            )  # fmt: skip
    return state


@triton.jit
def numbers_of_program(zero, num_q_blocks, programs_h, batch_size):
    """(block of queries, head or kv head, sample, split) of this program."""
    pid = tl.program_id(0) + zero
    # Causal rows at the end have the most keys: they start first.
    block = num_q_blocks - 1 - pid % num_q_blocks
    pid = pid // num_q_blocks
    h = (pid % programs_h).to(tl.int64)
    pid = pid // programs_h
    return block, h, (pid % batch_size).to(tl.int64), (pid // batch_size).to(tl.int64)


@triton.jit
def attention_fwd_kernel(
    q,
    k,
    v,
    q_tensor,  # tensor descriptors, or None; Triton looks for them outside of tuples
    k_tensor,
    v_tensor,
    out,  # with splits: float32 and partial, as are lse and marginals
    lse_ptr,
    marginals_ptr,
    spans,
    masks,
    packed,
    sizes,
    programs,
    span_rows,
    score,
    tile,
):
    """One program: BLOCK_Q queries of a head, over the keys of one split.

    With GROUP > 1 (decoding) the rows are the GROUP heads of a kv head, token by token, so that K
    and V are read once for all of them.
    """
    block, h, b, split = numbers_of_program(
        0, programs.q_blocks, sizes.num_heads // tile.GROUP, programs.batch_size
    )

    # Blocks count rows. A group of 7 does not divide BLOCK_Q, so packed sequences are looked up in
    # blocks of as many tokens as surely fit.
    TOKENS: tl.constexpr = tile.BLOCK_Q // tile.GROUP
    sequence, q_start, length_q, block = locate(
        packed.cu_seqlens_q_ptr, packed.num_sequences, sizes.seqlen_q, block, TOKENS
    )
    k_start, length_k = length_of(packed.cu_seqlens_k_ptr, sequence, sizes.seqlen_k)
    if block * TOKENS >= length_q:
        return

    offs = tl.arange(0, tile.BLOCK_Q)
    q_positions = block * TOKENS + offs // tile.GROUP
    mask_q = (q_positions < length_q) & (offs < TOKENS * tile.GROUP)
    q_tokens = q_start + q_positions
    heads = h * tile.GROUP + offs % tile.GROUP  # int64 [BLOCK_Q]
    kv_head = h * tile.GROUP // (sizes.num_heads // sizes.num_kv_heads)

    # [BLOCK_Q, BLOCK_D]
    q_rows = b * q.stride_b + heads * q.stride_h + q_tokens.to(tl.int64) * q.stride_t
    if tile.BY_TENSOR:
        q_tile = tensor_tile(tensor_of(q_tensor, q, b, h), q_start + block * TOKENS)
    else:
        q_tile = row_tile(Head(q.ptr, 1), q_rows, mask_q, tile.HEAD_DIM, tile.PART_D)

    # Which keys do the rows see, and which of these do all rows see?
    diagonal = 0 if masks.window.TOP_LEFT else length_k - length_q
    low, full_low = 0, 0
    high, full_high = length_k, length_k
    first_row = block * TOKENS + diagonal
    last_row = tl.minimum(block * TOKENS + TOKENS, length_q) - 1 + diagonal
    if masks.window.HAS_LEFT:
        low, full_low = first_row - masks.window.left, last_row - masks.window.left
    if masks.window.HAS_RIGHT:
        high = tl.minimum(length_k, last_row + masks.window.right + 1)
        full_high = tl.minimum(length_k, first_row + masks.window.right + 1)
    HAS_SPANS: tl.constexpr = spans.entries_ptr is not None
    HAS_SHORT: tl.constexpr = spans.short_before_ptr is not None
    if HAS_SPANS:
        first_key = b * spans.key_stride_b + k_start
        ranges = span_block_ranges(
            spans, first_key, length_k, low, high, full_low, full_high, tile.BLOCK_K
        )
    else:
        ranges = block_ranges(low, high, full_low, full_high, tile.BLOCK_K)
    ranges = part_of_ranges(ranges, split.to(tl.int32), programs.splits, HAS_SPANS)

    has_rows = False
    mask_rows = mask_q
    marginals_rows = q_positions
    if marginals_ptr is not None:
        mask_rows = mask_q & (q_tokens >= span_rows.start) & (q_tokens < span_rows.stop)
        first_token = q_start + block * TOKENS
        last_token = q_start + tl.minimum(block * TOKENS + TOKENS, length_q)
        has_rows = tl.maximum(first_token, span_rows.start) < tl.minimum(last_token, span_rows.stop)
        num_rows = span_rows.stop - span_rows.start
        if tile.GROUP == 1:
            marginals_rows = offs
            marginals_ptr += block.to(tl.int64) * TOKENS * span_rows.num_spans
        else:
            marginals_rows = (offs % tile.GROUP).to(tl.int64) * num_rows + q_positions
        first_row_of_head = (split * programs.batch_size + b) * sizes.num_heads + h * tile.GROUP
        first_row_of_head = first_row_of_head * num_rows
        marginals_ptr += (first_row_of_head + q_start - span_rows.start) * span_rows.num_spans
    sums = Sums(marginals_ptr, marginals_rows, mask_rows, span_rows.num_spans)
    span_bias_rows = heads
    if masks.span_bias is not None:
        span_bias_rows = heads * masks.span_bias.stride_h
        span_bias_rows += q_tokens.to(tl.int64) * masks.span_bias.stride_t
        span_bias_rows += b * masks.span_bias.stride_b
    head_masks = masks_of_rows(masks, b, heads, q_tokens)
    IS_PACKED: tl.constexpr = packed.cu_seqlens_k_ptr is not None
    keys = Keys(
        head_of(k, b, kv_head), head_of(v, b, kv_head),
        tensor_of(k_tensor, k, b, kv_head), tensor_of(v_tensor, v, b, kv_head),
        k_start, length_k,
        spans_of_keys(spans, b, sequence, k_start, IS_PACKED, tile.BLOCK_K),
    )  # fmt: skip

    exponent = tl.full([tile.BLOCK_Q], float("-inf"), tl.float32)
    if marginals_ptr is None:
        acc, normaliser, m, exponent, run, run_kind = attend_all(
            ranges, q_tile, q_positions, keys, diagonal, HAS_SPANS, HAS_SHORT, sums, has_rows,
            exponent, span_bias_rows, masks, head_masks, score, tile,
        )  # fmt: skip
    else:
        acc = tl.zeros([tile.BLOCK_Q, tile.BLOCK_DV], tl.float32)
        normaliser, m, run = exponent, exponent, exponent
        run_kind = ranges.whole.first * 0 + NO_SPAN
        attempts = run_kind * 0 + 1
        while attempts > 0:
            acc, normaliser, m, exponent, run, run_kind = attend_all(
                ranges, q_tile, q_positions, keys, diagonal, HAS_SPANS, HAS_SHORT, sums, has_rows,
                exponent, span_bias_rows, masks, head_masks, score, tile,
            )  # fmt: skip
            attempts = attempts * 0
            if has_rows:
                exponent = begun_exponent(exponent, m)
                attempts = tl.max((m > exponent + HEADROOM).to(tl.int32), 0)
                if attempts > 0:
                    # What is stored may be inf. Once more, relative to the last maximum.
                    scale_rows(sums, tl.zeros_like(m))
                    exponent = m

    # A row that saw no key has normaliser = 0 and gives 0.
    inverse = tl.where(normaliser > 0, 1.0 / normaliser, 0.0)
    if marginals_ptr is not None:  # noqa: SIM102 (known when compiled; the next is not)
        if has_rows:
            leave_span(sums, run_kind, run * relative_weight(exponent, m), True)
            factor = tl.where(normaliser > 0, tl.exp2(exponent - stabiliser(m)) * inverse, 0.0)
            scale_rows(sums, factor)  # (7)

    lse = tl.where(normaliser > 0, (m + tl.log2(normaliser)) * LN2, float("-inf"))  # (4)
    # Numbers of the program once more, which would take registers in the loops.
    _, h, b, split = numbers_of_program(
        opaque_zero(False), programs.q_blocks, sizes.num_heads // tile.GROUP, programs.batch_size
    )
    heads = h * tile.GROUP + offs % tile.GROUP
    lse_rows = (
        (split * programs.batch_size + b) * sizes.num_heads + heads
    ) * sizes.seqlen_q + q_tokens
    tl.store(lse_ptr + lse_rows, lse, mask=mask_q)
    out_rows = split * programs.split_stride + b * out.stride_b + heads * out.stride_h
    out_rows += q_tokens.to(tl.int64) * out.stride_t
    store_rows(
        Head(out.ptr, 1), out_rows, mask_q, acc * inverse[:, None], 0, tile.HEAD_DIM_V,
        tile.BLOCK_DV,
    )  # fmt: skip


@triton.jit
def attention_fwd_combine_kernel(
    partial_out_ptr,  # [splits, B, H, T, Dv]
    partial_lse_ptr,  # [splits, B, H, T]
    partial_marginals_ptr,  # [splits, B, H, R, S]
    out,
    lse_ptr,
    marginals_ptr,
    batch_size,
    num_heads,
    seqlen_q,
    num_splits,
    span_rows,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program: one query of one head, all splits, in their order."""
    row = tl.program_id(0).to(tl.int64)  # (b, h, t)
    t = row % seqlen_q
    h = row // seqlen_q % num_heads
    b = row // seqlen_q // num_heads
    # A size of 1 is a Python int when compiled; row makes the products int64.
    num_queries = (row * 0 + batch_size) * num_heads * seqlen_q

    m = tl.full([], float("-inf"), tl.float32)
    for split in range(0, num_splits):
        m = tl.maximum(m, tl.load(partial_lse_ptr + split * num_queries + row))
    stable = stabiliser(m)
    total = tl.full([], 0.0, tl.float32)
    offs_d = tl.arange(0, BLOCK_DV)
    mask_d = offs_d < HEAD_DIM_V
    total_out = tl.zeros([BLOCK_DV], tl.float32)
    for split in range(0, num_splits):
        at = split * num_queries + row
        weight = tl.exp(tl.load(partial_lse_ptr + at) - stable)
        partial = tl.load(partial_out_ptr + at * HEAD_DIM_V + offs_d, mask=mask_d, other=0.0)
        total_out += weight * partial
        total += weight
    inverse = tl.where(total > 0, 1.0 / total, 0.0)
    out_row = b * out.stride_b + h * out.stride_h + t * out.stride_t
    whole = (total_out * inverse).to(out.ptr.dtype.element_ty)
    tl.store(out.ptr + out_row + offs_d, whole, mask=mask_d)
    tl.store(lse_ptr + row, tl.where(total > 0, m + tl.log(total), float("-inf")))

    if marginals_ptr is not None:  # noqa: SIM102 (known when compiled; the next is not)
        if (t >= span_rows.start) & (t < span_rows.stop):
            num_rows = span_rows.stop - span_rows.start
            r = (row // seqlen_q * num_rows + t - span_rows.start) * span_rows.num_spans
            stride = (row * 0 + batch_size) * num_heads * num_rows * span_rows.num_spans
            for start in range(0, span_rows.num_spans, BLOCK_S):
                columns = start + tl.arange(0, BLOCK_S)
                mask_s = columns < span_rows.num_spans
                sums = tl.zeros([BLOCK_S], tl.float32)
                for split in range(0, num_splits):
                    weight = tl.exp(tl.load(partial_lse_ptr + split * num_queries + row) - stable)
                    pointers = partial_marginals_ptr + split * stride + r + columns
                    sums += weight * tl.load(pointers, mask=mask_s, other=0.0)
                tl.store(marginals_ptr + r + columns, sums * inverse, mask=mask_s)
