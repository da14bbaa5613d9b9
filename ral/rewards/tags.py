"""The text of a completion and its `<think>` and `<answer>` tags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

STYLES = ("think", "direct")

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def check_style(function: str, style: object) -> None:
    """Raise the ValueError of `function` unless `style` is a response form.

    Args:
        function: the name that the message begins with.
        style: "think" (`<think>…</think><answer>…</answer>`) or "direct" (`<answer>…</answer>`).
    """
    if style not in STYLES:
        raise ValueError(f"{function}: style must be one of {', '.join(STYLES)}; got {style!r}")


def completion_text(completion: object) -> str:
    """The text of a completion, "" where there is none; never raises.

    Args:
        completion: a string, or a conversation (list of messages) whose last message counts. Of a
            content made of parts, the text parts are joined. Thinking that TRL has put into
            `reasoning_content` gets its tags back.
    """
    if isinstance(completion, Sequence) and not isinstance(completion, str | bytes) and completion:
        completion = completion[-1]
    thinking = ""
    if isinstance(completion, dict):
        reasoning = completion.get("reasoning_content")
        if isinstance(reasoning, str) and reasoning:
            thinking = f"<think>{reasoning}</think>"
        completion = completion.get("content")
    if isinstance(completion, list):
        texts = [part.get("text") for part in completion if isinstance(part, dict)]
        return thinking + "".join(text for text in texts if isinstance(text, str))
    return thinking + completion if isinstance(completion, str) else thinking


def has_tags(text: str) -> bool:
    """Whether any of the four tags is in the text."""
    return any(tag in text for tag in _TAGS)


def find_answer(text: str) -> str | None:
    """The text between `<answer>` and `</answer>`, without the white space around it.

    Returns:
        The answer, or "" for an empty one. None unless each of the two tags is in the text exactly
        once and in this order: of several answers none counts.
    """
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    _, _, rest = text.partition("<answer>")
    answer, closing, _ = rest.partition("</answer>")
    return answer.strip() if closing else None


def bare_solution(solution: str) -> str:
    """The solution without the `<answer>` tags that Video-R1 writes around it."""
    answer = find_answer(solution)
    return solution.strip() if answer is None else answer


def has_format(text: str, style: str) -> bool:
    """Whether a response has the form of the style and nothing but white space around it.

    Each tag of the form is in the text exactly once, and no other of the four. Neither the thinking
    nor the answer is blank.
    """
    form = _TAGS if style == "think" else _TAGS[2:]
    if any(text.count(tag) != (tag in form) for tag in _TAGS):
        return False
    for i, tag in enumerate(form):
        before, found, text = text.partition(tag)
        # Outside of a pair of tags there is only white space; inside there is text.
        if not found or bool(before.strip()) != (i % 2 == 1):
            return False
    return not text.strip()


def rendered_end(processor: Any, prompt: Any, **options: Any) -> str:
    """The tag that the chat template ends a prompt with: "<think>", or "".

    Args:
        processor: a processor or tokenizer of transformers.
        prompt: a conversation, or text.
        options: of the processor's `apply_chat_template`.
    """
    if not isinstance(prompt, str):
        prompt = processor.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=True, **options
        )
    return _open_tag(prompt)


def _open_tag(prompt: object) -> str:
    if isinstance(prompt, list) and prompt and prompt[-1].get("role") != "assistant":
        return ""  # only the chat template knows what comes after the user's message
    return _TAGS[0] if completion_text(prompt).rstrip().endswith(_TAGS[0]) else ""


def format_reward(
    completions: Sequence[Any],
    style: str = "think",
    *,
    prompts: Sequence[Any] | None = None,
    prompt_end: Sequence[str] | None = None,
    **kwargs: object,
) -> list[float]:
    """1.0 where the response has the form of Figure 2 of arXiv 2602.04884, else 0.0.

    "think" is `<think>…</think><answer>…</answer>`; "direct" (RAL-zero) is `<answer>…</answer>`.
    Each tag occurs once, with only white space outside of the tags, and some text inside. A
    `<think>` at the prompt's end, where some chat templates put it, begins a "think" response.

    Args:
        completions: strings or conversations (`completion_text`).
        style: "think" or "direct".
        prompts: text, or conversations that may end in a message of the assistant.
        prompt_end: for each completion "<think>" if its chat template ends so, else "". RALTrainer
            passes this column.
        kwargs: the other columns that TRL passes; not used.

    Raises:
        ValueError: another style.
    """
    check_style("format_reward", style)
    texts = [completion_text(completion) for completion in completions]
    if style == "think":
        for ends in (map(_open_tag, prompts or ()), prompt_end or ()):
            if any(ends := list(ends)):
                texts = [end + text for end, text in zip(ends, texts, strict=True)]
                break
    return [float(has_format(text, style)) for text in texts]


def direct_format_reward(completions: Sequence[Any], **kwargs: object) -> list[float]:
    """`format_reward` of the direct style, to name in TRL's `reward_funcs`."""
    return format_reward(completions, "direct")
