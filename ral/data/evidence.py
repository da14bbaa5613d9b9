"""The evidence of a row: the parts of its pictures that its answer rests on, checked and read."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import DataError, shown, shown_path
from .frames import Found

_FIELDS = ("image", "video", "frames", "box", "mask")
_BOX = "[x0, y0, x1, y1] in pixels, x0 < x1 and y0 < y1, within the picture"


class EvidenceReader:
    """Checks the field `evidence` of rows. It caches the sizes of pictures and masks.

    Args:
        root: the folder that relative paths of masks start from.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._sizes: dict[str, tuple[int, int]] = {}

    def read(
        self, given: Any, found: Found, contents: Sequence[bytes], video: bool
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """The evidence as it is stored, and all errors.

        Args:
            given: what the row has.
            found: the row's pictures: all images, or those frames of a video that are taken.
            contents: the pictures themselves, by their numbers, where a table holds them; or none.
            video: whether they are frames of a video.

        Returns:
            Parts {"image": number among the taken pictures, "box", "mask": file}, box or mask None.
        """
        if given is None:
            return [], []
        if not isinstance(given, list):
            return [], [f"evidence must be a list of mappings; got {shown(given)}"]
        parts: list[dict[str, Any]] = []
        errors = []
        for number, entry in enumerate(given):
            try:
                parts += self._parts(entry, found, contents, video)
            except DataError as error:
                errors.append(f"evidence[{number}]{error}")
        return parts, errors

    def _parts(
        self, entry: Any, found: Found, contents: Sequence[bytes], video: bool
    ) -> list[dict[str, Any]]:
        if not isinstance(entry, Mapping) or not set(entry) <= set(_FIELDS):
            raise DataError(f" must be a mapping of {', '.join(_FIELDS)}; got {shown(entry)}")
        entry = {name: value for name, value in entry.items() if value is not None}
        first, last = _numbers(entry, found.total, video)
        images = [i for i, number in enumerate(found.numbers) if first <= number <= last]
        box, mask = entry.get("box"), entry.get("mask")
        if box is not None and mask is not None:
            raise DataError(f" must have a box or a mask; got {shown(entry)}")
        if box is not None:
            box = _box(box)
        if mask is not None:
            mask = self._mask(mask)
        for image in images if box or mask else ():
            width, height = self._size_of(image, found, contents)
            if box and (box[2] > width or box[3] > height):
                raise DataError(
                    f".box must be {_BOX}, which is {width} wide and {height} high; got "
                    f"{shown(entry['box'])}"
                )
            if mask and self._size(mask) != (width, height):
                raise DataError(
                    f".mask must be {width} wide and {height} high as its picture; got "
                    f"{self._size(mask)[0]} by {self._size(mask)[1]} in {shown_path(mask)}"
                )
        return [{"image": image, "box": box, "mask": mask} for image in images]

    def _mask(self, mask: Any) -> str:
        path = os.path.join(self._root, mask) if isinstance(mask, str) else ""
        if not os.path.isfile(path):
            raise DataError(f".mask must be an existing file; got {shown(mask)}")
        return path

    def _size_of(self, image: int, found: Found, contents: Sequence[bytes]) -> tuple[int, int]:
        from ral_kernels.viz import PictureError, picture_size  # brings torch

        if not contents:
            return self._size(found.frames[image][0], "")
        try:
            return picture_size(contents[found.numbers[image]])
        except PictureError as error:
            raise DataError(
                f" must be of a picture that can be read; got {error.reason}"
            ) from error

    def _size(self, path: str, name: str = ".mask") -> tuple[int, int]:
        from ral_kernels.viz import PictureError, picture_size

        if path not in self._sizes:
            try:
                self._sizes[path] = picture_size(path)
            except (OSError, PictureError) as error:
                reason = getattr(error, "reason", error)
                raise DataError(
                    f"{name} must be of a picture that can be read; got {shown_path(path)}: "
                    f"{reason}"
                ) from error
        return self._sizes[path]


def _numbers(entry: Mapping[str, Any], total: int, video: bool) -> tuple[int, int]:
    """The first and the last picture of the source that an entry names."""
    if video and "image" in entry:
        raise DataError(
            f" must name the frames of a video by video and frames; got {shown(dict(entry))}"
        )
    if not video and "video" in entry:
        raise DataError(f" must name images, since the row has no video; got {shown(dict(entry))}")
    if "image" in entry and "frames" in entry:
        raise DataError(f" must have image or frames; got {shown(dict(entry))}")
    if "image" in entry:
        if not _is_number(entry["image"]) or not 0 <= entry["image"] < total:
            raise DataError(
                f".image must be in [0, {total}), the row's images; got {shown(entry['image'])}"
            )
        return entry["image"], entry["image"]
    if "video" in entry and (not _is_number(entry["video"]) or entry["video"] != 0):
        raise DataError(f".video must be 0, the row's only video; got {shown(entry['video'])}")
    if "frames" in entry:
        frames = entry["frames"]
        good = isinstance(frames, list) and len(frames) == 2 and all(map(_is_number, frames))
        if not good or not 0 <= frames[0] <= frames[1] < total:
            raise DataError(
                f".frames must be [first, last] with 0 <= first <= last < {total}, the frames of "
                f"the source; got {shown(frames)}"
            )
        return frames[0], frames[1]
    if "video" in entry:
        return 0, total - 1
    raise DataError(f" must have image, video or frames; got {shown(dict(entry))}")


def _box(box: Any) -> list[float]:
    good = isinstance(box, list) and len(box) == 4
    if not good or not all(isinstance(x, int | float) and math.isfinite(x) for x in box):
        raise DataError(f".box must be {_BOX}; got {shown(box)}")
    x0, y0, x1, y1 = map(float, box)
    if not (0 <= x0 < x1 and 0 <= y0 < y1):
        raise DataError(f".box must be {_BOX}; got {shown(box)}")
    return [x0, y0, x1, y1]


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def read_evidence(parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The evidence of a row for `rk.region_weights`: masks decoded, nothing that is None.

    Args:
        parts: as stored, each with its `source` ("file:line").

    Raises:
        DataError: a mask that cannot be decoded, by line and path.
    """
    return [_decoded(part) for part in parts]


def _decoded(part: Mapping[str, Any]) -> dict[str, Any]:
    from ral_kernels.viz import PictureError, read_mask

    found = {name: part[name] for name in ("image", "box") if part.get(name) is not None}
    if part.get("mask") is not None:
        try:
            found["mask"] = read_mask(part["mask"])
        except (OSError, PictureError) as error:
            raise DataError(
                f"{part['source']}: mask must be a picture that can be decoded; got "
                f"{shown_path(part['mask'])}: {getattr(error, 'reason', error)}"
            ) from error
    return found
