"""How each model family writes pictures into a prompt: its placeholders, token by token.

A reader turns the output of a processor into items, each an image or a video, in the order of their
placeholders. `spans.py` finds the placeholders and places the items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...spans import merged_grids

NAME = "spans_for"
Box = tuple[float, float, float, float]  # top, left, bottom, right, as fractions of a picture
Edges = tuple[tuple[float, ...], tuple[float, ...]]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
Size = tuple[int, int]  # (height, width) in pixels


@dataclass(frozen=True)
class View:
    """A picture as a grid of tokens: `offsets` int64 [frames, rows, columns] into the item's.

    box: of the grid in the picture; outside [0, 1] where the processor padded.
    features: rows and columns of the vision tower's grid, where the model interpolates it to this.
    edges: of the rows and of the columns, as fractions of the picture, where tokens are uneven.
    """

    offsets: Tensor
    box: Box = WHOLE
    features: Size | None = None
    edges: Edges | None = None


@dataclass(frozen=True)
class Item:
    """An image or a video: its number of placeholders, and where among them its grids are.

    A model may see an image twice, in small and in tiles: then the views are (overview, detail).
    unknown: the pieces of unknown arrangement, such as "12 tiles"; None if the detail is known or
    there is none.
    """

    kind: str
    length: int
    views: tuple[View, ...]
    unknown: str | None = None


Items = dict[int, list[Item]]  # placeholder's token id -> its items, in the order of the batch
Reader = Callable[["Source", Mapping[str, Any], "Sequence[Size] | None"], Items]


@dataclass(frozen=True)
class Source:
    """A processor or a configuration, with one way to read values of both."""

    family: str
    processor: Any = None
    config: Any = None

    @property
    def what(self) -> str:
        return type(self.config if self.processor is None else self.processor).__name__

    def read(self, in_processor: str, in_config: str) -> Any:
        """A value by its dotted name in the processor or in the configuration.

        Raises:
            ValueError: it is not there.
        """
        path = in_config if self.processor is None else in_processor
        value = self.find(path)
        if value is None:
            raise ValueError(f"{NAME}: {self.what} must have {path}, which is missing")
        return value

    def find(self, in_config: str, in_processor: str | None = None) -> Any:
        """The value at a dotted name, the same in both by default; None where it is missing."""
        path = in_config if self.processor is None or in_processor is None else in_processor
        value = self.config if self.processor is None else self.processor
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
            if value is None:
                return None
        return value


def source_of(source: Any, inputs: Mapping[str, Any]) -> Source:
    """Find the family of a processor, a model or a configuration.

    Where no family has its name, it is one whose processor returns the grid of each picture, if it
    says how many patches become one token.

    Raises:
        TypeError: it is none of these.
        NotImplementedError: its family is not supported.
    """
    for cls in type(source).__mro__:
        if cls.__name__ in _PROCESSORS:
            return Source(_PROCESSORS[cls.__name__], processor=source)
    config = source
    if isinstance(source, torch.nn.Module):
        module = source
        while not hasattr(module, "config") and isinstance(
            inner := getattr(module, "module", None), torch.nn.Module
        ):
            module = inner  # DistributedDataParallel and its like
        config = getattr(module, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type in _MODEL_TYPES:
        return Source(_MODEL_TYPES[model_type], config=config)
    is_processor = hasattr(source, "tokenizer") or hasattr(source, "image_processor")
    if not model_type and not is_processor:
        raise TypeError(
            f"{NAME}: processor_or_model_config must be a processor, a model or its configuration; "
            f"got {type(source).__name__}"
        )
    found = (
        Source("grids", config=_with_vision(config))
        if model_type
        else Source("grids", processor=source)
    )
    merge = found.find("vision_config.spatial_merge_size", "image_processor.merge_size")
    if found.find("image_token_id") is not None and (
        merge is not None or "image_merge_sizes" in inputs or "video_merge_sizes" in inputs
    ):
        return found
    what = f"model type {model_type!r}" if model_type else f"processor {type(source).__name__!r}"
    raise NotImplementedError(
        f"{NAME}: {what} is not supported; supported are {', '.join(sorted(_MODEL_TYPES))}, and "
        "models whose processor returns image_grid_thw. With the grid (t, h, w) of each picture, "
        "Spans.from_vision_grid makes the spans of any model"
    )


def _with_vision(config: Any) -> Any:
    """The part of a configuration that has the vision tower: omni models hold several models."""
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ()]
    having = (x for x in (config, *parts) if getattr(x, "vision_config", None) is not None)
    return next(having, config)


def read_items(source: Source, inputs: Mapping[str, Any], sizes: Sequence[Size] | None) -> Items:
    """The items of a batch, from the reader of its family."""
    return _READERS[source.family](source, inputs, sizes)


def _grids(source: Source, inputs: Mapping[str, Any], sizes: Sequence[Size] | None) -> Items:
    """A grid (t, h, w) an item, as Qwen-VL: timestamps and audio between only split its runs."""
    input_ids = inputs["input_ids"]
    ids = {
        "image": source.read("image_token_id", "image_token_id"),
        "video": source.find("video_token_id"),
    }
    held = {
        kind: 0 if token_id is None else int((input_ids == token_id).sum())
        for kind, token_id in ids.items()
    }
    items = {kind: _grid_items(source, inputs, kind, held[kind]) for kind in ids}
    # GLM-V writes the frames of a video with the placeholder of images.
    both = sum(item.length for queue in items.values() for item in queue)
    shares = bool(items["video"]) and held == {"image": both, "video": 0}
    for kind, count in held.items():
        if count > 0 and f"{kind}_grid_thw" not in inputs and not (shares and kind == "image"):
            raise ValueError(
                f"{NAME}: inputs must have {kind}_grid_thw, because input_ids holds {kind} tokens; "
                f"got {', '.join(inputs)}"
            )
    if shares:
        return {ids["image"]: _in_order(source, inputs, ids["image"], items)}
    return {ids[kind]: items[kind] for kind in ids if ids[kind] is not None}


def _grid_items(source: Source, inputs: Mapping[str, Any], kind: str, held: int) -> list[Item]:
    """The items of a kind; `held` is how many placeholders of the kind the batch holds."""
    grid = inputs.get(f"{kind}_grid_thw")
    if grid is None:
        return []
    mask = inputs.get("video_compression_mask")
    if kind == "video" and mask is not None and not bool(torch.as_tensor(mask).all()):
        raise NotImplementedError(
            f"{NAME}: video_compression_mask is not supported where it drops tokens; it keeps "
            f"{int(mask.sum())} of {mask.numel()}"
        )
    merges = inputs.get(f"{kind}_merge_sizes")  # of each item (VideoLlama 3)
    if merges is None:
        merge = source.find("vision_config.spatial_merge_size", f"{kind}_processor.merge_size")
        if merge is None:  # a processor for images only
            merge = source.read("image_processor.merge_size", "vision_config.spatial_merge_size")
        shapes = merged_grids(NAME, grid, merge)
    else:
        merges = torch.as_tensor(merges).tolist()
        shapes = [merged_grids(NAME, grid[i : i + 1], x)[0] for i, x in enumerate(merges)]
    wanted = sum(math.prod(shape) for shape in shapes)
    steps = source.find("vision_config.temporal_merge_size", "video_processor.temporal_patch_size")
    if kind == "video" and steps and held > 0 and wanted == held * steps:
        # Ernie 4.5's grid counts frames before they are merged, Qwen's after.
        shapes = [(t // steps, h, w) for t, h, w in shapes]
    return [
        Item(kind, math.prod(shape), (View(torch.arange(math.prod(shape)).view(shape)),))
        for shape in shapes
    ]


def _in_order(
    source: Source, inputs: Mapping[str, Any], token_id: int, items: Mapping[str, list[Item]]
) -> list[Item]:
    """Images and videos of one placeholder, in the order of the batch."""
    input_ids = inputs["input_ids"]
    types = inputs.get("mm_token_type_ids")
    if types is not None:
        in_video = torch.as_tensor(types).reshape(input_ids.shape) == 2
    else:
        edges = (
            source.read(f"video_{edge}_id", f"video_{edge}_token_id") for edge in ("start", "end")
        )
        starts, ends = ((input_ids == edge).cumsum(-1) for edge in edges)
        in_video = starts > ends
    left = {kind: list(queue) for kind, queue in items.items()}
    found: list[Item] = []
    for row, video in zip(input_ids, in_video, strict=True):
        marks, used = video[row == token_id].tolist(), 0
        while used < len(marks) and (queue := left["video" if marks[used] else "image"]):
            found.append(queue.pop(0))
            used += found[-1].length
    return found + left["image"] + left["video"]  # `spans.py` counts them


def _gemma3(source: Source, inputs: Mapping[str, Any], sizes: Sequence[Size] | None) -> Items:
    """Gemma 3: the same number of tokens for every picture and every crop of pan and scan.

    The processor does not return the number of crops of its image processor. Unless `num_crops` is
    put into inputs, a crop counts as an image.
    """
    # processor.image_token_id is the token that opens a picture, not its placeholder.
    token_id = source.read("tokenizer.image_token_id", "image_token_id")
    length = source.read("image_seq_length", "mm_tokens_per_image")
    side = _side(length)
    runs = [count for _, count in _runs(inputs["input_ids"], token_id)]
    pictures = sum(_multiple(runs, length, "Gemma 3"))
    crops = inputs.get("num_crops")
    if crops is None:
        crops = [0] * pictures
    crops = torch.as_tensor(crops).flatten().tolist()
    if sum(1 + count for count in crops) != pictures:
        raise ValueError(
            f"{NAME}: num_crops must describe the {pictures} pictures and crops in input_ids; got "
            f"{crops}"
        )
    _check_sizes(sizes, len(crops))
    items = []
    for index, count in enumerate(crops):
        overview = torch.arange(length).view(1, side, side)
        if count == 0:
            items.append(Item("image", length, (View(overview),)))
            continue
        total = (1 + count) * length
        if sizes is None:
            items.append(Item("image", total, (View(overview),), f"{count} crops"))
            continue
        height, width = sizes[index]
        tiles = (1, count) if width >= height else (count, 1)
        edges = _crop_edges(height, tiles[0], side), _crop_edges(width, tiles[1], side)
        detail = View(length + _tiles(tiles, side), edges=edges)
        items.append(Item("image", total, (View(overview), detail)))
    return {token_id: items}


def _crop_edges(size: int, crops: int, side: int) -> tuple[float, ...]:
    """Edges of tokens where crops begin at whole pixels, so that the last one is smaller."""
    step = math.ceil(size / crops)
    edges = [0.0]
    for crop in range(crops):
        first, last = crop * step, min((crop + 1) * step, size)
        edges += [(first + (last - first) * i / side) / size for i in range(1, side + 1)]
    return tuple(edges)


def _internvl(source: Source, inputs: Mapping[str, Any], sizes: Sequence[Size] | None) -> Items:
    """InternVL: tiles of a picture row by row, then its thumbnail; a video frame is a picture.

    The prompt gives the number of tiles. Their rows and columns follow from the shape of the
    picture, as in transformers' `get_optimal_tiled_canvas`.
    """
    token_id = source.read("image_token_id", "image_token_id")
    length = source.read("image_seq_length", "image_seq_length")
    side = _side(length)
    counts = _multiple(
        [count for _, count in _runs(inputs["input_ids"], token_id)], length, "InternVL"
    )
    _check_sizes(sizes, len(counts))
    items = []
    for index, count in enumerate(counts):
        overview = torch.arange((count - 1) * length, count * length).view(1, side, side)
        if count == 1:
            items.append(Item("image", length, (View(overview),)))
            continue
        total = count * length
        if sizes is None:
            items.append(Item("image", total, (View(overview),), f"{count - 1} tiles"))
            continue
        tile = source.read("image_processor.size.height", "vision_config.image_size")
        tile = tile if isinstance(tile, int) else tile[0]
        detail = View(_tiles(_canvas(sizes[index], count - 1, tile), side))
        items.append(Item("image", total, (View(overview), detail)))
    return {token_id: items}


def _idefics3(source: Source, inputs: Mapping[str, Any], sizes: Sequence[Size] | None) -> Items:
    """Idefics 3 and SmolVLM: tiles row by row, then the whole picture; a video frame is a picture.

    Two tokens stand before each tile, and a line break after each row of them. So tiles that are
    two tokens apart are of one row. A token of its own stands before the whole picture: it ends
    its tiles, if there are any.
    """
    token_id = source.read("image_token_id", "image_token_id")
    if source.processor is not None:
        side = _side(source.read("image_seq_len", "image_seq_len"))
    else:
        patches, patch = (
            source.read(name, f"vision_config.{name}") for name in ("image_size", "patch_size")
        )
        side = patches // patch // source.read("scale_factor", "scale_factor")
    length = side * side
    items = []
    for row in inputs["input_ids"]:
        runs = _runs(row, token_id)
        for _, count in runs:
            if count != length:
                raise ValueError(
                    f"{NAME}: {source.what} has {length} tokens a tile, and other tokens between "
                    f"tiles; got a run of {count} image tokens"
                )
        before = [int(row[start - 1]) for start, _ in runs]
        tiles: list[int] = []  # where those of a picture start
        for (start, _), marker in zip(runs, before, strict=True):
            if marker != before[-1]:  # of a sample's last view, which is a whole picture
                tiles.append(start)
                continue
            gaps = [b - a - length for a, b in pairwise(tiles)]
            ends = [i for i, gap in enumerate(gaps, 1) if gap > 2]  # of rows, but for the last
            columns = ends[0] if ends else max(1, len(tiles))
            if len(tiles) % columns or ends != list(range(columns, len(tiles), columns)):
                raise ValueError(
                    f"{NAME}: tiles of a picture must form rows of one length, with a line break "
                    f"after each; got {len(tiles)} tiles with breaks after {ends}"
                )
            used = len(tiles) * length
            views = [View(torch.arange(used, used + length).view(1, side, side))]
            if tiles:
                views.append(View(_tiles((len(tiles) // columns, columns), side)))
            items.append(Item("image", used + length, tuple(views)))
            tiles = []
    return {token_id: items}


def _llava_onevision(
    source: Source, inputs: Mapping[str, Any], sizes: Sequence[Size] | None
) -> Items:
    """LLaVA-OneVision: the whole picture, then its tiles without padding, a newline token a row.

    Where a sample has several pictures, each is there only as a whole, padded to a square. A video
    is pooled frames, with a quarter of the tokens. One newline token ends either.
    """
    token_id = source.read("image_token_id", "image_token_id")
    video_id = source.read("video_token_id", "video_token_id")
    tile = source.read("image_processor.size.height", "vision_config.image_size")
    if source.processor is not None:
        side = math.isqrt(source.read("num_image_tokens", "num_image_tokens"))
    else:
        side = tile // source.read("patch_size", "vision_config.patch_size")
    pinpoints = source.read("image_processor.image_grid_pinpoints", "image_grid_pinpoints")
    aspect = source.read("vision_aspect_ratio", "vision_aspect_ratio")
    limit = int(aspect.removeprefix("anyres_max_"))
    found: Items = {token_id: [], video_id: []}

    originals = _originals(inputs, token_id)
    each = inputs.get("batch_num_images")  # without it the model treats every picture as alone
    each = [1] * len(originals) if each is None else torch.as_tensor(each).tolist()
    alone = [count == 1 for count in each for _ in range(count)]
    if len(alone) != len(originals):
        raise ValueError(
            f"{NAME}: batch_num_images must add up to the {len(originals)} rows of image_sizes; "
            f"got {each}"
        )
    whole = torch.arange(side * side).view(1, side, side)
    for (height, width), single in zip(originals, alone, strict=True):
        if not single:
            pad_y = max(width - height, 0) / 2 / height
            pad_x = max(height - width, 0) / 2 / width
            box = (0.0 - pad_y, 0.0 - pad_x, 1 + pad_y, 1 + pad_x)
            found[token_id].append(Item("image", side * side + 1, (View(whole, box),)))
            continue
        features, box = _unpadded((height, width), pinpoints, tile, side)
        rows, columns = features
        ratio = math.sqrt(rows * columns / (limit * side**2))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
        detail = torch.arange(rows * (columns + 1)).view(1, rows, columns + 1)[..., :columns]
        views = (View(whole), View(side * side + detail, box, features))
        found[token_id].append(Item("image", side * side + rows * (columns + 1), views))

    pooled = math.ceil(side / 2)
    # A newline ends each video. Where runs of different videos touch, only the number of frames
    # separates them, and the pixels have that number.
    pixels = inputs.get("pixel_values_videos")
    for _, count in _runs(inputs["input_ids"], video_id):
        frames = (count - 1) // pooled**2 if pixels is None else pixels.shape[1]
        length = frames * pooled**2 + 1
        if frames < 1 or count % length:
            raise ValueError(
                f"{NAME}: a run of video tokens must be frames of {pooled} x {pooled} tokens and a "
                f"newline; got {count} tokens"
            )
        grid = torch.arange(length - 1).view(frames, pooled, pooled)
        found[video_id] += [Item("video", length, (View(grid, features=(side, side)),))] * (
            count // length
        )
    return found


def _llava_next(source: Source, inputs: Mapping[str, Any], sizes: Sequence[Size] | None) -> Items:
    """LLaVA-NeXT: the whole picture, then its tiles without padding, a newline token a row.

    The processor of LLaVA-NeXT-Video crops frames to a square by sizes that inputs do not tell, so
    only its pictures are read.
    """
    token_id = source.read("image_token_id", "image_token_id")
    video_id = source.find("video_token_id")
    if video_id is not None and bool((inputs["input_ids"] == video_id).any()):
        raise NotImplementedError(
            f"{NAME}: videos of LLaVA-NeXT-Video are not supported, because its processor crops "
            "their frames; give the frames as several images"
        )
    tile = source.find("vision_config.image_size", "image_processor.size.shortest_edge")
    if tile is None:
        tile = source.read("image_processor.size.height", "vision_config.image_size")
    side = tile // source.read("patch_size", "vision_config.patch_size")
    pinpoints = source.read("image_processor.image_grid_pinpoints", "image_grid_pinpoints")
    whole = View(torch.arange(side * side).view(1, side, side))
    items = []
    for height, width in _originals(inputs, token_id):
        (rows, columns), box = _unpadded((height, width), pinpoints, tile, side)
        detail = torch.arange(rows * (columns + 1)).view(1, rows, columns + 1)[..., :columns]
        views = (whole, View(side * side + detail, box))
        items.append(Item("image", side * side + rows * (columns + 1), views))
    return {token_id: items}


def _originals(inputs: Mapping[str, Any], token_id: int) -> list[list[int]]:
    """(height, width) of each original picture, as LLaVA's processors return them."""
    originals = inputs.get("image_sizes")
    if originals is None and bool((inputs["input_ids"] == token_id).any()):
        raise ValueError(
            f"{NAME}: inputs must have image_sizes, because input_ids holds image tokens; got "
            f"{', '.join(inputs)}"
        )
    return [] if originals is None else torch.as_tensor(originals).tolist()


