"""What a run shows and keeps: one line on the terminal, and one JSON line for each log."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

METRICS = "metrics.jsonl"
# What the line shows, in this order, where it is logged: metric, name, format.
_SHOWN = (
    ("reward", "reward", ".3f"),
    ("accuracy", "accuracy", ".3f"),
    ("eval_reward", "eval reward", ".3f"),
    ("eval_accuracy", "eval accuracy", ".3f"),
    ("attn/divergence", "divergence", ".2e"),
    ("loss", "loss", ".4f"),
    ("mean_token_accuracy", "token accuracy", ".3f"),
)
_LINES = 20  # of a whole run, where stderr is no terminal


def show_progress(trainer: Trainer, what: str, verbose: bool) -> None:
    """Give a trainer our progress line and metrics.jsonl in place of the stock ones.

    Args:
        trainer: before `train()`.
        what: name of the run, at the beginning of the line.
        verbose: leave the stock ones, which print everything that is logged.
    """
    trainer.add_callback(MetricsFile(Path(str(trainer.args.output_dir)) / METRICS))
    if verbose:
        return
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressLine(what))


class MetricsFile(TrainerCallback):
    """Appends what is logged to a file of JSON lines, with step, epoch and seconds of this run.

    Args:
        path: an existing file is overwritten. If training resumes, only the lines after the
            checkpoint's step are dropped.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._started = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = time.perf_counter()
        if not state.is_world_process_zero:
            return
        kept = []
        if state.global_step > 0 and self._path.exists():
            kept = [row for row in read_metrics(self._path) if row["step"] <= state.global_step]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        row = {"step": state.global_step, "seconds": round(time.perf_counter() - self._started, 3)}
        row.update({name: _plain(value) for name, value in logs.items()})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that was cut off in writing does not count."""
    rows = []
    for line in path.read_text("utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


class ProgressLine(TrainerCallback):
    """Reward, divergence and loss beside a bar; without a terminal, a line now and then.

    Args:
        what: at the beginning of the line.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._bar: Any = None
        self._values: dict[str, float] = {}
        self._written = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._values, self._written = {}, state.global_step
        if state.is_world_process_zero and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self._what,
                dynamic_ncols=True,
                bar_format="{desc} {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        self._values.update(
            {name: logs[name] for name, _, _ in _SHOWN if isinstance(logs.get(name), float | int)}
        )
        if self._bar is not None:
            self._bar.set_postfix_str(self._text(), refresh=True)
            return
        every = max(1, state.max_steps // _LINES)
        if state.global_step - self._written >= every:
            self._written = state.global_step
            line = f"{self._what} {state.global_step}/{state.max_steps}  {self._text()}"
            print(line, file=sys.stderr, flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _text(self) -> str:
        return "  ".join(
            f"{label} {self._values[name]:{form}}"
            for name, label, form in _SHOWN
            if name in self._values
        )


def _plain(value: Any) -> Any:
    """A value as JSON has it: numbers that are not finite are null."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, int | float | str | bool | None) else str(value)
