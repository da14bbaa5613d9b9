"""Tiny models that vLLM's CPU attention takes: its head dims start at 32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.integrations import tiny_checkpoint
from tests.trainer import tiny

FAMILIES = ("qwen2", "qwen2_5_vl", "qwen3_vl")
SIZES = ((56, 84), (84, 56), (112, 112))
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}


def save(folder: Path, family: str) -> Path:
    """A random model of `family` in a folder whose name vLLM can glob."""
    path = folder / family
    if path.exists():
        return path
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    if family == "qwen2_5_vl":
        return tiny_checkpoint.save(path, **heads, rope_parameters=_ROPE)
    if family == "qwen3_vl":
        rope = {**_ROPE, "mrope_interleaved": True}
        made = tiny.checkpoint(folder, family, **heads, head_dim=32, rope_parameters=rope)
        return made.rename(path)
    return _save_text(path)


def _save_text(path: Path) -> Path:
    vocabulary = tiny_checkpoint.tokenizer()
    vocabulary.chat_template = tiny_checkpoint.CHAT_TEMPLATE
    ids = vocabulary.convert_tokens_to_ids
    config = Qwen2Config(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=4096,
        bos_token_id=None, eos_token_id=ids(tiny_checkpoint.END),
        pad_token_id=ids(tiny_checkpoint.PAD), initializer_range=0.15, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = config.eos_token_id
    model.generation_config.pad_token_id = config.pad_token_id
    model.save_pretrained(path)
    vocabulary.save_pretrained(path)
    return path


def dataset(images: list[int], seed: int = 0) -> Dataset:
    """Questions about random pictures of three sizes, as many each as `images` says."""
    rng = np.random.default_rng(seed)
    sizes = iter(SIZES * sum(images))

    def picture() -> Image.Image:
        return Image.fromarray(rng.integers(0, 255, (*next(sizes), 3), dtype=np.uint8))

    rows: list[dict[str, Any]] = [
        {
            "prompt": [{"role": "user", "content": f"What is in the picture {index}?"}],
            "images": [picture() for _ in range(number)],
        }
        for index, number in enumerate(images)
    ]
    return Dataset.from_list(rows)


def text_dataset(rows: int) -> Dataset:
    """The questions without pictures, and without their column."""
    return dataset([0] * rows).remove_columns("images")
