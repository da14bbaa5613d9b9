"""Fixtures of the ops' tests."""

from __future__ import annotations

import pytest

import ral_kernels as rk
from tests.conftest import skip_or_fail, supported_isas


@pytest.fixture(params=["reference", "cpu"])
def packed_backend(request: pytest.FixtureRequest) -> str:
    """Every backend that takes packed sequences of CPU tensors."""
    reason = rk.available_backends()[request.param]
    if reason != "yes":
        skip_or_fail(request.param, reason)
    return str(request.param)


@pytest.fixture(params=["amx_bf16", "avx512_bf16", "avx512", "avx2", "portable"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each variant of the CPU kernels, forced."""
    reason = rk.available_backends()["cpu"]
    if reason != "yes":
        skip_or_fail("cpu", reason)
    if request.param not in supported_isas():
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setenv("RAL_CPU_ISA", request.param)
    return request.param
