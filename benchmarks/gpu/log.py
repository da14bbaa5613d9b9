"""A pytest plugin for a GPU: one JSON line for each test as it ends; no test can end others.

The most valuable tests run first. A test that hangs ends its process, and so does one that loses
the CUDA context; pytest-xdist starts another. Results are on disk before a stage's time is over.
"""

from __future__ import annotations

import faulthandler
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

FAILURES_SHOWN = 40
STOPPED = "the stage's time is over"
TEST_SECONDS = 30.0  # a cold cache: a test compiles up to ten kernels
# What is looked at first, a word of the test's name each, and how many cases for one of others.
FIRST = {
    "test_attention": 6,
    "test_outputs_and_gradients": 6,
    "test_against_snapshot": 3,
    "test_same_as_the_separate_backward": 3,
    "test_policy": 3,
    "test_exactly_zero": 3,
    "test_repeats": 1,
}
DTYPES = ("bfloat16", "float16", "float32")


class Log:
    """Writes reports, and asks the session to stop at `until`, on the monotonic clock."""

    def __init__(self, path: Path, until: float) -> None:
        self.path, self.deadline = path, until
        self.session: pytest.Session | None = None

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            line: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome}
            line["seconds"] = round(report.duration, 3)
            if report.outcome == "failed":
                line["why"] = str(report.longrepr).strip().splitlines()[-4:]
            self._write(line)
        if self.session is not None and time.monotonic() > self.deadline:
            session, self.session = self.session, None
            self._stop(session)

    def _stop(self, session: pytest.Session) -> None:
        session.shouldstop = STOPPED
        # pytest-xdist hands out tests in a loop of its own, which looks here
        hands_out = session.config.pluginmanager.getplugin("dsession")
        if hands_out is not None:
            hands_out.shouldstop = STOPPED
        self._write({"stopped": STOPPED})

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class Watch:
    """In the process that runs tests: ends it where the next test could not run."""

    def __init__(self, is_worker: bool) -> None:
        self.is_worker, self.has_failed = is_worker, False

    def pytest_runtest_logstart(self) -> None:
        self.has_failed = False
        faulthandler.dump_traceback_later(TEST_SECONDS, exit=True)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.has_failed |= report.outcome == "failed"
        faulthandler.dump_traceback_later(TEST_SECONDS, exit=True)  # pytest cancels it on failure

    def pytest_runtest_logfinish(self) -> None:
        from . import process

        # the report is on its way by now; without xdist nothing takes over, and nothing ends
        if self.is_worker and self.has_failed:
            process.leave_if_broken()  # it waits for the GPU, which may hang
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring tests into order of value: cases of all functions and dtypes in turn, more of FIRST."""
    seen: Counter[tuple[str, str]] = Counter()
    order: dict[str, tuple[int, int, int]] = {}
    for item in items:
        function = getattr(item, "originalname", item.name)
        dtype = next((name for name in DTYPES if name in item.name), "")
        rank = next((i for i, name in enumerate(FIRST) if function.startswith(name)), len(FIRST))
        weight = list(FIRST.values())[rank] if rank < len(FIRST) else 1
        turn = seen[item.nodeid.split("[")[0], dtype] // weight
        seen[item.nodeid.split("[")[0], dtype] += 1
        order[item.nodeid] = (turn, rank, DTYPES.index(dtype) if dtype else 0)
    items.sort(key=lambda item: order[item.nodeid])


def pytest_configure(config: pytest.Config) -> None:
    from . import mock, process

    process.begin()
    if mock.device is not None:
        _mock_copies()
    is_worker = hasattr(config, "workerinput")
    if is_worker or not config.getoption("numprocesses", None):
        config.pluginmanager.register(Watch(is_worker))
    path = os.environ.get("RAL_GPU_TEST_LOG")
    if path is not None and not is_worker:
        until = float(os.environ.get("RAL_GPU_TEST_UNTIL", "inf"))
        config.pluginmanager.register(Log(Path(path), until))


def _mock_copies() -> None:
    """Where tests copy tensors to a GPU they stay on the CPU, under its other name."""
    from tests.gpu import on_gpu

    begin = on_gpu.Copies.__init__

    def on_cpu(self: on_gpu.Copies, device: Any) -> None:
        begin(self, torch.device("cpu", 0))

    on_gpu.Copies.__init__ = on_cpu  # type: ignore[method-assign]


def summary(path: Path) -> dict[str, Any]:
    """How many passed and failed of each test function, and what the failures say."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    tests: list[dict[str, Any]] = []
    for line in (line for line in lines if "test" in line):
        # xdist reports a worker that leaves after a failed test as a second failure of the test
        if not any(line["test"] == other["test"] for other in tests[-100:]):
            tests.append(line)
    counts: dict[str, Counter[str]] = {}
    for line in tests:
        name = line["test"].split("[")[0]
        counts.setdefault(name, Counter())[line["outcome"]] += 1
    failures = [line for line in tests if line["outcome"] == "failed"]
    return {
        "stopped": any("stopped" in line for line in lines),
        "outcomes": dict(Counter(line["outcome"] for line in tests)),
        "by_test": {name: dict(count) for name, count in sorted(counts.items())},
        "failures": failures[:FAILURES_SHOWN],
        "failures_left_out": max(len(failures) - FAILURES_SHOWN, 0),
        "slowest": sorted(tests, key=lambda line: -line["seconds"])[:5],
    }
