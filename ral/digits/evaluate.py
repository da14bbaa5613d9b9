"""Accuracy of a model on the digits tasks, by number of frames or side of the grid."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ral_kernels.integrations.transformers.processors import load_processor

from .puzzles import Task
from .scans import Split
from .tasks import Style, make_dataset

EXTENTS: dict[Task, tuple[int, ...]] = {"cell": (2, 3, 4, 6, 8), "timestamp": (4, 8, 16, 32, 64)}
# Nothing but the form that the demonstrations have.
_FORMS = {
    "think": re.compile(r"<think>([^<]*)</think><answer>([^<]*)</answer>"),
    "direct": re.compile(r"()<answer>([^<]*)</answer>"),
}


@dataclass(frozen=True)
class Accuracy:
    """Shares of responses.

    Attributes:
        right: the answer is the solution.
        thought: the thought is the demonstration's, which says where the model looked; in direct
            style as `right`.
        formed: the response has the form it was asked for.
    """

    right: float
    thought: float
    formed: float


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
) -> dict[int, Accuracy]:
    """Generate responses to held-out puzzles and count those that are right.

    Args:
        model: a model, or a folder with one.
        task, split, style: as in `make_dataset`.
        extents: grid sides or numbers of frames; by default 2–8, or 4–64.
        size: puzzles of each extent.
        temperature: 0 for greedy responses; above, one sample of each.
        seed: of the puzzles and the samples; torch's own generator is left as it was.
        batch_size: prompts that are generated for at once.
        processor: by default the folder's, which a model that is no folder cannot do without.
        attn_implementation: of a model that is loaded.

    Returns:
        the accuracy of each extent.

    Raises:
        ValueError: a model without a processor.
    """
    if isinstance(model, (str, Path)):
        from transformers import AutoModelForImageTextToText

        processor = load_processor(model) if processor is None else processor
        model = AutoModelForImageTextToText.from_pretrained(
            model, attn_implementation=attn_implementation
        )
    if processor is None:
        raise ValueError("evaluate: processor must be given with a model that is no folder")
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
                    ),
                    style,
                    temperature,
                    batch_size,
                )
                for extent in extents
            }
    finally:
        model.train(was_training)


def _accuracy(
    model: Any, processor: Any, rows: Any, style: Style, temperature: float, batch_size: int
) -> Accuracy:
    right = thought = formed = 0
    for first in range(0, len(rows), batch_size):
        batch = [rows[i] for i in range(first, min(first + batch_size, len(rows)))]
        for row, written in zip(
            batch, respond(model, processor, batch, temperature=temperature), strict=True
        ):
            found = _FORMS[style].fullmatch(written)
            wanted = _FORMS[style].fullmatch(row["completion"][0]["content"])
            if found is None or wanted is None:
                continue
            formed += 1
            right += found[2] == row["solution"]
            thought += (found[1] == wanted[1]) if style == "think" else found[2] == row["solution"]
    return Accuracy(right / len(rows), thought / len(rows), formed / len(rows))


@torch.no_grad()
def respond(
    model: Any,
    processor: Any,
    rows: Sequence[dict[str, Any]],
    *,
    temperature: float = 0.0,
    max_new_tokens: int = 12,
) -> list[str]:
    """The model's responses to rows of a dataset, as text without special tokens.

    Args:
        model, processor: of one checkpoint.
        rows: with prompt and images.
        temperature: 0 for greedy responses.
        max_new_tokens: the demonstrations have 7 at most.
    """
    prompts = [
        processor.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        for row in rows
    ]
    inputs = processor(
        text=prompts, images=[row["images"] for row in rows], padding=True, return_tensors="pt"
    ).to(model.device)
    chosen = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    written = model.generate(
        **inputs, **{"do_sample": False, **chosen}, max_new_tokens=max_new_tokens
    )
    texts: list[str] = processor.batch_decode(
        written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return texts
