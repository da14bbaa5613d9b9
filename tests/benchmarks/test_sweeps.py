"""The sweeps run end to end, keep to time and memory, and no skip is silent."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from benchmarks import (
    attention_bench,
    frames_sweep,
    resolution_sweep,
)
from benchmarks.harness import examine, layouts, measure, photographs, plot, runner
from benchmarks.harness.inputs import random_layer
from benchmarks.harness.objective import Contestant
from benchmarks.harness.plot import GAP, _spread
from benchmarks.problems.attention import ATTENTION, contestants
from benchmarks.problems.attention.problem import AttentionProblem, random_problem, with_spans
from benchmarks.problems.ral import RAL
from ral_kernels.runtime import cuda_library

from .conftest import HEADS

ROOT = Path(__file__).resolve().parents[2]
# A budget that no machine is too slow for: what a budget leaves out has tests of its own.
TINY = ["--heads", "4", "--kv-heads", "2", "--head-dim", "32", "--repeats", "2", "--budget", "7200"]


def results_of(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    run: dict[str, Any] = json.loads(path.read_text())
    return run


@pytest.mark.slow(stands_in="test_without_time_the_peer_is_measured_and_the_rest_say_why")
@pytest.mark.long
def test_frames_sweep_on_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--frames",
        "3",
        "5",
        "--grid",
        "4",
        "6",
        "--dtype",
        "float32",
        "--out",
        str(tmp_path),
    ]
    names = "ral,ral_plain,sdpa_one_hot,per_span,chunked,eager,sdpa_flash"
    assert frames_sweep.main([*TINY, *options, "--contestants", names]) == 0
    run = results_of(tmp_path)
    assert (run["benchmark"], run["objective"]) == ("frames_sweep", "attention")
    assert run["settings"]["input"] == "model"
    assert {"machine", "versions", "commit", "started", "seconds"} <= run.keys()
    assert {"cpu", "cores", "threads"} <= run["machine"].keys()
    assert [size["frames"] for size in run["sizes"]] == [3, 5]
    for size in run["sizes"]:
        assert size["visual_tokens"] == 24 * size["frames"]
        assert size["num_spans"] == size["frames"]
        assert size["seqlen"] > size["visual_tokens"], "text has to surround the frames"
        assert size["gemm_gflops"] > 0
        rows = {(row["contestant"], row["mode"]): row for row in size["results"]}
        assert len(rows) == 2 * 8  # the peer comes by itself
        assert {row["repeats"] for row in rows.values() if row["status"] == "ok"} == {2}
        for (name, mode), row in rows.items():
            if name == "sdpa_flash" or (name == "per_span" and mode == "forward+backward"):
                assert row["status"] == "skipped"
                assert row["reason"]
                continue
            assert row["status"] == "ok", row
            assert row["peak_bytes"] > 0
            assert row["gflops"] > 0
            for key in ("ms", "ratio"):
                assert 0 < row[key]["p20"] <= row[key]["median"] <= row[key]["p80"]
            wanted = {"out"} | (
                {"marginals"} if ATTENTION.registry[name].answer == "all" else set()
            )
            wanted |= {"dq", "dk", "dv"} if mode == "forward+backward" else set()
            assert row["errors"].keys() == wanted
            assert max(row["errors"].values()) < 1e-4
        cost = {(row["contestant"], row["mode"]): row for row in size["layouts"]}
        assert len(cost) == 2 * (1 + len(layouts.FRAME_TOKENS))
        for row in cost.values():
            assert row["status"] == "ok" and row["repeats"] == 8, row
    printed = capsys.readouterr().out
    assert "ral_kernels, marginals" in printed
    assert "skipped: an SDPA backend of CUDA" in printed
    (picture,) = tmp_path.glob("*.png")
    assert picture.stat().st_size > 10_000
    picture.unlink()
    (results,) = tmp_path.glob("*.json")
    assert plot.main([str(results), "--mode", "forward"]) == 0
    assert picture.exists()


@pytest.mark.slow(stands_in="test_without_time_the_peer_is_measured_and_the_rest_say_why")
def test_resolution_sweep_fails_on_a_wrong_contestant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--tokens", "32", "--tile", "2", "3", "--no-backward", "--no-plot"]
    options += ["--layouts", "none"]
    options += ["--out", str(tmp_path), "--contestants", "ral,per_span,wrong"]
    assert resolution_sweep.main([*TINY, *options]) == 1
    (size,) = results_of(tmp_path)["sizes"]
    assert size["visual_tokens"] == 32
    assert not size["contiguous_spans"], "tiles scatter their keys"
    assert "layouts" not in size
    rows = {row["contestant"]: row for row in size["results"]}
    assert rows["wrong"]["status"] == "wrong"
    assert "marginals error" in rows["wrong"]["reason"]
    assert "ms" not in rows["wrong"], "a wrong contestant must not be timed"
    assert rows["ral"]["status"] == rows["per_span"]["status"] == "ok"
    assert "FAILED" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.slow(stands_in="test_without_time_the_peer_is_measured_and_the_rest_say_why")
def test_resolution_sweep_on_random_input(tmp_path: Path) -> None:
    options = ["--tokens", "30", "--images", "2", "--spans", "image", "--input", "random"]
    options += ["--no-plot", "--out", str(tmp_path), "--contestants", "ral"]
    assert resolution_sweep.main([*TINY, *options]) == 0
    (size,) = results_of(tmp_path)["sizes"]
    assert (size["visual_tokens"], size["num_spans"], size["seqlen"]) == (60, 2, 60)


@pytest.mark.slow(stands_in="tests/benchmarks/test_gates.py::test_gate_of_layouts")
def test_layouts_of_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--frames", "2", "--grid", "6", "10", "--input", "random", "--no-backward"]
    options += ["--layout", "16", "--layouts", "offset,16", "--contestants", "ral", "--no-plot"]
    assert frames_sweep.main([*TINY, *options, "--out", str(tmp_path)]) == 0
    (size,) = results_of(tmp_path)["sizes"]
    assert (size["num_spans"], size["visual_tokens"], size["seqlen"]) == (4, 49, 120)
    rows = {row["contestant"]: row for row in size["layouts"]}
    assert rows.keys() == {"ral_plain", "ral_offset", "ral_16"}
    for row in rows.values():
        assert (row["status"], row["repeats"]) == ("ok", 8)
    assert rows["ral_plain"]["ratio"]["median"] == 1.0
    assert (rows["ral_offset"]["layout"], rows["ral_16"]["layout"]) == ("offset", "16")
    assert (rows["ral_offset"]["spans"], rows["ral_16"]["spans"]) == (1, 4)
    assert "16: 16-token frames, text" in capsys.readouterr().out


def test_a_layout_without_room_is_said() -> None:
    problem = random_problem([60], HEADS, torch.float32, "cpu")
    assert ATTENTION.registry["ral_aligned"].refuse(problem, False) is None
    reason = ATTENTION.registry["ral_offset"].refuse(problem, False)
    assert reason == "no frame fits into 60 keys"
    layer = random_layer([60], HEADS, torch.float32, "cpu")
    with pytest.raises(ValueError, match="--layout offset: no frame fits into 60 keys"):
        runner.laid_out(layer, "offset")


def test_cuda_kernels_take_part_with_their_head_dims(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention has more of them than the policy: benchmarks offer what each op computes."""
    monkeypatch.setattr("ral_kernels.available_backends", lambda: {"cuda": "yes"})
    monkeypatch.setattr(cuda_library, "cannot_run", cuda_library.cannot_compute)
    for registry, head_dims in ((ATTENTION.registry, (8, 64, 72, 104)), (RAL.registry, (64, 128))):
        refuse = registry["ral_cuda"].refuse
        for head_dim in (*head_dims, 100):
            x = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, 2, 64, head_dim))
            reason = refuse(SimpleNamespace(q=x, k=x), True)
            assert (reason is None) == (head_dim in head_dims), reason
    monkeypatch.setattr("ral_kernels.available_backends", lambda: {"cuda": "no driver"})
    assert ATTENTION.registry["ral_cuda"].refuse(SimpleNamespace(q=x, k=x), True) == "no driver"


