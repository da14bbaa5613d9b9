"""A batch of prompts of different lengths: each token keeps its type, whatever side is padded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ral_kernels.integrations.transformers import load_processor
from tests.trainer import tiny, two_processes
from tests.trainer.by_hand import batch_of


@pytest.mark.parametrize("side", ["left", "right"])
def test_token_types_stand_on_image_tokens(side: str, tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path)
    processor = load_processor(path)
    processor.tokenizer.padding_side = side
    processor.tokenizer.save_pretrained(path)
    trainer = tiny.trainer(
        path, tmp_path, train_dataset=two_processes.dataset("plain"),
        per_device_train_batch_size=16, steps_per_generation=1,
    )  # fmt: skip
    inputs = batch_of(trainer)
    lengths = inputs["prompt_mask"].sum(1)
    assert len(lengths.unique()) == 4  # prompts of as many lengths
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    image = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert torch.equal(inputs["mm_token_type_ids"] == 1, ids == image)
