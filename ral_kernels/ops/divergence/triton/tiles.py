"""Tile sizes of the Triton kernels of `divergence`."""

from __future__ import annotations

from dataclasses import dataclass

from ral_kernels.runtime import triton_runtime


@dataclass(frozen=True)
class RowTile:
    """`block_r` rows by `block_n` elements, whose sum one program carries along the rows."""

    block_r: int
    block_n: int
    num_warps: int


# Elements in flight a program. Limit: registers, about ten float32 a thread and element of terms
# and gradients; 8 elements a thread leave room for two programs a scheduler.
_ELEMENTS = {"sm_80": 1024, "sm_90": 1024, "sm_100": 512, triton_runtime.INTERPRETER: 2048}
_PROGRAMS_PER_MULTIPROCESSOR = (
    8  # memory latency is hidden by programs, each has one load in flight
)
_MIN_BLOCKS_PER_SPLIT = 4  # shorter pieces would pay more for the second stage than they gain


def tile(architecture: str, length: int) -> RowTile:
    elements = _ELEMENTS[architecture]
    block_n = min(max(1 << (length - 1).bit_length(), 16), elements)
    return RowTile(elements // block_n, block_n, 4)


def num_splits(row_tile: RowTile, rows: int, length: int, multiprocessors: int) -> int:
    """In how many pieces a row is cut, so that few long rows fill the device too."""
    programs = -(-rows // row_tile.block_r)
    blocks = -(-length // row_tile.block_n)
    wanted = -(-_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // programs)
    return max(1, min(wanted, blocks // _MIN_BLOCKS_PER_SPLIT))
