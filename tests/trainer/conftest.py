"""Which tests of the trainer run where there is no TRL, which needs Python 3.11; a data folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

WITHOUT_TRL = ("test_data_", "test_rewards")

# By version, and not by what is installed: where TRL should be and is not, these tests fail.
collect_ignore = [
    path.name
    for path in Path(__file__).parent.glob("test_*.py")
    if sys.version_info < (3, 11) and not path.name.startswith(WITHOUT_TRL)
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images and clips for rows of data; other files of tests have a `folder` of their own."""
    from . import data_case

    return data_case.make(tmp_path)
