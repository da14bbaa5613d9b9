"""Tile sizes of the Triton kernels of `divergence`."""

from __future__ import annotations

from dataclasses import dataclass

from ....runtime import triton_runtime


@dataclass(frozen=True)
class RowTile:
    """`block_r` rows by `block_n` elements: what one program adds up at a time, along the rows."""

    block_r: int
    block_n: int
    num_warps: int


# Elements of a program at a time. Registers limit them: terms and gradients take about ten float32
# for each. With 8 elements a thread there is room for two programs a scheduler.
_ELEMENTS = {"sm_80": 1024, "sm_90": 1024, "sm_100": 512, triton_runtime.INTERPRETER: 2048}
_PROGRAMS_PER_MULTIPROCESSOR = 8  # each has one load in flight: together they hide its latency
_MIN_BLOCKS_PER_SPLIT = 4  # with shorter pieces the second kernel would cost more than they gain


def tile(architecture: str, length: int) -> RowTile:
    elements = _ELEMENTS[architecture]
    block_n = min(max(1 << (length - 1).bit_length(), 16), elements)
    return RowTile(elements // block_n, block_n, 4)


def num_splits(row_tile: RowTile, rows: int, length: int, multiprocessors: int) -> int:
    """In how many pieces to cut a row, so that few long rows fill the device, too."""
    programs = -(-rows // row_tile.block_r)
    blocks = -(-length // row_tile.block_n)
    wanted = -(-_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // programs)
    return max(1, min(wanted, blocks // _MIN_BLOCKS_PER_SPLIT))
