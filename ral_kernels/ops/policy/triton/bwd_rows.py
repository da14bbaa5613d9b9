"""Triton kernels of the backward of `policy` that work out what each row and head needs: c, δ_h."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from .gradient import load_outcomes
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
def policy_bwd_sums_kernel(
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
    z_ptr,
    z_stride_b,
    dp_ptr,
    dp_stride_b,
    dp_stride_t,
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
    """U_h = Σ P_h dp and W_h = Σ P_h on valid keys, of BLOCK_Q rows and a piece of the keys.

    partial: [2, splits, B, H, T].
    """
    row_blocks = tl.cdiv(num_rows, BLOCK_Q)
    pid = tl.program_id(0)
    row_block = pid % row_blocks
    head = (pid // row_blocks % num_heads).to(tl.int64)
    b = (pid // row_blocks // num_heads % batch_size).to(tl.int64)
    split = pid // row_blocks // num_heads // batch_size

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
    z = tl.load(z_ptr + b * z_stride_b + offs_q, mask=mask_q, other=0.0)
    u = tl.zeros([BLOCK_Q], tl.float32)
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
        if bias_ptr is not None:
            s += span_bias(
                bias_ptr, offs_q[:, None], bias_stride_t, outcome[None, :], bias_stride_s,
                mask_q[:, None],
            )  # fmt: skip
        _, valid = key_masks(
            (query_start + offs_q)[:, None],
            offs_k[None, :],
            mask_k[None, :],
            flagged(scope_ptr, offs_k, mask_k)[None, :],
            window_left,
            window_right,
            EXCLUDE_SELF,
        )
        p = weights(s, m[:, None], inverse[:, None], SMALLEST_HEAD_WEIGHT_BWD)
        p = tl.where(valid & (z != 0.0)[:, None], p, 0.0)
        # [BLOCK_Q, BLOCK_K]
        dp = load_outcomes(dp_ptr, dp_stride_t, offs_q[:, None], outcome[None, :], p != 0.0)
        u += tl.sum(p * dp, 1)
        w += tl.sum(p, 1)

    per_part = tl.cast(num_heads, tl.int64) * batch_size * num_rows
    partial_ptr += split * per_part + (b * num_heads + head) * num_rows + offs_q
    tl.store(partial_ptr, u, mask=mask_q)
    tl.store(partial_ptr + num_splits * per_part, w, mask=mask_q)


@triton.jit
def sum_of_parts(ptr, per_part, num_parts, mask, BLOCK_R: tl.constexpr):
    """[BLOCK_R]: the parts in order."""
    total = tl.zeros([BLOCK_R], tl.float32)
    for _ in range(num_parts):
        total += tl.load(ptr, mask=mask, other=0.0)
        ptr += per_part
    return total


@triton.jit(do_not_specialize=["num_rows", "num_parts", "value_parts"])
def policy_bwd_rows_kernel(
    u_ptr,
    w_ptr,
    parts_stride_part,
    parts_stride_b,
    parts_stride_h,
    value_parts_ptr,
    value_parts_stride_part,
    value_parts_stride_b,
    z_ptr,
    z_stride_b,
    ref_z_ptr,
    ref_z_stride_b,
    weight_ptr,
    weight_stride_b,
    value_ptr,
    value_stride_b,
    u_total_ptr,
    w_total_ptr,
    total_stride_b,
    total_stride_h,
    factor_ptr,
    c_ptr,
    delta_ptr,
    num_heads,
    num_rows,
    num_parts,
    value_parts,
    BLOCK_R: tl.constexpr,
):
    """From sums over pieces of the keys: c, and 1 / (Z H) and δ_h times the weight, where wanted.

    With value_parts this is `policy_divergence`, with D, U and W as further results: rows of
    infinite value, and such as have no policy on one side, have no gradient.
    """
    row_blocks = tl.cdiv(num_rows, BLOCK_R)
    b = (tl.program_id(0) // row_blocks).to(tl.int64)
    offs = tl.program_id(0) % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = offs < num_rows
    # [BLOCK_R]
    z = tl.load(z_ptr + b * z_stride_b + offs, mask=mask, other=0.0)
    constant = z == 0.0
    if ref_z_ptr is not None:
        constant = constant | (
            tl.load(ref_z_ptr + b * ref_z_stride_b + offs, mask=mask, other=0.0) == 0.0
        )
    if value_parts_ptr is not None:
        value_parts_ptr += b * value_parts_stride_b + offs
        value = sum_of_parts(value_parts_ptr, value_parts_stride_part, value_parts, mask, BLOCK_R)
        value = tl.where(constant, 0.0, value)
        constant = constant | (value == float("inf"))
        if value_ptr is not None:
            tl.store(value_ptr + b * value_stride_b + offs, value, mask=mask)

    u_ptr += b * parts_stride_b + offs
    w_ptr += b * parts_stride_b + offs
    all_u = tl.zeros([BLOCK_R], tl.float32)
    for head in range(num_heads):
        head_u_ptr = u_ptr + tl.cast(head, tl.int64) * parts_stride_h
        u = sum_of_parts(head_u_ptr, parts_stride_part, num_parts, mask, BLOCK_R)
        u = tl.where(constant, 0.0, u)
        all_u += u
        if u_total_ptr is not None:
            head_w_ptr = w_ptr + tl.cast(head, tl.int64) * parts_stride_h
            w = sum_of_parts(head_w_ptr, parts_stride_part, num_parts, mask, BLOCK_R)
            total = b * total_stride_b + tl.cast(head, tl.int64) * total_stride_h + offs
            tl.store(u_total_ptr + total, u, mask=mask)
            tl.store(w_total_ptr + total, w, mask=mask)

    if delta_ptr is not None:
        share = tl.where(constant, 0.0, 1.0 / (tl.where(z == 0.0, 1.0, z) * num_heads))
        c = all_u * share  # (9)
        factor = share
        if weight_ptr is not None:
            # [BLOCK_R]
            weight = tl.load(weight_ptr + b * weight_stride_b + offs, mask=mask, other=0.0)
            factor = tl.where(constant, 0.0, share * weight)
        row = b * num_rows + offs
        tl.store(factor_ptr + row, factor, mask=mask)
        tl.store(c_ptr + row, c, mask=mask)
        for head in range(num_heads):
            head_u_ptr = u_ptr + tl.cast(head, tl.int64) * parts_stride_h
            head_w_ptr = w_ptr + tl.cast(head, tl.int64) * parts_stride_h
            u = sum_of_parts(head_u_ptr, parts_stride_part, num_parts, mask, BLOCK_R)
            w = sum_of_parts(head_w_ptr, parts_stride_part, num_parts, mask, BLOCK_R)
            delta = tl.where(constant, 0.0, (u - c * w) * factor)  # (11)
            per_head = (b * num_heads + head) * num_rows + offs
            tl.store(delta_ptr + per_head, delta, mask=mask)
