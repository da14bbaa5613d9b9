"""Fixtures of the ops' tests."""

from __future__ import annotations

import inspect

import pytest

import ral_kernels as rk
from ral_kernels.runtime import triton_runtime
from tests.conftest import skip_or_fail


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if not _worth_its_time(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def _worth_its_time(item: pytest.Item) -> bool:
    marker = item.get_closest_marker("in_interpreter")
    if marker is None or not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
        return True
    parameters = item.callspec.params
    if parameters.get("backend") != "triton" or not triton_runtime.interpreted():
        return True
    when = marker.kwargs["when"]
    return bool(when(**{name: parameters[name] for name in inspect.signature(when).parameters}))


@pytest.fixture(params=["amx_bf16", "avx512_bf16", "avx512", "avx2", "portable"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each variant of the CPU kernels, forced."""
    reason = rk.available_backends()["cpu"]
    if reason != "yes":
        skip_or_fail("cpu", reason)
    from ral_kernels.runtime.cpu_library import supported_isas

    if request.param not in supported_isas():
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setenv("RAL_CPU_ISA", request.param)
    return request.param
