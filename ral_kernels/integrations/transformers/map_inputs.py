"""What `attention_map` gives the model, and where each picture is in its prompt."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...media.given import Picture, pictures_of, split_messages, videos_of
from ...media.videos import Video
from .spans import VisionRegion, VisionSpans, spans_for

OP = "attention_map"


@dataclass(frozen=True)
class Media:
    """All that a prompt shows."""

    pictures: list[Picture]
    videos: list[Video]

    def again(self) -> dict[str, Any]:
        """As arguments of another call. Pictures that are frames by themselves stay images."""
        return {
            "images": [picture.image for picture in self.pictures] or None,
            "videos": self.videos or None,
        }


def gather(images: Any, videos: Any, prompt: Any, fps: Any, num_frames: Any) -> tuple[Media, Any]:
    """All pictures and videos, and the prompt without those that it held."""
    prompt, pictures, films = split_messages(OP, prompt, fps, num_frames)
    if (pictures or films) and not (images is None and videos is None):
        raise ValueError(
            f"{OP}: images and videos must be None where the messages hold them; got both"
        )
    if images is not None:
        pictures = pictures_of(OP, images)
    if videos is not None:
        films = videos_of(OP, videos, fps, num_frames)
    if not pictures and not films:
        raise ValueError(f"{OP}: images must hold at least one picture; got none")
    return Media(pictures, films), prompt


def model_inputs(
    model: Any, processor: Any, media: Media, prompt: Any, options: Mapping[str, Any]
) -> tuple[str, dict[str, Tensor]]:
    """The prompt as text, and what the model takes: tensors of one sample, on its device."""
    text = _prompt_text(processor, media, prompt)
    bos = getattr(processor.tokenizer, "bos_token", None)
    if bos and text.startswith(bos):
        options = {"add_special_tokens": False, **options}  # chat templates write it themselves
    given: dict[str, Any] = {}
    if media.pictures:
        given["images"] = [[picture.image for picture in media.pictures]]
    if media.videos:
        given.update(_video_inputs(processor, media.videos))
    processed = processor(**given, text=[text], return_tensors="pt", **options)
    first = next(model.parameters())
    return text, {
        name: value.to(first.device, first.dtype if name.startswith("pixel") else value.dtype)
        for name, value in processed.items()
        if isinstance(value, Tensor)
    }


def _video_inputs(processor: Any, videos: Sequence[Video]) -> dict[str, Any]:
    """Arguments of a processor's call: frames that are not sampled again, with their times."""
    import numpy as np

    if getattr(processor, "video_processor", None) is None:
        name = type(processor).__name__
        raise NotImplementedError(
            f"{OP}: videos are not supported by this {name}, because transformers' video "
            "processors need torchvision and it has no other (`pip install torchvision` where the "
            "family has one); frames as images are: images=viz.read_video(file)"
        )
    return {
        "videos": [np.stack([np.asarray(frame) for frame in video.frames]) for video in videos],
        "video_metadata": [
            {  # in milliseconds, so that frames at uneven times keep theirs
                "total_num_frames": max(1, round(1000 * video.duration)),
                "fps": 1000.0,
                "frames_indices": [round(1000 * time) for time in video.times],
                "duration": video.duration,
                "width": video.frames[0].width,
                "height": video.frames[0].height,
            }
            for video in videos
        ],
        "do_sample_frames": False,
    }


def _prompt_text(processor: Any, media: Media, prompt: Any) -> str:
    tokens = _placeholders(processor)
    if isinstance(prompt, str):
        if any(token in prompt for token in tokens.values()):
            return prompt
        if getattr(processor, "chat_template", None) is None:
            raise ValueError(
                f"{OP}: processor must have a chat template, or prompt hold "
                f"{tokens.get('image')!r} where each image goes; got {prompt!r}"
            )
        content: list[dict[str, str]] = [{"type": "image"}] * len(media.pictures)
        content += [{"type": "video"}] * len(media.videos) + [{"type": "text", "text": prompt}]
        prompt = [{"role": "user", "content": content}]
    elif not isinstance(prompt, (list, tuple)):
        raise TypeError(f"{OP}: prompt must be text or messages; got {type(prompt).__name__}")
    return str(
        processor.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
    )


