"""Groups of rollouts whose rewards are all equal: counted, and replaced by further prompts.

In such a group every advantage is 0, so it has no gradient. Dynamic sampling (DAPO,
arXiv 2503.14476) draws further prompts in its place until the rollout batch is full.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl.data_utils import prepare_multimodal_messages

from .vision import has_images, image_lists


def equal_groups(trainer: Any, rewards: Tensor) -> Tensor:
    """Which groups have no advantage: bool [groups].

    Args:
        trainer: TRL's, made. Where it normalises the rewards of each function by itself
            ("normalize_then_sum"), all of them must be equal, and not only their sum.
        rewards: [rollouts, functions] of all processes, NaN where a function gave none.
    """
    weighted = rewards * trainer.reward_weights.to(rewards.device)
    if trainer.multi_objective_aggregation != "normalize_then_sum":
        unknown = weighted.isnan().all(1, keepdim=True)
        weighted = weighted.nansum(1, keepdim=True).masked_fill(unknown, math.nan)
    grouped = weighted.view(-1, trainer.num_generations, weighted.shape[1])
    lowest = grouped.masked_fill(grouped.isnan(), math.inf).amin(1)
    highest = grouped.masked_fill(grouped.isnan(), -math.inf).amax(1)
    # 1e-8 is TRL's bound of a standard deviation. A group without rewards has inf and -inf.
    return (highest - lowest <= 1e-8).all(1)


@dataclass
class _Candidates:
    """Rollouts of some prompts, written and rewarded, in the order of the groups.

    Attributes:
        rewards: [rollouts, functions] of all processes.
        tokens, logprobs, extra: of all processes, by rollout. `extra` is what reward functions
            logged for the table of completions.
    """

    rewards: Tensor
    tokens: list[list[int]]
    logprobs: list[Any]
    extra: list[dict[str, Any]]

    def put(self, group: int, other: _Candidates, source: int, size: int) -> None:
        """Take the group `source` of other candidates in place of a group of these."""
        here, there = (slice(n * size, (n + 1) * size) for n in (group, source))
        self.rewards[here] = other.rewards[there]
        self.tokens[here] = other.tokens[there]
        self.logprobs[here] = other.logprobs[there]
        self.extra[here] = other.extra[there]


class Resampler:
    """Fills a rollout batch with groups whose rewards differ.

    The rollouts of the batch's own prompts are written and rewarded first. Further prompts are
    drawn from the whole training set without replacement. Seed and number of the rollout batch
    determine them: every process draws the same, and so does a resumed run. A round writes as many
    groups as are missing, rounded up so that each process writes as many rollouts. Equal groups
    that are left after the last round stay.

    Then TRL makes the batch from the chosen rows, and finds their rollouts and rewards in place of
    writing new ones: advantages, old policy, references and metrics are those of a batch that never
    had the other prompts. Which groups are equal is decided without the attention reward, which
    comes from a forward over the chosen rollouts.

    Args:
        trainer: a `RALTrainer`, made.
        rounds: how often further prompts are drawn for a rollout batch, at most.

    Raises:
        ValueError: the trainer writes rollouts in a way that cannot be repeated from their tokens
            (tools, an environment, rollout_func, exploration), or its training set has no length.
    """

    def __init__(self, trainer: Any, rounds: int) -> None:
        for name in ("tools", "environment_factories", "rollout_func"):
            if getattr(trainer, name, None):
                raise ValueError(
                    f"RALTrainer: resample_equal_groups is not supported with {name}: a rollout "
                    "must be its prompt and its tokens"
                )
        if not hasattr(trainer.train_dataset, "__len__"):
            raise ValueError(
                "RALTrainer: resample_equal_groups draws prompts by number, and needs a training "
                "set with a length; got a streaming one (streaming=false reads it first)"
            )
        self._trainer = trainer
        self._rounds = rounds

    def fill(self, rows: list[dict[str, Any]], batch: int) -> tuple[list[dict[str, Any]], Any]:
        """Replace the rows of this process that are in groups with equal rewards.

        Args:
            rows: of this process, with lists of images.
            batch: number of the rollout batch.

        Returns:
            The rows, and a context in which the trainer's generation and rewards are theirs.
        """
        trainer = self._trainer
        size = trainer.num_generations
        chosen, rows = self._write(rows), list(rows)
        missing = self._equal(chosen)
        first, drawn = len(missing), 0
        order = self._order(batch)
        for _ in range(self._rounds):
            count = self._round_up(len(missing))
            numbers = order[drawn : drawn + count]
            if not missing or len(numbers) < count:
                break
            drawn += count
            fresh = self._write(self._read(numbers, self._own(count * size)))
            equal = set(self._equal(fresh))
            differing = [source for source in range(count) if source not in equal]
            for group, source in zip(missing, differing, strict=False):
                chosen.put(group, fresh, source, size)
                self._replace(rows, group, numbers[source])
            missing = missing[len(differing) :]
        metrics = trainer._metrics["train"]
        metrics["groups/equal"].append(first)
        metrics["groups/drawn"].append(drawn)
        metrics["groups/left_equal"].append(len(missing))
        return rows, self._replayed(chosen, self._own(len(chosen.tokens)))

    # -- prompts ---------------------------------------------------------------------------------

    def _order(self, batch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self._trainer.args.seed * 1_000_003 + batch)
        numbers: list[int] = torch.randperm(
            len(self._trainer.train_dataset), generator=generator
        ).tolist()
        return numbers

    def _round_up(self, groups: int) -> int:
        """At least so many groups, of which each process writes as many rollouts as the others."""
        processes = self._trainer.accelerator.num_processes
        step = processes // math.gcd(processes, self._trainer.num_generations)
        return math.ceil(groups / step) * step

    def _own(self, rollouts: int) -> slice:
        """Which of all rollouts, in the order of the groups, are this process's."""
        accelerator = self._trainer.accelerator
        share = rollouts // accelerator.num_processes
        return slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)

    def _read(self, numbers: Sequence[int], own: slice) -> list[dict[str, Any]]:
        """The rows, in this process, of the groups of some prompts."""
        size = self._trainer.num_generations
        groups = [index // size for index in range(own.start, own.stop)]
        read = {group: self._trainer.train_dataset[numbers[group]] for group in set(groups)}
        return image_lists([dict(read[group]) for group in groups])

    def _replace(self, rows: list[dict[str, Any]], group: int, number: int) -> None:
        """Put a drawn prompt where this process has rows of a group."""
        size = self._trainer.num_generations
        own = self._own(len(rows) * self._trainer.accelerator.num_processes)
        places = range(max(own.start, group * size), min(own.stop, (group + 1) * size))
        if places:
            (row,) = image_lists([dict(self._trainer.train_dataset[number])])
            for place in places:
                rows[place - own.start] = row

    # -- rollouts --------------------------------------------------------------------------------

    def _equal(self, candidates: _Candidates) -> list[int]:
        groups: list[int] = equal_groups(self._trainer, candidates.rewards).nonzero()[:, 0].tolist()
        return groups

    def _write(self, rows: list[dict[str, Any]]) -> _Candidates:
        """Write and reward rollouts, and leave the metrics as they were."""
        trainer = self._trainer
        prompts = [row["prompt"] for row in rows]
        if has_images(rows) and not isinstance(prompts[0], str):
            prompts = [
                prepare_multimodal_messages(row["prompt"], images=row["images"]) for row in rows
            ]
        kept = {name: list(values) for name, values in trainer._metrics["train"].items()}
        seen = trainer.state.num_input_tokens_seen
        _, tokens, _, completions, logprobs, *_ = trainer._generate(prompts)
        rewards = trainer._calculate_rewards(rows, prompts, completions, tokens)
        trainer._metrics["train"].clear()
        trainer._metrics["train"].update(kept)
        trainer.state.num_input_tokens_seen = seen
        logged = trainer._pending_extra_logs
        extra = [
            {name: values[index] for name, values in logged.items() if len(values) == len(rows)}
            for index in range(len(rows))
        ]
        logged.clear()
        return _Candidates(
            rewards.clone(),
            gather_object([list(ids) for ids in tokens]),
            gather_object(logprobs if logprobs is not None else [None] * len(rows)),
            gather_object(extra),
        )

    @contextmanager
    def _replayed(self, chosen: _Candidates, own: slice) -> Iterator[None]:
        """Give TRL the chosen rollouts where it would write, and their rewards."""
        trainer = self._trainer
        tokens, logprobs = chosen.tokens[own], chosen.logprobs[own]
        none = all(each is None for each in logprobs)

        def generate(*_: Any, **__: Any) -> tuple[list[list[int]], Any]:
            return tokens, None if none else logprobs

        def reward(*_: Any, **__: Any) -> Tensor:
            for each in chosen.extra[own]:
                for name, value in each.items():
                    trainer._pending_extra_logs[name].append(value)
            return trainer._complete_rewards(chosen.rewards)  # it was not known before

        trainer._generate_single_turn, trainer._calculate_rewards = generate, reward
        try:
            yield
        finally:
            del trainer._generate_single_turn, trainer._calculate_rewards
