"""The figure of a question about frames: the frames, attention on them for some words, shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .parts import blend, colour_limit, font_for, need_matplotlib, readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .maps import AttentionMap

COLUMNS = 8  # frames in a line
_INCHES, _DPI = 11.0, 130  # width
_LEFT, _RIGHT, _GAP = 1.5, 0.3, 0.1
_TOP, _NAME, _BARS, _BETWEEN = 1.05, 0.24, 0.75, 0.24  # heights of what is no picture
_INK, _SOFT, _QUIET, _ACCENT = "#1f2328", "#59636e", "#c9ced6", "#e8590c"
_LETTER = 0.0098  # inches, the width of a letter by its size
_NARROWEST = 0.5  # height of a picture by its width, the most


def attention_over_frames(
    maps: AttentionMap,
    *,
    question: str,
    answer: str | None = None,
    names: Sequence[str] = (),
    tokens: Sequence[int] | None = None,
    clip: float = 100.0,
    path: str | Path | None = None,
) -> Figure:
    """Frames or images as the model saw them, where it looked, and the share of each as a bar.

    Each row has its own scale of colours, which ends at its largest value or at `clip`; bars of all
    rows have one. The bar of a row's largest share stands out.

    Args:
        maps: of `rk.attention_map`.
        question, answer: above the frames; by default the answer is the map's text.
        names: of the frames, such as their times; by default their numbers.
        tokens: numbers of the answer's tokens to draw, a row each; by default one row, the mean
            over all of them.
        clip, path: as in `overlay`.

    Raises:
        ImportError, IndexError, ValueError: as in `overlay`.
        ValueError: there are more or fewer names than frames.
    """
    need_matplotlib("attention_over_frames")
    from matplotlib.figure import Figure

    count = len(maps.images)
    names = names or [str(image + 1) for image in range(count)]
    if len(names) != count:
        raise ValueError(
            f"viz.attention_over_frames: names must be one for each of {count} frames; got "
            f"{len(names)}"
        )
    rows = [_Row(maps, token, clip) for token in ([None] if tokens is None else tokens)]
    tallest = max(share for row in rows for share in row.shares)
    lines = math.ceil(count / COLUMNS)
    columns = math.ceil(count / lines)
    # Few frames are not drawn larger than eight.
    width = (_INCHES - _LEFT - _RIGHT) / COLUMNS - _GAP
    pictures = [_shown(image, width) for image in maps.images]
    height = min(max(p.height / p.width for p in pictures), 1 / _NARROWEST) * width
    line = _NAME + height + len(rows) * (_BETWEEN + height + _BARS) + _BETWEEN
    full = _LEFT + columns * (width + _GAP) - _GAP + _RIGHT
    figure = Figure(figsize=(max(full, 6.0), _TOP + lines * line), dpi=_DPI)
    page = _Page(figure)
    page.line(0.42, question, size=17, weight="bold", colour=_INK)
    page.line(0.78, f"answer: {maps.text if answer is None else answer}", size=12, colour=_SOFT)
    for number in range(lines):
        chosen = range(number * columns, min((number + 1) * columns, count))
        places = [_LEFT + place * (width + _GAP) for place in range(len(chosen))]
        top = _TOP + number * line
        for left, image in zip(places, chosen, strict=True):
            page.write(
                left + width / 2, top + 0.13, names[image], size=11, colour=_SOFT, align="center"
            )
            page.picture(left, top + _NAME, width, height, pictures[image])
        page.write(0.3, top + _NAME + height / 2, "it sees", colour=_SOFT)
        top += _NAME + height + _BETWEEN
        for row in rows:
            for left, image in zip(places, chosen, strict=True):
                drawn = blend(pictures[image], row.grids[image], row.limit, maps.boxes[image])
                page.picture(left, top, width, height, drawn)
            page.write(0.3, top + height / 2 - 0.13, "as it writes", size=10, colour=_SOFT)
            size = 15 if len(row.name) <= 8 else 12
            page.write(
                0.3, top + height / 2 + 0.13, row.name, size=size, weight="bold", colour=_INK
            )
            shares = [row.shares[image] for image in chosen]
            page.bars(places[0], top + height, width, shares, max(row.shares), tallest)
            page.write(
                0.3, top + height + _BARS - 0.12, f"{row.text:.0%} on text", size=10, colour=_SOFT
            )
            top += height + _BARS + _BETWEEN
    if path is not None:
        figure.savefig(path, facecolor="white")
    return figure


class _Row:
    """One token of the answer, or the mean over all."""

    def __init__(self, maps: AttentionMap, token: int | None, clip: float) -> None:
        if token is not None and not 0 <= token < len(maps.tokens):
            raise IndexError(f"viz: token must be in [0, {len(maps.tokens)}); got {token}")
        chosen = slice(None) if token is None else slice(token, token + 1)
        self.grids = [grid[chosen].float().mean(0) for grid in maps.grids]
        self.limit, _ = colour_limit(self.grids, clip)
        self.shares = maps.image_shares[chosen].float().mean(0).tolist()
        self.text = float(maps.text_shares[chosen].float().mean())
        self.name = "its answer" if token is None else readable(maps.tokens[token], 10)


class _Page:
    """A figure on which things have places in inches from its upper left corner."""

    def __init__(self, figure: Figure) -> None:
        self._figure = figure
        self._width, self._height = figure.get_size_inches()

    def _axes(self, left: float, top: float, width: float, height: float) -> Axes:
        box = (left / self._width, 1 - (top + height) / self._height)
        axes = self._figure.add_axes((*box, width / self._width, height / self._height))
        axes.set_axis_off()
        return axes

    def write(
        self, left: float, middle: float, text: str, *, size: float = 11, weight: str = "normal",
        colour: str, align: str = "left",
    ) -> None:  # fmt: skip
        self._figure.text(
            left / self._width, 1 - middle / self._height, text, size=size, weight=weight,
            color=colour, ha=align, va="center", parse_math=False, **font_for([text]),
        )  # fmt: skip

    def line(
        self, middle: float, text: str, *, size: float, weight: str = "normal", colour: str
    ) -> None:
        """Text over the whole width: a long one is smaller by up to a third, and then cut."""
        room = (self._width - 0.6) / _LETTER
        text = readable(text, int(1.5 * room / size))
        size = min(size, room / max(len(text), 1))
        self.write(0.3, middle, text, size=size, weight=weight, colour=colour)

    def picture(self, left: float, top: float, width: float, height: float, image: Any) -> None:
        self._axes(left, top, width, height).imshow(image, interpolation="none")

    def bars(
        self,
        left: float,
        top: float,
        width: float,
        shares: Sequence[float],
        most: float,
        tallest: float,
    ) -> None:
        step = width + _GAP
        axes = self._axes(left, top, len(shares) * step - _GAP, _BARS)
        middles = [number * step + width / 2 for number in range(len(shares))]
        colours = [_ACCENT if share == most else _QUIET for share in shares]
        axes.bar(middles, shares, width=0.55 * width, color=colours)
        axes.set_xlim(0, len(shares) * step - _GAP)
        axes.set_ylim(0, 1.45 * max(tallest, 1e-9))  # room for the numbers
        axes.axhline(0, color=_QUIET, linewidth=0.8)
        for middle, share, colour in zip(middles, shares, colours, strict=True):
            axes.annotate(
                f"{share:.0%}", (middle, share), (0, 2), textcoords="offset points", ha="center",
                size=10, color=_INK if colour == _ACCENT else _SOFT,
                weight="bold" if colour == _ACCENT else "normal",
            )  # fmt: skip


def _shown(image: Any, width: float) -> Any:
    """A picture of as many pixels as are drawn, so that a small one has a smooth overlay, too."""
    wide = round(_DPI * width)
    high = max(1, round(wide * image.height / image.width))
    return image.convert("RGB").resize((wide, high), 3)  # bicubic
