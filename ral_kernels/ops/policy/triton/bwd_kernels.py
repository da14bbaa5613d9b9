"""Triton kernels of the backward of `policy`: dq, dk and dspan_bias.

`policy_divergence` runs those of dq and dk too, with ∂D/∂p of some rows in place of dp.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from .gradient import add_product, load_outcomes, score_gradient, softcap_slope
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
def policy_bwd_dq_kernel(
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
    dq_ptr,
    dq_stride_s,
    dq_stride_b,
    dq_stride_h,
    dq_stride_t,
    batch_size,
    num_heads,
    num_kv_heads,
    num_rows,
    seqlen_k,
    keys_per_split,
    query_start,
    window_left,
    window_right,
    scale,
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
    """dq of one head, BLOCK_Q rows and BLOCK_D features, over all keys or a piece of them: (15)."""
    row_blocks = tl.cdiv(num_rows, BLOCK_Q)
    pid = tl.program_id(0)
    row_block = pid % row_blocks
    head = (pid // row_blocks % num_heads).to(tl.int64)
    b = (pid // row_blocks // num_heads % batch_size).to(tl.int64)
    split = pid // row_blocks // num_heads // batch_size
    first_d = tl.program_id(1) * BLOCK_D

    offs_q = row_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    mask_q = offs_q < num_rows
    q_ptr += b * q_stride_b + head * q_stride_h
    k_ptr += b * k_stride_b + head // (num_heads // num_kv_heads) * k_stride_h
    dp_ptr += b * dp_stride_b
    if bias_ptr is not None:
        bias_ptr += b * bias_stride_b + head * bias_stride_h
    if span_ids_ptr is not None:
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
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    first = query_start + row_block * BLOCK_Q
    start = split * keys_per_split
    low, high = key_range(
        first,
        first + BLOCK_Q - 1,
        window_left,
        window_right,
        start,
        tl.minimum(start + keys_per_split, seqlen_k),
        BLOCK_K,
    )
    for key in range(low, high, BLOCK_K):
        offs_k = key + tl.arange(0, BLOCK_K)
        mask_k = flagged(padding_ptr, offs_k, offs_k < seqlen_k)
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
        outcome = offs_k
        if span_ids_ptr is not None:
            # [BLOCK_K]
            outcome = tl.load(span_ids_ptr + offs_k, mask=mask_k, other=-1)
        biased = s
        if bias_ptr is not None:
            biased += span_bias(
                bias_ptr, offs_q[:, None], bias_stride_t, outcome[None, :], bias_stride_s,
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
            dp_ptr, dp_stride_t, offs_q[:, None], outcome[None, :],
            valid & (factor != 0.0)[:, None],
        )  # fmt: skip
        p = weights(biased, m[:, None], inverse[:, None], SMALLEST_HEAD_WEIGHT_BWD)
        ds = score_gradient(p, dp, visible, valid, factor[:, None], c[:, None], delta[:, None])
        if SOFTCAP:
            ds *= softcap_slope(s, softcap_log2)
        if BLOCK_D != HEAD_DIM:
            # [BLOCK_K, BLOCK_D]
            k = load_rows(k_ptr, k_stride_n, offs_k, mask_k, first_d, head_dim, BLOCK_D)
        dq = add_product(dq, ds, k, PRECISION)
    offs_d = first_d + tl.arange(0, BLOCK_D)
    dq_ptr += split.to(tl.int64) * dq_stride_s + b * dq_stride_b + head * dq_stride_h
    pointers = dq_ptr + offs_q.to(tl.int64)[:, None] * dq_stride_t + offs_d[None, :]
    mask = mask_q[:, None] & (offs_d < head_dim)[None, :]
    tl.store(pointers, (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def policy_bwd_dq_join_kernel(
    parts_ptr,
    dq_ptr,
    dq_stride_b,
    dq_stride_h,
    dq_stride_t,
    batch_size,
    num_heads,
    num_rows,
    num_splits,
    head_dim: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dq from the sums [splits, B, H, T, D] over pieces of the keys, in order."""
    row_blocks = tl.cdiv(num_rows, BLOCK_R)
    pid = tl.program_id(0)
    head = (pid // row_blocks % num_heads).to(tl.int64)
    b = (pid // row_blocks // num_heads).to(tl.int64)
    offs_q = pid % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, HEAD_DIM)
    mask = (offs_q < num_rows)[:, None] & (offs_d < head_dim)[None, :]
    row = (b * num_heads + head) * num_rows + offs_q
    parts_ptr += row[:, None] * head_dim + offs_d[None, :]
    dq = tl.zeros([BLOCK_R, HEAD_DIM], tl.float32)
    for _ in range(num_splits):
        # [BLOCK_R, HEAD_DIM]
        dq += tl.load(parts_ptr, mask=mask, other=0.0)
        parts_ptr += tl.cast(batch_size, tl.int64) * num_heads * num_rows * head_dim
    dq_ptr += b * dq_stride_b + head * dq_stride_h
    pointers = dq_ptr + offs_q.to(tl.int64)[:, None] * dq_stride_t + offs_d[None, :]
    tl.store(pointers, dq.to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "query_start", "window_left", "window_right"])
