"""The text around a question: options, the kind of answer, and the form of the response."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ral.rewards import PROBLEM_TYPES, STYLES
from ral.rewards.tags import check_style

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
# Parts of the content say where the images are; the model would read these marks as text.
_MARK = r"(?:<image>|<video>)"
_MARKS_AROUND = re.compile(rf"^(?:\s*{_MARK})+|(?:{_MARK}\s*)+$")


def letter(index: int) -> str:
    """The letter of an option: A for 0."""
    return chr(ord("A") + index)


def question_text(
    problem: str,
    problem_type: str,
    *,
    options: Sequence[str] = (),
    style: str = "think",
    video: bool = False,
) -> str:
    """A question, its options on lines "A. …", the kind of answer, and the form of the response.

    Args:
        problem: the question. `<image>` and `<video>` at its beginning and end are left out.
        problem_type: one of `ral.rewards.PROBLEM_TYPES`.
        options: the texts of the options, without letters.
        style: "think" or "direct".
        video: whether the images are the frames of a video, which the text then says.

    Raises:
        ValueError: another style or type of problem.
    """
    check_style("question_text", style)
    if problem_type not in _ANSWERS:
        raise ValueError(
            f"question_text: problem_type must be one of {', '.join(map(repr, PROBLEM_TYPES))}; "
            f"got {problem_type!r}"
        )
    lines = [_FRAMES] if video else []
    lines.append(_MARKS_AROUND.sub("", problem).strip())
    lines += [f"{letter(i)}. {option}" for i, option in enumerate(options)]
    lines.append(f"{_ANSWERS[problem_type]} {_FORMS[style]}")
    return "\n".join(lines)


def conversation(text: str, num_images: int) -> list[dict[str, Any]]:
    """One message of the user: a part for each image, then the text.

    The parts of images come without an "image" key, which TRL's `prepare_multimodal_messages` fills
    in from the row's `images`.
    """
    content: list[dict[str, str]] = [{"type": "image"} for _ in range(num_images)]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def asks_for(prompt: Sequence[dict[str, Any]], style: str) -> bool:
    """Whether a prompt made here asks for a response of the style."""
    content = prompt[-1]["content"]
    text = content if isinstance(content, str) else content[-1].get("text") or ""
    return text.endswith(_FORMS[style])


def response(answer: str, style: str, thinking: str = "") -> str:
    """A response in the form of the style, with the thinking where the style has it."""
    answer = f"<answer>{answer}</answer>"
    return f"<think>{thinking}</think>\n{answer}" if style == "think" else answer
