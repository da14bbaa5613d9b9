"""The sweeps run end to end, their gate closes on wrong answers, and no skip is silent."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import frames_sweep, plot, resolution_sweep
from benchmarks.sweeps import contestants, examine, measure, pictures
from benchmarks.sweeps.contestants import REGISTRY, Contestant
from benchmarks.sweeps.exact import exact, gate_gradients, relative_errors, verdict
from benchmarks.sweeps.inputs import Heads, Problem, random_problem
from benchmarks.sweeps.plot import GAP, _spread

TINY = ["--heads", "4", "--kv-heads", "2", "--head-dim", "32", "--repeats", "2", "--budget", "20"]
HEADS = Heads(4, 2, 32)


@pytest.fixture
def problem() -> Problem:
    return random_problem([40, 3, 25], HEADS, torch.float32, "cpu")


def results_of(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    run: dict[str, Any] = json.loads(path.read_text())
    return run


def examine_in_place(contestant: Contestant, problem: Problem, folder: Path) -> dict[str, Any]:
    wanted = {
        "all": exact(problem, with_marginals=True),
        "out_only": exact(problem, with_marginals=False),
    }
    torch.save(wanted, folder / "exact.pt")
    return examine.examine_here(contestant, problem, True, str(folder / "exact.pt"))


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
    assert run["benchmark"] == "frames_sweep"
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
            wanted = {"out"} | ({"marginals"} if REGISTRY[name].has_marginals else set())
            wanted |= {"dq", "dk", "dv"} if mode == "forward+backward" else set()
            assert row["errors"].keys() == wanted
            assert max(row["errors"].values()) < 1e-4
    printed = capsys.readouterr().out
    assert "ral_kernels, marginals" in printed
    assert "skipped: an SDPA backend of CUDA" in printed
    (picture,) = tmp_path.glob("*.png")
    assert picture.stat().st_size > 10_000
    picture.unlink()
    (results,) = tmp_path.glob("*.json")
    assert plot.main([str(results), "--mode", "forward"]) == 0
    assert picture.exists()


def test_resolution_sweep_fails_on_a_wrong_contestant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--tokens", "32", "--tile", "2", "3", "--no-backward", "--no-plot"]
    options += ["--out", str(tmp_path), "--contestants", "ral,per_span,wrong"]
    assert resolution_sweep.main([*TINY, *options]) == 1
    (size,) = results_of(tmp_path)["sizes"]
    assert size["visual_tokens"] == 32
    assert not size["contiguous_spans"], "tiles scatter their keys"
    rows = {row["contestant"]: row for row in size["results"]}
    assert rows["wrong"]["status"] == "wrong"
    assert "marginals error" in rows["wrong"]["reason"]
    assert "ms" not in rows["wrong"], "a wrong contestant must not be timed"
    assert rows["ral"]["status"] == rows["per_span"]["status"] == "ok"
    assert "FAILED" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))


def test_resolution_sweep_on_random_input(tmp_path: Path) -> None:
    options = ["--tokens", "30", "--images", "2", "--spans", "image", "--input", "random"]
    options += ["--no-plot", "--out", str(tmp_path), "--contestants", "ral"]
    assert resolution_sweep.main([*TINY, *options]) == 0
    (size,) = results_of(tmp_path)["sizes"]
    assert (size["visual_tokens"], size["num_spans"], size["seqlen"]) == (60, 2, 60)


def test_unknown_contestant() -> None:
    with pytest.raises(SystemExit):
        frames_sweep.main(["--contestants", "ral,nobody"])


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_gate_closes_on_a_wrong_gradient(name: str, problem: Problem, tmp_path: Path) -> None:
    def prepare(problem: Problem) -> contestants.Attend:
        right = contestants.eager(problem)

        def attend(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            # the same values, and 1.01 times the gradient
            bent = [
                x * 1.01 - (x * 0.01).detach() if name == which else x
                for x, which in zip(inputs, "qkv", strict=True)
            ]
            return right(bent[0], bent[1], bent[2])

        return attend

    record = examine_in_place(Contestant("bent", "bent", prepare), problem, tmp_path)
    assert record["status"] == "wrong"
    assert record["reason"].startswith(f"d{name} error")


def test_gate_opens_for_the_right_one(problem: Problem, tmp_path: Path) -> None:
    assert examine_in_place(REGISTRY["eager"], problem, tmp_path)["status"] == "ok"


def test_gate_closes_on_nan(problem: Problem) -> None:
    wanted = exact(problem, with_marginals=True)
    got = {"out": wanted["out"].float().clone()}
    assert verdict(relative_errors(got, wanted), torch.float32) is None
    got["out"][0, 0, 3, 5] = float("nan")
    assert verdict(relative_errors(got, wanted), torch.float32) is not None


def test_exact_of_some_rows_is_that_of_all_with_masked_gradients(problem: Problem) -> None:
    rows = torch.tensor([0, 7, 8, 50, problem.seqlen - 1])
    some = dataclasses.replace(problem, gate_rows=rows)
    dout, dmarginals = gate_gradients(some)
    assert torch.equal(dout[:, :, rows], problem.dout[:, :, rows])
    everything = dataclasses.replace(problem, dout=dout, dmarginals=dmarginals)
    wanted, got = exact(everything, with_marginals=True), exact(some, with_marginals=True)
    for name in ("dq", "dk", "dv"):
        torch.testing.assert_close(got[name], wanted[name])
    for name in ("out", "marginals"):
        torch.testing.assert_close(got[name], wanted[name][:, :, rows])


def make_sweep(monkeypatch: pytest.MonkeyPatch) -> measure.Sweep:
    """A sweep that examines in place: no server to start."""
    monkeypatch.setattr(measure, "FreshProcesses", lambda threads: None)
    modes, cpu = ["forward"], torch.device("cpu")
    return measure.Sweep(["eager", "chunked"], modes, 2, cpu, torch.float32, lambda what: None)


def test_memory_that_would_not_fit_is_said(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "available_bytes", lambda device: 1000)
    rows = {row["contestant"]: row for row in make_sweep(monkeypatch).run(problem, 5.0)}
    assert rows["eager"]["status"] == "skipped"
    assert rows["eager"]["reason"].startswith("would need")
    assert rows["chunked"]["status"] == "ok"


def test_time_that_would_not_suffice_is_said(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = make_sweep(monkeypatch)
    sweep._last[("chunked", "forward")] = (problem.pairs // 4, 2.0)
    rows = {row["contestant"]: row for row in sweep.run(problem, 5.0)}
    assert rows["chunked"]["status"] == "skipped"
    assert "about 8 s" in rows["chunked"]["reason"]
    assert rows["eager"]["repeats"] == 2


@pytest.mark.parametrize(
    ("end", "status", "reason"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "failed", "SIGKILL (out of memory?)"),
        (lambda: os.kill(os.getpid(), signal.SIGUSR1), "failed", "SIGUSR1 (crashed)"),
        (lambda: time.sleep(60), "skipped", "a run takes over 1 s"),
        (lambda: 1 / 0, "failed", "ZeroDivisionError: division by zero"),
    ],
    ids=["killed", "crashed", "overdue", "raised"],
)
def test_a_contestant_that_dies_is_reported(
    end: Any,
    status: str,
    reason: str,
    problem: Problem,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def prepare(problem: Problem) -> contestants.Attend:
        end()
        raise AssertionError

    monkeypatch.setitem(REGISTRY, "dying", Contestant("dying", "dying", prepare))
    torch.save(problem.tensors(), tmp_path / "problem.pt")
    request = {
        "contestant": "dying",
        "problem_file": str(tmp_path / "problem.pt"),
        "backward": False,
        "exact_file": "never read",
        "timeout": 1.0,
    }
    record = examine._examine_in_fork(request, 1)
    assert record["status"] == status
    assert reason in record["reason"]


def test_pictures_are_part_of_the_wheel() -> None:
    files = {str(file) for file in importlib.metadata.files("scikit-image") or []}
    for name in {*pictures.SHOTS, *pictures.STILLS}:
        assert f"skimage/data/{name}" in files, f"{name} would need a download"


def test_pan_moves_smoothly() -> None:
    frames = [
        torch.tensor(list(frame.tobytes()), dtype=torch.float32)
        for frame in pictures.pan(pictures.FRAMES_PER_SHOT + 1, 56, 84)
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
