"""Runs units of points in worker processes, and survives their crashes and hangs.

    python -m benchmarks.gpu.supervise PLAN --lines FILE --until T --workers N [--rehearse]

A worker that dies loses the point that it had begun; another takes over the later points.
Every point of the plan ends as a line of FILE: measured, failed with a reason, or without time.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from . import points
from .lines import STICKY, append, parsed
from .points import Point, Unit

GRACE = 20.0  # seconds beyond a point's limit, after which its process is killed from outside
START = 90.0  # to import torch and make a CUDA context in, twelve at a time
TAIL = 12  # lines of what a dead worker printed
WORKER = (sys.executable, "-m", "benchmarks.gpu.worker")
UNTRIED = ("ok", "skipped", "no time", "given up")  # what is no failure of its own
PLANS = {
    "each_op": points.each_op,
    "attention_times": points.attention_times,
    "ral_times": points.ral_times,
    "tiles": points.tiles,
}


@dataclass
class Run:
    """A worker process and how far it has come."""

    unit: Unit
    worker: subprocess.Popen[bytes]
    output: Path
    deaths: int  # of the unit's processes before this one
    begun: Point | None = None
    since: float = field(default_factory=time.monotonic)
    done: int = 0


class Supervisor:
    """Units in order, at most `workers` processes at once, nothing new after `deadline`.

    Args:
        lines: where workers and supervisor append records.
        folder: for the workers' output.
        workers: processes at once.
        deadline: on the clock of `time.monotonic`.
        alone: whether one worker at a time may measure, while others get ready.
        environment: of all workers, beside the unit's own.
        what: goes into every record, to tell it from others.
        worker: the command of a worker, before its three arguments.
    """

    def __init__(
        self,
        lines: Path,
        folder: Path,
        workers: int,
        deadline: float,
        alone: bool,
        environment: dict[str, str] | None = None,
        what: dict[str, Any] | None = None,
        worker: Sequence[str] = WORKER,
    ) -> None:
        self.lines, self.folder, self.workers, self.deadline = lines, folder, workers, deadline
        self.lock = str(folder / "lock") if alone else ""
        self.environment, self.what = environment or {}, what or {}
        self.worker = worker
        self.own = folder / "workers.jsonl"  # what the workers append to
        self.own.touch()
        self.read = 0
        self.count = 0
        self.records: list[dict[str, Any]] = []

    def run(self, units: Sequence[Unit]) -> list[dict[str, Any]]:
        """All units; one record a point."""
        running: dict[str, Run] = {}
        try:
            self._run([(unit, 0) for unit in units], running)
        finally:  # also where the stage's time is over: nothing else may share the GPU
            for run in running.values():
                self._kill(run)
        return self.records

    def _run(self, waiting: list[tuple[Unit, int]], running: dict[str, Run]) -> None:
        """`waiting`: units, and how many processes each has lost."""
        while waiting or running:
            over = time.monotonic() > self.deadline
            if over:
                for unit, _ in waiting:
                    self._all(unit, 0, "no time", "no time left")
                waiting = []
            self._hear(running)
            for name, run in list(running.items()):
                if run.worker.poll() is not None:
                    self._hear(running)
                    left = self._ended(running.pop(name))
                    if left is not None:
                        waiting.insert(0, left)
                    if run.worker.returncode != 0:
                        # a kernel that hangs would cost its limit at every size
                        waiting.sort(key=lambda entry: entry[0].group == run.unit.group != "")
                elif (over or self._is_late(run)) and not self._kill(run):
                    self._ended(running.pop(name))
                    self._renew_lock()
            while waiting and len(running) < self.workers:
                unit, deaths = waiting.pop(0)
                running[unit.name] = self._start(unit, deaths)
            time.sleep(0.05)

    def _start(self, unit: Unit, deaths: int) -> Run:
        self.count += 1
        stem = self.folder / f"worker-{self.count}"
        stem.with_suffix(".json").write_text(json.dumps(asdict(unit)))
        output = stem.with_suffix(".txt")
        command = [*self.worker, str(stem.with_suffix(".json"))]
        with output.open("w") as file:
            file.write(f"=== {unit.name}\n")
            file.flush()
            worker = subprocess.Popen(
                [*command, str(self.own), self.lock],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment, **unit.environment},
                start_new_session=True,
            )
        return Run(unit, worker, output, deaths)

    def _hear(self, running: dict[str, Run]) -> None:
        """Read what workers have appended since."""
        with self.own.open("rb") as file:
            file.seek(self.read)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        self.read += len(complete)
        for event in parsed(complete.decode()):
            run = running.get(event["unit"])
            if run is None:
                continue
            run.since = time.monotonic()
            if event.pop("event") == "begin":
                run.begun = run.unit.points[run.done]
                continue
            run.begun, run.done = None, run.done + 1
            self._record(event)

    def _is_late(self, run: Run) -> bool:
        limit = START if run.begun is None else run.begun.limit
        # while one worker measures, those that wait for their turn are not late
        waits = bool(self.lock) and run.begun is None
        return not waits and time.monotonic() - run.since > limit + GRACE

    def _kill(self, run: Run) -> bool:
        """Whether it has ended. A process that waits in the driver receives no signal."""
        try:
            os.killpg(run.worker.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        try:
            run.worker.wait(GRACE)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _renew_lock(self) -> None:
        """A lock is held as long as its process is there."""
        if self.lock:
            self.count += 1
            self.lock = str(self.folder / f"lock-{self.count}")

    def _ended(self, run: Run) -> tuple[Unit, int] | None:
        """Record what a process has left undone; what another one is to take over."""
        code, rest = run.worker.returncode, run.unit.points[run.done :]
        if not rest:
            return None
        text = run.output.read_text(errors="replace")
        tail = [line for line in text.splitlines()[1:] if line.strip()][-TAIL:]
        if time.monotonic() > self.deadline:
            self._all(run.unit, run.done, "no time", "the time was over")
            return None
        if run.begun is not None:
            status, reason = "crashed", f"the process ended by {_ending(code)}"
            if "Timeout (" in text or code in (None, -signal.SIGKILL):
                status, reason = "hung", f"no answer for {rest[0].limit:.0f} s"
            self._fail(run.unit, rest[0], status, reason, tail)
            rest = rest[1:]
        elif code != STICKY:  # another would not begin either
            reason = f"the process ended by {_ending(code)} before the first point"
            self._all(run.unit, run.done, "crashed", reason, tail)
            return None
        deaths = run.deaths + 1
        unit = replace(run.unit, points=rest)
        if deaths < run.unit.deaths:
            return (unit, deaths) if rest else None
        self._all(unit, 0, "given up", f"{deaths} processes were lost before")
        return None

    def _all(
        self, unit: Unit, start: int, status: str, reason: str, tail: Sequence[str] = ()
    ) -> None:
        for point in unit.points[start:]:
            self._fail(unit, point, status, reason, tail)

    def _fail(
        self, unit: Unit, point: Point, status: str, reason: str, tail: Sequence[str]
    ) -> None:
        record = {"unit": unit.name, "point": point.name, "status": status, "reason": reason}
        self._record({**record, "output": list(tail)} if tail else record)

    def _record(self, record: dict[str, Any]) -> None:
        record = {**self.what, **record}
        self.records.append(record)
        append(self.lines, record)
        print(_line(record), flush=True)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit status {code}"


def _line(record: dict[str, Any]) -> str:
    parts = [record["point"], record["status"]]
    if "ms" in record:
        parts.append(f"{record['ms']['median']:.3f} ms, {record['tflops']:.0f} TFLOP/s")
    if "ratio" in record:
        parts.append(f"{record['ratio']['median']:.2f} of the peer")
    if record.get("reason"):
        parts.append(str(record["reason"]))
    return ": ".join(parts)


def exit_on_sigterm() -> None:
    """By an exception, so that workers are ended first."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def failed(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points that were tried and are not right."""
    return [record for record in records if record["status"] not in UNTRIED]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True, help="on the monotonic clock")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--alone", action="store_true", help="one at a time may measure")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    exit_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="ral-gpu-") as folder:
        supervisor = Supervisor(
            options.lines, Path(folder), options.workers, options.until, options.alone,
            what={"part": options.plan},
        )  # fmt: skip
        records = supervisor.run(PLANS[options.plan](options.rehearse))
    return int(bool(failed(records)))


if __name__ == "__main__":
    sys.exit(main())
