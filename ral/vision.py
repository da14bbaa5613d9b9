"""Where the images of a rollout batch are: spans and scopes for its token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import ral_kernels as rk

from .config import RALConfig

# What TRL's rollout batch holds of the processor's output, under the processor's own names.
_FIELDS = ("image_grid_thw", "image_sizes")


@dataclass(frozen=True)
class VisionLayout:
    """Which keys of a batch are visual, and the spans of the configured granularity.

    Attributes:
        visual: bool [B, N].
        spans: of the configuration's granularity and scope, or None for "token".
    """

    visual: Tensor
    spans: rk.Spans | None

    def scope(self, config: RALConfig) -> Tensor | None:
        """The keys that the policy is renormalised over, bool [B, N]; None for all."""
        return self.visual if config.attn_scope == "visual" and self.spans is None else None


def lay_out(
    config: RALConfig, model_config: Any, ids: Tensor, mask: Tensor, fields: dict[str, Any]
) -> VisionLayout:
    """Find the images in a batch of token ids.

    Args:
        config: granularity and scope of the attention term.
        model_config: the configuration of the vision-language model.
        ids, mask: int64 [B, N], the attention mask 0 where there is padding.
        fields: the processor's output as far as TRL keeps it.

    Raises:
        ValueError: the configuration asks for images, and the batch has none anywhere.
    """
    needs_images = config.attn_granularity != "token" or config.attn_scope == "visual"
    inputs = {name: fields[name] for name in _FIELDS if fields.get(name) is not None}
    if fields.get("pixel_values") is None:
        if needs_images:
            raise ValueError(
                f"ral: attn_granularity={config.attn_granularity!r} with attn_scope="
                f"{config.attn_scope!r} must go with images in the prompts; got a batch without"
            )
        return VisionLayout(torch.zeros_like(ids, dtype=torch.bool), None)
    inputs.update(input_ids=ids, attention_mask=mask)
    granularity = "image" if config.attn_granularity == "token" else config.attn_granularity
    found = rk.spans_for(
        model_config,
        inputs,
        granularity,
        tile=(config.attn_tile[0], config.attn_tile[1]) if granularity == "tile" else None,
        text=config.attn_scope == "context",
    )
    visual = found.spans.ids >= 0
    if found.text_span is not None:
        visual &= found.spans.ids != found.text_span
    return VisionLayout(visual, None if config.attn_granularity == "token" else found.spans)
