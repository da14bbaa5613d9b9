"""What the Triton kernels of `attention` share: positions, tiles of rows, scores.

Scores are in base 2 from the start (times log2 e), because exp2 is the instruction that GPUs have.
A tile has queries along rows (`[BLOCK_Q, BLOCK_K]`), or along columns with TRANSPOSED.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ....runtime.triton_blocks import edge_blocks, full_blocks
from ....runtime.triton_rows import Head, load_rows
from ....runtime.triton_softmax import in_base_2, tanh
from ....runtime.triton_spans import first_span_block, sequence_of_block
from .marginals import here, moved_spans

LN2 = tl.constexpr(0.6931471805599453)

# Loops over keys: whole blocks without masks, short ones without masks, and what needs masks.
INTERIOR = tl.constexpr(0)
SHORT = tl.constexpr(1)
EDGE = tl.constexpr(2)


class RowTile(NamedTuple):
    """A tile [rows, features], and where it was read from."""

    x: Any
    head: Any
    rows: Any
    mask: Any


class Place(NamedTuple):
    """Positions of a tile's queries and keys within their sequence; tokens are in the tensor."""

    q_positions: Any
    mask_q: Any
    k_positions: Any
    k_tokens: Any
    mask_k: Any
    diagonal: Any  # a query stands at the key position q_position + diagonal


class Keys(NamedTuple):
    """The keys of one sequence and head, as a loop over their blocks reads them."""

    k: Any  # Head
    v: Any  # Head
    k_tensor: Any  # HeadTensor
    v_tensor: Any  # HeadTensor
    start: Any
    length: Any
    spans: Any  # SpanBlock of the first block


class HeadTensor(NamedTuple):
    """A tensor descriptor, and where the rows of one head begin in it; 0 where there is none."""

    x: Any
    row: Any
    column: Any


class Queries(NamedTuple):
    """The queries of one sequence and head, as a loop over their blocks reads them."""

    q: Any  # Head
    dout: Any  # Head
    lse_log2_ptr: Any
    delta_ptr: Any
    start: Any
    length: Any


class HeadMasks(NamedTuple):
    """Masks of one head: its pointers, 0 without a mask, and int64 offsets of the queries' rows."""

    attn_mask_ptr: Any
    attn_mask_rows: Any
    padding_ptr: Any


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
def blocks_of_keys(ranges, masks, LOOP: tl.constexpr, HAS_SHORT: tl.constexpr):
    """The blocks of keys of one of three loops: INTERIOR, SHORT and EDGE."""
    if LOOP == EDGE:
        return edge_blocks(ranges, masks.window.HAS_LEFT, HAS_SHORT)
    elif LOOP == SHORT:
        return full_blocks(ranges.short)
    else:
        return full_blocks(ranges.whole)


@triton.jit
def keys_of_block(
    keys, block, first_key, offsets, BLOCK_K: tl.constexpr, IS_EDGE: tl.constexpr,
    HAS_SPANS: tl.constexpr,
):  # fmt: skip
    """(positions of a block's keys, which of them exist; its K and V, and their rows there)."""
    offs = tl.arange(0, BLOCK_K)
    if not HAS_SPANS:
        positions = block * BLOCK_K + offs
        mask = exist(positions, keys.length, IS_EDGE)
        return positions, mask, keys.k, keys.v, keys.start + positions
    elif IS_EDGE:
        positions = tl.load(keys.spans.positions_ptr + block * BLOCK_K + offs)
        return positions, positions >= 0, keys.k, keys.v, keys.start + positions
    else:
        # Addresses of rows are formed before the loop; here one of the block is added.
        start = (keys.start + first_key).to(tl.int64)
        k = Head(keys.k.ptr + start * keys.k.stride, keys.k.stride)
        v = Head(keys.v.ptr + start * keys.v.stride, keys.v.stride)
        return first_key + offs, offs >= 0, k, v, offsets


@triton.jit
def exist(positions, length, IS_EDGE: tl.constexpr):
    """Which positions are within the sequence: all of them in a block that is not at an edge."""
    if IS_EDGE:
        return positions < length
    else:
        return positions >= 0


@triton.jit
def spans_of_keys(spans, b, sequence, k_start, IS_PACKED: tl.constexpr, BLOCK_K: tl.constexpr):
    """The table of spans from a sequence's first block on."""
    first_block = first_span_block(k_start, sequence, BLOCK_K) if IS_PACKED else 0
    return moved_spans(spans, b * spans.stride_b + first_block, BLOCK_K)


@triton.jit
def row_tile(head, rows, mask_rows, HEAD_DIM: tl.constexpr, PART_D: tl.constexpr):
    """A tile [rows, PART_D] of one head; rows out of range are 0.

    Nothing is read where the rows have more features than that: `dot_rows` and `add_weighted_rows`
    then read parts when they need them. A product of float32 splits its operands into three; those
    of more than 64 features, or that wait for a second product, do not fit the registers.
    """
    x = load_rows(head, rows, mask_rows, 0, HEAD_DIM, PART_D) if HEAD_DIM <= PART_D else 0
    return RowTile(x, head, rows, mask_rows)


@triton.jit
def tensor_of(tensor, x, b, h):
    """Head h of sample b in a tensor descriptor of all rows of x."""
    if tensor is None:
        return HeadTensor(0, 0, 0)
    else:
        offset = b * x.stride_b + h * x.stride_h
        row, column = offset // x.stride_t, offset % x.stride_t
        return HeadTensor(tensor, row.to(tl.int32), column.to(tl.int32))


