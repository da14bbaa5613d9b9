"""An attention map as one page that needs no network: `viewer.html` with the data in place."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from .parts import FAINTEST, GREY, STRONGEST, colour_limit, colours, need_matplotlib

if TYPE_CHECKING:
    from .maps import AttentionMap

SIDES = (512, 384, 256, 160, 96)  # pixels of a picture's longer side, tried in turn
QUALITY = 82  # of JPEG
CLIP = 98.0  # percentile at which colours end, as in the figures
LETTERS = 4 / 3  # of base64 for a byte
TEXT = 100_000  # bytes kept free for the template and for names


def write_html(
    maps: AttentionMap,
    path: str | Path,
    *,
    cmap: str = "inferno",
    max_bytes: int = 20_000_000,
) -> Path:
    """Write a page with the answer's words to point at, its pictures, and shares as bars.

    It shows the map and, where `maps.parts` were kept, each layer and head. Arrow keys step through
    words and pictures. It runs no code but its own and asks no other machine.

    Attention is stored in 8 bits: the square root of a visual token's part of the word's largest,
    so small values stay apart. Pictures are JPEG of 512 pixels at most. Where that exceeds
    `max_bytes`, single layers and heads are pooled into coarser cells, and the page says so; then
    pictures shrink.

    Args:
        maps: of `rk.attention_map`.
        path: the file to write.
        cmap: a colour map of matplotlib.
        max_bytes: how large the file may be.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib or Pillow is missing.
        OSError: the file cannot be written.
        ValueError: there is no such colour map, or the map does not fit into `max_bytes`.
    """
    need_matplotlib("write_html")
    data = _data(maps, cmap, max_bytes - TEXT)
    title = f"{maps.prompt or 'Attention map'} - {maps.source}"
    page = files(__package__).joinpath("viewer.html").read_text(encoding="utf-8")
    # "<" would let a text close the script that holds it.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    page = page.replace("__TITLE__", html.escape(title), 1)
    head, tail = page.split("__DATA__", 1)
    Path(path).write_text(head + text + tail, encoding="utf-8")
    return Path(path)


def _data(maps: AttentionMap, cmap: str, room: int) -> dict[str, Any]:
    words = maps.words
    shapes = [(int(grid.shape[-2]), int(grid.shape[-1])) for grid in maps.grids]
    layers, heads = (maps.parts.layers, maps.parts.heads) if maps.parts else ((), 0)
    singles = (len(layers) + 1) * (heads + 1) - 1

    def size(coarse: int) -> int:
        """Bytes of the views, with single layers and heads in cells of `coarse` tokens a side."""
        cells = [sum(_cells(shape, factor) for shape in shapes) for factor in (1, coarse)]
        shares = 2 * len(shapes)
        numbers = (len(words) + 1) * ((cells[0] + shares) + singles * (cells[1] + shares))
        return math.ceil(LETTERS * numbers) + 12 * (singles + 1) * (len(words) + 20)

    most = max(max(shape) for shape in shapes)
    factors = [2**power for power in range(math.ceil(math.log2(most)) + 1)]
    for side in SIDES:
        pictures = [_jpeg(image, side) for image in maps.images]
        left = room - math.ceil(LETTERS * sum(map(len, pictures)))
        fitting = [factor for factor in factors if size(factor) <= left]
        # Smaller pictures are tried before cells grow beyond four tokens a side.
        if fitting and (fitting[0] <= 4 or side == SIDES[-1]):
            break
    else:
        raise ValueError(
            f"viz.write_html: max_bytes must hold the map, which takes "
            f"{size(factors[-1]) + room - left:,} bytes; got {room + TEXT:,}. `select` keeps fewer "
            "tokens, and by_layer or by_head=False fewer views"
        )
    coarse = fitting[0] if singles else 1
    return {
        "prompt": maps.prompt,
        "relative": maps.relative,
        "words": [word.text for word in words],
        "layers": list(layers),
        "layer_name": maps.source,
        "heads": heads,
        "lut": _letters(_colours(cmap)),
        "faintest": FAINTEST,
        "strongest": STRONGEST,
        "grey": GREY,
        "pictures": [
            {
                "src": f"data:image/jpeg;base64,{_letters(pictures[i])}",
                "name": maps.name(i),
                "noun": maps.noun(i),
                "short": _short(maps, i),
                "rows": shapes[i][0],
                "columns": shapes[i][1],
                "box": list(maps.boxes[i]),
            }
            for i in range(len(pictures))
        ],
        "views": list(_views(maps, coarse)),
    }


def _views(maps: AttentionMap, coarse: int) -> Iterator[dict[str, Any]]:
    """The map itself, then each layer and head that was kept."""
    tokens = [word.tokens for word in maps.words]
    layers, heads = (maps.parts.layers, maps.parts.heads) if maps.parts else ((), 0)
    for layer in (None, *layers):
        for head in (None, *range(heads)):
            single = layer is not None or head is not None
            factor = coarse if single else 1
            view = maps.at(layer=layer, head=head)
            grids = [_pooled(_by_word(grid, tokens), factor) for grid in view.grids]
            cells = torch.cat([grid.flatten(1) for grid in grids], dim=1)
            peaks = cells.amax(1)
            roots = (cells / peaks.clamp(min=1e-30)[:, None]).clamp(0, 1).sqrt()
            limit, note = colour_limit([cells[1:]], CLIP)
            shares = _by_word(view.image_shares, tokens)
            yield {
                "layer": layer,
                "head": head,
                "source": view.source,
                "coarse": factor,
                "limit": round(limit, 9),
                "note": note,
                "peaks": [float(f"{peak:.6g}") for peak in peaks.tolist()],
                "cells": _letters((255 * roots).round().to(torch.uint8).numpy().tobytes()),
                "shares": _letters(
                    (65535 * shares.clamp(0, 1)).round().numpy().astype("<u2").tobytes()
                ),
            }


def _by_word(values: Tensor, tokens: Sequence[Sequence[int]]) -> Tensor:
    """Values [T, ...] as their mean over all tokens, and then over those of each word."""
    weights = torch.zeros(len(tokens) + 1, len(values))
    weights[0] = 1 / len(values)
    for row, numbers in enumerate(tokens, 1):
        weights[row, list(numbers)] = 1 / len(numbers)
    return torch.tensordot(weights, values.float(), dims=1)


def _cells(shape: tuple[int, int], factor: int) -> int:
    return math.ceil(shape[0] / factor) * math.ceil(shape[1] / factor)


def _pooled(grid: Tensor, factor: int) -> Tensor:
    """The mean over cells of `factor` x `factor`."""
    if factor == 1:
        return grid
    rows, columns = (math.ceil(edge / factor) for edge in grid.shape[-2:])
    return adaptive_avg_pool2d(grid, (rows, columns))


def _jpeg(image: Any, side: int) -> bytes:
    picture = image.convert("RGB")
    picture.thumbnail((side, side), reducing_gap=2.0)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=QUALITY, optimize=True)
    return stream.getvalue()


def _colours(cmap: str) -> bytes:
    table = colours(cmap).resampled(256)(range(256))[:, :3]
    return bytes((255 * table).round().astype("uint8").tobytes())


def _letters(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _short(maps: AttentionMap, image: int) -> str:
    """What stands under a small picture."""
    time = maps.times[image] if maps.times else None
    return str(image + 1) if time is None else f"{time:.1f} s"
