"""The digits tasks as datasets: prompts, pictures, solutions and demonstrations.

`cell`: an n × n grid, one cell a visual token. "Which digit is in the red cell?"
`timestamp`: frames of 2 × 2 noisy tiles, each after its time as text, one tile of each coloured.
The response names the time before the digit. In the start the digit hardly depends on that time:
after a wrong time it still names the asked colour's digit more often than the wrong frame's.
`chain`: frames that name each other's times, to be followed for some looks (`ral.digits.chains`).
`chain_cells`: the same over the cells of an n × n grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from .chains import LOOKS, CellChain, Chain, make_cell_chain, make_chain, question, thought
from .puzzles import NAMES, SECONDS, STILL, TASKS, Puzzle, Task, draw, make_puzzle
from .scans import CELL, Split

Style = Literal["think", "direct"]
NOISE = {"cell": 12.0, "timestamp": 24.0, "chain": 24.0, "chain_cells": 12.0}  # of 255


def make_dataset(
    task: Task,
    *,
    size: int,
    split: Split = "train",
    grid: int | Sequence[int] = 3,
    frames: int | Sequence[int] = 8,
    style: Style = "think",
    seed: int = 0,
    wrong_share: float = 0.0,
    looks: int | Sequence[int] = LOOKS,
) -> Any:
    """A `datasets.Dataset` of puzzles whose pictures are drawn when a row is read.

    The same arguments give the same rows, pixel for pixel. Columns: prompt, images, solution,
    problem_type, problem_id, completion, evidence: the frame, or the cell's box in pixels; of a
    chain those of each look, in order.

    Args:
        task: one of `TASKS`.
        size: number of rows.
        split: whose scans are drawn; the splits share none.
        grid: cells on a side of a grid, for `STILL`; of several, each row takes one at random.
        frames: frames of a row, at most 100, for the others; of several, as above.
        style: "think" for `<think>…</think><answer>…</answer>`, "direct" for the answer alone.
        seed: of the rows.
        wrong_share: share of the completions that answer for the last cell or frame instead of the
            asked one; of a chain, share of the looks that are at the one after the named one. A
            model trained on them looks there as often, and GRPO can unlearn it. Prompts and
            solutions do not change.
        looks: of a chain; of several, as above.

    Raises:
        ValueError: an argument is out of its range.
        ImportError: datasets, pillow or scikit-learn is missing.
    """
    from datasets import Dataset

    if task not in TASKS:
        raise ValueError(f"make_dataset: task must be one of {TASKS}; got {task!r}")
    if split not in ("train", "test"):
        raise ValueError(f"make_dataset: split must be 'train' or 'test'; got {split!r}")
    if style not in ("think", "direct"):
        raise ValueError(f"make_dataset: style must be 'think' or 'direct'; got {style!r}")
    if size < 1:
        raise ValueError(f"make_dataset: size must be at least 1; got {size}")
    if not 0 <= wrong_share <= 1:
        raise ValueError(f"make_dataset: wrong_share must be within 0..1; got {wrong_share}")
    if seed < 0:
        raise ValueError(f"make_dataset: seed must be at least 0; got {seed}")
    extents = _extents(task, grid if task in STILL else frames)
    several = (looks,) if isinstance(looks, int) else tuple(looks)
    drawn = _Draw(task, split, seed)
    rows: dict[str, list] = {
        name: []
        for name in (
            "prompt", "images", "solution", "problem_type", "problem_id", "completion", "evidence"
        )
    }  # fmt: skip
    for index in range(size):
        # A generator of its own: a wrong demonstration changes nothing of the puzzle.
        rng = np.random.default_rng([seed, index, 1])
        extent = int(extents[rng.integers(len(extents))])
        puzzle = puzzle_of(task, extent, split, seed, index, several)
        answer = demonstration(puzzle, style, wrong_share, rng)
        rows["prompt"].append([{"role": "user", "content": prompt(puzzle, style)}])
        rows["images"].append([index, extent])
        rows["solution"].append(solution(puzzle, style))
        rows["problem_type"].append("numerical" if rows["solution"][-1].isdigit() else "OCR")
        rows["problem_id"].append(f"digits-{task}-{split}-{extent}-{seed}-{index}")
        rows["completion"].append([{"role": "assistant", "content": answer}])
        rows["evidence"].append(evidence(puzzle))
    return Dataset.from_dict(rows).with_transform(drawn)


def longest(task: Task, looks: int | Sequence[int] = LOOKS) -> int:
    """Tokens that a response may have; the demonstrations have 5 fewer at least."""
    most = looks if isinstance(looks, int) else max(looks)
    return {"chain": 3 * most + 11, "chain_cells": 2 * most + 13}.get(task, 12)


def puzzle_of(
    task: Task,
    extent: int,
    split: Split,
    seed: int,
    index: int,
    looks: int | tuple[int, ...] = LOOKS,
) -> Puzzle:
    """Puzzle `index` of any of the tasks; `looks` is of a chain."""
    if task == "chain":
        return make_chain(extent, split, seed, index, looks)
    if task == "chain_cells":
        return make_cell_chain(extent, split, seed, index, looks)
    return make_puzzle(task, extent, split, seed, index)


def prompt(puzzle: Puzzle, style: Style) -> list[dict[str, str]]:
    """The parts of the question: images, with their times before them, and text."""
    colour = puzzle.colour
    if puzzle.times is None:
        asked = f"Which digit is in the {colour} cell?"
        if isinstance(puzzle, CellChain):
            asked = question(puzzle)
        return [{"type": "image"}, {"type": "text", "text": asked}]
    parts: list[dict[str, str]] = []
    space = " " if isinstance(puzzle, Chain) else ""  # a chain's times are all of one token
    for time in puzzle.times:
        parts += [{"type": "text", "text": f"{space}{time}s"}, {"type": "image"}]
    if isinstance(puzzle, Chain):
        return [*parts, {"type": "text", "text": question(puzzle)}]
    asked = (
        f"Which digit is in the {colour} tile?"
        if style == "think"
        else f"When is there a {colour} tile, and which digit is in it?"
    )
    return [*parts, {"type": "text", "text": asked}]


def evidence(puzzle: Puzzle) -> list[dict[str, Any]]:
    """Where to look, in order: frames of a video, or cells of a still picture."""
    path: Any = [puzzle.cell if puzzle.times is None else puzzle.frame]
    if isinstance(puzzle, Chain):
        path = puzzle.path[: puzzle.looks]
    if puzzle.times is not None:
        return [{"image": int(frame)} for frame in path]
    return [
        {"image": 0, "box": [CELL * n for n in (column, row, column + 1, row + 1)]}
        for row, column in (divmod(int(cell), puzzle.side) for cell in path)
    ]


def looks_of(puzzle: Puzzle, style: Style) -> list[tuple[int, int]]:
    """Where the right response looks: a token, whose successor says what is seen, and the frame.

    In a still picture it is the cell. A look of a chain has two tokens, before tens and units, or
    before the colour and digit of a cell's name.
    """
    if isinstance(puzzle, Chain) and style == "think":
        path = puzzle.path[: puzzle.looks]
        if puzzle.times is None:
            return [(2 + 2 * n + half, int(cell)) for n, cell in enumerate(path) for half in (0, 1)]
        return [(1 + 3 * n + half, int(frame)) for n, frame in enumerate(path) for half in (0, 1)]
    token = 0 if style == "direct" else 3
    if puzzle.times is None:
        return [(token, puzzle.cell)]
    # A direct answer about a colour's frame says the time first.
    says_time = style == "direct" and not isinstance(puzzle, Chain)
    return [(token + int(says_time), puzzle.frame)]


def solution(puzzle: Puzzle, style: Style) -> str:
    """The bare answer: a digit; time and digit in a direct answer about frames; a chain's name."""
    if isinstance(puzzle, Chain):
        return thought(puzzle)[1]
    return _answer(puzzle, style, puzzle.frame, puzzle.cell)


