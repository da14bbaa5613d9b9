"""The backward Triton kernel of `attention` for dq and dspan_bias (equations: README.md)."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from ....runtime.triton_blocks import block_number, block_ranges
from ....runtime.triton_rows import head_of, store_rows
from ....runtime.triton_spans import MIXED, NO_SPAN, span_block_ranges
from .bwd_kv_kernels import weights_and_gradient
from .marginals import (
    Sums,
    add_mixed_block,
    add_mixed_shares,
    bias_of_tile,
    correct_rows,
    entry_of,
    here,
    leave_span,
    moved_spans,
    opaque_zero,
    uniform_shares,
)
from .scores import (
    EDGE,
    SHORT,
    Keys,
    Place,
    add_weighted_rows,
    blocks_of_keys,
    dot_rows,
    keys_of_block,
    length_of,
    locate,
    masks_of_rows,
    real_keys,
    row_tile,
    spans_of_keys,
)


@triton.jit
def add_query_gradients(
    state,  # dq, run, run of weights, excess of the sum of ds over dlse, run_kind
    blocks,
    q,
    dout,
    q_positions,
    lse_log2,
    delta,
    keys,
    diagonal,
    HAS_SPANS: tl.constexpr,
    HAS_SHORT: tl.constexpr,
    HAS_DOUT: tl.constexpr,
    dmarginals_ptr,
    mask_rows,
    dspan_bias,
    weights,
    span_bias_rows,
    masks,
    head_masks,
    score,
    tile,
    IS_EDGE: tl.constexpr,
    IS_SHORT: tl.constexpr,
):
    """The key blocks of one loop, as in fwd_kernels.py."""
    MAY_MIX: tl.constexpr = IS_EDGE or IS_SHORT
    HAS_LEFT: tl.constexpr = masks.window.HAS_LEFT
    dq, run, run_of_weights, excess, run_kind = state
    dmarginals_rows = q_positions.to(tl.int64) * dspan_bias.num_spans
    if IS_SHORT and dspan_bias.ptr is not None:
        leave_span(dspan_bias, run_kind, run, True)
        leave_span(weights, run_kind, run_of_weights, True)
        run = tl.zeros_like(run)
        run_of_weights = tl.zeros_like(run)
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
        if dspan_bias.ptr is not None and not IS_SHORT:  # noqa: SIM102 (known when compiled)
            if kind != run_kind:
                leave_span(dspan_bias, run_kind, run, IS_EDGE)
                leave_span(weights, run_kind, run_of_weights, IS_EDGE)
                run = tl.zeros_like(run)
                run_of_weights = tl.zeros_like(run)
                run_kind = kind
        # 0 · NaN is NaN: padding keys are not read.
        real = real_keys(masks, head_masks.padding_ptr, k_tokens, mask_k)
        dp = tl.zeros([tile.BLOCK_Q, tile.BLOCK_K], tl.float32)
        delta_m = delta[:, None]  # δ without the gradient of the marginal
        if dmarginals_ptr is not None:  # (9)
            if not IS_SHORT:
                delta_m -= uniform_shares(
                    (kind,), dmarginals_ptr, dmarginals_rows, 1, mask_rows, tile.BLOCK_K,
                    tile.BLOCK_K, False, False,
                )  # fmt: skip
            if MAY_MIX:
                dp = add_mixed_shares(
                    dp, kind, block_spans, dmarginals_ptr, dmarginals_rows, 1, mask_rows,
                    tile.BLOCK_K, tile.TERMS, False,
                )  # fmt: skip
        bias = 0.0
        if masks.span_bias is not None:
            bias = bias_of_tile(
                kind, block_spans, masks.span_bias.ptr, span_bias_rows, masks.span_bias.stride_s,
                q.mask, tile.BLOCK_K, MAY_MIX,
            )  # fmt: skip
        # [BLOCK_K, BLOCK_D]
        k = row_tile(k_head, rows, real, tile.HEAD_DIM, tile.PART_D)
        dot = tl.zeros([tile.BLOCK_Q, tile.BLOCK_K], tl.float32)
        dot = dot_rows(dot, q, k, tile.HEAD_DIM, tile.PART_D, tile.PRECISION)
        if HAS_DOUT:
            # [BLOCK_K, BLOCK_DV]
            v = row_tile(v_head, rows, real, tile.HEAD_DIM_V, tile.PART_DV)
            dp = dot_rows(dp, dout, v, tile.HEAD_DIM_V, tile.PART_DV, tile.PRECISION)  # (9)
        p, ds, dcap = weights_and_gradient(
            dot, dp, bias, lse_log2[:, None], delta_m, place, masks, head_masks,
            score, IS_EDGE, False,
        )  # fmt: skip
        dx = ds * dcap  # (13)
        dq = add_weighted_rows(  # (14)
            dq, dx, k, tile.HEAD_DIM, tile.BLOCK_D, tile.PART_D, tile.PRECISION
        )

        if dspan_bias.ptr is not None:  # (12)
            sum_of_block = tl.sum(ds, 1)
            excess += sum_of_block
            if not IS_SHORT:
                run += sum_of_block
                run_of_weights += tl.sum(p, 1)
            if MAY_MIX:  # noqa: SIM102 (known when compiled; the next is not)
                if IS_SHORT or kind == MIXED:
                    one = tl.full([tile.BLOCK_Q], 1.0, tl.float32)
                    add_mixed_block(dspan_bias, ds, one, block_spans, tile.BLOCK_K, tile.TERMS)
                    add_mixed_block(weights, p, one, block_spans, tile.BLOCK_K, tile.TERMS)
        # One block ahead: nothing waits for this load.
        next_block = block_number(i + 1, blocks, IS_EDGE, HAS_SPANS, HAS_SHORT, HAS_LEFT)
        kind, first_key = entry_of(keys.spans, next_block, HAS_SPANS)
    return dq, run, run_of_weights, excess, run_kind


@triton.jit
def attention_bwd_dq_kernel(
    q,
    k,
    v,
    dout,
    terms,
    dmarginals_ptr,
    dq,
    dspan_bias_ptr,
    weights_ptr,  # [B, H, T, S], sums of p over spans, with dspan_bias
    dlse_ptr,
    spans,
    masks,
    packed,
    sizes,
    num_q_blocks,
    span_rows,
    score,
    tile,
):
    """One program: BLOCK_Q queries of one head, over all keys that they see."""
    pid = tl.program_id(0)
    block = num_q_blocks - 1 - pid % num_q_blocks  # causal rows at the end have the most keys
    pid = pid // num_q_blocks
    h = (pid % sizes.num_heads).to(tl.int64)
    b = (pid // sizes.num_heads).to(tl.int64)
    sequence, q_start, length_q, block = locate(
        packed.cu_seqlens_q_ptr, packed.num_sequences, sizes.seqlen_q, block, tile.BLOCK_Q
    )
    k_start, length_k = length_of(packed.cu_seqlens_k_ptr, sequence, sizes.seqlen_k)
    if block * tile.BLOCK_Q >= length_q:
        return

    q_positions = block * tile.BLOCK_Q + tl.arange(0, tile.BLOCK_Q)
    mask_q = q_positions < length_q
    q_tokens = q_start + q_positions
    rows = (b * sizes.num_heads + h) * sizes.seqlen_q + q_tokens
    row_ptr = terms.ptr + (b * sizes.num_heads + h) * terms.stride_h + q_tokens
    # [BLOCK_Q]
    lse_log2 = tl.load(row_ptr, mask=mask_q, other=float("inf"))
    delta = tl.load(row_ptr + sizes.seqlen_q, mask=mask_q, other=0.0)
    # [BLOCK_Q, BLOCK_D], [BLOCK_Q, BLOCK_DV]
    q_tile = row_tile(head_of(q, b, h), q_tokens, mask_q, tile.HEAD_DIM, tile.PART_D)
    dout_tile = q_tile
    if dout is not None:
        dout_tile = row_tile(head_of(dout, b, h), q_tokens, mask_q, tile.HEAD_DIM_V, tile.PART_DV)

    diagonal = 0 if masks.window.TOP_LEFT else length_k - length_q
    low, full_low = 0, 0
    high, full_high = length_k, length_k
    first_row = block * tile.BLOCK_Q + diagonal
    last_row = tl.minimum(block * tile.BLOCK_Q + tile.BLOCK_Q, length_q) - 1 + diagonal
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

    kv_head = h // (sizes.num_heads // sizes.num_kv_heads)
    IS_PACKED: tl.constexpr = packed.cu_seqlens_k_ptr is not None
    keys = Keys(
        head_of(k, b, kv_head), head_of(v, b, kv_head), 0, 0, k_start, length_k,
        spans_of_keys(spans, b, sequence, k_start, IS_PACKED, tile.BLOCK_K),
    )  # fmt: skip
    num_spans = span_rows.num_spans
    mask_rows = mask_q
    if dmarginals_ptr is not None:
        mask_rows = mask_q & (q_tokens >= span_rows.start) & (q_tokens < span_rows.stop)
        num_rows = span_rows.stop - span_rows.start
        first_row = (b * sizes.num_heads + h) * num_rows + q_start - span_rows.start
        dmarginals_ptr += first_row * num_spans
    if dspan_bias_ptr is not None:
        first_row = (b * sizes.num_heads + h) * sizes.seqlen_q + q_start + block * tile.BLOCK_Q
        dspan_bias_ptr += first_row * num_spans
        weights_ptr += first_row * num_spans
    rows_of_program = tl.arange(0, tile.BLOCK_Q)
    dspan_bias = Sums(dspan_bias_ptr, rows_of_program, mask_q, num_spans)
    weights = Sums(weights_ptr, rows_of_program, mask_q, num_spans)
    span_bias_rows = rows
    if masks.span_bias is not None:
        span_bias_rows = h * masks.span_bias.stride_h
        span_bias_rows += q_tokens.to(tl.int64) * masks.span_bias.stride_t
        span_bias_rows += b * masks.span_bias.stride_b
    head_masks = masks_of_rows(masks, b, h, q_tokens)

    dq_sum = tl.zeros([tile.BLOCK_Q, tile.BLOCK_D], tl.float32)
    run = tl.zeros([tile.BLOCK_Q], tl.float32)
    run_kind = ranges.whole.first * 0 + NO_SPAN
    excess = run
    if dlse_ptr is not None:
        excess -= tl.load(dlse_ptr + rows, mask=mask_q, other=0.0)
    state = dq_sum, run, run, excess, run_kind
    for LOOP in tl.static_range(3):
        if LOOP != SHORT or HAS_SHORT:
            state = add_query_gradients(
                state, blocks_of_keys(ranges, masks, LOOP, HAS_SHORT), q_tile, dout_tile,
                q_positions, lse_log2, delta, keys, diagonal, HAS_SPANS, HAS_SHORT,
                dout is not None, dmarginals_ptr, mask_rows, dspan_bias, weights, span_bias_rows,
                masks, head_masks, score, tile, LOOP == EDGE, LOOP == SHORT,
            )  # fmt: skip
    dq_sum, run, run_of_weights, excess, run_kind = state
    if dspan_bias_ptr is not None:
        leave_span(dspan_bias, run_kind, run, True)
        leave_span(weights, run_kind, run_of_weights, True)
        correct_rows(dspan_bias, weights, excess)

    # Numbers of the program once more, which would take registers in the loops.
    pid = (tl.program_id(0) + opaque_zero(False)) // num_q_blocks
    h = (pid % sizes.num_heads).to(tl.int64)
    b = (pid // sizes.num_heads).to(tl.int64)
    store_rows(
        head_of(dq, b, h), q_tokens, mask_q, dq_sum * score.tau, 0, tile.HEAD_DIM, tile.BLOCK_D
    )
