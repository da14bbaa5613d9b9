"""The quick tier of the suite: a sample that the tests' parameters choose.

Of each parametrised test it keeps enough items that every value of every parameter occurs. It keeps
every other test. Of neither does it keep what is marked `slow`. tests/README.md says how to run it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import pytest


def covering(rows: Sequence[Mapping[str, Hashable]]) -> list[int]:
    """Indices of rows among which every value of every parameter (the keys) occurs.

    A greedy choice: the next row has the most values that have not occurred. Among equals it has
    the most pairs of values that have not, then the values and pairs that were chosen least often.
    So where a long table of cases meets a few backends and dtypes, their pairs take turns.
    """
    numbers: dict[Hashable, int] = {}  # of values and pairs: numbers are quick to look up

    def numbered(found: Iterable[Hashable]) -> list[int]:
        return [numbers.setdefault(x, len(numbers)) for x in found]

    values = [numbered(row.items()) for row in rows]
    pairs = [numbered(combinations(sorted(row), 2)) for row in values]
    times = [0] * len(numbers)  # that a value or a pair was chosen

    def worth(index: int) -> tuple[int, int, int]:
        new, new_pairs = (sum(times[x] == 0 for x in xs[index]) for xs in (values, pairs))
        return new, new_pairs, -sum(times[x] for xs in (values, pairs) for x in xs[index])

    remaining = dict.fromkeys(range(len(rows)))
    chosen: list[int] = []
    while remaining:
        best = max(remaining, key=worth)  # the first of equals
        if chosen and worth(best)[0] == 0:
            break
        chosen.append(best)
        for x in (*values[best], *pairs[best]):
            times[x] += 1
        del remaining[best]
    return sorted(chosen)


def quick(
    items: Iterable[pytest.Item], runs_here: Callable[[pytest.Item], bool]
) -> set[pytest.Item]:
    """The items that are the quick tier.

    Args:
        items: What was collected. Whether an item is chosen depends on those of its own test alone.
        runs_here: Whether this machine has what an item needs, or will skip it. What it will skip
            covers nothing: that is sampled by itself, and the skips are reported.
    """
    chosen: set[pytest.Item] = set()
    tests: dict[Hashable, list[pytest.Function]] = {}
    for item in items:
        if item.get_closest_marker("slow") is not None:
            continue
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            key = (item.path, item.cls, item.originalname, runs_here(item))
            tests.setdefault(key, []).append(item)
        else:
            chosen.add(item)
    for parametrised in tests.values():
        chosen |= {parametrised[index] for index in covering([row(item) for item in parametrised])}
    return chosen


def row(item: pytest.Function) -> dict[str, Hashable]:
    """The parameters of an item; those that are listed together, as rows of a table, are one."""
    values = {name: _key(value) for name, value in item.callspec.params.items()}
    for marker in item.iter_markers("parametrize"):
        names = marker.args[0] if marker.args else marker.kwargs["argnames"]
        together = [x.strip() for x in names.split(",")] if isinstance(names, str) else [*names]
        values[",".join(together)] = tuple(values.pop(name) for name in together)
    return values


def _key(value: Any) -> Hashable:
    """Equal for equal values of one type; the items of a test share those that have no hash."""
    try:
        hash(value)
    except TypeError:
        return id(value)
    return type(value), value