def demonstration(
    puzzle: Puzzle, style: Style, wrong_share: float, rng: np.random.Generator
) -> str:
    """A response that is wrong as often as `make_dataset` says."""
    if not isinstance(puzzle, Chain):
        wrong = rng.random() < wrong_share
        return response(puzzle, style, *(puzzle.last if wrong else (puzzle.frame, puzzle.cell)))
    thoughts, answer = thought(puzzle, rng.random(puzzle.looks) < wrong_share)
    thoughts = f"<think>{thoughts}</think>" if style == "think" else ""
    return f"{thoughts}<answer>{answer}</answer>"


def response(puzzle: Puzzle, style: Style, frame: int, cell: int) -> str:
    """The response for the digit of a cell, where one look is enough.

    Args:
        puzzle: the pictures.
        style: with or without a thought, which names the time, or the colour where there is none.
        frame, cell: where.
    """
    answer = f"<answer>{_answer(puzzle, style, frame, cell)}</answer>"
    if style == "direct":
        return answer
    if puzzle.times is None:
        return f"<think>{NAMES[puzzle.colours[frame, cell]]}</think>{answer}"
    return f"<think>{puzzle.times[frame]}s</think>{answer}"


def _answer(puzzle: Puzzle, style: Style, frame: int, cell: int) -> str:
    digit = str(puzzle.digits[frame, cell])
    if puzzle.times is not None and style == "direct":
        return f"{puzzle.times[frame]}s {digit}"
    return digit


def _extents(task: str, extents: int | Sequence[int]) -> list[int]:
    name, most = ("grid", 64) if task in STILL else ("frames", SECONDS)
    several = [extents] if isinstance(extents, int) else list(extents)
    if not several or not all(1 <= extent <= most for extent in several):
        raise ValueError(f"make_dataset: {name} must be within 1..{most}; got {extents}")
    return several


@dataclass(frozen=True)
class _Draw:
    """Puts pictures in the place of the numbers that Arrow holds, row by row as they are read."""

    task: Task
    split: Split
    seed: int

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        read = dict(batch)
        if "images" in read:
            read["images"] = [self._pictures(*numbers) for numbers in read["images"]]
        if "prompt" in read:
            read["prompt"] = [[_without_none(message) for message in row] for row in read["prompt"]]
        return read

    def _pictures(self, index: int, extent: int) -> list[Any]:
        return list(_draw(self.task, self.split, self.seed, index, extent))


# GRPO reads a row once per rollout and step: of those of a rollout batch each is drawn once.
@lru_cache(maxsize=64)
def _draw(task: Task, split: Split, seed: int, index: int, extent: int) -> tuple[Any, ...]:
    from PIL import Image

    puzzle = puzzle_of(task, extent, split, seed, index, 1)
    return tuple(Image.fromarray(frame) for frame in draw(puzzle, split, NOISE[task]))


def _without_none(message: dict[str, Any]) -> dict[str, Any]:
    """A message without the empty fields that Arrow gives to parts of different kinds."""
    content = message["content"]
    if isinstance(content, list):
        content = [{k: v for k, v in part.items() if v is not None} for part in content]
    return {**message, "content": content}
