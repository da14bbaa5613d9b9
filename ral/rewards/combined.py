"""The reward of the paper: accuracy and format in one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from .accuracy import accuracy_reward
from .tags import check_style, format_reward

ACCURACY_WEIGHT = 0.9
FORMAT_WEIGHT = 0.1
# For TRL: reward_funcs=[accuracy_reward, format_reward], reward_weights=REWARD_WEIGHTS.
REWARD_WEIGHTS = [ACCURACY_WEIGHT, FORMAT_WEIGHT]


def combined_reward(
    style: str = "think",
    *,
    accuracy_weight: float = ACCURACY_WEIGHT,
    format_weight: float = FORMAT_WEIGHT,
    name: str = "combined_reward",
) -> Callable[..., list[float]]:
    """A reward function for TRL: accuracy_weight · accuracy + format_weight · format.

    Given TRL's `log_metric`, it also logs the means of the two parts as `accuracy` and `format`.

    Args:
        style: the form that the format reward wants, "think" or "direct".
        accuracy_weight: a finite number ≥ 0.
        format_weight: a finite number ≥ 0.
        name: its `__name__`, under which TRL logs it.

    Returns:
        f(completions, solution, problem_type, **columns) -> list[float].

    Raises:
        ValueError: another style or weight.
    """
    check_style("combined_reward", style)
    for label, weight in (("accuracy_weight", accuracy_weight), ("format_weight", format_weight)):
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"combined_reward: {label} must be finite and ≥ 0; got {weight!r}")

    def reward(
        completions: Sequence[Any],
        solution: Sequence[str],
        problem_type: Sequence[str],
        options: Sequence[Sequence[str] | None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> list[float]:
        accuracy = accuracy_reward(completions, solution, problem_type, options)
        form = format_reward(completions, style, **kwargs)
        if log_metric is not None and completions:
            log_metric("accuracy", sum(accuracy) / len(accuracy))
            log_metric("format", sum(form) / len(form))
        return [
            accuracy_weight * a + format_weight * f for a, f in zip(accuracy, form, strict=True)
        ]

    reward.__name__ = reward.__qualname__ = name
    return reward


paper_reward = combined_reward(name="paper_reward")
