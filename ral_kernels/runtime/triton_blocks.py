"""Which blocks of a tile's other side need masks: two loops, one over those that need none.

A block is at the edge if some row does not see some of its keys, or it is the last and not full.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Ranges(NamedTuple):
    """Blocks to visit: [first, last), of which [first_full, last_full) need no mask.

    With spans these are whole blocks, and gathered ones follow (runtime/triton_spans.py).
    """

    first: Any
    first_full: Any
    last_full: Any
    last: Any
    first_gathered: Any
    last_gathered: Any


class Blocks(NamedTuple):
    """The blocks that one of the two loops visits: see `block_number`."""

    first: Any
    number: Any
    num_left: Any
    gap: Any
    num_whole: Any
    gap_gathered: Any


@triton.jit
def block_ranges(low, high, full_low, full_high, BLOCK: tl.constexpr):
    """Blocks that touch [low, high), and those among them that lie within [full_low, full_high)."""
    low = tl.maximum(low, 0)
    high = tl.maximum(high, low)
    first = low // BLOCK
    last = tl.where(high > low, tl.cdiv(high, BLOCK), first)
    first_full = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(full_low, 0), BLOCK), first), last)
    last_full = tl.maximum(tl.minimum(tl.maximum(full_high, 0) // BLOCK, last), first_full)
    return Ranges(first, first_full, last_full, last, 0, 0)


@triton.jit
def part_of_ranges(ranges, part, parts):
    """The part-th of `parts` parts of the blocks."""
    blocks = tl.cdiv(ranges.last - ranges.first, parts)
    first = tl.minimum(ranges.first + part * blocks, ranges.last)
    last = tl.minimum(first + blocks, ranges.last)
    first_full = tl.minimum(tl.maximum(ranges.first_full, first), last)
    last_full = tl.minimum(tl.maximum(ranges.last_full, first_full), last)
    blocks = tl.cdiv(ranges.last_gathered - ranges.first_gathered, parts)
    first_gathered = tl.minimum(ranges.first_gathered + part * blocks, ranges.last_gathered)
    last_gathered = tl.minimum(first_gathered + blocks, ranges.last_gathered)
    return Ranges(first, first_full, last_full, last, first_gathered, last_gathered)


@triton.jit
def blocks_of_loop(ranges, IS_EDGE: tl.constexpr):
    """The blocks that need no mask, or with IS_EDGE those on both sides, then the gathered ones."""
    num_full = ranges.last_full - ranges.first_full
    num_whole = ranges.last - ranges.first - num_full
    num_gathered = ranges.last_gathered - ranges.first_gathered
    return Blocks(
        ranges.first if IS_EDGE else ranges.first_full,
        num_whole + num_gathered if IS_EDGE else num_full,
        ranges.first_full - ranges.first,
        num_full,
        num_whole,
        ranges.first_gathered - ranges.last,
    )


@triton.jit
def block_number(i, blocks, IS_EDGE: tl.constexpr, HAS_SPANS: tl.constexpr = False):
    """The i-th block of a loop.

    With IS_EDGE it skips `gap` blocks after the first `num_left`. With HAS_SPANS, too, it skips
    `gap_gathered` blocks after the first `num_whole`.
    """
    block = blocks.first + i
    if IS_EDGE:
        block += tl.where(i >= blocks.num_left, blocks.gap, 0)
        if HAS_SPANS:
            block += tl.where(i >= blocks.num_whole, blocks.gap_gathered, 0)
    return block
