"""A script is a list of stages, each a process of its own with a budget.

A stage that crashes, hangs or exceeds its budget is recorded, with the end of its output. The other
stages still run.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import mock

ROOT = Path(__file__).resolve().parents[2]
TAIL_LINES = 60  # of a stage's output that go into the JSON when it fails
# Variables that are none of a stage's: another compiler would miss the kit's cache, and without
# bytecode each process would compile torch's Python.
LEFT_OUT = (
    "TRITON_INTERPRET", "TRITON_PTXAS_PATH", "TRITON_ALWAYS_COMPILE", "PYTHONDONTWRITEBYTECODE"
)  # fmt: skip
TO_END = 4.0  # seconds of a stage's budget to write results in
GRACE = 5.0  # seconds to end in, before a stage is killed


@dataclass(frozen=True)
class Setting:
    """What a stage's command depends on."""

    out: Path  # for files that stay
    scratch: Path  # for files of the stage, which do not
    budget: float  # seconds
    rehearse: bool
    state: Path = ROOT / "build" / "gpu-state"  # what a later script needs; the unpacked kit
    kit: Path = ROOT / "build" / "gpu-kit"

    @property
    def lines(self) -> Path:
        """Where records of points go, a JSON object a line, as they are measured."""
        return self.out / "lines.jsonl"

    @property
    def until(self) -> float:
        """When a stage that starts now should stop by itself, on the monotonic clock."""
        return time.monotonic() + self.budget - TO_END

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"


@dataclass(frozen=True)
class Stage:
    """One process: what is run, how long it may take, and what of its files is worth keeping."""

    name: str
    budget: float
    command: Callable[[Setting], Sequence[str]]
    collect: Callable[[Setting], Any] = lambda setting: None
    environment: Callable[[Setting], Mapping[str, str]] = lambda setting: {}
    # why it need not or cannot run here
    missing: Callable[[Setting], str | None] = lambda setting: None


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def read(name: str) -> Callable[[Setting], Any]:
    """What a stage wrote to a JSON file of that name in its scratch folder."""

    def read(setting: Setting) -> Any:
        return json.loads((setting.scratch / name).read_text())

    return read


def run(stage: Stage, setting: Setting, log: Path) -> dict[str, Any]:
    """Run one stage to its end or its budget's: status, seconds, result, and the output's end."""
    reason = stage.missing(setting)
    if reason is not None:
        return {"stage": stage.name, "status": "skipped", "reason": reason}
    setting.scratch.mkdir(parents=True, exist_ok=True)
    output = setting.scratch / "output.txt"
    start = time.perf_counter()
    status, code = _run(stage, setting, output)
    record: dict[str, Any] = {
        "stage": stage.name,
        "status": status,
        "exit": code,
        "seconds": round(time.perf_counter() - start, 1),
        "budget": None if math.isinf(setting.budget) else round(setting.budget, 1),
    }
    try:
        record["result"] = stage.collect(setting)
    except (OSError, ValueError) as error:
        if status == "ok":
            record["status"] = "failed"
        record["reason"] = f"no result: {type(error).__name__}: {error}"
    result = record.get("result")
    if record["status"] == "failed" and isinstance(result, dict) and result.get("stopped"):
        record["status"] = "failed" if result["failures"] else "out of time"
    text = output.read_text(errors="replace")
    with log.open("a") as file:
        file.write(f"\n=== {stage.name}: {record['status']}, {record['seconds']} s\n{text}")
    if record["status"] != "ok":
        record["output"] = text.splitlines()[-TAIL_LINES:]
    return record


def _run(stage: Stage, setting: Setting, output: Path) -> tuple[str, int | None]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **_kit_environment(setting)}
    environment.update(stage.environment(setting))
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )
    for name in LEFT_OUT:
        environment.pop(name, None)
    with output.open("w") as file:
        process = subprocess.Popen(
            stage.command(setting),
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(None if math.isinf(setting.budget) else setting.budget)
            return ("ok" if code == 0 else "failed"), code
        except subprocess.TimeoutExpired:
            return "out of time", None
        finally:
            _end(process)


def _kit_environment(setting: Setting) -> dict[str, str]:
    """Kernels come from the kit, and what it lacks is compiled into the same folder."""
    found = {"RAL_GPU_KIT": str(setting.state), "TRITON_CACHE_DIR": str(setting.state / "cache")}
    if setting.rehearse:
        found[mock.VARIABLE] = os.environ.get(mock.VARIABLE) or "{}"
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the stage's own process group: its workers too, and where it hangs, by force."""
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
