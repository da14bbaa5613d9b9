"""A resumed run is the run that did not stop: every later log and the last weights, bit for bit."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trl import GRPOConfig, GRPOTrainer

from ral.checkpoints import read_state
from ral.data import load_jsonl
from ral_kernels.integrations.transformers import load_processor
from tests.trainer import cli_case, tiny

SAVING: dict[str, Any] = {
    "save_strategy": "steps", "save_steps": 3, "max_steps": 12, "attn_coef": 5.0,
    "attn_metrics_every": 0,
}  # fmt: skip
TIMES = ("time/", "step_time", "train_runtime", "train_samples", "train_steps", "train_loss")

# Each with the step that it resumes after. A rollout batch is 4 micro-steps, an epoch 16 of them
# over 8 prompts. save_steps=3 divides neither.
SCHEDULES: dict[str, tuple[int, dict[str, Any]]] = {
    "4 steps a batch": (4, {"lr_scheduler_type": "cosine", "warmup_steps": 6, "max_steps": 9}),
    "2 steps a batch": (4, {"gradient_accumulation_steps": 2, "max_steps": 7}),
    "steps across batches": (4, {"gradient_accumulation_steps": 3, "max_steps": 7}),
    "1 batch in 1 step": (3, {"gradient_accumulation_steps": 4, "max_steps": 5, "beta": 0.04,
                              "attn_reference": "ref"}),
    "second epoch": (4, {"train_dataset": tiny.dataset(2), "max_steps": 7}),
    "inside the second epoch": (12, {"train_dataset": tiny.dataset(4), "max_steps": 13}),
    "logs across the checkpoint": (4, {"logging_steps": 5, "max_steps": 7}),
    "detailed metrics now and then": (4, {"attn_metrics_every": 2, "max_steps": 9}),
    "exploration": (4, {"attn_explore_sigma": 1.0, "attn_granularity": "image", "max_steps": 7}),
}  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("model"))


def after(trainer: Any, step: int) -> list[dict[str, float]]:
    """What was logged after a step, but for clocks."""
    return [
        {name: value for name, value in entry.items() if not name.startswith(TIMES)}
        for entry in trainer.state.log_history
        if entry["step"] > step
    ]


@contextmanager
def warnings_of(module: str) -> Iterator[list[str]]:
    """What a module warns of; transformers' loggers do not propagate."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(module)
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def same_weights(one: Any, other: Any) -> bool:
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def resumed(path: Path, tmp_path: Path, step: int, **config: Any) -> tuple[Any, Any]:
    """A run that did not stop, and one that resumed from its checkpoint."""
    config = {**SAVING, **config}
    straight = tiny.trainer(path, tmp_path, **config)
    straight.train()
    other = tiny.trainer(path, tmp_path, output_dir=str(tmp_path / "resumed"), **config)
    other.train(resume_from_checkpoint=tmp_path / "out" / f"checkpoint-{step}")
    return straight, other


# Each trains twice: two are in the quick tier.
QUICK_SCHEDULES = ("4 steps a batch", "steps across batches")
slow = pytest.mark.slow(stands_in="test_resumes_exactly")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK_SCHEDULES else slow) for name in SCHEDULES],
)
def test_resumes_exactly(name: str, path: Path, tmp_path: Path) -> None:
    step, config = SCHEDULES[name]
    straight, other = resumed(path, tmp_path, step, **config)
    assert after(other, step) == after(straight, step)
    assert len(after(other, step)) > 1
    assert same_weights(straight, other)
    if name == "second epoch":  # or a sampler that starts over would go unnoticed
        sampler = straight._get_train_sampler()
        assert list(sampler) != list(sampler)


def test_resumes_exactly_with_lora(path: Path, tmp_path: Path) -> None:
    straight, other = resumed(path, tmp_path, 4, peft_config=tiny.lora(), beta=0.04, max_steps=7)
    assert after(other, 4) == after(straight, 4)
    assert same_weights(straight, other)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_resumes_with_the_saved_weights(family: str, tmp_path: Path) -> None:
    """Not those that training began with: transformers#43701."""
    path = tiny.checkpoint(tmp_path, family)
    straight, other = resumed(path, tmp_path, 4, max_steps=5)
    assert same_weights(straight, other)
    trained = load_file(tmp_path / "out" / "checkpoint-4" / "model.safetensors")
    first = load_file(path / "model.safetensors")
    assert not all(torch.equal(trained[name], first[name]) for name in first)


def test_saves_wait_for_the_end_of_the_rollout_batch(path: Path, tmp_path: Path) -> None:
    trainer = tiny.trainer(path, tmp_path, **{**SAVING, "save_steps": 5, "max_steps": 10})
    trainer.train()
    found = {folder.name for folder in (tmp_path / "out").glob("checkpoint-*")}
    assert found == {"checkpoint-8", "checkpoint-10"}  # the last step has nothing to wait for
    state = read_state(tmp_path / "out" / "checkpoint-8")
    assert state is not None and (state["micro_step"], state["rollout_batches"]) == (8, 2)


