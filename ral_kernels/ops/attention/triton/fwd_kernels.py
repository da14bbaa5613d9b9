"""The forward Triton kernel of `attention`, and the one that combines splits over the keys.

Comments cite the equations of README.md.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from ral_kernels.runtime.triton_softmax import stabiliser
from ral_kernels.runtime.triton_spans import MIXED, NO_SPAN

from .marginals import (
    add_mixed_block,
    add_to_span,
    raised_reference,
    relative_weight,
    scale_rows,
    shares,
)
from .scores import (
    LN2,
    add_product,
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
def attend(
    state,  # acc, normaliser, m and, for the marginals, reference, run, run_kind
    q,
    q_ptr,
    q_rows,
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
    has_rows,
    marginals_ptr,
    marginals_rows,
    mask_rows,
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
    """`num_blocks` key blocks from `first` on: the loop of flash attention, and sums over spans.

    With IS_EDGE they need a mask, and the `gap` blocks behind the first `num_left` are left out.
    """
    HAS_BIAS: tl.constexpr = span_bias_ptr is not None
    HAS_MASK: tl.constexpr = attn_mask_ptr is not None or key_padding_mask_ptr is not None
    GENERAL: tl.constexpr = HAS_CAP or HAS_MASK or HAS_BIAS  # more than a scale and a window
    acc, normaliser, m, reference, run, run_kind = state
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
        bias = 0.0
        if HAS_BIAS:
            bias = shares(
                kind, span_bias_ptr, span_bias_rows, span_bias_stride_s, mask_q, block_local_ptr,
                block_ids_ptr, count_ptr, mask_k, BLOCK_Q, BLOCK_K, 3, False, True,
            )  # fmt: skip
        # [BLOCK_K, BLOCK_D]
        k = load_rows(k_ptr, k_tokens, k_stride_n, mask_k, HEAD_DIM, PART_D)
        dot = dot_rows(
            tl.zeros([BLOCK_Q, BLOCK_K], tl.float32), q, q_ptr, q_rows, 1, mask_q, k, k_ptr,
            k_tokens, k_stride_n, mask_k, HEAD_DIM, PART_D, INPUT_PRECISION,
        )  # fmt: skip
        if GENERAL:
            s, _ = scores(
                dot, bias, q_positions, k_positions, k_tokens, mask_q, mask_k, attn_mask_ptr,
                attn_mask_rows, attn_mask_stride_n, key_padding_mask_ptr,
                key_padding_mask_stride_n, diagonal, window_left, window_right, scale, cap,
                HAS_BIAS, HAS_CAP, HAS_LEFT, HAS_RIGHT, BOOL_MASK, IS_EDGE, False,
            )  # fmt: skip
            m_new = tl.maximum(m, tl.max(s, 1))
            stable = stabiliser(m_new)
            p = tl.exp2(s - stable[:, None])
        else:
            if IS_EDGE:
                visible = in_window(
                    q_positions, k_positions, mask_k, diagonal, window_left, window_right,
                    HAS_LEFT, HAS_RIGHT, False,
                )  # fmt: skip
                dot = tl.where(visible, dot, float("-inf"))
            # Scaling waits for the subtraction: one instruction.
            m_new = tl.maximum(m, tl.max(dot, 1) * scale)
            stable = stabiliser(m_new)
            p = tl.exp2(dot * scale - stable[:, None])
        alpha = tl.exp2(m - stable)
        row_sum = tl.sum(p, 1)
        normaliser = normaliser * alpha + row_sum
        m = m_new
        mask_v = mask_k
        if key_padding_mask_ptr is not None:
            # 0 · NaN is NaN: values behind padding are not read.
            offsets = k_tokens.to(tl.int64) * key_padding_mask_stride_n
            mask_v = mask_k & (tl.load(key_padding_mask_ptr + offsets, mask=mask_k, other=0) != 0)
        # [BLOCK_K, BLOCK_DV]
        v = load_rows(v_ptr, k_tokens, v_stride_n, mask_v, HEAD_DIM_V, PART_DV)
        acc = add_product(  # (6)
            acc * alpha[:, None], p, v, v_ptr, k_tokens, v_stride_n, mask_v, HEAD_DIM_V,
            BLOCK_DV, PART_DV, INPUT_PRECISION,
        )  # fmt: skip

        if marginals_ptr is not None:  # (7)
            run = run * alpha
            if has_rows & ((kind != run_kind) | (kind == MIXED)):
                reference = raised_reference(
                    reference, m, marginals_ptr, marginals_rows, mask_rows, num_spans
                )
                weight = relative_weight(reference, m)
                if run_kind >= 0:
                    add_to_span(
                        marginals_ptr, marginals_rows, run_kind, run * weight, mask_rows, num_spans
                    )
                if kind == MIXED:
                    add_mixed_block(
                        marginals_ptr, marginals_rows, p, weight, mask_rows, num_spans,
                        block_local_ptr, block_ids_ptr, tl.load(count_ptr), mask_k, BLOCK_K, TERMS,
                    )  # fmt: skip
                run = tl.zeros_like(run)
                run_kind = kind
            run += row_sum
    return acc, normaliser, m, reference, run, run_kind


@triton.jit
def attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # with splits: float32 and partial, as are lse and marginals
    lse_ptr,
    marginals_ptr,
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
    out_stride_split,
    out_stride_b,
    out_stride_h,
    out_stride_t,
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
    batch_size,
    num_heads,
    num_kv_heads,
    seqlen_q,
    seqlen_k,
    num_sequences,
    num_q_blocks,
    num_splits,
    num_spans,
    row_start,
    row_stop,
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
    GROUP: tl.constexpr,
    TOP_LEFT: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BOOL_MASK: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    TERMS: tl.constexpr,
):
    """One program: BLOCK_Q queries of a head, over the keys of one split.

    With GROUP > 1 (decoding) the rows are the GROUP heads of a kv head, token by token, so that K
    and V are read once for all of them.
    """
    pid = tl.program_id(0)
    # Causal rows at the end have the most keys: they start first.
    block = num_q_blocks - 1 - pid % num_q_blocks
    pid = pid // num_q_blocks
    programs_h = num_heads // GROUP
    h = (pid % programs_h).to(tl.int64)
    pid = pid // programs_h
    b = (pid % batch_size).to(tl.int64)
    split = (pid // batch_size).to(tl.int64)

    # Blocks count rows: BLOCK_Q // GROUP of them would not do for a group of 7, so packed
    # sequences are looked up in blocks of as many tokens as surely fit.
    TOKENS: tl.constexpr = BLOCK_Q // GROUP
    sequence, q_start, length_q, block = locate(
        cu_seqlens_q_ptr, num_sequences, seqlen_q, block, TOKENS
    )
    k_start, length_k = length_of(cu_seqlens_k_ptr, sequence, seqlen_k)
    if block * TOKENS >= length_q:
        return

    offs = tl.arange(0, BLOCK_Q)
    q_positions = block * TOKENS + offs // GROUP
    mask_q = (q_positions < length_q) & (offs < TOKENS * GROUP)
    q_tokens = q_start + q_positions
    heads = h * GROUP + offs % GROUP  # int64 [BLOCK_Q]
    kv_head = h * GROUP // (num_heads // num_kv_heads)

    # [BLOCK_Q, BLOCK_D]
    q_rows = b * q_stride_b + heads * q_stride_h + q_tokens.to(tl.int64) * q_stride_t
    q = load_rows(q_ptr, q_rows, 1, mask_q, HEAD_DIM, PART_D)

    # Which keys do the rows see, and which of these do all rows see?
    diagonal = 0 if TOP_LEFT else length_k - length_q
    low, full_low = 0, 0
    high, full_high = length_k, length_k
    first_row = block * TOKENS + diagonal
    last_row = tl.minimum(block * TOKENS + TOKENS, length_q) - 1 + diagonal
    if HAS_LEFT:
        low, full_low = first_row - window_left, last_row - window_left
    if HAS_RIGHT:
        high = tl.minimum(length_k, last_row + window_right + 1)
        full_high = tl.minimum(length_k, first_row + window_right + 1)
    first, first_full, last_full, last = block_ranges(low, high, full_low, full_high, BLOCK_K)
    blocks_per_split = tl.cdiv(last - first, num_splits)
    first = tl.minimum(first + split.to(tl.int32) * blocks_per_split, last)
    last = tl.minimum(first + blocks_per_split, last)
    first_full = tl.minimum(tl.maximum(first_full, first), last)
    last_full = tl.minimum(tl.maximum(last_full, first_full), last)

    k_ptr += b * k_stride_b + kv_head * k_stride_h
    v_ptr += b * v_stride_b + kv_head * v_stride_h
    has_rows = False
    mask_rows = mask_q
    marginals_rows = q_positions
    if kinds_ptr is not None:
        first_block = 0
        if cu_seqlens_k_ptr is not None:
            first_block = k_start // BLOCK_K + sequence
        kinds_ptr += b * kinds_stride_b + first_block
        counts_ptr += b * kinds_stride_b + first_block
        ids_ptr += (b * kinds_stride_b + first_block) * BLOCK_K
        local_ptr += b * local_stride_b
    if marginals_ptr is not None:
        mask_rows = mask_q & (q_tokens >= row_start) & (q_tokens < row_stop)
        has_rows = tl.max(mask_rows.to(tl.int32), 0) > 0
        num_rows = row_stop - row_start
        marginals_rows = offs % GROUP * num_rows + q_positions
        first_row_of_head = ((split * batch_size + b) * num_heads + h * GROUP) * num_rows
        marginals_ptr += (first_row_of_head + q_start - row_start) * num_spans
    span_bias_rows = heads
    if span_bias_ptr is not None:
        span_bias_rows = heads * span_bias_stride_h + q_tokens.to(tl.int64) * span_bias_stride_t
        span_bias_rows += b * span_bias_stride_b
    attn_mask_rows = heads
    if attn_mask_ptr is not None:
        attn_mask_rows = heads * attn_mask_stride_h + q_tokens.to(tl.int64) * attn_mask_stride_t
        attn_mask_rows += b * attn_mask_stride_b
    if key_padding_mask_ptr is not None:
        key_padding_mask_ptr += b * key_padding_mask_stride_b

    acc = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    normaliser = tl.zeros([BLOCK_Q], tl.float32)
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    run_kind = first * 0 + NO_SPAN
    state = acc, normaliser, m, m, normaliser, run_kind
    # Without masks first, then at the edges: a branch in one loop would cost registers.
    num_full = last_full - first_full
    for IS_EDGE in tl.static_range(2):
        state = attend(
            state, q, q_ptr, q_rows, first if IS_EDGE else first_full,
            last - first - num_full if IS_EDGE else num_full, first_full - first, num_full,
            k_ptr, v_ptr, k_stride_n, v_stride_n, k_start, length_k, q_positions, mask_q,
            kinds_ptr, counts_ptr, ids_ptr, local_ptr, has_rows, marginals_ptr, marginals_rows,
            mask_rows, num_spans, span_bias_ptr, span_bias_rows, span_bias_stride_s,
            attn_mask_ptr, attn_mask_rows, attn_mask_stride_n, key_padding_mask_ptr,
            key_padding_mask_stride_n, diagonal, window_left, window_right, scale, cap, HEAD_DIM,
            HEAD_DIM_V, BLOCK_D, BLOCK_DV, PART_D, PART_DV, BLOCK_Q, BLOCK_K, HAS_CAP, HAS_LEFT,
            HAS_RIGHT, BOOL_MASK, INPUT_PRECISION, TERMS, IS_EDGE,
        )  # fmt: skip
    acc, normaliser, m, reference, run, run_kind = state

    # A row that saw no key has normaliser = 0 and gives 0.
    inverse = tl.where(normaliser > 0, 1.0 / normaliser, 0.0)
    if marginals_ptr is not None:  # noqa: SIM102 (known when compiled; the next is not)
        if has_rows:
            reference = raised_reference(
                reference, m, marginals_ptr, marginals_rows, mask_rows, num_spans
            )
            if run_kind >= 0:
                weight = relative_weight(reference, m)
                add_to_span(
                    marginals_ptr, marginals_rows, run_kind, run * weight, mask_rows, num_spans
                )
            factor = tl.where(normaliser > 0, tl.exp2(reference - stabiliser(m)) * inverse, 0.0)
            scale_rows(marginals_ptr, marginals_rows, factor, mask_rows, num_spans)  # (7)

    lse = tl.where(normaliser > 0, (m + tl.log2(normaliser)) * LN2, float("-inf"))  # (4)
    lse_rows = ((split * batch_size + b) * num_heads + heads) * seqlen_q + q_tokens
    tl.store(lse_ptr + lse_rows, lse, mask=mask_q)
    out_rows = split * out_stride_split + b * out_stride_b + heads * out_stride_h
    out_rows += q_tokens.to(tl.int64) * out_stride_t
    out = acc * inverse[:, None]
    store_rows(out_ptr, out_rows, 1, mask_q, out, HEAD_DIM_V, BLOCK_DV)


@triton.jit
def attention_fwd_combine_kernel(
    partial_out_ptr,  # [splits, B, H, T, Dv]
    partial_lse_ptr,  # [splits, B, H, T]
    partial_marginals_ptr,  # [splits, B, H, R, S]
    out_ptr,
    lse_ptr,
    marginals_ptr,
    out_stride_b,
    out_stride_h,
    out_stride_t,
    batch_size,
    num_heads,
    seqlen_q,
    num_splits,
    num_spans,
    row_start,
    row_stop,
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
    out = tl.zeros([BLOCK_DV], tl.float32)
    for split in range(0, num_splits):
        at = split * num_queries + row
        weight = tl.exp(tl.load(partial_lse_ptr + at) - stable)
        partial = tl.load(partial_out_ptr + at * HEAD_DIM_V + offs_d, mask=mask_d, other=0.0)
        out += weight * partial
        total += weight
    inverse = tl.where(total > 0, 1.0 / total, 0.0)
    out_row = b * out_stride_b + h * out_stride_h + t * out_stride_t
    tl.store(out_ptr + out_row + offs_d, (out * inverse).to(out_ptr.dtype.element_ty), mask=mask_d)
    tl.store(lse_ptr + row, tl.where(total > 0, m + tl.log(total), float("-inf")))

    if marginals_ptr is not None:  # noqa: SIM102 (known when compiled; the next is not)
        if (t >= row_start) & (t < row_stop):
            num_rows = row_stop - row_start
            r = (row // seqlen_q * num_rows + t - row_start) * num_spans
            stride = (row * 0 + batch_size) * num_heads * num_rows * num_spans
            for start in range(0, num_spans, BLOCK_S):
                columns = start + tl.arange(0, BLOCK_S)
                mask_s = columns < num_spans
                sums = tl.zeros([BLOCK_S], tl.float32)
                for split in range(0, num_splits):
                    weight = tl.exp(tl.load(partial_lse_ptr + split * num_queries + row) - stable)
                    pointers = partial_marginals_ptr + split * stride + r + columns
                    sums += weight * tl.load(pointers, mask=mask_s, other=0.0)
                tl.store(marginals_ptr + r + columns, sums * inverse, mask=mask_s)
