"""The pytest plugin of a GPU machine: order, records, and tests that end their process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import log

ROOT = Path(__file__).resolve().parents[2]

TESTS = """
import os, time
import pytest

@pytest.mark.parametrize("i", range(6))
def test_good(i): time.sleep({pause})
def test_bad(): assert 1 == 2, "one is not two"
def test_left_out(): pytest.skip("not here")
"""


def run_tests(folder: Path, text: str, *options: str, **environment: str) -> int:
    (folder / "test_toys.py").write_text(text)
    variables = {"PYTHONPATH": str(ROOT), "RAL_GPU_TEST_LOG": str(folder / "log"), **environment}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.log", "test_toys.py"]
    done = subprocess.run(
        [*command, *options], cwd=folder, env={**os.environ, **variables}, capture_output=True
    )
    return done.returncode


def test_log_of_tests(tmp_path: Path) -> None:
    """Counts and failures are kept."""
    run_tests(tmp_path, TESTS.format(pause=0))
    found = log.summary(tmp_path / "log")
    assert not found["stopped"]
    assert found["outcomes"] == {"passed": 6, "failed": 1, "skipped": 1}
    assert found["by_test"]["test_toys.py::test_good"] == {"passed": 6}
    (failure,) = found["failures"]
    assert failure["test"].endswith("test_bad")
    assert "one is not two" in " ".join(failure["why"])


@pytest.mark.slow(stands_in="test_log_of_tests")
def test_log_of_tests_whose_time_is_over(tmp_path: Path) -> None:
    until = {"RAL_GPU_TEST_UNTIL": str(time.monotonic())}
    assert run_tests(tmp_path, TESTS.format(pause=0), **until) == 2
    found = log.summary(tmp_path / "log")
    assert found["stopped"] and sum(found["outcomes"].values()) == 1


DEADLY = """
import os, time
import pytest
from benchmarks.gpu import log, process
log.TEST_SECONDS = 8.0
broken = []
process.is_broken = lambda: bool(broken)

def test_breaks():
    broken.append(True)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_crashes(): os.abort()
def test_hangs(): time.sleep(600)
@pytest.mark.parametrize("i", range(5))
def test_good(i): assert not broken, "a context that is lost"
"""


@pytest.mark.slow(stands_in="test_log_of_tests")
def test_tests_do_not_take_each_other_along(tmp_path: Path) -> None:
    """A lost context, a crash and a hang cost one test each; xdist starts another worker."""
    run_tests(tmp_path, DEADLY, "-n", "1", "--dist", "load")
    found = log.summary(tmp_path / "log")
    assert found["by_test"]["test_toys.py::test_good"] == {"passed": 5}
    failed = {line["test"].split("::")[-1] for line in found["failures"]}
    assert failed == {"test_breaks", "test_crashes", "test_hangs"}


def test_tests_run_in_order_of_value() -> None:
    class Item:
        def __init__(self, function: str, case: str) -> None:
            self.name = f"{function}[{case}]"
            self.originalname, self.nodeid = function, f"tests/x.py::{self.name}"

    items: list[Any] = [
        Item(function, f"triton-{dtype}-{case}")
        for function in ("test_misc", "test_attention")
        for dtype in ("float32", "bfloat16")
        for case in range(8)
    ]
    log.pytest_collection_modifyitems(items)
    names = [item.name for item in items]
    assert names[:6] == [f"test_attention[triton-bfloat16-{case}]" for case in range(6)]
    assert names[6] == "test_attention[triton-float32-0]"
    assert names[12:14] == ["test_misc[triton-bfloat16-0]", "test_misc[triton-float32-0]"]
    assert names[14] == "test_attention[triton-bfloat16-6]", "and so on, in turn"
