"""Fixtures of the whole suite: which backends are tested, poisoned outputs, large tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import ral_kernels as rk
from ral_kernels.attention import interface

REQUIRED = [name for name in os.environ.get("RAL_REQUIRE", "").split(",") if name]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--large", action="store_true", help="also run tests that need gigabytes of memory"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "large: needs gigabytes of memory; run with --large")
    unknown = set(REQUIRED) - set(rk.available_backends())
    if unknown:
        raise pytest.UsageError(f"RAL_REQUIRE names unknown backends: {', '.join(sorted(unknown))}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--large"):
        return
    large = [item for item in items if item.get_closest_marker("large")]
    config.hook.pytest_deselected(items=large)
    items[:] = [item for item in items if item not in large]


def skip_or_fail(backend: str, reason: str) -> None:
    """Skip a test of a missing backend, or fail it if RAL_REQUIRE names the backend."""
    if backend in REQUIRED:
        pytest.fail(f"RAL_REQUIRE={','.join(REQUIRED)}, but {backend}: {reason}")
    pytest.skip(f"{backend}: {reason}")


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that runs on CPU tensors."""
    reason = rk.available_backends()[request.param]
    if reason != "yes":
        skip_or_fail(request.param, reason)
    return request.param


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """One torch thread, or as many as a test asks for by an indirect parameter.

    The tensors are tiny: on a busy machine a second thread makes each test many times slower.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(getattr(request, "param", 1))
    yield torch.get_num_threads()
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every tensor a kernel is to write starts as NaN: an element that it forgets shows."""

    def new_nan(like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=like.device)

    monkeypatch.setattr(interface, "_new_empty", new_nan)
    yield
