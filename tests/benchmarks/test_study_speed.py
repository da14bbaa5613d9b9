"""The speed of the study's engine: it runs end to end, and its file has what it printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import study_speed
from benchmarks.study import run as one
from benchmarks.study.evaluate import HeldOut
from benchmarks.study.tasks import TASKS

pytestmark = pytest.mark.xdist_group("study")
_SMALL = ["--arms", "grpo", "--extents", "2", "--rounds", "1", "--test-rows", "2"]


@pytest.mark.slow(stands_in="tests/benchmarks/test_engine.py::test_the_same_seed_is_the_same_run")
def test_it_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one, "be_quiet", lambda: None)  # it would silence this process
    assert study_speed.main([*_SMALL, "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("study_speed-*.json")
    train, evaluate = json.loads(file.read_text())["points"]
    assert (train["mode"], train["arm"]) == ("train", "grpo")
    assert (evaluate["mode"], evaluate["frames"]) == ("evaluate", 2)
    printed = capsys.readouterr().out
    for point, other in ((train, "RALTrainer"), (evaluate, "transformers")):
        assert point["ratio"]["median"] * point["engine"]["median"] == pytest.approx(
            point[other]["median"]
        )
        assert f"{point['ratio']['median']:.1f}x" in printed
    assert f"{train['updates_per_minute'][0]} / min" in printed


@pytest.mark.slow(
    stands_in="tests/benchmarks/test_figure3.py::test_answers_are_those_of_transformers"
)
def test_wrong_answers_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = HeldOut.answers
    monkeypatch.setattr(HeldOut, "answers", lambda self, model: stock(self, model) + 1)
    bench = one.Bench(one.Plan(tmp_path, 1, 2, start_steps=0), TASKS["frames"], "think")
    with pytest.raises(SystemExit, match="extent 2 differ"):
        study_speed.evaluation(bench, 2)
