"""What the Triton kernels of `attention` share: positions, loads, scores.

Scores are in base 2 from the start (times log2 e), because exp2 is the instruction that GPUs have.
A tile has queries along rows (`[BLOCK_Q, BLOCK_K]`), or along columns with TRANSPOSED.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from ral_kernels.runtime.triton_softmax import LOG2E, in_base_2, tanh
from ral_kernels.runtime.triton_spans import sequence_of_block

from .marginals import here

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def backward_lse_log2(lse):
    """lse in base 2; +inf in place of -inf makes every weight of a fully masked row exactly 0."""
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def locate(cu_seqlens_ptr, num_sequences, seqlen, block, BLOCK: tl.constexpr):
    """(sequence, its first token, its length, number of this block within it)."""
    if cu_seqlens_ptr is not None:
        return sequence_of_block(cu_seqlens_ptr, num_sequences, block, BLOCK)
    else:
        zero = block * 0
        return zero, zero, zero + seqlen, block


@triton.jit
def length_of(cu_seqlens_ptr, sequence, seqlen):
    """(first token, length) of a sequence on the other side of the attention."""
    if cu_seqlens_ptr is not None:
        start = tl.load(cu_seqlens_ptr + sequence)
        return start, tl.load(cu_seqlens_ptr + sequence + 1) - start
    else:
        return sequence * 0, sequence * 0 + seqlen


@triton.jit
def block_ranges(low, high, full_low, full_high, BLOCK: tl.constexpr):
    """Blocks that touch [low, high), and those among them that lie within [full_low, full_high).

    -> first, first_full, last_full, last: [first, last) is what has to be visited, and only blocks
    outside [first_full, last_full), at the edge, need a mask.
    """
    low = tl.maximum(low, 0)
    high = tl.maximum(high, low)
    first = low // BLOCK
    last = tl.where(high > low, tl.cdiv(high, BLOCK), first)
    first_full = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(full_low, 0), BLOCK), first), last)
    last_full = tl.maximum(tl.minimum(tl.maximum(full_high, 0) // BLOCK, last), first_full)
    return first, first_full, last_full, last


@triton.jit
def block_number(i, first, num_left, gap, IS_EDGE: tl.constexpr):
    """The i-th of a loop's blocks: from `first` on, with IS_EDGE leaving out `gap` after a few."""
    block = first + i
    if IS_EDGE:
        block += tl.where(i >= num_left, gap, 0)
    return block


@triton.jit
def exist(positions, length, IS_EDGE: tl.constexpr):
    """Which positions are within the sequence: all of them in a block that is not at an edge."""
    if IS_EDGE:
        return positions < length
    else:
        return positions >= 0


@triton.jit
def load_part(
    base_ptr, rows, stride, mask_rows, first_d, HEAD_DIM: tl.constexpr, PART_D: tl.constexpr
):  # fmt: skip
    """A tile [rows, PART_D], from feature first_d on; rows and features out of range are 0."""
    offs_d = first_d + tl.arange(0, PART_D)
    pointers = base_ptr + rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
    mask = mask_rows[:, None]
    if HEAD_DIM % PART_D != 0:
        mask = mask & (offs_d[None, :] < HEAD_DIM)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def load_rows(base_ptr, rows, stride, mask_rows, HEAD_DIM: tl.constexpr, PART_D: tl.constexpr):
    """A tile [rows, PART_D] of a tensor with unit last stride; rows out of range are 0.

    Just 0 where the rows have more features than that: `dot_rows` and `add_product` then read what
    they need when they need it. A product of float32 splits its operands into three, and those of
    more than 64 features, or waiting for a second product, do not fit the registers.
    """
    if HEAD_DIM <= PART_D:
        return load_part(base_ptr, rows, stride, mask_rows, 0, HEAD_DIM, PART_D)
    else:
        return 0


