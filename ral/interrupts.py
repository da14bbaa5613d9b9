"""Ctrl-C and SIGTERM: training ends where it can resume exactly, and says how."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .checkpoints import last_checkpoint

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interruptible(trainer: Trainer, resume: str | None = None) -> Iterator[Interruption]:
    """Run `trainer.train()` so that Ctrl-C and SIGTERM end it with a checkpoint.

        with interruptible(trainer, resume="python -m ral train --config run.yaml resume=true"):
            trainer.train()

    The first signal ends training after the inner steps of the rollout batch; a resumed run
    continues as if it had not stopped. The second signal ends it after the optimizer step; a
    resumed run writes new rollouts. Both save, unless save_strategy="no". The third has its usual
    effect, and nothing is saved. With several processes one must get the signal. torchrun passes
    its own to all, and kills those that run longer than 30 s (or TORCH_ELASTIC_SHUTDOWN_TIMEOUT).

    Args:
        trainer: any `Trainer`; one without rollout batches ends after the optimizer step.
        resume: the command that resumes from the checkpoint, for the sentence at the end.

    Yields:
        The `Interruption`, whose `signal` says whether there was one.

    Raises:
        SystemExit: at the end of the block after a signal, with 128 + its number (130 for Ctrl-C,
            143 for SIGTERM). The main process first writes a sentence to stderr.
        RuntimeError: called outside the main thread, because only that thread gets signals.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("interruptible: must be entered in the main thread, which gets signals")
    interruption = Interruption(trainer, resume)
    for number in SIGNALS:
        signal.signal(number, interruption._take)
    trainer.add_callback(interruption)
    try:
        yield interruption
    except KeyboardInterrupt:
        if interruption.signal is None:
            raise
        interruption._say(interruption.sentence(ended=False))
        raise SystemExit(interruption.exit_code) from None
    finally:
        trainer.remove_callback(interruption)
        interruption._give_back()
    if interruption.signal is not None:
        interruption._say(interruption.sentence())
        raise SystemExit(interruption.exit_code)


class Interruption(TrainerCallback):
    """The signals that training got, and their effects.

    Attributes:
        signal: the first one of any process, or None.
    """

    def __init__(self, trainer: Trainer, resume: str | None = None) -> None:
        self.signal: signal.Signals | None = None
        self._trainer = trainer
        self._resume = resume
        self._times = 0
        self._stopped = False
        self._before = {number: signal.getsignal(number) for number in SIGNALS}

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal, as of a process that it killed."""
        assert self.signal is not None
        return 128 + int(self.signal)

    def sentence(self, ended: bool = True) -> str:
        """What happened, where the checkpoint is, and how to resume from it.

        Args:
            ended: whether training ended after a step, not inside one.
        """
        assert self.signal is not None
        state, args = self._trainer.state, self._trainer.args
        what = f"Stopped by {_NAMES[self.signal]} at step {state.global_step} of {state.max_steps}"
        if ended and state.global_step >= state.max_steps > 0:
            return f"{what}: training is complete."
        path = last_checkpoint(str(args.output_dir), contents=False)
        if path is None:
            because = ' (save_strategy="no")' if args.save_strategy == "no" else ""
            return f"{what}; there is no checkpoint to resume from{because}."
        how = self._resume or "trainer.train(resume_from_checkpoint=True)"
        return f"{what}. The last complete checkpoint is {path}; resume with: {how}"

    # -- signals ---------------------------------------------------------------------------------

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)
        self._times += 1
        if self._times > 1:  # the next one is not ours
            self._give_back()
        name = _NAMES[signal.Signals(number)]
        when, sooner = (
            ("rollout batch", "after this step")
            if self._times == 1
            else ("step", "at once, unsaved")
        )
        self._say(f"{name}: training stops after this {when}, and saves. {name} again: {sooner}")

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _say(self, text: str) -> None:
        if self._trainer.is_world_process_zero():
            # Not print: a handler may run inside one.
            os.write(2, f"\n{text}\n".encode())

    # -- training --------------------------------------------------------------------------------

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        times = self._agreed()
        between = getattr(self._trainer, "between_rollouts", True)
        if times == 0 or (times == 1 and not between):
            return
        self._stopped = True
        control.should_training_stop = True
        # A checkpoint holds what the next log will average.
        control.should_log |= args.save_strategy == "no"
        control.should_evaluate = False  # that may take longer than there is
        control.should_save = args.save_strategy != "no"

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._stopped:  # all of it was done at the end of the step
            control.should_log = control.should_evaluate = control.should_save = False

    def _agreed(self) -> int:
        """The largest number of signals of a process; all processes ask after the same step."""
        accelerator = self._trainer.accelerator
        if accelerator.num_processes == 1:
            return self._times
        seen = torch.tensor([self._times, int(self.signal or 0)], device=accelerator.device)
        times, number = accelerator.gather(seen[None]).amax(0).tolist()
        if self.signal is None and number:
            self.signal = signal.Signals(number)
        return int(times)


_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
