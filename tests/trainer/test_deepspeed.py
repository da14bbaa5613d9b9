"""Two processes under DeepSpeed's ZeRO-2 and ZeRO-3 train as one does: `make test-deepspeed`.

DeepSpeed has an environment of its own, .venv-deepspeed. Elsewhere these tests skip.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from ral.checkpoints import last_checkpoint
from tests.conftest import skip_or_fail

from .test_two_processes import (
    OF_A_MICRO_BATCH,
    OF_A_PROCESS,
    assert_resumed,
    assert_same_run,
    load,
    train_all,
)

pytestmark = [
    pytest.mark.xdist_group("two processes"),
    pytest.mark.slow(
        stands_in="tests/trainer/test_two_processes.py::test_two_processes_train_as_one"
    ),
]
EVAL_TIMES = ("eval_runtime", "eval_samples", "eval_steps")
STAGES = ["zero2", "zero3"]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("deepspeed") is None:
        skip_or_fail(
            "deepspeed", "the package is not installed here; `make test-deepspeed` runs it"
        )
    return train_all(request, tmp_path_factory)


@pytest.mark.parametrize("how", STAGES)
@pytest.mark.parametrize(
    "case, base",
    [
        ("token mean", "one"),
        ("accumulating", "one"),
        ("lora", "one"),
        ("teacher", "one"),
        # TRL's eval_loss is not the same with another number of processes.
        ("evaluating", "ddp"),
    ],
)
def test_deepspeed_trains_alike(case: str, base: str, how: str, results: Path) -> None:
    one, two = load(results, case, base), load(results, case, how)
    assert (one["processes"], two["processes"]) == (1 if base == "one" else 2, 2)
    assert two["type"] == "DistributedType.DEEPSPEED" and "DeepSpeedEngine" in two["wrapped"]
    left_out = OF_A_PROCESS + (OF_A_MICRO_BATCH if case == "accumulating" else EVAL_TIMES)
    assert_same_run(one, two, left_out)
    if case == "evaluating":
        assert sum("eval_reward" in entry for entry in two["log"]) == 2
    if case == "teacher":
        assert two["log"][0]["distill/logits"] > 1e-3 < two["log"][0]["distill/attention"]


@pytest.mark.parametrize("how", STAGES)
@pytest.mark.parametrize("case", ["token mean"])
def test_a_saved_model_loads_without_deepspeed(case: str, how: str, results: Path) -> None:
    trained = load(results, case, how)["weights"]
    saved = AutoModelForImageTextToText.from_pretrained(results / case / f"{how} saved")
    names = dict(saved.named_parameters())
    assert set(names) == set(trained)
    for name, weight in names.items():
        assert torch.equal(weight.detach(), trained[name]), name


@pytest.mark.parametrize("how", STAGES)
def test_deepspeed_resumes_exactly(how: str, results: Path) -> None:
    """After SIGTERM to one of the two, in the first step."""
    folder = results / "resuming"
    for rank in range(2):
        assert (folder / f"{how} stopped.{rank}.status").read_text() == "143"
    assert last_checkpoint(folder / how) is not None
    assert_resumed(load(results, "resuming", how), load(results, "resuming", f"{how} resumed"))
