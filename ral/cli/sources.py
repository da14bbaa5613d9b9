"""Rows, rewards and bundled models that the settings name."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..data import load_jsonl, to_sft
from ..rewards import combined_reward
from .errors import Refused, refusing
from .settings import DIGITS, DIGITS_EVAL_ROWS, DataSettings, RewardSettings

if TYPE_CHECKING:
    from ..digits.scans import Split
    from ..digits.tasks import Style


def digits_task(data: str) -> Any:
    """The task of `digits:TASK`, or None for anything else.

    Raises:
        Refused: there is no such task.
    """
    prefix, colon, task = data.partition(":")
    if prefix != DIGITS or Path(data).exists():
        return None
    from ..digits.puzzles import TASKS

    if not colon or task not in TASKS:
        known = " or ".join(f"{DIGITS}:{name}" for name in TASKS)
        raise Refused(f"data must be a file of JSON lines, {known}; got {data!r}")
    return task


def evaluation_rows(settings: DataSettings, *, demonstrations: bool = False) -> Any:
    """The dataset to evaluate in during training, None if there is none to.

    Raises:
        Refused: it is not there, or it has invalid rows.
    """
    if settings.eval_data is None:
        return None
    size = settings.eval_rows or DIGITS_EVAL_ROWS
    given = replace(settings, data=settings.eval_data, streaming=False, digits_rows=size)
    try:
        rows = training_rows(given, seed=0, demonstrations=demonstrations, split="test")
    except Refused as error:
        raise Refused(f"eval_data: {error}") from error
    return rows.select(range(min(settings.eval_rows or len(rows), len(rows))))


def training_rows(
    settings: DataSettings, seed: int, *, demonstrations: bool = False, split: Split = "train"
) -> Any:
    """The dataset to train on.

    Args:
        settings: which.
        seed: of digits rows.
        demonstrations: with completions, for supervised fine-tuning.
        split: of digits.

    Raises:
        Refused: there is none, or it has invalid rows.
    """
    if settings.data is None:
        raise Refused("data must be given: a file of JSON lines, digits:cell or digits:timestamp")
    task = digits_task(settings.data)
    if task is not None:
        from ..digits.tasks import make_dataset

        extent = settings.digits_extent
        with refusing():
            return make_dataset(
                task, size=settings.digits_rows, style=cast("Style", settings.style), seed=seed,
                split=split, grid=extent, frames=extent,
            )  # fmt: skip
    path = _file(settings.data)
    with refusing():
        rows = load_jsonl(
            path,
            image_root=settings.image_root,
            style=settings.style,
            max_frames=settings.max_frames,
            streaming=settings.streaming,
            on_error="skip" if settings.skip_bad_rows else "raise",
        )
        if demonstrations:
            missing = "skip" if settings.skip_bad_rows else "refuse"
            rows = to_sft(rows, style=settings.style, missing=missing)
    return rows


def _file(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        raise Refused(f"there is no data file {name}")
    return path


def reward_function(settings: RewardSettings, style: str) -> Callable[..., list[float]]:
    """The function that rewards a completion.

    Raises:
        Refused: the named function is not found, or a weight is out of range.
    """
    if settings.reward is None:
        with refusing():
            return combined_reward(
                style,
                accuracy_weight=settings.accuracy_weight,
                format_weight=settings.format_weight,
                name="reward",
            )
    where, colon, name = settings.reward.rpartition(":")
    if not colon or not where or not name:
        raise Refused(
            "reward must be file.py:name or package.module:name; got " + repr(settings.reward)
        )
    with refusing(f"reward {settings.reward}"):
        module = _module(where)
    function = getattr(module, name, None)
    if not callable(function):
        raise Refused(f"reward must name a function; {where} has no function {name!r}")
    return function


def _module(where: str) -> Any:
    if not where.endswith(".py"):
        return importlib.import_module(where)
    path = Path(where).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {where}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # so that worker processes can unpickle it
    spec.loader.exec_module(module)
    return module
