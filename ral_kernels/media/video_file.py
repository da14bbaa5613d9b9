"""A video file, decoded by PyAV: which frames it has, when, and their pixels.

`read_pictures` and `count_frames` of `pictures.py` come here for a file of `VIDEO_SUFFIXES`.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .errors import VideoError, opened_file, short_path

VIDEO_SUFFIXES = (
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv",
    ".webm", ".wmv",
)  # fmt: skip


def is_video(path: str | os.PathLike[str]) -> bool:
    """Whether a file is called a video. An animation, such as a GIF, is a picture with frames."""
    return os.path.splitext(os.fspath(path))[1].lower() in VIDEO_SUFFIXES


def times_of(path: str | os.PathLike[str]) -> tuple[list[float], float]:
    """When each frame of a video is shown, in seconds from its first, and how long it lasts.

    Raises:
        ImportError, OSError, VideoError: as in `read_video`.
    """
    with _opened(path) as (container, stream):
        stamps, _ = _stamps(container, stream)
        times = [float((stamp - stamps[0]) * stream.time_base) for stamp in stamps]
        # The last frame lasts as long as the others do.
        last = times[-1] / (len(times) - 1) if len(times) > 1 else 1 / _rate(stream)
        return times, times[-1] + last


def frames_of(path: str | os.PathLike[str], frames: Sequence[int]) -> list[Any]:
    """Frames of a video by number, upright, as Pillow images; fastest in order.

    Raises:
        ValueError: there is no such frame.
        ImportError, OSError, VideoError: as in `read_video`.
    """
    if not frames:
        return []
    with _opened(path) as (container, stream):
        stamps, keys = _stamps(container, stream)
        for frame in frames:
            if not 0 <= frame < len(stamps):
                raise ValueError(f"frames must lie in [0, {len(stamps)}); got {frame}")
        found: dict[int, Any] = {}
        decoded: Iterator[Any] = iter(())
        position: int | None = None  # of the last decoded frame
        for stamp in sorted({stamps[frame] for frame in frames}):
            key = keys[max(0, bisect.bisect_right(keys, stamp) - 1)] if keys else stamps[0]
            if position is None or key > position:
                decoded = _restart(container, stream, key)
            made, position = _until(decoded, stamp)
            if position != stamp:  # an MPEG program stream seeks too far
                decoded = _restart(container, stream, stamps[0])
                made, position = _until(decoded, stamp)
            if position != stamp:
                seconds = float((stamp - stamps[0]) * stream.time_base)
                raise ValueError(f"the frame at {seconds:.2f} seconds cannot be decoded")
            found[stamp] = _upright(made)
    return [found[stamps[frame]] for frame in frames]


def _restart(container: Any, stream: Any, stamp: int) -> Iterator[Any]:
    container.seek(stamp, stream=stream)
    return iter(container.decode(stream))


def _until(decoded: Iterator[Any], stamp: int) -> tuple[Any, int | None]:
    """The first frame at `stamp` or later, and its own time stamp; None at the end."""
    for frame in decoded:
        position = frame.pts if frame.pts is not None else frame.dts
        if position is not None and position >= stamp:
            return frame, position
    return None, None


def _stamps(container: Any, stream: Any) -> tuple[list[int], list[int]]:
    """The time stamps of all frames and of key frames, rising, without decoding any."""
    stamps: list[int] = []
    keys: list[int] = []
    for packet in container.demux(stream):
        stamp = packet.pts if packet.pts is not None else packet.dts
        if stamp is None or packet.size == 0 or packet.is_discard:
            continue
        stamps.append(stamp)
        if packet.is_keyframe:
            keys.append(stamp)
    if not stamps:
        raise ValueError("it has no frames")
    return sorted(set(stamps)), sorted(keys)


def _rate(stream: Any) -> float:
    return float(stream.average_rate or 2)


def _upright(frame: Any) -> Any:
    """As the player shows it: a phone stores a turned video, and says so."""
    image = frame.to_image()
    turn = int(getattr(frame, "rotation", 0) or 0)
    return image.rotate(turn, expand=True) if turn else image


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream."""
    name = short_path(path)
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f"reading the video {name} needs PyAV; install it with `pip install av`"
        ) from error
    with opened_file(path) as file:
        if not file.read(1):
            raise VideoError(name, "it is empty")
        file.seek(0)
        try:
            with av.open(file) as container:
                if not container.streams.video:
                    raise ValueError("it has no pictures")
                container.streams.video[0].thread_type = "AUTO"
                yield container, container.streams.video[0]
        except (av.FFmpegError, OSError, ValueError) as error:
            raise VideoError(name, getattr(error, "strerror", None) or str(error)) from error
