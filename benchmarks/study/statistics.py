"""Means over seeds, their intervals, and the adjustment for several comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval (Student's t); both are shares, not per cent.

    Attributes:
        mean: of the seeds.
        half_width: of the interval; NaN for one seed.
        seeds: how many.
        p: of a mean as far from 0, if the true one is 0; two-sided, NaN for one seed.
    """

    mean: float
    half_width: float
    seeds: int
    p: float = math.nan

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f}{self._interval}"

    @property
    def _interval(self) -> str:
        return "" if math.isnan(self.half_width) else f" ± {100 * self.half_width:.1f}"

    @property
    def signed(self) -> str:
        """In per cent, as a difference."""
        return f"{100 * self.mean:+.1f}{self._interval}".replace("-", "−")


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
    error = deviation(values) / math.sqrt(count)
    half_width = float(stats.t.ppf(0.975, count - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, count - 1)) if error else float(mean == 0)
    return Estimate(mean, half_width, count, p)


def deviation(values: Sequence[float]) -> float:
    """The standard deviation over seeds; NaN for one."""
    if len(values) < 2:
        return math.nan
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """The mean difference over the seeds that both have, or None if there are none."""
    common = sorted(set(ours) & set(theirs))
    return estimate([ours[seed] - theirs[seed] for seed in common]) if common else None


def holm(ps: Sequence[float]) -> list[float]:
    """p of several comparisons, adjusted by Holm's method.

    NaN stays NaN and does not count as a comparison.
    """
    order = sorted((p, i) for i, p in enumerate(ps) if not math.isnan(p))
    adjusted = list(ps)
    least = 0.0
    for rank, (p, i) in enumerate(order):
        least = max(least, min(1.0, p * (len(order) - rank)))
        adjusted[i] = least
    return adjusted
