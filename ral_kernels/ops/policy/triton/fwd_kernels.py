"""Triton kernels of the second pass of `policy`: p over keys, and its sums over spans.

Against a target, `policy_divergence` gets its terms from the tile of p.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from .gradient import add_per_span
from .side import (
    blocks_of_rows,
    first_row,
    key_masks,
    keys_in_scope,
    outcomes_of,
    real_keys,
    rows_of_heads,
    sample_of_rows,
    sum_of_weights,
)
from .target import compare_with_target


@triton.jit(do_not_specialize=["num_rows", "query_start", "window_left", "window_right"])
def policy_fwd_kernel(
    q,
    k,
    prefix,
    bias,
    flags,
    norm,
    z,
    target,
    p,
    samples,
    heads,
    num_rows,
    query_start,
    window_left,
    window_right,
    score,
    tile,
):
    """p of BLOCK_Q rows and BLOCK_K keys, all heads inside; 0 on keys that are not valid: (7).

    With a target, ∂D/∂p takes the place of p, and the terms of D are summed: (1), (2) and (11) of
    divergence.md.
    """
    row_blocks = blocks_of_rows(samples, num_rows, tile.BLOCK_Q)
    key_blocks = tl.cdiv(heads.seqlen_k, tile.BLOCK_K)
    pid = tl.program_id(0)
    key_block = pid // row_blocks % key_blocks
    b = (pid // row_blocks // key_blocks).to(tl.int64)
    sample, row_block = sample_of_rows(
        samples, num_rows, heads.seqlen_k, query_start, b, pid % row_blocks, tile.BLOCK_Q
    )

    offs_q = row_block * tile.BLOCK_Q + tl.arange(0, tile.BLOCK_Q)
    offs_k = key_block * tile.BLOCK_K + tl.arange(0, tile.BLOCK_K)
    mask_q = offs_q < sample.num_rows
    span_k = offs_k
    if bias is not None:
        span_k = outcomes_of(flags, sample.keys, offs_k, offs_k < sample.seqlen_k)
    mask_k = real_keys(flags, sample.keys, offs_k, offs_k < sample.seqlen_k)
    _, valid = key_masks(
        (sample.query_start + offs_q)[:, None], offs_k[None, :], mask_k[None, :],
        keys_in_scope(flags, sample.keys, offs_k, mask_k)[None, :], window_left, window_right,
        tile.EXCLUDE_SELF,
    )  # fmt: skip

    # A block without visible keys visits no head: p = 0.
    first = sample.query_start + row_block * tile.BLOCK_Q
    nearest = key_block * tile.BLOCK_K - (first + tile.BLOCK_Q - 1)
    farthest = nearest + tile.BLOCK_Q - 1 + tile.BLOCK_K - 1
    seen = (nearest <= window_right) & (farthest >= -window_left)
    if samples.row_offsets_ptr is not None:
        seen = seen & (key_block * tile.BLOCK_K < sample.seqlen_k)
    total = sum_of_weights(
        q, k, prefix, bias, norm, sample, tl.where(seen, heads.num_kv_heads, 0),
        heads.num_heads // heads.num_kv_heads, offs_q, mask_q, offs_k, mask_k, span_k, score, tile,
    )  # fmt: skip
    # [BLOCK_Q]
    z_rows = tl.load(z.ptr + sample.rows * z.stride_b + offs_q, mask=mask_q, other=0.0)
    share = 1.0 / (tl.where(z_rows == 0.0, 1.0, z_rows) * heads.num_heads)
    share = tl.where(z_rows == 0.0, 0.0, share)
    values = tl.where(valid, total * share[:, None], 0.0)  # (5), (7)
    p_ptr = p.ptr + sample.rows * p.stride_b
    pointers = p_ptr + offs_q.to(tl.int64)[:, None] * p.stride_t + offs_k[None, :]
    tl.store(pointers, values, mask=mask_q[:, None] & (offs_k < sample.seqlen_k)[None, :])
    if target.weights_ptr is not None:
        tl.debug_barrier()  # other threads of this CTA read what this thread wrote
        d = compare_with_target(
            target, p_ptr, p.stride_t, flags, samples, sample, offs_q, mask_q,
            key_block * tile.BLOCK_K, window_left, window_right, tile,
        )  # fmt: skip
        part_ptr = target.value_parts_ptr + key_block * rows_of_heads(samples, 1, num_rows)
        tl.store(part_ptr + first_row(samples, sample, num_rows) + offs_q, d, mask=mask_q)


@triton.jit(do_not_specialize=["num_rows"])
def policy_fwd_spans_kernel(
    p_keys,
    span_ids_ptr,
    span_ids_stride_b,
    p,
    samples,
    num_rows,
    seqlen_k,
    num_spans,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """p of BLOCK_Q rows and BLOCK_S spans from p over keys, blocks of keys in order: (8).

    Blocks of which no key is in these spans are skipped. With contiguous spans each key is read
    once or twice, however many spans there are.
    """
    row_blocks = blocks_of_rows(samples, num_rows, BLOCK_Q)
    span_blocks = tl.cdiv(num_spans, BLOCK_S)
    pid = tl.program_id(0)
    b = (pid // row_blocks // span_blocks).to(tl.int64)
    sample, row_block = sample_of_rows(samples, num_rows, seqlen_k, 0, b, pid % row_blocks, BLOCK_Q)
    offs_q = row_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_s = pid // row_blocks % span_blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_q = offs_q < sample.num_rows
    p_keys_ptr = p_keys.ptr + sample.rows * p_keys.stride_b
    span_ids_ptr += sample.keys * span_ids_stride_b
    first_span = pid // row_blocks % span_blocks * BLOCK_S
    sums = tl.zeros([BLOCK_Q, BLOCK_S], tl.float32)
    for key in range(0, sample.seqlen_k, BLOCK_K):
        offs_k = key + tl.arange(0, BLOCK_K)
        # [BLOCK_K]
        span_k = tl.load(span_ids_ptr + offs_k, mask=offs_k < sample.seqlen_k, other=-1)
        held = (span_k >= first_span) & (span_k < first_span + BLOCK_S)
        if tl.max(held.to(tl.int32), 0) > 0:
            # [BLOCK_Q, BLOCK_K]
            x = tl.load(
                p_keys_ptr + offs_q.to(tl.int64)[:, None] * p_keys.stride_t + offs_k[None, :],
                mask=mask_q[:, None] & held[None, :],
                other=0.0,
            )
            one_hot = (span_k[:, None] == offs_s[None, :]).to(tl.float32)
            sums = add_per_span(sums, x, one_hot)
    p_ptr = p.ptr + sample.rows * p.stride_b
    pointers = p_ptr + offs_q.to(tl.int64)[:, None] * p.stride_t + offs_s[None, :]
    tl.store(pointers, sums, mask=mask_q[:, None] & (offs_s < num_spans)[None, :])