def test_a_picture_without_layouts_is_as_it_was(tmp_path: Path) -> None:
    row = {"contestant": "ral", "mode": "forward", "ms": {"median": 1.0}, "peak_bytes": 1 << 20}
    cost = {**row, "contestant": "ral_64", "layout": "64", "ratio": {"median": 1.05}}
    sizes = [{"visual_tokens": n, "results": [row], "layouts": [cost]} for n in (240, 480)]
    run = {
        "benchmark": "frames_sweep",
        "objective": "attention",
        "machine": {"cpu": "a CPU", "threads": 2},
        "commit": {"hash": None, "dirty": False},
        "settings": {
            "modes": ["forward"], "input": "random", "dtype": "float32",
            "heads": dataclasses.asdict(HEADS),
        },
        "sizes": sizes,
    }  # fmt: skip
    file = tmp_path / "run.json"
    heights = []
    for _ in range(2):
        file.write_text(json.dumps(run))
        assert plot.main([str(file)]) == 0
        with Image.open(tmp_path / "run.png") as picture:
            heights.append(picture.height)
        for size in sizes:
            size.pop("layouts", None)
    assert heights[0] > heights[1] == 792


def test_layouts_have_the_borders_of_a_prompt() -> None:
    seqlen = 8192
    spans = {name: layouts.spans_of(name, seqlen) for name in layouts.FRAME_TOKENS}
    shares = {
        name: [layouts.border_share(found, block) for block in layouts.BLOCKS]
        for name, found in spans.items()
    }
    assert shares["aligned"] == [0.0, 0.0]
    assert shares["offset"] == pytest.approx([0.25, 0.5], abs=0.02)
    assert min(shares["64"]) > 0.95 and min(shares["16"]) > 0.95
    ids = spans["offset"].ids
    assert ids.shape == (seqlen,) and spans["offset"].is_contiguous
    assert ids[:25].eq(-1).all() and ids[25:281].eq(0).all() and ids[281:283].eq(-1).all()
    assert ids[283] == 1 and ids[-41] == spans["offset"].num_spans - 1 and ids[-40:].eq(-1).all()


