"""Small video files, written by PyAV, whose frames say their number."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TURNED = bytes.fromhex("00000000 00010000 00000000 ffff0000 00000000 00000000")  # 90° clockwise
UPRIGHT = bytes.fromhex("00010000 00000000 00000000 00000000 00010000 00000000")


def write(
    path: Path, frames: Sequence[Any], *, fps: int = 10, codec: str = "libx264",
    stamps: Sequence[int] | None = None, **options: str,
) -> Path:  # fmt: skip
    """Encode pictures; `stamps` are their times in 1/1000 s instead of equal steps."""
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        if stamps is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_image(picture)
            if stamps is not None:
                frame.pts, frame.time_base = stamps[number], Fraction(1, 1000)
            else:
                frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def steps(count: int, size: tuple[int, int] = (64, 48)) -> list[Image.Image]:
    """Grey pictures, each `240 // count` brighter than the one before."""
    return [Image.new("RGB", size, (8 + 240 * i // count,) * 3) for i in range(count)]


def number_of(picture: Image.Image, count: int) -> int:
    """Which of `steps` a decoded picture is."""
    wanted = [8 + 240 * i // count for i in range(count)]
    mean = float(np.asarray(picture.convert("L")).mean())
    return min(range(count), key=lambda i: abs(wanted[i] - mean))


def turn(path: Path) -> Path:
    """Say in an MP4's track header that it is to be shown turned clockwise, as a phone does."""
    data = path.read_bytes()
    place = data.index(UPRIGHT, data.index(b"tkhd"))
    path.write_bytes(data[:place] + TURNED + data[place + len(UPRIGHT) :])
    return path
