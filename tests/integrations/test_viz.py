"""What the pictures show, and that nothing in them overlaps."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from ral_kernels import viz
from ral_kernels.integrations.transformers.attention_map import AttentionMap
from ral_kernels.viz import parts

WORDS = (
    " a", " cup", " internationalization", " of", "\n\n", " né", " $x_1$", "<|im_end|>",
    " supercalifragilisticexpialidocious", " ", "\t", "",
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def maps_of(
    shapes: Sequence[tuple[int, int]] = ((10, 15),),
    tokens: Sequence[str] = WORDS,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> AttentionMap:
    """Random maps; sizes: (width, height) of the pictures, default those of the grids."""
    generator = torch.Generator().manual_seed(0)
    grids = [torch.rand(len(tokens), *shape, generator=generator) for shape in shapes]
    total = torch.stack([grid.sum((1, 2)) for grid in grids]).sum(0) / 0.7
    grids = [grid / total[:, None, None] for grid in grids]
    shares = torch.stack([grid.sum((1, 2)) for grid in grids], dim=-1)
    return AttentionMap(
        tokens=tuple(tokens),
        token_ids=torch.arange(len(tokens)),
        text="".join(tokens),
        grids=tuple(grids),
        boxes=((0.0, 0.0, 1.0, 1.0),) * len(grids),
        image_shares=shares,
        text_shares=1 - shares.sum(-1),
        images=tuple(
            Image.new("RGB", size, (120, 120, 120))
            for size in sizes or [(28 * columns, 28 * rows) for rows, columns in shapes]
        ),
        layers=(0,),
    )


def drawn(figure: Figure) -> Any:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas


def texts_and_axes(figure: Figure) -> tuple[list[Any], list[Any]]:
    """The boxes in pixels of every visible text, and of every panel."""
    renderer = drawn(figure).get_renderer()
    texts: list[Any] = figure.findobj(Text)
    shown = [
        text.get_window_extent(renderer)
        for text in texts
        if text.get_text().strip() and text.get_visible()
    ]
    return shown, [axes.get_window_extent(renderer) for axes in figure.axes]


def parts_of(layers: int, heads: int, shape: tuple[int, int] = (4, 6)) -> AttentionMap:
    maps = maps_of([shape], WORDS[:2])
    generator = torch.Generator().manual_seed(1)
    lead = (max(layers, 1), max(heads, 1), 2)
    grid = torch.rand(*lead, *shape, generator=generator) / shape[0] / shape[1]
    shares = grid.sum((-2, -1))
    numbers = tuple(range(layers))
    return replace(maps, parts=viz.Parts(numbers, heads, (grid,), shares[..., None], 1 - shares))


def of_a_film(count: int) -> AttentionMap:
    times = tuple(0.5 * number for number in range(count))
    return replace(maps_of([(4, 6)] * count), kinds=("frame",) * count, times=times)


FIGURES: dict[str, Any] = {
    "layers": lambda: viz.layer_head_grid(parts_of(7, 0)),
    "heads": lambda: viz.layer_head_grid(parts_of(0, 5), token=1),
    "layers, many": lambda: viz.layer_head_grid(parts_of(45, 0, (2, 3))),
    "layers and heads": lambda: viz.layer_head_grid(parts_of(3, 4)),
    "layers and heads, many": lambda: viz.layer_head_grid(parts_of(9, 9)),
    "layers and heads, tall": lambda: viz.layer_head_grid(parts_of(4, 16, (9, 3))),
    "film strip of a video": lambda: viz.film_strip(of_a_film(11)),
    "token by frame of a video": lambda: viz.token_frame(of_a_film(11)),
    "overlay": lambda: viz.overlay(maps_of(), 0, 8),
    "overlay, wide": lambda: viz.overlay(maps_of([(2, 20)])),
    "overlay, tall": lambda: viz.overlay(maps_of([(20, 3)]), 0, 2),
    "token grid": lambda: viz.token_grid(maps_of()),
    "token grid, wide": lambda: viz.token_grid(maps_of([(2, 20)])),
    "token grid, tall": lambda: viz.token_grid(maps_of([(30, 5)])),
    "token grid, one": lambda: viz.token_grid(maps_of(tokens=WORDS[:1])),
    "film strip": lambda: viz.film_strip(maps_of([(4, 6)] * 19), 2),
    "film strip, one": lambda: viz.film_strip(maps_of(), 2),
    "film strip, mixed": lambda: viz.film_strip(maps_of([(10, 15), (20, 4), (2, 20)])),
    "over frames, one": lambda: viz.attention_over_frames(maps_of(), question="W " * 200),
    "over frames, mixed": lambda: viz.attention_over_frames(
        maps_of([(10, 15), (20, 4), (2, 20)]), question="Which?", tokens=[2, 8]
    ),
    "over frames, many": lambda: viz.attention_over_frames(
        maps_of([(2, 2)] * 19), question="Which of these is it, and why do you think so?"
    ),
    "token by frame": lambda: viz.token_frame(maps_of([(4, 6)] * 9)),
    "token by frame, many": lambda: viz.token_frame(maps_of([(2, 3)] * 64, WORDS * 10)),
    "token by frame, mixed": lambda: viz.token_frame(maps_of([(10, 15), (20, 4), (2, 20)])),
    "token by frame, one": lambda: viz.token_frame(maps_of(tokens=WORDS[:1])),
}


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_covers_another(name: str) -> None:
    texts, _ = texts_and_axes(FIGURES[name]())
    assert len(texts) > 2
    for number, first in enumerate(texts):
        for second in texts[:number]:
            across = min(first.x1, second.x1) - max(first.x0, second.x0)
            up = min(first.y1, second.y1) - max(first.y0, second.y0)
            # Boxes are of the line, ascenders and descenders included.
            assert across <= 1 or up <= 4, (first, second)


@pytest.mark.parametrize("name", FIGURES)
def test_panels_are_apart_and_inside(name: str) -> None:
    figure = FIGURES[name]()
    _, panels = texts_and_axes(figure)
    width, height = figure.get_size_inches() * figure.dpi
    for number, first in enumerate(panels):
        assert first.x0 >= 0 and first.y0 >= 0 and first.x1 <= width and first.y1 <= height
        for second in panels[:number]:
            across = min(first.x1, second.x1) - max(first.x0, second.x0)
            up = min(first.y1, second.y1) - max(first.y0, second.y0)
            assert across <= 0.5 or up <= 0.5


@pytest.mark.parametrize("name", [name for name in FIGURES if "overlay" in name or "grid" in name])
def test_pictures_keep_their_aspect(name: str) -> None:
    figure = FIGURES[name]()
    drawn(figure)
    for axes in figure.axes:
        for image in axes.images:
            rows, columns = image.get_array().shape[:2]
            box = axes.get_window_extent()
            assert box.width / box.height == pytest.approx(columns / rows, rel=0.03)


def test_narrow_pictures_leave_room_for_tokens() -> None:
    labels = [text.get_text() for axes in FIGURES["token grid, tall"]().axes for text in axes.texts]
    assert any(label.startswith("intern") for label in labels)


@pytest.mark.parametrize("suffix", ["png", "jpg", "pdf", "svg"])
def test_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"map.{suffix}"
    assert isinstance(viz.overlay(maps_of(), path=path), Figure)
    assert path.stat().st_size > 2000
    if suffix in ("png", "jpg"):
        with Image.open(path) as picture:
            assert picture.width > 600


@pytest.mark.parametrize("cell", [(0, 0), (0, 14), (9, 0), (3, 11)])
def test_blend_is_brightest_in_its_cell(cell: tuple[int, int]) -> None:
    grid = torch.full((10, 15), 0.001)
    grid[cell] = 0.1
    shown = viz.blend(Image.new("RGB", (600, 400), (90, 90, 90)), grid, 0.1).astype(int).sum(-1)
    y, x = np.unravel_index(shown.argmax(), shown.shape)
    assert (y // 40, x // 40) == cell
    bright = shown > (shown.max() + shown.min()) / 2
    ys, xs = np.nonzero(bright)
    assert abs(ys.mean() - (40 * cell[0] + 20)) < 12 and abs(xs.mean() - (40 * cell[1] + 20)) < 12


def test_blend_cuts_what_the_processor_padded() -> None:
    # A picture 600 x 300 in the middle of a square: rows 0 and 3 of the grid are padding.
    grid = torch.zeros(4, 4)
    grid[1, 3] = 1
    picture = Image.new("RGB", (600, 300), (90, 90, 90))
    shown = viz.blend(picture, grid, 1.0, (-0.5, 0.0, 1.5, 1.0)).astype(int).sum(-1)
    y, x = np.unravel_index(shown.argmax(), shown.shape)
    assert y < 150 and x >= 450
    # And a grid over the right half only.
    shown = viz.blend(picture, torch.ones(2, 2), 1.0, (0.0, 0.5, 1.0, 1.0)).astype(int).sum(-1)
    assert (shown[:, 310:] > 1.5 * shown[:, :290].max()).all()


def test_what_is_little_beside_a_peak_stays_dark() -> None:
    """A percentile of almost nothing would light up the whole picture."""
    grid = torch.full((10, 15), 0.0003)
    grid[2, 11] = 0.94
    limit, _ = viz.colour_limit([grid], 98.0)
    shown = viz.blend(Image.new("RGB", (600, 400)), grid, limit).astype(int).sum(-1)
    assert (shown > 0.2 * shown.max()).mean() < 0.02


def test_a_sink_does_not_drown_the_rest() -> None:
    grid = torch.rand(10, 15, generator=torch.Generator().manual_seed(0)) * 0.01
    grid[5, 5] = 0.6
    limit, note = viz.colour_limit([grid], 98.0)
    assert note == "colours end at 1/30 of the peak, 60 %" and limit == pytest.approx(0.02)
    assert viz.colour_limit([grid], 100) == (float(grid.max()), "")
    grid[5, 5] = 0.1
    limit, note = viz.colour_limit([grid], 98.0)
    assert note == "colours end at percentile 98; peak 10 %" and 0.009 < limit < 0.01
    grid[5, 5] = 0.012  # no sink: the colours reach the largest value
    assert viz.colour_limit([grid], 98.0) == (float(grid.max()), "")
    assert viz.colour_limit([torch.zeros(3, 3)], 98.0) == (1.0, "")

    # Cut before it is interpolated: the sink is one spot of its cell, not a plateau around it.
    grid[5, 5] = 0.6
    shown = viz.blend(Image.new("RGB", (600, 400)), grid / 10, limit).astype(int).sum(-1)
    bright = shown > 0.8 * shown.max()
    assert bright[205:235, 205:235].any() and bright.sum() < 40 * 40

    maps = maps_of()
    maps.grids[0][:, 2, 3] = 0.05
    labels = [" ".join(axes.get_ylabel().split()) for axes in viz.overlay(maps).axes]
    assert "attention per visual token colours end at percentile 98; peak 5.0 %" in labels
    labels = [axes.get_ylabel() for axes in viz.overlay(maps, clip=100).axes]
    assert "attention per visual token" in labels


@pytest.mark.parametrize(
    "token, wanted",
    [
        (" cup", "cup"), ("cup ", "cup"), (" ", "␣"), ("  ", "␣␣"), ("\n", "↵"), ("\t\n", "⇥↵"),
        ("", "∅"), ("\x0f", "U+000F"), ("$x$", "$x$"), ("é 1/2", "é 1/2"),
        ("supercalifragilistic", "supercalifr…"),
    ],
)  # fmt: skip
def test_labels(token: str, wanted: str) -> None:
    assert parts.readable(token, 12) == wanted


def test_signs_that_no_font_has_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "FALLBACKS", ())
    assert parts.readable("漢", 20) == "U+6F22"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of glyphs that are missing
        drawn(viz.token_grid(maps_of(tokens=("漢字", "né", "$\\frac$"))))


@pytest.mark.parametrize(
    "share, wanted",
    [(0.634, "63 %"), (0.0996, "10 %"), (0.0123, "1.2 %"), (0.00042, "0.04 %"), (0.0, "0 %")],
)
def test_percent(share: float, wanted: str) -> None:
    assert parts.percent(share) == wanted


def test_the_film_strip_shows_shares() -> None:
    maps = maps_of([(4, 6)] * 5)
    for token in (None, 3):
        shares = maps.image_shares.mean(0) if token is None else maps.image_shares[token]
        figure = viz.film_strip(maps, token)
        bars = [bar for axes in figure.axes for group in axes.containers for bar in group]
        assert [bar.get_height() for bar in bars] == pytest.approx(shares.tolist())
        labels = [text.get_text() for axes in figure.axes for text in axes.texts]
        assert all(parts.percent(float(share)) in labels for share in shares)


def pictures_in(axes: Any) -> Any:
    return axes.images[0].get_array()


def test_a_figure_into_axes_of_the_caller() -> None:
    maps = replace(maps_of(), model="Tiny-VL")
    figure = Figure()
    axes = figure.add_subplot()
    assert maps.figure(axes, token=1) is axes and len(figure.axes) == 1
    assert axes.get_title(loc="left") == "cup: 70 % on this image\nlayer 0 of Tiny-VL"
    own = maps.figure(token=1)
    assert isinstance(own, Figure) and np.array_equal(pictures_in(own.axes[0]), pictures_in(axes))
    with pytest.raises(ValueError, match="path must be None where ax is given"):
        viz.overlay(maps, ax=axes, path="a.png")


def test_colour_map_and_opacity() -> None:
    """A grid of one value: alpha of its last colour over the grey picture, in any colour map."""
    maps = replace(maps_of(), grids=(torch.ones(len(WORDS), 10, 15),))
    for cmap, last in (("viridis", (253, 231, 37)), ("inferno", (252, 255, 164))):
        for alpha in (0.1, 0.85, 1.0):
            shown = pictures_in(maps.figure(cmap=cmap, alpha=alpha).axes[0])
            wanted = [alpha * c + (1 - alpha) * parts.GREY * 120 for c in last]
            assert np.abs(shown[100, 100].astype(float) - wanted).max() < 1.5
    for options, message in (
        ({"alpha": 0.0}, r"alpha must be in \(0, 1\]; got 0.0"),
        ({"alpha": 1.5}, r"alpha must be in \(0, 1\]; got 1.5"),
        ({"cmap": "abacus"}, "cmap must be a colour map of matplotlib; got 'abacus'"),
    ):
        with pytest.raises(ValueError, match=message):
            maps.figure(**options)


@pytest.mark.parametrize("figure", ["overlay", "token_grid", "film_strip", "token_frame"])
def test_figures_name_layer_model_and_kind(figure: str) -> None:
    """Unrelated pictures are images, and those of a video frames, with their seconds."""
    maps = replace(maps_of([(4, 6)] * 3), model="Tiny-VL", relative="Describe it.")
    made = getattr(viz, figure)(maps)
    said = "\n".join(text.get_text() for text in made.findobj(Text))
    assert "layer 0 of Tiny-VL, relative to “Describe it.”" in said
    assert "image" in said and "frame" not in said and "second" not in said
    film = getattr(viz, figure)(of_a_film(3))
    said = "\n".join(text.get_text() for text in film.findobj(Text))
    assert "frame" in said and "image" not in said
    assert ("second" in said and "1.0" in said) == (figure in ("film_strip", "token_frame"))


def test_small_multiples_show_their_layer_and_head() -> None:
    """Each panel has its own grid; of many, the one array has it at the right place."""
    for layers, heads in ((3, 4), (9, 9)):
        maps = parts_of(layers, heads)
        assert maps.parts is not None
        own = torch.zeros_like(maps.parts.grids[0])
        own[2, 1] = 1.0
        maps = replace(maps, parts=replace(maps.parts, grids=(own,)))
        figure = viz.layer_head_grid(maps)
        if layers * heads <= 40:
            light = [float(pictures_in(axes).mean()) for axes in figure.axes[:-1]]
            assert int(np.argmax(light)) == 2 * heads + 1
        else:
            whole = np.asarray(pictures_in(figure.axes[0])).astype(float)
            colourful = whole.max(-1) - whole.min(-1)
            y, x = np.unravel_index(colourful.argmax(), colourful.shape)
            assert (y * layers // len(whole), x * heads // whole.shape[1]) == (2, 1)
    with pytest.raises(ValueError, match="maps must keep layers or heads"):
        viz.layer_head_grid(maps_of())


def test_bad_input() -> None:
    maps = maps_of()
    with pytest.raises(IndexError, match=r"image must be in \[0, 1\); got 1"):
        viz.overlay(maps, 1)
    with pytest.raises(IndexError, match=r"token must be in \[0, 12\); got 12"):
        viz.film_strip(maps, 12)
    with pytest.raises(ValueError, match=r"clip must be a percentile in \(0, 100\]; got 0"):
        viz.overlay(maps, clip=0)
    with pytest.raises(ValueError, match="at least one token"):
        viz.token_grid(maps, tokens=[])


def test_without_matplotlib_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    maps = maps_of()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for function in (viz.overlay, viz.token_grid, viz.film_strip, viz.token_frame):
        with pytest.raises(ImportError, match="pip install matplotlib pillow"):
            function(maps)


def test_imports_are_lazy() -> None:
    code = (
        "import sys, ral_kernels, ral_kernels.viz, ral_kernels.cli;"
        "assert not {'matplotlib', 'PIL'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_attention_over_frames_shows_names_shares_and_no_overlap() -> None:
    """Nineteen frames in three lines, two tokens of the answer: a bar a frame and token."""
    maps = maps_of([(2, 2), (3, 2), (2, 3)] + [(2, 2)] * 16, sizes=[(56, 56)] * 19)
    names = [f"{3 * number} s" for number in range(19)]
    figure = viz.attention_over_frames(
        maps, question="What $x$ is in the 中 cup?", answer="an\nanswer", names=names, tokens=[1, 5]
    )
    texts = [text.get_text() for text in figure.findobj(Text)]
    assert [name for name in texts if name in names] == names
    for token in (1, 5):
        shares = [f"{share:.0%}" for share in maps.image_shares[token].tolist()]
        assert not set(shares) - set(texts)
    assert texts.count("cup") == 3 and "answer: an↵answer" in texts  # in each line
    heights = [bar.get_height() for bar in figure.findobj(Rectangle) if 0 < bar.get_height() < 1]
    expected = maps.image_shares[[1, 5]].flatten().tolist()
    assert sorted(heights) == pytest.approx(sorted(expected), abs=1e-6)
    boxes, panels = texts_and_axes(figure)
    assert len(panels) == 3 * 19 + 3 * 2
    for box in boxes:
        assert not any(box is not other and box.overlaps(other) for other in boxes)


def test_attention_over_frames_refuses_what_is_not_there() -> None:
    maps = maps_of([(2, 2), (2, 2)])
    with pytest.raises(ValueError, match="names must be one for each of 2 frames; got 1"):
        viz.attention_over_frames(maps, question="?", names=["a"])
    with pytest.raises(IndexError, match=r"token must be in \[0, 12\); got 12"):
        viz.attention_over_frames(maps, question="?", tokens=[12])