def test_marginals_in_a_prompt() -> None:
    assert attention_bench.prompt_of(1024, 64, torch.float32).num_spans == 64
    problem = random_problem([256], HEADS, torch.float32, "cpu")
    problem = with_spans(problem, layouts.frames_in_prompt(256, 10))
    for row in attention_bench.measure_marginals(problem, "offset", quick=True):
        assert (row["num_spans"], row["wrong"]) == (16, None)
        assert row["ratio"]["median"] > 0


@pytest.mark.parametrize(
    "options",
    [
        ["--contestants", "ral,nobody"],
        ["--layouts", "offset,nowhere"],
        ["--objective", "ral", "--layouts", "offset"],
        ["--layout", "offset"],
        ["--objective", "ral", "--contestants", "sdpa"],
        ["--objective", "nothing"],
        ["--rows", "8"],
        ["--objective", "ral", "--rows", "0"],
    ],
    ids=" ".join,
)
def test_unknown_options(options: list[str]) -> None:
    with pytest.raises(SystemExit):
        frames_sweep.main(options)


@pytest.mark.slow(stands_in="test_without_time_the_peer_is_measured_and_the_rest_say_why")
@pytest.mark.long
def test_ral_objective_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--objective", "ral", "--rows", "20", "--frames", "3", "5", "--grid", "4", "6"]
    options += ["--dtype", "float32", "--out", str(tmp_path), "--contestants"]
    options += ["ral,ral_again,ral_dense,chunked_256,eager"]
    assert frames_sweep.main([*TINY, *options]) == 0
    run = results_of(tmp_path)
    assert (run["benchmark"], run["objective"]) == ("frames_sweep", "ral")
    assert run["settings"]["rows"] == 20
    for size in run["sizes"]:
        assert size["rows"] == 20
        assert len(size["results"]) == 2 * 7  # both peers come by themselves
        for mode, peer in size["peer"].items():
            rows = {row["contestant"]: row for row in size["results"] if row["mode"] == mode}
            medians = {name: rows[name]["ms"]["median"] for name in RAL.peers}
            assert peer == min(medians, key=lambda name: medians[name])
            assert rows[peer]["ratio"]["median"] == 1.0
            for row in rows.values():
                assert row["status"] == "ok", row
                wanted = {"loss"} | ({"dq", "dk"} if mode == "forward+backward" else set())
                assert row["errors"].keys() == wanted
                assert max(row["errors"].values()) < 1e-2
    printed = capsys.readouterr().out
    assert "/ chunked" in printed
    assert "the last 20 rows" in printed
    (picture,) = tmp_path.glob("frames_sweep-ral-float32-*.png")
    assert picture.stat().st_size > 10_000


