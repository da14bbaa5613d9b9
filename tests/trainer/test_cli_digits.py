"""The bundled digits from the command line, with a start that has learnt nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ral.cli.main import main
from ral.cli.progress import read_metrics
from ral.digits import start as start_module
from ral.digits.model import make_model, save_start

QUICK = (
    "report_to=none", "use_cpu=true", "max_steps=2", "per_device_train_batch_size=4",
    "save_strategy=no", "digits_rows=8", "digits_extent=2",
)  # fmt: skip
ROLLOUTS = ("num_generations=4", "steps_per_generation=1", "max_completion_length=4")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `train_start` was asked for; it writes random weights."""
    asked: list[dict[str, Any]] = []

    def train_start(folder: Path, **options: Any) -> None:
        options.pop("log")("start: done")
        asked.append({"name": Path(folder).name, **options})
        save_start(folder, make_model(seed=len(asked)))

    monkeypatch.setattr(start_module, "train_start", train_start)
    return asked


def test_train(made: list[dict[str, Any]], tmp_path: Path, capsys: Any) -> None:
    out = f"output_dir={tmp_path / 'run'}"
    given = ["train", "--preset", "digits", out, *QUICK, *ROLLOUTS]
    assert main(given) == 0
    assert made == [
        {"name": "start", "task": "timestamp", "style": "think", "seed": 0, "wrong_share": 0.5}
    ]
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    # An untrained model writes neither form nor answer.
    assert rows[0]["reward"] == 0 and rows[0]["completions/mean_length"] == 4
    assert rows[0]["attn/visual_share"] > 0
    assert "start: done" in capsys.readouterr().err
    # The start stays: only another one is made anew.
    assert main([*given, "resume=true"]) == 0
    assert len(made) == 1
    assert main([*given, "resume=true", "style=direct", "data=digits:cell"]) == 0
    assert len(made) == 2 and (made[1]["task"], made[1]["style"]) == ("cell", "direct")


def test_a_start_that_was_broken_off_is_made_again(
    made: list[dict[str, Any]], tmp_path: Path
) -> None:
    given = ["sft", "--preset", "digits-sft", f"output_dir={tmp_path / 'run'}", *QUICK]
    (tmp_path / "run" / "start").mkdir(parents=True)
    (tmp_path / "run" / "start" / "config.json").write_text("{}")
    assert main(given) == 0
    assert len(made) == 1


def test_distill(made: list[dict[str, Any]], tmp_path: Path) -> None:
    out = f"output_dir={tmp_path / 'run'}"
    assert main(["distill", "--preset", "digits-distill", out, *QUICK, *ROLLOUTS]) == 0
    assert [(made_["name"], made_["wrong_share"]) for made_ in made] == [
        ("start", 0.5), ("teacher", 0.0)
    ]  # fmt: skip
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert all(row["distill/attention"] > 0 for row in rows)


@pytest.mark.parametrize("task, sizes", [("timestamp", "frames=2,3"), ("cell", "grids=2,3")])
def test_eval(task: str, sizes: str, tmp_path: Path, capsys: Any) -> None:
    folder = save_start(tmp_path / "start", make_model())
    given = [f"model={folder}", f"data=digits:{task}", sizes, "rows=4", "max_new_tokens=2"]
    assert main(["eval", *given]) == 0
    found = json.loads((folder / f"eval-digits-{task}.json").read_text())["results"]
    # A frame is 2 × 2 cells, and a grid n × n: one visual token each.
    wanted = [8, 12] if task == "timestamp" else [4, 9]
    assert [cell["visual_tokens"] for cell in found] == wanted
    assert len(capsys.readouterr().out.splitlines()) == 4
