"""The one reader of pictures: for `attention_map`, the command line and `ral.data`.

`video_file.py` decodes those of videos, and `videos.py` chooses among them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from . import video_file
from .errors import FORMATS, File, PictureError, opened_file, short_path

PICTURE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp",
)  # fmt: skip
_SIDEWAYS = (2, 4, 5, 6)  # of Image.Transpose: those that swap width and height
SHORTEST = 100  # milliseconds of a frame that says nothing, as browsers have it


def read_pictures(path: File, frames: Sequence[int] = (0,)) -> list[Any]:
    """Frames of a file, as `as_rgb` makes them; a still picture has the frame 0 alone.

    Of a video, of an animation (GIF, WebP, APNG) and of a TIFF of several pages, the first frame
    stands for the picture. Frames are read fastest in order. `path` may also be the contents of a
    picture, in bytes.

    Raises:
        ImportError: it is a video, and PyAV is missing.
        OSError: the file cannot be opened.
        PictureError: it is no picture of `FORMATS` and no video, or cannot be decoded.
        ValueError: it has no such frame.
    """
    if not isinstance(path, bytes) and video_file.is_video(path):
        return video_file.frames_of(path, frames)
    with opened(path) as image:
        first, count = _span(image)
        pictures = []
        for frame in frames:
            if not 0 <= frame < count:
                raise ValueError(f"frames must lie in [0, {count}); got {frame}")
            image.seek(first + frame)
            pictures.append(as_rgb(image))
    return pictures


def count_frames(path: str | os.PathLike[str]) -> int:
    """How many frames a file has; 1 for a still picture.

    Raises:
        ImportError, OSError, PictureError: as in `read_pictures`.
    """
    if video_file.is_video(path):
        return len(video_file.times_of(path)[0])
    with opened(path) as image:
        return _span(image)[1]


def frame_times(path: str | os.PathLike[str]) -> tuple[list[float], float]:
    """When each frame of a video or an animation is shown, in seconds, and how long it lasts.

    Raises:
        ImportError, OSError, PictureError: as in `read_pictures`.
    """
    if video_file.is_video(path):
        return video_file.times_of(path)
    with opened(path) as image:
        first, count = _span(image)
        now, times = 0.0, []
        for frame in range(count):
            image.seek(first + frame)
            image.load()  # a WebP says how long a frame lasts once it is decoded
            times.append(now)
            now += (image.info.get("duration") or SHORTEST) / 1000
    return times, now


def as_rgb(image: Any) -> Any:
    """A Pillow image as 8 bits of RGB: turned upright (EXIF), and on white where transparent.

    Of 16 bits the upper 8 are kept. Float and 32-bit values are scaled by the range that they lie
    in: [0, 1] for floats, [0, 255] or [0, 65535].

    Raises:
        PictureError: it cannot be decoded, or its values lie in no such range.
    """
    with _refusing(type(image).__name__):
        image = turned(image)
        if image.mode == "F" or image.mode.startswith("I"):
            image = _eight_bits(image)
        if image.has_transparency_data:
            from PIL import Image

            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def turned(image: Any) -> Any:
    """A Pillow image, decoded and upright (EXIF).

    Raises:
        PictureError: it cannot be decoded.
    """
    with _refusing(type(image).__name__):
        image.load()
        orientation = _orientation(image)  # of a TIFF, `load` has turned it and removed the tag
        return image if orientation is None else image.transpose(orientation)


def picture_size(path: File) -> tuple[int, int]:
    """(width, height) in pixels of a picture once it is turned upright; it is not decoded.

    Of a video the first frame is decoded.

    Raises:
        ImportError, OSError, PictureError: as in `read_pictures`.
    """
    if not isinstance(path, bytes) and video_file.is_video(path):
        width, height = video_file.frames_of(path, (0,))[0].size
        return width, height
    with opened(path) as image:
        width, height = image.size
        # Pillow gives a TIFF's size as it is upright.
        sideways = image.format != "TIFF" and _orientation(image) in _SIDEWAYS
    return (height, width) if sideways else (width, height)


def _orientation(image: Any) -> Any:
    """The transposition that turns a picture upright, or None."""
    from PIL import Image

    try:
        tag = image.getexif().get(0x0112)
    except Exception:  # a broken EXIF block says nothing, and the picture is whole
        return None
    turn = Image.Transpose
    return {
        2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
        6: turn.ROTATE_270, 7: turn.TRANSVERSE, 8: turn.ROTATE_90,
    }.get(tag)  # fmt: skip


def _eight_bits(image: Any) -> Any:
    """Grey values of 16 or 32 bits as 8; Pillow would clip them at 255."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    lowest, highest = values.min(), values.max()
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16"):
        grey = values >> (tags.get(258, (16,))[0] - 8)  # a TIFF may have 12 bits
    elif not (np.isfinite([lowest, highest]).all() and 0 <= lowest <= highest <= 65535):
        raise ValueError(f"values must lie in [0, 65535]; got {lowest:g} to {highest:g}")
    elif image.mode == "F" and highest <= 1:
        grey = (values * 255).round()
    elif highest > 255:
        grey = values // 256
    else:
        grey = values.round()
    grey = grey.astype(np.uint8)
    if tags.get(262) == 0:  # WhiteIsZero, which Pillow sees to in 8 bits
        grey = 255 - grey
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey[values == key] = 255
    return Image.fromarray(grey)


def _span(image: Any) -> tuple[int, int]:
    """The index of the first frame, and how many follow."""
    count = getattr(image, "n_frames", 1)
    if image.format == "MPO":  # a phone's picture, then its depth or gain map
        return 0, 1
    # The picture for programs that do not know APNG need not be a frame.
    return (1, count - 1) if image.info.get("default_image") and count > 1 else (0, count)


@contextmanager
def opened(path: File) -> Iterator[Any]:
    """A file of one of `FORMATS` as a Pillow image, not yet decoded."""
    from PIL import Image, UnidentifiedImageError

    name = short_path(path)
    with opened_file(path) as stream:
        Image.init()
        begins = stream.read(16)
        stream.seek(0)
        try:
            with _refusing(name), Image.open(stream, formats=_decoders()) as image:
                yield image
        except UnidentifiedImageError as error:
            what = f"it begins with {begins!r}" if begins else "it is empty"
            reason = f"cannot identify image file: {what}"
            raise PictureError(name, reason) from error


def _decoders() -> list[str]:
    """Those of `FORMATS` that this Pillow was built with."""
    from PIL import Image

    return [name for name in FORMATS if name in Image.OPEN]


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    from PIL import UnidentifiedImageError

    try:
        yield
    except UnidentifiedImageError:
        raise
    except PictureError as error:
        raise PictureError(name, error.reason) from error.__cause__
    except Exception as error:  # Pillow's decoders raise many kinds
        raise PictureError(name, str(error) or type(error).__name__) from error
