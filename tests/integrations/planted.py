"""A model whose attention must peak on white squares, and pictures with one."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from ral_kernels.integrations.transformers.processors import images_only

from . import tiny_checkpoint

CELL = 28  # pixels a side of a visual token


def picture(rows: int, columns: int, at: tuple[int, int] | None) -> Image.Image:
    """`rows` x `columns` black visual tokens, that at `at` (row, column) white."""
    image = Image.new("RGB", (columns * CELL, rows * CELL))
    if at is not None:
        row, column = at
        image.paste((255,) * 3, (column * CELL, row * CELL, (column + 1) * CELL, (row + 1) * CELL))
    return image


def model_and_processor(attn_implementation: str = "sdpa") -> tuple[Any, Any]:
    """The tiny Qwen2.5-VL with one text layer that asks every key how white it is.

    Its vision tower looks at each patch alone. With n the normalised embedding of a token, each
    query is a constant and each key <d, n>, where d is orthogonal to a black token's n and
    <d, n> = 1 for a white one's; both stand in RoPE's slowest dimension, which hardly turns.
    """
    from transformers import Qwen2_5_VLProcessor

    tokenizer = tiny_checkpoint.tokenizer()
    processor = images_only(
        Qwen2_5_VLProcessor,
        tiny_checkpoint.image_processor(),
        tokenizer,
        chat_template=tiny_checkpoint.CHAT_TEMPLATE,
    )
    model = tiny_checkpoint.model(tokenizer, num_hidden_layers=1)
    model.set_attn_implementation(attn_implementation)
    with torch.no_grad():
        for name, parameter in model.model.visual.named_parameters():
            if "attn.proj" in name:
                parameter.zero_()
        inputs = processor.image_processor(images=[picture(1, 2, (0, 1))], return_tensors="pt")
        features = model.get_image_features(**inputs).pooler_output[0]
        layer = model.model.language_model.layers[0]
        black, white = layer.input_layernorm(features)
        direction = white - black * (white @ black) / (black @ black)
        direction /= direction @ white
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.zero_()
            projection.bias.zero_()
        slowest = attention.head_dim // 2 - 1
        attention.k_proj.weight[slowest :: attention.head_dim] = direction
        attention.q_proj.bias[slowest :: attention.head_dim] = 8 * attention.head_dim**0.5
    return model, processor
