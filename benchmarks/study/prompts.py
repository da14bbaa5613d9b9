"""Prompts of a run, encoded once: token ids, positions, features of pictures, spans, evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import ral_kernels as rk
from ral.evidence import locate
from ral.looking import Evidence

from .decoder import Decoder, Past, Tokens
from .picture_cache import Pictures


@dataclass(frozen=True)
class Prompts:
    """R prompts, padded on the left.

    Attributes:
        ids: int64 [R, P].
        mask: bool [R, P], False for padding.
        positions: int64 [3, R, P], of M-RoPE.
        visual: bool [R, P], the tokens of pictures.
        places: int64 [R, P], which row of `features` stands there.
        features: float32 [visual tokens of all prompts, hidden size].
        fields: the processor's output.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    visual: Tensor
    places: Tensor
    features: Tensor
    fields: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def start(self) -> Tensor:
        """int64 [R], the position of the token after each prompt, which ends in text."""
        return self.positions[0, :, -1] + 1

    def longest(self, rows: Tensor) -> int:
        """How many tokens the longest of some prompts has."""
        return int(self.mask[rows].sum(-1).max())

    def tokens(self, decoder: Decoder, rows: Tensor, width: int | None = None) -> Tokens:
        """Some prompts as input of a decoder.

        Args:
            decoder: any, whose vision tower was that of the features.
            rows: int64 [B], which prompts.
            width: how many tokens, from the end; None for those of the longest.
        """
        at = slice(-(self.longest(rows) if width is None else width), None)
        return Tokens(
            self.ids[rows, at],
            self.mask[rows, at],
            decoder.rope(self.positions[:, rows, at]),
            self.visual[rows, at],
            self.features[self.places[rows, at]],
        )

    def begun(
        self, decoder: Decoder, rows: Tensor, width: int | None = None
    ) -> tuple[Tokens, Past]:
        """The last token of some prompts, and what is before it, which runs once a prompt.

        Args:
            decoder, width: as for `tokens`.
            rows: int64 [B], which prompts; each as often as it has rollouts.
        """
        prompts, of = torch.unique(rows, return_inverse=True)
        shared = self.tokens(decoder, prompts, width)
        past = decoder.prefix(shared.columns(None, -1)).rows(of)
        return shared.columns(-1, None).rows(of), past


class Reader:
    """What encodes the prompts of a start and its descendants, whose vision tower is the start's.

    Args:
        model: the start, a `Qwen2_5_VLForConditionalGeneration`; its tower is taken out.
        processor: its processor.

    Attributes:
        pictures: the tower, which looks at each picture once.
        processor: that of `pictures`.
        tokenizer: of the processor.
        config: of the model.
        suppressed: tokens that answers do not hold, as the model's generation has it.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.pictures = Pictures(model.model.visual)
        self._base = model.model
        self._base.visual = self.pictures
        self.processor = self.pictures.processor_of(processor)
        self.tokenizer = processor.tokenizer
        self.config = model.config
        self.suppressed: list[int] = list(model.generation_config.suppress_tokens or ())

    def encode(self, rows: Sequence[Mapping[str, Any]], completions: bool = False) -> Prompts:
        """Rows of a dataset as prompts.

        Args:
            rows: with prompt and images.
            completions: whether the rows' completions follow; else a response is asked for.
        """
        from trl.data_utils import prepare_multimodal_messages

        messages = [
            prepare_multimodal_messages(
                row["prompt"] + row["completion"] if completions else row["prompt"],
                images=row["images"],
            )
            for row in rows
        ]
        fields = self.processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
            add_generation_prompt=not completions,
        )  # fmt: skip
        fields = fields.to(self.pictures.device)
        ids, mask, grid = (fields[x] for x in ("input_ids", "attention_mask", "image_grid_thw"))
        positions, _ = self._base.get_rope_index(
            ids, fields["mm_token_type_ids"], image_grid_thw=grid, attention_mask=mask
        )
        visual = ids == self.config.image_token_id
        places = (visual.flatten().cumsum(0) - 1).clamp(min=0).view(ids.shape)
        features = self.pictures(fields["pixel_values"], grid).pooler_output
        return Prompts(ids, mask.bool(), positions, visual, places, features, fields)


def find_evidence(
    prompts: Prompts, rows: Sequence[Mapping[str, Any]], config: Any, sigma: float
) -> Evidence:
    """The evidence of each prompt, over its P keys; arguments as of `ral.evidence.locate`."""
    return locate(rows, config, prompts.ids, prompts.mask.long(), prompts.fields, sigma)


def spans_of(prompts: Prompts, config: Any, args: Any) -> tuple[rk.Spans, int]:
    """The spans of each prompt's keys, as `ral.vision.lay_out` gives them, and that of text.

    Args:
        prompts: all of them.
        config: of the model.
        args: a `RALConfig`: attn_granularity (not "token"), attn_tile and attn_scope.

    Returns:
        The spans, and the number of the text's; -1 where it has none.
    """
    inputs = {"input_ids": prompts.ids, "attention_mask": prompts.mask.long()}
    found = rk.spans_for(
        config,
        {**inputs, "image_grid_thw": prompts.fields["image_grid_thw"]},
        args.attn_granularity,
        tile=tuple(args.attn_tile) if args.attn_granularity == "tile" else None,
        text=args.attn_scope == "context",
    )
    return found.spans, -1 if found.text_span is None else found.text_span
