"""Fixtures of the whole suite: which backends are tested, poisoned outputs, large tests."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest

# numpy's products in Triton's interpreter, and both libraries in processes that tests start: before
# numpy is imported, and for the reason of the fixture `threads`.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Without a GPU, Triton's kernels are tested in its interpreter, which is chosen at their import.
if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import ral_kernels as rk
from ral_kernels.ops import allocation
from ral_kernels.runtime import triton_runtime
from tests import interpreter
from tests.gpu.on_gpu import kernels_on

REQUIRED = [name for name in os.environ.get("RAL_REQUIRE", "").split(",") if name]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--large", action="store_true", help="also run tests that need gigabytes of memory"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "large: needs gigabytes of memory; run with --large")
    if triton_runtime.interpreted():
        interpreter.make_quick()
    config.addinivalue_line("markers", "xdist_group(name): run by one worker, for what they share")
    config.addinivalue_line("markers", "long: begun first, or a worker waits for it at the end")
    config.addinivalue_line("markers", "gpu: gives kernels tensors of the GPU itself")
    config.addinivalue_line(
        "markers",
        "in_interpreter(when): with backend triton in the interpreter, where a case takes seconds, "
        "run those for which `when`, a function of parameters of the test, is true",
    )
    unknown = set(REQUIRED) - set(rk.available_backends())
    if unknown:
        raise pytest.UsageError(f"RAL_REQUIRE names unknown backends: {', '.join(sorted(unknown))}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if _is_left_out(item, config)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def _is_left_out(item: pytest.Item, config: pytest.Config) -> bool:
    if item.get_closest_marker("large") and not config.getoption("--large"):
        return True
    parameters = (
        item.callspec.params
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
        else {}
    )
    if parameters.get("backend") != "triton" or not triton_runtime.interpreted():
        return False
    # The interpreter multiplies bfloat16 wrongly (ahead-of-time compilation covers that dtype), and
    # it does not use torch's threads.
    return parameters.get("dtype") == torch.bfloat16 or parameters.get("threads", 1) != 1


def skip_or_fail(backend: str, reason: str) -> None:
    """Skip a test of a missing backend, or fail it if RAL_REQUIRE names the backend."""
    if backend in REQUIRED:
        pytest.fail(f"RAL_REQUIRE={','.join(REQUIRED)}, but {backend}: {reason}")
    pytest.skip(f"{backend}: {reason}")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch on one thread: for models so small that two are slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that runs on CPU tensors; Triton's does in the interpreter."""
    reason = rk.available_backends()[request.param]
    if reason != "yes":
        skip_or_fail(request.param, reason)
    return request.param


@pytest.fixture(autouse=True)
def on_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """With a GPU, Triton's kernels compute there what a test gives them on the CPU."""
    here = not torch.cuda.is_available() or triton_runtime.interpreted()
    if here or request.node.get_closest_marker("gpu"):
        yield
        return
    with kernels_on(torch.device("cuda", 0), "triton"):
        yield


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

    monkeypatch.setattr(allocation, "new_empty", new_nan)
    yield
