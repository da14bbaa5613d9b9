"""Triton kernels of the second pass of `policy`: p over keys, and its sums over spans."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from .gradient import add_per_span
from .side import flagged, key_masks, sum_of_weights


@triton.jit(do_not_specialize=["num_rows", "query_start", "window_left", "window_right"])
def policy_fwd_kernel(
    q_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_t,
    k_ptr,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    prefix_ptr,
    prefix_stride_b,
    prefix_stride_h,
    prefix_stride_n,
    prefix_index_ptr,
    prefix_length,
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
    z_ptr,
    z_stride_b,
    p_ptr,
    p_stride_b,
    p_stride_t,
    num_heads,
    num_kv_heads,
    num_rows,
    seqlen_k,
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
):
    """p of BLOCK_Q rows and BLOCK_K keys, all heads inside; 0 on keys that are not valid: (7)."""
    row_blocks = tl.cdiv(num_rows, BLOCK_Q)
    key_blocks = tl.cdiv(seqlen_k, BLOCK_K)
    pid = tl.program_id(0)
    row_block = pid % row_blocks
    key_block = pid // row_blocks % key_blocks
    b = (pid // row_blocks // key_blocks).to(tl.int64)

    offs_q = row_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_k = key_block * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_q = offs_q < num_rows
    span_k = offs_k
    if bias_ptr is not None:
        bias_ptr += b * bias_stride_b
        span_ids_ptr += b * span_ids_stride_b
        # [BLOCK_K]
        span_k = tl.load(span_ids_ptr + offs_k, mask=offs_k < seqlen_k, other=-1)
    if padding_ptr is not None:
        padding_ptr += b * padding_stride_b
    if scope_ptr is not None:
        scope_ptr += b * scope_stride_b
    mask_k = flagged(padding_ptr, offs_k, offs_k < seqlen_k)
    _, valid = key_masks(
        (query_start + offs_q)[:, None],
        offs_k[None, :],
        mask_k[None, :],
        flagged(scope_ptr, offs_k, mask_k)[None, :],
        window_left,
        window_right,
        EXCLUDE_SELF,
    )

    # A block without visible keys has no heads to walk over, and p = 0.
    nearest = key_block * BLOCK_K - (query_start + row_block * BLOCK_Q + BLOCK_Q - 1)
    farthest = nearest + BLOCK_Q - 1 + BLOCK_K - 1
    seen = (nearest <= window_right) & (farthest >= -window_left)
    if prefix_ptr is not None:
        prefix_ptr += tl.load(prefix_index_ptr + b) * prefix_stride_b
    total = sum_of_weights(
        q_ptr + b * q_stride_b,
        q_stride_h,
        q_stride_t,
        k_ptr + b * k_stride_b,
        k_stride_h,
        k_stride_n,
        prefix_ptr,
        prefix_stride_h,
        prefix_stride_n,
        prefix_length,
        bias_ptr,
        bias_stride_h,
        bias_stride_t,
        bias_stride_s,
        norm_ptr + b * norm_stride_b,
        norm_stride_i,
        norm_stride_h,
        tl.where(seen, num_kv_heads, 0),
        num_heads // num_kv_heads,
        offs_q,
        mask_q,
        offs_k,
        mask_k,
        span_k,
        score_factor,
        softcap_log2,
        head_dim,
        HEAD_DIM,
        BLOCK_D,
        SOFTCAP,
        PRECISION,
        BLOCK_Q,
        BLOCK_K,
    )
    # [BLOCK_Q]
    z = tl.load(z_ptr + b * z_stride_b + offs_q, mask=mask_q, other=0.0)
    share = tl.where(z == 0.0, 0.0, 1.0 / (tl.where(z == 0.0, 1.0, z) * num_heads))
    p = tl.where(valid, total * share[:, None], 0.0)  # (5), (7)
    p_ptr += b * p_stride_b
    pointers = p_ptr + offs_q.to(tl.int64)[:, None] * p_stride_t + offs_k[None, :]
    tl.store(pointers, p, mask=mask_q[:, None] & (offs_k < seqlen_k)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def policy_fwd_spans_kernel(
    p_keys_ptr,
    p_keys_stride_b,
    p_keys_stride_t,
    span_ids_ptr,
    span_ids_stride_b,
    p_ptr,
    p_stride_b,
    p_stride_t,
    num_rows,
    seqlen_k,
    num_spans,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """p of BLOCK_Q rows and BLOCK_S spans from p over keys, blocks of keys in order: (8).

    Keys that no span of this program holds are passed over: with contiguous spans each key is read
    once or twice, however many spans there are.
    """
    row_blocks = tl.cdiv(num_rows, BLOCK_Q)
    span_blocks = tl.cdiv(num_spans, BLOCK_S)
    pid = tl.program_id(0)
    offs_q = pid % row_blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_s = pid // row_blocks % span_blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    b = (pid // row_blocks // span_blocks).to(tl.int64)
    mask_q = offs_q < num_rows
    p_keys_ptr += b * p_keys_stride_b
    first_span = pid // row_blocks % span_blocks * BLOCK_S
    p = tl.zeros([BLOCK_Q, BLOCK_S], tl.float32)
    for key in range(0, seqlen_k, BLOCK_K):
        offs_k = key + tl.arange(0, BLOCK_K)
        # [BLOCK_K]
        span_k = tl.load(
            span_ids_ptr + b * span_ids_stride_b + offs_k, mask=offs_k < seqlen_k, other=-1
        )
        held = (span_k >= first_span) & (span_k < first_span + BLOCK_S)
        if tl.max(held.to(tl.int32), 0) > 0:
            # [BLOCK_Q, BLOCK_K]
            p_keys = tl.load(
                p_keys_ptr + offs_q.to(tl.int64)[:, None] * p_keys_stride_t + offs_k[None, :],
                mask=mask_q[:, None] & held[None, :],
                other=0.0,
            )
            one_hot = (span_k[:, None] == offs_s[None, :]).to(tl.float32)
            p = add_per_span(p, p_keys, one_hot)
    pointers = p_ptr + b * p_stride_b + offs_q.to(tl.int64)[:, None] * p_stride_t + offs_s[None, :]
    tl.store(pointers, p, mask=mask_q[:, None] & (offs_s < num_spans)[None, :])
