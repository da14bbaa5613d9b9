"""Which blocks of a tile's other side need masks: two loops, one over those that need none.

A block is at the edge if some row does not see some of its keys, or it is the last and not full.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Range(NamedTuple):
    """Blocks to visit: [first, last), of which [first_full, last_full) need no mask."""

    first: Any
    first_full: Any
    last_full: Any
    last: Any


class Ranges(NamedTuple):
    """A Range of whole blocks; with spans, of short and of gathered ones, too: triton_spans.py."""

    whole: Any
    short: Any
    gathered: Any


class Blocks(NamedTuple):
    """The blocks that one loop visits: see `block_number`."""

    first: Any
    number: Any
    num_left: Any
    gap: Any
    num_whole: Any
    to_short: Any
    num_short_left: Any
    short_gap: Any
    num_short: Any
    to_gathered: Any


@triton.jit
def block_ranges(low, high, full_low, full_high, BLOCK: tl.constexpr):
    """Blocks that touch [low, high), and those among them that lie within [full_low, full_high)."""
    low = tl.maximum(low, 0)
    high = tl.maximum(high, low)
    first = low // BLOCK
    last = tl.where(high > low, tl.cdiv(high, BLOCK), first)
    first_full = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(full_low, 0), BLOCK), first), last)
    last_full = tl.maximum(tl.minimum(tl.maximum(full_high, 0) // BLOCK, last), first_full)
    none = Range(0, 0, 0, 0)
    return Ranges(Range(first, first_full, last_full, last), none, none)


@triton.jit
def _part_of_range(blocks, part, parts):
    number = tl.cdiv(blocks.last - blocks.first, parts)
    first = tl.minimum(blocks.first + part * number, blocks.last)
    last = tl.minimum(first + number, blocks.last)
    first_full = tl.minimum(tl.maximum(blocks.first_full, first), last)
    last_full = tl.minimum(tl.maximum(blocks.last_full, first_full), last)
    return Range(first, first_full, last_full, last)


@triton.jit
def part_of_ranges(ranges, part, parts, HAS_SPANS: tl.constexpr = False):
    """The part-th of `parts` parts of the blocks."""
    short, gathered = ranges.short, ranges.gathered
    if HAS_SPANS:
        short = _part_of_range(short, part, parts)
        gathered = _part_of_range(gathered, part, parts)
    return Ranges(_part_of_range(ranges.whole, part, parts), short, gathered)


@triton.jit
def neighbours(first, number):
    """`number` blocks from `first` on."""
    return Blocks(first, number, 0, 0, 0, 0, 0, 0, 0, 0)


@triton.jit
def full_blocks(blocks):
    """Those of a Range that need no mask."""
    return neighbours(blocks.first_full, blocks.last_full - blocks.first_full)


@triton.jit
def edge_blocks(ranges, HAS_LEFT: tl.constexpr, HAS_SHORT: tl.constexpr):
    """All that need a mask. Without HAS_LEFT, none comes before those that need none."""
    whole, short, gathered = ranges.whole, ranges.short, ranges.gathered
    num_left = whole.first_full - whole.first
    num_whole = num_left + whole.last - whole.last_full
    num_short_left = num_whole + short.first_full - short.first
    num_short = num_short_left + short.last - short.last_full
    number = num_short + gathered.last - gathered.first
    first = whole.first if HAS_LEFT else whole.last_full
    first_short = short.first if HAS_LEFT else short.last_full
    return Blocks(
        first, number, num_left, whole.last_full - whole.first_full, num_whole,
        first_short - whole.last, num_short_left, short.last_full - short.first_full, num_short,
        gathered.first - (short.last if HAS_SHORT else whole.last),
    )  # fmt: skip


@triton.jit
def blocks_of_loop(ranges, IS_EDGE: tl.constexpr):
    """The whole blocks that need no mask, or with IS_EDGE all others."""
    if IS_EDGE:
        return edge_blocks(ranges, True, False)
    else:
        return full_blocks(ranges.whole)


@triton.jit
def block_number(
    i,
    blocks,
    IS_EDGE: tl.constexpr,
    HAS_SPANS: tl.constexpr = False,
    HAS_SHORT: tl.constexpr = False,
    HAS_LEFT: tl.constexpr = True,
):
    """The i-th block of a loop.

    With IS_EDGE it skips `gap` blocks after the first `num_left`. With spans it goes on to short
    blocks after `num_whole`, where it skips `short_gap`, and to gathered ones after `num_short`.
    """
    block = blocks.first + i
    if IS_EDGE:
        if HAS_LEFT:
            block += tl.where(i >= blocks.num_left, blocks.gap, 0)
        if HAS_SHORT:
            block += tl.where(i >= blocks.num_whole, blocks.to_short, 0)
            if HAS_LEFT:
                block += tl.where(i >= blocks.num_short_left, blocks.short_gap, 0)
        if HAS_SPANS:
            block += tl.where(i >= blocks.num_short, blocks.to_gathered, 0)
    return block
