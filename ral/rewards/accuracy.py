"""The accuracy of answers, by type of problem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .choice import parse_choice
from .numbers import parse_number, relative_closeness, same_number
from .tags import bare_solution, completion_text, find_answer
from .text import rouge, word_error_rate


def accuracy_reward(
    completions: Sequence[Any],
    solution: Sequence[str],
    problem_type: Sequence[str],
    options: Sequence[Sequence[str] | None] | None = None,
    **kwargs: object,
) -> list[float]:
    """How right each answer is, in [0, 1].

    The answer is what stands in the one `<answer>…</answer>` of the completion, whatever surrounds
    it; without the tags, or with several, the reward is 0.0. By type of problem:

    - "multiple choice": 1.0 for the letter of the solution (`parse_choice`);
    - "numerical": 1.0 within 0.005 and 2 % of the solution (`parse_number`, `same_number`);
    - "OCR": 1 − word error rate, not below 0 (`word_error_rate`);
    - "free-form": mean F1 of ROUGE-1, -2 and -L (`rouge`);
    - "regression": 1 − relative error, not below 0 (`relative_closeness`).

    Args:
        completions: strings or conversations (`completion_text`). No content of theirs raises.
        solution: one for each completion, with or without `<answer>` tags.
        problem_type: one for each completion.
        options: for each completion the texts of its options A, B, …, or nothing.
        kwargs: the other columns that TRL passes; not used.

    Raises:
        ValueError: columns of different lengths, an unknown type of problem, a solution that is no
            string. Those are errors of the data; `ral.data.load_jsonl` finds them beforehand.
    """
    count = len(completions)
    if options is None:
        options = [None] * count
    for name, column in (
        ("solution", solution),
        ("problem_type", problem_type),
        ("options", options),
    ):
        if isinstance(column, str) or len(column) != count:
            got = "a string" if isinstance(column, str) else len(column)
            raise ValueError(
                f"accuracy_reward: {name} must be a list of {count}, as the completions; got {got}"
            )
    return [
        _accuracy(*row) for row in zip(completions, solution, problem_type, options, strict=True)
    ]


def _accuracy(
    completion: object, solution: str, problem_type: str, options: Sequence[str] | None
) -> float:
    score = _SCORES.get(problem_type) if isinstance(problem_type, str) else None
    if score is None:
        raise ValueError(
            f"accuracy_reward: problem_type must be one of {', '.join(map(repr, PROBLEM_TYPES))}; "
            f"got {problem_type!r}"
        )
    if not isinstance(solution, str):
        raise ValueError(f"accuracy_reward: solution must be a string; got {solution!r}")
    answer = find_answer(completion_text(completion))
    return 0.0 if answer is None else score(answer, bare_solution(solution), options)


def _choice(answer: str, solution: str, options: Sequence[str] | None) -> float:
    wanted = parse_choice(solution, options)
    return float(wanted is not None and parse_choice(answer, options) == wanted)


def _numerical(answer: str, solution: str, options: object) -> float:
    a, s = parse_number(answer), parse_number(solution)
    return float(a is not None and s is not None and same_number(a, s))


def _regression(answer: str, solution: str, options: object) -> float:
    a, s = parse_number(answer), parse_number(solution)
    return 0.0 if a is None or s is None else relative_closeness(a, s)


def _ocr(answer: str, solution: str, options: object) -> float:
    return max(0.0, 1.0 - word_error_rate(solution, answer))


def _free_form(answer: str, solution: str, options: object) -> float:
    return rouge(solution, answer)


_SCORES: dict[str, Callable[[str, str, Sequence[str] | None], float]] = {
    "multiple choice": _choice,
    "numerical": _numerical,
    "OCR": _ocr,
    "free-form": _free_form,
    "regression": _regression,
}
PROBLEM_TYPES = tuple(_SCORES)
