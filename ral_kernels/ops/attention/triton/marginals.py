"""Products with the one-hot matrix E of spans within a Triton kernel, a block of keys at a time.

x E sums over spans: marginals in the forward, dspan_bias in the backward. x Eᵀ gives each key the
value of its span: dmarginals in the backward.

A program owns `[rows, num_spans]` of the output, in global memory. While consecutive blocks lie
within one span, their sum stays in registers, as a vector. When the loop over the keys leaves the
span, the program stores it, or adds it where the span's keys may have come before. So the number of
spans costs neither registers nor shared memory.

Layouts of tiles and vectors differ, so a thread may read what another thread stored. Every
read-modify-write here starts with a barrier, which orders it after all earlier ones.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ....runtime import triton_runtime
from ....runtime.triton_softmax import LOG2E
from ....runtime.triton_spans import MIXED, NO_SPAN, RETURNS

# A stored sum is relative to 2^exponent, where the exponent is a row's maximum when it stores the
# first. A later maximum may exceed it by this much: 2^27 keys more would overflow float32.
HEADROOM = tl.constexpr(100.0)
HIDDEN = tl.constexpr(-(2.0**100))
MINUS_INFINITY = tl.constexpr(-(2.0**101))
INTERPRETED = tl.constexpr(triton_runtime.interpreted())
GROUP = tl.constexpr(16)  # spans in one matrix product, the least that tl.dot takes


class SpanBlock(NamedTuple):
    """Entries of the table of spans from some block on; 0 without spans."""

    entries_ptr: Any
    positions_ptr: Any
    counts_ptr: Any
    ids_ptr: Any
    local_ptr: Any


class Sums(NamedTuple):
    """Sums over spans that a program owns: the pointer to its row 0, and numbers of rows.

    They are int32 where rows times spans surely fit.
    """

    ptr: Any
    rows: Any
    mask_rows: Any
    num_spans: Any


@triton.jit
def moved_spans(spans, entry, BLOCK_K: tl.constexpr):
    """The table of spans from `entry` on."""
    if spans.entries_ptr is None:
        return SpanBlock(0, 0, 0, 0, 0)
    else:
        return SpanBlock(
            spans.entries_ptr + entry,
            spans.positions_ptr + entry * BLOCK_K,
            spans.counts_ptr + entry,
            spans.ids_ptr + entry * BLOCK_K,
            spans.local_ptr + entry * BLOCK_K,
        )


@triton.jit
def entry_of(spans, block, HAS_SPANS: tl.constexpr):
    """(kind, first key) of a block of keys; (NO_SPAN, 0) without spans."""
    if HAS_SPANS:
        entry = tl.load(spans.entries_ptr + block)
        return (entry >> 32).to(tl.int32), entry.to(tl.int32)
    else:
        return NO_SPAN, 0


@triton.jit
def is_span(kind):
    """Whether a block of this kind holds one span."""
    return (kind >= 0) | (kind <= RETURNS)


@triton.jit
def span_of(kind):
    """The span of a block that holds one; 0 of others."""
    return tl.maximum(tl.where(kind <= RETURNS, RETURNS - kind, kind), 0)


@triton.jit
def opaque_zero(BARRIER: tl.constexpr):
    """0, which the compiler does not know; with BARRIER after __syncthreads().

    What is formed from it stays where it is. Otherwise the compiler forms the addresses of a rare
    branch before the loop, and keeps them in registers throughout. tl.debug_barrier() is no choice:
    Triton does not pipeline a loop that has one. A scalar makes one barrier of it, not one for each
    layout.
    """
    zero = tl.program_id(0) * 0
    if not INTERPRETED:
        if BARRIER:
            zero = tl.inline_asm_elementwise(
                "bar.sync 0; mov.b32 $0, $1;", "=r,r", [zero], tl.int32, False, 1
            )
        else:
            zero = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [zero], tl.int32, False, 1)
    return zero


@triton.jit
def here(offsets):
    """Returns int64 `offsets`. What is formed from them stays within the branch, as above."""
    if not INTERPRETED:
        offsets = tl.inline_asm_elementwise(
            "mov.b64 $0, $1;", "=l,l", [offsets], tl.int64, False, 1
        )
    return offsets


@triton.jit
def bias_in_base_2(bias):
    """A span bias times log2 e. Finite numbers replace -inf and finfo.min, as 0 · inf is NaN.

    -2^100 replaces finfo.min: the span has weight only where it is alone. -2^101 replaces -inf: the
    span has no weight.
    """
    return tl.where(bias == float("-inf"), MINUS_INFINITY, tl.maximum(bias * LOG2E, HIDDEN))


@triton.jit
def bias_or_minus_infinity(bias):
    """The inverse of the second replacement, after the product."""
    return tl.where(bias == MINUS_INFINITY, float("-inf"), bias)


@triton.jit
def one_hot_dot(x, one_hot, acc, TERMS: tl.constexpr):
    """acc + x one_hot, to nearly float32's accuracy.

    x is split into TERMS bfloat16 numbers, which have 8 bits and float32's range. Two are far more
    precise than half-precision inputs; three are exact.
    """
    if INTERPRETED:  # the interpreter multiplies bfloat16 wrongly
        acc = tl.dot(x, one_hot.to(tl.float32), acc)
    else:
        for _ in tl.static_range(TERMS):
            term = x.to(tl.bfloat16)
            acc = tl.dot(term, one_hot.to(tl.bfloat16), acc)
            x -= term.to(tl.float32)
    return acc


@triton.jit
def store_span(sums, span, x):
    """sums[rows, span] = x."""
    pointers = sums.ptr + span + (sums.rows + opaque_zero(False)) * sums.num_spans
    if INTERPRETED:
        tl.store(pointers, x, mask=sums.mask_rows)
    else:
        # In the layout of `x`. tl.store would take another, by two barriers. Threads that hold the
        # same row store the same number.
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.b32 [$1], $2; mov.b32 $0, 0; }",
            "=r,l,f,r", [pointers.to(tl.int64), x, sums.mask_rows.to(tl.int32)], tl.int32, False, 1,
        )  # fmt: skip


@triton.jit
def add_to_span(sums, span, x):
    """sums[rows, span] += x."""
    pointers = sums.ptr + span + (sums.rows + opaque_zero(True)) * sums.num_spans
    before = tl.load(pointers, mask=sums.mask_rows, other=0.0)
    tl.store(pointers, before + x, mask=sums.mask_rows)


@triton.jit
def leave_span(sums, kind, x, ADDS: tl.constexpr):
    """Keep the sum of the span of the blocks left, if they were of one."""
    if ADDS:
        if is_span(kind):
            add_to_span(sums, span_of(kind), x)
    else:
        if kind >= 0:
            store_span(sums, kind, x)
        elif kind <= RETURNS:
            add_to_span(sums, span_of(kind), x)


@triton.jit
def scale_rows(sums, factor):
    """sums[rows] *= factor; a factor of 0 clears them, inf too."""
    # Without this gather the compiler keeps a second copy of `factor`, and of all it is made of, in
    # registers throughout the loop over the keys: in the layout that the sums have here.
    factor = tl.gather(factor, tl.arange(0, factor.shape[0]), 0)
    rows = sums.rows + opaque_zero(True)
    columns = tl.arange(0, GROUP)
    for start in tl.range(0, sums.num_spans, GROUP, num_stages=1):
        mask = sums.mask_rows[:, None] & (start + columns < sums.num_spans)[None, :]
        offsets = (rows.to(tl.int64) * sums.num_spans)[:, None]
        pointers = sums.ptr + offsets + (start + columns)[None, :]
        # [BLOCK_Q, GROUP]
        stored = tl.load(pointers, mask=mask, other=0.0)
        scaled = tl.where(factor[:, None] == 0.0, 0.0, stored * factor[:, None])
        tl.store(pointers, scaled, mask=mask)


@triton.jit
def correct_rows(sums, weights, excess):
    """sums[rows] -= weights · excess (16); where a weight is 0, excess may be inf or NaN."""
    excess = tl.gather(excess, tl.arange(0, excess.shape[0]), 0)  # as in scale_rows
    rows = sums.rows + opaque_zero(True)
    columns = tl.arange(0, GROUP)
    for start in tl.range(0, sums.num_spans, GROUP, num_stages=1):
        mask = sums.mask_rows[:, None] & (start + columns < sums.num_spans)[None, :]
        offsets = (rows.to(tl.int64) * sums.num_spans)[:, None] + (start + columns)[None, :]
        # [BLOCK_Q, GROUP]
        weight = tl.load(weights.ptr + offsets, mask=mask, other=0.0)
        stored = tl.load(sums.ptr + offsets, mask=mask, other=0.0)
        corrected = tl.where(weight == 0.0, stored, stored - weight * excess[:, None])
        tl.store(sums.ptr + offsets, corrected, mask=mask)


@triton.jit
def add_mixed_block(
    sums,
    x,  # [BLOCK_Q, BLOCK_K]
    weight,  # [BLOCK_Q]
    spans,
    BLOCK_K: tl.constexpr,
    TERMS: tl.constexpr,
):
    """sums[rows] += weight · (x E) for a block of keys in several spans.

    A product with the one-hot E of 16 local ids at a time.
    """
    count = tl.load(spans.counts_ptr)
    local = tl.load(spans.local_ptr + tl.arange(0, BLOCK_K))
    columns = tl.arange(0, GROUP)
    for start in tl.range(0, count, GROUP, num_stages=1):
        one_hot = local[:, None] == (start + columns)[None, :]
        added = tl.zeros([x.shape[0], GROUP], tl.float32)
        added = one_hot_dot(x, one_hot, added, TERMS)
        mask = sums.mask_rows[:, None] & (start + columns < count)[None, :]
        ids = tl.load(spans.ids_ptr + start + columns, mask=start + columns < count, other=0)
        rows = (sums.rows + opaque_zero(True)).to(tl.int64) * sums.num_spans
        pointers = sums.ptr + rows[:, None] + ids[None, :]
        # [BLOCK_Q, GROUP]
        before = tl.load(pointers, mask=mask, other=0.0)
        tl.store(pointers, before + added * weight[:, None], mask=mask)


@triton.jit
def begun_exponent(exponent, m):
    """The exponent of what is stored, once there is something: the first maximum of a row."""
    return tl.where(exponent == float("-inf"), m, exponent)


@triton.jit
def relative_weight(exponent, m):
    """2^(m - exponent), and 0 in rows that have seen no key."""
    return tl.where(exponent == float("-inf"), 0.0, tl.exp2(m - exponent))


@triton.jit
def spans_of_places(kinds, spans, BLOCK_K: tl.constexpr, TABLE_K: tl.constexpr):
    """[BLOCK_K]: the span of every key of a tile's blocks, one or two; -1 of a key in none."""
    offs = tl.arange(0, BLOCK_K)
    kind = tl.zeros([BLOCK_K], tl.int32) + kinds[0]
    if BLOCK_K > TABLE_K:
        kind = tl.where(offs < TABLE_K, kind, kinds[1])
    local = tl.load(spans.local_ptr + offs, mask=kind == MIXED, other=-1)
    ids_ptr = spans.ids_ptr + offs // TABLE_K * TABLE_K
    listed = tl.load(ids_ptr + local, mask=local >= 0, other=-1)
    return tl.where(kind == MIXED, listed, tl.where(is_span(kind), span_of(kind), -1))


