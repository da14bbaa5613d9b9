"""A GRPO trainer whose checkpoints resume exactly: between rollout batches, and complete.

TRL keeps a rollout batch in memory for its inner steps. So training that resumes inside one writes
new rollouts, and its losses differ. TRL also restarts the sampler of prompts: from the second epoch
on, the order would be that of the first.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from . import checkpoints
from .weights import LoadsSavedWeights

logger = logging.get_logger(__name__)


class ResumableTrainer(LoadsSavedWeights, GRPOTrainer):
    """`GRPOTrainer` with checkpoints from which training continues as if it had not stopped.

    - A checkpoint that is due inside a rollout batch is written at the end of the batch
      (`save_steps`, and Ctrl-C: `ral.interrupts`). Exceptions are the end of training,
      `save_strategy="best"` and `load_best_model_at_end`, which need the weights of that step.
      Averages for the next log are logged before a checkpoint.
    - A checkpoint is sealed when every process has written its files. Only then are older ones
      deleted (`save_total_limit`).
    - `train(resume_from_checkpoint=True)` takes the last complete checkpoint.

    One process on the same machine then repeats losses and weights bit for bit. A checkpoint does
    not hold TRL's reference model if it moves (`sync_ref_model`), the state of reward functions, or
    vLLM's random state.
    """

    _generations = 0  # rollout batches so far; kept in checkpoints

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._resumed_from: Path | None = None
        self._train_sampler: Sampler | None = None
        super().__init__(*args, **kwargs)
        self.add_callback(_BetweenRollouts(self))

    @property
    def between_rollouts(self) -> bool:
        """Whether the next micro-step begins a rollout batch."""
        return bool(self._step % _micro_steps(self.args) == 0)

    def train(
        self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in `Trainer`; True resumes from the last complete checkpoint in output_dir.

        Raises:
            ValueError: there is none, or the named one is not complete.
        """
        found: str | None = None
        if resume_from_checkpoint:
            found = self._find(resume_from_checkpoint)
        self._resumed_from = None if found is None else Path(found)
        return super().train(found, *args, **kwargs)

    def _find(self, wanted: str | Path | bool) -> str:
        """One process decides, because others may not yet see its files."""
        answer: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            if wanted is True:
                folder = str(self.args.output_dir)
                path = checkpoints.last_checkpoint(folder)
                reason = None if path else f"none in {folder} is complete"
            else:
                path = Path(str(wanted))
                reason = checkpoints.why_incomplete(path)
            answer = [None if path is None else str(path), reason]
        broadcast_object_list(answer)
        if answer[1] is not None:
            raise ValueError(
                "train: resume_from_checkpoint must be a complete checkpoint; got "
                f"{wanted}: {answer[1]}"
            )
        return str(answer[0])

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = Path(self._get_output_dir(trial=trial))
        folder = run / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            # A killed save or another run left it: its files must not mix with this save's.
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            state = {
                "global_step": self.state.global_step,
                "micro_step": self._step,
                "micro_steps_per_rollout_batch": _micro_steps(self.args),
                "rollout_batches": self._generations,
                "processes": self.accelerator.num_processes,
            }
            checkpoints.seal(folder, state)
            checkpoints.rotate(run, limit, folder, self.state.best_model_checkpoint)

    def _restore(self, checkpoint: Path) -> None:
        """Restore what neither transformers nor TRL restores, after they have restored the rest."""
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
        state = checkpoints.read_state(checkpoint)
        if state is None:
            return
        now = {"processes": self.accelerator.num_processes}
        now["micro_steps_per_rollout_batch"] = _micro_steps(self.args)
        changed = {
            name: (state[name], value) for name, value in now.items() if state[name] != value
        }
        for name, (before, after) in changed.items():
            logger.warning(
                "train: %s has %s=%d, and now it is %d: training continues, but not as the "
                "uninterrupted run would have",
                checkpoint, name, before, after,
            )  # fmt: skip
        self._generations = state["rollout_batches"]
        if "micro_steps_per_rollout_batch" not in changed:
            # Inside a rollout batch TRL has no rollouts, and writes new ones for the other steps.
            self._step = state["micro_step"]


class _BetweenRollouts(TrainerCallback):
    """Delays a save that is due inside a rollout batch to the end of the batch."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self._trainer = trainer
        self._due = False

    def on_train_begin(
        self, args: GRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._due = False
        if self._trainer._resumed_from is not None:
            self._trainer._restore(self._trainer._resumed_from)

    def on_step_end(
        self, args: GRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._due |= control.should_save
        at_once = args.load_best_model_at_end or control.should_training_stop
        control.should_save = self._due and (at_once or self._trainer.between_rollouts)
        if control.should_save:
            self._due = False
            control.should_log = True  # or a resumed run would average over fewer steps

    def on_epoch_end(
        self, args: GRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save:
            control.should_log = True


def _micro_steps(args: GRPOConfig) -> int:
    """Forward-backward passes between two rollout batches."""
    assert args.steps_per_generation is not None
    return args.steps_per_generation * args.num_iterations
