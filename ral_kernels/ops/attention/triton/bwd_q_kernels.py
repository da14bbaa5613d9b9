"""The backward Triton kernel of `attention` for dq and dspan_bias (equations: README.md)."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from ral_kernels.runtime.triton_spans import MIXED, NO_SPAN

from .bwd_kv_kernels import score_gradient
from .marginals import add_mixed_block, add_to_span, shares
from .scores import (
    add_product,
    backward_lse_log2,
    block_number,
    block_ranges,
    dot_rows,
    exist,
    length_of,
    load_rows,
    locate,
    store_rows,
)


@triton.jit
def add_query_gradients(
    state,  # dq, run, run_kind
    q,
    q_ptr,
    q_tokens,
    q_stride_t,
    dout,
    dout_ptr,
    dout_stride_t,
    lse_log2,
    delta,
    first,
    num_blocks,
    num_left,
    gap,
    k_ptr,
    v_ptr,
    k_stride_n,
    v_stride_n,
    k_start,
    seqlen_k,
    q_positions,
    mask_q,
    kinds_ptr,
    counts_ptr,
    ids_ptr,
    local_ptr,
    has_dout: tl.constexpr,
    dmarginals_ptr,
    mask_rows,
    dspan_bias_ptr,
    num_spans,
    span_bias_ptr,
    span_bias_rows,
    span_bias_stride_s,
    attn_mask_ptr,
    attn_mask_rows,
    attn_mask_stride_n,
    key_padding_mask_ptr,
    key_padding_mask_stride_n,
    diagonal,
    window_left,
    window_right,
    scale,
    cap,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PART_D: tl.constexpr,
    PART_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BOOL_MASK: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    TERMS: tl.constexpr,
    IS_EDGE: tl.constexpr,
):
    """Key blocks, as in fwd_kernels.py."""
    HAS_BIAS: tl.constexpr = span_bias_ptr is not None
    dq, run, run_kind = state
    for i in range(0, num_blocks):
        block = block_number(i, first, num_left, gap, IS_EDGE)
        k_positions = block * BLOCK_K + tl.arange(0, BLOCK_K)
        k_tokens = k_start + k_positions
        mask_k = exist(k_positions, seqlen_k, IS_EDGE)
        kind, block_local_ptr, block_ids_ptr, count_ptr = NO_SPAN, local_ptr, ids_ptr, counts_ptr
        if kinds_ptr is not None:
            kind = tl.load(kinds_ptr + block)
            block_local_ptr = local_ptr + k_start + block * BLOCK_K
            block_ids_ptr = ids_ptr + block * BLOCK_K
            count_ptr = counts_ptr + block
        mask_rows_k = mask_k
        if key_padding_mask_ptr is not None:
            # 0 · NaN is NaN: keys behind padding are not read.
            offsets = k_tokens.to(tl.int64) * key_padding_mask_stride_n
            padding = tl.load(key_padding_mask_ptr + offsets, mask=mask_k, other=0)
            mask_rows_k = mask_k & (padding != 0)
        dp = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
        if dmarginals_ptr is not None:  # (9)
            dp = shares(
                kind, dmarginals_ptr, q_positions.to(tl.int64) * num_spans, 1, mask_rows,
                block_local_ptr, block_ids_ptr, count_ptr, mask_k, BLOCK_Q, BLOCK_K, TERMS, False,
                False,
            )  # fmt: skip
        bias = 0.0
        if HAS_BIAS:
            bias = shares(
                kind, span_bias_ptr, span_bias_rows, span_bias_stride_s, mask_q, block_local_ptr,
                block_ids_ptr, count_ptr, mask_k, BLOCK_Q, BLOCK_K, 3, False, True,
            )  # fmt: skip
        # [BLOCK_K, BLOCK_D]
        k = load_rows(k_ptr, k_tokens, k_stride_n, mask_rows_k, HEAD_DIM, PART_D)
        dot = dot_rows(
            tl.zeros([BLOCK_Q, BLOCK_K], tl.float32), q, q_ptr, q_tokens, q_stride_t, mask_q, k,
            k_ptr, k_tokens, k_stride_n, mask_rows_k, HEAD_DIM, PART_D, INPUT_PRECISION,
        )  # fmt: skip
        if has_dout:
            # [BLOCK_K, BLOCK_DV]
            v = load_rows(v_ptr, k_tokens, v_stride_n, mask_k, HEAD_DIM_V, PART_DV)
            dp = dot_rows(  # (9)
                dp, dout, dout_ptr, q_tokens, dout_stride_t, mask_q, v, v_ptr, k_tokens,
                v_stride_n, mask_k, HEAD_DIM_V, PART_DV, INPUT_PRECISION,
            )  # fmt: skip
        _, ds, dcap = score_gradient(
            dot, dp, bias, lse_log2[:, None], delta[:, None], q_positions, k_positions, k_tokens,
            mask_q, mask_k, attn_mask_ptr, attn_mask_rows, attn_mask_stride_n,
            key_padding_mask_ptr, key_padding_mask_stride_n, diagonal, window_left, window_right,
            scale, cap, HAS_BIAS, HAS_CAP, HAS_LEFT, HAS_RIGHT, BOOL_MASK, IS_EDGE, False,
        )  # fmt: skip
        dx = ds * dcap  # (13)
        dq = add_product(  # (14)
            dq, dx, k, k_ptr, k_tokens, k_stride_n, mask_rows_k, HEAD_DIM, BLOCK_D, PART_D,
            INPUT_PRECISION,
        )  # fmt: skip

        if dspan_bias_ptr is not None:  # (12)
            if (kind != run_kind) | (kind == MIXED):
                if run_kind >= 0:
                    add_to_span(dspan_bias_ptr, q_positions, run_kind, run, mask_q, num_spans)
                if kind == MIXED:
                    add_mixed_block(
                        dspan_bias_ptr, q_positions, ds, tl.full([BLOCK_Q], 1.0, tl.float32),
                        mask_q, num_spans, block_local_ptr, block_ids_ptr,
                        tl.load(count_ptr), mask_k, BLOCK_K, TERMS,
                    )  # fmt: skip
                run = tl.zeros_like(run)
                run_kind = kind
            run += tl.sum(ds, 1)
    return dq, run, run_kind


@triton.jit
def attention_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    dout_ptr,
    dmarginals_ptr,
    dq_ptr,
    dspan_bias_ptr,
    kinds_ptr,
    counts_ptr,
    ids_ptr,
    local_ptr,
    span_bias_ptr,
    attn_mask_ptr,
    key_padding_mask_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_t,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    dout_stride_b,
    dout_stride_h,
    dout_stride_t,
    dq_stride_b,
    dq_stride_h,
    dq_stride_t,
    kinds_stride_b,
    local_stride_b,
    span_bias_stride_b,
    span_bias_stride_h,
    span_bias_stride_t,
    span_bias_stride_s,
    attn_mask_stride_b,
    attn_mask_stride_h,
    attn_mask_stride_t,
    attn_mask_stride_n,
    key_padding_mask_stride_b,
    key_padding_mask_stride_n,
    num_heads,
    num_kv_heads,
    seqlen_q,
    seqlen_k,
    num_sequences,
    num_q_blocks,
    num_spans,
    row_start,
    row_stop,
    window_left,
    window_right,
    tau,
    scale,
    cap,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PART_D: tl.constexpr,
    PART_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TOP_LEFT: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BOOL_MASK: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    TERMS: tl.constexpr,
):
    """One program: BLOCK_Q queries of one head, over all keys that they see."""
    pid = tl.program_id(0)
    block = num_q_blocks - 1 - pid % num_q_blocks  # causal rows at the end have the most keys
    pid = pid // num_q_blocks
    h = (pid % num_heads).to(tl.int64)
    b = (pid // num_heads).to(tl.int64)
    sequence, q_start, length_q, block = locate(
        cu_seqlens_q_ptr, num_sequences, seqlen_q, block, BLOCK_Q
    )
    k_start, length_k = length_of(cu_seqlens_k_ptr, sequence, seqlen_k)
    if block * BLOCK_Q >= length_q:
        return

    q_positions = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    mask_q = q_positions < length_q
    q_tokens = q_start + q_positions
    rows = (b * num_heads + h) * seqlen_q + q_tokens
    # [BLOCK_Q]
    lse = tl.load(lse_ptr + rows, mask=mask_q, other=float("-inf"))
    delta = tl.load(delta_ptr + rows, mask=mask_q, other=0.0)
    # [BLOCK_Q, BLOCK_D]
    q_ptr += b * q_stride_b + h * q_stride_h
    q = load_rows(q_ptr, q_tokens, q_stride_t, mask_q, HEAD_DIM, PART_D)
    dout = q
    if dout_ptr is not None:
        # [BLOCK_Q, BLOCK_DV]
        dout_ptr += b * dout_stride_b + h * dout_stride_h
        dout = load_rows(dout_ptr, q_tokens, dout_stride_t, mask_q, HEAD_DIM_V, PART_DV)

    diagonal = 0 if TOP_LEFT else length_k - length_q
    low, full_low = 0, 0
    high, full_high = length_k, length_k
    first_row = block * BLOCK_Q + diagonal
    last_row = tl.minimum(block * BLOCK_Q + BLOCK_Q, length_q) - 1 + diagonal
    if HAS_LEFT:
        low, full_low = first_row - window_left, last_row - window_left
    if HAS_RIGHT:
        high = tl.minimum(length_k, last_row + window_right + 1)
        full_high = tl.minimum(length_k, first_row + window_right + 1)
    first, first_full, last_full, last = block_ranges(low, high, full_low, full_high, BLOCK_K)

    kv_head = h // (num_heads // num_kv_heads)
    k_ptr += b * k_stride_b + kv_head * k_stride_h
    v_ptr += b * v_stride_b + kv_head * v_stride_h
    if kinds_ptr is not None:
        first_block = 0
        if cu_seqlens_k_ptr is not None:
            first_block = k_start // BLOCK_K + sequence
        kinds_ptr += b * kinds_stride_b + first_block
        counts_ptr += b * kinds_stride_b + first_block
        ids_ptr += (b * kinds_stride_b + first_block) * BLOCK_K
        local_ptr += b * local_stride_b
    mask_rows = mask_q
    if dmarginals_ptr is not None:
        mask_rows = mask_q & (q_tokens >= row_start) & (q_tokens < row_stop)
        first_row = (b * num_heads + h) * (row_stop - row_start) + q_start - row_start
        dmarginals_ptr += first_row * num_spans
    if dspan_bias_ptr is not None:
        dspan_bias_ptr += ((b * num_heads + h) * seqlen_q + q_start) * num_spans
    span_bias_rows = rows
    if span_bias_ptr is not None:
        span_bias_rows = h * span_bias_stride_h + q_tokens.to(tl.int64) * span_bias_stride_t
        span_bias_rows += b * span_bias_stride_b
    attn_mask_rows = rows
    if attn_mask_ptr is not None:
        attn_mask_rows = h * attn_mask_stride_h + q_tokens.to(tl.int64) * attn_mask_stride_t
        attn_mask_rows += b * attn_mask_stride_b
    if key_padding_mask_ptr is not None:
        key_padding_mask_ptr += b * key_padding_mask_stride_b

    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    run = tl.zeros([BLOCK_Q], tl.float32)
    run_kind = first * 0 + NO_SPAN
    state = dq, run, run_kind
    num_full = last_full - first_full
    for IS_EDGE in tl.static_range(2):
        state = add_query_gradients(
            state, q, q_ptr, q_tokens, q_stride_t, dout, dout_ptr, dout_stride_t,
            backward_lse_log2(lse), delta, first if IS_EDGE else first_full,
            last - first - num_full if IS_EDGE else num_full, first_full - first, num_full, k_ptr,
            v_ptr, k_stride_n, v_stride_n, k_start, length_k, q_positions, mask_q, kinds_ptr,
            counts_ptr, ids_ptr, local_ptr, dout_ptr is not None, dmarginals_ptr, mask_rows,
            dspan_bias_ptr, num_spans, span_bias_ptr, span_bias_rows, span_bias_stride_s,
            attn_mask_ptr, attn_mask_rows, attn_mask_stride_n, key_padding_mask_ptr,
            key_padding_mask_stride_n, diagonal, window_left, window_right, scale, cap, HEAD_DIM,
            HEAD_DIM_V, BLOCK_D, BLOCK_DV, PART_D, PART_DV, BLOCK_Q, BLOCK_K, HAS_CAP, HAS_LEFT,
            HAS_RIGHT, BOOL_MASK, INPUT_PRECISION, TERMS, IS_EDGE,
        )  # fmt: skip
    dq, run, run_kind = state
    if dspan_bias_ptr is not None:  # noqa: SIM102 (known when compiled; the next is not)
        if run_kind >= 0:
            add_to_span(dspan_bias_ptr, q_positions, run_kind, run, mask_q, num_spans)

    dq_ptr += b * dq_stride_b + h * dq_stride_h
    store_rows(dq_ptr, q_tokens, dq_stride_t, mask_q, dq * tau, HEAD_DIM, BLOCK_D)
