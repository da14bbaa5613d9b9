"""Evaluation during training: what it measures and writes, and that training does not notice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from ral import RALTrainer
from ral.evaluation import answers_of
from ral.validation import summary

from . import tiny
from .test_resuming import TIMES

slow = pytest.mark.slow(stands_in="test_metrics_and_answers")
EVALUATING: dict[str, Any] = {
    "eval_strategy": "steps", "eval_steps": 2, "num_generations_eval": 1,
    "per_device_eval_batch_size": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.getbasetemp() / "checkpoints")


def rows() -> Dataset:
    """Three questions of multiple choice, A B C, and two for a number, 7 and 8, without images."""
    found = list(tiny.dataset(5))
    for number, row in enumerate(found[3:]):
        row |= {"problem_type": "numerical", "solution": str(7 + number), "images": []}
    return Dataset.from_list(found)


def written(trainer: RALTrainer, step: int, name: str = "") -> list[dict[str, Any]]:
    file = Path(str(trainer.args.output_dir)) / "evaluations" / f"step-{step:06d}{name}.jsonl"
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


class SaysB(RALTrainer):
    """Answers B or 7 in evaluation."""

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if self.model.training:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        image = self.model.config.image_token_id
        texts = [f"<answer>{'B' if image in ids else '7'}</answer>" for ids in prompt_ids]
        return self._tokenizer(texts)["input_ids"], None


def length(completions: Any, **columns: Any) -> list[float | None]:
    """Of the solution; none for C."""
    return [None if text == "C" else float(len(text)) for text in columns["solution"]]


def nine(completions: Any, **columns: Any) -> list[float]:
    return [9.0 if text == "8" else 0.0 for text in columns["solution"]]


def test_metrics_and_answers(path: Path, tmp_path: Path) -> None:
    trainer = tiny.trainer(
        path, tmp_path, trainer_class=SaysB, reward_funcs=[length, nine], eval_dataset=rows(),
        max_steps=2, reward_weights=[1.0, 0.5], **EVALUATING,
    )  # fmt: skip
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert entry["step"] == 2
    wanted = {
        # B and 7 are right. Rewards: 1, 1, 0 (nine alone), 1, 1 + 9/2.
        "accuracy": 2 / 5, "accuracy/multiple_choice": 1 / 3, "accuracy/numerical": 1 / 2,
        "reward": 8.5 / 5, "reward/multiple_choice": 2 / 3, "reward/numerical": 6.5 / 2,
        "rewards/length/mean": 1.0, "rewards/nine/mean": 9 / 5,
    }  # fmt: skip
    assert {name: entry[f"eval_{name}"] for name in wanted} == pytest.approx(wanted)
    answers = written(trainer, 2)
    assert [answer["problem_id"] for answer in answers] == list("01234")
    assert [answer["accuracy"] for answer in answers] == [0, 1, 0, 1, 0]
    assert answers[2]["rewards"] == {"length": None, "nine": 0.0}
    assert answers[4] == {
        "step": 2, "problem_id": "4", "type": "numerical", "prompt": "What is in the picture 4?",
        "answer": "<answer>7</answer>", "expected": "8", "accuracy": 0.0, "reward": 5.5,
        "rewards": {"length": 1.0, "nine": 9.0},
    }  # fmt: skip
    assert answers[0]["prompt"] == "<image>\nWhat is in the picture 0?"


def test_summary_leaves_out_what_is_unknown() -> None:
    answer = {"type": None, "reward": 1.0, "accuracy": None, "rewards": {"a": 1.0, "b": None}}
    assert summary([answer]) == {"reward": 1.0, "rewards/a/mean": 1.0}
    assert summary([]) == {}


@slow
def test_greedy_answers_are_those_of_eval(path: Path, tmp_path: Path) -> None:
    trainer = tiny.trainer(path, tmp_path, eval_dataset=rows(), eval_temperature=0.0, **EVALUATING)
    trainer.evaluate()
    answers = [answer["answer"] for answer in written(trainer, 0)]
    model = trainer.model.eval()
    model.generation_config.suppress_tokens = trainer.generation_config.suppress_tokens
    wanted, _ = answers_of(model, trainer.processing_class, list(rows()), max_new_tokens=8)
    assert answers == wanted
    assert trainer.generation_config.do_sample  # afterwards


@slow
def test_sampled_answers_have_the_temperature(path: Path, tmp_path: Path) -> None:
    """At a temperature near 0 a sample is the greedy answer; each evaluation repeats."""

    def answers(temperature: float | None, **more: Any) -> list[list[str]]:
        trainer = tiny.trainer(
            path, tmp_path, eval_dataset=rows(), eval_temperature=temperature,
            **{**EVALUATING, **more},
        )  # fmt: skip
        found = []
        for _ in range(2):
            trainer.evaluate()
            found.append([answer["answer"] for answer in written(trainer, 0)])
        return found

    greedy, again = answers(0.0)
    assert greedy == again == answers(1e-4)[0]
    sampled, repeated = answers(None)
    assert greedy != sampled == repeated
    twice, _ = answers(None, num_generations_eval=2)
    assert len(twice) == 10


@slow
def test_sets_by_name(path: Path, tmp_path: Path) -> None:
    sets: Any = {"all": rows(), "two": rows().select([1, 3])}
    trainer = tiny.trainer(path, tmp_path, trainer_class=SaysB, eval_dataset=sets, **EVALUATING)
    scores = trainer.evaluate()
    assert (scores["eval_all_accuracy"], scores["eval_two_accuracy"]) == (0.4, 1.0)
    assert (len(written(trainer, 0, "-all")), len(written(trainer, 0, "-two"))) == (5, 2)


@slow
def test_training_does_not_notice(path: Path, tmp_path: Path) -> None:
    def losses(name: str, **config: Any) -> list[float]:
        trainer = tiny.trainer(path, tmp_path / name, eval_dataset=rows(), max_steps=6, **config)
        trainer.train()
        return tiny.logged(trainer, "loss")

    assert losses("1", **EVALUATING) == losses("2")


def _best_at_two(completions: Any, trainer_state: Any, **columns: Any) -> list[float]:
    if len(completions) == 2 or len(completions) == 1:  # an evaluation batch
        return [float(trainer_state.global_step == 2)] * len(completions)
    return tiny.reward(completions)


@slow
def test_the_best_checkpoint_is_kept(path: Path, tmp_path: Path) -> None:
    trainer = tiny.trainer(
        path, tmp_path, reward_funcs=_best_at_two, eval_dataset=rows(), max_steps=4,
        load_best_model_at_end=True, save_strategy="steps", save_steps=2, save_total_limit=1,
        **EVALUATING,
    )  # fmt: skip
    assert trainer.args.metric_for_best_model == "reward" and trainer.args.greater_is_better
    trainer.train()
    assert tiny.logged(trainer, "eval_reward") == [1.0, 0.0]
    best = Path(str(trainer.state.best_model_checkpoint))
    assert best.name == "checkpoint-2"
    kept = load_file(best / "model.safetensors")
    now = {name: x for name, x in trainer.model.state_dict().items() if name in kept}
    assert now and all(torch.equal(kept[name], x) for name, x in now.items())


@slow
def test_a_resumed_run_has_the_same_evaluations(path: Path, tmp_path: Path) -> None:
    def trainer(name: str) -> RALTrainer:
        return tiny.trainer(
            path, tmp_path / name, eval_dataset=rows(), max_steps=8, save_strategy="steps",
            save_steps=4, **EVALUATING,
        )  # fmt: skip

    straight = trainer("straight")
    straight.train()
    checkpoint = tmp_path / "resumed/out/checkpoint-4"
    shutil.copytree(tmp_path / "straight/out/checkpoint-4", checkpoint)
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))

    def evaluations(of: RALTrainer) -> list[dict[str, Any]]:
        entries = [entry for entry in of.state.log_history if "eval_reward" in entry]
        left_out = (*TIMES, "eval_runtime", "eval_samples", "eval_steps")
        return [
            {name: x for name, x in entry.items() if not name.startswith(left_out)}
            for entry in entries
        ]

    assert [entry["step"] for entry in evaluations(straight)] == [2, 4, 6, 8]
    assert evaluations(resumed) == evaluations(straight)
    assert written(resumed, 8) == written(straight, 8)
    assert not (tmp_path / "resumed/out/evaluations/step-000002.jsonl").exists()
