"""The figures of attention maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .parts import (
    BAR,
    COLOURS,
    FONT,
    LONGEST_LABEL,
    LONGEST_SIDE,
    STRONGEST,
    axes_at,
    blend,
    colour_bar,
    colour_limit,
    colours,
    draw_bar,
    fit,
    font_for,
    need_matplotlib,
    new_figure,
    percent,
    readable,
    write,
    write_inches,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .maps import AttentionMap

SOURCE = 0.2  # inches of the line that names layer and model


def overlay(
    maps: AttentionMap,
    image: int = 0,
    token: int | None = None,
    *,
    ax: Axes | None = None,
    cmap: str = COLOURS,
    alpha: float = STRONGEST,
    clip: float = 98.0,
    path: str | Path | None = None,
) -> Any:
    """Where one token attends in one image or frame, over that picture.

    Args:
        maps: of `rk.attention_map`.
        image: number of the picture.
        token: number of the generated token; None for the mean over all tokens.
        ax: axes to draw the picture and a title into, without a colour bar.
        cmap: a colour map of matplotlib.
        alpha: opacity of the colour where attention is highest, in (0, 1].
        clip: percentile at which the colours end if the peak is far above it, but at least a 30th
            of the peak; 100 for never. The colour bar says where they end.
        path: a file to write; its suffix sets the format.

    Returns:
        The figure, or `ax`.

    Raises:
        ImportError: matplotlib is missing.
        IndexError: there is no such image or token.
        ValueError: `clip` is not in (0, 100], or `alpha` not in (0, 1]; there is no such `cmap`;
            both `ax` and `path` are given.
    """
    need_matplotlib("overlay")
    if ax is not None and path is not None:
        raise ValueError(f"viz.overlay: path must be None where ax is given; got {path}")
    grid = grid_of(maps, image, token)
    limit, note = colour_limit([grid], clip)
    picture = picture_of(maps, image)
    blended = blend(picture, grid, limit, maps.boxes[image], cmap=cmap, alpha=alpha)
    share = percent(mean_of(maps.image_shares[:, image], token))
    if ax is not None:
        ax.imshow(blended, interpolation="lanczos")
        ax.set_axis_off()
        texts = [f"{name_of(maps, token)}: {share} on this {maps.noun(image)}", source_of(maps)]
        ax.set_title(
            "\n".join(texts), fontsize=FONT - 1, loc="left", parse_math=False, **font_for(texts)
        )
        return ax
    width, height = fit(picture.width / picture.height, 6.4, 5.6)
    figure = new_figure(width + 1.5, height + 0.75 + SOURCE)
    axes = axes_at(figure, 0.15, 0.15, width, height)
    axes.imshow(blended, interpolation="lanczos")
    axes.set_axis_off()
    write(axes, 0, 1, name_of(maps, token), 8 + 32, FONT + 4, weight="bold")
    text = f"{share} of its attention is on this {maps.noun(image)}"
    write(axes, 0, 1, text, 22, FONT, colour="#444444")
    write(axes, 0, 1, source_of(maps), 6, FONT - 1, colour="#777777")
    bar = (width + 0.3, 0.15, 0.16, height)
    colour_bar(figure, bar, limit, note, what=what_of(maps), cmap=cmap, alpha=alpha)
    return finish(figure, path)


def token_grid(
    maps: AttentionMap,
    image: int = 0,
    tokens: Sequence[int] | None = None,
    *,
    columns: int | None = None,
    clip: float = 98.0,
    path: str | Path | None = None,
) -> Figure:
    """Where each token attends in one image: a small picture for each, with one colour scale.

    Above each picture are the token and the share of its attention on the image.

    Args:
        maps: of `rk.attention_map`.
        image: number of the image.
        tokens: numbers of the tokens to draw, default all.
        columns: pictures in a row; by default the figure is about 3 : 2.
        clip, path: as in `overlay`.

    Raises:
        ImportError, IndexError, ValueError: as in `overlay`.
    """
    need_matplotlib("token_grid")
    chosen = list(range(len(maps.tokens))) if tokens is None else list(tokens)
    if not chosen:
        raise ValueError("viz.token_grid: tokens must name at least one token; got none")
    grids = [grid_of(maps, image, token) for token in chosen]
    limit, note = colour_limit(grids, clip)
    picture = picture_of(maps, image)
    aspect = picture.width / picture.height
    if columns is None:
        wanted = min(len(chosen), max(1, round(math.sqrt(1.5 * len(chosen) / max(aspect, 0.5)))))
        near = range(max(1, wanted - 1), min(len(chosen), wanted + 2) + 1)
        columns = min(near, key=lambda n: (-len(chosen) % n + 1) * (2 + abs(n - wanted)))
    rows = math.ceil(len(chosen) / columns)
    tallest = min(4.5, max(2.6, 1.4 / aspect))  # so that narrow pictures stay visible
    width, height = fit(aspect, min(2.6, max(1.5, 15 / columns)), tallest)
    head = 0.34
    cell = max(width, 1.4) + 0.14  # room for a token and a share over narrow pictures
    full = columns * cell
    caption = 0.3
    figure = new_figure(full + 1.45, max(rows * (height + head), 2.2) + caption + SOURCE + 0.1)
    picture.thumbnail((480, 480))
    top = figure.get_figheight() - caption - SOURCE
    subtitle = f"each token, and the share of its attention on this {maps.noun(image)}"
    write_inches(figure, 0.1, top + SOURCE + 0.08, subtitle, FONT, "normal", "#444444")
    write_inches(figure, 0.1, top + 0.08, source_of(maps), FONT - 1, "normal", "#777777")
    for number, (token, grid) in enumerate(zip(chosen, grids, strict=True)):
        row, column = divmod(number, columns)
        axes = axes_at(
            figure, 0.1 + column * cell, top - (row + 1) * (height + head), width, height
        )
        axes.imshow(blend(picture, grid, limit, maps.boxes[image]), interpolation="lanczos")
        axes.set_axis_off()
        room = int((cell - 0.7) / 0.095)
        write(axes, 0, 1, readable(maps.tokens[token], room), 4, FONT, weight="bold")
        share = percent(float(maps.image_shares[token, image]))
        write(axes, (cell - 0.14) / width, 1, share, 4, FONT - 2, colour="#555555", align="right")
    bar_height = min(rows * (height + head) - head, 4.5)
    bar = (full + 0.1, top - head - bar_height, 0.16, bar_height)
    colour_bar(figure, bar, limit, note, what=what_of(maps))
    return finish(figure, path)


def film_strip(
    maps: AttentionMap,
    token: int | None = None,
    *,
    columns: int = 8,
    clip: float = 98.0,
    path: str | Path | None = None,
) -> Figure:
    """The frames of a video, or images, in order, each with its attention and a bar of its share.

    Args:
        maps: of `rk.attention_map`.
        token: number of the generated token; None for the mean over all tokens.
        columns: frames in a row.
        clip, path: as in `overlay`.

    Raises:
        ImportError, IndexError, ValueError: as in `overlay`.
    """
    need_matplotlib("film_strip")
    count = len(maps.grids)
    grids = [grid_of(maps, image, token) for image in range(count)]
    limit, note = colour_limit(grids, clip)
    shares = [mean_of(maps.image_shares[:, image], token) for image in range(count)]
    rows = math.ceil(count / max(1, min(columns, count)))
    columns = math.ceil(count / rows)  # rows of about the same length
    pictures = [picture_of(maps, image) for image in range(count)]
    width = min(2.4, 14.5 / columns)
    height = max(fit(p.width / p.height, width, 1.25 * width)[1] for p in pictures)
    gap, bars, head, foot = 0.06, 0.75, 0.85 + SOURCE, 0.42
    full = columns * (width + gap)
    figure = new_figure(max(full, 3.2) + 1.75, head + rows * (height + bars + foot))
    tallest = max(max(shares), 1e-9)
    unit = "second" if _timed(maps) else maps.noun(0)
    for row in range(rows):
        first, last = row * columns, min((row + 1) * columns, count)
        bottom = figure.get_figheight() - head - (row + 1) * (height + bars + foot) + foot + bars
        for place, image in enumerate(range(first, last)):
            axes = axes_at(figure, 0.6 + place * (width + gap), bottom, width, height)
            pictures[image].thumbnail((480, 480))
            shown = blend(pictures[image], grids[image], limit, maps.boxes[image])
            axes.imshow(shown, interpolation="lanczos")
            axes.set_anchor("S")
            axes.set_axis_off()
        axes = axes_at(
            figure, 0.6, bottom - bars, (last - first) * (width + gap) - gap, bars - 0.05
        )
        middles = [place + 0.5 for place in range(last - first)]
        axes.bar(middles, shares[first:last], width=0.62, color=BAR)
        axes.set_xlim(-gap / 2 / (width + gap), last - first + gap / 2 / (width + gap))
        axes.set_ylim(0, 1.45 * tallest)
        for middle, share in zip(middles, shares[first:last], strict=True):
            text = percent(share)
            axes.annotate(
                text, (middle, share), (0, 2), textcoords="offset points", ha="center",
                fontsize=FONT - 2, color="#333333",
            )  # fmt: skip
        axes.set_xticks(middles, [_below(maps, image) for image in range(first, last)])
        axes.set_yticks([])
        axes.tick_params(length=0, labelsize=FONT - 1)
        for side in ("top", "left", "right"):
            axes.spines[side].set_visible(False)
        for text, y in ((unit, -4), ("share", 3)):
            axes.annotate(
                text, (0, 0), (-6, y), xycoords="axes fraction", textcoords="offset points",
                ha="right", va="top" if y < 0 else "bottom", fontsize=FONT - 1, color="#333333",
            )  # fmt: skip
    write_inches(figure, 0.6, figure.get_figheight() - 0.36, name_of(maps, token), FONT + 4, "bold")
    text = percent(mean_of(maps.text_shares, token))
    subtitle = f"attention on the {_nouns(maps)} {percent(sum(shares))}, on text {text}"
    write_inches(figure, 0.6, figure.get_figheight() - 0.62, subtitle, FONT, "normal", "#444444")
    last_line = figure.get_figheight() - 0.62 - SOURCE
    write_inches(figure, 0.6, last_line, source_of(maps), FONT - 1, "normal", "#777777")
    long = min(figure.get_figheight() - head - foot, max(height, 3.6))
    scale = (0.6 + max(full, 3.2) + 0.08, figure.get_figheight() - head - long, 0.14, long)
    colour_bar(figure, scale, limit, note, what=what_of(maps))
    return finish(figure, path)


def token_frame(
    maps: AttentionMap, *, clip: float = 100.0, path: str | Path | None = None
) -> Figure:
    """The attention of each token on each frame or image: tokens down, frames across.

    Args:
        maps: of `rk.attention_map`.
        clip, path: as in `overlay`.

    Raises:
        ImportError, ValueError: as in `overlay`.
    """
    need_matplotlib("token_frame")
    shares = maps.image_shares.float()
    count, frames = shares.shape
    limit, note = colour_limit([shares], clip)
    cell = min(0.85, max(0.16, 11 / frames))
    line = min(0.3, max(0.15, 12 / max(count, 1)))
    labels = [readable(token, LONGEST_LABEL) for token in maps.tokens]
    left = 0.35 + 0.085 * max(len(label) for label in labels)
    width, height = max(frames * cell, 1.2), max(count * line, 1.0)
    pictures = [picture_of(maps, image) for image in range(frames)]
    # Thumbnails over the columns, if they fit.
    sizes = [fit(p.width / p.height, 0.94 * cell, 1.3 * cell) for p in pictures]
    strip = max(size[1] for size in sizes) if cell >= 0.35 else 0.0
    figure = new_figure(left + width + 1.75, height + strip + 1.3 + SOURCE)
    axes = axes_at(figure, left, 0.6, width, height)
    axes.imshow(
        (100 * shares).numpy(),
        cmap=COLOURS,
        vmin=0,
        vmax=100 * limit,
        aspect="auto",
        interpolation="none",
    )
    step = math.ceil(0.28 / (width / frames))
    axes.set_xticks(range(0, frames, step), [_below(maps, i) for i in range(0, frames, step)])
    axes.set_yticks(range(count), labels, parse_math=False, **font_for(labels))
    axes.tick_params(length=0, labelsize=FONT - 1 if line >= 0.17 else FONT - 3)
    if strip:
        above = axes_at(figure, left, 0.6 + height + 0.05, width, strip)
        for place, (picture, (across, up)) in enumerate(zip(pictures, sizes, strict=True)):
            picture.thumbnail((240, 240))
            half = across / 2 / (width / frames)
            above.imshow(
                picture, extent=(place - half, place + half, 0, up), aspect="auto",
                interpolation="lanczos",
            )  # fmt: skip
        above.set_xlim(-0.5, frames - 0.5)
        above.set_ylim(0, strip)
        above.set_axis_off()
    what = maps.noun(0) if len(set(map(maps.noun, range(frames)))) == 1 else "picture"
    axes.set_xlabel("second" if _timed(maps) else what, fontsize=FONT)
    title = f"attention by token and {what}"
    write_inches(figure, left, figure.get_figheight() - 0.4, title, FONT + 3, "bold")
    line_below = figure.get_figheight() - 0.4 - SOURCE
    write_inches(figure, left, line_below, source_of(maps), FONT - 1, "normal", "#777777")
    bar = (left + width + 0.2, 0.6, 0.16, height + strip)
    draw_bar(figure, bar, colours(), limit, f"attention on the {what}", note)
    return finish(figure, path)


# -- what a map holds ---------------------------------------------------------------------------


def finish(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        figure.savefig(path, bbox_inches="tight", pad_inches=0.12, facecolor="white")
    return figure


def picture_of(maps: AttentionMap, image: int) -> Any:
    picture = maps.images[image].convert("RGB").copy()
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return picture


def source_of(maps: AttentionMap) -> str:
    """The line that says what was looked at: layer, model, and what it is relative to."""
    relative = f", relative to “{readable(maps.relative, 32)}”" if maps.relative else ""
    return maps.source + relative


def what_of(maps: AttentionMap) -> str:
    return "attention per visual token" + (", relative" if maps.relative else "")


def _timed(maps: AttentionMap) -> bool:
    return bool(maps.times) and all(time is not None for time in maps.times)


def _below(maps: AttentionMap, image: int) -> str:
    """What stands below a picture in a row: its second, or its number."""
    return f"{maps.times[image]:.1f}" if _timed(maps) else str(image + 1)


def _nouns(maps: AttentionMap) -> str:
    found = {maps.noun(image) for image in range(len(maps.grids))}
    return f"{found.pop()}s" if len(found) == 1 else "pictures"


def grid_of(maps: AttentionMap, image: int, token: int | None) -> Tensor:
    if not 0 <= image < len(maps.grids):
        raise IndexError(f"viz: image must be in [0, {len(maps.grids)}); got {image}")
    if token is not None and not 0 <= token < len(maps.tokens):
        raise IndexError(f"viz: token must be in [0, {len(maps.tokens)}); got {token}")
    grid = maps.grids[image].float()
    return grid.mean(0) if token is None else grid[token]


def mean_of(values: Tensor, token: int | None) -> float:
    return float(values.float().mean() if token is None else values[token])


def name_of(maps: AttentionMap, token: int | None) -> str:
    if token is None and len(maps.tokens) > 1:
        return f"mean over {len(maps.tokens)} tokens"
    return readable(maps.tokens[token or 0], LONGEST_LABEL)
