"""The text around a question: options, the kind of answer, and the form of the response."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ral.rewards import PROBLEM_TYPES, STYLES
from ral.rewards.tags import check_style

from .errors import DataError

_FORMS = {
    "think": (
        "Reason first, between <think> and </think>. "
        "Then give the answer alone, between <answer> and </answer>."
    ),
    "direct": "Reply with the answer alone, between <answer> and </answer>.",
}
_ANSWERS = {
    "multiple choice": "The answer is the letter of one option.",
    "numerical": "The answer is one number, in digits.",
    "OCR": "The answer is the text itself, exactly as it is written in the picture.",
    "free-form": "The answer is a short text.",
    "regression": "The answer is one number, in digits; come as close to it as you can.",
}
assert set(_FORMS) == set(STYLES) and set(_ANSWERS) == set(PROBLEM_TYPES)

_FRAMES = "The images are frames of one video, in the order of time."
# What other formats write where an image or a video stands.
IMAGE, VIDEO = "<image>", "<video>"
_MARK = f"(?:{IMAGE}|{VIDEO})"
_LEADING = re.compile(rf"(?:\s*{_MARK})+")
_MARKS_AROUND = re.compile(rf"^(?:\s*{_MARK})+|(?:{_MARK}\s*)+$")
# What tokenizers may read as special tokens: `<|image_pad|>`, `<boi>`, `[IMG]`, `</s>`.
_MODALITY = "image|img|im|placeholder|video|vid|audio|sound|speech|vision|media|frame"
_SPECIAL = re.compile(
    r"[<\[](?="
    r"[|｜][^<>]{1,60}[|｜]>"
    rf"|/?(?:\w+[_-])?(?:{_MODALITY})(?:(?:[_-]?(?:pad|token))?\d*|[_-][\w-]+)[>\]]"
    r"|/?(?:(?:start|end|begin)_of_\w+|[be]o\w{1,2}|s|pad|unk|mask|sep|cls|ctx|patch|blank)>"
    r"|(?:row_\d+_col_\d+|fake_token_around_image|so_(?:start|end|embedding)|racm3:break)>"
    r"|/?(?:INST|SYS|CLS|SEP|PAD|UNK|MASK)\])",
    re.IGNORECASE,
)


def letter(index: int) -> str:
    """The letter of an option: A for 0."""
    return chr(ord("A") + index)


def escaped(text: str, keep: tuple[str, ...] = ()) -> str:
    """The text with a space in what a tokenizer may read as a special token: `< |image_pad|>`.

    Such a token would stand for an image that is not there, or end the turn.
    """

    def apart(found: re.Match[str]) -> str:
        return found[0] if text.startswith(keep, found.start()) else f"{found[0]} "

    return _SPECIAL.sub(apart, text)


def question_text(
    problem: str,
    problem_type: str,
    *,
    options: Sequence[str] = (),
    style: str = "think",
    video: bool = False,
    num_images: int | None = None,
) -> str:
    """A question, its options on lines "A. …", the kind of answer, and the form of the response.

    Special tokens in problem and options are `escaped`.

    Args:
        problem: the question. Where it and the options hold `<image>` once for each image, the
            marks stay, and `conversation` puts the images there; so does one `<video>`. Otherwise
            marks at its beginning and end are left out.
        problem_type: one of `ral.rewards.PROBLEM_TYPES`.
        options: the texts of the options, without letters.
        style: "think" or "direct".
        video: whether the images are the frames of a video, which the text then says.
        num_images: how many images there are.

    Raises:
        ValueError: another style or type of problem.
    """
    check_style("question_text", style)
    if problem_type not in _ANSWERS:
        raise ValueError(
            f"question_text: problem_type must be one of {', '.join(map(repr, PROBLEM_TYPES))}; "
            f"got {problem_type!r}"
        )
    body = [problem, *(f"{letter(i)}. {option}" for i, option in enumerate(options))]
    if video and num_images and problem.count(VIDEO) == 1:
        body[0] = problem.replace(VIDEO, IMAGE * num_images)
    marks = sum(line.count(IMAGE) for line in body)
    leading = _LEADING.match(body[0])
    if marks != num_images or (leading and leading[0].count(IMAGE) == marks):
        body[0] = _MARKS_AROUND.sub("", problem)
    lines = [_FRAMES] if video else []
    lines += [escaped(line, keep=(IMAGE, VIDEO)).strip() for line in body]
    lines.append(f"{_ANSWERS[problem_type]} {_FORMS[style]}")
    return "\n".join(lines)


def conversation(text: str, num_images: int) -> list[dict[str, Any]]:
    """One message of the user: an image where `<image>` stands, or all images before the text.

    The parts of images come without an "image" key, which TRL's `prepare_multimodal_messages` fills
    in from the row's `images`.

    Raises:
        DataError: the text holds `<video>`, or `<image>` another number of times.
    """
    marks = text.count(IMAGE)
    if marks not in (0, num_images) or VIDEO in text:
        raise DataError(
            f"problem must hold {IMAGE} once for each image, {num_images} times, or only at its "
            f"beginning and end; got {marks} {IMAGE} and {text.count(VIDEO)} {VIDEO}"
        )
    texts = text.split(IMAGE) if marks else [""] * num_images + [text]
    content = [{"type": "text", "text": texts[0]}]
    for each in texts[1:]:
        content += [{"type": "image"}, {"type": "text", "text": each}]
    content = [part for part in content if part.get("text") != ""]
    return [{"role": "user", "content": content}]


def asks_for(prompt: Sequence[dict[str, Any]], style: str) -> bool:
    """Whether a prompt made here asks for a response of the style."""
    content = prompt[-1]["content"]
    text = content if isinstance(content, str) else content[-1].get("text") or ""
    return text.endswith(_FORMS[style])


def response(answer: str, style: str, thinking: str = "") -> str:
    """A response in the form of the style, with the thinking where the style has it.

    Special tokens in both are `escaped`.
    """
    answer = f"<answer>{escaped(answer)}</answer>"
    return f"<think>{escaped(thinking)}</think>\n{answer}" if style == "think" else answer
