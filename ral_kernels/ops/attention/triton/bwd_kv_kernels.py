"""The backward Triton kernels of `attention` for delta, dk and dv; bwd_q_kernels.py has dq.

Comments cite the equations of README.md. Each gradient is summed inside one program, in a fixed
order: no atomics.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from ral_kernels.runtime.triton_spans import NO_SPAN

from .marginals import shares
from .scores import (
    add_product,
    backward_lse_log2,
    block_number,
    block_ranges,
    dot_rows,
    exist,
    in_window,
    length_of,
    load_rows,
    locate,
    scores,
    store_rows,
)


@triton.jit
def attention_bwd_delta_kernel(
    out_ptr,
    marginals_ptr,
    lse_ptr,
    dout_ptr,
    dmarginals_ptr,
    dlse_ptr,
    delta_ptr,
    out_stride_b,
    out_stride_h,
    out_stride_t,
    dout_stride_b,
    dout_stride_h,
    dout_stride_t,
    num_heads,
    seqlen_q,
    num_spans,
    row_start,
    row_stop,
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
    if dout_ptr is not None:
        # [BLOCK_Q, BLOCK_DV]
        dout = load_rows(
            dout_ptr + b * dout_stride_b + h * dout_stride_h, tokens, dout_stride_t, mask_q,
            HEAD_DIM_V, BLOCK_DV,
        )  # fmt: skip
        out = load_rows(
            out_ptr + b * out_stride_b + h * out_stride_h, tokens, out_stride_t, mask_q,
            HEAD_DIM_V, BLOCK_DV,
        )  # fmt: skip
        delta += tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    if dmarginals_ptr is not None:
        mask_rows = mask_q & (tokens >= row_start) & (tokens < row_stop)
        rows = (bh * (row_stop - row_start) + tokens - row_start) * num_spans
        for start in range(0, num_spans, BLOCK_S):
            columns = start + tl.arange(0, BLOCK_S)
            offsets = rows[:, None] + columns[None, :]
            mask = mask_rows[:, None] & (columns < num_spans)[None, :]
            # [BLOCK_Q, BLOCK_S]
            dm = tl.load(dmarginals_ptr + offsets, mask=mask, other=0.0)
            delta += tl.sum(dm * tl.load(marginals_ptr + offsets, mask=mask, other=0.0), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + bh * seqlen_q + tokens, mask=mask_q, other=0.0)
    tl.store(delta_ptr + bh * seqlen_q + tokens, delta, mask=tokens < seqlen_q)


@triton.jit
def score_gradient(
    dot,  # q kᵀ
    dp,
    bias,
    lse_log2,
    delta,
    q_positions,
    k_positions,
    k_tokens,
    mask_q,
    mask_k,
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
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BOOL_MASK: tl.constexpr,
    IS_EDGE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Equations (5) and (11): p, ds and the derivative of the soft cap."""
    HAS_MASK: tl.constexpr = attn_mask_ptr is not None or key_padding_mask_ptr is not None
    if HAS_MASK or HAS_CAP or HAS_BIAS:
        s, dcap = scores(
            dot, bias, q_positions, k_positions, k_tokens, mask_q, mask_k, attn_mask_ptr,
            attn_mask_rows, attn_mask_stride_n, key_padding_mask_ptr, key_padding_mask_stride_n,
            diagonal, window_left, window_right, scale, cap, HAS_BIAS, HAS_CAP, HAS_LEFT,
            HAS_RIGHT, BOOL_MASK, IS_EDGE, TRANSPOSED,
        )  # fmt: skip
        # s <= lse, but not by much where a mask of finfo.min has rounded both.
        p = tl.exp2(tl.minimum(s - lse_log2, 0.0))
    else:
        dcap = 1.0
        if IS_EDGE:
            visible = in_window(
                q_positions, k_positions, mask_k, diagonal, window_left, window_right, HAS_LEFT,
                HAS_RIGHT, TRANSPOSED,
            )  # fmt: skip
            dot = tl.where(visible, dot, float("-inf"))
        p = tl.exp2(dot * scale - lse_log2)
    # A weight of exactly 0 is a constant: 0 · (inf or NaN) must not get through.
    ds = tl.where(p == 0.0, 0.0, p * (dp - delta))
    return p, ds, dcap


