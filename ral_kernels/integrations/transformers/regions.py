"""Regions of pictures as weights of visual tokens: where annotated evidence is in a prompt."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.nn.utils.rnn import pad_sequence

from ...media.masks import mask_of, read_mask
from ...runtime.checks import is_int
from ...spans import Spans
from .spans import VisionRegion, spans_for

NAME = "region_weights"
Region = Mapping[str, Any]
PictureSize = Sequence[int]  # (height, width) of an image, (frames, height, width) of a video
_FIELDS = ("image", "video", "frames", "box", "mask")
_REACH = 4.0  # standard deviations after which the Gaussian is cut off
_STEPS = 2**20  # weights of one partition's span differ by less than 1 / _STEPS


@dataclass(frozen=True, eq=False)
class RegionPart:
    """What one mapping covers of one image or video.

    Attributes:
        item: number of the image or video within its sample, as in `VisionRegion`.
        box: (x0, y0, x1, y1) in pixels; the whole picture where there is a mask.
        mask: bool [height, width], or None.
        frames: the first and the last frame.
    """

    item: int
    box: tuple[float, float, float, float]
    mask: Tensor | None
    frames: tuple[int, int]


@dataclass(frozen=True, eq=False)
class RegionWeights:
    """How much of each visual token each region covers, for a batch of B prompts.

    Attributes:
        ids: int64 [B, R, K] on the device of `input_ids`, the positions in the prompt of the tokens
            that a region covers, ascending; -1 = none. R is the largest number of regions of a
            sample, K of tokens of a region, and both are at least 1.
        values: float32 [B, R, K], the share of each token's area, and of a step's frames, in
            (0, 1]; 0 where `ids` is -1.
        grids: each frame of an image or video as a grid of tokens, in the order of `spans_for`.
        parts: what each region is made of, by sample and region.
    """

    ids: Tensor
    values: Tensor
    grids: tuple[VisionRegion, ...]
    parts: tuple[tuple[tuple[RegionPart, ...], ...], ...]

    def dense(self, seqlen_k: int) -> Tensor:
        """The weights over all keys: float32 [B, R, N], 0 for keys that a region does not cover.

        Raises:
            ValueError: a region covers keys after the first `seqlen_k`.
        """
        needed = int(self.ids.max()) + 1
        if seqlen_k < needed:
            raise ValueError(
                f"RegionWeights: seqlen_k must be at least {needed}, since regions cover keys up "
                f"to there; got {seqlen_k}"
            )
        found = self.values.new_zeros(*self.ids.shape[:2], seqlen_k + 1)
        at = torch.where(self.ids < 0, seqlen_k, self.ids)
        return found.scatter_(-1, at, self.values)[..., :seqlen_k]

    def on_grid(self, grid: VisionRegion, region: int = 0) -> Tensor:
        """The weights of one region on one of `grids`: float32 [rows, columns] on the CPU."""
        last = max(int(each.keys.max()) for each in self.grids)
        return self.dense(last + 1)[grid.sample, region].cpu()[grid.keys]

    def partition(self, seqlen_k: int) -> tuple[Spans, Tensor]:
        """The fewest spans that tell the regions apart, and what each region takes of each span.

        Every key of a span has the same weights. So attention on regions that overlap or are
        weighted is a product of marginals with a small matrix, differentiable in q and k:

            spans, matrix = weights.partition(k.shape[2])
            shares = rk.attention(q, k, v, spans).marginals @ matrix[:, None]   # [B, H, T, R]

        A box has nine spans at most in a picture: its corners, its sides and its middle.

        Args:
            seqlen_k: number of keys N.

        Raises:
            ValueError: a region covers keys after the first `seqlen_k`.

        Returns:
            spans over the keys, ids [B, N]; keys that no region covers belong to none.
            matrix float32 [B, S, R], the weight of each span's keys in each region, to 1e-6.
        """
        rows = (self.dense(seqlen_k) * _STEPS).round().transpose(1, 2)  # [B, N, R]
        ids = torch.full(rows.shape[:2], -1, dtype=torch.int32, device=rows.device)
        parts: list[Tensor] = []
        for sample, of_sample in enumerate(rows):
            covered = of_sample.any(-1)
            distinct, number = of_sample[covered].unique(dim=0, return_inverse=True)
            ids[sample, covered] = number.to(torch.int32)
            parts.append(distinct / _STEPS)
        matrix = pad_sequence(parts, batch_first=True)
        return Spans(ids, matrix.shape[1]), matrix


def region_weights(
    processor_or_model_config: Any,
    inputs: Mapping[str, Any],
    regions: Sequence[Sequence[Region | Sequence[Region]]],
    *,
    image_sizes: Sequence[PictureSize],
    sigma: float = 0.0,
    frame_sigma: float = 0.0,
) -> RegionWeights:
    """The share of each visual token that regions of pictures cover: boxes, masks, frames.

    Pixels reach tokens as the model's family takes them: through its resize, padding, tiling and
    patch merge. Where a model sees a picture twice, in small and in tiles, the tokens of both get
    weights. It supports the families of `spans_for`. The result is ready for a target:

        found = rk.region_weights(processor, inputs, [[evidence] for evidence in batch],
                                  image_sizes=sizes, sigma=1.0)
        target = rk.AttentionTarget(found.values, found.ids)

    Args:
        processor_or_model_config: as in `spans_for`.
        inputs: what the processor returned: input_ids [B, N] or [N], and the sizes of its grids.
        regions: for each sample its regions. A region is a mapping, or a list of mappings that
            count as one: what several of them cover counts once. A mapping has

            - "image": number of the image among the sample's images; or "video", of the video among
              its videos; or neither, for the only video;
            - "frames": [first, last], both included, from 0, of the frames that the processor was
              given. Where a sample has no video, its images are the frames;
            - "box": [x0, y0, x1, y1] in pixels of the picture, 0 <= x0 < x1 <= width; or "mask": a
              file, a Pillow image or an array [height, width], in which what is not 0 belongs to
              the region. Without either it is the whole picture.

            A value None counts as missing.
        image_sizes: (height, width) in pixels of each image, (frames, height, width) of each video,
            in the order of the prompts, as the processor was given them.
        sigma: standard deviation of a Gaussian over the tokens of a frame, in tokens of the grid
            that it smooths; 0 for none. Weights stay within their picture, and so does their sum.
        frame_sigma: the same over the steps of time of a video, in steps.

    Raises:
        TypeError, ValueError: regions or sizes that are not of this form, or outside of a picture;
            inputs as in `spans_for`.
        NotImplementedError: the family is not supported.
        OSError, PictureError: a mask that cannot be read.
    """
    for name, value in (("sigma", sigma), ("frame_sigma", frame_sigma)):
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not 0 <= value < math.inf:
            raise ValueError(f"{NAME}: {name} must be a number >= 0; got {value!r}")
    sizes = [_size(size) for size in image_sizes]
    found = spans_for(
        processor_or_model_config,
        inputs,
        "token",
        image_sizes=[(height, width) for frames, height, width in sizes if frames is None],
    )
    input_ids: Tensor = inputs["input_ids"]
    samples = 1 if input_ids.dim() == 1 else input_ids.shape[0]
    if len(regions) != samples:
        raise ValueError(
            f"{NAME}: regions must hold a list for each of the {samples} samples; got "
            f"{len(regions)}"
        )
    pictures = _pictures(found.regions, sizes, samples)
    parts = tuple(
        tuple(
            tuple(
                part
                for where, each in _mappings(region, f"regions[{sample}][{number}]")
                for part in _parts(each, where, pictures[sample])
            )
            for number, region in enumerate(of_sample)
        )
        for sample, of_sample in enumerate(regions)
    )
    rows = [
        [_weights(region, shown, sigma, frame_sigma) for region in of_sample]
        for of_sample, shown in zip(parts, pictures, strict=True)
    ]
    empty = (torch.empty(0, dtype=torch.int64), torch.empty(0))
    most = max(1, *(len(row) for row in rows)) if rows else 1
    flat = [pair for row in rows for pair in [*row, *[empty] * (most - len(row))]]
    ids = pad_sequence([*(ids for ids, _ in flat), torch.tensor([-1])], True, -1)[:-1]
    values = pad_sequence([*(values for _, values in flat), torch.tensor([0.0])], True)[:-1]
    return RegionWeights(
        ids.view(samples, most, -1).to(input_ids.device),
        values.view(samples, most, -1).to(input_ids.device),
        found.regions,
        parts,
    )


@dataclass(frozen=True)
class _Picture:
    """An image or a video of a sample: its size, and its grids [T] of each view."""

    kind: str
    frames: int
    height: int
    width: int
    views: tuple[tuple[VisionRegion, ...], ...]


def _size(size: Any) -> tuple[int | None, int, int]:
    good = isinstance(size, (tuple, list)) and len(size) in (2, 3)
    if not good or not all(is_int(edge) and edge >= 1 for edge in size):
        raise ValueError(
            f"{NAME}: image_sizes must hold (height, width) of images and (frames, height, width) "
            f"of videos; got {size!r}"
        )
    return (None, size[0], size[1]) if len(size) == 2 else (size[0], size[1], size[2])


def _pictures(
    grids: Sequence[VisionRegion], sizes: Sequence[tuple[int | None, int, int]], samples: int
) -> list[list[_Picture]]:
    """The images and videos of each sample, in the order of its prompt."""
    views: dict[tuple[int, int], dict[int, list[VisionRegion]]] = {}
    for grid in grids:
        views.setdefault((grid.sample, grid.item), {}).setdefault(grid.view, []).append(grid)
    kinds = [next(iter(of_item.values()))[0].kind for of_item in views.values()]
    got = ["image" if frames is None else "video" for frames, _, _ in sizes]
    if kinds != got:
        raise ValueError(
            f"{NAME}: image_sizes must hold (height, width) of each image and (frames, height, "
            f"width) of each video in input_ids, which are {', '.join(kinds) or 'none'}; got "
            f"{', '.join(got) or 'none'}"
        )
    found: list[list[_Picture]] = [[] for _ in range(samples)]
    for (sample, _), kind, size in zip(views, kinds, sizes, strict=True):
        frames, height, width = size
        of_item = views[sample, len(found[sample])]
        found[sample].append(
            _Picture(kind, frames or 1, height, width, tuple(map(tuple, of_item.values())))
        )
    return found


def _mappings(region: Any, where: str) -> Iterator[tuple[str, Region]]:
    """The mappings that count as one region, each with its place."""
    several = isinstance(region, (list, tuple))
    for number, each in enumerate(region if several else [region]):
        place = f"{where}[{number}]" if several else where
        if not isinstance(each, Mapping):
            raise TypeError(f"{NAME}: {place} must be a mapping; got {type(each).__name__}")
        unknown = set(each) - set(_FIELDS)
        if unknown:
            raise ValueError(
                f"{NAME}: {place} must have no other fields than {', '.join(_FIELDS)}; got "
                f"{', '.join(sorted(map(str, unknown)))}"
            )
        yield place, {name: value for name, value in each.items() if value is not None}


def _parts(region: Region, where: str, pictures: Sequence[_Picture]) -> Iterator[RegionPart]:
    """What a mapping covers of each picture that it names."""
    if "box" in region and "mask" in region:
        raise ValueError(f"{NAME}: {where} must have a box or a mask; got both")
    for number, frames in _named(region, where, pictures):
        picture = pictures[number]
        box, mask = (0.0, 0.0, float(picture.width), float(picture.height)), None
        if "box" in region:
            box = _box(region["box"], where, picture)
        elif "mask" in region:
            mask = _mask(region["mask"], where, picture)
        yield RegionPart(number, box, mask, frames)


def _named(
    region: Region, where: str, pictures: Sequence[_Picture]
) -> list[tuple[int, tuple[int, int]]]:
    """The pictures that a mapping names, and the frames of each."""
    numbers = {
        kind: [i for i, picture in enumerate(pictures) if picture.kind == kind]
        for kind in ("image", "video")
    }
    kind = "image" if "image" in region else "video"
    if kind not in region:
        if "frames" not in region:
            raise ValueError(f"{NAME}: {where} must have image, video or frames; got none of them")
        if not numbers["video"]:
            first, last = _frames(region["frames"], where, len(numbers["image"]))
            return [(number, (0, 0)) for number in numbers["image"][first : last + 1]]
        if len(numbers["video"]) > 1:
            raise ValueError(
                f"{NAME}: {where} must have video, because its sample has "
                f"{len(numbers['video'])} videos; got frames alone"
            )
    elif kind == "image" and ("video" in region or "frames" in region):
        raise ValueError(f"{NAME}: {where} must have image, or video and frames; got both")
    number = region.get(kind, 0)
    if not is_int(number) or not 0 <= number < len(numbers[kind]):
        raise ValueError(
            f"{NAME}: {kind} of {where} must be in [0, {len(numbers[kind])}), the {kind}s of its "
            f"sample; got {number!r}"
        )
    found = numbers[kind][number]
    frames = (0, pictures[found].frames - 1)
    if "frames" in region:
        frames = _frames(region["frames"], where, pictures[found].frames)
    return [(found, frames)]


def _frames(frames: Any, where: str, count: int) -> tuple[int, int]:
    good = isinstance(frames, (list, tuple)) and len(frames) == 2 and all(map(is_int, frames))
    if not good or not 0 <= frames[0] <= frames[1] < count:
        raise ValueError(
            f"{NAME}: frames of {where} must be [first, last] with 0 <= first <= last < {count}, "
            f"the number of frames; got {frames!r}"
        )
    return int(frames[0]), int(frames[1])


def _box(box: Any, where: str, picture: _Picture) -> tuple[float, float, float, float]:
    try:
        x0, y0, x1, y1 = map(float, box)
    except (TypeError, ValueError):
        x0 = y0 = x1 = y1 = math.nan
    if not (0 <= x0 < x1 <= picture.width and 0 <= y0 < y1 <= picture.height):
        raise ValueError(
            f"{NAME}: box of {where} must be [x0, y0, x1, y1] in pixels within the picture, which "
            f"is {picture.width} wide and {picture.height} high; got {box!r}"
        )
    return x0, y0, x1, y1


def _mask(mask: Any, where: str, picture: _Picture) -> Tensor:
    if isinstance(mask, (str, os.PathLike)):
        mask = read_mask(mask)
    elif hasattr(mask, "getexif"):  # a Pillow image
        mask = mask_of(mask)
    inside = torch.as_tensor(mask) != 0
    if inside.shape != (picture.height, picture.width):
        raise ValueError(
            f"{NAME}: mask of {where} must be [{picture.height}, {picture.width}] as its picture; "
            f"got {list(inside.shape)}"
        )
    return inside


def _weights(
    parts: Sequence[RegionPart], pictures: Sequence[_Picture], sigma: float, frame_sigma: float
) -> tuple[Tensor, Tensor]:
    """Keys int64 [K], ascending, and weights float32 [K] of one region."""
    keys, weights = [torch.empty(0, dtype=torch.int64)], [torch.empty(0)]
    for number, picture in enumerate(pictures):
        of_picture = [part for part in parts if part.item == number]
        for grids in picture.views if of_picture else ():
            covered = _covered(of_picture, picture, grids)
            for axis, width in enumerate((frame_sigma, sigma, sigma)):
                if width > 0:
                    blur = _gaussian(covered.shape[axis], width)
                    covered = torch.tensordot(blur, covered, ([1], [axis])).movedim(0, axis)
            keys.append(torch.stack([grid.keys for grid in grids]).flatten())
            weights.append(covered.flatten().clamp(0, 1).float())
    ids, values = torch.cat(keys), torch.cat(weights)
    ids, order = ids[values > 0].sort()
    return ids, values[values > 0][order]


def _covered(
    parts: Sequence[RegionPart], picture: _Picture, grids: Sequence[VisionRegion]
) -> Tensor:
    """The share of each token that a region covers: float64 [T, rows, columns].

    A step of time shows several frames; the last frame repeats where it shows fewer.
    """
    length = math.ceil(picture.frames / len(grids))
    covered = []
    for step, grid in enumerate(grids):
        first = min(step * length, picture.frames - 1)
        frames = range(first, min(first + length, picture.frames))
        at_once: dict[tuple[int, ...], Tensor] = {}
        shares = []
        for frame in frames:
            shown = tuple(
                i for i, part in enumerate(parts) if part.frames[0] <= frame <= part.frames[1]
            )
            if shown not in at_once:
                at_once[shown] = _areas([parts[i] for i in shown], picture, grid)
            shares.append(at_once[shown])
        covered.append(torch.stack(shares).mean(0))
    return torch.stack(covered)


def _areas(parts: Sequence[RegionPart], picture: _Picture, grid: VisionRegion) -> Tensor:
    """The share of each token's area that boxes and masks cover together: [rows, columns].

    Their edges cut the picture into rectangles that are inside or outside, so an area is a product
    of three small matrices: overlaps down, which is inside, overlaps across.
    """
    if not parts:
        return torch.zeros(grid.keys.shape, dtype=torch.float64)
    down, across = (
        torch.cat(
            [
                torch.arange(size + 1.0, dtype=torch.float64)
                if part.mask is not None
                else torch.tensor(part.box[axis::2], dtype=torch.float64)
                for part in parts
            ]
        ).unique()
        for axis, size in ((1, picture.height), (0, picture.width))
    )
    inside = torch.zeros(len(down) - 1, len(across) - 1, dtype=torch.bool)
    for part in parts:
        if part.mask is not None:
            inside |= part.mask[down[:-1].long()][:, across[:-1].long()]
            continue
        x0, y0, x1, y1 = part.box
        rows = (down[:-1] >= y0) & (down[1:] <= y1)
        inside |= rows[:, None] & (across[:-1] >= x0) & (across[1:] <= x1)
    vertical = _overlaps(down, _cells(grid, 0) * picture.height)
    horizontal = _overlaps(across, _cells(grid, 1) * picture.width)
    areas = vertical @ inside.double() @ horizontal.T
    if grid.features is None:
        return areas
    # Weights go the way of the features.
    return interpolate(areas[None, None], tuple(grid.keys.shape), mode="bilinear")[0, 0]


def _cells(grid: VisionRegion, axis: int) -> Tensor:
    """The edges of a grid's rows or columns as fractions of the picture: float64 [cells + 1]."""
    if grid.edges is not None:
        return torch.tensor(grid.edges[axis], dtype=torch.float64)
    count = (grid.features or grid.keys.shape)[axis]
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    return grid.box[axis] + (grid.box[axis + 2] - grid.box[axis]) * steps


def _overlaps(edges: Tensor, cells: Tensor) -> Tensor:
    """The share of each cell that each interval covers: [cells, intervals]."""
    lower = torch.maximum(cells[:-1, None], edges[:-1])
    upper = torch.minimum(cells[1:, None], edges[1:])
    return (upper - lower).clamp(min=0) / cells.diff()[:, None]


def _gaussian(size: int, sigma: float) -> Tensor:
    """A blur of `size` cells as a matrix [size, size], which mirrors at both ends.

    Rows and columns add up to 1: it keeps constants, and the sum.
    """
    reach = math.ceil(_REACH * sigma)
    offsets = torch.arange(-reach, reach + 1)
    kernel = torch.exp(-0.5 * (offsets / sigma).double().square())
    at = (torch.arange(size)[:, None] + offsets) % (2 * size)
    at = torch.where(at < size, at, 2 * size - 1 - at)
    blur = torch.zeros(size, size, dtype=torch.float64)
    return blur.scatter_add_(1, at, (kernel / kernel.sum()).expand(size, -1))
