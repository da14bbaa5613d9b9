"""Parts of the figures: colours over a picture, labels, places in inches, colour bars."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = "inferno"
GREY, FAINTEST, STRONGEST = 0.85, 0.2, 0.85  # lightness of the picture, opacity of low and high
BAR = "#4C72B0"
FONT = 11
LONGEST_SIDE = 1024  # pixels of a drawn picture; the figure cannot show more
LONGEST_LABEL = 20
SINK = 3.0  # the scale ends early if the peak is this many times the percentile
DEEPEST = 1 / 30  # of the peak: the scale ends no lower
# Fonts for signs that matplotlib's own lacks; the installed ones are used, in this order.
FALLBACKS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "Hiragino Sans", "PingFang SC",
    "Microsoft YaHei", "Malgun Gothic", "Noto Sans Devanagari", "Noto Sans Arabic",
    "Noto Emoji", "Symbola", "Segoe UI Emoji", "Arial Unicode MS",
)  # fmt: skip


def blend(
    picture: Any,
    grid: Tensor,
    limit: float,
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
    *,
    cmap: str = COLOURS,
    alpha: float = STRONGEST,
) -> Any:
    """A picture in grey under its attention in colour: uint8 [height, width, 3].

    The grid is clamped to `limit` and then interpolated, bicubic, between the centres of its cells.
    So a sink stays as small as its cell. Colour and opacity grow with the attention.

    Args:
        picture: a Pillow image.
        grid: [rows, columns] attention.
        limit: attention of the last colour, > 0.
        box: (top, left, bottom, right) of the grid in the picture, as fractions.
        cmap: a colour map of matplotlib.
        alpha: opacity of the last colour, in (0, 1].

    Raises:
        ValueError: alpha or cmap is not what it must be.
    """
    import numpy as np

    top, left, bottom, right = box
    height, width = picture.height, picture.width
    canvas = (max(1, round((bottom - top) * height)), max(1, round((right - left) * width)))
    smooth = torch.nn.functional.interpolate(
        grid.float().clamp(max=limit)[None, None], size=canvas, mode="bicubic", align_corners=False
    )[0, 0]
    drawn = torch.zeros(height, width)  # no attention where the grid does not reach
    y, x = round(top * height), round(left * width)
    shown = smooth[max(0, -y) : height - y, max(0, -x) : width - x] / limit
    drawn[max(0, y) :, max(0, x) :][: shown.shape[0], : shown.shape[1]] = shown.clamp(0, 1)
    weight = drawn.numpy()
    colour = colours(cmap)(weight)[..., :3]
    opacity = opacities(alpha, weight[..., None])
    grey = GREY * np.asarray(picture.convert("L"), dtype=np.float32)[..., None] / 255
    return (255 * (opacity * colour + (1 - opacity) * grey)).round().astype(np.uint8)


def opacities(alpha: float, weight: Any) -> Any:
    """Opacity of the colour where attention is `weight` of the last colour's."""
    if not 0 < alpha <= 1:
        raise ValueError(f"viz: alpha must be in (0, 1]; got {alpha}")
    faintest = min(FAINTEST, alpha)
    return faintest + (alpha - faintest) * weight


def colour_limit(grids: Sequence[Tensor], clip: float) -> tuple[float, str]:
    """The value at which colours end, and a note if that is not the largest value.

    If the largest value is more than `SINK` times the percentile `clip`, colours end at the
    percentile, but at least at `DEEPEST` of the largest value. Where one token has nearly all
    attention, the others are dark because theirs is small.
    """
    if not 0 < clip <= 100:
        raise ValueError(f"viz: clip must be a percentile in (0, 100]; got {clip}")
    values = torch.cat([grid.flatten() for grid in grids]).float().sort().values
    peak = float(values[-1])
    # The largest value at or below the percentile: interpolated, one sink would lift it.
    percentile = float(values[max(0, math.floor(clip / 100 * len(values)) - 1)])
    if clip == 100 or peak <= SINK * percentile:
        return (peak if peak > 0 else 1.0), ""
    if percentile >= DEEPEST * peak:
        return percentile, f"colours end at percentile {clip:g}; peak {percent(peak)}"
    return DEEPEST * peak, f"colours end at 1/{1 / DEEPEST:.0f} of the peak, {percent(peak)}"


def need_matplotlib(function: str) -> None:
    try:
        import matplotlib  # noqa: F401
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"viz.{function} needs matplotlib and Pillow: `pip install matplotlib pillow`"
        ) from error


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120)


def share_of(
    figure: Figure, inches: tuple[float, float, float, float]
) -> tuple[float, float, float, float]:
    across, up = figure.get_size_inches()
    left, bottom, width, height = inches
    return left / across, bottom / up, width / across, height / up