@triton.jit
def gathered_bias(
    key_spans,  # [BLOCK_K]
    span_bias_ptr,
    row_offsets,  # int64
    stride_s,
    mask_rows,
):
    """[BLOCK_K, BLOCK_Q]: span_bias Eᵀ in base 2, element by element; 0 for keys in no span."""
    offsets = row_offsets[None, :] + (key_spans.to(tl.int64) * stride_s)[:, None]
    mask = mask_rows[None, :] & (key_spans >= 0)[:, None]
    values = tl.load(span_bias_ptr + offsets, mask=mask, other=0.0)
    return bias_or_minus_infinity(bias_in_base_2(values))


@triton.jit
def spans_of_slots(kinds, SLOTS: tl.constexpr):
    """[SLOTS]: the span of each of a tile's blocks of keys, which hold one or none; -1 of none."""
    kind = tl.zeros([SLOTS], tl.int32) + kinds[0]
    if SLOTS == 2:
        kind = tl.where(tl.arange(0, SLOTS) == 0, kind, kinds[1])
    return tl.where(is_span(kind), span_of(kind), -1)


@triton.jit
def keys_of_slots(x, BLOCK_K: tl.constexpr, TABLE_K: tl.constexpr):
    """Rows for a tile's blocks of keys -> [BLOCK_K, BLOCK_Q], or as it is if there is one block."""
    if BLOCK_K > TABLE_K:
        BLOCK_Q: tl.constexpr = x.shape[1]
        x = tl.broadcast_to(x[:, None, :], [BLOCK_K // TABLE_K, TABLE_K, BLOCK_Q])
        x = tl.reshape(x, [BLOCK_K, BLOCK_Q])
    return x


@triton.jit
def uniform_shares(
    kinds,
    per_span_ptr,
    row_offsets,  # int64
    stride_s,
    mask_rows,
    BLOCK_K: tl.constexpr,
    TABLE_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    IS_BIAS: tl.constexpr,
):
    """per_span Eᵀ for a tile of keys in blocks of one span: 0 for keys in others.

    [BLOCK_Q, 1], or with TRANSPOSED [1 or BLOCK_K, BLOCK_Q]. `kinds` are those of the
    tile's blocks of TABLE_K keys: one, or with TRANSPOSED two.
    """
    BLOCK_Q: tl.constexpr = mask_rows.shape[0]
    SLOTS: tl.constexpr = BLOCK_K // TABLE_K
    # A number for all rows first: what differs by row need not be formed here.
    if SLOTS == 1:
        pointers = per_span_ptr + span_of(kinds[0]).to(tl.int64) * stride_s + row_offsets
        kind = tl.zeros([BLOCK_Q], tl.int32) + kinds[0]  # the interpreter splats no condition
        # [BLOCK_Q]
        values = tl.load(pointers, mask=mask_rows & is_span(kind), other=0.0)
    else:
        kinds = tl.where(tl.arange(0, SLOTS) == 0, kinds[0], kinds[1])
        pointers = per_span_ptr + (span_of(kinds).to(tl.int64) * stride_s)[:, None]
        mask = mask_rows[None, :] & is_span(kinds)[:, None]
        # [SLOTS, BLOCK_Q]
        values = tl.load(pointers + row_offsets[None, :], mask=mask, other=0.0)
    if IS_BIAS:
        values = bias_or_minus_infinity(bias_in_base_2(values))
    if SLOTS > 1:
        return keys_of_slots(values, BLOCK_K, TABLE_K)
    elif TRANSPOSED:
        return values[None, :]
    else:
        return values[:, None]


@triton.jit
def add_mixed_shares(
    x,  # [BLOCK_Q, BLOCK_K]
    kind,
    spans,
    per_span_ptr,
    row_offsets,
    stride_s,
    mask_rows,
    BLOCK_K: tl.constexpr,
    TERMS: tl.constexpr,
    IS_BIAS: tl.constexpr,
):
    """`x` + per_span Eᵀ where the block of keys is mixed: a product with one-hot rows.

    A bias is in natural units and becomes one in base 2; it may be -inf.

    Kernels call this before the products that they add it to: with a branch between two products
    the compiler gives them different layouts. The loop is a `while`, because the compiler computes
    the result of a `for` once for each layout.
    """
    if kind == MIXED:
        local = tl.load(spans.local_ptr + tl.arange(0, BLOCK_K))
        columns = tl.arange(0, GROUP)
        count = tl.load(spans.counts_ptr)
        row_offsets = here(row_offsets)
        start = count * 0
        while start < count:
            mask_s = start + columns < count
            ids = tl.load(spans.ids_ptr + start + columns, mask=mask_s, other=0)
            offsets = row_offsets[:, None] + (ids.to(tl.int64) * stride_s)[None, :]
            mask = mask_rows[:, None] & mask_s[None, :]
            # [BLOCK_Q, GROUP]
            group = tl.load(per_span_ptr + offsets, mask=mask, other=0.0)
            if IS_BIAS:
                group = bias_in_base_2(group)
            one_hot = (start + columns)[:, None] == local[None, :]
            x = one_hot_dot(group, one_hot, x, TERMS)
            start += GROUP
        if IS_BIAS:
            x = bias_or_minus_infinity(x)
    return x


@triton.jit
def bias_of_tile(
    kind,
    spans,
    span_bias_ptr,
    row_offsets,
    stride_s,
    mask_rows,
    BLOCK_K: tl.constexpr,
    MAY_MIX: tl.constexpr,  # whether the block may hold several spans
):
    """span_bias Eᵀ for a block of keys, in base 2; without MAY_MIX it broadcasts to the tile."""
    bias = uniform_shares(
        (kind,), span_bias_ptr, row_offsets, stride_s, mask_rows, BLOCK_K, BLOCK_K, False, True
    )
    if MAY_MIX:
        bias = add_mixed_shares(
            tl.broadcast_to(bias, [mask_rows.shape[0], BLOCK_K]), kind, spans, span_bias_ptr,
            row_offsets, stride_s, mask_rows, BLOCK_K, 3, True,
        )  # fmt: skip
    return bias
