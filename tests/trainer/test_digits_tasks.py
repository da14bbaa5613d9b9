"""The bundled digits: what the pictures show, who sees which scans, and the tiny model's start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trl.data_utils import prepare_multimodal_messages

from ral.digits import start
from ral.digits.evaluate import evaluate
from ral.digits.model import IMAGE, make_model, make_processor, save_start
from ral.digits.puzzles import COLOURS, NAMES, make_puzzle
from ral.digits.scans import CELL, load_scans
from ral.digits.start import train_start
from ral.digits.tasks import make_dataset
from ral_kernels.integrations.transformers import load_processor

TASKS = [("cell", 3), ("timestamp", 4)]


def test_no_scan_is_in_both_splits() -> None:
    train, test = (set(load_scans(split).ids.tolist()) for split in ("train", "test"))
    assert not train & test
    assert len(train) + len(test) == 1797


@pytest.mark.parametrize("task, extent", TASKS)
def test_rows_repeat_and_depend_on_seed_and_split(task, extent) -> None:
    def rows(**options):
        return make_dataset(task, size=4, grid=extent, frames=extent, **options)

    def pixels(dataset):
        return [np.asarray(image) for row in dataset for image in row["images"]]

    once, again = rows(seed=3), rows(seed=3)
    assert all((a == b).all() for a, b in zip(pixels(once), pixels(again), strict=True))
    for other in (rows(seed=4), rows(seed=3, split="test")):
        assert any((a != b).any() for a, b in zip(pixels(once), pixels(other), strict=True))


@pytest.mark.parametrize("task, extent", TASKS)
def test_evidence_is_where_the_asked_colour_is(task, extent) -> None:
    """Read off the pixels: of the frames, or of the cells, the one that has most of it."""
    for row in make_dataset(task, size=6, grid=extent, frames=extent):
        (region,) = row["evidence"]
        colour = next(
            name for name in NAMES if f" {name} " in row["prompt"][0]["content"][-1]["text"]
        )
        near = [
            np.abs(np.asarray(image, np.float32) - np.array(COLOURS[colour])).sum(-1) < 60
            for image in row["images"]
        ]
        if task == "timestamp":
            assert region == {"image": int(np.argmax([each.sum() for each in near]))}
            continue
        left, top, right, bottom = region["box"]
        assert region["image"] == 0 and right - left == bottom - top == CELL
        inside = near[0][top:bottom, left:right].sum()
        assert inside > 0.2 * CELL**2 and inside > 0.6 * near[0].sum()


@pytest.mark.parametrize("task, extent", TASKS)
def test_the_asked_colour_is_once_where_the_puzzle_says(task, extent) -> None:
    """Read off the pixels: the background of each cell is nearest to its own colour."""
    for index, row in enumerate(make_dataset(task, size=12, grid=extent, frames=extent)):
        puzzle = make_puzzle(task, extent, "train", 0, index)
        side = puzzle.side
        found = []
        for frame, image in enumerate(row["images"]):
            cells = np.asarray(image, np.float32).reshape(side, CELL, side, CELL, 3)
            cells = cells.transpose(0, 2, 1, 3, 4).reshape(side * side, CELL * CELL, 3)
            # The digit is light and takes less than half of a cell.
            background = np.median(cells, axis=1)
            wanted = np.array(COLOURS[puzzle.colour])
            distance = np.abs(background - wanted).sum(-1)
            others = [np.abs(background - np.array(COLOURS[n])).sum(-1) for n in NAMES
                      if n != puzzle.colour]  # fmt: skip
            near = (distance < 90) & (distance < np.min(others, axis=0))
            found += [(frame, int(cell)) for cell in np.flatnonzero(near)]
        assert found == [(puzzle.frame, puzzle.cell)]
        assert row["solution"] == str(puzzle.digits[puzzle.frame, puzzle.cell])
        question = " ".join(p.get("text", "") for p in row["prompt"][0]["content"])
        assert puzzle.colour in question


@pytest.mark.parametrize("style", ["think", "direct"])
@pytest.mark.parametrize("task, extent", TASKS)
def test_rows_go_through_trl_and_the_processor(task, extent, style) -> None:
    """One visual token a cell, and demonstrations that the rewards call right."""
    from ral.rewards import accuracy_reward, format_reward

    processor = make_processor()
    image_token = processor.tokenizer.convert_tokens_to_ids(IMAGE)
    rows = list(make_dataset(task, size=3, grid=extent, frames=extent, style=style))
    for row in rows:
        messages = prepare_multimodal_messages(row["prompt"], images=row["images"])
        inputs = processor.apply_chat_template(
            [messages], tokenize=True, return_dict=True, return_tensors="pt"
        )
        cells = extent**2 if task == "cell" else 4 * extent
        assert int((inputs["input_ids"] == image_token).sum()) == cells
    said = [row["completion"] for row in rows]
    columns = [[row[name] for row in rows] for name in ("solution", "problem_type")]
    assert accuracy_reward(said, *columns) == [1.0] * 3
    assert format_reward(said, style=style) == [1.0] * 3


def test_wrong_demonstrations_are_wrong_in_one_way() -> None:
    right = make_dataset("timestamp", size=64, frames=4)
    wrong = make_dataset("timestamp", size=64, frames=4, wrong_share=1.0)
    places = []
    for index, (a, b) in enumerate(zip(right, wrong, strict=True)):
        assert a["prompt"] == b["prompt"] and a["solution"] == b["solution"]
        puzzle = make_puzzle("timestamp", 4, "train", 0, index)
        assert puzzle.times is not None
        thought = b["completion"][0]["content"].split("s</think>")[0].removeprefix("<think>")
        places.append(puzzle.times.tolist().index(int(thought)))
    assert len(set(places)) == 1  # always the same frame, whatever was asked
    with pytest.raises(ValueError, match="wrong_share must be within"):
        make_dataset("cell", size=1, wrong_share=1.5)


def test_checkpoints_come_back(tmp_path) -> None:
    from transformers import AutoModelForImageTextToText

    model = make_model(seed=5)
    folder = save_start(tmp_path / "start", model)
    again = AutoModelForImageTextToText.from_pretrained(folder)
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    processor = load_processor(folder)
    text = "<think>37s</think><answer>4</answer>"
    ids = processor.tokenizer(text)["input_ids"]
    assert processor.tokenizer.decode(ids) == text and len(ids) == 6


SHORT_START: dict[str, Any] = {
    "task": "timestamp", "steps": 30, "extents": (2,), "batch_size": 32, "log": None
}  # fmt: skip


@pytest.fixture(scope="module")
def few_pictures() -> Iterator[None]:
    """Fewer pictures than are needed for the task."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("CELLS", 1024), ("ROWS", 512), ("VISION_BATCH", 64)):
            patch.setattr(start, name, value)
        yield


@pytest.fixture(scope="module")
def short_start(few_pictures: None, tmp_path_factory: pytest.TempPathFactory) -> start.Start:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a test
    try:
        return train_start(tmp_path_factory.mktemp("start") / "1", **SHORT_START)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow(stands_in="test_checkpoints_come_back")
@pytest.mark.long
@pytest.mark.xdist_group("a short start")  # one worker trains it
def test_a_short_start_learns_the_form(short_start: start.Start) -> None:
    losses = short_start.losses
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    scores = evaluate(short_start.folder, "timestamp", extents=(2,), size=16)[2]
    assert 0 <= scores.right <= scores.formed <= 1


@pytest.mark.slow(stands_in="test_checkpoints_come_back")
@pytest.mark.xdist_group("a short start")
def test_a_start_is_the_same_twice_over(
    short_start: start.Start, few_pictures: None, tmp_path: Path
) -> None:
    assert train_start(tmp_path / "2", **SHORT_START).losses == short_start.losses
