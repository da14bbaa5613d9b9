"""The quick tier is a fair sample: of made-up tables, and of the very tests that were collected."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import COLLECTED, QUICK, runs_here
from tests.hypothesis_settings import REPRODUCIBLE
from tests.tiers import covering, row

ROOT = Path(__file__).resolve().parents[1]
ROWS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3), st.integers(0, 2)), unique=True)


@REPRODUCIBLE
@given(ROWS)
def test_every_value_of_a_table_with_holes_occurs(rows: list[tuple[int, ...]]) -> None:
    table = [dict(zip("abc", row, strict=True)) for row in rows]
    chosen = covering(table)
    assert chosen == sorted(set(chosen)) == covering(table)
    found = {value for index in chosen for value in table[index].items()}
    assert found == {value for row in table for value in row.items()}
    assert len(chosen) <= max(1, len(found))  # each brings something new


def test_a_long_table_takes_turns_on_the_short_ones() -> None:
    grid = [
        {"backend": backend, "dtype": dtype, "case": case}
        for backend, dtype, case in product(("reference", "cpu", "triton"), range(3), range(60))
    ]
    chosen = [grid[index] for index in covering(grid)]
    assert len(chosen) == 60
    pairs = Counter((row["backend"], row["dtype"]) for row in chosen)
    assert len(pairs) == 9 and max(pairs.values()) - min(pairs.values()) <= 2


def test_without_parameters_one_row_is_left() -> None:
    assert covering([{}, {}]) == [0] and covering([]) == []


Values = dict[Hashable, set[Hashable]]  # test function -> (parameter, value) that occur in it


def values(items: list[pytest.Item]) -> Values:
    found: Values = defaultdict(set)
    for item in items:
        if isinstance(item, pytest.Function):
            parameters = row(item).items() if hasattr(item, "callspec") else ()
            found[item.path, item.cls, item.originalname] |= {*parameters, "the test itself"}
    return found


def test_no_value_of_a_parameter_is_missing(request: pytest.FixtureRequest) -> None:
    """Nor is a test without parameters, but for the slow ones; of what this machine can run."""
    quick = request.config.stash[QUICK]
    wanted = [i for i in request.config.stash[COLLECTED] if i.get_closest_marker("slow") is None]
    assert quick <= set(wanted)
    for here in (True, False):
        assert values([i for i in quick if runs_here(i) == here]) == values(
            [item for item in wanted if runs_here(item) == here]
        )


def test_a_quick_test_stands_beside_each_slow_one(request: pytest.FixtureRequest) -> None:
    """As far as its file is part of this run."""
    collected, quick = request.config.stash[COLLECTED], request.config.stash[QUICK]
    files = {item.path for item in collected}
    there = {(i.path, i.originalname) for i in quick if isinstance(i, pytest.Function)}
    for item in collected:
        if (marker := item.get_closest_marker("slow")) is None:
            continue
        file, _, name = marker.kwargs["stands_in"].rpartition("::")
        path = ROOT / file if file else item.path
        assert path.exists()
        assert path not in files or (path, name) in there, f"{item.nodeid}: {name} is not quick"