FAULTS = """
import resource, sys, torch
from benchmarks.harness import machine
if sys.argv[1] == "kept":
    machine.keep_freed_memory()
def call(times):
    for _ in range(times):  # beyond glibc's largest threshold: mapped anew each time
        torch.ones(10 << 20)
call(20)  # some remainders of alignment are kept first
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
call(4)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow(stands_in="test_without_time_the_peer_is_measured_and_the_rest_say_why")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc's malloc")
def test_kept_memory_is_not_mapped_anew() -> None:
    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how]
        return int(
            subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
        )

    assert faults("given back") > 1000 > 10 * faults("kept")


class InPlace:
    """Examines here: no server to start."""

    def __init__(self, threads: int) -> None:
        pass

    def examine(
        self, objective: str, name: str, file: str, backward: bool, exact_file: str, timeout: float
    ) -> dict[str, Any]:
        problem = AttentionProblem(**torch.load(file, weights_only=True))
        exact = torch.load(exact_file, weights_only=True).__getitem__
        contestant = ATTENTION.registry[name]
        return examine.examine_here(ATTENTION, contestant, problem, backward, exact)


def make_sweep(monkeypatch: pytest.MonkeyPatch) -> measure.Sweep:
    monkeypatch.setattr(measure, "FreshProcesses", InPlace)
    modes, cpu = ["forward"], torch.device("cpu")
    names = ["eager", "chunked"]
    return measure.Sweep(ATTENTION, names, modes, 2, cpu, torch.float32, lambda what: None)


def test_memory_that_would_not_fit_is_said(
    problem: AttentionProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "available_bytes", lambda device: 1000)
    rows = {row["contestant"]: row for row in make_sweep(monkeypatch).run(problem, 7200.0)}
    assert rows["eager"]["status"] == "skipped"
    assert rows["eager"]["reason"].startswith("would need")
    assert rows["chunked"]["status"] == "ok"


def test_time_that_would_not_suffice_is_said(
    problem: AttentionProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = make_sweep(monkeypatch)
    sweep._last[("chunked", "forward")] = (problem.pairs // 4, 2000.0)
    rows = {row["contestant"]: row for row in sweep.run(problem, 7200.0)}
    assert rows["chunked"]["status"] == "skipped"
    assert "about 8000 s" in rows["chunked"]["reason"]
    assert rows["eager"]["repeats"] == 2


def test_without_time_the_peer_is_measured_and_the_rest_say_why(
    problem: AttentionProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    (peer,) = ATTENTION.peers_on("cpu")
    rows = {row["contestant"]: row for row in make_sweep(monkeypatch).run(problem, 0.0)}
    assert rows.keys() == {peer, "eager", "chunked"}
    assert rows[peer]["status"] == "ok" and rows[peer]["repeats"] >= 1
    for name in ("eager", "chunked"):
        assert rows[name]["status"] == "skipped"
        assert "beyond the time left" in rows[name]["reason"]


@pytest.mark.parametrize(
    ("left", "rotations", "skipped"),
    [(100.0, 5, []), (20.0, 4, []), (14.0, 5, ["eager"]), (0.0, 3, ["chunked", "eager"])],
)
def test_all_of_a_size_run_equally_often(left: float, rotations: int, skipped: list[str]) -> None:
    seconds = {"sdpa": 1.0, "eager": 3.0, "chunked": 1.0}
    entries = [
        measure.Entry(ATTENTION.registry[name], "forward", name == "sdpa",
                      {"status": "ok", "reason": None, "seconds": once})
        for name, once in seconds.items()
    ]  # fmt: skip
    assert measure._allot_rotations(entries, left, 5) == rotations
    out = {e.contestant.name: e.record["reason"] for e in entries if not e.in_the_race}
    assert sorted(out) == skipped
    assert all(reason.startswith("3 runs take about") for reason in out.values())


def test_a_late_rotation_is_left_out_for_all(
    problem: AttentionProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = make_sweep(monkeypatch)
    sweep.repeats = 5
    names = ("sdpa", "eager", "chunked")
    ok = {"status": "ok", "reason": None, "seconds": 1e-3}
    for share, times in ((0.0, measure.FEWEST), (7200.0, 5)):
        entries = [
            measure.Entry(ATTENTION.registry[name], "forward", False, dict(ok)) for name in names
        ]
        sweep._time(entries, problem, 5, share)
        assert [len(entry.seconds) for entry in entries] == [times] * 3
    lonely = [measure.Entry(ATTENTION.registry["eager"], "forward", False, dict(ok))]
    sweep._time(lonely, problem, 5, 7200.0)
    assert lonely[0].record["reason"] == "no peer ran" and not lonely[0].seconds


def test_a_point_of_fewer_runs_is_marked() -> None:
    """Files from before all ran equally often are still drawn."""
    rows = [
        {"contestant": name, "mode": "forward", "ms": {"median": 1.0}, "repeats": repeats}
        for name, repeats in (("ral", 5), ("sdpa", 5), ("eager", 1))
    ]
    panel = Figure().subplots()
    plot._mark_fewer_runs(panel, {"sizes": [{"visual_tokens": 240, "results": rows}]}, "forward")
    assert [text.get_text() for text in panel.texts] == ["n=1"]


@pytest.mark.parametrize(
    ("end", "timeout", "status", "reason"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), 300.0, "failed", "SIGKILL (out of memory?)"),
        (lambda: os.kill(os.getpid(), signal.SIGUSR1), 300.0, "failed", "SIGUSR1 (crashed)"),
        (lambda: time.sleep(600), 1.0, "skipped", "a run takes over 1 s"),
        (lambda: 1 / 0, 300.0, "failed", "ZeroDivisionError: division by zero"),
    ],
    ids=["killed", "crashed", "overdue", "raised"],
)
def test_a_contestant_that_dies_is_reported(
    end: Any,
    timeout: float,
    status: str,
    reason: str,
    problem: AttentionProblem,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def prepare(problem: AttentionProblem) -> contestants.Attend:
        end()
        raise AssertionError

    monkeypatch.setitem(ATTENTION.registry, "dying", Contestant("dying", "dying", prepare))
    torch.save(problem.tensors(), tmp_path / "problem.pt")
    request = {
        "objective": "attention",
        "contestant": "dying",
        "problem_file": str(tmp_path / "problem.pt"),
        "backward": False,
        "exact_file": "never read",
        "timeout": timeout,
    }
    record = examine._examine_in_fork(request, 1)
    assert record["status"] == status
    assert reason in record["reason"]


def test_pictures_are_part_of_the_wheel() -> None:
    files = {str(file) for file in importlib.metadata.files("scikit-image") or []}
    for name in {*photographs.SHOTS, *photographs.STILLS}:
        assert f"skimage/data/{name}" in files, f"{name} would need a download"


def test_pan_moves_smoothly() -> None:
    frames = [
        torch.tensor(list(frame.tobytes()), dtype=torch.float32)
        for frame in photographs.pan(photographs.FRAMES_PER_SHOT + 1, 56, 84)
    ]
    steps = [float((b - a).abs().mean()) for a, b in itertools.pairwise(frames)]
    assert min(steps[:-1]) > 0, "the camera has to move"
    assert steps[-1] > max(steps[:-1]), "a cut changes more than the camera does"


def test_labels_stand_apart() -> None:
    heights = _spread([0.1, 0.11, 0.12, 0.5, 0.98, 0.99])
    assert all(b - a >= GAP - 1e-9 for a, b in itertools.pairwise(heights))
    assert heights[3] == pytest.approx(0.5)
    assert heights[0] >= 0.0
    assert heights[-1] <= 1.0 + 1e-9


def test_results_do_not_make_a_commit_dirty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bench after another, as `make bench` has them, is still of that commit."""
    from benchmarks.harness import machine

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=somebody", "-c", "user.email=somebody@localhost")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True)

    monkeypatch.delenv("RAL_COMMIT", raising=False)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    (tmp_path / "source.py").write_text("1\n")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "one")
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "bench.json").write_text("{}\n")
    assert machine.commit()["dirty"] is False
    (tmp_path / "benchmarks" / "bench.py").write_text("2\n")
    assert machine.commit()["dirty"] is True
