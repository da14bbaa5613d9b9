"""Images and the frames of videos: finding, choosing and reading them."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from .errors import DataError, shown_path
from .sources import stored_images


def natural_key(name: str) -> list[Any]:
    """A sorting key under which frame2 stands before frame10."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def uniform_indices(total: int, count: int) -> list[int]:
    """`count` of 0 … total − 1, at equal steps from the first to the last; one is the middle one.

    If total <= count, all of them.
    """
    if total <= count:
        return list(range(total))
    if count == 1:
        return [total // 2]
    return [(2 * i * (total - 1) + count - 1) // (2 * (count - 1)) for i in range(count)]


@dataclass(frozen=True)
class Found:
    """Pictures of a row: all of its images, or the frames of a video that are taken.

    Attributes:
        frames: the file of each, and the index of the frame in it (0 in a still image).
        numbers: which of the source's frames or images each is, from 0.
        total: how many the source has.
    """

    frames: list[tuple[str, int]]
    numbers: list[int]
    total: int


class FrameFinder:
    """Finds the images that the `path` of a row names. It caches the listings of folders.

    Args:
        root: the folder that relative paths start from.
        max_frames: how many frames of a video are taken at most, at equal steps.
        fps: how many a second, where the frames have times.
    """

    def __init__(self, root: str, max_frames: int, fps: float | None = None) -> None:
        self.root = root
        self.max_frames = max_frames
        self.fps = fps
        self._found: dict[str, Found] = {}

    def find(self, path: str | Sequence[str], *, video: bool) -> Found:
        """The images, or the frames of a video that are taken.

        Raises:
            DataError: "path must be …; got …", where a file is missing or is not what is needed.
        """
        if not isinstance(path, str):
            for each in path:
                _refuse_video(each)
            files = [(self._file(each), 0) for each in path]
            return (
                self.sample(files) if video else Found(files, list(range(len(files))), len(files))
            )
        if not video:
            _refuse_video(path)
            return Found([(self._file(path), 0)], [0], 1)
        if path not in self._found:
            self._found[path] = self._frames(path)
        return self._found[path]

    def sample(self, frames: Sequence[tuple[str, int]], seconds: float | None = None) -> Found:
        """Those of all frames of a video that are taken.

        Args:
            frames: in their order.
            seconds: that they last, if that is known.
        """
        count = self.max_frames
        if self.fps is not None and seconds is not None:
            count = min(count, max(1, round(seconds * self.fps)))
        numbers = uniform_indices(len(frames), count)
        return Found([frames[i] for i in numbers], numbers, len(frames))

    def _file(self, path: str) -> str:
        full = os.path.join(self.root, path)
        if os.path.isdir(full):
            raise DataError(
                f"path must be an image file, unless data_type is 'video'; got the folder "
                f"{shown_path(full)}"
            )
        if not os.path.isfile(full):
            raise DataError(f"path must be an existing file; got {shown_path(full)}")
        return full

    def _frames(self, path: str) -> Found:
        """The chosen frames of a file or folder."""
        from ral_kernels.viz import PictureError, count_frames, frame_times  # brings torch

        full = os.path.join(self.root, path)
        if not os.path.isdir(full):
            file = self._file(path)
            try:
                if self.fps is None:  # which takes reading the times, in a GIF of every frame
                    return self.sample([(file, i) for i in range(count_frames(file))])
                times, seconds = frame_times(file)
                return self.sample([(file, i) for i in range(len(times))], seconds)
            except ImportError as error:
                raise DataError(_without_pyav(path)) from error
            except (OSError, PictureError) as error:
                raise DataError(
                    f"path must be a readable image, animation or video; got {shown_path(file)}: "
                    f"{_reason(error)}"
                ) from error
        with os.scandir(full) as entries:
            names = [entry.name for entry in entries if _is_frame(entry)]
        if not names:
            raise DataError(f"path must be a folder with images; got none in {shown_path(full)}")
        return self.sample(
            [(os.path.join(full, name), 0) for name in sorted(names, key=natural_key)]
        )


def _is_frame(entry: os.DirEntry[str]) -> bool:
    from ral_kernels.viz import PICTURE_SUFFIXES

    # A leading dot marks files of file managers, such as "._frame1.png".
    suffix = os.path.splitext(entry.name)[1].lower()
    return suffix in PICTURE_SUFFIXES and not entry.name.startswith(".") and entry.is_file()


def _refuse_video(path: str) -> None:
    from ral_kernels.viz import VIDEO_SUFFIXES  # brings torch

    if path.lower().endswith(VIDEO_SUFFIXES):
        raise DataError(
            "path must be an image, a list of images, or one video with data_type 'video'; got the "
            f"video {shown_path(path)}"
        )


def _without_pyav(path: str) -> str:
    """What to do where PyAV is missing."""
    stem, long = os.path.splitext(path)[0], len(path) > 300
    given, path, stem = shown_path(path), "VIDEO" if long else path, "FOLDER" if long else stem
    return (
        f"path must be a video that can be read; got {given}, and PyAV is missing. Install it with "
        "`pip install av`; or extract frames into a folder, say two a second, with "
        f"`mkdir -p '{stem}' && ffmpeg -i '{path}' -vf fps=2 '{stem}/frame%05d.jpg'`, "
        f"and give {stem!r}"
    )


def read_images(references: Sequence[Mapping[str, Any]]) -> list[Image.Image]:
    """Decode images with the reader of `ral_kernels.viz`: RGB, upright, on white.

    Args:
        references: for each image its `path`, the index of its `frame` and its `source`
            ("file:line"). With `row`, path is the key of a `Source`, and frame counts the images of
            that row. Frames of one animation are read fastest in order.

    Raises:
        DataError: an image that cannot be decoded, by line and path.
    """
    from ral_kernels.viz import PictureError, read_pictures

    images: list[Image.Image] = []
    for (path, row), group in itertools.groupby(references, key=_file_of):
        frames = list(group)
        numbers = [reference["frame"] for reference in frames]
        try:
            if row is None:
                images += read_pictures(path, numbers)
            else:
                contents = stored_images(path, row)
                images += [read_pictures(contents[number])[0] for number in numbers]
        except (OSError, PictureError) as error:
            what = "path" if row is None else "images"
            got = (
                shown_path(path) if row is None else f"row {row + 1} of {path.rsplit('::', 2)[0]!r}"
            )
            raise DataError(
                f"{frames[0]['source']}: {what} must be an image that can be decoded; "
                f"got {got}: {_reason(error)}"
            ) from error
    return images


def _file_of(reference: Mapping[str, Any]) -> tuple[str, int | None]:
    return reference["path"], reference.get("row")


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", error))
