"""Rows with a completion, for supervised fine-tuning before RL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value

from ral.rewards.tags import check_style

from .errors import DataError
from .prompts import asks_for, response

_COMPLETION = Features({"completion": List({"role": Value("string"), "content": Value("string")})})


def completion(row: Mapping[str, Any], style: str = "think") -> list[dict[str, str]]:
    """The completion of a row: its solution, after its `process` if the style has thinking.

    Args:
        row: with solution and problem_id, for "think" also process.
        style: "think" or "direct".

    Returns:
        One message of the assistant, in the form of `format_reward`.

    Raises:
        DataError: style "think" and a row without `process`.
    """
    check_style("completion", style)
    process = row.get("process") or ""
    if style == "think" and not process:
        raise DataError(
            "completion: process must be a thinking text for style 'think'; "
            f"got nothing in problem {row['problem_id']!r}"
        )
    return [{"role": "assistant", "content": response(row["solution"], style, process)}]


def to_sft(
    dataset: Dataset | IterableDataset, *, style: str = "think", missing: str = "refuse"
) -> Dataset | IterableDataset:
    """Rows of `load_jsonl` with a `completion`, for TRL's SFTTrainer; no image is decoded for it.

    Args:
        dataset: of `load_jsonl` with the same style.
        style: "think" (`<think>process</think><answer>solution</answer>`), or "direct"
            (`<answer>solution</answer>`, for which no row needs a `process`).
        missing: what becomes of rows without `process` in style "think": "refuse" or "skip" them.

    Returns:
        The dataset with `completion` in place of `process`.

    Raises:
        DataError: missing="refuse" and rows without `process`, or no row that has it; prompts that
            ask for the other style. For an IterableDataset, when the row is reached.
        ValueError: another style or value of missing.
    """
    check_style("to_sft", style)
    if missing not in ("refuse", "skip"):
        raise ValueError(f"to_sft: missing must be 'refuse' or 'skip'; got {missing!r}")
    if isinstance(dataset, IterableDataset):
        if missing == "skip" and style == "think":
            dataset = dataset.filter(_has_process)
        dataset = dataset.map(_with_completion, fn_kwargs={"style": style})
        return dataset.remove_columns("process")
    reading = dataset.format
    stored = dataset.with_format(None).select_columns(
        ["prompt", "solution", "problem_id", "process"]
    )
    keep, completions, without = [], [], 0
    for index, row in enumerate(stored):
        if style == "think" and not row["process"]:
            without += 1
            continue
        keep.append(index)
        completions.append(_with_completion(row, style)["completion"])
    if without and (missing == "refuse" or not keep):
        raise DataError(
            "to_sft: process must be a thinking text for style 'think'; "
            f"got {without} of {len(dataset)} rows without"
        )
    rows = dataset.with_format(None).select(keep).remove_columns("process")
    rows = rows.add_column("completion", completions, feature=_COMPLETION["completion"])
    rows.set_format(reading["type"], **reading["format_kwargs"])
    return rows


def _has_process(row: Mapping[str, Any]) -> bool:
    return bool(row["process"])


def _with_completion(row: Mapping[str, Any], style: str) -> dict[str, Any]:
    if not asks_for(row["prompt"], style):
        raise DataError(
            f"to_sft: style must be that of the prompts; got {style!r} for problem "
            f"{row['problem_id']!r}, which asks for another form"
        )
    return {"completion": completion(row, style)}
