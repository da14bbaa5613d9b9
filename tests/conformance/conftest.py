"""What the cases of all suites share: how a refusal is counted, and one rule of accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

Kind = type[Exception] | tuple[type[Exception], ...]
Refused = Callable[[Kind, str], AbstractContextManager[None]]


def slow(stands_in: str) -> pytest.MarkDecorator:
    return pytest.mark.slow(stands_in=stands_in)


@pytest.fixture
def refused(record_property: Callable[[str, Any], None]) -> Refused:
    """`with refused(NotImplementedError, "dropout"): call()`: the call must raise that.

    The case then counts as refused by name, and the table lists the sentence.
    """

    @contextmanager
    def expecting(kind: Kind, sentence: str) -> Iterator[None]:
        with pytest.raises(kind, match=sentence) as raised:
            yield
        record_property("refused", str(raised.value))

    return expecting
