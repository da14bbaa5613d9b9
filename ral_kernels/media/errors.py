"""What the readers of pictures and videos say of a file that they cannot read."""

from __future__ import annotations

import io
import os
from typing import IO

File = str | os.PathLike[str] | bytes  # a path, or the contents of a picture

# Pillow tries no other decoder: it would hand an EPS file to Ghostscript.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")


class PictureError(ValueError):
    """A file that is no picture, or cannot be decoded; `reason` says why."""

    wanted = f"a picture must be {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{self.wanted}; got {name!r}: {reason}")
        self.reason = reason


class VideoError(PictureError):
    """A file that is no video, or cannot be decoded; `reason` says why."""

    wanted = "a video must be a file that PyAV decodes"


def opened_file(path: File) -> IO[bytes]:
    """The file, to read.

    Raises:
        OSError: it cannot be opened.
        PictureError: it has an impossible name.
    """
    if isinstance(path, bytes):
        return io.BytesIO(path)
    name = short_path(path)
    try:
        return open(path, "rb")
    except OSError as error:  # its own message may be a `data:` URI of a million letters
        raise OSError(error.errno, error.strerror, name) from None
    except ValueError as error:  # a zero byte in the name
        raise PictureError(name, str(error)) from error


def short_path(path: File) -> str:
    """A path as a message shows it: of a very long one, such as a `data:` URI, both ends."""
    if isinstance(path, bytes):
        return f"a file of {len(path):,} bytes"
    text = os.fspath(path)
    return text if len(text) <= 400 else f"{text[:60]}...{text[-60:]} ({len(text)} characters)"
