"""Triton kernels of the backward of `policy` for sums over a row: c and δ_h."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ....runtime.triton_blocks import block_number, blocks_of_loop
from ....runtime.triton_rows import head_of
from .gradient import load_outcomes
from .side import (
    SMALLEST_HEAD_WEIGHT_BWD,
    existing_keys,
    first_row_of_head,
    flags_of_block,
    head_scores,
    key_blocks,
    key_masks,
    keys_in_scope,
    keys_of_head,
    kv_head_of,
    last_row,
    load_head_weights,
    load_norm,
    outcomes_of,
    product,
    program_of_head,
    real_keys,
    rows_of_heads,
    span_bias,
    weights,
    whole_rows,
)


@triton.jit(do_not_specialize=["num_rows", "query_start", "window_left", "window_right"])
def policy_bwd_sums_kernel(
    q,
    k,
    bias,
    flags,
    norm,
    z,
    dp,
    partial_ptr,
    samples,
    heads,
    num_rows,
    num_splits,
    keys_per_split,
    query_start,
    window_left,
    window_right,
    score,
    tile,
):
    """U_h = Σ w P_h dp and W_h = Σ w P_h on valid keys, of BLOCK_Q rows and a piece of the keys.

    partial: [2, splits, B, H, T].
    """
    HAS_FLAGS: tl.constexpr = flags.padding_ptr is not None or flags.scope_ptr is not None
    HAS_SPANS: tl.constexpr = flags.span_ids_ptr is not None
    sample, row_block, head, split = program_of_head(
        samples, heads, num_rows, query_start, tile.BLOCK_Q
    )
    offs_q = row_block * tile.BLOCK_Q + tl.arange(0, tile.BLOCK_Q)
    mask_q = offs_q < sample.num_rows
    q_head = head_of(q, sample.rows, head)
    keys = keys_of_head(k, sample.keys, kv_head_of(head, heads))
    # [BLOCK_Q, HEAD_DIM]
    q_rows = whole_rows(q_head, offs_q, mask_q, tile)
    # [BLOCK_Q], each
    m, inverse = load_norm(norm, sample.rows, head, offs_q, mask_q)
    has_policy = tl.load(z.ptr + sample.rows * z.stride_b + offs_q, mask=mask_q, other=0.0) != 0.0
    inverse = tl.where(has_policy, inverse, 0.0)
    u = tl.zeros([tile.BLOCK_Q], tl.float32)
    w = tl.zeros([tile.BLOCK_Q], tl.float32)
    start = split * keys_per_split
    stop = tl.minimum(start + keys_per_split, sample.seqlen_k)
    ranges = key_blocks(sample, row_block, start, stop, window_left, window_right, tile)
    for IS_EDGE in tl.static_range(2):
        blocks = blocks_of_loop(ranges, IS_EDGE)
        for i in range(0, blocks.number):
            key = block_number(i, blocks, IS_EDGE) * tile.BLOCK_K
            offs_k = key + tl.arange(0, tile.BLOCK_K)
            mask_k = existing_keys(offs_k, sample.seqlen_k, IS_EDGE)
            # [BLOCK_K, HEAD_DIM]
            k_rows = whole_rows(keys.own, offs_k, mask_k, tile)
            x = product(
                q_rows, q_head, offs_q, mask_q, k_rows, keys, offs_k, mask_k, tile, tile.BLOCK_Q,
                tile.BLOCK_K, False,
            )  # fmt: skip
            s = head_scores(x, score)
            outcome = outcomes_of(flags, sample.keys, offs_k, mask_k)
            if bias is not None:
                s += span_bias(
                    bias, sample.rows, head, offs_q[:, None], outcome[None, :], mask_q[:, None]
                )
            # [BLOCK_Q, BLOCK_K]
            dp_here = load_outcomes(
                dp, sample.rows, offs_q[:, None], outcome[None, :],
                has_policy[:, None] & mask_k[None, :], HAS_SPANS,
            )  # fmt: skip
            masked, in_scope = IS_EDGE == 1, True
            if not IS_EDGE and HAS_FLAGS:
                masked, in_scope = flags_of_block(flags, sample.keys, key, tile.BLOCK_K)
            p = weights(s, m[:, None], tl.where(in_scope, inverse, 0.0)[:, None])
            if masked:
                real = real_keys(flags, sample.keys, offs_k, mask_k)
                _, valid = key_masks(
                    (sample.query_start + offs_q)[:, None], offs_k[None, :], real[None, :],
                    keys_in_scope(flags, sample.keys, offs_k, real)[None, :], window_left,
                    window_right, tile.EXCLUDE_SELF,
                )  # fmt: skip
                p = tl.where(valid, p, 0.0)
            is_zero = p < SMALLEST_HEAD_WEIGHT_BWD
            p = tl.where(is_zero, 0.0, p)
            u += tl.sum(p * tl.where(is_zero, 0.0, dp_here), 1)
            w += tl.sum(p, 1)

    per_part = rows_of_heads(samples, heads.num_heads, num_rows)
    row = first_row_of_head(samples, sample, head, heads.num_heads, num_rows)
    partial_ptr += split * per_part + row + offs_q
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


@triton.jit(do_not_specialize=["num_rows", "num_parts", "num_value_parts"])
def policy_bwd_rows_kernel(
    parts,
    value_parts,
    z,
    ref_z,
    weight,
    value,
    totals,
    terms,
    head_weights,
    samples,
    num_heads,
    num_rows,
    num_parts,
    num_value_parts,
    BLOCK_R: tl.constexpr,
):
    """From sums over pieces of the keys: c, and the row's weight times 1 / (Z H) and times δ_h.

    `policy_divergence` passes value_parts, and gets D, U and W, too. Rows of infinite D, and rows
    without a policy on one side, have no gradient.
    """
    row_blocks = tl.cdiv(num_rows, BLOCK_R)
    b = (tl.program_id(0) // row_blocks).to(tl.int64)
    offs = tl.program_id(0) % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = offs < num_rows
    mask_parts = offs < last_row(samples, num_rows)
    # [BLOCK_R]
    z_rows = tl.load(z.ptr + b * z.stride_b + offs, mask=mask, other=0.0)
    constant = z_rows == 0.0
    if ref_z.ptr is not None:
        ref_z_rows = tl.load(ref_z.ptr + b * ref_z.stride_b + offs, mask=mask, other=0.0)
        constant = constant | (ref_z_rows == 0.0)
    if value_parts.ptr is not None:
        value_parts_ptr = value_parts.ptr + b * value_parts.stride_b + offs
        d = sum_of_parts(
            value_parts_ptr, value_parts.stride_part, num_value_parts, mask_parts, BLOCK_R
        )
        d = tl.where(constant, 0.0, d)
        constant = constant | (d == float("inf"))
        if value.ptr is not None:
            tl.store(value.ptr + b * value.stride_b + offs, d, mask=mask)

    u_ptr = parts.u_ptr + b * parts.stride_b + offs
    w_ptr = parts.w_ptr + b * parts.stride_b + offs
    all_u = tl.zeros([BLOCK_R], tl.float32)
    for head in range(num_heads):
        of_head = tl.cast(head, tl.int64) * parts.stride_h
        u = sum_of_parts(u_ptr + of_head, parts.stride_part, num_parts, mask_parts, BLOCK_R)
        u = tl.where(constant, 0.0, u)
        all_u += u
        if totals.u_ptr is not None:
            w = sum_of_parts(w_ptr + of_head, parts.stride_part, num_parts, mask_parts, BLOCK_R)
            total = b * totals.stride_b + tl.cast(head, tl.int64) * totals.stride_h + offs
            tl.store(totals.u_ptr + total, u, mask=mask)
            tl.store(totals.w_ptr + total, w, mask=mask)

    if terms.delta_ptr is not None:
        share = 1.0 / (tl.where(z_rows == 0.0, 1.0, z_rows) * num_heads)
        share = tl.where(constant, 0.0, share)
        c = all_u * share  # (9)
        factor = share
        if weight.ptr is not None:
            # [BLOCK_R]
            given = tl.load(weight.ptr + b * weight.stride_b + offs, mask=mask, other=0.0)
            factor = tl.where(constant, 0.0, share * given)
        row = b * num_rows + offs
        tl.store(terms.factor_ptr + row, factor, mask=mask)
        tl.store(terms.c_ptr + row, c, mask=mask)
        for head in range(num_heads):
            of_head = tl.cast(head, tl.int64) * parts.stride_h
            u = sum_of_parts(u_ptr + of_head, parts.stride_part, num_parts, mask_parts, BLOCK_R)
            w = sum_of_parts(w_ptr + of_head, parts.stride_part, num_parts, mask_parts, BLOCK_R)
            delta = tl.where(constant, 0.0, (u - c * w) * factor)  # (11)
            if head_weights.ptr is not None:  # u and w have the head's weight in them
                of_rows = load_head_weights(head_weights, b, head, offs, mask)
                delta = tl.where(
                    of_rows == 0.0, 0.0, delta / tl.where(of_rows == 0.0, 1.0, of_rows)
                )
            per_head = (b * num_heads + head) * num_rows + offs
            tl.store(terms.delta_ptr + per_head, delta, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def policy_bwd_dhead_weights_kernel(
    delta_ptr,
    dhead_weights_ptr,
    samples,
    num_heads,
    num_rows,
    BLOCK_R: tl.constexpr,
):
    """Σ_t δ_h of one sample and head, rows in order: (17). delta: [B, H, T], the result [B, H]."""
    pid = tl.program_id(0)
    b = (pid // num_heads).to(tl.int64)
    head = (pid % num_heads).to(tl.int64)
    first, stop = head * 0, head * 0 + num_rows
    if samples.row_offsets_ptr is None:
        delta_ptr += (b * num_heads + head) * num_rows
    else:
        delta_ptr += head * num_rows
        first = tl.load(samples.row_offsets_ptr + b).to(tl.int64)
        stop = tl.load(samples.row_offsets_ptr + b + 1).to(tl.int64)
    total = tl.zeros([BLOCK_R], tl.float32)
    for row in range(first, stop, BLOCK_R):
        offs = row + tl.arange(0, BLOCK_R)
        total += tl.load(delta_ptr + offs, mask=offs < stop, other=0.0)
    tl.store(dhead_weights_ptr + pid, tl.sum(total, 0))
