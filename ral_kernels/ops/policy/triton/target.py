"""Device functions and the kernel for a reference that rows share: an `AttentionTarget`.

Rows read their target through an index. What is read from memory grows with the number of targets,
not of rows, and no copy for a row is written.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ...divergence.triton.terms import divergence_gradient, divergence_terms
from .side import (
    first_row,
    key_masks,
    key_range,
    keys_in_scope,
    program_of_head,
    real_keys,
    rows_of_heads,
)

COLUMNS = tl.constexpr(32)  # of a tile whose terms are formed together; every BLOCK_K holds them
NORMALISED_WITHIN = tl.constexpr(2.0**-20)  # as in reference.py


@triton.jit
def target_of_rows(target, sample, offs_q, mask_q):
    """[BLOCK_Q]: the target of each row, -1 for none."""
    index_ptr = target.index.ptr + sample.rows * target.index.stride_b
    return tl.load(index_ptr + offs_q, mask=mask_q, other=-1)


@triton.jit
def divisor_of_target(target, sample, offs_q, mask_q):
    """[BLOCK_Q]: what makes weights on valid keys sum to 1; infinite for a row without any: (11).

    Weights that do so up to rounding stay as they are: a policy equal to its target then has the
    same bits.
    """
    z = tl.load(target.z.ptr + sample.rows * target.z.stride_b + offs_q, mask=mask_q, other=0.0)
    z = tl.where(tl.abs(z - 1.0) <= NORMALISED_WITHIN, 1.0, z)
    return tl.where(z == 0.0, float("inf"), z)


@triton.jit
def first_of_target(target, sample, which):
    """[BLOCK_Q, 1]: offset of the first weight, and of the first id, of each row's target."""
    return sample.keys * target.stride_b + which.to(tl.int64)[:, None] * target.stride_g


@triton.jit
def first_id(target, samples, sample):
    """What ids call the sample's first key. They count those of all packed sequences."""
    if samples.key_offsets_ptr is None:
        return target.first_key
    else:
        return target.first_key + sample.keys.to(tl.int32)


@triton.jit
def weights_of_keys(target, samples, sample, which, offs_k, valid):
    """[BLOCK_Q, BLOCK_K]: the weights of keys in the target of each row, 0 where not valid."""
    first = first_of_target(target, sample, which)
    valid = valid & (which >= 0)[:, None]
    if target.ids_ptr is None:
        at = offs_k[None, :]
    else:
        # As uint32, -1 is above every key.
        key = (first_id(target, samples, sample) + offs_k)[None, :].to(tl.uint32)
        at = tl.zeros(valid.shape, tl.int32)  # how many ids are below the key; at most K - 1
        for step in range(target.num_steps):
            more = at + (1 << (target.num_steps - 1 - step))
            ids = tl.load(
                target.ids_ptr + first + (more - 1), mask=valid & (more < target.num_ids), other=-1
            )
            at = tl.where(ids.to(tl.uint32, bitcast=True) < key, more, at)
        ids = tl.load(target.ids_ptr + first + at, mask=valid, other=-1)
        valid = valid & (ids.to(tl.uint32, bitcast=True) == key)
    return tl.load(target.weights_ptr + first + at, mask=valid, other=0.0)


