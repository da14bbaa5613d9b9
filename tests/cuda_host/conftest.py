"""Fixtures: the package's CUDA kernels, compiled for the host once a test session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ral_kernels as rk
from ral_kernels.runtime import cuda_library
from tests.conftest import REQUIRED, skip_or_fail
from tests.cuda_host.backend import Kernels, host_library, on_host
from tests.cuda_host.build import has_compiler
from tests.cuda_host.small_kernels import SmallKernels, small_kernels_in
from tests.gpu.on_gpu import kernels_on


@pytest.fixture(scope="session")
def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where libraries are compiled, the same for all workers of a session."""
    if not has_compiler():
        skip_or_fail("cpu", "no C++ compiler, for the harness either")
    own = tmp_path_factory.getbasetemp()
    return (own.parent if own.name.startswith("popen-") else own) / "cuda_host"


@pytest.fixture(scope="session")
def kernels(build_folder: Path) -> Kernels:
    return host_library(build_folder)


@pytest.fixture
def cuda_on_host(kernels: Kernels) -> Iterator[Kernels]:
    """`backend="cuda"` runs on CPU tensors in this test."""
    with on_host(kernels):
        yield kernels
        kernels.set_order(0)


# RAL_REQUIRE=cuda without a GPU fails there.
GPU_TOO = torch.cuda.is_available() or "cuda" in REQUIRED


@pytest.fixture(params=["host", "gpu"] if GPU_TOO else ["host"])
def cuda_anywhere(request: pytest.FixtureRequest) -> Iterator[None]:
    """The same in the harness, and once more on a GPU where there is one."""
    if request.param == "host":
        request.getfixturevalue("cuda_on_host")
        yield
        return
    if (reason := rk.available_backends()["cuda"]) != "yes":
        skip_or_fail("cuda", reason)
    with kernels_on(torch.device("cuda", 0), "cuda"):
        yield


@pytest.fixture
def hopper_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`backend="cuda"` takes the kernels for Hopper; it is an error if they do not take a call."""
    monkeypatch.setenv("RAL_CUDA_HOPPER", "1")
    monkeypatch.setattr(cuda_library, "NOT_TAKEN", None)
    monkeypatch.setattr(cuda_library, "MEASURED", True)  # for those who cannot ask for a backend
    if (reason := cuda_library.hopper()) is not None:
        skip_or_fail("cuda", reason)


@pytest.fixture
def small_kernels(build_folder: Path) -> SmallKernels:
    """The harness's own kernels, as if nothing had run yet."""
    library = small_kernels_in(build_folder)
    library.reset()
    return library
