"""Small multiples over layers and heads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .figures import finish, mean_of, name_of, picture_of, source_of, what_of
from .parts import (
    FONT,
    axes_at,
    blend,
    colour_bar,
    colour_limit,
    need_matplotlib,
    new_figure,
    percent,
    write_inches,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .maps import AttentionMap

PIXELS = 160  # a side of a panel at most
LABELLED = 40  # panels at most that say their share


def layer_head_grid(
    maps: AttentionMap,
    image: int = 0,
    token: int | None = None,
    *,
    clip: float = 98.0,
    path: str | Path | None = None,
) -> Figure:
    """Where each kept layer and head attends in one picture: layers down, heads across.

    Layers alone, or heads alone, fill rows one after the other. All panels share one colour scale.
    Up to 40 of them also say which share of the attention is on the picture.

    Args:
        maps: of `rk.attention_map` with by_layer=True, by_head=True, or both.
        image: number of the picture.
        token: number of the generated token; None for the mean over all tokens.
        clip, path: as in `overlay`.

    Raises:
        ImportError, IndexError: as in `overlay`.
        ValueError: as in `overlay`; or neither layers nor heads were kept.
    """
    need_matplotlib("layer_head_grid")
    parts = maps.parts
    if parts is None:
        raise ValueError(
            "viz.layer_head_grid: maps must keep layers or heads (attention_map with by_layer=True "
            "or by_head=True); got a map that keeps neither"
        )
    name, picture = name_of(maps, token), picture_of(maps, image)
    both = bool(parts.layers) and parts.heads > 0
    grids = parts.grids[image].float()
    shares = parts.image_shares[..., image].float()
    grids, shares = (x.mean(2) if token is None else x[:, :, token] for x in (grids, shares))
    limit, note = colour_limit([grids], clip)
    cells = [(layer, head) for layer in range(grids.shape[0]) for head in range(grids.shape[1])]
    aspect = picture.width / picture.height
    columns = grids.shape[1] if both else _columns(len(cells), aspect)
    rows = math.ceil(len(cells) / columns)
    labelled = len(cells) <= LABELLED
    width = min(2.0, 13.0 / columns)
    width = min(width, max(0.2, 11.0 / rows) * aspect)
    height = width / aspect
    gap, head_room = 0.05, 0.24 if labelled or not both else 0.0
    left, top = (0.75, 1.3) if both else (0.15, 0.95)
    full = (columns * (width + gap), rows * (height + gap + head_room))
    figure = new_figure(left + max(full[0], 3.6) + 1.5, top + max(full[1], 1.8) + 0.1)
    side = max(48, round(2 * figure.dpi * max(width, height)))  # twice what the figure shows
    picture.thumbnail((min(PIXELS, side),) * 2)
    high = figure.get_figheight()
    if both and not labelled:
        axes = axes_at(figure, left, high - top - full[1] + gap, full[0] - gap, full[1] - gap)
        axes.imshow(_mosaic(maps, image, grids, limit, picture, gap / width), aspect="auto")
        axes.set_axis_off()
        cells = []
    for number, (layer, head) in enumerate(cells):
        row, column = divmod(number, columns)
        x = left + column * (width + gap)
        y = high - top - (row + 1) * (height + gap + head_room) + gap
        axes = axes_at(figure, x, y, width, height)
        axes.imshow(blend(picture, grids[layer, head], limit, maps.boxes[image]), aspect="auto")
        axes.set_axis_off()
        share = percent(float(shares[layer, head]))
        if not both:
            own = f"layer {parts.layers[layer]}" if parts.layers else f"head {head}"
            _label(axes, f"{own}, {share}" if width > 1.1 else own.split()[1], 2)
        elif labelled:
            _label(axes, share, 2)
    if both:
        step = math.ceil(0.3 / (width + gap))
        for head in range(0, columns, step):
            place = left + head * (width + gap) + width / 2
            _centred(figure, place, high - top + 0.06, str(head))
        _centred(figure, left + full[0] / 2, high - top + 0.27, "head")
        step = math.ceil(0.2 / (height + gap + head_room))
        for row in range(0, rows, step):
            y = high - top - row * (height + gap + head_room) - head_room - height / 2 - 0.06
            write_inches(figure, 0.45, y, str(parts.layers[row]), FONT - 2, "normal", "#333333")
        figure.text(
            0.25 / figure.get_figwidth(), (high - top - full[1] / 2) / high, "layer",
            rotation=90, ha="center", va="center", fontsize=FONT - 1, color="#333333",
        )  # fmt: skip
    write_inches(figure, 0.15, high - 0.34, name, FONT + 4, "bold")
    seen = percent(mean_of(maps.image_shares[:, image], token))
    text = f"{maps.name(image)}, {seen} on it: {source_of(maps)}"
    write_inches(figure, 0.15, high - 0.6, text, FONT, "normal", "#444444")
    long = min(max(full[1], 1.8), 4.5)
    bar = (left + max(full[0], 3.6) + 0.1, high - top - long, 0.14, long)
    colour_bar(figure, bar, limit, note, what=what_of(maps))
    return finish(figure, path)


def _mosaic(
    maps: AttentionMap, image: int, grids: Tensor, limit: float, picture: Any, gap: float
) -> Any:
    """All panels as one array: hundreds of axes would take a minute."""
    import numpy as np

    layers, heads = grids.shape[:2]
    across = picture.width + max(1, round(gap * picture.width))
    down = picture.height + max(1, round(gap * picture.width))
    whole = np.full((layers * down, heads * across, 3), 255, np.uint8)
    for layer in range(layers):
        for head in range(heads):
            panel = blend(picture, grids[layer, head], limit, maps.boxes[image])
            y, x = layer * down, head * across
            whole[y : y + picture.height, x : x + picture.width] = panel
    return whole[
        : down * layers - (down - picture.height), : across * heads - (across - picture.width)
    ]


def _columns(count: int, aspect: float) -> int:
    """Columns of panels so that the figure is about 3 : 2."""
    return min(count, max(1, round(math.sqrt(1.5 * count / max(aspect, 0.5)))))


def _label(axes: Any, text: str, above: float) -> None:
    axes.annotate(
        text, (0, 1), (0, above), xycoords="axes fraction", textcoords="offset points",
        fontsize=FONT - 3, color="#333333", ha="left", va="bottom",
    )  # fmt: skip


def _centred(figure: Any, x: float, y: float, text: str) -> None:
    across, up = figure.get_size_inches()
    figure.text(x / across, y / up, text, ha="center", fontsize=FONT - 2, color="#333333")