@triton.jit
def tensor_tile(tensor, first):
    """`row_tile` of neighbours from row `first` of a head on, which all exist."""
    return RowTile(tensor.x.load([tensor.row + first, tensor.column]), 0, first, 0)


@triton.jit
def dot_rows(
    acc, a, b, HEAD_DIM: tl.constexpr, PART_D: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """acc + a bᵀ, where a and b come from `row_tile`."""
    if HEAD_DIM <= PART_D:
        acc = tl.dot(a.x, tl.trans(b.x), acc, input_precision=PRECISION)
    else:
        for first_d in range(0, HEAD_DIM, PART_D):
            # [rows of a, PART_D], [rows of b, PART_D]
            a_part = load_rows(a.head, a.rows, a.mask, first_d, HEAD_DIM, PART_D)
            b_part = load_rows(b.head, b.rows, b.mask, first_d, HEAD_DIM, PART_D)
            acc = tl.dot(a_part, tl.trans(b_part), acc, input_precision=PRECISION)
    return acc


@triton.jit
def add_weighted_rows(
    acc, weights, b, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PART_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + weights b, where b comes from `row_tile`."""
    if HEAD_DIM > PART_D:
        # [rows of b, BLOCK_D]
        x = load_rows(b.head, here(b.rows.to(tl.int64)), b.mask, 0, HEAD_DIM, BLOCK_D)
    else:
        x = b.x
    return tl.dot(weights.to(x.dtype), x, acc, input_precision=PRECISION)


@triton.jit
def in_window(place, masks, TRANSPOSED: tl.constexpr):
    """Which keys of a block exist and lie in the window of which queries."""
    # The axes along which vectors are expanded.
    QUERY: tl.constexpr = 0 if TRANSPOSED else 1
    KEY: tl.constexpr = 1 if TRANSPOSED else 0
    visible = tl.expand_dims(place.mask_k, KEY)
    at = tl.expand_dims(place.q_positions + place.diagonal, QUERY)
    keys = tl.expand_dims(place.k_positions, KEY)
    if masks.window.HAS_LEFT:
        visible = visible & (keys >= at - masks.window.left)
    if masks.window.HAS_RIGHT:
        visible = visible & (keys <= at + masks.window.right)
    return visible


@triton.jit
def masks_of_rows(masks, b, heads, q_tokens):
    """The masks of sample b for rows of `heads`: one head, or one for each row."""
    attn_mask_ptr, attn_mask_rows = 0, heads
    if masks.attn_mask is not None:
        attn_mask_ptr = masks.attn_mask.ptr
        attn_mask_rows = heads * masks.attn_mask.stride_h
        attn_mask_rows += q_tokens.to(tl.int64) * masks.attn_mask.stride_t
        attn_mask_rows += b * masks.attn_mask.stride_b
    return HeadMasks(attn_mask_ptr, attn_mask_rows, padding_of(masks, b))


@triton.jit
def padding_of(masks, b):
    """The key padding mask of sample b; 0 without one."""
    if masks.padding is None:
        return 0
    else:
        return masks.padding.ptr + b * masks.padding.stride_b


@triton.jit
def real_keys(masks, padding_ptr, k_tokens, mask_k):
    """mask_k without padding."""
    if masks.padding is not None:
        offsets = k_tokens.to(tl.int64) * masks.padding.stride_n
        mask_k = mask_k & (tl.load(padding_ptr + offsets, mask=mask_k, other=0) != 0)
    return mask_k


@triton.jit
def scores(
    dot,  # q kᵀ
    bias,  # of spans, in base 2, if there is one
    place,
    masks,
    head_masks,
    score,
    IS_EDGE: tl.constexpr,  # whether keys of the block are beyond a window's edge or the last key
    TRANSPOSED: tl.constexpr,
):
    """Equations (1) to (3) in base 2, and the derivative of the soft cap (2), 1 without one."""
    s = dot * score.scale
    dcap = 1.0
    # The axes along which vectors are expanded.
    QUERY: tl.constexpr = 0 if TRANSPOSED else 1
    KEY: tl.constexpr = 1 if TRANSPOSED else 0
    if score.HAS_CAP:
        squashed = tanh(s)
        s = squashed * score.cap
        dcap = 1.0 - squashed * squashed
    if masks.span_bias is not None:
        s += bias
    if masks.padding is not None:
        offsets = place.k_tokens.to(tl.int64) * masks.padding.stride_n
        real = tl.load(head_masks.padding_ptr + offsets, mask=place.mask_k, other=0) != 0
        s = tl.where(tl.expand_dims(real, KEY), s, float("-inf"))
    if masks.attn_mask is not None:
        offsets = tl.expand_dims(place.k_tokens.to(tl.int64) * masks.attn_mask.stride_n, KEY)
        offsets = tl.expand_dims(head_masks.attn_mask_rows, QUERY) + offsets
        mask = tl.expand_dims(place.mask_q, QUERY) & tl.expand_dims(place.mask_k, KEY)
        a = tl.load(head_masks.attn_mask_ptr + offsets, mask=mask, other=0)
        if masks.attn_mask.IS_BOOL:
            s = tl.where(a != 0, s, float("-inf"))
        else:
            s += in_base_2(a.to(tl.float32))
    if IS_EDGE:
        s = tl.where(in_window(place, masks, TRANSPOSED), s, float("-inf"))
    return s, dcap
