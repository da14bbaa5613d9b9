"""What the tests of this run want of a fixture that prepares for many of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


def asked(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """The parameters of each test of this run that uses the fixture `request` is of.

    So a fixture of a module trains no more runs than the chosen tests look at.
    """
    for item in request.session.items:
        if not isinstance(item, pytest.Function) or item.path != request.path:
            continue
        if request.fixturename in item.fixturenames:
            yield item.callspec.params if hasattr(item, "callspec") else {}
