"""Two processes train as one does: losses, metrics and weights, under DDP and FSDP2."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ral.checkpoints import last_checkpoint, read_state, why_incomplete
from tests.asked import asked
from tests.trainer import tiny
from tests.trainer.test_resuming import TIMES

RELATIVE, ABSOLUTE = 1e-5, 2e-7
EQUAL = {
    "token mean": ["ddp", "fsdp2"],
    "sequence mean": ["ddp", "fsdp2"],
    "accumulating": ["ddp", "fsdp2"],
    "teacher": ["fsdp2"],
    "lora": ["fsdp2"],
    "pictures": ["ddp", "fsdp2"],
    "mixed": ["ddp", "fsdp2"],
    "resampling": ["ddp"],
    "objectives": ["ddp"],
    "router": ["ddp", "fsdp2"],
}
RESUMING = ["ddp", "fsdp2", "fsdp2-sharded"]
# One case is in the quick tier: a run takes seconds of both processors.
slow_train = pytest.mark.slow(stands_in="test_two_processes_train_as_one")
pytestmark = pytest.mark.xdist_group("two processes")  # one worker trains them all
# Of each process by itself, or of the first micro-batch, which accumulating splits differently.
OF_A_PROCESS = ("attn/grad_share", "router/load", "router/dead")
OF_A_MICRO_BATCH = ("attn/divergence", "attn/visual_share", "attn/entropy", "entropy", "clip_ratio")


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_all(request, tmp_path_factory)


def train_all(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs that the chosen tests of a file look at, as two_processes.py says."""
    folder = tmp_path_factory.mktemp("two")
    model = tiny.checkpoint(folder)
    runs: dict[str, list[str]] = {}
    for parameters in asked(request):
        how = parameters.get("how", "one")
        ways = [parameters.get("base", "one"), how]
        if "case" not in parameters:
            ways = [how.removesuffix("-sharded"), f"{how} stopped", f"{how} resumed"]
        known = runs.setdefault(parameters.get("case", "resuming"), [])
        known += [way for way in dict.fromkeys(ways) if way not in known]
    names = [f"{case}:{','.join(ways)}" for case, ways in runs.items()]
    done = subprocess.run(
        [sys.executable, "-m", "tests.trainer.two_processes", str(model), str(folder), *names],
        capture_output=True, text=True, timeout=2400, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def load(results: Path, case: str, how: str) -> dict[str, Any]:
    folder = results / case
    if not (folder / f"{how}.pt").exists():
        pytest.fail("\n".join(path.read_text() for path in folder.glob(f"{how}.*.stderr")))
    result: dict[str, Any] = torch.load(folder / f"{how}.pt", weights_only=False)
    return result


@pytest.mark.parametrize(
    "case, how",
    [
        pytest.param(case, how, marks=() if case == "token mean" else slow_train)
        for case in EQUAL
        for how in EQUAL[case]
    ],
)
def test_two_processes_train_as_one(case: str, how: str, results: Path) -> None:
    one, two = load(results, case, "one"), load(results, case, how)
    assert (one["processes"], two["processes"]) == (1, 2)
    sharded = {name for name in two["wrapped"] if name.startswith("FSDP")}
    if how == "ddp":
        assert "DistributedDataParallel" in two["wrapped"] and not sharded
    else:
        layer = "Qwen3MoeDecoderLayer" if case == "router" else "Qwen2_5_VLDecoderLayer"
        assert {f"FSDP{layer}", "FSDPLinear"} <= sharded  # the head by itself
    left_out = OF_A_PROCESS + (OF_A_MICRO_BATCH if case == "accumulating" else ())
    assert_same_run(one, two, left_out)


def assert_same_run(one: dict[str, Any], two: dict[str, Any], left_out: tuple[str, ...]) -> None:
    """Logs but for times and what is left out, and weights: those of the steps that were made."""
    logs = [[entry for entry in run["log"] if "eval_loss" not in entry] for run in (one, two)]
    assert len(logs[0]) == len(logs[1]) >= 5  # 4 steps, and the summary
    for ours, theirs in zip(*logs, strict=True):
        names = [name for name in ours if not name.startswith(TIMES + left_out)]
        assert [theirs[name] for name in names] == pytest.approx(
            [ours[name] for name in names], rel=RELATIVE, abs=ABSOLUTE
        ), names
    moved, apart = 0.0, 0.0
    for name, ours in one["weights"].items():
        error = (two["weights"][name] - ours).abs()
        assert error.max() <= RELATIVE * ours.abs().max(), name
        moved += (ours - one["start"][name]).square().sum().item()
        apart += error.square().sum().item()
    assert 0 < apart < 1e-8 * moved


@slow_train
@pytest.mark.parametrize("case, how", [("mixed", how) for how in EQUAL["mixed"]])
def test_evaluations_are_those_of_one_process(case: str, how: str, results: Path) -> None:
    """Of five rows: with two processes, batches of two end in rows that are there twice."""

    def evaluated(way: str) -> tuple[list[dict[str, float]], list[list[str]]]:
        entries = [entry for entry in load(results, case, way)["log"] if "eval_loss" in entry]
        exact = ("eval_reward", "eval_accuracy")
        files = sorted((results / case / way / "evaluations").iterdir())
        assert [file.name for file in files] == ["step-000002.jsonl", "step-000004.jsonl"]
        return [
            {n: x for n, x in entry.items() if n.startswith(exact) and "std" not in n}
            for entry in entries
        ], [file.read_text("utf-8").splitlines() for file in files]

    ours, theirs = evaluated("one"), evaluated(how)
    assert ours == theirs
    assert [len(lines) for lines in ours[1]] == [5, 5]
    assert "eval_reward/multiple_choice" in ours[0][0] and "eval_rewards/reward/mean" in ours[0][0]


@slow_train
@pytest.mark.parametrize("case, how", [("resampling", how) for how in EQUAL["resampling"]])
def test_processes_draw_the_same_prompts(case: str, how: str, results: Path) -> None:
    """Of fewer than all groups of a batch: the rollouts of one lie in both processes."""
    for way in ("one", how):
        logs = [entry for entry in load(results, case, way)["log"] if "groups/drawn" in entry]
        assert len(logs) == 2  # rollout batches
        assert all(entry["groups/drawn"] > 0 == entry["groups/left_equal"] for entry in logs)


@slow_train
@pytest.mark.parametrize("case, how", [("pictures", how) for how in EQUAL["pictures"]])
def test_pictures_are_those_of_one_process(case: str, how: str, results: Path) -> None:
    """One process logs them: the first alone, or under FSDP2 with the forwards of both."""
    folder = results / case

    def drawn(way: str) -> list[tuple[int, bytes]]:
        load(results, case, way)  # or say what it wrote to stderr
        (run,) = {file.parent for file in (folder / way).rglob("events.out.tfevents.*")}
        events = EventAccumulator(str(run), size_guidance={"images": 0}).Reload()
        images = events.Images("attn_map/row_0")
        return [(image.step, image.encoded_image_string) for image in images]

    one, two = drawn("one"), drawn(how)
    assert [step for step, _ in two] == [step for step, _ in one] == [0, 2, 4]
    assert two[0] == one[0] and one[0][1] != one[1][1]
    for (_, ours), (_, theirs) in zip(one, two, strict=True):
        a, b = (np.asarray(Image.open(io.BytesIO(each))).astype(int) for each in (ours, theirs))
        assert a.shape == b.shape and np.abs(a - b).mean() < 1.0  # of 255


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case == "token mean" else slow_train) for case in EQUAL],
)
def test_attention_term_mattered(case: str, results: Path) -> None:
    """Or the equality would say nothing of it: its share of the gradient, and its divergence."""
    log = load(results, case, "one")["log"]
    if case == "router":
        assert max(entry.get("router/divergence", 0.0) for entry in log) > 1e-3
        return
    shares = [entry["attn/grad_share"] for entry in log if "attn/grad_share" in entry]
    assert max(shares) > 0.05
    if case != "teacher":
        assert max(entry.get("attn/divergence", 0.0) for entry in log) > 1e-4
    # Responses of 2 to 8 tokens, so that a mean over one process's tokens is another.
    first = log[0]
    assert (first["completions/min_length"], first["completions/max_length"]) == (2, 8)


