"""Checkpoints that are complete and undamaged, in a folder that one run holds: for any trainer."""

from __future__ import annotations

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from . import checkpoints
from .lock import locked
from .weights import LoadsSavedWeights

logger = logging.get_logger(__name__)


class SealsCheckpoints(LoadsSavedWeights):
    """A mixin for `Trainer`: sealed checkpoints, and one run in an output folder.

    - A checkpoint is sealed when every process has written its files. A thread then computes
      checksums, while training goes on. Only after that are older checkpoints deleted
      (`save_total_limit`).
    - `train(resume_from_checkpoint=True)` takes the last checkpoint that is complete and undamaged.
    - Losses and metrics since the last log are in the checkpoint: the next log is as if training
      had not stopped.
    - A run that is complete stays as it is: training resumes, and ends before the next step.
    - `train` holds output_dir against other runs.
    """

    _metrics: dict[str, dict[str, list[float]]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._resumed_from: Path | None = None
        self._sealing: Future[None] | None = None
        super().__init__(*args, **kwargs)
        self.add_callback(_Resumption(self))

    def train(
        self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in `Trainer`; True resumes from the last complete checkpoint in output_dir.

        Raises:
            CheckpointError: a ValueError; there is none, or the named one is not complete.
            BlockingIOError: another run is in output_dir.
            DiskFull: an OSError; a checkpoint does not fit.
        """
        with ExitStack() as stack:
            found = self._open(stack, resume_from_checkpoint)
            self._resumed_from = None if found is None else Path(found)
            try:
                return super().train(found, *args, **kwargs)
            finally:
                self._finish_sealing()

    def _open(self, stack: ExitStack, wanted: str | Path | bool | None) -> str | None:
        """Lock the folder and find the checkpoint: in one process, for others see files later."""
        answer: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                stack.enter_context(locked(str(self.args.output_dir)))
                answer[0] = self._find(wanted) if wanted else None
            except (OSError, ValueError) as error:
                answer[1] = error
        broadcast_object_list(answer)
        if answer[1] is not None:
            raise answer[1]
        found: str | None = answer[0]
        return found

    def _find(self, wanted: str | Path | bool) -> str:
        if wanted is True:
            folder = str(self.args.output_dir)
            path = checkpoints.last_checkpoint(folder)
            reason = None if path else f"none in {folder} is complete"
        else:
            path = Path(str(wanted))
            reason = checkpoints.why_incomplete(path)
        if reason is not None:
            raise checkpoints.CheckpointError(
                "train: resume_from_checkpoint must be a complete checkpoint; got "
                f"{wanted}: {reason}"
            )
        return str(path)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # transformers looks only after a step.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._finish_sealing()  # it deletes checkpoints
        return super()._finalize_training(*args, **kwargs)

    # -- saving ----------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._finish_sealing()
        run = Path(self._get_output_dir(trial=trial))
        folder = run / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            # A killed save or another run left it: its files must not mix with this save's.
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            state = self._sealed_state()
            if self.args.should_save:
                checkpoints.seal(folder, state)
        except Exception as error:
            if not checkpoints.is_full(error, run):
                raise
            raise checkpoints.DiskFull(
                f"train: {folder} does not fit on its disk, which is full: free some space, or "
                "lower save_total_limit, and resume"
            ) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            pool = ThreadPoolExecutor(1, "checksums")
            self._sealing = pool.submit(_checksums_and_rotation, run, limit, folder, best)
            pool.shutdown(wait=False)

    def _finish_sealing(self) -> None:
        """Wait for the last checkpoint's checksums, and raise what went wrong."""
        sealing, self._sealing = self._sealing, None
        if sealing is not None:
            sealing.result()

    def _sealed_state(self) -> dict[str, Any]:
        """What a checkpoint holds besides transformers' files; every process calls it."""
        loss = self.accelerator.gather(self._tr_loss[None]).mean().item()
        return {
            "global_step": self.state.global_step,
            "processes": self.accelerator.num_processes,
            "data": self._data(),
            "since_last_log": {
                "step": self._globalstep_last_logged,
                "loss": loss,
                "metrics": {
                    name: [value if isinstance(value, int) else float(value) for value in values]
                    for name, values in self._metrics["train"].items()
                },
            },
        }

    def _data(self) -> dict[str, Any]:
        """The number of rows, and checksums of the files that they were read from."""
        dataset: Any = self.train_dataset
        found: dict[str, Any] = {"rows": len(dataset)} if hasattr(dataset, "__len__") else {}
        info = getattr(dataset, "info", None)
        for name, of_file in (getattr(info, "download_checksums", None) or {}).items():
            found[Path(name).name] = of_file["checksum"]
        return found

    # -- resuming --------------------------------------------------------------------------------

    def _restore(self, checkpoint: Path) -> dict[str, Any] | None:
        """Restore what transformers does not restore, after it has restored the rest.

        Returns:
            What `_sealed_state` was; None if another trainer wrote the checkpoint.
        """
        if self.state.global_step >= self.state.max_steps:
            logger.warning(
                "train: %s is at step %d of %d: training is complete", checkpoint,
                self.state.global_step, self.state.max_steps,
            )  # fmt: skip
        state = checkpoints.read_state(checkpoint)
        if state is None:
            return None
        self._warn_changed(checkpoint, state, {"processes": self.accelerator.num_processes})
        before, now = state.get("data", {}), self._data()
        changed = sorted(name for name, value in before.items() if now.get(name) != value)
        if changed:
            logger.warning(
                "train: the data have changed since %s was written (%s): training continues, but "
                "not as the uninterrupted run would have",
                checkpoint, ", ".join(changed),
            )  # fmt: skip
        kept = state.get("since_last_log")
        if kept is not None:
            self._globalstep_last_logged = kept["step"]
            self._tr_loss += kept["loss"]
            self._total_loss_scalar -= kept["loss"]  # its mean is over the steps of this call
            self._metrics["train"].update(kept["metrics"])
        return state

    def _warn_changed(
        self, checkpoint: Path, state: dict[str, Any], now: dict[str, int]
    ) -> set[str]:
        """Warn of settings that are not those of the checkpoint, and return their names."""
        changed = {name for name, value in now.items() if state[name] != value}
        for name in sorted(changed):
            logger.warning(
                "train: %s has %s=%d, and now it is %d: training continues, but not as the "
                "uninterrupted run would have",
                checkpoint, name, state[name], now[name],
            )  # fmt: skip
        return changed


def _checksums_and_rotation(run: Path, limit: int | None, folder: Path, best: str | None) -> None:
    checkpoints.add_checksums(folder)
    checkpoints.rotate(run, limit, folder, best)


class _Resumption(TrainerCallback):
    def __init__(self, trainer: SealsCheckpoints) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer._resumed_from is not None:
            self._trainer._restore(self._trainer._resumed_from)
