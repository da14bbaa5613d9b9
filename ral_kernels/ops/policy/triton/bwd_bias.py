"""Triton kernel of the backward of `policy`: dspan_bias."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ....runtime.triton_rows import head_of
from .gradient import (
    add_per_span,
    load_delta,
    load_factor_and_c,
    load_outcomes,
    score_gradient,
)
from .side import (
    blocks_of_rows,
    first_row,
    first_row_of_head,
    head_scores,
    key_masks,
    key_range,
    keys_in_scope,
    keys_of_head,
    kv_head_of,
    load_norm,
    outcomes_of,
    product,
    real_keys,
    sample_of_rows,
    span_bias,
    weights,
    whole_rows,
)


@triton.jit(do_not_specialize=["num_rows", "query_start", "window_left", "window_right"])
def policy_bwd_dspan_bias_kernel(
    q,
    k,
    bias,
    flags,
    norm,
    terms,
    dp,
    dspan_bias_ptr,
    samples,
    heads,
    num_rows,
    num_spans,
    query_start,
    window_left,
    window_right,
    score,
    tile,
    BLOCK_S: tl.constexpr,
):
    """dspan_bias [B, H, T, S] of one head, BLOCK_Q rows and BLOCK_S spans: (13).

    Blocks of keys of which no key is in these spans are skipped before their scores are formed.
    """
    row_blocks = blocks_of_rows(samples, num_rows, tile.BLOCK_Q)
    span_blocks = tl.cdiv(num_spans, BLOCK_S)
    pid = tl.program_id(0)
    first_span = pid // row_blocks % span_blocks * BLOCK_S
    head = (pid // row_blocks // span_blocks % heads.num_heads).to(tl.int64)
    b = (pid // row_blocks // span_blocks // heads.num_heads).to(tl.int64)
    sample, row_block = sample_of_rows(
        samples, num_rows, heads.seqlen_k, query_start, b, pid % row_blocks, tile.BLOCK_Q
    )

    offs_q = row_block * tile.BLOCK_Q + tl.arange(0, tile.BLOCK_Q)
    offs_s = first_span + tl.arange(0, BLOCK_S)
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
    dbias = tl.zeros([tile.BLOCK_Q, BLOCK_S], tl.float32)
    first = sample.query_start + row_block * tile.BLOCK_Q
    low, high = key_range(
        first,
        first + tile.BLOCK_Q - 1,
        window_left,
        window_right,
        0,
        sample.seqlen_k,
        tile.BLOCK_K,
    )
    for key in range(low, high, tile.BLOCK_K):
        offs_k = key + tl.arange(0, tile.BLOCK_K)
        mask_k = real_keys(flags, sample.keys, offs_k, offs_k < sample.seqlen_k)
        span_k = outcomes_of(flags, sample.keys, offs_k, mask_k)
        held = (span_k >= first_span) & (span_k < first_span + BLOCK_S)
        if tl.max(held.to(tl.int32), 0) > 0:
            # [BLOCK_K, HEAD_DIM]
            k_rows = whole_rows(keys.own, offs_k, mask_k, tile)
            x = product(
                q_rows, q_head, offs_q, mask_q, k_rows, keys, offs_k, mask_k, tile, tile.BLOCK_Q,
                tile.BLOCK_K, False,
            )  # fmt: skip
            s = head_scores(x, score)
            s += span_bias(
                bias, sample.rows, head, offs_q[:, None], span_k[None, :], mask_q[:, None]
            )
            visible, valid = key_masks(
                (sample.query_start + offs_q)[:, None], offs_k[None, :], mask_k[None, :],
                keys_in_scope(flags, sample.keys, offs_k, mask_k)[None, :], window_left,
                window_right, tile.EXCLUDE_SELF,
            )  # fmt: skip
            # [BLOCK_Q, BLOCK_K]
            dp_here = load_outcomes(
                dp, sample.rows, offs_q[:, None], span_k[None, :], valid & (factor != 0.0)[:, None],
                True,
            )  # fmt: skip
            g = tl.where(valid, (dp_here - c[:, None]) * factor[:, None], 0.0)  # (10)
            p = tl.where(visible, weights(s, m[:, None], inverse[:, None]), 0.0)
            ds = score_gradient(p, g, delta[:, None])
            one_hot = (span_k[:, None] == offs_s[None, :]).to(tl.float32)
            dbias = add_per_span(dbias, ds, one_hot)
    row = row_of_head + offs_q
    pointers = dspan_bias_ptr + row[:, None] * num_spans + offs_s[None, :]
    tl.store(pointers, dbias, mask=mask_q[:, None] & (offs_s < num_spans)[None, :])
