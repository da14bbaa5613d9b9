"""Real processors of each vision family, small: their own image processors on a tiny tokenizer."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch

from ral_kernels.integrations.transformers.processors import images_only

from . import models, tiny_checkpoint

IMAGE, VISION_START, VISION_END = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"
# What a prompt says where a picture goes.
PLACEHOLDER = {
    "qwen2_vl": f"{VISION_START}{IMAGE}{VISION_END}",
    "qwen2_5_vl": f"{VISION_START}{IMAGE}{VISION_END}",
    "qwen3_vl": f"{VISION_START}{IMAGE}{VISION_END}",
    "gemma3": "<boi>",
    "internvl": "<ctx>",
    "llava_onevision": "<image>",
    "idefics3": "<image>",
    "smolvlm": "<image>",
    "llava_next": "<image>",
}
SIDE = 28  # pixels of a tile of the families that take squares


def build(family: str, **options: Any) -> Any:
    """The family's processor; `options` go to its image processor.

    Those that take squares also take `side`, the pixels of a tile, and its `tokens`.
    """
    return globals()[f"_{family}"](**options)


def with_grids(processor_class: str, **tokens: str) -> Any:
    """A processor that returns grids (t, h, w), as Qwen-VL's; `tokens` are its special ones."""
    import transformers

    processor = images_only(
        getattr(transformers, processor_class),
        tiny_checkpoint.image_processor(),
        tiny_checkpoint.tokenizer(**tokens),
    )
    processor.video_processor = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    return processor


def _qwen(processor_class: str, patch: int, **options: Any) -> Any:
    import transformers

    pixels = tiny_checkpoint.image_processor()
    pixels.patch_size = patch
    for name, value in options.items():
        setattr(pixels, name, value)
    tokens = tiny_checkpoint.tokenizer()
    return images_only(getattr(transformers, processor_class), pixels, tokens)


def _qwen2_vl(**options: Any) -> Any:
    return _qwen("Qwen2VLProcessor", 14, **options)


def _qwen2_5_vl(**options: Any) -> Any:
    return _qwen("Qwen2_5_VLProcessor", 14, **options)


def _qwen3_vl(**options: Any) -> Any:
    return _qwen("Qwen3VLProcessor", 16, **options)


def _gemma3(side: int = SIDE, tokens: int = 4, **options: Any) -> Any:
    from transformers import Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    tokenizer = tiny_checkpoint.tokenizer(
        boi_token="<boi>", eoi_token="<eoi>", image_token="<image_soft_token>"
    )
    pixels = Gemma3ImageProcessorPil(size={"height": side, "width": side}, **options)
    return images_only(Gemma3Processor, pixels, tokenizer, image_seq_length=tokens)


def _internvl(side: int = SIDE, tokens: int = 4, **options: Any) -> Any:
    from transformers import InternVLProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
        GotOcr2ImageProcessorPil,
    )

    tokenizer = tiny_checkpoint.tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<ctx>",
        video_token="<video>",
    )
    pixels = GotOcr2ImageProcessorPil(size={"height": side, "width": side}, **options)
    return images_only(InternVLProcessor, pixels, tokenizer, image_seq_length=tokens)


def _llava_onevision(side: int = SIDE, tokens: int = 16, **options: Any) -> Any:
    from transformers import LlavaOnevisionProcessor
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    tokenizer = tiny_checkpoint.tokenizer(image_token="<image>", video_token="<video>")
    pixels = LlavaOnevisionImageProcessorPil(
        size={"height": side, "width": side},
        image_grid_pinpoints=[
            [side * rows, side * columns] for rows in range(1, 4) for columns in range(1, 4)
        ],
        **options,
    )
    return images_only(
        LlavaOnevisionProcessor,
        pixels,
        tokenizer,
        num_image_tokens=tokens,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",  # so that large pictures are interpolated
    )


def _idefics3(side: int = SIDE, tokens: int = 4, **options: Any) -> Any:
    from transformers import Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil,
    )

    return _in_tiles(Idefics3Processor, Idefics3ImageProcessorPil, side, tokens, options)


def _smolvlm(side: int = SIDE, tokens: int = 4, **options: Any) -> Any:
    from transformers import SmolVLMProcessor
    from transformers.models.smolvlm import processing_smolvlm
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    # A package that only writes the number of a video's frames in words, in the text before them.
    names = vars(processing_smolvlm)
    names["num2words"] = names["num2words"] or str
    return _in_tiles(SmolVLMProcessor, SmolVLMImageProcessorPil, side, tokens, options)


def _in_tiles(
    processor_class: Any, pixels_class: Any, side: int, tokens: int, options: dict[str, Any]
) -> Any:
    """Tiles of `side` pixels, from pictures whose longest edge becomes three by default."""
    markers = {f"row_{r}_col_{c}": f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)}
    tokenizer = tiny_checkpoint.tokenizer(
        image_token="<image>", fake="<fake_token_around_image>", end="<end_of_utterance>",
        whole="<global-img>", **markers,
    )  # fmt: skip
    options = {"size": {"longest_edge": 3 * side}, **options}
    pixels = pixels_class(max_image_size={"longest_edge": side}, **options)
    return images_only(processor_class, pixels, tokenizer, image_seq_len=tokens)


def _llava_next(side: int = SIDE, tokens: int = 16, **options: Any) -> Any:
    from transformers import LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    tokenizer = tiny_checkpoint.tokenizer(image_token="<image>")
    pixels = LlavaNextImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=[
            [side * rows, side * columns] for rows in range(1, 4) for columns in range(1, 4)
        ],
        **options,
    )
    return images_only(
        LlavaNextProcessor,
        pixels,
        tokenizer,
        patch_size=side // math.isqrt(tokens),
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's first, which "default" drops
    )


def model_for(family: str, processor: Any, attn_implementation: str = "sdpa") -> Any:
    """The tiny model, for this processor's tokens; its vision tower looks at patches one by one."""
    import transformers

    entry = models.LAYOUTS["qwen2_5_vl" if family == "qwen2_vl" else family]
    config = entry.config()
    ids = processor.tokenizer.convert_tokens_to_ids
    config.get_text_config().vocab_size = len(processor.tokenizer)
    token = IMAGE if family.startswith("qwen") else PLACEHOLDER[family]
    config.image_token_id = ids("<image_soft_token>" if family == "gemma3" else token)
    if family == "llava_onevision":
        config.vision_config.patch_size = 7
        config.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints
        config.vision_aspect_ratio = processor.vision_aspect_ratio
        config.video_token_index = ids("<video>")
    elif family == "llava_next":
        config.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints
    elif family.startswith("qwen"):
        config.vision_start_token_id = ids("<|vision_start|>")
        config.video_token_id = ids("<|video_pad|>")
    torch.manual_seed(0)
    model_class = getattr(transformers, entry.model_class)
    model = model_class._from_config(config, attn_implementation=attn_implementation).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ("vis" in name) and any(
                part in name for part in ("attn.proj", "out_proj", "projection_layer")
            ):
                parameter.zero_()
            if "patch_embedding" in name and family == "llava_next":
                parameter.abs_()  # the more of a patch is white, the more it changes
            if "mm_input_projection_weight" in name:  # Gemma 3 begins it at zero
                parameter.normal_()
    if family == "llava_next":  # CLIP scales patches to one size, white and grey ones alike
        model.model.vision_tower.pre_layrnorm = torch.nn.Identity()
    return model
