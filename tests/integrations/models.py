"""The tiny random models of the integration tests: one table of families, and inputs for them.

A model is about 100,000 weights from a seed; weights are drawn wider than usual, so that attention
is far from uniform and a mask that is lost shows in the logits.

    model = build("qwen2_5_vl", attn_implementation="sdpa")
    logits = model(**inputs("qwen2_5_vl", images=True, padding="left")).logits
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 320
PAD_TOKEN, IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END = 0, 300, 301, 302, 303
WIDTH, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 4, 2, 16, 2
SPREAD = 0.15  # initializer_range
SLIDING_WINDOW = 8

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 4096,
    "initializer_range": SPREAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": PAD_TOKEN,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


@dataclass(frozen=True)
class Family:
    """A model family: its class, its tiny configuration, and its pictures.

    pictures: (picture index of the batch) -> (processed tensors of that picture, token ids that
    stand for it in the prompt); None for a text model. token_types: the name under which the model
    takes which tokens are image (1) and which are text (0), if it takes that.
    """

    model_class: str
    config: Callable[[], Any]
    pictures: Callable[[int], tuple[dict[str, Tensor], list[int]]] | None = None
    token_types: str | None = None


def _noise(index: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + index))


def _grid(index: int) -> list[int]:
    return [1, 4, 4 + 4 * (index % 2)]  # two sizes, so that samples differ in visual tokens


def _qwen_pictures(patch: int) -> Callable[[int], tuple[dict[str, Tensor], list[int]]]:
    def picture(index: int) -> tuple[dict[str, Tensor], list[int]]:
        frames, rows, columns = _grid(index)
        patches = frames * rows * columns
        tokens = [VISION_START, *[IMAGE_TOKEN] * (patches // 4), VISION_END]
        pixels = _noise(index, patches, 3 * 2 * patch * patch)
        return {
            "pixel_values": pixels,
            "image_grid_thw": torch.tensor([[1, rows, columns]]),
        }, tokens

    return picture


def _qwen2_5_vl() -> Any:
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": MROPE},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 48,
            "out_hidden_size": WIDTH,
            "window_size": 56,  # 2 x 2 visual tokens: a picture has several windows
            "fullatt_block_indexes": [1],
            "initializer_range": SPREAD,
        },
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


def _qwen3_vl() -> Any:
    from transformers import Qwen3VLConfig

    return Qwen3VLConfig(
        text_config={
            **TEXT,
            "head_dim": HEAD_DIM,
            "rope_parameters": {**MROPE, "mrope_interleaved": True},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 48,
            "out_hidden_size": WIDTH,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
            "initializer_range": SPREAD,
        },
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


def _siglip(patch_size: int) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": patch_size,
        "vision_use_head": False,
    }


def _gemma3() -> Any:
    from transformers import Gemma3Config

    return Gemma3Config(
        text_config={
            **TEXT,
            "head_dim": HEAD_DIM,
            "query_pre_attn_scalar": HEAD_DIM,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            # Tied, a random model repeats one token for ever.
            "tie_word_embeddings": False,
        },
        tie_word_embeddings=False,
        vision_config=_siglip(patch_size=7),
        mm_tokens_per_image=4,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
        image_token_index=IMAGE_TOKEN,
        initializer_range=SPREAD,
    )


def _gemma3_picture(index: int) -> tuple[dict[str, Tensor], list[int]]:
    tokens = [VISION_START, *[IMAGE_TOKEN] * 4, VISION_END]
    return {"pixel_values": _noise(index, 1, 3, 28, 28)}, tokens


def _internvl() -> Any:
    from transformers import InternVLConfig

    return InternVLConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [28, 28],
            "patch_size": [7, 7],
            "initializer_range": SPREAD,
        },
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=IMAGE_TOKEN,
        image_seq_length=4,
        tie_word_embeddings=False,
    )


def _internvl_picture(index: int) -> tuple[dict[str, Tensor], list[int]]:
    tokens = [VISION_START, *[IMAGE_TOKEN] * 4, VISION_END]
    return {"pixel_values": _noise(index, 1, 3, 28, 28)}, tokens


def _llava_onevision() -> Any:
    from transformers import LlavaOnevisionConfig

    return LlavaOnevisionConfig(
        vision_config=_siglip(patch_size=14),
        text_config={"model_type": "qwen2", **TEXT},
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=[[28, 28]],
    )


def _llava_onevision_picture(index: int) -> tuple[dict[str, Tensor], list[int]]:
    # The whole picture (2 x 2 tokens), and one tile of it with a newline token a row (2 x 3).
    tokens = [VISION_START, *[IMAGE_TOKEN] * 10, VISION_END]
    return {
        "pixel_values": _noise(index, 1, 2, 3, 28, 28),
        "image_sizes": torch.tensor([[28, 28]]),
    }, tokens


def _idefics3() -> Any:
    from transformers import Idefics3Config

    return Idefics3Config(**_in_tiles())


def _smolvlm() -> Any:
    from transformers import SmolVLMConfig

    return SmolVLMConfig(**_in_tiles())


def _in_tiles() -> dict[str, Any]:
    vision = {**_siglip(patch_size=7), "initializer_range": SPREAD}
    del vision["model_type"], vision["vision_use_head"]
    return {
        "vision_config": vision,
        "text_config": {"model_type": "llama", **TEXT},
        "image_token_id": IMAGE_TOKEN,
        "scale_factor": 2,
        "tie_word_embeddings": False,
    }


def _llava_next() -> Any:
    from transformers import LlavaNextConfig

    return LlavaNextConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,  # the last one's output is not read
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 7,
            "initializer_range": SPREAD,
        },
        text_config={"model_type": "llama", **TEXT},
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=[[28, 28]],
    )


def _qwen2() -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**TEXT)


def _llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**TEXT)


FAMILIES: dict[str, Family] = {
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        _qwen2_5_vl,
        _qwen_pictures(patch=14),
        "mm_token_type_ids",
    ),
    "qwen3_vl": Family(
        "Qwen3VLForConditionalGeneration",
        _qwen3_vl,
        _qwen_pictures(patch=16),
        "mm_token_type_ids",
    ),
    "gemma3": Family("Gemma3ForConditionalGeneration", _gemma3, _gemma3_picture, "token_type_ids"),
    "internvl": Family("InternVLForConditionalGeneration", _internvl, _internvl_picture),
    "llava_onevision": Family(
        "LlavaOnevisionForConditionalGeneration", _llava_onevision, _llava_onevision_picture
    ),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2),
    "llama": Family("LlamaForCausalLM", _llama),
}
# And those of which only the pictures are their own: their text models are among the ones above.
LAYOUTS = {
    **FAMILIES,
    "idefics3": Family("Idefics3ForConditionalGeneration", _idefics3),
    "smolvlm": Family("SmolVLMForConditionalGeneration", _smolvlm),
    "llava_next": Family("LlavaNextForConditionalGeneration", _llava_next),
}
VISION_FAMILIES = [name for name, family in FAMILIES.items() if family.pictures is not None]


def build(
    name: str,
    attn_implementation: str | dict[str, str] = "sdpa",
    dtype: torch.dtype = torch.float32,
    **text_options: Any,
) -> Any:
    """The family's model with a head, in eval mode; the same weights at every call.

    `text_options` change the text configuration, e.g. `num_hidden_layers=3`.
    """
    import transformers

    family = FAMILIES[name]
    config = family.config()
    for option, value in text_options.items():
        setattr(config.get_text_config(), option, value)
    torch.manual_seed(0)
    model_class: Any = getattr(transformers, family.model_class)
    # A copy: transformers takes the name of the implementation out of a dictionary it is given.
    model = model_class._from_config(
        config, attn_implementation=copy.copy(attn_implementation), dtype=dtype
    )
    with torch.no_grad():
        for parameter in model.parameters():
            # Gemma 3 starts the projection of its pictures at zero: they would not matter.
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=SPREAD)
    # Set here and not in the configuration: `generate` then never stops before its last token.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD_TOKEN
    return model.eval()


def inputs(
    name: str,
    *,
    images: bool = True,
    padding: str | None = None,
    batch_size: int = 2,
    images_each: int = 1,
    text_length: int = 7,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """A batch for `model(**inputs)` or `generate(**inputs)`.

    A sample is text, then `images_each` times a picture and text; every piece of text is
    `text_length` tokens. With `padding` ("left" or "right") sample i has 3 i text tokens less in
    its last piece (and pictures may differ in size); without, `attention_mask` is left out, all
    samples are as long, and so are their pictures.

    Args:
        images: whether there are pictures; a text family has none either way.
        dtype: of the pixels.

    Returns:
        input_ids int64 [B, T], and as the family and the options have it attention_mask int64
        [B, T], token types [B, T], pixel_values and the sizes of the pictures.
    """
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(7)
    rows: list[list[int]] = []
    tensors: list[dict[str, Tensor]] = []
    for sample in range(batch_size):
        row = torch.randint(2, 256, (text_length,), generator=generator).tolist()
        for number in range(images_each if images and family.pictures is not None else 0):
            assert family.pictures is not None
            index = sample * images_each + number
            picture, tokens = family.pictures(index if padding else 2 * index)
            tensors.append(picture)
            text = torch.randint(2, 256, (text_length,), generator=generator).tolist()
            row += [*tokens, *text]
        rows.append(row[: len(row) - 3 * sample] if padding else row)

    length = max(map(len, rows))
    pads = [[PAD_TOKEN] * (length - len(row)) for row in rows]
    left = padding == "left"
    ids = torch.tensor([p + r if left else r + p for p, r in zip(pads, rows, strict=True)])
    batch = {"input_ids": ids}
    if padding:
        ones = [[1] * len(row) for row in rows]
        zeros = [[0] * len(pad) for pad in pads]
        batch["attention_mask"] = torch.tensor(
            [z + o if left else o + z for z, o in zip(zeros, ones, strict=True)]
        )
    if tensors:
        for key in tensors[0]:
            joined = torch.cat([picture[key] for picture in tensors])
            batch[key] = joined.to(dtype) if joined.is_floating_point() else joined
    if family.token_types is not None and tensors:
        batch[family.token_types] = (ids == IMAGE_TOKEN).long()
    return batch
