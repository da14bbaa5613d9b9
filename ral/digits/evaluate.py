"""Accuracy of a model on the digits tasks, by number of frames or side of the grid."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from ral_kernels.integrations.transformers import load_processor

from ..evaluation import answers_of
from .chains import LOOKS
from .puzzles import Task
from .scans import Split
from .tasks import Style, longest, make_dataset

EXTENTS: dict[Task, tuple[int, ...]] = {
    "cell": (2, 3, 4, 6, 8),
    "timestamp": (4, 8, 16, 32, 64),
    "chain": (8, 16, 32, 64),
    "chain_cells": (3, 4, 6, 8),
}
# Exactly the form of the demonstrations.
_FORMS = {
    "think": re.compile(r"<think>([^<]*)</think><answer>([^<]*)</answer>"),
    "direct": re.compile(r"()<answer>([^<]*)</answer>"),
}
_LOOK = re.compile(r" \d+s \d \d|(?<= \d) [a-z]+ \d")


@dataclass(frozen=True)
class Accuracy:
    """Shares of responses.

    Attributes:
        right: the answer is the solution.
        thought: the thought is the demonstration's, which says where the model looked; in direct
            style as `right`.
        grounded: both.
        formed: the response has the form it was asked for.
        looks: of a chain: the thought's first looks, 1 to all of them, are the demonstration's.
    """

    right: float
    thought: float
    grounded: float
    formed: float
    looks: tuple[float, ...] = ()


def evaluate(
    model: Any,
    task: Task = "timestamp",
    *,
    extents: Sequence[int] | None = None,
    size: int = 512,
    split: Split = "test",
    style: Style = "think",
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    processor: Any | None = None,
    attn_implementation: str = "sdpa",
    looks: int | tuple[int, ...] = LOOKS,
) -> dict[int, Accuracy]:
    """Generate responses to held-out puzzles and count those that are right.

    Args:
        model: a model, or a folder with one.
        task, split, style: as in `make_dataset`.
        extents: grid sides or numbers of frames; by default 2–8, or 4–64.
        size: puzzles of each extent.
        temperature: 0 for greedy responses; above, one sample of each.
        seed: of the puzzles and the samples; torch's own generator is left as it was.
        batch_size: prompts in a batch.
        processor: by default the folder's; a model that is not a folder needs one.
        attn_implementation: of a model that is loaded.
        looks: of chains.

    Returns:
        the accuracy of each extent.

    Raises:
        ValueError: a model without a processor.
    """
    if isinstance(model, (str, Path)):
        from transformers import AutoModelForImageTextToText

        processor = load_processor(model) if processor is None else processor
        model = AutoModelForImageTextToText.from_pretrained(
            model, attn_implementation=attn_implementation, trust_remote_code=False
        )
    if processor is None:
        raise ValueError("evaluate: processor must be given with a model that is not a folder")
    extents = EXTENTS[task] if extents is None else extents
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return {
                extent: _accuracy(
                    model,
                    processor,
                    make_dataset(
                        task,
                        size=size,
                        split=split,
                        grid=extent,
                        frames=extent,
                        style=style,
                        seed=seed + 1_000,
                        looks=looks,
                    ),
                    style,
                    temperature,
                    batch_size,
                    longest(task, looks),
                )
                for extent in extents
            }
    finally:
        model.train(was_training)


def _accuracy(
    model: Any,
    processor: Any,
    rows: Any,
    style: Style,
    temperature: float,
    batch_size: int,
    most: int,
) -> Accuracy:
    written: list[str] = []
    wanted: list[str] = []
    solutions: list[str] = []
    for first in range(0, len(rows), batch_size):
        batch = [rows[i] for i in range(first, min(first + batch_size, len(rows)))]
        texts, _ = answers_of(model, processor, batch, max_new_tokens=most, temperature=temperature)
        written += texts
        wanted += [row["completion"][0]["content"] for row in batch]
        solutions += [row["solution"] for row in batch]
    return judge(written, wanted, solutions, style)


def judge(
    written: Sequence[str], wanted: Sequence[str], solutions: Sequence[str], style: Style
) -> Accuracy:
    """The accuracy of some responses.

    Args:
        written: the responses.
        wanted, solutions: the rows' right demonstrations and solutions.
        style: of both.
    """
    right = thought = grounded = formed = 0
    followed: list[int] = []  # looks that a response has right before its first wrong one
    asked = 0
    for said, demonstration, solution in zip(written, wanted, solutions, strict=True):
        found = _FORMS[style].fullmatch(said)
        shown = _FORMS[style].fullmatch(demonstration)
        if shown is not None and (path := _LOOK.findall(shown[1])):
            asked = max(asked, len(path))
            pairs = zip(path, _LOOK.findall(said), strict=False)
            followed.append(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)))
        if found is None or shown is None:
            continue
        formed += 1
        is_right = found[2] == solution
        names_it = found[1] == shown[1] if style == "think" else is_right
        right += is_right
        thought += names_it
        grounded += is_right and names_it
    count = len(written)
    looks = tuple(sum(n > look for n in followed) / count for look in range(asked))
    return Accuracy(right / count, thought / count, grounded / count, formed / count, looks)
