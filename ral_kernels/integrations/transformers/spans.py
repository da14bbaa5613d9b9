"""Spans from the output of a processor: which token shows which part of which picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...runtime.checks import dtype_name, is_int
from ...spans import Granularity, Spans, check_granularity, number_tokens
from .layouts import NAME, Item, Items, Size, View, read_items, source_of


@dataclass(frozen=True)
class VisionRegion:
    """One frame of an image or video as a grid of tokens of the prompt.

    Attributes:
        sample: which sample of the batch.
        item: number of the image or video within its sample, in the order of the prompt.
        kind: "image" or "video".
        frame: step of time within a video, 0 for an image. Qwen-VL merges two frames into a step.
        view: 0 for the item as a whole, 1 for the same picture in tiles, finer (Idefics 3, SmolVLM,
            InternVL, LLaVA-NeXT, LLaVA-OneVision, Gemma 3 with pan and scan).
        keys: int64 [rows, columns] on the CPU, the position in the prompt of each token.
        span_ids: int32 [rows, columns] on the CPU, the span of each token.
        box: (top, left, bottom, right) of the grid in the picture, as fractions of its height and
            width; outside [0, 1] where the processor padded the picture.
        features: (rows, columns) of the vision tower's tokens, where the model interpolates them,
            bilinear, to these (LLaVA-OneVision); else None.
        edges: of the rows and of the columns, as fractions of the picture's height and width, where
            tokens differ in size (crops of Gemma 3); else None, and the box is divided evenly.
    """

    sample: int
    item: int
    kind: str
    frame: int
    view: int
    keys: Tensor
    span_ids: Tensor
    box: tuple[float, float, float, float]
    features: tuple[int, int] | None = None
    edges: tuple[tuple[float, ...], tuple[float, ...]] | None = None


@dataclass(frozen=True)
class SpanPlace:
    """Where a span is: tokens `rows` x `columns` (start, stop) of a frame of an item's view.

    `view` and `frame` are None for a span over all of them.
    """

    item: int
    kind: str
    frame: int | None
    view: int | None
    rows: tuple[int, int]
    columns: tuple[int, int]


@dataclass(frozen=True)
class VisionSpans:
    """The spans of a batch, and where each is.

    Attributes:
        spans: for the ops of `ral_kernels`, ids [B, N] or [N] as `input_ids`. The numbering
            restarts in each sample and follows the prompt: item, frame, view, row, column.
        granularity: what a span is.
        regions: the grids of tokens, ordered by sample, item, view and frame.
        text_span: the span of all text, or None where text belongs to none.
    """

    spans: Spans
    granularity: str
    regions: tuple[VisionRegion, ...]
    text_span: int | None

    def of_item(self, item: int, sample: int = 0) -> tuple[VisionRegion, ...]:
        """The regions of one image or video."""
        return tuple(r for r in self.regions if r.sample == sample and r.item == item)

    def num_items(self, sample: int = 0) -> int:
        """Number of images and videos of a sample."""
        return len({region.item for region in self.regions if region.sample == sample})

    def place(self, span: int, sample: int = 0) -> SpanPlace | None:
        """Where a span lies; None for the text.

        Raises:
            IndexError: the sample has no such span.
        """
        if span == self.text_span:
            return None
        # In tiles and tokens a span lies in one view; coarser ones lie in all views of the item,
        # and are given in tokens of the first.
        found = [
            (region, (region.span_ids == span).nonzero())
            for region in self.regions
            if region.sample == sample and bool((region.span_ids == span).any())
        ]
        if not found:
            raise IndexError(f"VisionSpans.place: sample {sample} has no span {span}")
        region, cells = found[0]
        (top, left), (bottom, right) = cells.amin(0).tolist(), (cells.amax(0) + 1).tolist()
        return SpanPlace(
            region.item,
            region.kind,
            region.frame if len({r.frame for r, _ in found}) == 1 else None,
            region.view if len({r.view for r, _ in found}) == 1 else None,
            (top, bottom),
            (left, right),
        )


def spans_for(
    processor_or_model_config: Any,
    inputs: Mapping[str, Any],
    granularity: Granularity = "frame",
    *,
    tile: tuple[int, int] | None = None,
    text: bool = False,
    image_sizes: Sequence[Size] | Tensor | None = None,
) -> VisionSpans:
    """Spans over the images and videos of a batch, from what the model's processor returned.

    It supports Gemma 3, Idefics 3, SmolVLM, InternVL, LLaVA-NeXT, LLaVA-OneVision, and every model
    whose processor returns the grid (t, h, w) of each picture: Qwen-VL and Qwen-Omni, GLM-V, Ernie
    4.5 VL and more. A prompt may hold several images and videos in any order, and samples may be
    padded on either side. Where a model separates the frames of a video only by text (InternVL,
    SmolVLM), each frame is an image. Tokens that end a row or a picture (LLaVA's newlines) belong
    to the image, but to none of its tiles or tokens.

    Args:
        processor_or_model_config: the processor, the model (also inside
            `DistributedDataParallel` or peft) or its configuration.
        inputs: what the processor returned, as tensors: input_ids int64 [B, N] (or [N]), and where
            the family needs them image_grid_thw, video_grid_thw, image_sizes, batch_num_images,
            num_crops; attention_mask [B, N] where there is padding.
        granularity: one span a "frame" (of a video; of an image the whole), "image" (or video),
            "tile" of a frame, or "token".
        tile: (rows, columns) of tokens in a tile, for `granularity="tile"`.
        text: whether the other tokens, except padding, form one span, the last. Otherwise they
            belong to none (-1).
        image_sizes: (height, width) of the original images in the order of the batch. Needed for
            the tiles and tokens of pictures that InternVL, or Gemma 3 with pan and scan, cuts into
            pieces, because the prompt gives only the number of pieces.

    Returns:
        VisionSpans; its `.spans` is on the device of input_ids.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: something is missing from `inputs`, or the placeholders in the prompt do not
            match it.
        NotImplementedError: a family that is not supported.
    """
    input_ids = _check_inputs(inputs)
    source = source_of(processor_or_model_config, inputs)
    tile = check_granularity(NAME, granularity, tile)
    if not isinstance(text, bool):
        raise TypeError(f"{NAME}: text must be a bool; got {type(text).__name__}")
    sizes = _check_sizes(image_sizes)
    batch = input_ids if input_ids.dim() == 2 else input_ids[None]
    samples = _assign(read_items(source, {**inputs, "input_ids": batch}, sizes), batch.cpu())

    ids = torch.full(tuple(batch.shape), -1, dtype=torch.int32)
    regions: list[VisionRegion] = []
    num_spans = 0
    for sample, items in enumerate(samples):
        first = 0
        for number, (item, keys) in enumerate(items):
            placed, size = _place(item, keys, granularity, tile)
            ids[sample, keys] = torch.where(placed.ids >= 0, placed.ids + first, -1)
            regions += [
                VisionRegion(
                    sample, number, item.kind, frame, view_number,
                    keys[view.offsets[frame]], span_ids[frame] + first, view.box,
                    view.features, view.edges,
                )
                for view_number, (view, span_ids) in enumerate(
                    zip(item.views, placed.views, strict=True)
                )
                for frame in range(view.offsets.shape[0])
            ]  # fmt: skip
            first += size
        num_spans = max(num_spans, first)
    text_span = None
    if text:
        text_span, num_spans = num_spans, num_spans + 1
        other = torch.ones(tuple(batch.shape), dtype=torch.bool)
        for sample, items in enumerate(samples):
            for _, keys in items:
                other[sample, keys] = False
        mask = inputs.get("attention_mask")
        if mask is not None:
            other &= mask.reshape(batch.shape).cpu().bool()
        ids[other] = text_span
    spans = Spans(ids.reshape(input_ids.shape).to(input_ids.device), num_spans)
    return VisionSpans(spans, granularity, tuple(regions), text_span)


@dataclass(frozen=True)
class _Placed:
    """The spans of an item, from 0: of each of its tokens, and of its views' grids."""

    ids: Tensor  # int32 [length]
    views: tuple[Tensor, ...]  # int32 [frames, rows, columns] each


def _place(
    item: Item, keys: Tensor, granularity: str, tile: tuple[int, int]
) -> tuple[_Placed, int]:
    """The spans of one item, and their number."""
    if granularity in ("tile", "token") and item.unknown is not None:
        raise ValueError(
            f"{NAME}: image_sizes must be given for granularity={granularity!r}, because the "
            f"processor cut an image into {item.unknown}; got None"
        )
    ids = torch.full((item.length,), -1, dtype=torch.int32)
    views: list[Tensor] = []
    if granularity == "image" or (granularity == "frame" and item.kind == "image"):
        views = [torch.zeros_like(view.offsets, dtype=torch.int32) for view in item.views]
        return _Placed(ids.zero_(), tuple(views)), 1
    size = 0
    for view in item.views:
        numbers, count = number_tokens(_shape(view), granularity, tile)
        views.append((numbers + size).view(view.offsets.shape))
        ids[view.offsets] = views[-1]
        size += count
    return _Placed(ids, tuple(views)), size


def _shape(view: View) -> tuple[int, int, int]:
    frames, rows, columns = view.offsets.shape
    return frames, rows, columns


def _assign(items: Items, input_ids: Tensor) -> list[list[tuple[Item, Tensor]]]:
    """The items of each sample in the order of its prompt, with the keys of their tokens.

    Placeholders are matched to items only by order, as in the models. So a run of placeholders may
    hold several items, and an item may take several runs.
    """
    samples: list[list[tuple[Item, Tensor]]] = [[] for _ in input_ids]
    for token_id, queue in items.items():
        wanted, got = sum(item.length for item in queue), int((input_ids == token_id).sum())
        if wanted != got:
            raise ValueError(
                f"{NAME}: the sizes in inputs describe {len(queue)} items of {wanted} tokens, but "
                f"input_ids holds {got} tokens of id {token_id}"
            )
        next_item = 0
        for sample, row in enumerate(input_ids):
            keys = (row == token_id).nonzero().flatten()
            used = 0
            while used < len(keys):
                item = queue[next_item]
                if used + item.length > len(keys):
                    raise ValueError(
                        f"{NAME}: items must end where samples end; item {next_item} of "
                        f"{item.length} tokens goes beyond the end of sample {sample}"
                    )
                samples[sample].append((item, keys[used : used + item.length]))
                used, next_item = used + item.length, next_item + 1
    for placed in samples:
        placed.sort(key=lambda pair: int(pair[1][0]))
    return samples


def _check_inputs(inputs: Any) -> Tensor:
    if not isinstance(inputs, Mapping):
        raise TypeError(
            f"{NAME}: inputs must be what the processor returned; got {type(inputs).__name__}"
        )
    input_ids = inputs.get("input_ids")
    if not isinstance(input_ids, Tensor):
        raise TypeError(
            f"{NAME}: inputs must have input_ids as a tensor (return_tensors='pt'); got "
            f"{type(input_ids).__name__}"
        )
    if input_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{NAME}: input_ids must be integers; got {dtype_name(input_ids.dtype)}")
    if input_ids.dim() not in (1, 2):
        raise ValueError(f"{NAME}: input_ids must be [B, N] or [N]; got {tuple(input_ids.shape)}")
    mask = inputs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != input_ids.shape):
        raise ValueError(
            f"{NAME}: attention_mask must be {tuple(input_ids.shape)} as input_ids; got "
            f"{tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}"
        )
    return input_ids


def _check_sizes(image_sizes: Any) -> list[Size] | None:
    if image_sizes is None:
        return None
    sizes = image_sizes.tolist() if isinstance(image_sizes, Tensor) else list(image_sizes)
    for size in sizes:
        good = isinstance(size, (tuple, list)) and len(size) == 2
        if not good or not all(is_int(edge) and edge >= 1 for edge in size):
            raise ValueError(
                f"{NAME}: image_sizes must hold (height, width) in pixels; got {size!r}"
            )
    return [(size[0], size[1]) for size in sizes]
