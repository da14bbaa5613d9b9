"""Which versions of TRL the trainer takes, and that the package asks for the same."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

from ral._requirements import TESTED, VERSIONS, check_trl

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("version", ["1.15.0", "1.16.0", "1.16.3.dev0"])
def test_tested_versions(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", {"trl": version}.__getitem__)
    check_trl()


@pytest.mark.parametrize("version", ["0.29.1", "1.14.2", "1.17.0", "1.17.0.dev0", "2.15"])
def test_other_versions_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", {"trl": version}.__getitem__)
    said = rf"needs trl>=1\.15,<1\.17, the versions that .*; got trl {re.escape(version)}"
    with pytest.raises(ImportError, match=said):
        check_trl()


def test_a_missing_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=r"`pip install 'trl>=1\.15,<1\.17'`"):
        check_trl()


def test_the_package_asks_for_the_same() -> None:
    assert f'"{VERSIONS}; python_version >=' in (ROOT / "pyproject.toml").read_text()
    pinned = re.search(r"^trl==(\d+)\.(\d+)\.", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None and (int(pinned[1]), int(pinned[2])) == TESTED[-1]
