"""Triton kernel of the backward of `policy`: dspan_bias."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from .gradient import add_per_span, load_outcomes, score_gradient
from .side import (
    SMALLEST_HEAD_WEIGHT_BWD,
    flagged,
    key_masks,
    key_range,
    load_rows,
    product_in_parts,
    scores,
    span_bias,
    weights,
)


@triton.jit(do_not_specialize=["num_rows", "query_start", "window_left", "window_right"])
def policy_bwd_dspan_bias_kernel(
    q_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_t,
    k_ptr,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    bias_ptr,
    bias_stride_b,
    bias_stride_h,
    bias_stride_t,
    bias_stride_s,
    span_ids_ptr,
    span_ids_stride_b,
    padding_ptr,
    padding_stride_b,
    scope_ptr,
    scope_stride_b,
    norm_ptr,
    norm_stride_i,
    norm_stride_b,
    norm_stride_h,
    factor_ptr,
    c_ptr,
    delta_ptr,
    dp_ptr,
    dp_stride_b,
    dp_stride_t,
    dspan_bias_ptr,
    num_heads,
    num_kv_heads,
    num_rows,
    seqlen_k,
    num_spans,
    query_start,
    window_left,
    window_right,
    score_factor,
    softcap_log2,
    head_dim: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """dspan_bias [B, H, T, S] of one head, BLOCK_Q rows and BLOCK_S spans: (13).

    Keys that no span of this program holds are passed over before their scores are formed.
    """
    row_blocks = tl.cdiv(num_rows, BLOCK_Q)
    span_blocks = tl.cdiv(num_spans, BLOCK_S)
    pid = tl.program_id(0)
    row_block = pid % row_blocks
    first_span = pid // row_blocks % span_blocks * BLOCK_S
    head = (pid // row_blocks // span_blocks % num_heads).to(tl.int64)
    b = (pid // row_blocks // span_blocks // num_heads).to(tl.int64)

    offs_q = row_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_s = first_span + tl.arange(0, BLOCK_S)
    mask_q = offs_q < num_rows
    q_ptr += b * q_stride_b + head * q_stride_h
    k_ptr += b * k_stride_b + head // (num_heads // num_kv_heads) * k_stride_h
    dp_ptr += b * dp_stride_b
    bias_ptr += b * bias_stride_b + head * bias_stride_h
    span_ids_ptr += b * span_ids_stride_b
    if padding_ptr is not None:
        padding_ptr += b * padding_stride_b
    if scope_ptr is not None:
        scope_ptr += b * scope_stride_b
    if BLOCK_D == HEAD_DIM:
        # [BLOCK_Q, HEAD_DIM]
        q = load_rows(q_ptr, q_stride_t, offs_q, mask_q, 0, head_dim, HEAD_DIM)
    norm_ptr += b * norm_stride_b + head * norm_stride_h + offs_q
    # [BLOCK_Q], each
    m = tl.load(norm_ptr, mask=mask_q, other=0.0)
    inverse = tl.load(norm_ptr + norm_stride_i, mask=mask_q, other=0.0)
    factor = tl.load(factor_ptr + b * num_rows + offs_q, mask=mask_q, other=0.0)
    c = tl.load(c_ptr + b * num_rows + offs_q, mask=mask_q, other=0.0)
    delta = tl.load(delta_ptr + (b * num_heads + head) * num_rows + offs_q, mask=mask_q, other=0.0)
    dbias = tl.zeros([BLOCK_Q, BLOCK_S], tl.float32)
    first = query_start + row_block * BLOCK_Q
    low, high = key_range(
        first, first + BLOCK_Q - 1, window_left, window_right, 0, seqlen_k, BLOCK_K
    )
    for key in range(low, high, BLOCK_K):
        offs_k = key + tl.arange(0, BLOCK_K)
        mask_k = flagged(padding_ptr, offs_k, offs_k < seqlen_k)
        # [BLOCK_K]
        span_k = tl.load(span_ids_ptr + offs_k, mask=mask_k, other=-1)
        held = (span_k >= first_span) & (span_k < first_span + BLOCK_S)
        if tl.max(held.to(tl.int32), 0) > 0:
            if BLOCK_D == HEAD_DIM:
                # [BLOCK_K, HEAD_DIM]
                k = load_rows(k_ptr, k_stride_n, offs_k, mask_k, 0, head_dim, HEAD_DIM)
                x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            else:
                x = product_in_parts(
                    q_ptr,
                    q_stride_t,
                    offs_q,
                    mask_q,
                    k_ptr,
                    k_stride_n,
                    None,
                    0,
                    0,
                    offs_k,
                    mask_k,
                    head_dim,
                    HEAD_DIM,
                    BLOCK_D,
                    PRECISION,
                    BLOCK_Q,
                    BLOCK_K,
                )
            s = scores(x, score_factor, softcap_log2, SOFTCAP)
            s += span_bias(
                bias_ptr, offs_q[:, None], bias_stride_t, span_k[None, :], bias_stride_s,
                mask_q[:, None],
            )  # fmt: skip
            visible, valid = key_masks(
                (query_start + offs_q)[:, None],
                offs_k[None, :],
                mask_k[None, :],
                flagged(scope_ptr, offs_k, mask_k)[None, :],
                window_left,
                window_right,
                EXCLUDE_SELF,
            )
            # [BLOCK_Q, BLOCK_K]
            dp = load_outcomes(
                dp_ptr, dp_stride_t, offs_q[:, None], span_k[None, :],
                valid & (factor != 0.0)[:, None],
            )  # fmt: skip
            p = weights(s, m[:, None], inverse[:, None], SMALLEST_HEAD_WEIGHT_BWD)
            ds = score_gradient(p, dp, visible, valid, factor[:, None], c[:, None], delta[:, None])
            one_hot = (span_k[:, None] == offs_s[None, :]).to(tl.float32)
            dbias = add_per_span(dbias, ds, one_hot)
    row = (b * num_heads + head) * num_rows + offs_q
    pointers = dspan_bias_ptr + row[:, None] * num_spans + offs_s[None, :]
    tl.store(pointers, dbias, mask=mask_q[:, None] & (offs_s < num_spans)[None, :])
