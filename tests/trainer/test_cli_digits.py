"""The bundled digits from the command line, with a start that has learnt nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ral.cli import bundled
from ral.cli.bundled import bundled_model
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
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What `train_start` was asked for; it writes random weights."""
    monkeypatch.setenv("RAL_CACHE_DIR", str(tmp_path / "cache"))
    asked: list[dict[str, Any]] = []

    def train_start(folder: Path, **options: Any) -> None:
        options.pop("log")("start: done")
        asked.append(options)
        save_start(folder, make_model(seed=len(asked)))

    monkeypatch.setattr(start_module, "train_start", train_start)
    return asked


def test_train(made: list[dict[str, Any]], tmp_path: Path, capsys: Any) -> None:
    out = f"output_dir={tmp_path / 'run'}"
    given = ["train", "--preset", "digits", out, *QUICK, *ROLLOUTS]
    assert main(given) == 0
    assert made == [{"task": "timestamp", "style": "think", "seed": 0, "wrong_share": 0.5}]
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


@pytest.mark.parametrize(
    ("task", "role", "share"),
    [("chain", "start", 0.15), ("chain_cells", "start", 0.1), ("chain", "teacher", 0.0)],
)
def test_a_chain(
    made: list[dict[str, Any]], tmp_path: Path, task: str, role: str, share: float
) -> None:
    """Half of its looks wrong, it would never be right."""
    bundled_model(role, f"digits:{task}", "think", tmp_path)
    assert made == [{"task": task, "style": "think", "seed": 0, "wrong_share": share}]


def test_a_start_that_was_broken_off_is_made_again(
    made: list[dict[str, Any]], tmp_path: Path
) -> None:
    given = ["sft", "--preset", "digits-sft", f"output_dir={tmp_path / 'run'}", *QUICK]
    (tmp_path / "run" / "start").mkdir(parents=True)
    (tmp_path / "run" / "start" / "config.json").write_text("{}")
    assert main(given) == 0
    assert len(made) == 1


def test_a_start_is_made_once_for_all_runs(
    made: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """By settings and by the code that makes it; a copy goes into the run."""
    starts = [
        Path(bundled_model("start", "digits:cell", "think", tmp_path / name)) for name in "abc"
    ]
    [kept] = (tmp_path / "cache" / "digits").iterdir()
    assert len(made) == 1 and "the bundled start of" in capsys.readouterr().err
    contents = [(path / "model.safetensors").read_bytes() for path in (kept, *starts)]
    assert len(set(contents)) == 1
    bundled_model("start", "digits:cell", "direct", tmp_path / "d")
    assert len(made) == 2
    (kept / "start.json").unlink()  # as of a start that was deleted in part
    bundled_model("start", "digits:cell", "think", tmp_path / "e")
    assert len(made) == 3
    changed = tmp_path / "code"
    changed.mkdir()
    (changed / "start.py").write_text("STEPS = 1000")
    monkeypatch.setattr(bundled, "files", lambda package: changed)
    bundled_model("start", "digits:cell", "think", tmp_path / "f")
    assert len(made) == 4
    assert len(list((tmp_path / "cache" / "digits").iterdir())) == 3  # and nothing half made


def test_a_start_without_a_cache(
    made: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("RAL_CACHE_DIR", str(tmp_path / "file"))
    path = Path(bundled_model("start", "digits:cell", "think", tmp_path / "run"))
    assert path == tmp_path / "run" / "start" and (path / "model.safetensors").exists()
    assert "it is not kept for other runs" in capsys.readouterr().err


def test_a_start_that_fails_leaves_nothing(
    made: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(folder: Path, **options: Any) -> None:
        (Path(folder) / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(start_module, "train_start", stopped)
    with pytest.raises(KeyboardInterrupt):
        bundled_model("start", "digits:cell", "think", tmp_path / "run")
    assert not list((tmp_path / "cache" / "digits").iterdir())
    assert not (tmp_path / "run").exists()


def test_distill(made: list[dict[str, Any]], tmp_path: Path) -> None:
    out = f"output_dir={tmp_path / 'run'}"
    assert main(["distill", "--preset", "digits-distill", out, *QUICK, *ROLLOUTS]) == 0
    assert [each["wrong_share"] for each in made] == [0.5, 0.0]
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
