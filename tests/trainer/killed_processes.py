"""Processes that die or are interrupted while they train, for test_checkpoints, test_interrupts.

    python -m tests.trainer.killed_processes MODEL FOLDER NAME...

Each NAME of `KILLS` or `INTERRUPTIONS` is a process of its own: FOLDER/NAME/out is its output_dir,
FOLDER/NAME/stderr what it wrote, and FOLDER/NAME/status how it ended (-9 for SIGKILL). They are
forked after the imports, which take longer than any of them.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import TrainerCallback, TrainerState, modeling_utils

from ral import checkpoints
from ral.interrupts import interruptible
from tests.trainer import tiny

FIRST, SECOND = 4, 8  # steps that are saved; the second save is the one that is killed
SETTINGS: dict[str, Any] = {
    "save_strategy": "steps", "save_steps": FIRST, "save_total_limit": 1, "max_steps": 10,
    "attn_metrics_every": 0,
}  # fmt: skip


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# -- killed inside a save ---------------------------------------------------------------------


def _half(path: Any) -> None:
    os.truncate(path, os.path.getsize(path) // 2)
    die()


def _instead(owner: Any, name: str, function: Any) -> None:
    mock.patch.object(owner, name, function).start()


def _in_weights() -> None:
    original = vars(modeling_utils)["safe_save_file"]

    def save(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> None:
        original(tensors, filename, *args, **kwargs)
        if f"checkpoint-{SECOND}" in str(filename):
            _half(filename)

    _instead(modeling_utils, "safe_save_file", save)


def _in_torch_save(name: str) -> None:
    original = torch.save

    def save(what: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        original(what, file, *args, **kwargs)
        if f"checkpoint-{SECOND}" in str(file) and Path(str(file)).name == name:
            _half(file)

    _instead(torch, "save", save)


def _in_state() -> None:
    original = TrainerState.save_to_json

    def save(state: Any, path: str) -> None:
        original(state, path)
        if f"checkpoint-{SECOND}" in path:
            _half(path)

    _instead(TrainerState, "save_to_json", save)


def _before_seal() -> None:
    original = checkpoints.seal

    def seal(folder: Path, state: Any) -> None:
        if folder.name == f"checkpoint-{SECOND}":
            die()
        original(folder, state)

    _instead(checkpoints, "seal", seal)


def _in_seal(time: int) -> None:
    """As it is written for the first time, with sizes, or for the second, with checksums."""
    original, seen = os.replace, []

    def replace(source: Any, target: Any) -> None:
        if f"checkpoint-{SECOND}" in str(target) and Path(target).name == checkpoints.SEAL:
            seen.append(target)
            if len(seen) == time:
                _half(source)
        original(source, target)

    _instead(os, "replace", replace)


def _in_rotation() -> None:
    original = shutil.rmtree

    def rmtree(path: Any, *args: Any, **kwargs: Any) -> None:
        if Path(path).name == f"checkpoint-{FIRST}" and Path(path).exists():
            os.remove(Path(path) / "optimizer.pt")
            die()
        original(path, *args, **kwargs)

    _instead(shutil, "rmtree", rmtree)


# Where it dies, and the step of the last checkpoint that is then complete.
KILLS: dict[str, tuple[Callable[[], None], int]] = {
    "weights": (_in_weights, FIRST),
    "optimizer.pt": (partial(_in_torch_save, "optimizer.pt"), FIRST),
    "rng_state.pth": (partial(_in_torch_save, "rng_state.pth"), FIRST),
    "trainer_state.json": (_in_state, FIRST),
    "before the seal": (_before_seal, SECOND),
    "in the seal": (partial(_in_seal, 1), SECOND),
    "in the checksums": (partial(_in_seal, 2), SECOND),
    "in the rotation": (_in_rotation, SECOND),
}


def _train_killed(name: str, model: str, folder: Path) -> None:
    KILLS[name][0]()
    tiny.trainer(model, folder, **SETTINGS).train()


# -- interrupted ------------------------------------------------------------------------------


class _Send(TrainerCallback):
    """Sends signals to its own process at the beginning of a step."""

    def __init__(self, step: int, numbers: list[int]) -> None:
        self._step, self._numbers = step, numbers

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            for number in self._numbers:
                os.kill(os.getpid(), number)


INT, TERM = signal.SIGINT, signal.SIGTERM
# Steps done before the signals, the signals, settings.
INTERRUPTIONS: dict[str, tuple[int, list[int], dict[str, Any]]] = {
    "once": (5, [INT], {"eval_strategy": "steps", "eval_steps": 8,
                        "eval_dataset": tiny.dataset(1)}),
    "twice": (5, [INT, INT], {}),
    "three times": (5, [INT, INT, INT], {}),
    "first batch": (0, [TERM], {"save_steps": 100}),
    "last batch": (9, [INT], {}),
    "unsaved": (5, [INT], {"save_strategy": "no"}),
    "by epochs": (5, [INT], {"save_strategy": "epoch", "eval_strategy": "epoch",
                             "eval_dataset": tiny.dataset(1)}),
}  # fmt: skip


def _train_interrupted(name: str, model: str, folder: Path) -> None:
    step, numbers, settings = INTERRUPTIONS[name]
    callbacks = [_Send(step, numbers)]
    trainer = tiny.trainer(model, folder, callbacks=callbacks, **{**SETTINGS, **settings})
    with interruptible(trainer, resume="python -m ral train resume=true"):
        trainer.train()


def _child(name: str, model: str, folder: Path) -> None:
    log = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    # A shell starts what it puts in the background with SIGINT ignored, and that is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 1
    try:
        (_train_killed if name in KILLS else _train_interrupted)(name, model, folder)
        status = 0
    except SystemExit as exit:
        status = int(exit.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)


def main(model: str, folder: str, *names: str) -> None:
    gc.freeze()  # as in tiny.trainer, for all of them
    for name in names:
        own = Path(folder) / name
        own.mkdir()
        child = os.fork()
        if child == 0:
            _child(name, model, own)
        _, status = os.waitpid(child, 0)
        (own / "status").write_text(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main(*sys.argv[1:])
