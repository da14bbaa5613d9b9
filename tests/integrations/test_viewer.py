"""The page that `AttentionMap.to_html` writes, in a real browser."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from ral_kernels import viz
from ral_kernels.viz import AttentionMap
from tests.browser import PHONE, screenshot

from .test_maps import synthetic

TOKENS = ["A", " cup", " of", " cof", "fee", "."]
WORDS = ["all words", "A", "cup", "of", "coffee", "."]

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("chromium")]


def film(**more: Any) -> AttentionMap:
    return synthetic(
        [(6, 9)] * 5, TOKENS, kinds=("frame",) * 5, times=(0.0, 0.5, 1.0, 1.5, 2.0),
        model="Tiny-VL", prompt="What <b>is</b> it? </script><script>alert(1)</script>", **more,
    )  # fmt: skip


def opened(page: Any, maps: AttentionMap, folder: Path) -> Any:
    page.goto(maps.to_html(folder / "map.html").as_uri())
    settled(page)
    return page


def settled(page: Any) -> None:
    page.evaluate("$('picture').decode().then(() => new Promise(requestAnimationFrame))")


def pixels(page: Any) -> Any:
    """The overlay's colours, uint8 [height, width, 3]."""
    settled(page)
    return np.asarray(_decoded(page.evaluate("$('overlay').toDataURL('image/png')")).convert("RGB"))


def _decoded(address: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(address.split(",")[1])))


def word(page: Any, text: str) -> Any:
    return page.get_by_role("option", name=text, exact=True)


def chosen(page: Any) -> str:
    return str(page.locator(".word[aria-selected=true]").inner_text())


def test_the_page(browser_page: Any, tmp_path: Path) -> None:
    """Words to point at, keys, the scrubber; its fixture fails on an error or a request."""
    maps = film()
    page = opened(browser_page, maps, tmp_path)
    assert page.locator(".word").all_inner_texts() == WORDS
    assert page.locator("h1").inner_text() == maps.prompt  # as text, not as a script
    assert page.locator("#source").inner_text() == "layer 1 of Tiny-VL"
    assert page.title() == f"{maps.prompt} - layer 1 of Tiny-VL"

    # Pointing at a word changes the overlay, and leaving it brings the old one back.
    mean = pixels(page)
    word(page, "coffee").hover()
    pointed = pixels(page)
    assert not np.array_equal(mean, pointed)
    assert "“coffee”" in page.locator("#said").inner_text()
    page.locator("h1").hover()
    assert np.array_equal(pixels(page), mean)
    word(page, "coffee").click()
    page.locator("h1").hover()
    assert np.array_equal(pixels(page), pointed) and chosen(page) == "coffee"

    # Keys step through words and frames, and the focus goes with them.
    page.keyboard.press("ArrowLeft")
    assert chosen(page) == "of" and not np.array_equal(pixels(page), pointed)
    assert page.evaluate("document.activeElement.textContent") == "of"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"  # the focus is seen
    page.keyboard.press("Home")
    assert chosen(page) == "all words"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert page.locator("#name").inner_text() == "frame 3, 1.0 s"
    assert page.locator("#scrub").get_attribute("aria-valuetext") == "frame 3, 1.0 s"
    assert page.locator(".frame[aria-pressed=true]").count() == 1
    third = pixels(page)
    page.keyboard.press("ArrowUp")
    assert page.locator("#name").inner_text() == "frame 2, 0.5 s"

    # So do the scrubber and the small pictures.
    page.locator("#scrub").fill("2")
    assert np.array_equal(pixels(page), third)
    page.locator("#scrub").press("ArrowRight")
    assert page.locator("#name").inner_text() == "frame 4, 1.5 s"
    page.locator(".frame").first.click()
    assert np.array_equal(pixels(page), mean)
    overlay = page.locator("#overlay").get_attribute("aria-label")
    share = viz.parts.percent(float(maps.image_shares[:, 0].mean()))
    assert overlay == f"Attention of all words on frame 1, 0.0 s: {share} of all"


def test_the_overlay_is_that_of_the_figures(browser_page: Any, tmp_path: Path) -> None:
    maps = film()
    page = opened(browser_page, maps, tmp_path)
    shown = pixels(page).astype(float)
    data = json.loads(page.evaluate("JSON.stringify(data)"))
    picture = _decoded(data["pictures"][0]["src"])
    wanted = viz.blend(picture, maps.grids[0].mean(0), data["views"][0]["limit"])
    # 8 bits of the root of a value, and 8 bits of a picture.
    assert np.abs(shown - wanted).max() < 6 and np.abs(shown - wanted).mean() < 0.7


@pytest.mark.slow(stands_in="test_the_page")
def test_layers_heads_and_shares(browser_page: Any, tmp_path: Path) -> None:
    maps = film(layers=3, heads=2)
    page = opened(browser_page, maps, tmp_path)
    mean = pixels(page)
    page.locator("#layer").select_option("2")
    page.locator("#head").select_option("1")
    one = maps.at(layer=2, head=1)
    assert page.locator("#source").inner_text() == one.source == "layer 2, head 1 of Tiny-VL"
    assert not np.array_equal(pixels(page), mean)
    shares = page.locator("#shares .share").all_inner_texts()
    wanted = viz.parts.percent(float(one.image_shares[:, 0].mean()))
    assert len(shares) == 6 and shares[0].split("\n") == ["frame 1, 0.0 s", wanted]
    text = viz.parts.percent(float(one.text_shares.mean()))
    assert shares[-1].split("\n") == ["text", text]
    strip = page.locator(".frame .part").all_inner_texts()
    assert strip == [viz.parts.percent(float(s)) for s in one.image_shares.mean(0)]
    shared = pixels(page)
    page.locator("#ends").select_option("word")
    assert not np.array_equal(pixels(page), shared)
    # Keys belong to a list that has the focus.
    page.locator("#layer").focus()
    page.keyboard.press("ArrowDown")
    assert page.locator("#name").inner_text() == "frame 1, 0.0 s"


