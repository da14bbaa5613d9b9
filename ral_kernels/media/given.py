"""What a caller gives as pictures and videos, in any of its forms, as Pillow images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from .pictures import PICTURE_SUFFIXES, as_rgb, read_pictures
from .videos import Video, check_sampling, evenly, read_video

# Where a part of a message holds its media, in the order of trying.
KEYS = ("url", "path")


@dataclass(frozen=True)
class Picture:
    """One picture: an "image" by itself, or a "frame" of a video with its time in seconds."""

    image: Any
    kind: str = "image"
    time: float | None = None


def pictures_of(op: str, images: Any) -> list[Picture]:
    """Images as Pillow images, files, uint8 arrays [H, W, 3] or `Video`s, whose frames they are."""
    given = list(images) if isinstance(images, (list, tuple)) else [images]
    found: list[Picture] = []
    for image in given:
        if isinstance(image, Video):
            pairs = zip(image.frames, image.times, strict=True)
            found += [Picture(frame, "frame", time) for frame, time in pairs]
        else:
            found.append(Picture(_image(op, image)))
    return found


def videos_of(op: str, videos: Any, fps: Any = None, num_frames: Any = None) -> list[Video]:
    """Videos as files, `Video`s, uint8 arrays [T, H, W, 3] or lists of pictures.

    Args:
        op: who asks, for messages.
        videos: one, or a list of several. A list of pictures alone is one video.
        fps, num_frames: which frames of a file; of frames without times, fps is their rate.
    """
    rate, count = check_sampling(op, fps, num_frames)
    several = isinstance(videos, (list, tuple)) and not all(map(_is_frame, videos))
    return [
        _video(op, video, fps, num_frames, rate, count)
        for video in (videos if several else [videos])
    ]


def _video(op: str, video: Any, fps: Any, num_frames: Any, rate: float, count: int | None) -> Video:
    if isinstance(video, (str, Path)):
        return read_video(_local(op, video), fps=fps, num_frames=num_frames)
    if isinstance(video, Video):
        chosen = evenly(len(video.frames), count or len(video.frames))
        frames = tuple(video.frames[i] for i in chosen)
        return Video(frames, tuple(video.times[i] for i in chosen), video.duration)
    if isinstance(video, (list, tuple)):
        pictures = [_image(op, frame) for frame in video]
        if len({picture.size for picture in pictures}) > 1:
            raise ValueError(f"{op}: frames of a video must have one size; got several")
    elif _is_array(video):
        array = _array(op, video, 4, "a video as an array must be uint8 [T, H, W, 3]")
        pictures = [_from_array(frame) for frame in array]
    else:
        raise TypeError(
            f"{op}: videos must be files, uint8 arrays [T, H, W, 3], lists of pictures or "
            f"viz.Video; got {type(video).__name__}"
        )
    if not pictures:
        raise ValueError(f"{op}: a video must have at least one frame; got none")
    chosen = evenly(len(pictures), count or len(pictures))
    frames = tuple(pictures[i] for i in chosen)
    return Video(frames, tuple(i / rate for i in chosen), len(pictures) / rate)


def _is_frame(given: Any) -> bool:
    """Whether it is one frame in a list of frames, and no video in a list of videos."""
    if isinstance(given, (str, Path)):
        name = os.fspath(given).lower()
        return name.endswith(PICTURE_SUFFIXES) and not name.endswith((".gif", ".webp"))
    return not isinstance(given, (Video, list, tuple)) and getattr(given, "ndim", 3) == 3


def _is_array(given: Any) -> bool:
    return hasattr(given, "__array_interface__") or hasattr(given, "numpy")


def _image(op: str, image: Any) -> Any:
    from PIL import Image

    if isinstance(image, (str, Path)):
        return read_pictures(_local(op, image))[0]
    if isinstance(image, Image.Image):
        return as_rgb(image)
    if _is_array(image):
        return _from_array(_array(op, image, 3, "an image as an array must be uint8 [H, W, 3]"))
    raise TypeError(
        f"{op}: images must be Pillow images, files or uint8 arrays; got {type(image).__name__}"
    )


def _array(op: str, given: Any, dims: int, wanted: str) -> Any:
    array = given.detach().cpu().numpy() if hasattr(given, "numpy") else given
    if str(array.dtype) != "uint8" or array.ndim != dims or array.shape[-1] != 3:
        raise ValueError(f"{op}: {wanted}; got {array.dtype} {tuple(array.shape)}")
    return array


def _from_array(array: Any) -> Any:
    from PIL import Image

    return Image.fromarray(array)


def _local(op: str, name: str | os.PathLike[str]) -> str:
    """A path, also from a `file://` address. Nothing is fetched."""
    text = os.fspath(name)
    scheme = text.split(":", 1)[0].lower() if ":" in text[:8] else ""
    if scheme == "file":
        return unquote(urlsplit(text).path)
    if scheme in ("http", "https", "ftp"):
        raise ValueError(f"{op}: media must be local files; download {text!r} first")
    return text


def split_messages(
    op: str, prompt: Any, fps: Any = None, num_frames: Any = None
) -> tuple[Any, list[Picture], list[Video]]:
    """Take the media out of the parts of chat messages.

    A part {"type": "image"} or {"type": "video"} holds its media under the name of its type,
    "path" or "url" (a local file). A video part may have "fps" or "num_frames" of its own.

    Returns:
        The messages with bare parts, and the pictures and videos in their order. A prompt that is
        no list of messages comes back as it is.

    Raises:
        ValueError: some parts hold their media and others do not.
    """
    pictures: list[Picture] = []
    videos: list[Video] = []
    bare = 0
    if isinstance(prompt, str) or not isinstance(prompt, (list, tuple)):
        return prompt, pictures, videos
    messages: list[Any] = []
    for message in prompt:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, Sequence) or isinstance(content, str):
            messages.append(message)
            continue
        parts: list[Any] = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind not in ("image", "video"):
                parts.append(part)
                continue
            held = next((part[key] for key in (kind, *KEYS) if part.get(key) is not None), None)
            if held is None:
                bare += 1
            elif kind == "image":
                pictures += pictures_of(op, held)
            else:
                own = {name: part[name] for name in ("fps", "num_frames") if name in part}
                options = own or {"fps": fps, "num_frames": num_frames}
                made = videos_of(op, held, **options)
                if len(made) != 1:
                    raise ValueError(f"{op}: a video part must hold one video; got {len(made)}")
                videos += made
            parts.append({"type": kind})
        messages.append({**message, "content": parts})
    if bare and (pictures or videos):
        raise ValueError(
            f"{op}: each image and video part of prompt must hold its media, or none may; got "
            f"{len(pictures) + len(videos)} that do and {bare} that do not"
        )
    return messages, pictures, videos
