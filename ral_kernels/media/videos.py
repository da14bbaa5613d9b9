"""Frames of videos, evenly spread, with their times: for `attention_map` and the command line."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from .pictures import frame_times, read_pictures

FPS = 2.0  # frames a second that Qwen-VL samples
MOST = 768  # and how many of a video at most


@dataclass(frozen=True)
class Video:
    """Frames of a video, and when each is shown.

    Attributes:
        frames: Pillow images, 8 bits of RGB, upright.
        times: seconds from the start of the video, rising.
        duration: of the whole video, in seconds.
    """

    frames: tuple[Any, ...]
    times: tuple[float, ...]
    duration: float

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.times, self.times[1:], strict=False))
        if not self.frames or len(self.times) != len(self.frames) or not rising:
            raise ValueError(
                "Video: times must be as many as frames, at least one, and rising; got "
                f"{len(self.frames)} frames and times {list(self.times)}"
            )


def evenly(total: int, count: int) -> list[int]:
    """At most `count` of 0 ... total - 1, evenly spread from the first to the last."""
    if count >= total:
        return list(range(total))
    return [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]


def read_video(
    path: str | os.PathLike[str], *, fps: float | None = None, num_frames: int | None = None
) -> Video:
    """Frames of a video or of an animated GIF, WebP or APNG, evenly spread, with their times.

    Only the chosen frames, and those that their decoding needs, are decoded.

    Args:
        path: a file.
        fps: how many frames a second of the video, 768 at most. Default 2.
        num_frames: how many frames instead.

    Raises:
        ImportError: PyAV is missing.
        OSError: the file cannot be opened.
        TypeError, ValueError: fps or num_frames is not positive, or both are given.
        PictureError: the file is no video or animation, or cannot be decoded.
    """
    if fps is not None and num_frames is not None:
        raise ValueError(f"read_video: fps must be None where num_frames is given; got {fps!r}")
    rate, count = check_sampling("read_video", fps, num_frames)
    times, duration = frame_times(path)
    wanted = count or min(MOST, max(1, round(duration * rate)))
    chosen = evenly(len(times), wanted)
    frames = read_pictures(path, chosen)
    return Video(tuple(frames), tuple(times[frame] for frame in chosen), duration)


def check_sampling(op: str, fps: Any, num_frames: Any) -> tuple[float, int | None]:
    """fps or its default, and num_frames, checked."""
    for name, value, kinds in (("fps", fps, (int, float)), ("num_frames", num_frames, (int,))):
        if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
            raise TypeError(f"{op}: {name} must be a number; got {value!r}")
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{op}: {name} must be positive; got {value!r}")
    return FPS if fps is None else float(fps), num_frames