@pytest.mark.slow(stands_in="test_the_page")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_one_image_on_a_phone(browser_page: Any, tmp_path: Path, scheme: str) -> None:
    """Nothing is wider than the screen, the words can be tapped, and text stands out."""
    maps = synthetic([(6, 9)], TOKENS * 8, prompt="What is it?")
    browser_page.set_viewport_size(PHONE)
    browser_page.emulate_media(color_scheme=scheme)
    page = opened(browser_page, maps, tmp_path)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert not page.locator("#film").is_visible() and not page.locator("#layer").is_visible()
    before = pixels(page)
    page.locator(".word").nth(3).click()
    assert not np.array_equal(pixels(page), before)
    page.locator("h1").hover()
    for what in ("h1", "#said", ".word >> nth=3", "#shares .share"):
        assert contrast(page, what) >= 4.5, what
    assert screenshot(page, tmp_path / "page.png").stat().st_size > 10_000


def contrast(page: Any, what: str) -> float:
    """Of a text's colour and what lies under it, as WCAG defines it."""
    ink, *papers = page.locator(what).first.evaluate(
        "node => { const found = [getComputedStyle(node).color];"
        " for (let n = node; n; n = n.parentElement)"
        " found.push(getComputedStyle(n).backgroundColor);"
        " return found; }"
    )
    under = np.array([255.0, 255.0, 255.0])
    for paper in reversed(papers):
        numbers = [float(n) for n in re.findall(r"[\d.]+", paper)]
        *colour, opacity = numbers if "a(" in paper else [*numbers, 1.0]
        under = opacity * np.array(colour) + (1 - opacity) * under
    light = [
        _luminance(np.array([float(n) for n in re.findall(r"[\d.]+", ink)][:3])),
        _luminance(under),
    ]
    return (max(light) + 0.05) / (min(light) + 0.05)


def _luminance(colour: Any) -> float:
    parts = colour / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.slow(stands_in="test_a_page_fits_the_room_it_has")
def test_a_long_video_of_all_layers(browser_page: Any, tmp_path: Path) -> None:
    """64 frames, 28 layers and 24 words, with noise that no format compresses: below 20 MB."""
    maps = synthetic([(12, 16)] * 64, [f" word{i}" for i in range(24)], layers=28)
    noise = np.random.default_rng(0).integers(0, 255, (360, 480, 3), np.uint8)
    soft = Image.fromarray(noise).resize((60, 45)).resize((1280, 960))
    maps = replace(maps, images=(soft,) * 64)
    path = maps.to_html(tmp_path / "map.html")
    assert 5_000_000 < path.stat().st_size < 20_000_000
    page = opened(browser_page, maps, tmp_path)
    before = pixels(page)
    page.locator("#layer").select_option("27")
    assert not np.array_equal(pixels(page), before)
    page.locator("#scrub").fill("63")
    assert page.locator("#name").inner_text() == "image 64"


def read(path: Path) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())
    assert found is not None
    return json.loads(found[1])


def test_a_page_fits_the_room_it_has(tmp_path: Path) -> None:
    """Single layers are pooled, keep their mean, and the page says so; then it is an error."""
    maps = synthetic([(16, 24)] * 3, TOKENS, layers=4, heads=2)
    whole = maps.to_html(tmp_path / "a.html")
    assert {view["coarse"] for view in read(whole)["views"]} == {1}
    limit = whole.stat().st_size - 40_000
    small = maps.to_html(tmp_path / "b.html", max_bytes=limit)
    assert small.stat().st_size <= limit
    views = read(small)["views"]
    assert len(views) == 15 and views[0]["coarse"] == 1 and views[1]["coarse"] > 1
    with pytest.raises(ValueError, match=r"max_bytes must hold the map, .* got 110,000"):
        maps.to_html(tmp_path / "c.html", max_bytes=110_000)
    with pytest.raises(ValueError, match="cmap must be a colour map of matplotlib; got 'abacus'"):
        maps.to_html(tmp_path / "c.html", cmap="abacus")
    assert not (tmp_path / "c.html").exists()


def test_what_is_stored_is_the_map(tmp_path: Path) -> None:
    """Within the 8 bits of a root: each word's cells, and shares within 16 bits."""
    maps = synthetic([(5, 7), (4, 4)], TOKENS, layers=2)
    data = read(maps.to_html(tmp_path / "a.html"))
    assert [view["layer"] for view in data["views"]] == [None, 0, 1]
    assert data["words"] == ["A", " cup", " of", " coffee", "."]
    for view, own in zip(data["views"], (maps, maps.at(layer=0), maps.at(layer=1)), strict=True):
        cells = np.frombuffer(base64.b64decode(view["cells"]), np.uint8).reshape(6, -1)
        peaks = np.array(view["peaks"])[:, None]
        got = torch.from_numpy(peaks * (cells / 255.0) ** 2)
        flat = torch.cat([grid.flatten(1) for grid in own.grids], dim=1).double()
        coffee = flat[[3, 4]].mean(0)
        wanted = torch.stack([flat.mean(0), flat[0], flat[1], flat[2], coffee, flat[5]])
        assert (got - wanted).abs().max() < 0.005 * wanted.max()
        shares = np.frombuffer(base64.b64decode(view["shares"]), "<u2").reshape(6, 2) / 65535
        assert np.allclose(shares[0], own.image_shares.mean(0), atol=1e-4)
