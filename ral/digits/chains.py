"""Chains of looks: each frame or cell shows the name of another, and the question follows them.

"Start at 17s and follow red and blue 4 times. When?" In each frame the digit in the red tile is
the tens and the digit in the blue tile the units of a time; two more tiles distract. The response
writes down each time that it follows and the two digits that it reads there:
`<think> 17s 4 2 42s 0 8 8s 3 1 31s 9 0</think><answer>90s</answer>`.

The numbers of a video lead once through all of its frames. So every number names a frame, and a
wrong look goes on to another frame, and to a wrong answer unless a second one undoes it.

The same over the cells of a still picture: "Start at red 7 and follow 4 times. Which?" A cell has
two tiles: its name, and the name of another cell. All names of a picture differ. The response is
`<think> red 7 blue 3 green 0 pink 2 cyan 5</think><answer>cyan5</answer>`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .puzzles import NAMES, SECONDS, TILES, Puzzle
from .scans import Split, load_scans

TENS, UNITS = "red", "blue"
LOOKS = 4
WORDS = (
    "Start", " at", " follow", " times", " When", *(f" {second}s" for second in range(SECONDS))
)  # fmt: skip
CELL_NAMES = tuple(f"{colour} {digit}" for colour in NAMES for digit in range(10))
CELL_ANSWERS = tuple(name.replace(" ", "") for name in CELL_NAMES)
CELL_WORDS = ("Start", " at", " follow", " times", " Which", *CELL_ANSWERS)
_SEED, _CELL_SEED = 2, 3  # of these tasks, beside those of TASKS


@dataclass(frozen=True)
class Chain(Puzzle):
    """A puzzle whose frames lead to one another; `frame` is where the last look is.

    Attributes:
        path: [frames], all frames in the order in which they lead to one another; the question
            starts at the first.
        looks: frames that the question has one look at.
    """

    path: np.ndarray
    looks: int

    @property
    def seconds(self) -> list[int]:
        """The times to look at, and then the one to answer."""
        assert self.times is not None
        return [int(self.times[frame]) for frame in self.path[: self.looks + 1]]

    @property
    def numbers(self) -> np.ndarray:
        """[frames], the number that each frame shows."""
        return self.read(TENS) * 10 + self.read(UNITS)

    def read(self, colour: str) -> np.ndarray:
        """[frames], the digit in the tile of a colour."""
        cells = np.argmax(self.colours == NAMES.index(colour), axis=1)
        digits: np.ndarray = np.take_along_axis(self.digits, cells[:, None], 1)[:, 0]
        return digits

    @property
    def shown(self) -> np.ndarray:
        """[frames], the number that a frame's picture depends on, apart from chance."""
        return self.numbers

    @property
    def names(self) -> list[str]:
        """[frames], what the question and thoughts call each."""
        assert self.times is not None
        return [f"{time}s" for time in self.times]

    def spelt(self, frame: int) -> str:
        """What a look at a frame writes down, before the name of the next one."""
        tens, units = divmod(int(self.numbers[frame]), 10)
        return f" {tens} {units}"


@dataclass(frozen=True)
class CellChain(Chain):
    """A chain over the cells of a still picture.

    `path` is of cells in reading order, and `cell` is where the last look is. Each cell has two
    tiles, so `scans`, `digits` and `colours` are [1, 2 · cells].
    """

    @property
    def side(self) -> int:
        return round(len(self.path) ** 0.5)

    @property
    def numbers(self) -> np.ndarray:
        """[cells], which of `CELL_NAMES` each cell shows, the name of the next."""
        return self._tiles[1::2]

    @property
    def called(self) -> np.ndarray:
        """[cells], which of `CELL_NAMES` is each cell's own."""
        return self._tiles[::2]

    @property
    def shown(self) -> np.ndarray:
        return self.called * len(CELL_NAMES) + self.numbers

    @property
    def names(self) -> list[str]:
        return [CELL_NAMES[number] for number in self.called]

    def spelt(self, frame: int) -> str:
        return ""

    @property
    def _tiles(self) -> np.ndarray:
        return self.colours[0] * 10 + self.digits[0]


