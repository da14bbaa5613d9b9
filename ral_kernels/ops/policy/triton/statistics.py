"""Triton kernels of the first pass of `policy`: each head's normaliser, and Z (README.md)."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ....runtime.triton_blocks import block_number, blocks_of_loop
from ....runtime.triton_rows import head_of
from ....runtime.triton_softmax import stabiliser
from .side import (
    SMALLEST_WEIGHT,
    existing_keys,
    first_row_of_head,
    flags_of_block,
    head_scores,
    key_blocks,
    key_masks,
    keys_in_scope,
    keys_with_prefix,
    kv_head_of,
    last_row,
    load_head_weights,
    outcomes_of,
    product,
    program_of_head,
    real_keys,
    rows_of_heads,
    span_bias,
    whole_keys,
    whole_rows,
)


@triton.jit
def add_block(m, total, w, s, visible, valid, in_scope, MASKED: tl.constexpr):
    """m, Σ 2^(s − m), and that on valid keys, with the scores of a block of keys more.

    Without MASKED all its keys are visible, and they are valid if they are `in_scope`.
    """
    if MASKED:
        s = tl.where(visible, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    subtracted = stabiliser(m_new)
    p = tl.exp2(s - subtracted[:, None])
    rescale = tl.exp2(m - subtracted)
    on_visible = tl.sum(p, 1)
    total = total * rescale + on_visible
    if MASKED:
        w = w * rescale + tl.sum(tl.where(valid, p, 0.0), 1)
    else:
        w = w * rescale + tl.where(in_scope, on_visible, 0.0)
    return m_new, total, w


@triton.jit(do_not_specialize=["num_rows", "query_start", "window_left", "window_right"])
def policy_statistics_kernel(
    q,
    k,
    prefix,
    bias,
    flags,
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
    """Of one head, BLOCK_Q rows and a piece of the keys: m, Σ 2^(s − m), and that on valid keys.

    partial: [3, splits, B, H, T].
    """
    HAS_PREFIX: tl.constexpr = prefix.ptr is not None
    HAS_FLAGS: tl.constexpr = flags.padding_ptr is not None or flags.scope_ptr is not None
    sample, row_block, head, split = program_of_head(
        samples, heads, num_rows, query_start, tile.BLOCK_Q
    )
    offs_q = row_block * tile.BLOCK_Q + tl.arange(0, tile.BLOCK_Q)
    mask_q = offs_q < sample.num_rows
    position = sample.query_start + offs_q
    q_head = head_of(q, sample.rows, head)
    keys = keys_with_prefix(k, prefix, sample.keys, kv_head_of(head, heads))
    # [BLOCK_Q, HEAD_DIM]
    q_rows = whole_rows(q_head, offs_q, mask_q, tile)
    m = tl.full([tile.BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([tile.BLOCK_Q], tl.float32)
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
            k_rows = whole_keys(keys, offs_k, mask_k, tile, HAS_PREFIX)
            x = product(
                q_rows, q_head, offs_q, mask_q, k_rows, keys, offs_k, mask_k, tile, tile.BLOCK_Q,
                tile.BLOCK_K, HAS_PREFIX,
            )  # fmt: skip
            s = head_scores(x, score)
            if bias is not None:
                span_k = outcomes_of(flags, sample.keys, offs_k, mask_k)
                s += span_bias(  # (2)
                    bias, sample.rows, head, offs_q[:, None], span_k[None, :], mask_q[:, None]
                )
            masked, in_scope = IS_EDGE == 1, True
            if not IS_EDGE and HAS_FLAGS:
                masked, in_scope = flags_of_block(flags, sample.keys, key, tile.BLOCK_K)
            if masked:
                real = real_keys(flags, sample.keys, offs_k, mask_k)
                visible, valid = key_masks(
                    position[:, None], offs_k[None, :], real[None, :],
                    keys_in_scope(flags, sample.keys, offs_k, real)[None, :], window_left,
                    window_right, tile.EXCLUDE_SELF,
                )  # fmt: skip
                m, total, w = add_block(m, total, w, s, visible, valid, in_scope, True)
            else:
                m, total, w = add_block(m, total, w, s, 0, 0, in_scope, False)

    per_part = rows_of_heads(samples, heads.num_heads, num_rows)
    row = first_row_of_head(samples, sample, head, heads.num_heads, num_rows)
    partial_ptr += split * per_part + row + offs_q
    tl.store(partial_ptr, m, mask=mask_q)
    tl.store(partial_ptr + num_splits * per_part, total, mask=mask_q)
    tl.store(partial_ptr + 2 * num_splits * per_part, w, mask=mask_q)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def policy_normaliser_kernel(
    partial_ptr,
    norm_ptr,
    z_ptr,
    head_weights,
    samples,
    num_heads,
    num_rows,
    num_splits,
    BLOCK_R: tl.constexpr,
):
    """Join the pieces of each head, then the heads, in order: norm [2, B, H, T], and Z: (3), (6).

    norm is m, 0 for a row that sees no key, and w / Σ 2^(s − m), 0 for such a row.
    """
    row_blocks = tl.cdiv(num_rows, BLOCK_R)
    b = (tl.program_id(0) // row_blocks).to(tl.int64)
    offs = tl.program_id(0) % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = offs < num_rows
    mask_parts = offs < last_row(samples, num_rows)
    per_part = rows_of_heads(samples, num_heads, num_rows)
    all_w = tl.zeros([BLOCK_R], tl.float32)
    for head in range(num_heads):
        row = (b * num_heads + head) * num_rows + offs
        pointers = partial_ptr + row
        m = tl.full([BLOCK_R], float("-inf"), tl.float32)
        for _ in range(num_splits):
            # [BLOCK_R]
            m = tl.maximum(m, tl.load(pointers, mask=mask_parts, other=float("-inf")))
            pointers += per_part
        m = stabiliser(m)
        total = tl.zeros([BLOCK_R], tl.float32)
        w = tl.zeros([BLOCK_R], tl.float32)
        pointers = partial_ptr + row
        for _ in range(num_splits):
            # [BLOCK_R], each
            rescale = tl.exp2(tl.load(pointers, mask=mask_parts, other=float("-inf")) - m)
            part = tl.load(pointers + num_splits * per_part, mask=mask_parts, other=0.0)
            part_w = tl.load(pointers + 2 * num_splits * per_part, mask=mask_parts, other=0.0)
            total += part * rescale
            w += part_w * rescale
            pointers += per_part
        inverse = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
        if head_weights.ptr is not None:  # of (5)
            inverse *= load_head_weights(head_weights, b, head, offs, mask)
        all_w += w * inverse
        tl.store(norm_ptr + row, m, mask=mask)
        tl.store(norm_ptr + per_part + row, inverse, mask=mask)
    z = tl.where(all_w < SMALLEST_WEIGHT, 0.0, all_w / num_heads)
    tl.store(z_ptr + b * num_rows + offs, z, mask=mask)