@triton.jit
def compare_with_target(
    target, p_ptr, p_stride_t, flags, samples, sample, offs_q, mask_q, first_key, window_left,
    window_right, tile,
):  # fmt: skip
    """[BLOCK_Q]: the terms of D of a tile of p, summed; ∂D/∂p takes the place of p.

    Terms take ten registers for each element. So the tile is read back, from L2, some columns at a
    time.
    """
    which = target_of_rows(target, sample, offs_q, mask_q)
    divisor = divisor_of_target(target, sample, offs_q, mask_q)
    p_ptr += offs_q.to(tl.int64)[:, None] * p_stride_t
    d = tl.zeros([tile.BLOCK_Q], tl.float32)
    for first in tl.range(first_key, first_key + tile.BLOCK_K, COLUMNS, num_stages=1):
        offs_k = first + tl.arange(0, COLUMNS)
        mask_k = real_keys(flags, sample.keys, offs_k, offs_k < sample.seqlen_k)
        _, valid = key_masks(
            (sample.query_start + offs_q)[:, None], offs_k[None, :], mask_k[None, :],
            keys_in_scope(flags, sample.keys, offs_k, mask_k)[None, :], window_left, window_right,
            tile.EXCLUDE_SELF,
        )  # fmt: skip
        valid = valid & mask_q[:, None]
        # [BLOCK_Q, COLUMNS], each
        p = tl.load(p_ptr + offs_k[None, :], mask=valid, other=0.0)
        r = weights_of_keys(target, samples, sample, which, offs_k, valid)
        # To a rounding: the weight of a row with one key becomes 1.
        r = tl.div_rn(r, divisor[:, None])
        d += tl.sum(divergence_terms(p, r, target.KIND, True), 1)
        dp = divergence_gradient(p, r, target.KIND, True)
        tl.store(p_ptr + offs_k[None, :], dp, mask=valid)
    return d


@triton.jit(
    do_not_specialize=["num_rows", "per_split", "query_start", "window_left", "window_right"]
)
def policy_target_kernel(
    target,
    flags,
    partial_ptr,
    samples,
    heads,
    num_rows,
    per_split,
    query_start,
    window_left,
    window_right,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
):
    """Weight of each row's target on the row's valid keys, of a piece of the keys, or of the ids.

    partial: float64 [splits, B, T]. In float64 the order of the terms is lost in the rounding to
    float32, so that ids and all keys give the same z.
    """
    sample, row_block, _head, split = program_of_head(
        samples, heads, num_rows, query_start, BLOCK_Q
    )
    offs_q = row_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    mask_q = offs_q < sample.num_rows
    which = target_of_rows(target, sample, offs_q, mask_q)
    has_target = (which >= 0)[:, None]
    first = first_of_target(target, sample, which)
    start = split * per_split
    if target.ids_ptr is None:
        position = sample.query_start + row_block * BLOCK_Q
        stop = tl.minimum(start + per_split, sample.seqlen_k)
        low, high = key_range(
            position, position + BLOCK_Q - 1, window_left, window_right, start, stop, BLOCK_K
        )
    else:
        low, high = start, tl.minimum(start + per_split, target.num_ids)
    total = tl.zeros([BLOCK_Q], tl.float64)
    for block in range(low, high, BLOCK_K):
        at = block + tl.arange(0, BLOCK_K)[None, :]
        if target.ids_ptr is None:
            offs_k = at
        else:
            # [BLOCK_Q, BLOCK_K]; keys of other sequences, and no key, are out of range
            mask = has_target & (at < target.num_ids)
            ids = tl.load(target.ids_ptr + first + at, mask=mask, other=-1)
            offs_k = ids - first_id(target, samples, sample)
            offs_k = tl.where((ids >= 0) & (offs_k >= 0), offs_k, sample.seqlen_k)
        mask_k = real_keys(flags, sample.keys, offs_k, offs_k < sample.seqlen_k)
        _, valid = key_masks(
            (sample.query_start + offs_q)[:, None], offs_k, mask_k,
            keys_in_scope(flags, sample.keys, offs_k, mask_k), window_left, window_right,
            EXCLUDE_SELF,
        )  # fmt: skip
        # [BLOCK_Q, BLOCK_K]
        weights = tl.load(target.weights_ptr + first + at, mask=valid & has_target, other=0.0)
        total += tl.sum(weights.to(tl.float64), 1)
    partial_ptr += split * rows_of_heads(samples, 1, num_rows)
    tl.store(partial_ptr + first_row(samples, sample, num_rows) + offs_q, total, mask=mask_q)