def policy_bwd_dk_kernel(
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
    before_ptr,
    dk_ptr,
    dk_stride_b,
    dk_stride_h,
    dk_stride_n,
    num_heads,
    num_kv_heads,
    num_rows,
    seqlen_k,
    query_start,
    window_left,
    window_right,
    scale,
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
    """dk of one kv head, BLOCK_K keys and BLOCK_D features, over all rows of a group's heads: (16).

    Tiles are [BLOCK_K, BLOCK_Q]. before: float32 [B, Hk, N, D], the sum over earlier rows, which
    this call continues; it may be dk.
    """
    key_blocks = tl.cdiv(seqlen_k, BLOCK_K)
    pid = tl.program_id(0)
    key_block = pid % key_blocks
    kv_head = (pid // key_blocks % num_kv_heads).to(tl.int64)
    b = (pid // key_blocks // num_kv_heads).to(tl.int64)
    group = num_heads // num_kv_heads

    first_key = key_block * BLOCK_K
    offs_k = first_key + tl.arange(0, BLOCK_K)
    first_d = tl.program_id(1) * BLOCK_D
    offs_d = first_d + tl.arange(0, BLOCK_D)
    dp_ptr += b * dp_stride_b
    if bias_ptr is not None:
        bias_ptr += b * bias_stride_b
    outcome = offs_k
    if span_ids_ptr is not None:
        # [BLOCK_K]
        outcome = tl.load(
            span_ids_ptr + b * span_ids_stride_b + offs_k, mask=offs_k < seqlen_k, other=-1
        )
    if padding_ptr is not None:
        padding_ptr += b * padding_stride_b
    if scope_ptr is not None:
        scope_ptr += b * scope_stride_b
    mask_k = flagged(padding_ptr, offs_k, offs_k < seqlen_k)
    in_scope = flagged(scope_ptr, offs_k, mask_k)
    k_ptr += b * k_stride_b + kv_head * k_stride_h
    if BLOCK_D == HEAD_DIM:
        # [BLOCK_K, HEAD_DIM]
        k = load_rows(k_ptr, k_stride_n, offs_k, mask_k, 0, head_dim, HEAD_DIM)
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    # Rows whose window reaches the block.
    low = tl.maximum(first_key - window_right - query_start, 0) // BLOCK_Q * BLOCK_Q
    high = tl.minimum(first_key + BLOCK_K + window_left - query_start, num_rows)
    for row in range(low, high, BLOCK_Q):
        offs_q = row + tl.arange(0, BLOCK_Q)
        mask_q = offs_q < num_rows
        # [BLOCK_Q], each
        factor = tl.load(factor_ptr + b * num_rows + offs_q, mask=mask_q, other=0.0)
        c = tl.load(c_ptr + b * num_rows + offs_q, mask=mask_q, other=0.0)
        visible, valid = key_masks(
            (query_start + offs_q)[None, :],
            offs_k[:, None],
            mask_k[:, None],
            in_scope[:, None],
            window_left,
            window_right,
            EXCLUDE_SELF,
        )
        # [BLOCK_K, BLOCK_Q]
        dp = load_outcomes(
            dp_ptr, dp_stride_t, offs_q[None, :], outcome[:, None],
            valid & (factor != 0.0)[None, :],
        )  # fmt: skip
        for i in range(group):
            head = kv_head * group + i
            q_head = q_ptr + b * q_stride_b + head * q_stride_h
            # [BLOCK_Q, BLOCK_D]
            q = load_rows(q_head, q_stride_t, offs_q, mask_q, first_d, head_dim, BLOCK_D)
            norm_head = norm_ptr + b * norm_stride_b + head * norm_stride_h + offs_q
            delta_head = delta_ptr + (b * num_heads + head) * num_rows + offs_q
            # [BLOCK_Q], each
            m = tl.load(norm_head, mask=mask_q, other=0.0)
            inverse = tl.load(norm_head + norm_stride_i, mask=mask_q, other=0.0)
            delta = tl.load(delta_head, mask=mask_q, other=0.0)
            if BLOCK_D == HEAD_DIM:
                x = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            else:
                x = product_in_parts(
                    k_ptr,
                    k_stride_n,
                    offs_k,
                    mask_k,
                    q_head,
                    q_stride_t,
                    None,
                    0,
                    0,
                    offs_q,
                    mask_q,
                    head_dim,
                    HEAD_DIM,
                    BLOCK_D,
                    PRECISION,
                    BLOCK_K,
                    BLOCK_Q,
                )
            s = scores(x, score_factor, softcap_log2, SOFTCAP)
            biased = s
            if bias_ptr is not None:
                biased += span_bias(
                    bias_ptr + head * bias_stride_h, offs_q[None, :], bias_stride_t,
                    outcome[:, None], bias_stride_s, mask_q[None, :],
                )  # fmt: skip
            p = weights(biased, m[None, :], inverse[None, :], SMALLEST_HEAD_WEIGHT_BWD)
            ds = score_gradient(p, dp, visible, valid, factor[None, :], c[None, :], delta[None, :])
            if SOFTCAP:
                ds *= softcap_slope(s, softcap_log2)
            dk = add_product(dk, ds, q, PRECISION)
    dk *= scale
    mask = (offs_k < seqlen_k)[:, None] & (offs_d < head_dim)[None, :]
    if before_ptr is not None:
        row = (b * num_kv_heads + kv_head) * seqlen_k + offs_k
        dk += tl.load(before_ptr + row[:, None] * head_dim + offs_d[None, :], mask=mask, other=0.0)
        # It may be what other threads of this program are about to overwrite.
        tl.debug_barrier()
    dk_ptr += b * dk_stride_b + kv_head * dk_stride_h
    pointers = dk_ptr + offs_k.to(tl.int64)[:, None] * dk_stride_n + offs_d[None, :]
    tl.store(pointers, dk.to(dk_ptr.dtype.element_ty), mask=mask)