def _placeholders(processor: Any) -> dict[str, str]:
    """What stands in a text for an image and for a video."""
    found = {kind: getattr(processor, f"{kind}_token", None) for kind in ("image", "video")}
    return {kind: token for kind, token in found.items() if token}


def question_of(prompt: Any) -> str:
    """The words that the user wrote, for titles."""
    if isinstance(prompt, str):
        return prompt
    parts: list[str] = []
    for message in prompt:
        if message.get("role") == "user":
            content = message.get("content", "")
            pieces = [content] if isinstance(content, str) else content
            parts += [p.get("text", "") if isinstance(p, Mapping) else str(p) for p in pieces]
    return " ".join(filter(None, parts))


@dataclass(frozen=True)
class Shown:
    """A picture of the map, and its regions in the prompt: coarse, then fine."""

    picture: Picture
    regions: tuple[VisionRegion, ...]


def placed(
    processor: Any, inputs: Mapping[str, Tensor], media: Media, text: str
) -> tuple[VisionSpans, list[Shown]]:
    """A span for each picture, in the order of the prompt, and the pictures."""
    first = spans_for(processor, inputs, "image")
    in_steps = any(region.kind == "video" for region in first.regions)
    order = _order(processor, media, text)
    wanted = sum(1 if isinstance(each, Picture) or in_steps else len(each.frames) for each in order)
    if (seen := first.num_items()) != wanted:
        what = (
            f"{len(media.pictures)} images" if not media.videos else f"{wanted} images and videos"
        )
        raise ValueError(
            f"{OP}: the prompt must hold each of the {what} once; the processor "
            f"made {seen} of them (pan and scan: turn it off in processor_options)"
        )
    pictures = [
        p for each in order for p in ([each] if isinstance(each, Picture) else _frames(each))
    ]
    sizes = None if in_steps else [(p.image.height, p.image.width) for p in pictures]
    found = spans_for(processor, inputs, "frame", image_sizes=sizes)
    shown: list[Shown] = []
    items = iter([found.of_item(item) for item in range(found.num_items())])
    for each in order:
        if isinstance(each, Video) and in_steps:
            shown += _steps(each, next(items))
            continue
        for picture in [each] if isinstance(each, Picture) else _frames(each):
            shown.append(Shown(picture, next(items)))
    return found, shown


def _frames(video: Video) -> list[Picture]:
    pairs = zip(video.frames, video.times, strict=True)
    return [Picture(frame, "frame", time) for frame, time in pairs]


def _order(processor: Any, media: Media, text: str) -> list[Picture | Video]:
    """Pictures and videos in the order of the prompt."""
    tokens = _placeholders(processor)
    if not media.videos or not media.pictures:
        return [*media.pictures, *media.videos]
    left: dict[str, list[Any]] = {"image": list(media.pictures), "video": list(media.videos)}
    kinds = {token: kind for kind, token in tokens.items()}
    marks = re.findall("|".join(re.escape(token) for token in kinds), text)
    return [left[kinds[mark]].pop(0) for mark in marks if left[kinds[mark]]]


def _steps(video: Video, regions: Sequence[VisionRegion]) -> list[Shown]:
    """The steps of time of a video, each shown by its first frame."""
    steps = sorted({region.frame for region in regions})
    length = math.ceil(len(video.frames) / len(steps))
    frames = _frames(video)
    return [
        Shown(
            frames[min(step * length, len(frames) - 1)],
            tuple(region for region in regions if region.frame == step),
        )
        for step in steps
    ]


def check_written(inputs: Mapping[str, Tensor], found: VisionSpans, written: Tensor) -> None:
    """In the forward over prompt and response, a placeholder would need a picture of its own."""
    held = {int(inputs["input_ids"][0, region.keys[0, 0]]) for region in found.regions}
    for placeholder in sorted(held):
        if bool((written == placeholder).any()):
            raise ValueError(
                f"{OP}: the response must not hold the placeholder of images; token "
                f"{int((written == placeholder).nonzero()[0])} is one (generate_options="
                f"{{'suppress_tokens': [{placeholder}]}} keeps it out)"
            )
