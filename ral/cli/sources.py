"""Rows, rewards and bundled models that the settings name."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..data import load_rows, to_sft
from ..data.sources import FILES, may_be_on_hub
from ..rewards import accuracy_reward, combined_reward, direct_format_reward, format_reward
from .errors import Refused, refusing
from .hub import check_on_hub
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
        raise Refused(f"data must be {known_data()}; got {data!r}")
    return task


def known_data() -> str:
    """What `data` may name."""
    from ..digits.puzzles import TASKS

    *most, last = (f"{DIGITS}:{name}" for name in TASKS)
    return f"a file, a dataset, {', '.join(most)} or {last}"


def evaluation_rows(settings: DataSettings, *, demonstrations: bool = False) -> Any:
    """The dataset to evaluate in during training, None if there is none to.

    Raises:
        Refused: it is not there, or it has invalid rows.
    """
    if settings.eval_data is None:
        return None
    size = settings.eval_rows or DIGITS_EVAL_ROWS
    given = replace(
        settings,
        data=settings.eval_data,
        data_split=settings.eval_split,
        streaming=False,
        digits_rows=size,
    )
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
        raise Refused(f"data must be given: {known_data()}")
    task = digits_task(settings.data)
    if task is not None:
        from ..digits.tasks import make_dataset

        extent = settings.digits_extent
        with refusing():
            return make_dataset(
                task, size=settings.digits_rows, style=cast("Style", settings.style), seed=seed,
                split=split, grid=extent, frames=extent,
            )  # fmt: skip
    with refusing():
        rows = load_rows(
            data_source(settings.data),
            config=settings.data_config,
            split=settings.data_split,
            image_root=settings.image_root,
            style=settings.style,
            max_frames=settings.max_frames,
            fps=settings.fps,
            streaming=settings.streaming,
            on_error="skip" if settings.skip_bad_rows else "raise",
        )
        if demonstrations:
            missing = "skip" if settings.skip_bad_rows else "refuse"
            rows = to_sft(rows, style=settings.style, missing=missing)
    return rows


def data_source(name: str) -> str:
    """The path of a file or folder, or a name that the Hub has.

    Raises:
        Refused: it is none.
    """
    path = Path(name).expanduser()
    if path.exists():
        return str(path)
    if not may_be_on_hub(name) or name.lower().endswith(FILES):
        raise Refused(f"there is no data file {name}")
    check_on_hub(name, "dataset")
    return name


def reward_functions(
    settings: RewardSettings, style: str
) -> tuple[list[Callable[..., list[float]]], list[float] | None]:
    """The functions that reward a completion, and their weights; None for 1 each.

    Raises:
        Refused: a name is not known, a function is not found, or a weight is out of range.
    """
    if not settings.rewards:
        with refusing():
            paper = combined_reward(
                style,
                accuracy_weight=settings.accuracy_weight,
                format_weight=settings.format_weight,
                name="reward",
            )
        return [paper], None
    known = {
        "accuracy": accuracy_reward,
        "format": format_reward if style == "think" else direct_format_reward,
    }
    functions, weights = [], []
    for given in settings.rewards:
        name, weight = weighted(given)
        functions.append(known[name] if name in known else _function(name, known))
        weights.append(weight)
    names = [getattr(function, "__name__", "") for function in functions]
    for name in names:
        if names.count(name) > 1:  # under which TRL logs them
            raise Refused(f"rewards must have different names; got {name} twice")
    return functions, None if set(weights) == {1.0} else weights


def weighted(given: str) -> tuple[str, float]:
    """The parts of NAME or NAME:WEIGHT, where the name may hold colons; without a weight 1.

    Raises:
        Refused: the weight is not finite.
    """
    name, colon, text = given.rpartition(":")
    try:
        weight = float(text) if colon else 1.0
    except ValueError:  # of the name
        return given, 1.0
    if not math.isfinite(weight):
        raise Refused(f"the weight of {name} must be finite; got {text}")
    return (name, weight) if colon else (given, weight)


def _function(given: str, known: Iterable[str]) -> Callable[..., list[float]]:
    where, _, name = given.rpartition(":" if ":" in given else ".")
    if not where or not name or given.endswith(".py"):
        raise Refused(
            f"rewards must be {', '.join(known)}, file.py:name or package.module:name, each with "
            f"or without a weight; got {given!r}"
        )
    with refusing(f"reward {given}"):
        module = module_of(where)
    function = getattr(module, name, None)
    if not callable(function):
        raise Refused(f"rewards must name functions; {where} has no function {name!r}")
    return function


def module_of(where: str) -> Any:
    """The module of a file ending in .py, or of a name."""
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
