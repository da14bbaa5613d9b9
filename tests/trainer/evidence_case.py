"""A tiny data set with evidence, and what its attention is by hand, for the tests of objectives."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from . import by_hand, tiny

SINKS = 4  # the setting's default


def dataset(rows: int = tiny.ROWS, images: int = 3, without: int = 4) -> Dataset:
    """`tiny.dataset` whose evidence is one of the images; every `without`-th row has none."""
    read = list(tiny.dataset(rows, images))
    for number, row in enumerate(read):
        row["evidence"] = [{"image": number % images}] if (number + 1) % without else []
    return Dataset.from_list(read)


def evidence_mask(trainer: Any, inputs: dict[str, Any]) -> Tensor:
    """bool [B, N]: the tokens of the row's image, found by runs of image tokens in its prompt."""
    visual = inputs["mm_token_type_ids"] == 1
    starts = visual & ~torch.nn.functional.pad(visual, (1, -1))
    number = starts.long().cumsum(-1) * visual
    found = torch.zeros_like(visual)
    for row, ids in enumerate(inputs["prompt_ids"]):
        text = trainer.processing_class.tokenizer.decode(ids)
        index = int(text.split("picture ")[1].split("?")[0])
        regions = trainer.train_dataset[index]["evidence"]
        for region in regions:
            found[row] |= number[row] == region["image"] + 1
    return found


def maps(
    model: Any, inputs: dict[str, Any], heads: list[int] | None = None, rows: str = "predicting"
) -> list[Tensor]:
    """[B, C, N] of each layer: eager attention of the response's rows, averaged over heads."""
    whole = model(
        **by_hand.model_inputs(inputs), output_attentions=True, use_cache=False
    ).attentions
    length = inputs["completion_ids"].shape[1]
    chosen = [x if heads is None else x[:, heads] for x in whole]
    start = whole[0].shape[-1] - length - (rows == "predicting")
    return [x.mean(1)[:, start : start + length] for x in chosen]
