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
    """A Range of whole blocks; with spans, of short and gathered ones: triton_spans.py, or None."""

    whole: Any
    short: Any
    gathered: Any


class Blocks(NamedTuple):
    """The blocks that one loop visits: see `block_number`."""

    first: Any
    number: Any
    num_left: Any = None
    gap: Any = None
    num_whole: Any = None
    to_short: Any = None
    num_short_left: Any = None
    short_gap: Any = None
    num_short: Any = None
    to_gathered: Any = None


@triton.jit
def block_ranges(low, high, full_low, full_high, BLOCK: tl.constexpr):
    """Blocks that touch [low, high), and those among them that lie within [full_low, full_high)."""
    low = tl.maximum(low, 0)
    high = tl.maximum(high, low)
    first = low // BLOCK
    last = tl.where(high > low, tl.cdiv(high, BLOCK), first)
    first_full = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(full_low, 0), BLOCK), first), last)
    last_full = tl.maximum(tl.minimum(tl.maximum(full_high, 0) // BLOCK, last), first_full)
    return Ranges(Range(first, first_full, last_full, last), None, None)


@triton.jit
def _part_of_range(blocks, part, parts):
    number = tl.cdiv(blocks.last - blocks.first, parts)
    first = tl.minimum(blocks.first + part * number, blocks.last)
    last = tl.minimum(first + number, blocks.last)
    first_full = tl.minimum(tl.maximum(blocks.first_full, first), last)
    last_full = tl.minimum(tl.maximum(blocks.last_full, first_full), last)
    return Range(first, first_full, last_full, last)


@triton.jit
def part_of_ranges(ranges, part, parts):
    """The part-th of `parts` parts of the blocks."""
    short, gathered = ranges.short, ranges.gathered
    if short is not None:
        short = _part_of_range(short, part, parts)
    if gathered is not None:
        gathered = _part_of_range(gathered, part, parts)
    return Ranges(_part_of_range(ranges.whole, part, parts), short, gathered)


@triton.jit
def full_blocks(blocks):
    """Those of a Range that need no mask."""
    return Blocks(blocks.first_full, blocks.last_full - blocks.first_full)


@triton.jit
def edge_blocks(ranges, HAS_LEFT: tl.constexpr):
    """All that need a mask. Without HAS_LEFT, none comes before those that need none."""
    whole, short, gathered = ranges.whole, ranges.short, ranges.gathered
    num_left = whole.first_full - whole.first
    number = num_left + whole.last - whole.last_full
    first = whole.first if HAS_LEFT else whole.last_full
    gap = whole.last_full - whole.first_full if HAS_LEFT else None
    num_whole, last = number, whole.last
    num_short, num_short_left, to_short, short_gap, to_gathered = None, None, None, None, None
    if short is not None:
        num_short_left = num_whole + short.first_full - short.first
        to_short = (short.first if HAS_LEFT else short.last_full) - last
        short_gap = short.last_full - short.first_full if HAS_LEFT else None
        number = num_short_left + short.last - short.last_full
        last = short.last
    if gathered is not None:
        num_short = number
        to_gathered = gathered.first - last
        number += gathered.last - gathered.first
    return Blocks(
        first, number, num_left, gap, num_whole, to_short, num_short_left, short_gap, num_short,
        to_gathered,
    )  # fmt: skip


@triton.jit
def blocks_of_loop(ranges, IS_EDGE: tl.constexpr):
    """The whole blocks that need no mask, or with IS_EDGE all others."""
    if IS_EDGE:
        return edge_blocks(ranges, True)
    else:
        return full_blocks(ranges.whole)


@triton.jit
def block_number(i, blocks):
    """The i-th block of a loop.

    At edges it skips `gap` blocks after the first `num_left`. With spans it goes on to short blocks
    after `num_whole`, where it skips `short_gap`, and to gathered ones after `num_short`.
    """
    block = blocks.first + i
    if blocks.gap is not None:
        block += tl.where(i >= blocks.num_left, blocks.gap, 0)
    if blocks.to_short is not None:
        block += tl.where(i >= blocks.num_whole, blocks.to_short, 0)
    if blocks.short_gap is not None:
        block += tl.where(i >= blocks.num_short_left, blocks.short_gap, 0)
    if blocks.to_gathered is not None:
        block += tl.where(i >= blocks.num_short, blocks.to_gathered, 0)
    return block