def _unpadded(size: Size, pinpoints: Any, tile: int, side: int) -> tuple[Size, Box]:
    """Rows and columns of the detail, as the model's `unpad_image`, and where they are.

    Only whole tokens of padding are cut off, so the grid may reach beyond the picture.
    """
    from transformers.image_processing_utils import select_best_resolution

    best = select_best_resolution(size, pinpoints)
    shape = [edge // tile * side for edge in best]
    # The axis with padding: the picture fills the other one.
    axis = 0 if size[1] / size[0] > best[1] / best[0] else 1
    scale = best[1 - axis] / size[1 - axis]
    cut = (shape[axis] - int(round(size[axis] * (shape[1 - axis] / size[1 - axis]), 7))) // 2
    pixels = min(math.ceil(size[axis] * scale), best[axis])  # of the picture among the padding
    first = cut * tile / side - (best[axis] - pixels) // 2
    box = list(WHOLE)
    box[axis], box[axis + 2] = (
        first / pixels,
        (first + best[axis] - 2 * cut * tile / side) / pixels,
    )
    shape[axis] -= 2 * cut
    return (shape[0], shape[1]), (box[0], box[1], box[2], box[3])


def _canvas(size: Size, tiles: int, tile: int) -> tuple[int, int]:
    """Rows and columns of tiles whose shape is nearest to the picture's."""
    height, width = size
    best, nearest = (1, tiles), math.inf
    for columns in range(1, tiles + 1):
        if tiles % columns:
            continue
        rows = tiles // columns
        distance = abs(width / height - columns / rows)
        # Of two equally near shapes transformers takes the later one for a large picture.
        if distance < nearest or (
            distance == nearest and height * width > 0.5 * tile * tile * tiles
        ):
            best, nearest = (rows, columns), distance
    return best


def _tiles(canvas: tuple[int, int], side: int) -> Tensor:
    """Offsets of tiles of `side` x `side` tokens, one after the other, as one grid [1, R, C]."""
    rows, columns = canvas
    offsets = torch.arange(rows * columns * side * side).view(rows, columns, side, side)
    return offsets.transpose(1, 2).reshape(1, rows * side, columns * side)


def _runs(input_ids: Tensor, token_id: int) -> list[tuple[int, int]]:
    """(start, length) of each unbroken run of a token, in the order of the batch."""
    rows = input_ids if input_ids.dim() == 2 else input_ids[None]
    runs = []
    for row in rows.cpu():
        edges = torch.nn.functional.pad((row == token_id).int(), (1, 1)).diff()
        starts, stops = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
        runs += list(zip(starts.tolist(), (stops - starts).tolist(), strict=True))
    return runs


def _multiple(runs: Sequence[int], length: int, family: str) -> list[int]:
    """The pictures of each run, of `length` tokens each."""
    for run in runs:
        if run % length:
            raise ValueError(
                f"{NAME}: {family} has {length} tokens a picture, so a run of image tokens must be "
                f"a multiple of that; got {run}"
            )
    return [run // length for run in runs]


def _side(length: int) -> int:
    side = math.isqrt(length)
    if side * side != length:
        raise ValueError(f"{NAME}: tokens of a picture must form a square; got {length}")
    return side


def _check_sizes(sizes: Sequence[Size] | None, count: int) -> None:
    if sizes is not None and len(sizes) != count:
        raise ValueError(
            f"{NAME}: image_sizes must have a (height, width) for each of the {count} images in "
            f"input_ids; got {len(sizes)}"
        )


_READERS: dict[str, Reader] = {
    "grids": _grids,
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "internvl": _internvl,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
}
_MODEL_TYPES = {
    "gemma3": "gemma3",
    "idefics3": "idefics3",
    "internvl": "internvl",
    "llava_next": "llava_next",
    "llava_next_video": "llava_next",
    "llava_onevision": "llava_onevision",
    "smolvlm": "idefics3",
}
_PROCESSORS = {
    "Gemma3Processor": "gemma3",
    "Idefics3Processor": "idefics3",
    "InternVLProcessor": "internvl",
    "LlavaNextProcessor": "llava_next",
    "LlavaNextVideoProcessor": "llava_next",
    "LlavaOnevisionProcessor": "llava_onevision",
    "SmolVLMProcessor": "idefics3",
}