@triton.jit
def dot_rows(
    acc, a, a_ptr, a_rows, a_stride, a_mask, b, b_ptr, b_rows, b_stride, b_mask,
    HEAD_DIM: tl.constexpr, PART_D: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + a bᵀ, where a and b are rows from `load_rows`."""
    if HEAD_DIM <= PART_D:
        acc = tl.dot(a, tl.trans(b), acc, input_precision=INPUT_PRECISION)
    else:
        for first_d in range(0, HEAD_DIM, PART_D):
            # [rows of a, PART_D], [rows of b, PART_D]
            a_part = load_part(a_ptr, a_rows, a_stride, a_mask, first_d, HEAD_DIM, PART_D)
            b_part = load_part(b_ptr, b_rows, b_stride, b_mask, first_d, HEAD_DIM, PART_D)
            acc = tl.dot(a_part, tl.trans(b_part), acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit
def add_product(
    acc, x, b, b_ptr, b_rows, b_stride, b_mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    PART_D: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + x b, where b are rows from `load_rows`."""
    if HEAD_DIM > PART_D:
        # [rows of b, BLOCK_D]
        b = load_part(b_ptr, here(b_rows.to(tl.int64)), b_stride, b_mask, 0, HEAD_DIM, BLOCK_D)
    return tl.dot(x.to(b.dtype), b, acc, input_precision=INPUT_PRECISION)


@triton.jit
def store_rows(
    base_ptr, rows, stride, mask_rows, x, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Write a tile [rows, BLOCK_D]."""
    offs_d = tl.arange(0, BLOCK_D)
    pointers = base_ptr + rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
    mask = mask_rows[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(pointers, x.to(base_ptr.dtype.element_ty), mask=mask)


@triton.jit
def in_window(
    q_positions,
    k_positions,
    mask_k,
    diagonal,  # a query stands at the key position q_position + diagonal
    window_left,
    window_right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Which keys of a block exist and lie in the window of which queries."""
    # The axes along which vectors are expanded.
    QUERY: tl.constexpr = 0 if TRANSPOSED else 1
    KEY: tl.constexpr = 1 if TRANSPOSED else 0
    visible = tl.expand_dims(mask_k, KEY)
    at = tl.expand_dims(q_positions + diagonal, QUERY)
    keys = tl.expand_dims(k_positions, KEY)
    if HAS_LEFT:
        visible = visible & (keys >= at - window_left)
    if HAS_RIGHT:
        visible = visible & (keys <= at + window_right)
    return visible


@triton.jit
def scores(
    dot,  # q kᵀ
    bias,  # of spans, in base 2, if HAS_BIAS
    q_positions,  # within the sequence
    k_positions,
    k_tokens,  # within the tensor
    mask_q,
    mask_k,
    attn_mask_ptr,
    attn_mask_rows,  # int64 offsets of the queries
    attn_mask_stride_n,
    key_padding_mask_ptr,
    key_padding_mask_stride_n,
    diagonal,  # a query stands at the key position q_position + diagonal
    window_left,
    window_right,
    scale,  # τ log2 e, or τ / c with a soft cap c
    cap,  # c log2 e
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BOOL_MASK: tl.constexpr,
    IS_EDGE: tl.constexpr,  # whether keys of the block are beyond a window's edge or the last key
    TRANSPOSED: tl.constexpr,
):
    """Equations (1) to (3) in base 2, and the derivative of the soft cap (2), 1 without one."""
    s = dot * scale
    dcap = 1.0
    # The axes along which vectors are expanded.
    QUERY: tl.constexpr = 0 if TRANSPOSED else 1
    KEY: tl.constexpr = 1 if TRANSPOSED else 0
    if HAS_CAP:
        squashed = tanh(s)
        s = squashed * cap
        dcap = 1.0 - squashed * squashed
    if HAS_BIAS:
        s += bias
    if key_padding_mask_ptr is not None:
        offsets = k_tokens.to(tl.int64) * key_padding_mask_stride_n
        real = tl.load(key_padding_mask_ptr + offsets, mask=mask_k, other=0) != 0
        s = tl.where(tl.expand_dims(real, KEY), s, float("-inf"))
    if attn_mask_ptr is not None:
        offsets = tl.expand_dims(k_tokens.to(tl.int64) * attn_mask_stride_n, KEY)
        offsets = tl.expand_dims(attn_mask_rows, QUERY) + offsets
        mask = tl.expand_dims(mask_q, QUERY) & tl.expand_dims(mask_k, KEY)
        a = tl.load(attn_mask_ptr + offsets, mask=mask, other=0)
        if BOOL_MASK:
            s = tl.where(a != 0, s, float("-inf"))
        else:
            s += in_base_2(a.to(tl.float32))
    if IS_EDGE:
        visible = in_window(
            q_positions, k_positions, mask_k, diagonal, window_left, window_right, HAS_LEFT,
            HAS_RIGHT, TRANSPOSED,
        )  # fmt: skip
        s = tl.where(visible, s, float("-inf"))
    return s, dcap
