"""Triton kernels of the first pass of `policy`: each head's normaliser, and Z (README.md)."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ral_kernels.runtime.triton_softmax import stabiliser

from .side import (
    SMALLEST_WEIGHT,
    flagged,
    key_masks,
    key_range,
    load_keys,
    load_rows,
    product_in_parts,
    scores,
    span_bias,
)


@triton.jit(do_not_specialize=["num_rows", "query_start", "window_left", "window_right"])
def policy_statistics_kernel(
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
    partial_ptr,
    batch_size,
    num_heads,
    num_kv_heads,
    num_rows,
    seqlen_k,
    num_splits,
    keys_per_split,
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
    """Of one head, BLOCK_Q rows and a piece of the keys: m, Σ 2^(s − m), and that on valid keys.

    partial: [3, splits, B, H, T].
    """
    row_blocks = tl.cdiv(num_rows, BLOCK_Q)
    pid = tl.program_id(0)
    row_block = pid % row_blocks
    head = (pid // row_blocks % num_heads).to(tl.int64)
    b = (pid // row_blocks // num_heads % batch_size).to(tl.int64)
    split = pid // row_blocks // num_heads // batch_size
    kv_head = head // (num_heads // num_kv_heads)

    offs_q = row_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    mask_q = offs_q < num_rows
    position = query_start + offs_q
    q_ptr += b * q_stride_b + head * q_stride_h
    k_ptr += b * k_stride_b + kv_head * k_stride_h
    if prefix_ptr is not None:
        prefix_ptr += tl.load(prefix_index_ptr + b) * prefix_stride_b + kv_head * prefix_stride_h
    if bias_ptr is not None:
        bias_ptr += b * bias_stride_b + head * bias_stride_h
        span_ids_ptr += b * span_ids_stride_b
    if padding_ptr is not None:
        padding_ptr += b * padding_stride_b
    if scope_ptr is not None:
        scope_ptr += b * scope_stride_b

    if BLOCK_D == HEAD_DIM:
        # [BLOCK_Q, HEAD_DIM]
        q = load_rows(q_ptr, q_stride_t, offs_q, mask_q, 0, head_dim, HEAD_DIM)
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    w = tl.zeros([BLOCK_Q], tl.float32)
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
            k = load_keys(
                k_ptr,
                k_stride_n,
                prefix_ptr,
                prefix_stride_n,
                prefix_length,
                offs_k,
                mask_k,
                0,
                head_dim,
                HEAD_DIM,
            )
            x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        else:
            x = product_in_parts(
                q_ptr,
                q_stride_t,
                offs_q,
                mask_q,
                k_ptr,
                k_stride_n,
                prefix_ptr,
                prefix_stride_n,
                prefix_length,
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
        if bias_ptr is not None:
            # [BLOCK_K]
            span_k = tl.load(span_ids_ptr + offs_k, mask=mask_k, other=-1)
            s += span_bias(
                bias_ptr, offs_q[:, None], bias_stride_t, span_k[None, :], bias_stride_s,
                mask_q[:, None],
            )  # (2)  # fmt: skip
        visible, valid = key_masks(
            position[:, None],
            offs_k[None, :],
            mask_k[None, :],
            flagged(scope_ptr, offs_k, mask_k)[None, :],
            window_left,
            window_right,
            EXCLUDE_SELF,
        )
        s = tl.where(visible, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        subtracted = stabiliser(m_new)
        p = tl.exp2(s - subtracted[:, None])
        rescale = tl.exp2(m - subtracted)
        total = total * rescale + tl.sum(p, 1)
        w = w * rescale + tl.sum(tl.where(valid, p, 0.0), 1)
        m = m_new

    per_part = tl.cast(num_heads, tl.int64) * batch_size * num_rows
    partial_ptr += split * per_part + (b * num_heads + head) * num_rows + offs_q
    tl.store(partial_ptr, m, mask=mask_q)
    tl.store(partial_ptr + num_splits * per_part, total, mask=mask_q)
    tl.store(partial_ptr + 2 * num_splits * per_part, w, mask=mask_q)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def policy_normaliser_kernel(
    partial_ptr,
    norm_ptr,
    z_ptr,
    batch_size,
    num_heads,
    num_rows,
    num_splits,
    BLOCK_R: tl.constexpr,
):
    """Join the pieces of each head, then the heads, in order: norm [2, B, H, T], and Z: (3), (6).

    norm is m, 0 for a row that sees no key, and 1 / Σ 2^(s − m), 0 for such a row.
    """
    row_blocks = tl.cdiv(num_rows, BLOCK_R)
    b = (tl.program_id(0) // row_blocks).to(tl.int64)
    offs = tl.program_id(0) % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = offs < num_rows
    per_part = tl.cast(num_heads, tl.int64) * batch_size * num_rows
    all_w = tl.zeros([BLOCK_R], tl.float32)
    for head in range(num_heads):
        row = (b * num_heads + head) * num_rows + offs
        pointers = partial_ptr + row
        m = tl.full([BLOCK_R], float("-inf"), tl.float32)
        for _ in range(num_splits):
            # [BLOCK_R]
            m = tl.maximum(m, tl.load(pointers, mask=mask, other=float("-inf")))
            pointers += per_part
        m = stabiliser(m)
        total = tl.zeros([BLOCK_R], tl.float32)
        w = tl.zeros([BLOCK_R], tl.float32)
        pointers = partial_ptr + row
        for _ in range(num_splits):
            # [BLOCK_R], each
            rescale = tl.exp2(tl.load(pointers, mask=mask, other=float("-inf")) - m)
            part = tl.load(pointers + num_splits * per_part, mask=mask, other=0.0)
            part_w = tl.load(pointers + 2 * num_splits * per_part, mask=mask, other=0.0)
            total += part * rescale
            w += part_w * rescale
            pointers += per_part
        inverse = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
        all_w += w * inverse
        tl.store(norm_ptr + row, m, mask=mask)
        tl.store(norm_ptr + per_part + row, inverse, mask=mask)
    z = tl.where(all_w < SMALLEST_WEIGHT, 0.0, all_w / num_heads)
    tl.store(z_ptr + b * num_rows + offs, z, mask=mask)
