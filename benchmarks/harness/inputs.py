"""The inputs of a sweep: q, k, v of a Qwen2.5-VL's last layer over pictures, or random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import ral_kernels as rk
from ral_kernels.spans import Granularity

PATCH = 14
MERGE = 2  # patches a side that become one token: a visual token is 28 x 28 pixels
TOKEN_PIXELS = PATCH * MERGE
VOCABULARY = 1024
IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END = 1000, 1001, 1002, 1003
SYSTEM_TEXT, QUESTION_TEXT = 24, 40  # text tokens before and after the pictures
TEXT_LAYERS = 2
CAPTURE = "ral_benchmark_capture"  # a name with "flash" in it would change how transformers masks


@dataclass(frozen=True)
class Heads:
    """The attention shape of a sweep; the default is Qwen2.5-VL-3B's."""

    num_heads: int = 16
    num_kv_heads: int = 2
    head_dim: int = 128


@dataclass(frozen=True)
class LayerInputs:
    """The inputs of a layer's causal attention, after RoPE, and the spans of its keys."""

    q: Tensor  # [1, H, N, D], token-major memory
    k: Tensor  # [1, Hk, N, D]
    v: Tensor  # [1, Hk, N, D]
    spans: rk.Spans


def random_layer(
    span_lengths: Sequence[int], heads: Heads, dtype: torch.dtype, device: str
) -> LayerInputs:
    """Normal q, k, v in the memory layout of a model's projections, and contiguous spans."""
    generator = torch.Generator().manual_seed(10)
    spans = rk.Spans.from_lengths(span_lengths)
    seqlen = sum(span_lengths)

    def projected(num_heads: int) -> Tensor:
        shape = (1, seqlen, num_heads, heads.head_dim)
        return torch.randn(shape, generator=generator).transpose(1, 2).to(device, dtype)

    q, k, v = (projected(n) for n in (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads))
    return LayerInputs(q, k, v, spans)


class ModelInputs:
    """Pictures -> Qwen2-VL's image processor -> a random Qwen2.5-VL -> its last layer's q, k, v.

    The model is the real architecture with the text attention of the sweep's shape, `TEXT_LAYERS`
    layers, a narrow MLP and a two-layer vision tower. The attention function registered here copies
    the inputs of the last layer, after RoPE, and then calls SDPA.
    """

    def __init__(self, heads: Heads, dtype: torch.dtype, device: str) -> None:
        from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig, Qwen2_5_VLModel
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        self.heads, self.dtype, self.device = heads, dtype, device
        self._captured: list[tuple[Tensor, Tensor, Tensor]] = []
        _register_capture(self._captured)
        # Frames and pictures arrive at their final size: the limits only have to let them through.
        self.processor = Qwen2VLImageProcessorPil(
            min_pixels=TOKEN_PIXELS**2, max_pixels=TOKEN_PIXELS**2 * 2**16
        )
        config = Qwen2_5_VLConfig(
            text_config=_text_config(heads),
            vision_config={
                "depth": 2,
                "hidden_size": 128,
                "num_heads": 4,
                "intermediate_size": 256,
                "out_hidden_size": heads.num_heads * heads.head_dim,
                "fullatt_block_indexes": [1],
            },
            image_token_id=IMAGE_TOKEN,
            video_token_id=VIDEO_TOKEN,
            vision_start_token_id=VISION_START,
            vision_end_token_id=VISION_END,
        )
        config._attn_implementation = {"text_config": CAPTURE, "vision_config": "sdpa"}
        torch.manual_seed(0)
        model: Any = Qwen2_5_VLModel(config)
        self.model = model.to(device, dtype).eval()

    @torch.no_grad()
    def layer(
        self,
        pictures: Sequence[Image.Image],
        granularity: Granularity,
        tile: tuple[int, int] | None,
    ) -> LayerInputs:
        """The last layer's, for a prompt of `pictures`, each an image between text tokens."""
        processed = self.processor(images=list(pictures), return_tensors="pt")
        grid = processed["image_grid_thw"]
        generator = torch.Generator().manual_seed(1)

        def text(length: int) -> Tensor:
            return torch.randint(IMAGE_TOKEN, (length,), generator=generator)

        parts = [text(SYSTEM_TEXT)]
        for tokens in (grid.prod(-1) // MERGE**2).tolist():
            image = torch.full((tokens + 2,), IMAGE_TOKEN)
            image[0], image[-1] = VISION_START, VISION_END
            parts.append(image)
        input_ids = torch.cat([*parts, text(QUESTION_TEXT)])[None]
        self._captured.clear()
        self.model(
            input_ids=input_ids.to(self.device),
            pixel_values=processed["pixel_values"].to(self.device),
            image_grid_thw=grid.to(self.device),
            mm_token_type_ids=(input_ids == IMAGE_TOKEN).int().to(self.device),
            use_cache=False,
        )
        ((q, k, v),) = self._captured
        self._captured.clear()
        spans = rk.Spans.from_vision_grid(
            input_ids[0],
            grid,
            token_id=IMAGE_TOKEN,
            merge_size=MERGE,
            granularity=granularity,
            tile=tile,
        )
        q, k, v = (x.to(self.device, self.dtype) for x in (q, k, v))
        return LayerInputs(q, k, v, spans)


def _text_config(heads: Heads) -> dict[str, Any]:
    quarter = (
        heads.head_dim // 8
    )  # M-RoPE splits D / 2 frequencies 2 : 3 : 3 over time, height and width
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": heads.num_heads * heads.head_dim,
        "intermediate_size": 2 * heads.head_dim,
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": heads.num_heads,
        "num_key_value_heads": heads.num_kv_heads,
        "max_position_embeddings": 1 << 20,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [quarter, 3 * quarter // 2, 3 * quarter // 2],
        },
    }


def _register_capture(captured: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Register SDPA that keeps the last layer's inputs, and SDPA's mask function, as `CAPTURE`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def capture(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if module.layer_idx == TEXT_LAYERS - 1:
            captured.append((query, key, value))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(CAPTURE, capture)
    AttentionMaskInterface.register(CAPTURE, sdpa_mask)
