"""Engines of trainers that this environment does not have: what their modules say."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

import pytest


def test_verl_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def without_verl(name: str) -> Any:
        if name == "verl":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_verl)
    wanted = r"verl is missing: `pip install 'verl>=0\.9,<0\.10'`, in an environment without TRL"
    with pytest.raises(ImportError, match=wanted):
        importlib.import_module("ral.engines.verl")
