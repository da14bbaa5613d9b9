"""Fixtures of the whole suite: its tiers, which backends are tested, poisoned outputs."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

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
from tests import interpreter, tiers
from tests.browser import browser, browser_page  # noqa: F401  # fixtures of every folder
from tests.gpu.on_gpu import kernels_on

REQUIRED = [name for name in os.environ.get("RAL_REQUIRE", "").split(",") if name]
PROGRAMS = {"chromium", "deepspeed"}  # what else than a backend may be required
COLLECTED = pytest.StashKey[list[pytest.Item]]()  # of all tiers
QUICK = pytest.StashKey[set[pytest.Item]]()  # those of them that are the quick tier


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--large", action="store_true", help="also run tests that need gigabytes of memory"
    )
    parser.addoption(
        "--tier",
        choices=("all", "quick", "rest"),
        default="all",
        help="quick: a sample of each parametrised test, and nothing slow; rest: what that leaves",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "large: needs gigabytes of memory; run with --large")
    if triton_runtime.interpreted():
        interpreter.make_quick()
    config.addinivalue_line(
        "markers", "slow(stands_in): not in the quick tier, where the test `stands_in` is"
    )
    config.addinivalue_line("markers", "xdist_group(name): run by one worker, for what they share")
    config.addinivalue_line("markers", "long: begun first, or a worker waits for it at the end")
    config.addinivalue_line("markers", "gpu: gives kernels tensors of the GPU itself")
    config.addinivalue_line(
        "markers",
        "in_interpreter(when): with backend triton in the interpreter, where a case takes seconds, "
        "run those for which `when`, a function of parameters of the test, is true",
    )
    config.addinivalue_line(
        "markers", "slow_in_interpreter(stands_in): as slow, with backend triton in the interpreter"
    )
    unknown = set(REQUIRED) - set(rk.available_backends()) - PROGRAMS
    if unknown:
        raise pytest.UsageError(f"RAL_REQUIRE names unknown backends: {', '.join(sorted(unknown))}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = [item for item in items if not _is_left_out(item, config)]
    for item in kept:
        if (marker := item.get_closest_marker("slow_in_interpreter")) and _in_interpreter(item):
            item.add_marker(pytest.mark.slow(**marker.kwargs))
    config.stash[COLLECTED] = kept
    config.stash[QUICK] = quick = tiers.quick(kept, runs_here)
    tier = config.getoption("--tier")
    if tier != "all":
        kept = [item for item in kept if (item in quick) == (tier == "quick")]
    chosen = set(kept)
    if len(chosen) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = sorted(kept, key=lambda item: item.get_closest_marker("long") is None)


def _parameters(item: pytest.Item) -> dict[str, Any]:
    if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
        return item.callspec.params
    return {}


def _in_interpreter(item: pytest.Item) -> bool:
    return _parameters(item).get("backend") == "triton" and triton_runtime.interpreted()


def _is_left_out(item: pytest.Item, config: pytest.Config) -> bool:
    if item.get_closest_marker("large") and not config.getoption("--large"):
        return True
    if not _in_interpreter(item):
        return False
    parameters = _parameters(item)
    # The interpreter multiplies bfloat16 wrongly (ahead-of-time compilation covers that dtype), and
    # it does not use torch's threads.
    if parameters.get("dtype") == torch.bfloat16 or parameters.get("threads", 1) != 1:
        return True
    if (marker := item.get_closest_marker("in_interpreter")) is None:
        return False
    when = marker.kwargs["when"]
    return not when(**{name: parameters[name] for name in inspect.signature(when).parameters})


def runs_here(item: pytest.Item) -> bool:
    """Whether the fixtures `backend` and `isa` will not skip it."""
    parameters = _parameters(item)
    if (backend := parameters.get("backend")) in (reasons := _backends()):
        return reasons[backend] == "yes"
    return "isa" not in parameters or parameters["isa"] in supported_isas()


@functools.cache
def _backends() -> dict[str, str]:
    return rk.available_backends()


@functools.cache
def supported_isas() -> Sequence[str]:
    """The variants of the CPU kernels that this machine runs; none without their library."""
    if rk.available_backends()["cpu"] != "yes":
        return ()
    from ral_kernels.runtime import cpu_library

    return cpu_library.supported_isas()


def skip_or_fail(backend: str, reason: str) -> NoReturn:
    """Skip a test of a missing backend or program, or fail it if RAL_REQUIRE names that."""
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
def logging_stays_on() -> Iterator[None]:
    """No test leaves logging off for those after it in its process."""
    yield
    left = logging.root.manager.disable
    logging.disable(logging.NOTSET)
    assert left == logging.NOTSET


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every tensor a kernel is to write starts as NaN: an element that it forgets shows."""

    def new_nan(like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=like.device)

    monkeypatch.setattr(allocation, "new_empty", new_nan)
    yield