def make_chain(
    frames: int, split: Split, seed: int, index: int, looks: int | tuple[int, ...] = LOOKS
) -> Chain:
    """Chain `index` of an endless, seeded list; its pictures do not depend on `looks`.

    Args:
        frames: at most 100.
        split: whose scans are drawn.
        seed, index: which chain, each at least 0.
        looks: how many; of several, one at random.

    Raises:
        ValueError: there are fewer than looks + 2 frames, and the answer can be told without
            looking.
    """
    several = (looks,) if isinstance(looks, int) else looks
    if not (several and min(several) >= 1 and max(several) + 2 <= frames <= SECONDS):
        raise ValueError(
            f"make_chain: looks must be at least 1 and frames within looks + 2..{SECONDS}; got "
            f"looks={looks}, frames={frames}"
        )
    rng = np.random.default_rng([seed, index, _SEED, split == "test"])
    scans = load_scans(split)
    times = np.sort(rng.choice(SECONDS, size=frames, replace=False))
    path = rng.permutation(frames)
    # Grey or coloured, the other tiles are of no colour that counts.
    others = [-1, *(n for n, name in enumerate(NAMES) if name not in (TENS, UNITS))]
    colours = rng.choice(others, size=(frames, TILES * TILES))
    chosen = rng.integers(len(scans.ids), size=colours.shape)
    cells = rng.permuted(np.tile(np.arange(TILES * TILES), (frames, 1)), axis=1)
    of_digit = [np.flatnonzero(scans.digits == digit) for digit in range(10)]
    for frame, following in zip(path, np.roll(path, -1), strict=True):
        for cell, colour, digit in zip(
            cells[frame, :2], (TENS, UNITS), divmod(int(times[following]), 10), strict=True
        ):
            colours[frame, cell] = NAMES.index(colour)
            chosen[frame, cell] = rng.choice(of_digit[digit])
    noise_seed = int(rng.integers(1 << 31))
    looks = int(rng.choice(several))
    last = int(path[looks - 1])
    return Chain(
        chosen, scans.digits[chosen], colours, times, last, int(cells[last, 0]), noise_seed,
        path, looks,
    )  # fmt: skip


def make_cell_chain(
    side: int, split: Split, seed: int, index: int, looks: int | tuple[int, ...] = LOOKS
) -> CellChain:
    """Chain `index` over side × side cells, at most 8 × 8; otherwise as `make_chain`."""
    several = (looks,) if isinstance(looks, int) else looks
    most = len(CELL_NAMES)
    if not (several and min(several) >= 1 and max(several) + 2 <= side**2 <= most):
        raise ValueError(
            f"make_cell_chain: looks must be at least 1 and cells within looks + 2..{most}; got "
            f"looks={looks}, side={side}"
        )
    rng = np.random.default_rng([seed, index, _CELL_SEED, split == "test"])
    names = rng.choice(most, size=side**2, replace=False)
    path = rng.permutation(side**2)
    shown = np.empty_like(names)
    shown[path] = names[np.roll(path, -1)]
    return lay_out(names, shown, path, several, split, rng)


def lay_out(
    names: np.ndarray,
    shown: np.ndarray,
    path: np.ndarray,
    looks: tuple[int, ...],
    split: Split,
    rng: np.random.Generator,
) -> CellChain:
    """A picture of cells by their names and what they show, [cells] numbers of `CELL_NAMES`."""
    scans = load_scans(split)
    colours, digits = np.divmod(np.stack([names, shown], 1).reshape(1, -1), 10)
    of_digit = [np.flatnonzero(scans.digits == digit) for digit in range(10)]
    chosen = np.array([[of_digit[n][rng.integers(len(of_digit[n]))] for n in digits[0]]])
    noise_seed = int(rng.integers(1 << 31))
    count = int(rng.choice(looks))
    last = int(path[count - 1])
    return CellChain(chosen, scans.digits[chosen], colours, None, 0, last, noise_seed, path, count)


def question(chain: Chain) -> str:
    """The text after the pictures."""
    start = f"Start at {chain.names[chain.path[0]]} and follow"
    if isinstance(chain, CellChain):
        return f"{start} {chain.looks} times. Which?"
    return f"{start} {TENS} and {UNITS} {chain.looks} times. When?"


def thought(chain: Chain, slips: np.ndarray | None = None) -> tuple[str, str]:
    """What a look at each frame writes down, and the answer.

    Args:
        chain: the frames or cells.
        slips: bool [looks]; where true, the look is at the one after the one that is named.
    """
    names, frames = chain.names, len(chain.path)
    frame, words = int(chain.path[0]), []
    following = dict(zip(chain.path, np.roll(chain.path, -1), strict=True))
    for look in range(chain.looks):
        seen = (frame + 1) % frames if slips is not None and slips[look] else frame
        words.append(f" {names[frame]}{chain.spelt(seen)}")
        frame = int(following[seen])
    if isinstance(chain, CellChain):
        words.append(f" {names[frame]}")
    return "".join(words), names[frame].replace(" ", "")
