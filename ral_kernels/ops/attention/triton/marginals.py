"""Products with the one-hot matrix E of spans within a Triton kernel, a block of keys at a time.

x E sums over spans: marginals in the forward, dspan_bias in the backward. x Eᵀ gives each key the
value of its span: dmarginals in the backward.

A program owns `[rows, num_spans]` of the output, in global memory. While consecutive blocks lie
within one span, their sum stays in registers, as a vector. The program adds it to the output when
the loop over the keys leaves the span. So the number of spans costs neither registers nor shared
memory.

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
from ....runtime.triton_spans import MIXED, NO_SPAN

# A stored sum is relative to 2^exponent. The running maximum may exceed the exponent by this much
# before the stored sums are scaled down: far from float32's 2^128, far above rounding.
HEADROOM = tl.constexpr(64.0)
HIDDEN = tl.constexpr(-(2.0**100))
MINUS_INFINITY = tl.constexpr(-(2.0**101))
INTERPRETED = tl.constexpr(triton_runtime.interpreted())
GROUP = tl.constexpr(16)  # spans in one matrix product, the least that tl.dot takes


class SpanBlock(NamedTuple):
    """Where the entries of a block of keys stand in the table of spans; 0 without spans."""

    kinds_ptr: Any
    counts_ptr: Any
    ids_ptr: Any
    local_ptr: Any


class Sums(NamedTuple):
    """Sums over spans that a program owns: the pointer to its row 0, and int32 numbers of rows."""

    ptr: Any
    rows: Any
    mask_rows: Any
    num_spans: Any


@triton.jit
def moved_spans(spans, entry, key, BLOCK_K: tl.constexpr):
    """The table of spans from `entry` on, whose keys start `key` further on."""
    if spans.kinds_ptr is None:
        return SpanBlock(0, 0, 0, 0)
    else:
        return SpanBlock(
            spans.kinds_ptr + entry,
            spans.counts_ptr + entry,
            spans.ids_ptr + entry * BLOCK_K,
            spans.local_ptr + key,
        )


@triton.jit
def kind_of(spans, HAS_SPANS: tl.constexpr):
    """The kind of a block of keys; NO_SPAN without spans."""
    return tl.load(spans.kinds_ptr) if HAS_SPANS else NO_SPAN


@triton.jit
def barrier(rows):
    """__syncthreads(); returns `rows`.

    tl.debug_barrier() is the same, but Triton does not pipeline a loop that has one. `rows` pass
    through the instruction, so the compiler cannot form the addresses of a rare branch before the
    loop and keep them in registers throughout.
    """
    if not INTERPRETED:
        rows = tl.inline_asm_elementwise(
            "bar.sync 0; mov.b32 $0, $1;", "=r,r", [rows], tl.int32, False, 1
        )
    return rows


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
def one_hot_dot(x, one_hot, acc, TERMS: tl.constexpr, ONE_HOT_FIRST: tl.constexpr):
    """acc + x one_hot, or with ONE_HOT_FIRST acc + one_hot xᵀ, to nearly float32's accuracy.

    x is split into TERMS bfloat16 numbers, which have 8 bits and float32's range. Two are far more
    precise than half-precision inputs; three are exact.
    """
    if INTERPRETED:  # the interpreter multiplies bfloat16 wrongly
        if ONE_HOT_FIRST:
            acc = tl.dot(one_hot.to(tl.float32), tl.trans(x), acc)
        else:
            acc = tl.dot(x, one_hot.to(tl.float32), acc)
    else:
        for _ in tl.static_range(TERMS):
            term = x.to(tl.bfloat16)
            if ONE_HOT_FIRST:
                acc = tl.dot(one_hot.to(tl.bfloat16), tl.trans(term), acc)
            else:
                acc = tl.dot(term, one_hot.to(tl.bfloat16), acc)
            x -= term.to(tl.float32)
    return acc


@triton.jit
def add_to_span(sums, span, x):
    """sums[rows, span] += x."""
    rows = barrier(sums.rows)
    pointers = sums.ptr + rows.to(tl.int64) * sums.num_spans + span
    before = tl.load(pointers, mask=sums.mask_rows, other=0.0)
    tl.store(pointers, before + x, mask=sums.mask_rows)


@triton.jit
def scale_rows(sums, factor):
    """sums[rows] *= factor."""
    # Without this gather the compiler keeps a second copy of `factor`, and of all it is made of, in
    # registers throughout the loop over the keys: in the layout that the sums have here.
    factor = tl.gather(factor, tl.arange(0, factor.shape[0]), 0)
    rows = barrier(sums.rows)
    columns = tl.arange(0, GROUP)
    for start in tl.range(0, sums.num_spans, GROUP, num_stages=1):
        mask = sums.mask_rows[:, None] & (start + columns < sums.num_spans)[None, :]
        offsets = (rows.to(tl.int64) * sums.num_spans)[:, None]
        pointers = sums.ptr + offsets + (start + columns)[None, :]
        # [BLOCK_Q, GROUP]
        stored = tl.load(pointers, mask=mask, other=0.0)
        tl.store(pointers, stored * factor[:, None], mask=mask)


@triton.jit
def add_mixed_block(
    sums,
    x,  # [BLOCK_Q, BLOCK_K]
    weight,  # [BLOCK_Q]
    spans,
    mask_k,
    BLOCK_K: tl.constexpr,
    TERMS: tl.constexpr,
):
    """sums[rows] += weight · (x E) for a block of keys in several spans.

    A product with the one-hot E of 16 local ids at a time.
    """
    count = tl.load(spans.counts_ptr)
    local = tl.load(spans.local_ptr + tl.arange(0, BLOCK_K), mask=mask_k, other=-1)
    columns = tl.arange(0, GROUP)
    for start in tl.range(0, count, GROUP, num_stages=1):
        one_hot = local[:, None] == (start + columns)[None, :]
        added = tl.zeros([x.shape[0], GROUP], tl.float32)
        added = one_hot_dot(x, one_hot, added, TERMS, False)
        mask = sums.mask_rows[:, None] & (start + columns < count)[None, :]
        ids = tl.load(spans.ids_ptr + start + columns, mask=start + columns < count, other=0)
        rows = barrier(sums.rows).to(tl.int64) * sums.num_spans
        pointers = sums.ptr + rows[:, None] + ids[None, :]
        # [BLOCK_Q, GROUP]
        before = tl.load(pointers, mask=mask, other=0.0)
        tl.store(pointers, before + added * weight[:, None], mask=mask)


@triton.jit
def raised_exponent(exponent, m, sums):
    """The exponent of what is stored, before sums relative to 2^m are added.

    It is the first maximum of a row here. Where the maximum has outgrown it, the stored sums are
    scaled down; normal scores never make that necessary.
    """
    exponent = tl.where(exponent == float("-inf"), m, exponent)
    outgrown = m > exponent + HEADROOM
    if tl.max(outgrown.to(tl.int32), 0) > 0:
        factor = tl.where(outgrown, tl.exp2(exponent - m), 1.0)
        scale_rows(sums, factor)
        exponent = tl.where(outgrown, m, exponent)
    return exponent


@triton.jit
def relative_weight(exponent, m):
    """2^(m - exponent), and 0 in rows that have seen no key."""
    return tl.where(exponent == float("-inf"), 0.0, tl.exp2(m - exponent))


@triton.jit
def shares(
    kind,
    spans,
    per_span_ptr,
    row_offsets,  # int64
    stride_s,
    mask_rows,
    mask_k,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TERMS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    IS_BIAS: tl.constexpr,
):
    """per_span Eᵀ for a block of keys: for every element the value of its key's span.

    [BLOCK_Q, BLOCK_K], or with TRANSPOSED [BLOCK_K, BLOCK_Q]. A bias is in natural units and
    becomes one in base 2; it may be -inf.

    Kernels call this before the products that they add it to: with a branch between two products
    the compiler gives them different layouts. The loop is a `while`, because the compiler computes
    the result of a `for` once for each layout.
    """
    # [BLOCK_Q]
    pointers = per_span_ptr + row_offsets + tl.maximum(kind, 0).to(tl.int64) * stride_s
    kinds = tl.zeros([BLOCK_Q], tl.int32) + kind  # the interpreter does not splat a condition
    values = tl.load(pointers, mask=mask_rows & (kinds >= 0), other=0.0)
    if IS_BIAS:
        values = bias_or_minus_infinity(bias_in_base_2(values))
    if TRANSPOSED:
        x = tl.broadcast_to(values[None, :], [BLOCK_K, BLOCK_Q])
    else:
        x = tl.broadcast_to(values[:, None], [BLOCK_Q, BLOCK_K])
    if kind == MIXED:
        local = tl.load(spans.local_ptr + tl.arange(0, BLOCK_K), mask=mask_k, other=-1)
        columns = tl.arange(0, GROUP)
        count = tl.load(spans.counts_ptr)
        x = tl.zeros_like(x)
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
            if TRANSPOSED:
                one_hot = local[:, None] == (start + columns)[None, :]
            else:
                one_hot = (start + columns)[:, None] == local[None, :]
            x = one_hot_dot(group, one_hot, x, TERMS, TRANSPOSED)
            start += GROUP
        if IS_BIAS:
            x = bias_or_minus_infinity(x)
    return x
