"""The trained model that comes with the package, and the pictures of `python -m ral demo`."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import ral_kernels as rk
from ral.cli.main import main
from ral.digits import load_pretrained
from ral.digits import start as digits_start
from ral.digits.evaluate import evaluate
from ral.digits.model import make_model, save_start
from ral.digits.pretrained import RECIPE, WEIGHTS, train_pretrained
from ral.digits.puzzles import draw, make_puzzle
from ral.digits.tasks import NOISE, prompt, response

pytestmark = pytest.mark.usefixtures("one_thread")
FRAMES = 8


@pytest.fixture(scope="module")
def pretrained() -> tuple[Any, Any]:
    return load_pretrained()


def test_it_answers_held_out_scans(pretrained: tuple[Any, Any]) -> None:
    model, processor = pretrained
    score = evaluate(model, "timestamp", extents=(FRAMES,), size=64, processor=processor)[FRAMES]
    # 0.98 of 256 in training's own evaluation; the asked frame alone would give 0.25.
    assert score.grounded >= 0.9 and score.formed == 1.0


def test_it_looks_at_the_frame_in_question(pretrained: tuple[Any, Any]) -> None:
    """As it names the time and the digit; as it opens its thought, at no frame in particular."""
    model, processor = pretrained
    shares = []
    for index in range(8):
        puzzle = make_puzzle("timestamp", FRAMES, "test", 1, index)
        maps = rk.attention_map(
            model,
            processor,
            list(draw(puzzle, "test", NOISE["timestamp"])),
            [{"role": "user", "content": prompt(puzzle, "think")}],
            response=response(puzzle, "think", puzzle.frame, puzzle.cell),
        )
        shares.append(maps.image_shares[:, puzzle.frame])
    opening, time, _, _, digit, _ = torch.stack(shares).mean(0).tolist()
    assert time > 0.9 and digit > 0.9 and opening < 0.3


def test_the_file_is_small_and_says_how_it_was_made() -> None:
    path = Path(str(files("ral.digits") / WEIGHTS))
    assert path.stat().st_size < 1e6
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["recipe"]) == RECIPE
        names = set(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.float16}
    assert names == set(make_model().state_dict())


def test_training_it_again_writes_such_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a training that ends at once, but for the weights."""
    asked: dict[str, Any] = {}

    def train_start(folder: Any, **options: Any) -> None:
        asked.update(options)
        save_start(folder, made)

    made = make_model(seed=3)
    monkeypatch.setattr(digits_start, "train_start", train_start)
    train_pretrained(tmp_path / WEIGHTS, log=None, steps=5)
    assert asked == {**RECIPE, "steps": 5, "log": None}
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert json.loads(file.metadata()["recipe"])["steps"] == 5
        for name, weight in made.state_dict().items():
            assert torch.equal(file.get_tensor(name), weight.half()), name


def test_demo_prints_the_answer_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--out", str(tmp_path / "pictures")]) == 0
    puzzle = make_puzzle("timestamp", FRAMES, "test", 7, 0)
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["question"].startswith(f"Which digit is in the {puzzle.colour} tile?")
    said = response(puzzle, "think", puzzle.frame, puzzle.cell)
    assert lines["answer"].startswith(f"{said}  (right: ")
    assert int(lines["looked"].partition("%")[0]) >= 95
    assert "python -m ral_kernels attention-map" in lines["your"]
    *pictures, page = lines["wrote"].split(", ")
    assert len(pictures) == 3 and "<html" in Path(page).read_text("utf-8")
    for name in pictures:
        colours = Image.open(name).convert("RGB").resize((200, 100)).getcolors(1 << 16)
        assert len(colours) > 100  # more than text on white


def test_demo_refuses_what_it_cannot_draw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "frames=101"]) == 2
    assert "frames must be within 1..100; got 101" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["demo", f"out={tmp_path / 'file'}"]) == 2
    assert "cannot show the demo: [Errno 17]" in capsys.readouterr().err
