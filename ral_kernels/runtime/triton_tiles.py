"""Tables of tile sizes: one form for the Triton kernels of every op.

A table is a list of rows from the particular to the general: the first row that fits decides. What
the tiles compile to (registers, shared memory, instructions) is in benchmarks/results/codegen.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .triton_runtime import Tile

ANY = "*"
HALF, FLOAT32, BFLOAT16, FLOAT16 = "half", "float32", "bfloat16", "float16"  # half: 16 bits
PLAIN, HEAVY = "plain", "heavy"  # HEAVY: with biases or a soft cap, which take registers
HEAD_DIMS = (64, 128, 256)

Sizes = tuple[int, int, int, int]  # rows, keys, warps, pipeline stages


@dataclass(frozen=True)
class Row:
    """Tiles for head dims up to 64, 128 and 256; where there is None, the row does not fit."""

    kernel: str
    architecture: str
    dtype: str
    variant: str
    tiles: tuple[Tile | None, Tile | None, Tile | None]

    def fits(self, kernel: str, architecture: str, dtype: torch.dtype, variant: str) -> bool:
        dtypes = (ANY, str(dtype).removeprefix("torch."), HALF if dtype.itemsize == 2 else "")
        return (
            self.kernel in (ANY, kernel)
            and self.architecture in (ANY, architecture)
            and self.dtype in dtypes
            and self.variant in (ANY, variant)
        )


def row(
    kernel: str,
    architecture: str,
    dtype: str,
    variant: str,
    *sizes: Sizes | None,
    **flags: Any,
) -> Row:
    """A row for each head dim, or with one tile for all of them; `flags` are those of `Tile`."""
    every = sizes if len(sizes) == len(HEAD_DIMS) else sizes * len(HEAD_DIMS)
    small, middle, large = (None if x is None else Tile(*x, flags) for x in every)
    return Row(kernel, architecture, dtype, variant, (small, middle, large))


def find(
    rows: Sequence[Row],
    kernel: str,
    architecture: str,
    dtype: torch.dtype,
    variant: str,
    head_dim: int,
) -> Tile:
    """The tile of the first row that fits.

    Raises:
        KeyError: none does.
    """
    column = next(i for i, size in enumerate(HEAD_DIMS) if head_dim <= size)
    for candidate in rows:
        tile = candidate.tiles[column]
        if tile is not None and candidate.fits(kernel, architecture, dtype, variant):
            return tile
    raise KeyError(f"no tile for {kernel}, {architecture}, {dtype}, {variant}, {head_dim}")
