"""A region over its pictures: the boxes that were given, and the weights on the grids of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .figures import finish
from .parts import (
    COLOURS,
    FONT,
    LONGEST_SIDE,
    axes_at,
    colours,
    fit,
    need_matplotlib,
    new_figure,
    write,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..integrations.transformers.regions import RegionPart, RegionWeights
    from ..integrations.transformers.spans import VisionRegion

OUTLINE = "#00A8FF"
ACROSS = 4  # panels in a row at most


def region_grid(
    weights: RegionWeights,
    pictures: Sequence[Any],
    *,
    sample: int = 0,
    region: int = 0,
    path: str | Path | None = None,
) -> Figure:
    """Which tokens a region covers, one panel for each grid of tokens that has weight.

    A panel shows the picture in grey, the grid's lines, each token in the colour of its weight, and
    the outline of the boxes and masks. Where a model sees a picture twice, both grids are shown.

    Args:
        weights: of `rk.region_weights`.
        pictures: of the sample, in the order of its prompt: for each image a Pillow image, for each
            video the list of its frames.
        sample: number of the prompt.
        region: number of the region.
        path: a file to write; its suffix sets the format.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the region covers no token of that prompt.
    """
    need_matplotlib("region_grid")
    shown = [
        grid
        for grid in weights.grids
        if grid.sample == sample and bool(weights.on_grid(grid, region).any())
    ]
    if not shown:
        raise ValueError(
            f"viz.region_grid: region must cover a token; got region {region} of sample {sample}, "
            "which covers none"
        )
    frames = [_frame_of(grid, weights, pictures[grid.item]) for grid in shown]
    columns = min(len(shown), ACROSS)
    aspect = max(
        _extent(grid, picture)[0] for grid, (picture, _) in zip(shown, frames, strict=True)
    )
    width, height = fit(aspect, 3.2, 3.2)
    rows = math.ceil(len(shown) / columns)
    figure = new_figure(columns * (width + 0.15) + 0.15, rows * (height + 0.4) + 0.1)
    for place, (grid, (picture, numbers)) in enumerate(zip(shown, frames, strict=True)):
        row, column = divmod(place, columns)
        axes = axes_at(
            figure, 0.15 + column * (width + 0.15), (rows - 1 - row) * (height + 0.4) + 0.1,
            width, height,
        )  # fmt: skip
        _draw(axes, grid, weights.on_grid(grid, region), picture)
        for part in weights.parts[sample][region]:
            first, last = part.frames
            if part.item == grid.item and first <= numbers[-1] and last >= numbers[0]:
                _outline(axes, part, picture)
        write(axes, 0, 1, _name(grid, numbers), 4, FONT)
    return finish(figure, path)


def _frame_of(grid: VisionRegion, weights: RegionWeights, picture: Any) -> tuple[Any, range]:
    """The picture of a panel, and the frames of the source that its step of time shows."""
    if grid.kind == "image":
        return picture, range(1)
    steps = 1 + max(
        each.frame for each in weights.grids
        if (each.sample, each.item) == (grid.sample, grid.item)
    )  # fmt: skip
    length = math.ceil(len(picture) / steps)
    first = min(grid.frame * length, len(picture) - 1)
    return picture[first], range(first, min(first + length, len(picture)))


def _extent(grid: VisionRegion, picture: Any) -> tuple[float, tuple[float, float, float, float]]:
    """Width / height of a panel, and its (left, right, bottom, top) in pixels of the picture."""
    top, left, bottom, right = grid.box
    edges = (
        min(left, 0) * picture.width, max(right, 1) * picture.width,
        max(bottom, 1) * picture.height, min(top, 0) * picture.height,
    )  # fmt: skip
    return (edges[1] - edges[0]) / (edges[2] - edges[3]), edges


def _draw(axes: Axes, grid: VisionRegion, values: Any, picture: Any) -> None:
    import numpy as np

    small = picture.convert("L").copy()
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    axes.imshow(
        np.asarray(small), cmap="gray", vmin=0, vmax=320,
        extent=(0, picture.width, picture.height, 0),
    )  # fmt: skip
    top, left, bottom, right = grid.box
    place = (
        left * picture.width, right * picture.width, bottom * picture.height, top * picture.height
    )  # fmt: skip
    colour = colours(COLOURS)(0.25 + 0.7 * values.numpy())
    colour[..., 3] = 0.8 * np.sqrt(values.numpy())
    axes.imshow(colour, extent=place, interpolation="none")
    rows, columns = values.shape
    thin: Any = {"color": "white", "linewidth": 0.35, "alpha": 0.8}
    axes.hlines(np.linspace(place[3], place[2], rows + 1), place[0], place[1], **thin)
    axes.vlines(np.linspace(place[0], place[1], columns + 1), place[3], place[2], **thin)
    _, edges = _extent(grid, picture)
    axes.set_xlim(edges[0], edges[1])
    axes.set_ylim(edges[2], edges[3])
    axes.set_aspect("equal")
    axes.set_axis_off()


def _outline(axes: Axes, part: RegionPart, picture: Any) -> None:
    from matplotlib.patches import Rectangle

    if part.mask is not None:
        axes.contour(
            part.mask.float().numpy(), [0.5], colors=[OUTLINE], linewidths=1.5,
            extent=(0, picture.width, 0, picture.height), origin="upper",
        )  # fmt: skip
        return
    x0, y0, x1, y1 = part.box
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=OUTLINE, lw=1.5))


def _name(grid: VisionRegion, frames: range) -> str:
    rows, columns = grid.keys.shape
    what = f"{grid.kind} {grid.item + 1}"
    if grid.kind == "video":
        several = f"s {frames[0] + 1}-{frames[-1] + 1}" if len(frames) > 1 else f" {frames[0] + 1}"
        what += f", frame{several}"
    return f"{what}{', in detail' if grid.view else ''}: {rows} x {columns} tokens"