@triton.jit
def add_key_gradients(
    dk,
    dv,
    k,
    k_ptr,
    k_stride_n,
    v,
    v_ptr,
    v_stride_n,
    first,
    num_blocks,
    num_left,
    gap,
    q_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    q_stride_t,
    dout_stride_t,
    q_start,
    length_q,
    k_positions,
    k_tokens,
    mask_k,
    kind,
    local_ptr,
    ids_ptr,
    count_ptr,
    dmarginals_ptr,
    num_spans,
    row_start,
    row_stop,
    span_bias_ptr,
    span_bias_stride_t,
    span_bias_stride_s,
    attn_mask_ptr,
    attn_mask_stride_t,
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
    """Query blocks of one head, as in fwd_kernels.py. Tiles are [BLOCK_K, BLOCK_Q]: pᵀ, dsᵀ."""
    HAS_BIAS: tl.constexpr = span_bias_ptr is not None
    for i in range(0, num_blocks):
        block = block_number(i, first, num_left, gap, IS_EDGE)
        q_positions = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
        q_tokens = q_start + q_positions
        mask_q = exist(q_positions, length_q, IS_EDGE)
        # [BLOCK_Q, BLOCK_D]
        q = load_rows(q_ptr, q_tokens, q_stride_t, mask_q, HEAD_DIM, PART_D)
        # [BLOCK_Q]
        lse = tl.load(lse_ptr + q_tokens, mask=mask_q, other=float("-inf"))
        delta = tl.load(delta_ptr + q_tokens, mask=mask_q, other=0.0)
        dp = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
        if dmarginals_ptr is not None:  # (9)
            mask_rows = mask_q & (q_tokens >= row_start) & (q_tokens < row_stop)
            dp = shares(
                kind, dmarginals_ptr, q_tokens.to(tl.int64) * num_spans, 1, mask_rows, local_ptr,
                ids_ptr, count_ptr, mask_k, BLOCK_Q, BLOCK_K, TERMS, True, False,
            )  # fmt: skip
        bias = 0.0
        if HAS_BIAS:
            bias = shares(
                kind, span_bias_ptr, q_tokens.to(tl.int64) * span_bias_stride_t,
                span_bias_stride_s, mask_q, local_ptr, ids_ptr, count_ptr, mask_k, BLOCK_Q,
                BLOCK_K, 3, True, True,
            )  # fmt: skip
        dot = dot_rows(
            tl.zeros([BLOCK_K, BLOCK_Q], tl.float32), k, k_ptr, k_tokens, k_stride_n, mask_k, q,
            q_ptr, q_tokens, q_stride_t, mask_q, HEAD_DIM, PART_D, INPUT_PRECISION,
        )  # fmt: skip
        if dout_ptr is not None:
            # [BLOCK_Q, BLOCK_DV]
            dout = load_rows(dout_ptr, q_tokens, dout_stride_t, mask_q, HEAD_DIM_V, PART_DV)
            dp = dot_rows(  # (9)
                dp, v, v_ptr, k_tokens, v_stride_n, mask_k, dout, dout_ptr, q_tokens,
                dout_stride_t, mask_q, HEAD_DIM_V, PART_DV, INPUT_PRECISION,
            )  # fmt: skip
        p, ds, dcap = score_gradient(
            dot, dp, bias, backward_lse_log2(lse)[None, :], delta[None, :], q_positions,
            k_positions, k_tokens, mask_q, mask_k, attn_mask_ptr,
            q_tokens.to(tl.int64) * attn_mask_stride_t, attn_mask_stride_n, key_padding_mask_ptr,
            key_padding_mask_stride_n, diagonal, window_left, window_right, scale, cap, HAS_BIAS,
            HAS_CAP, HAS_LEFT, HAS_RIGHT, BOOL_MASK, IS_EDGE, True,
        )  # fmt: skip
        if dout_ptr is not None:
            dv = add_product(  # (8)
                dv, p, dout, dout_ptr, q_tokens, dout_stride_t, mask_q, HEAD_DIM_V, BLOCK_DV,
                PART_DV, INPUT_PRECISION,
            )  # fmt: skip
        dx = ds * dcap  # (13)
        dk = add_product(  # (15)
            dk, dx, q, q_ptr, q_tokens, q_stride_t, mask_q, HEAD_DIM, BLOCK_D, PART_D,
            INPUT_PRECISION,
        )  # fmt: skip
    return dk, dv


@triton.jit
def attention_bwd_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    dout_ptr,
    dmarginals_ptr,
    dk_ptr,
    dv_ptr,
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
    dk_stride_b,
    dk_stride_h,
    dk_stride_n,
    dv_stride_b,
    dv_stride_h,
    dv_stride_n,
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
    num_k_blocks,
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
    """One program: BLOCK_K keys of a kv head, over all queries of the heads that read it."""
    pid = tl.program_id(0)
    k_block = pid % num_k_blocks
    pid = pid // num_k_blocks
    kv_head = (pid % num_kv_heads).to(tl.int64)
    b = (pid // num_kv_heads).to(tl.int64)
    sequence, k_start, length_k, block = locate(
        cu_seqlens_k_ptr, num_sequences, seqlen_k, k_block, BLOCK_K
    )
    q_start, length_q = length_of(cu_seqlens_q_ptr, sequence, seqlen_q)
    if block * BLOCK_K >= length_k:
        return

    k_positions = block * BLOCK_K + tl.arange(0, BLOCK_K)
    k_tokens = k_start + k_positions
    mask_k = k_positions < length_k
    # [BLOCK_K, BLOCK_D]
    k_ptr += b * k_stride_b + kv_head * k_stride_h
    k = load_rows(k_ptr, k_tokens, k_stride_n, mask_k, HEAD_DIM, PART_D)
    # [BLOCK_K, BLOCK_DV]
    v_ptr += b * v_stride_b + kv_head * v_stride_h
    v = load_rows(v_ptr, k_tokens, v_stride_n, mask_k, HEAD_DIM_V, PART_DV)
    kind = NO_SPAN
    if kinds_ptr is not None:
        kind = tl.load(kinds_ptr + b * kinds_stride_b + k_block)
        counts_ptr += b * kinds_stride_b + k_block
        ids_ptr += (b * kinds_stride_b + k_block) * BLOCK_K
        local_ptr += b * local_stride_b + k_start + block * BLOCK_K
    if key_padding_mask_ptr is not None:
        key_padding_mask_ptr += b * key_padding_mask_stride_b

    # Which queries see some of the keys, and which of these see all of them?
    diagonal = 0 if TOP_LEFT else length_k - length_q
    low, full_low = 0, 0
    high, full_high = length_q, length_q
    first_key = block * BLOCK_K - diagonal
    last_key = tl.minimum(block * BLOCK_K + BLOCK_K, length_k) - 1 - diagonal
    if HAS_RIGHT:
        low, full_low = first_key - window_right, last_key - window_right
    if HAS_LEFT:
        high = tl.minimum(length_q, last_key + window_left + 1)
        full_high = tl.minimum(length_q, first_key + window_left + 1)
    first, first_full, last_full, last = block_ranges(low, high, full_low, full_high, BLOCK_Q)

    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)
    group = num_heads // num_kv_heads
    num_full = last_full - first_full
    for member in range(0, group):
        h = kv_head * group + member
        rows = (b * num_heads + h) * seqlen_q
        head_q_ptr = q_ptr + b * q_stride_b + h * q_stride_h
        head_dout_ptr = dout_ptr
        if dout_ptr is not None:
            head_dout_ptr = dout_ptr + b * dout_stride_b + h * dout_stride_h
        head_dmarginals_ptr = dmarginals_ptr
        if dmarginals_ptr is not None:
            first_row = (b * num_heads + h) * (row_stop - row_start) - row_start
            head_dmarginals_ptr = dmarginals_ptr + first_row * num_spans
        head_bias_ptr = span_bias_ptr
        if span_bias_ptr is not None:
            head_bias_ptr = span_bias_ptr + b * span_bias_stride_b + h * span_bias_stride_h
        head_mask_ptr = attn_mask_ptr
        if attn_mask_ptr is not None:
            head_mask_ptr = attn_mask_ptr + b * attn_mask_stride_b + h * attn_mask_stride_h
        for IS_EDGE in tl.static_range(2):
            dk, dv = add_key_gradients(
                dk, dv, k, k_ptr, k_stride_n, v, v_ptr, v_stride_n,
                first if IS_EDGE else first_full,
                last - first - num_full if IS_EDGE else num_full, first_full - first, num_full,
                head_q_ptr, head_dout_ptr, lse_ptr + rows, delta_ptr + rows, q_stride_t,
                dout_stride_t, q_start, length_q, k_positions, k_tokens, mask_k, kind, local_ptr,
                ids_ptr, counts_ptr, head_dmarginals_ptr, num_spans, row_start, row_stop,
                head_bias_ptr, span_bias_stride_t, span_bias_stride_s, head_mask_ptr,
                attn_mask_stride_t, attn_mask_stride_n, key_padding_mask_ptr,
                key_padding_mask_stride_n, diagonal, window_left, window_right, scale, cap,
                HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, PART_D, PART_DV, BLOCK_Q, BLOCK_K, HAS_CAP,
                HAS_LEFT, HAS_RIGHT, BOOL_MASK, INPUT_PRECISION, TERMS, IS_EDGE,
            )  # fmt: skip

    dk_ptr += b * dk_stride_b + kv_head * dk_stride_h
    store_rows(dk_ptr, k_tokens, dk_stride_n, mask_k, dk * tau, HEAD_DIM, BLOCK_D)
    if dout_ptr is not None:
        dv_ptr += b * dv_stride_b + kv_head * dv_stride_h
        store_rows(dv_ptr, k_tokens, dv_stride_n, mask_k, dv, HEAD_DIM_V, BLOCK_DV)
