"""Means over seeds and their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval (Student's t); NaN half width for one seed."""

    mean: float
    half_width: float
    seeds: int

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.half_width:.1f}"


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of independent runs.

    Raises:
        ValueError: there are none.
    """
    count = len(values)
    if count == 0:
        raise ValueError("estimate: values must not be empty")
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, math.nan, 1)
    spread = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (count - 1))
    return Estimate(mean, float(stats.t.ppf(0.975, count - 1)) * spread / math.sqrt(count), count)


def paired(ours: dict[int, float], theirs: dict[int, float]) -> Estimate | None:
    """The mean difference over the seeds that both have, or None if there are none."""
    common = sorted(set(ours) & set(theirs))
    return estimate([ours[seed] - theirs[seed] for seed in common]) if common else None
