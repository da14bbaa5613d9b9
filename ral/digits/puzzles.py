"""Pictures of digits in coloured cells, and questions about them.

A puzzle depends only on its seed and number, so it can be drawn again when it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from .scans import CELL, Scans, Split, load_scans

Task = Literal["cell", "timestamp", "chain", "chain_cells"]
TASKS: tuple[Task, ...] = ("cell", "timestamp", "chain", "chain_cells")
STILL: tuple[Task, ...] = ("cell", "chain_cells")  # tasks of one picture, a grid of cells
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 45, 50),
    "orange": (235, 115, 25),
    "yellow": (205, 165, 25),
    "green": (60, 150, 65),
    "cyan": (45, 175, 190),
    "blue": (45, 90, 200),
    "purple": (125, 65, 170),
    "pink": (225, 95, 165),
}
NAMES = tuple(COLOURS)
GREY = (88, 92, 98)
TILES = 2  # a frame is 2 × 2 tiles
SECONDS = 100  # timestamps are whole seconds below this
_PALETTE = np.array([*COLOURS.values(), GREY], np.float32)
_INK = np.array([250, 250, 245], np.float32)
_EDGE = 0.82  # the outermost pixels of a cell are darker by this factor


@dataclass(frozen=True)
class Puzzle:
    """Frames of cells; one cell of all of them has the asked colour.

    Attributes:
        scans: [frames, cells] numbers of scans, in the split's order.
        digits: [frames, cells] int64.
        colours: [frames, cells] indices of NAMES, or −1 for a grey tile.
        times: [frames] whole seconds, increasing; None for a still picture.
        frame, cell: where the asked colour is.
        noise_seed: seeds the noise of the pixels.
    """

    scans: np.ndarray
    digits: np.ndarray
    colours: np.ndarray
    times: np.ndarray | None
    frame: int
    cell: int
    noise_seed: int

    @property
    def side(self) -> int:
        """Cells on a side of a frame."""
        return round(self.scans.shape[1] ** 0.5)

    @property
    def colour(self) -> str:
        """The asked colour."""
        return NAMES[self.colours[self.frame, self.cell]]

    @property
    def last(self) -> tuple[int, int]:
        """The frame and number of the last cell that is not grey, the one next to the question."""
        return len(self.colours) - 1, int(np.flatnonzero(self.colours[-1] >= 0)[-1])


def make_puzzle(task: Task, extent: int, split: Split, seed: int, index: int) -> Puzzle:
    """Puzzle `index` of an endless, seeded list.

    Args:
        task: "cell" draws one grid whose cells are all coloured, "timestamp" frames of 2 × 2 tiles
            with one coloured tile each.
        extent: cells on a side of the grid, or number of frames (at most 100).
        split: whose scans are drawn.
        seed, index: which puzzle, each at least 0.
    """
    rng = np.random.default_rng([seed, index, TASKS.index(task), split == "test"])
    scans = load_scans(split)
    others: tuple[int, ...]
    if task == "cell":
        shape = (1, extent * extent)
        colours = np.full(shape, -1)
        others = shape
        times = None
    else:
        shape = (extent, TILES * TILES)
        colours = np.full(shape, -1)
        others = (extent,)
        times = np.sort(rng.choice(SECONDS, size=extent, replace=False))
    asked = int(rng.integers(len(NAMES)))
    # Any other colour may come more than once; the asked one comes once.
    palette = (asked + rng.integers(1, len(NAMES), size=others)) % len(NAMES)
    cells = rng.integers(shape[1], size=extent)  # the coloured tile of each frame
    if task == "cell":
        colours = palette
        frame, cell = 0, int(cells[0])
    else:
        colours[np.arange(extent), cells] = palette
        frame = int(rng.integers(extent))
        cell = int(cells[frame])
    colours[frame, cell] = asked
    chosen = rng.integers(len(scans.ids), size=shape)
    return Puzzle(
        chosen, scans.digits[chosen], colours, times, frame, cell, int(rng.integers(1 << 31))
    )


def draw(puzzle: Puzzle, split: Split, noise: float = 12.0) -> np.ndarray:
    """The frames of a puzzle.

    Args:
        puzzle: what to draw.
        split: the split that the puzzle was made of.
        noise: standard deviation of the noise of every pixel, of 255.

    Returns:
        [frames, 28·side, 28·side, 3] uint8.
    """
    return _paint(puzzle, load_scans(split), noise)


def _paint(puzzle: Puzzle, scans: Scans, noise: float) -> np.ndarray:
    ink = scans.ink[puzzle.scans][..., None]  # [frames, cells, 28, 28, 1]
    ground = np.repeat(_PALETTE[puzzle.colours][:, :, None, None], CELL, axis=2)
    ground = np.repeat(ground, CELL, axis=3)
    for edge in (0, -1):
        ground[:, :, edge] *= _EDGE
        ground[:, :, 1:-1, edge] *= _EDGE
    cells = ground + (_INK - ground) * ink
    frames, side = len(cells), puzzle.side
    columns = cells.shape[1] // side
    narrow = columns // side  # tiles that share the width of a cell
    cells = cells.reshape(frames, -1, CELL, CELL // narrow, narrow, 3).mean(4)
    pictures = cells.reshape(frames, side, columns, CELL, CELL // narrow, 3).swapaxes(2, 3)
    pictures = pictures.reshape(frames, side * CELL, side * CELL, 3)
    if noise:
        rng = np.random.default_rng(puzzle.noise_seed)
        pictures = pictures + noise * rng.standard_normal(pictures.shape, np.float32)
    return np.clip(pictures, 0, 255).astype(np.uint8)