def test_best_weights_are_those_that_were_evaluated(path: Path, tmp_path: Path) -> None:
    trainer = tiny.trainer(
        path, tmp_path, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
        per_device_eval_batch_size=4, max_steps=4, learning_rate=1e-2, eval_dataset=tiny.dataset(1),
    )  # fmt: skip
    trainer.train()
    assert (tmp_path / "out" / "checkpoint-2").exists()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    fresh = tiny.trainer(best, tmp_path)
    assert same_weights(trainer, fresh)


def test_resume_inside_a_rollout_batch_gets_back_into_step(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.trainer(path, tmp_path, **{**SAVING, "max_steps": 6}).train()
    trainer = tiny.trainer(path, tmp_path, **{**SAVING, "max_steps": 9})
    batches = []
    original = trainer._generate_and_score_completions

    def generate(inputs: Any) -> Any:
        batches.append(trainer.state.global_step)
        return original(inputs)

    monkeypatch.setattr(trainer, "_generate_and_score_completions", generate)
    trainer.train(resume_from_checkpoint=True)
    assert batches == [6, 8]


def test_resume_with_another_schedule_or_other_data_warns(path: Path, tmp_path: Path) -> None:
    data = cli_case.make(tmp_path) / "rows.jsonl"
    tiny.trainer(
        path, tmp_path, train_dataset=load_jsonl(data), **{**SAVING, "max_steps": 4}
    ).train()
    data.write_text(data.read_text().replace("cat", "cow"))
    with (tmp_path / "images" / "0.png").open("ab") as image:
        image.write(b"more")
    other = tiny.trainer(
        path, tmp_path, train_dataset=load_jsonl(data),
        **{**SAVING, "num_iterations": 3, "max_steps": 5},
    )  # fmt: skip
    with warnings_of("ral.sealing") as said:
        other.train(resume_from_checkpoint=True)
    checkpoint = tmp_path / "out" / "checkpoint-4"
    otherwise = "training continues, but not as the uninterrupted run would have"
    assert said == [
        f"train: the data have changed since {checkpoint} was written (rows.jsonl, rows.jsonl: "
        f"sizes of images): {otherwise}",
        f"train: {checkpoint} has micro_steps_per_rollout_batch=4, and now it is 6: {otherwise}",
    ]
    assert other.state.global_step == 5


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param(
            {"max_steps": -1, "num_train_epochs": 0.25},
            marks=pytest.mark.slow(stands_in="test_a_complete_run_stays_as_it_is"),
        ),
    ],
)
def test_a_complete_run_stays_as_it_is(settings: Any, path: Path, tmp_path: Path) -> None:
    config = {**SAVING, "max_steps": 4, "save_total_limit": 1, **settings}
    straight = tiny.trainer(path, tmp_path, **config)
    straight.train()
    checkpoint = tmp_path / "out" / "checkpoint-4"
    before = {file: file.read_bytes() for file in checkpoint.rglob("*")}
    other = tiny.trainer(path, tmp_path, **config)
    with warnings_of("ral.sealing") as said:
        other.train(resume_from_checkpoint=True)
    assert said == [f"train: {checkpoint} is at step 4 of 4: training is complete"]
    assert other.state.global_step == 4 and same_weights(straight, other)
    assert {file: file.read_bytes() for file in checkpoint.rglob("*")} == before


def test_plain_grpo_logs_as_trl_does(path: Path, tmp_path: Path) -> None:
    """No log more at a save: who reads log_history[-1] of TRL's trainer gets the same here."""
    settings = {**SAVING, "attn_coef": 0.0, "logging_steps": 3, "max_steps": 4}
    plain = {
        name: value
        for name, value in {**tiny.DEFAULTS, **settings}.items()
        if not name.startswith("attn_")
    }

    def theirs() -> Any:
        return GRPOTrainer(
            str(path),
            tiny.reward,
            GRPOConfig(**plain, output_dir=str(tmp_path / "theirs"), disable_dropout=True),
            train_dataset=tiny.dataset(),
            processing_class=load_processor(path),
        )

    histories = []
    for make in (theirs, lambda: tiny.trainer(path, tmp_path, **settings)):
        trainer = make()
        trainer.train()
        histories.append(
            [(entry["step"], entry.get("loss")) for entry in trainer.state.log_history]
        )
    assert histories[0] == histories[1]
    assert [step for step, _ in histories[1]] == [3, 4]


def test_resume_refuses_what_is_not_complete(path: Path, tmp_path: Path) -> None:
    trainer = tiny.trainer(path, tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=r"got True: none in .* is complete"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"got .*checkpoint-9: it is not a folder"):
        trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-9")
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"trainer_state\.json is missing"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
