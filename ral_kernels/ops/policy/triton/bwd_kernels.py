"""Triton kernels of the backward of `policy`: dq, dk and dspan_bias.

`policy_divergence` runs those of dq and dk too, with ∂D/∂p of some rows in place of dp.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ....runtime.triton_blocks import block_number, block_ranges, blocks_of_loop
from ....runtime.triton_rows import Head, head_of, load_rows, store_rows
from .gradient import (
    add_score_gradient,
    load_delta,
    load_factor_and_c,
    load_outcomes,
    score_gradient,
    softcap_slope,
)
from .side import (
    KeyHead,
    blocks_of_keys,
    existing_keys,
    first_row,
    first_row_of_head,
    flags_of_block,
    head_scores,
    key_blocks,
    key_masks,
    keys_in_scope,
    keys_of_head,
    kv_head_of,
    last_row,
    load_norm,
    outcomes_of,
    product,
    program_of_head,
    real_keys,
    rows_of_heads,
    sample_of_keys,
    span_bias,
    weights,
    whole_rows,
)


@triton.jit(do_not_specialize=["num_rows", "query_start", "window_left", "window_right"])
def policy_bwd_dq_kernel(
    q,
    k,
    bias,
    flags,
    norm,
    terms,
    dp,
    dq,
    dq_stride_split,
    samples,
    heads,
    num_rows,
    keys_per_split,
    query_start,
    window_left,
    window_right,
    score,
    tile,
):
    """dq of one head, BLOCK_Q rows and BLOCK_D features, over all keys or a piece of them: (15)."""
    HAS_FLAGS: tl.constexpr = flags.padding_ptr is not None or flags.scope_ptr is not None
    HAS_SPANS: tl.constexpr = flags.span_ids_ptr is not None
    # With a bias, ptxas would serialise wgmma around the branch (C7515).
    ALWAYS_MASKED: tl.constexpr = HAS_FLAGS and bias is not None
    sample, row_block, head, split = program_of_head(
        samples, heads, num_rows, query_start, tile.BLOCK_Q
    )
    first_d = tl.program_id(1) * tile.BLOCK_D
    offs_q = row_block * tile.BLOCK_Q + tl.arange(0, tile.BLOCK_Q)
    mask_q = offs_q < sample.num_rows
    q_head = head_of(q, sample.rows, head)
    keys = keys_of_head(k, sample.keys, kv_head_of(head, heads))
    # [BLOCK_Q, HEAD_DIM]
    q_rows = whole_rows(q_head, offs_q, mask_q, tile)
    # [BLOCK_Q], each
    m, inverse = load_norm(norm, sample.rows, head, offs_q, mask_q)
    factor, c = load_factor_and_c(terms, first_row(samples, sample, num_rows), offs_q, mask_q)
    row_of_head = first_row_of_head(samples, sample, head, heads.num_heads, num_rows)
    delta = load_delta(terms, row_of_head, offs_q, mask_q)
    total = tl.zeros([tile.BLOCK_Q, tile.BLOCK_D], tl.float32)
    start = split * keys_per_split
    stop = tl.minimum(start + keys_per_split, sample.seqlen_k)
    ranges = key_blocks(sample, row_block, start, stop, window_left, window_right, tile)
    for IS_EDGE in tl.static_range(2):
        blocks = blocks_of_loop(ranges, IS_EDGE)
        for i in range(0, blocks.number):
            key = block_number(i, blocks, IS_EDGE) * tile.BLOCK_K
            offs_k = key + tl.arange(0, tile.BLOCK_K)
            mask_k = existing_keys(offs_k, sample.seqlen_k, IS_EDGE)
            # 0 · NaN is NaN: padding keys are not read.
            real = real_keys(flags, sample.keys, offs_k, mask_k)
            # [BLOCK_K, HEAD_DIM]
            k_rows = whole_rows(keys.own, offs_k, real, tile)
            x = product(
                q_rows, q_head, offs_q, mask_q, k_rows, keys, offs_k, real, tile, tile.BLOCK_Q,
                tile.BLOCK_K, False,
            )  # fmt: skip
            s = head_scores(x, score)
            outcome = outcomes_of(flags, sample.keys, offs_k, mask_k)
            biased = s
            if bias is not None:
                biased += span_bias(
                    bias, sample.rows, head, offs_q[:, None], outcome[None, :], mask_q[:, None]
                )
            # [BLOCK_Q, BLOCK_K]
            dp_here = load_outcomes(
                dp, sample.rows, offs_q[:, None], outcome[None, :],
                (factor != 0.0)[:, None] & mask_k[None, :], HAS_SPANS,
            )  # fmt: skip
            masked, in_scope = IS_EDGE == 1 or ALWAYS_MASKED, True
            if HAS_FLAGS and not IS_EDGE and not ALWAYS_MASKED:
                masked, in_scope = flags_of_block(flags, sample.keys, key, tile.BLOCK_K)
            p = weights(biased, m[:, None], inverse[:, None])
            g = tl.where(in_scope, (dp_here - c[:, None]) * factor[:, None], 0.0)  # (10)
            if masked:
                visible, valid = key_masks(
                    (sample.query_start + offs_q)[:, None], offs_k[None, :], real[None, :],
                    keys_in_scope(flags, sample.keys, offs_k, real)[None, :], window_left,
                    window_right, tile.EXCLUDE_SELF,
                )  # fmt: skip
                p = tl.where(visible, p, 0.0)
                g = tl.where(valid, g, 0.0)
            ds = score_gradient(p, g, delta[:, None])
            if score.SOFTCAP:
                ds *= softcap_slope(s, score)
            if tile.BLOCK_D != tile.HEAD_DIM:
                # [BLOCK_K, BLOCK_D]
                k_part = load_rows(keys.own, offs_k, real, first_d, tile.head_dim, tile.BLOCK_D)
                total = add_score_gradient(total, ds, k_part, tile.PRECISION)
            else:
                total = add_score_gradient(total, ds, k_rows, tile.PRECISION)
    dq_head = head_of(dq, sample.rows, head)
    dq_head = Head(dq_head.ptr + split.to(tl.int64) * dq_stride_split, dq_head.stride)
    store_rows(dq_head, offs_q, mask_q, total * score.scale, first_d, tile.head_dim, tile.BLOCK_D)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def policy_bwd_dq_join_kernel(
    parts_ptr,
    dq,
    samples,
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
    mask = (offs_q < last_row(samples, num_rows))[:, None] & (offs_d < head_dim)[None, :]
    row = (b * num_heads + head) * num_rows + offs_q
    parts_ptr += row[:, None] * head_dim + offs_d[None, :]
    total = tl.zeros([BLOCK_R, HEAD_DIM], tl.float32)
    for _ in range(num_splits):
        # [BLOCK_R, HEAD_DIM]
        total += tl.load(parts_ptr, mask=mask, other=0.0)
        parts_ptr += rows_of_heads(samples, num_heads, num_rows) * head_dim
    store_rows(head_of(dq, b, head), offs_q, offs_q < num_rows, total, 0, head_dim, HEAD_DIM)


@triton.jit(do_not_specialize=["num_rows", "query_start", "window_left", "window_right"])
def policy_bwd_dk_kernel(
    q,
    k,
    bias,
    flags,
    norm,
    terms,
    dp,
    before_ptr,
    dk,
    samples,
    heads,
    num_rows,
    query_start,
    window_left,
    window_right,
    score,
    tile,
):
    """dk of one kv head, BLOCK_K keys and BLOCK_D features, over all rows of a group's heads: (16).

    Tiles are [BLOCK_K, BLOCK_Q]. before: float32 [B, Hk, N, D], the sum over earlier rows, which
    this call continues; it may be dk.
    """
    key_blocks = blocks_of_keys(samples, heads.seqlen_k, tile.BLOCK_K)
    pid = tl.program_id(0)
    kv_head = (pid // key_blocks % heads.num_kv_heads).to(tl.int64)
    b = (pid // key_blocks // heads.num_kv_heads).to(tl.int64)
    sample, key_block = sample_of_keys(
        samples, num_rows, heads.seqlen_k, query_start, b, pid % key_blocks, tile.BLOCK_K
    )
    group = heads.num_heads // heads.num_kv_heads

    first_key = key_block * tile.BLOCK_K
    offs_k = first_key + tl.arange(0, tile.BLOCK_K)
    first_d = tl.program_id(1) * tile.BLOCK_D
    exists = offs_k < sample.seqlen_k
    outcome = outcomes_of(flags, sample.keys, offs_k, exists)
    mask_k = real_keys(flags, sample.keys, offs_k, exists)
    in_scope = keys_in_scope(flags, sample.keys, offs_k, mask_k)
    k_head = head_of(k, sample.keys, kv_head)
    # [BLOCK_K, HEAD_DIM]
    k_rows = whole_rows(k_head, offs_k, mask_k, tile)
    total = tl.zeros([tile.BLOCK_K, tile.BLOCK_D], tl.float32)
    # Rows whose window reaches the block, and rows of which all see it, with another own key.
    nearest = first_key - sample.query_start
    farthest = nearest + tile.BLOCK_K - 1
    full_low = farthest - window_right
    if tile.EXCLUDE_SELF:
        full_low = tl.maximum(full_low, farthest + 1)
    ranges = block_ranges(
        nearest - window_right, tl.minimum(farthest + window_left + 1, sample.num_rows),
        full_low, nearest + window_left + 1, tile.BLOCK_Q,
    )  # fmt: skip
    for IS_EDGE in tl.static_range(2):
        blocks = blocks_of_loop(ranges, IS_EDGE)
        for block in tl.range(0, blocks.number, num_stages=1):
            offs_q = block_number(block, blocks, IS_EDGE) * tile.BLOCK_Q
            offs_q += tl.arange(0, tile.BLOCK_Q)
            mask_q = offs_q < sample.num_rows
            factor, c = load_factor_and_c(
                terms, first_row(samples, sample, num_rows), offs_q, mask_q
            )
            # [BLOCK_K, BLOCK_Q]
            dp_here = load_outcomes(
                dp, sample.rows, offs_q[None, :], outcome[:, None],
                (factor != 0.0)[None, :] & exists[:, None], flags.span_ids_ptr is not None,
            )  # fmt: skip
            g = (dp_here - c[None, :]) * factor[None, :]  # (10)
            visible, valid = key_masks(
                (sample.query_start + offs_q)[None, :], offs_k[:, None], mask_k[:, None],
                in_scope[:, None], window_left, window_right, tile.EXCLUDE_SELF,
            )  # fmt: skip
            if IS_EDGE:
                g = tl.where(valid, g, 0.0)
            elif flags.scope_ptr is not None:
                g = tl.where(in_scope[:, None], g, 0.0)
            # Rows of the few blocks at the edge are not prefetched: addresses take registers.
            for i in tl.range(0, group, num_stages=1 if IS_EDGE else None):
                head = kv_head * group + i
                q_head = head_of(q, sample.rows, head)
                # [BLOCK_Q, BLOCK_D]
                q_rows = load_rows(q_head, offs_q, mask_q, first_d, tile.head_dim, tile.BLOCK_D)
                # [BLOCK_Q], each
                m, inverse = load_norm(norm, sample.rows, head, offs_q, mask_q)
                row_of_head = first_row_of_head(samples, sample, head, heads.num_heads, num_rows)
                delta = load_delta(terms, row_of_head, offs_q, mask_q)
                x = product(
                    k_rows, k_head, offs_k, mask_k, q_rows, KeyHead(q_head, q_head, 0), offs_q,
                    mask_q, tile, tile.BLOCK_K, tile.BLOCK_Q, False,
                )  # fmt: skip
                s = head_scores(x, score)
                biased = s
                if bias is not None:
                    biased += span_bias(
                        bias, sample.rows, head, offs_q[None, :], outcome[:, None],
                        mask_q[None, :],
                    )  # fmt: skip
                p = weights(biased, m[None, :], inverse[None, :])
                if IS_EDGE:
                    p = tl.where(visible, p, 0.0)
                ds = score_gradient(p, g, delta[None, :])
                if score.SOFTCAP:
                    ds *= softcap_slope(s, score)
                total = add_score_gradient(total, ds, q_rows, tile.PRECISION)
    # Weights of padding, and of keys that do not exist, mean nothing.
    total = tl.where(mask_k[:, None], total * score.scale, 0.0)
    if before_ptr is not None:
        row = (sample.keys * heads.num_kv_heads + kv_head) * heads.seqlen_k + offs_k
        before = Head(before_ptr, tile.head_dim)
        total += load_rows(before, row, exists, first_d, tile.head_dim, tile.BLOCK_D)
        # Other threads of this CTA may read what this thread is about to overwrite.
        tl.debug_barrier()
    store_rows(
        head_of(dk, sample.keys, kv_head), offs_k, exists, total, first_d, tile.head_dim,
        tile.BLOCK_D,
    )  # fmt: skip
