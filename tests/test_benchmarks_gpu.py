"""`make gpu` without a GPU: a rehearsal of its stages, and what becomes of one that goes wrong."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import log, small, stages, tiles
from benchmarks.gpu.__main__ import main, run_stages
from benchmarks.gpu.stages import SWEEPS, Setting, Stage
from ral_kernels import triton_runtime
from ral_kernels.triton_runtime import Tile
from tests.conftest import skip_or_fail

ROOT = Path(__file__).resolve().parents[1]


def python(code: str) -> Any:
    return lambda setting: [sys.executable, "-c", code]


def records_of(out: Path) -> dict[str, Any]:
    run = json.loads((out / "gpu.json").read_text())
    return {record["stage"]: record for record in run["stages"]}


@pytest.mark.long
def test_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The stages' own commands; the sweeps' are tested in test_benchmarks.py, one is run here."""
    if not triton_runtime._installed():
        skip_or_fail("triton", "triton is not installed")
    names = ["facts", "correctness", "correctness cuda", "memcheck", "tiles"]
    status = main(["--out", str(tmp_path), "--rehearse", "--seconds", "3000", "--stages", *names])
    printed = capsys.readouterr().out
    assert status == 0, printed
    run = json.loads((tmp_path / "gpu.json").read_text())
    assert run["rehearsal"] and {"versions", "commit", "started", "seconds"} <= run.keys()
    records = records_of(tmp_path)
    assert list(records) == names
    assert all(record["status"] == "ok" for record in records.values())
    facts = records["facts"]["result"]
    assert facts["copy_gbytes"] > 0 and facts["gemm_tflops"]["float32"] > 0
    assert facts["backends"]["reference"] == "yes"
    for name in ("correctness", "correctness cuda"):
        assert records[name]["result"]["outcomes"].keys() == {"passed"}
    assert any(name.startswith("triton attention") for name in records["memcheck"]["result"]["ran"])
    assert not records["tiles"]["result"]["failures"]
    assert "correctness" in (tmp_path / "gpu.log").read_text()
    assert len(list(tmp_path.rglob("*"))) == 2, "few files: the machine hands back eight at most"
    passed = records["correctness"]["result"]["outcomes"]["passed"]
    assert f"correctness: ok, {records['correctness']['seconds']} s, {passed} passed" in printed


@pytest.mark.long
def test_a_sweep_as_the_stage_runs_it(tmp_path: Path) -> None:
    plan = SWEEPS[2]
    stage = Stage("sweep", 600, plan.command, plan.collect)
    assert run_stages([stage], tmp_path, 600, rehearse=True) == 0
    (record,) = records_of(tmp_path).values()
    assert record["result"]["sizes"] == 2
    assert (tmp_path / record["result"]["file"]).parent == tmp_path / plan.folder


def test_commands_of_a_real_run(tmp_path: Path) -> None:
    """What would be run on a GPU is well formed: options that the scripts know."""
    from benchmarks import frames_sweep
    from benchmarks.sweeps import runner

    setting = Setting(tmp_path, tmp_path, 100.0, rehearse=False)
    for plan in SWEEPS:
        command = plan.command(setting)
        parser = argparse.ArgumentParser()
        parser.add_argument("--frames", type=int, nargs="+")
        parser.add_argument("--grid", type=int, nargs=2)
        runner.add_arguments(parser)
        options = parser.parse_args(command[2:])
        assert options.device == "cuda" and options.dtype == "bfloat16"
        assert options.input == "random", "transformers may be missing there"
        assert 256 * min(options.frames) >= 1024 and 256 * max(options.frames) <= 65536
        assert options.budget < setting.budget
    assert 256 * max(SWEEPS[0].frames) == 65536
    assert Path(frames_sweep.__file__) == ROOT / SWEEPS[0].command(setting)[1]
    for stage in stages.STAGES:
        assert all(isinstance(word, str) for word in stage.command(setting))
    names = [stage.name for stage in stages.STAGES]
    assert len(set(names)) == len(names)
    assert {"correctness", "memcheck", "racecheck", "tiles", "on device"} <= set(names)


