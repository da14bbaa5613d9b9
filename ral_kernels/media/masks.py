"""Masks of pictures: files in which what is not black belongs to a region."""

from __future__ import annotations

import os
from typing import Any

from .pictures import opened, turned


def read_mask(path: str | os.PathLike[str]) -> Any:
    """A mask file as `mask_of` makes it.

    Raises:
        OSError: the file cannot be opened.
        PictureError: it is no picture, or cannot be decoded.
    """
    with opened(path) as image:
        return mask_of(image)


def mask_of(image: Any) -> Any:
    """Which pixels of a Pillow image belong to a region: a bool array [height, width].

    It is turned upright (EXIF), as its picture is. A pixel belongs to the region if it is not black
    and not transparent: files with 0 and 1, with 0 and 255 and with a palette all work.

    Raises:
        PictureError: it cannot be decoded.
    """
    import numpy as np

    image = turned(image)
    transparent = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        transparent = np.asarray(image)[..., 3] == 0
        image = image.convert("RGB")
    elif image.mode == "P":
        image = image.convert("RGB")
    values = np.asarray(image)
    inside = (values if values.ndim == 2 else values.any(-1)) != 0
    return inside if transparent is None else inside & ~transparent
