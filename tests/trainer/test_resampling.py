"""Groups whose rewards are all equal: counted, and replaced as if they had not been there."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset

from ral.resampling import equal_groups
from tests.integrations.eager_maps import assert_same_gradients, gradients

from . import by_hand, tiny
from .two_processes import FixedRollouts

slow = pytest.mark.slow(stands_in="test_as_if_the_prompts_had_not_been_there")
EQUAL = ("0", "3", "4", "5")  # prompts whose rollouts get one reward


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.getbasetemp() / "checkpoints")


def reward(completions: Any, problem_id: Any, **columns: Any) -> list[float]:
    values = tiny.reward(completions)
    return [1.0 if n in EQUAL else x for n, x in zip(problem_id, values, strict=True)]


def rows(numbers: Any = range(8)) -> Dataset:
    """Some have no image."""
    found = [dict(row) for row in tiny.dataset()]
    for row in found[::3]:
        row["images"] = None
    return Dataset.from_list([found[number] for number in numbers])


def prompts_of(trainer: Any) -> list[int]:
    """The number of the prompt of each rollout of the last batch, in the order of the groups."""
    texts = [prompt[0]["content"][-1]["text"] for prompt in trainer._logs["prompt"]]
    return [int(text.removeprefix("What is in the picture ")[0]) for text in texts]


def batch_of(trainer: Any) -> dict[str, Any]:
    torch.manual_seed(0)  # of TRL's shuffle
    return by_hand.batch_of(trainer)


@pytest.mark.parametrize("attn_reference", ["old", pytest.param("ref", marks=slow)])
def test_as_if_the_prompts_had_not_been_there(
    attn_reference: str, path: Path, tmp_path: Path
) -> None:
    """Rollouts, advantages, references, metrics, loss and gradient of a batch without them."""
    settings: dict[str, Any] = {
        "trainer_class": FixedRollouts, "reward_funcs": reward, "num_generations": 2,
        "attn_reference": attn_reference, "beta": 0.1, "attn_coef": 5.0,
    }  # fmt: skip
    trainer = tiny.trainer(
        path, tmp_path, train_dataset=rows(), resample_equal_groups=9, **settings
    )
    inputs = batch_of(trainer)
    kept = prompts_of(trainer)
    assert not {str(number) for number in kept} & set(EQUAL) and kept[::2] == kept[1::2]
    metrics = trainer._metrics["train"]
    (first,), (drawn,), (left,) = (
        metrics.pop(f"groups/{name}") for name in ("equal", "drawn", "left_equal")
    )
    assert first > 0 and drawn >= first and left == 0

    plain = tiny.trainer(
        path, tmp_path / "2", train_dataset=rows(kept[::2]), shuffle_dataset=False, **settings
    )
    wanted = batch_of(plain)
    assert prompts_of(plain) == kept
    assert plain._metrics["train"].pop("groups/equal") == [0]
    assert metrics == plain._metrics["train"]
    assert trainer.state.num_input_tokens_seen == plain.state.num_input_tokens_seen
    assert inputs.keys() == wanted.keys()
    for name, x in wanted.items():
        same = torch.equal(inputs[name], x) if isinstance(x, torch.Tensor) else inputs[name] == x
        assert same, name
    assert inputs["advantages"].abs().min() > 0
    got = []
    for each, batch in ((trainer, inputs), (plain, wanted)):
        by_hand.stepped(each)
        loss = each._compute_loss(each.model, batch)
        got.append((loss.detach(), gradients(each.model, loss)))
        assert each._metrics["train"]["attn/loss"][0] != 0
    torch.testing.assert_close(got[0][0], got[1][0])
    assert_same_gradients(got[0][1], got[1][1], 1e-6)


@slow
def test_rounds_are_bounded(path: Path, tmp_path: Path) -> None:
    trainer = tiny.trainer(
        path, tmp_path, reward_funcs=lambda completions, **_: [1.0] * len(completions),
        resample_equal_groups=2, max_steps=1, train_dataset=rows(),
    )  # fmt: skip
    trainer.train()
    found = [tiny.logged(trainer, f"groups/{name}") for name in ("equal", "drawn", "left_equal")]
    assert found == [[2], [4], [2]]
    assert tiny.logged(trainer, "frac_reward_zero_std") == [1.0]


@slow
def test_a_training_set_is_drawn_once_at_most(path: Path, tmp_path: Path) -> None:
    trainer = tiny.trainer(
        path, tmp_path, reward_funcs=lambda completions, **_: [1.0] * len(completions),
        resample_equal_groups=9, max_steps=1, train_dataset=rows(range(3)),
    )  # fmt: skip
    trainer.train()
    assert tiny.logged(trainer, "groups/drawn") == [2]  # of 3: one is less than are missing


@slow
def test_sampled_rollouts_keep_their_rewards(path: Path, tmp_path: Path) -> None:
    """Each rollout is rewarded once; what is logged beside it stays with it."""
    rewarded: list[str] = []

    def counting(
        completions: Any, problem_id: Any, log_extra: Any, log_metric: Any, **columns: Any
    ) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        rewarded.extend(texts)
        log_extra("text", texts)
        return reward(completions, problem_id)

    trainer = tiny.trainer(
        path, tmp_path, reward_funcs=counting, train_dataset=rows(), resample_equal_groups=9
    )
    by_hand.batch_of(trainer)
    (drawn,) = trainer._metrics["train"]["groups/drawn"]
    assert drawn > 0 and len(rewarded) == 8 + 4 * drawn
    completions = list(trainer._logs["completion"])
    assert list(trainer._logs["extra"]["text"]) == [c[0]["content"] for c in completions]
    problem_id = [str(number) for number in prompts_of(trainer)]
    assert list(trainer._logs["rewards"]["counting"]) == reward(completions, problem_id)
    assert not {"_generate_single_turn", "_calculate_rewards"} & set(vars(trainer))


@slow
def test_a_resumed_run_draws_the_same(path: Path, tmp_path: Path) -> None:
    def trainer(name: str) -> Any:
        return tiny.trainer(
            path, tmp_path / name, reward_funcs=reward, train_dataset=rows(), max_steps=12,
            resample_equal_groups=9, save_strategy="steps", save_steps=4,
        )  # fmt: skip

    straight = trainer("straight")
    straight.train()
    assert max(tiny.logged(straight, "groups/drawn")) > 0
    checkpoint = tmp_path / "resumed/out/checkpoint-4"
    shutil.copytree(tmp_path / "straight/out/checkpoint-4", checkpoint)
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name in ("loss", "groups/drawn", "attn/loss"):
        assert tiny.logged(resumed, name) == tiny.logged(straight, name), name


def test_equal_groups() -> None:
    nan = math.nan
    rewards = torch.tensor(
        [[1, 0], [1, 0], [0, 1], [1, 0], [nan, 2], [2, nan], [nan, nan], [nan, nan], [1, 0], [1, 9]]
    )

    def found(aggregation: str, weights: tuple[float, float]) -> list[bool]:
        trainer: Any = SimpleNamespace(
            reward_weights=torch.tensor(weights), num_generations=2,
            multi_objective_aggregation=aggregation,
        )  # fmt: skip
        return equal_groups(trainer, rewards).tolist()

    assert found("sum_then_normalize", (1, 1)) == [True, True, True, True, False]
    assert found("sum_then_normalize", (1, 0.5)) == [True, False, False, True, False]
    assert found("normalize_then_sum", (1, 1)) == [True, False, True, True, False]
    assert found("normalize_then_sum", (1, 0)) == [True, False, True, True, True]


def test_without_resampling_they_are_counted(path: Path, tmp_path: Path) -> None:
    trainer = tiny.trainer(path, tmp_path, reward_funcs=reward, train_dataset=rows([0, 1]))
    by_hand.batch_of(trainer)
    assert trainer._metrics["train"]["groups/equal"] == [1]
    assert "groups/drawn" not in trainer._metrics["train"]


def test_refusals(path: Path, tmp_path: Path) -> None:
    streamed = IterableDataset.from_generator(lambda: iter([{"prompt": "a"}]))
    with pytest.raises(ValueError, match="needs a training set with a length; got a streaming"):
        tiny.trainer(path, tmp_path, train_dataset=streamed, resample_equal_groups=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not supported with attn_explore_sigma > 0"):
        tiny.trainer(
            path, tmp_path, resample_equal_groups=1, attn_explore_sigma=1.0,
            attn_granularity="image",
        )  # fmt: skip
    with pytest.raises(ValueError, match="resample_equal_groups must be finite and >= 0; got -1"):
        tiny.trainer(path, tmp_path, resample_equal_groups=-1)
