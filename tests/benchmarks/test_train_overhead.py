"""The overhead benchmark runs end to end; what it prints is in its JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import train_overhead


@pytest.mark.slow(
    stands_in="tests/benchmarks/test_sweeps.py::test_without_time_the_peer_is_measured_and_the_rest_say_why"
)
@pytest.mark.long
def test_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--frames", "2", "--repeats", "1", "--response", "4", "--layers", "2"]
    arguments += ["--width", "64", "--threads", "1", "--objectives", "--out", str(tmp_path)]
    assert train_overhead.main(arguments) == 0
    (file,) = tmp_path.glob("*.json")
    run = json.loads(file.read_text())
    (row,) = run["rows"]
    assert row["visual_tokens"] == 120 < row["sequence"]
    for kind in ("grpo", "ral"):
        parts = [row[kind][part]["median"] for part in train_overhead.PARTS]
        assert all(seconds > 0 for seconds in parts)
        assert sum(parts) == pytest.approx(row[kind]["step"]["median"], rel=0.2)
        assert row[kind]["peak_bytes"] > 0
    printed = capsys.readouterr().out
    assert f"{row['update_ratio']['median']:.3f}" in printed
    assert list(row["objectives"]) == list(train_overhead.OBJECTIVES)
    for kind, of in row["objectives"].items():
        assert of["peak_ratio"] > 0 and f"{of['step_ratio']['median']:.3f}" in printed
        assert kind in printed and row[kind]["old_policy"]["median"] > 0