@slow_train
@pytest.mark.parametrize("how", RESUMING)
def test_two_processes_resume_exactly(how: str, results: Path) -> None:
    straight = load(results, "resuming", how.removesuffix("-sharded"))
    resumed = load(results, "resuming", f"{how} resumed")

    assert_resumed(straight, resumed)


def assert_resumed(straight: dict[str, Any], resumed: dict[str, Any]) -> None:
    """Every later log and the last weights, bit for bit."""

    def later(result: dict[str, Any]) -> list[dict[str, float]]:
        entries = [entry for entry in result["log"] if entry["step"] > 2]
        return [{k: v for k, v in entry.items() if not k.startswith(TIMES)} for entry in entries]

    assert len(later(straight)) == 3
    assert later(resumed) == later(straight)
    for name, weight in straight["weights"].items():
        assert torch.equal(weight, resumed["weights"][name]), name


@slow_train
@pytest.mark.parametrize("how", RESUMING)
def test_a_signal_to_one_process_stops_both(how: str, results: Path) -> None:
    """In its first step: both finish the rollout batch, and save at the same step."""
    folder = results / "resuming"
    for rank in range(2):
        assert (folder / f"{how} stopped.{rank}.status").read_text() == "143"
    sentence = "Stopped by SIGTERM at step 2 of 4. The last complete checkpoint is"
    assert sentence in (folder / f"{how} stopped.0.stderr").read_text()
    assert sentence not in (folder / f"{how} stopped.1.stderr").read_text()


@slow_train
@pytest.mark.parametrize("how", RESUMING)
def test_random_states_of_both_processes_are_sealed(how: str, results: Path) -> None:
    assert last_checkpoint(results / "resuming" / how) is not None
    checkpoint = results / "resuming" / how / "checkpoint-2"
    assert why_incomplete(checkpoint) is None
    state = read_state(checkpoint)
    assert state is not None and state["processes"] == 2
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(state["files"])
    (checkpoint / "ral_state.json").rename(checkpoint / "kept")  # as another trainer leaves it
    try:
        assert why_incomplete(checkpoint) is None
    finally:
        (checkpoint / "kept").rename(checkpoint / "ral_state.json")
