"""A GRPO trainer whose checkpoints resume exactly: between rollout batches, and complete.

TRL keeps a rollout batch in memory for its inner steps. So training that resumes inside one writes
new rollouts, and its losses differ. TRL also restarts the sampler of prompts: from the second epoch
on, the order would be that of the first.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from .sealing import SealsCheckpoints

logger = logging.get_logger(__name__)


class ResumableTrainer(SealsCheckpoints, GRPOTrainer):
    """`GRPOTrainer` with checkpoints from which training continues as if it had not stopped.

    Besides what `SealsCheckpoints` does, a checkpoint that is due inside a rollout batch is written
    at the end of the batch (`save_steps`, and Ctrl-C: `ral.interrupts`). Exceptions are the end of
    training, `save_strategy="best"` and `load_best_model_at_end`, which need the weights of that
    step.

    One process on the same machine then repeats losses and weights bit for bit. A checkpoint does
    not hold TRL's reference model if it moves (`sync_ref_model`), the state of reward functions, or
    vLLM's random state.
    """

    _generations = 0  # rollout batches so far; kept in checkpoints

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._train_sampler: Sampler | None = None
        super().__init__(*args, **kwargs)
        self.add_callback(_BetweenRollouts(self))

    @property
    def between_rollouts(self) -> bool:
        """Whether the next micro-step begins a rollout batch."""
        return bool(self._step % _micro_steps(self.args) == 0)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _sealed_state(self) -> dict[str, Any]:
        return {
            **super()._sealed_state(),
            "micro_step": self._step,
            "micro_steps_per_rollout_batch": _micro_steps(self.args),
            "rollout_batches": self._generations,
        }

    def _restore(self, checkpoint: Path) -> dict[str, Any] | None:
        shuffled = getattr(self._train_sampler, "generator", None)
        if shuffled is not None:
            rows = self._train_sampler.num_samples  # type: ignore[union-attr]
            for _ in range(math.floor(self.state.epoch or 0)):
                torch.randperm(rows, generator=shuffled)
        if getattr(self.args, "sync_ref_model", False):
            logger.warning(
                "train: sync_ref_model=True: TRL's reference model is not in %s, and starts from "
                "the weights that training started from", checkpoint,
            )  # fmt: skip
        state = super()._restore(checkpoint)
        if state is None:
            return None
        now = {"micro_steps_per_rollout_batch": _micro_steps(self.args)}
        changed = self._warn_changed(checkpoint, state, now)
        self._generations = state["rollout_batches"]
        if not changed:
            # Inside a rollout batch TRL has no rollouts, and writes new ones for the other steps.
            self._step = state["micro_step"]
        return state


class _BetweenRollouts(TrainerCallback):
    """Delays a save that is due inside a rollout batch to the end of the batch."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self._trainer = trainer
        self._due = False

    def on_train_begin(
        self, args: GRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._due = False

    def on_step_end(
        self, args: GRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._due |= control.should_save
        at_once = args.load_best_model_at_end or control.should_training_stop
        control.should_save = self._due and (at_once or self._trainer.between_rollouts)
        if control.should_save:
            self._due = False


def _micro_steps(args: GRPOConfig) -> int:
    """Forward-backward passes between two rollout batches."""
    assert args.steps_per_generation is not None
    return args.steps_per_generation * args.num_iterations
