"""Real pictures from inside the scikit-image wheel, and videos of them by a moving camera."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import skimage
from PIL import Image

# Files of the wheel itself (its RECORD lists them): the rest of skimage.data is fetched by pooch,
# from the network.
SHOTS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "hubble_deep_field.jpg",
)
STILLS = ("hubble_deep_field.jpg", "motorcycle_left.png", "retina.jpg", "astronaut.png")
FRAMES_PER_SHOT = 16
# side of the camera's window, as a share of the largest window of its aspect in the picture
VIEW = 0.7


def load(name: str) -> Image.Image:
    """One picture of the wheel, in RGB."""
    path = Path(skimage.__file__).parent / "data" / name
    if not path.is_file():
        raise FileNotFoundError(f"pictures: {path} must be part of the scikit-image wheel")
    with Image.open(path) as picture:
        return picture.convert("RGB")


def _largest_window(picture: Image.Image, height: int, width: int) -> tuple[float, float]:
    """Height and width of the largest window of the aspect `height : width` in the picture."""
    scale = min(picture.height / height, picture.width / width)
    return height * scale, width * scale


def still(name: str, height: int, width: int) -> Image.Image:
    """The picture's centre at `height` x `width` pixels, interpolated beyond the file's own."""
    picture = load(name)
    window_height, window_width = _largest_window(picture, height, width)
    left, top = (picture.width - window_width) / 2, (picture.height - window_height) / 2
    box = (left, top, left + window_width, top + window_height)
    return picture.resize((width, height), Image.Resampling.BICUBIC, box=box)


def pan(num_frames: int, height: int, width: int) -> Iterator[Image.Image]:
    """A video of `num_frames` frames: a camera that glides over one picture after the other.

    Each shot eases from a corner region to the opposite one (cosine in time), with sub-pixel
    windows, as a slow pan on a tripod does; a cut every `FRAMES_PER_SHOT` frames.
    """
    for first in range(0, num_frames, FRAMES_PER_SHOT):
        shot = first // FRAMES_PER_SHOT
        picture = load(SHOTS[shot % len(SHOTS)])
        window_height, window_width = (
            VIEW * side for side in _largest_window(picture, height, width)
        )
        for frame in range(min(FRAMES_PER_SHOT, num_frames - first)):
            progress = 0.5 - 0.5 * math.cos(math.pi * frame / (FRAMES_PER_SHOT - 1))
            across = progress if shot % 2 == 0 else 1.0 - progress
            left = across * (picture.width - window_width)
            top = progress * (picture.height - window_height)
            box = (left, top, left + window_width, top + window_height)
            yield picture.resize((width, height), Image.Resampling.BICUBIC, box=box)
