"""Which blocks of a tile's other side need masks: two loops, one over those that need none.

A block is at the edge if some row does not see some of its keys, or it is the last and not full.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Blocks(NamedTuple):
    """The blocks that one of the two loops visits: see `block_number`."""

    first: Any
    number: Any
    num_left: Any
    gap: Any


@triton.jit
def block_ranges(low, high, full_low, full_high, BLOCK: tl.constexpr):
    """Blocks that touch [low, high), and those among them that lie within [full_low, full_high).

    -> first, first_full, last_full, last: the loops visit [first, last). Only blocks outside
    [first_full, last_full), at the edge, need a mask.
    """
    low = tl.maximum(low, 0)
    high = tl.maximum(high, low)
    first = low // BLOCK
    last = tl.where(high > low, tl.cdiv(high, BLOCK), first)
    first_full = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(full_low, 0), BLOCK), first), last)
    last_full = tl.maximum(tl.minimum(tl.maximum(full_high, 0) // BLOCK, last), first_full)
    return first, first_full, last_full, last


@triton.jit
def blocks_of_loop(first, first_full, last_full, last, IS_EDGE: tl.constexpr):
    """The blocks that need no mask, or with IS_EDGE those on both sides of them."""
    num_full = last_full - first_full
    return Blocks(
        first if IS_EDGE else first_full,
        last - first - num_full if IS_EDGE else num_full,
        first_full - first,
        num_full,
    )


@triton.jit
def block_number(i, blocks, IS_EDGE: tl.constexpr):
    """The i-th block of a loop. With IS_EDGE it skips `gap` blocks after the first `num_left`."""
    block = blocks.first + i
    if IS_EDGE:
        block += tl.where(i >= blocks.num_left, blocks.gap, 0)
    return block
