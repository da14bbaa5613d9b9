"""A pytest plugin: one JSON line a test as it ends, and an end in time.

What was tested before a stage ran out of time is on disk. With pytest-xdist it runs in the process
that hands out the tests.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

FAILURES_SHOWN = 40
STOPPED = "the stage's time is over"


class Log:
    """Writes reports, and asks the session to stop when its seconds are over."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.deadline = path, time.monotonic() + seconds
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mix the tests, always in the same way: what a stage has done when its time is over is then a
    sample of everything, and processes compile different kernels.
    """
    items.sort(key=lambda item: hashlib.sha256(item.nodeid.encode()).digest())


def pytest_configure(config: pytest.Config) -> None:
    path = os.environ.get("RAL_GPU_TEST_LOG")
    if path is not None and not hasattr(config, "workerinput"):
        seconds = float(os.environ.get("RAL_GPU_TEST_SECONDS", "inf"))
        config.pluginmanager.register(Log(Path(path), seconds))


def summary(path: Path) -> dict[str, Any]:
    """How many passed and failed of each test function, and what the failures say."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    tests = [line for line in lines if "test" in line]
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
