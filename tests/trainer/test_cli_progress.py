"""What a run shows and keeps: the metrics file, the line, the curves."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from ral.cli.curves import draw_curves
from ral.cli.progress import METRICS, MetricsFile, ProgressLine, read_metrics


def state(step: int, first: bool = True, steps: int = 100) -> Any:
    return SimpleNamespace(global_step=step, max_steps=steps, is_world_process_zero=first)


def log(callback: Any, step: int, first: bool = True, **logs: Any) -> None:
    callback.on_step_end(None, state(step, first), None)
    callback.on_log(None, state(step, first), None, logs=logs)


def begin(callback: Any, step: int = 0, first: bool = True) -> None:
    callback.on_train_begin(None, state(step, first), None)


def test_metrics(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    file = MetricsFile(path)
    begin(file)
    log(file, 1, reward=0.5, kl=float("nan"), name="x")
    log(file, 2, reward=float("inf"))
    rows = read_metrics(path)
    assert [(row["step"], row["reward"]) for row in rows] == [(1, 0.5), (2, None)]
    assert rows[0]["kl"] is None and rows[0]["name"] == "x" and rows[0]["seconds"] >= 0
    assert "NaN" not in path.read_text()


def test_metrics_of_a_run_that_goes_on(tmp_path: Path) -> None:
    """A run killed at step 5 goes on from step 3: its steps 4 and 5 come once."""
    path = tmp_path / METRICS
    path.write_text("".join(json.dumps({"step": n, "reward": 0}) + "\n" for n in range(1, 6)))
    with path.open("a") as file:
        file.write('{"step": 6, "rew')  # cut off as it was killed
    again = MetricsFile(path)
    begin(again, step=3)
    log(again, 4, reward=1)
    assert [(row["step"], row["reward"]) for row in read_metrics(path)] == [
        (1, 0), (2, 0), (3, 0), (4, 1)
    ]  # fmt: skip
    # A run from the beginning starts the file anew.
    begin(again)
    assert read_metrics(path) == []


def test_only_the_first_process_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for callback in (MetricsFile(tmp_path / METRICS), ProgressLine("train")):
        begin(callback, first=False)
        log(callback, 50, first=False, reward=1.0)
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().err == ""


def test_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    """In a log file: 20 lines, each with the last value of what is logged more rarely."""
    line = ProgressLine("train")
    begin(line)
    for step in range(1, 101):
        logs: dict[str, Any] = {"loss": 0.25, "attn/divergence": 1e-3, "learning_rate": 1.0}
        if step % 4 == 1:
            logs["reward"] = step / 100
        log(line, step, **logs)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 20
    assert lines[0] == "train 5/100  reward 0.050  divergence 1.00e-03  loss 0.2500"
    assert lines[-1] == "train 100/100  reward 0.970  divergence 1.00e-03  loss 0.2500"


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    line = ProgressLine("train")
    begin(line)
    log(line, 1, reward=0.5, loss=float("nan"))
    line.on_train_end(None, state(1), None)
    last = capsys.readouterr().err.split("\r")[-1]
    assert last.startswith("train ") and " 1/100 " in last and "reward 0.500" in last


def rows_of_rl() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(1, 41):
        inner = (step - 1) % 2
        row = {
            "step": step, "loss": 0.1, "attn/divergence": 1e-3 * inner,
            f"attn/divergence/inner_{inner}": 1e-3 * inner,
            "attn/grad_share": 0.1 * inner, f"attn/grad_share/inner_{inner}": 0.1 * inner,
        }  # fmt: skip
        rows.append({**row, "reward": step / 40, "format": 1.0} if inner == 0 else row)
    return rows


@pytest.mark.parametrize(
    "rows, panels",
    [
        (rows_of_rl(), 3),
        ([{"step": n, "loss": 1 / n, "mean_token_accuracy": 0.5} for n in range(1, 9)], 1),
        ([{"step": n, "reward": 0.5, "distill/logits": 0.1} for n in range(1, 9)], 2),
        ([{"step": 1, "train_runtime": 3.0}], 0),
        ([{"step": 1, "reward": None}], 0),
        ([], 0),
    ],
)
def test_curves(rows: list[dict[str, Any]], panels: int, tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = draw_curves(tmp_path, "a run")
    if panels == 0:
        assert drawn is None and not (tmp_path / "curves.png").exists()
        return
    assert drawn is not None
    with Image.open(drawn) as picture:
        assert picture.width == pytest.approx(690 * panels, abs=10)


def test_no_metrics_no_curves(tmp_path: Path) -> None:
    assert draw_curves(tmp_path) is None
