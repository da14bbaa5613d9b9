"""Span layouts: the places of frames among the keys, on which the cost of marginals depends.

A kernel processes the keys in blocks. A block inside one span adds one sum to the marginals; a
block with a span border adds several. The sweeps measure four layouts over the same keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import ral_kernels as rk

from .inputs import QUESTION_TEXT, SYSTEM_TEXT

BLOCKS = (64, 128)  # keys of a block, as kernels have them

# name -> visual tokens of a frame, and what the table and the plot call it
FRAME_TOKENS = {"aligned": 256, "offset": 256, "64": 64, "16": 16}
LABELS = {
    name: f"{tokens}-token frames, {'no text' if name == 'aligned' else 'text'}"
    for name, tokens in FRAME_TOKENS.items()
}


def frames_in_prompt(seqlen: int, frame_tokens: int) -> rk.Spans:
    """A span a frame of a Qwen2.5-VL prompt of `seqlen` keys; its text is in no span.

    The keys are the system text, `<vision_start> frame <vision_end>` over and over, and the
    question, which cuts the last frame short.
    """
    keys = torch.arange(seqlen)
    image = frame_tokens + 2
    frame, place = (keys - SYSTEM_TEXT) // image, (keys - SYSTEM_TEXT) % image
    visual = (frame >= 0) & (place >= 1) & (place <= frame_tokens)
    return _spans(frame.where(visual & (keys < seqlen - QUESTION_TEXT), -1))


def spans_of(layout: str, seqlen: int) -> rk.Spans:
    """The spans of a layout over exactly `seqlen` keys; none where no frame fits.

    `aligned` has no text: its frames begin at key 0, and the last one may be cut short. The others
    are `frames_in_prompt`.
    """
    tokens = FRAME_TOKENS[layout]
    if layout == "aligned":
        return _spans(torch.arange(seqlen) // tokens)
    return frames_in_prompt(seqlen, tokens)


def _spans(ids: Tensor) -> rk.Spans:
    return rk.Spans(ids, int(ids.max()) + 1)


def border_share(spans: rk.Spans, block: int) -> float:
    """The share of the blocks of `block` keys that hold a border of spans, or of span and text."""
    blocks = spans.ids.split(block)
    return sum(bool((ids != ids[0]).any()) for ids in blocks) / len(blocks)


def facts(layout: str, seqlen: int) -> dict[str, Any]:
    """Of a row of the JSON."""
    spans = spans_of(layout, seqlen)
    shares = {str(block): border_share(spans, block) for block in BLOCKS}
    return {"layout": layout, "spans": spans.num_spans, "border_share": shares}