def axes_at(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place in inches, so that computed layouts do not overlap."""
    return figure.add_axes(share_of(figure, (left, bottom, width, height)))


def fit(aspect: float, width: float, height: float) -> tuple[float, float]:
    """The largest size of an aspect (width / height) inside a box."""
    return (width, width / aspect) if width / aspect <= height else (height * aspect, height)


def percent(share: float) -> str:
    value = 100 * share
    if value >= 9.95 or value == 0:
        return f"{value:.0f} %"
    return f"{value:.1f} %" if value >= 0.095 else f"{value:.1g} %"


def readable(token: str, longest: int) -> str:
    """A token as a title: without the space before it, with signs for invisible characters."""
    text = token.strip(" ") or token.replace(" ", "␣")
    text = text.replace("\r\n", "↵").replace("\n", "↵").replace("\t", "⇥")
    text = "".join(sign if sign.isprintable() else f"U+{ord(sign):04X}" for sign in text)
    text = drawable(text) or "∅"
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def families() -> list[str]:
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in FALLBACKS if name in installed)]


def drawable(text: str) -> str:
    """The text with codes such as U+6F22 in place of signs that no installed font has."""
    if text.isascii():
        return text
    from matplotlib import font_manager

    files = [font_manager.findfont(name) for name in families()]
    fonts = [font_manager.get_font(file) for file in files]
    return "".join(
        sign if any(font.get_char_index(ord(sign)) for font in fonts) else f"U+{ord(sign):04X}"
        for sign in text
    )


def font_for(texts: Sequence[str]) -> dict[str, Any]:
    return {} if all(text.isascii() for text in texts) else {"fontfamily": families()}


def write(
    axes: Axes, x: float, y: float, text: str, above: float, size: float, *,
    weight: str = "normal", colour: str = "black", align: str = "left",
) -> None:  # fmt: skip
    """Text `above` points over a place in the axes; a "$" does not start a formula."""
    axes.annotate(
        text, (x, y), (0, above), xycoords="axes fraction", textcoords="offset points",
        fontsize=size, weight=weight, color=colour, ha=align, va="bottom", parse_math=False,
        **font_for([text]),
    )  # fmt: skip


def write_inches(
    figure: Figure, left: float, bottom: float, text: str, size: float, weight: str,
    colour: str = "black",
) -> None:  # fmt: skip
    x, y, _, _ = share_of(figure, (left, bottom, 1, 1))
    figure.text(
        x, y, text, fontsize=size, weight=weight, color=colour, parse_math=False, **font_for([text])
    )


def colours(cmap: str = COLOURS) -> Any:
    import matplotlib

    if cmap not in matplotlib.colormaps:
        raise ValueError(f"viz: cmap must be a colour map of matplotlib; got {cmap!r}")
    return matplotlib.colormaps[cmap]


def faded_colours(cmap: str = COLOURS, alpha: float = STRONGEST) -> Any:
    """The colours of `blend` over a middle grey, for the colour bar."""
    import numpy as np
    from matplotlib.colors import ListedColormap

    weight = np.linspace(0, 1, 256)[:, None]
    opacity = opacities(alpha, weight)
    mixed = opacity * colours(cmap)(weight[:, 0])[:, :3] + (1 - opacity) * GREY * 0.5
    return ListedColormap(mixed, name="blended")


def colour_bar(
    figure: Figure,
    inches: tuple[float, float, float, float],
    limit: float,
    note: str,
    *,
    what: str = "attention per visual token",
    cmap: str = COLOURS,
    alpha: float = STRONGEST,
) -> None:
    draw_bar(figure, inches, faded_colours(cmap, alpha), limit, what, note)


def draw_bar(
    figure: Any,
    inches: tuple[float, float, float, float],
    colour_map: Any,
    limit: float,
    what: str,
    note: str,
) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    height = inches[3]
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 100 * limit), colour_map),
        cax=figure.add_axes(share_of(figure, inches)),
        extend="max" if note else "neither",
        extendfrac=0.04,
    )
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(nbins=5 if height > 1.5 else 3, steps=[1, 2, 2.5, 5, 10])
    bar.formatter = FuncFormatter(lambda value, _: f"{value:.6g} %")
    bar.update_ticks()
    bar.ax.tick_params(length=0, labelsize=FONT - 2, pad=3)
    # A letter is about 0.08 inches wide; longer lines would be longer than the bar.
    lines = [textwrap.fill(line, max(12, int(height / 0.08))) for line in (what, note) if line]
    bar.set_label("\n".join(lines), fontsize=FONT - 1)