def test_stages_are_isolated(tmp_path: Path) -> None:
    """A crash, a hang and an absent result are recorded, and the stages behind them run."""
    hang = "import subprocess, sys, time; print('hanging', flush=True); "
    hang += "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    hang += "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"

    def result(setting: Setting) -> Any:
        return json.loads((setting.scratch / "result.json").read_text())

    given = [
        Stage("raises", 1000, python("print('before'); raise KeyError('why')")),
        Stage("dies", 1000, python("import os; os.abort()")),
        Stage("hangs", 3, python(hang)),
        Stage("tells nothing", 1000, python("pass"), result),
        Stage("is not possible", 1000, python("pass"), missing=lambda: "a tool is missing"),
        Stage("works", 1000, python("print('fine')"), lambda setting: {"answer": 42}),
    ]
    monkey = pytest.MonkeyPatch()
    monkey.setattr(stages, "GRACE", 0.5)
    with monkey.context():
        assert run_stages(given, tmp_path, 1000, rehearse=False) == 1
    records = records_of(tmp_path)
    statuses = {name: record["status"] for name, record in records.items()}
    assert statuses == {
        "raises": "failed",
        "dies": "failed",
        "hangs": "out of time",
        "tells nothing": "failed",
        "is not possible": "skipped",
        "works": "ok",
    }
    assert records["raises"]["output"][0] == "before"
    assert "KeyError: 'why'" in records["raises"]["output"][-1]
    assert records["dies"]["exit"] < 0
    assert records["hangs"]["output"] == ["hanging"]
    assert records["hangs"]["seconds"] < 600  # what it would sleep
    assert "FileNotFoundError" in records["tells nothing"]["reason"]
    assert records["works"]["result"] == {"answer": 42}
    text = (tmp_path / "gpu.log").read_text()
    assert "KeyError" in text and "fine" in text


def test_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last stages go without when the first took long, and each gets what the others left."""
    now = 100.0

    def run(stage: Stage, setting: Setting, log: Path) -> dict[str, Any]:
        nonlocal now
        now += 13.0
        return {"stage": stage.name, "status": "ok", "budget": setting.budget}

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "time", argparse.Namespace(monotonic=lambda: now))
    given = [Stage(str(i), budget, python("")) for i, budget in enumerate((10, 10, 4, 4))]
    assert run_stages(given, tmp_path, 35, rehearse=False) == 0
    records = records_of(tmp_path)
    assert records["0"]["budget"] == 12.5  # 35 shared out as 10, 10, 4, 4
    assert records["1"]["budget"] == pytest.approx((35 - 13) * 10 / 18)
    assert records["2"]["status"] == records["3"]["status"] == "skipped"
    assert records["3"]["reason"] == "no time left"


def test_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "out")])
    assert "torch sees no GPU here (--rehearse" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--rehearse", "--stages", "nothing"])
    assert "unknown" in capsys.readouterr().err


def test_a_tool_that_finds_something_fails_the_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`env` stands for a tool that finds nothing, `false` for one that does."""
    for tool, status in (["env", "true"], 0), (["false"], 1):
        assert small.run_watched(tool, "cpu", 2, tmp_path / "small.json") == status
        found = json.loads((tmp_path / "small.json").read_text())
        assert len(found["failed"]) == 2 * status
    assert "2 of 2 shares failed" in capsys.readouterr().out


TESTS = """
import time
import pytest

@pytest.mark.parametrize("i", range(6))
def test_good(i): time.sleep({pause})
def test_bad(): assert 1 == 2, "one is not two"
def test_left_out(): pytest.skip("not here")
"""


@pytest.mark.parametrize(("pause", "stopped"), [(0.0, False), (0.6, True)])
def test_log_of_tests(tmp_path: Path, pause: float, stopped: bool) -> None:
    """Counts and failures are kept, also of a session whose time was over."""
    (tmp_path / "test_toys.py").write_text(TESTS.format(pause=pause))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RAL_GPU_TEST_LOG": str(tmp_path / "log"),
        "RAL_GPU_TEST_SECONDS": "1.5" if stopped else "600",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.log", "test_toys.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    found = log.summary(tmp_path / "log")
    assert found["stopped"] == stopped
    if stopped:
        assert done.returncode == 2 and sum(found["outcomes"].values()) < 8
        return
    assert found["outcomes"] == {"passed": 6, "failed": 1, "skipped": 1}
    assert found["by_test"]["test_toys.py::test_good"] == {"passed": 6}
    (failure,) = found["failures"]
    assert failure["test"].endswith("test_bad")
    assert "one is not two" in " ".join(failure["why"])


def test_tiles_record_what_was_tried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each choice of `tuned` with the times of all candidates."""
    candidates = (Tile(64, 64, 4, 2), Tile(128, 64, 8, 3))
    monkeypatch.setattr(triton_runtime, "_milliseconds", lambda run, tile: 100 / tile.block_q)
    record = tiles.Record()
    monkeypatch.setattr(triton_runtime, "_milliseconds", record.time)
    monkeypatch.setattr(triton_runtime, "_tuning_cache", dict)
    monkeypatch.setattr(triton_runtime, "_keep", lambda cache: None)
    monkeypatch.setenv("RAL_AUTOTUNE", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton_runtime.logger, "handlers", [record])
    caplog.set_level("INFO", logger=triton_runtime.logger.name)
    for key in ((128,), (64,)):
        triton_runtime.tuned("toy_fwd", key, candidates[0], candidates, lambda tile: None)
    assert [choice["key"] for choice in record.chosen] == ["(128,)", "(64,)"]
    for choice in record.chosen:
        assert choice["kernel"] == "toy_fwd" and choice["tile"] == repr(candidates[1])
        assert [tried["tile"] for tried in choice["candidates"]] == [repr(c) for c in candidates]
