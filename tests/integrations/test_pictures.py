"""The one reader of pictures, as `attention_map`, the command line and `ral.data` call it."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("skimage")  # brings tifffile

import tifffile
from PIL import EpsImagePlugin, Image, ImageSequence

from ral_kernels import cli, viz
from ral_kernels.media import pictures
from ral_kernels.media.given import pictures_of

WHITE, RED, GREEN, BLUE = (255,) * 3, (255, 0, 0), (0, 255, 0), (0, 0, 255)
RAMP = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
RAMP_8 = [0, 0, 1, 128, 255]


def saved(image: Image.Image, name: str, **options: Any) -> Callable[[Path], str]:
    return lambda folder: image.save(folder / name, **options) or name  # type: ignore[func-returns-value]


def tiff(values: Any, order: str, **options: Any) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        options.setdefault("photometric", "minisblack")
        tifffile.imwrite(folder / "a.tif", np.asarray(values), byteorder=order, **options)
        return "a.tif"

    return write


def pixels(mode: str, *values: Any) -> Image.Image:
    image = Image.new(mode, (len(values), 1))
    for place, value in enumerate(values):
        image.putpixel((place, 0), value)
    return image


def with_key(values: Image.Image, **info: Any) -> Callable[[Path], str]:
    return saved(values, "key.png", **info)


def palette() -> Image.Image:
    image = pixels("P", 0, 1, 2)
    image.putpalette([*RED, *GREEN, *BLUE])
    return image


def greys(*values: int) -> list[tuple[int, int, int]]:
    return [(value,) * 3 for value in values]


FILES: dict[str, tuple[Callable[[Path], str], Sequence[tuple[int, int, int]]]] = {
    "alpha": (saved(pixels("RGBA", (*RED, 0), (*BLUE, 255), (0, 0, 0, 128)), "a.png"),
              [WHITE, BLUE, (127,) * 3]),
    "alpha webp": (saved(pixels("RGBA", (*RED, 0), (*BLUE, 255)), "a.webp", lossless=True),
                   [WHITE, BLUE]),
    "grey with alpha": (saved(pixels("LA", (9, 0), (9, 255)), "a.png"), greys(255, 9)),
    "transparent palette": (saved(palette(), "a.gif", transparency=1), [RED, WHITE, BLUE]),
    "palette with alphas": (with_key(palette(), transparency=bytes([255, 0, 255])),
                            [RED, WHITE, BLUE]),
    "transparent colour": (with_key(pixels("RGB", RED, BLUE), transparency=RED), [WHITE, BLUE]),
    "16 bits": (saved(Image.fromarray(RAMP), "a.png"), greys(*RAMP_8)),
    "16 bits, transparent": (with_key(Image.fromarray(RAMP), transparency=0),
                             greys(255, *RAMP_8[1:])),
    "16 bits, tiff": (tiff(RAMP, "<"), greys(*RAMP_8)),
    "16 bits, big-endian": (tiff(RAMP, ">"), greys(*RAMP_8)),
    "16 bits, white is zero": (tiff(RAMP, "<", photometric="miniswhite"),
                               greys(*(255 - value for value in RAMP_8))),
    "16 bits of colour": (tiff(np.full((1, 1, 3), (0, 0x80FF, 0xFFFF), np.uint16), ">",
                               photometric="rgb"), [(0, 128, 255)]),
    "32 bits, as 8": (tiff(np.array([[0, 128, 255]], np.int32), "<"), greys(0, 128, 255)),
    "32 bits, as 16": (tiff(RAMP.astype(np.int32), ">"), greys(*RAMP_8)),
    "floats to 1": (tiff(np.array([[0, 0.5, 1]], np.float32), ">"), greys(0, 128, 255)),
    "floats to 255": (tiff(np.array([[0, 127.6, 255]], np.float32), "<"), greys(0, 128, 255)),
    "floats to 65535": (tiff(RAMP.astype(np.float32), ">"), greys(*RAMP_8)),
    "one bit": (saved(pixels("1", 0, 1), "a.bmp"), greys(0, 255)),
    "cmyk": (saved(pixels("CMYK", (0, 0, 0, 0), (0, 0, 0, 255)), "a.tif"), greys(255, 0)),
}  # fmt: skip


def from_data(path: Path) -> Image.Image:
    pytest.importorskip("datasets")
    from ral.data import read_images

    [image] = read_images([{"path": str(path), "frame": 0, "source": "here"}])
    return image


READERS: dict[str, Callable[[Path], Image.Image]] = {
    "attention_map": lambda path: pictures_of("attention_map", str(path))[0].image,
    "command line": lambda path: cli._open(path)[0],
    "ral.data": from_data,
}


def row_of(image: Image.Image) -> list[Any]:
    assert image.mode == "RGB"
    return [image.getpixel((x, 0)) for x in range(image.width)]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", FILES)
def test_every_kind_is_eight_bits_of_rgb(name: str, reader: str, tmp_path: Path) -> None:
    write, wanted = FILES[name]
    assert row_of(READERS[reader](tmp_path / write(tmp_path))) == list(wanted)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_phones_turn_pictures_by_exif(suffix: str, reader: str, tmp_path: Path) -> None:
    """Eight orientations of one picture, stored so that a viewer shows the same."""
    scene = Image.new("RGB", (32, 16), "black")
    scene.paste(RED, (0, 0, 16, 8))
    scene.paste(BLUE, (16, 8, 32, 16))
    turn = Image.Transpose
    stored = {
        1: scene, 2: scene.transpose(turn.FLIP_LEFT_RIGHT), 3: scene.transpose(turn.ROTATE_180),
        4: scene.transpose(turn.FLIP_TOP_BOTTOM), 5: scene.transpose(turn.TRANSPOSE),
        6: scene.transpose(turn.ROTATE_90), 7: scene.transpose(turn.TRANSVERSE),
        8: scene.transpose(turn.ROTATE_270),
    }  # fmt: skip
    for tag, image in stored.items():
        exif = Image.Exif()
        exif[0x0112] = tag
        path = tmp_path / f"{tag}{suffix}"
        image.save(path, exif=exif, **({"quality": 100} if suffix in (".jpg", ".webp") else {}))
        read = READERS[reader](path)
        assert read.size == (32, 16), tag
        corners = [read.getpixel(at) for at in ((3, 3), (28, 3), (3, 12), (28, 12))]
        error = np.subtract(corners, [RED, (0, 0, 0), (0, 0, 0), BLUE])
        assert np.abs(error).max() < 40, tag


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif"])
def test_frames_of_animations(suffix: str, tmp_path: Path) -> None:
    """The first one stands for the picture; each lies on white."""
    # The second pixel is transparent in all, or Pillow gives a GIF a background that is not.
    frames = [
        pixels("RGBA", (*colour, alpha), (*WHITE, 0))
        for colour, alpha in ((RED, 255), (GREEN, 0), (BLUE, 255))
    ]
    path = tmp_path / f"clip{suffix}"
    options: dict[str, Any] = {"save_all": True, "append_images": frames[1:]}
    if suffix != ".tif":
        options |= {"duration": 100}
    if suffix == ".gif":
        options |= {"disposal": 2}
    elif suffix == ".webp":
        options |= {"lossless": True}
    frames[0].save(path, **options)
    assert viz.count_frames(path) == 3
    for chosen in ([0], [0, 1, 2], [2, 0], [1, 1]):
        read = viz.read_pictures(path, chosen)
        assert [row_of(image) for image in read] == [[[RED, WHITE, BLUE][i], WHITE] for i in chosen]
    assert [row_of(reader(path)) for reader in READERS.values()] == [[RED, WHITE]] * 3
    with pytest.raises(viz.PictureError, match=r"frames must lie in \[0, 3\); got 3"):
        viz.read_pictures(path, [3])


def test_the_picture_before_an_apng_is_no_frame_of_it(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN, BLUE)]
    path = tmp_path / "clip.png"
    frames[0].save(path, save_all=True, append_images=frames[1:], default_image=True)
    assert viz.count_frames(path) == 2
    assert [row_of(image)[0] for image in viz.read_pictures(path, [0, 1])] == [GREEN, BLUE]


def test_a_photograph_with_a_depth_map_is_one_picture(tmp_path: Path) -> None:
    photo, depth = Image.new("RGB", (32, 32), RED), Image.new("RGB", (16, 16), WHITE)
    photo.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[depth])
    with Image.open(tmp_path / "a.jpg") as opened:
        assert sum(1 for _ in ImageSequence.Iterator(opened)) == 2
    assert viz.count_frames(tmp_path / "a.jpg") == 1
    [read] = viz.read_pictures(tmp_path / "a.jpg")
    assert read.size == (32, 32)


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)).save(buffer, "JPEG")
    return buffer.getvalue()


BROKEN: dict[str, tuple[bytes | Callable[[Path], str], str]] = {
    "empty": (b"", "it is empty"),
    "a web page": (b"<!DOCTYPE html><html>", "it begins with b'<!DOCTYPE html>"),
    "cut short": (jpeg()[:-200], "truncated"),
    "a head alone": (jpeg()[:30], ""),
    "negative floats": (tiff(np.array([[-1, 1]], np.float32), ">"), "got -1 to 1"),
    "not a number": (tiff(np.array([[np.nan, 1]], np.float32), "<"), "got nan to nan"),
    "large integers": (tiff(np.array([[0, 70000]], np.int32), "<"), "got 0 to 70000"),
    "floats of colour": (tiff(np.zeros((1, 1, 3), np.float32), "<", photometric="rgb"), "II"),
    "encapsulated postscript": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n", "%!PS"),
    "a portable pixmap": (b"P6 1 1 255\n\0\0\0", "it begins with b'P6"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_picture_is_one_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("was called"))
    content, reason = BROKEN[name]
    path = tmp_path / "a.jpg"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path = tmp_path / content(tmp_path)
    with pytest.raises(viz.PictureError) as error:
        READERS["attention_map"](path)
    assert isinstance(error.value, ValueError) and reason in error.value.reason
    wanted = f"a picture must be AVIF, BMP, GIF, JPEG, PNG, TIFF or WEBP; got {str(path)!r}: "
    assert str(error.value).startswith(wanted)
    with pytest.raises(cli.Refused) as refused:
        READERS["command line"](path)
    assert str(refused.value) == f"cannot read {path} as an image: {error.value.reason}"
    with pytest.raises(ValueError, match="here: path must be an image that can be decoded"):
        READERS["ral.data"](path)


def test_contents_in_place_of_a_path(tmp_path: Path) -> None:
    """As a table of a dataset holds pictures; what is none is refused as a file is."""
    frames = [Image.new("RGB", (2, 1), (10 * i,) * 3) for i in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    content = (tmp_path / "a.gif").read_bytes()
    read = viz.read_pictures(content, [0, 2])
    assert [row_of(image) for image in read] == [greys(0, 0), greys(20, 20)]
    for broken, reason in ((b"%!PS-Adobe-3.0", "it begins with b'%!PS-Ad"), (b"", "it is empty")):
        with pytest.raises(
            viz.PictureError, match=rf"got 'a file of {len(broken)} bytes'.*{reason}"
        ):
            viz.read_pictures(broken)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        viz.read_pictures(tmp_path / "none.png")
    with pytest.raises(IsADirectoryError):
        viz.read_pictures(tmp_path)
    with pytest.raises(viz.PictureError, match="null byte"):
        viz.read_pictures("a\0b")
    uri = "data:image/png;base64," + "A" * 1_000_000
    with pytest.raises(OSError, match=r"\.\.\..*1000022 characters") as error:
        viz.read_pictures(uri)
    assert len(str(error.value)) < 300
    with pytest.raises(cli.Refused, match="there is no image file data:image") as refused:
        cli._image_paths([uri], None)
    assert len(str(refused.value)) < 300


def test_a_pillow_image_that_is_cut_short(tmp_path: Path) -> None:
    cut = Image.open(io.BytesIO(jpeg()[:-200]))
    with pytest.raises(viz.PictureError, match=r"got 'JpegImageFile': .*truncated"):
        pictures_of("attention_map", cut)


def test_a_broken_exif_block_leaves_the_picture(tmp_path: Path) -> None:
    scene = Image.new("RGB", (8, 4), BLUE)
    scene.save(tmp_path / "a.png", exif=b"Exif\0\0no tiff header")
    assert row_of(viz.read_pictures(tmp_path / "a.png")[0]) == [BLUE] * 8


def test_formats_that_pillow_lacks_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (1, 1), RED).save(tmp_path / "a.png")
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    assert "AVIF" not in pictures._decoders()
    assert row_of(viz.read_pictures(tmp_path / "a.png")[0]) == [RED]
