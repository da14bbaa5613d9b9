"""A process that measures points, one after the other, and writes down each before and after.

    python -m benchmarks.gpu.worker UNIT.json LINES LOCK

LINES is a file that several workers append to, a JSON object a line. A point that exceeds its limit
ends the process from within, whatever it waits for. After an error that loses the CUDA context, the
process ends; supervise.py starts another for the rest.
"""

from __future__ import annotations

import faulthandler
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.harness import examine

from . import process, work
from .lines import append


@contextmanager
def _alone(lock: str) -> Iterator[None]:
    """Inside, no other worker measures; imports and the CUDA context are made outside."""
    if not lock:
        yield
        return
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    unit_file, lines, lock = sys.argv[1:4]
    unit = json.loads(Path(unit_file).read_text())
    file, name = Path(lines), unit["name"]
    device = process.begin()
    if device.type == "cuda":
        import torch

        torch.zeros(1, device=device)
    with _alone(lock):
        for point in unit["points"]:
            append(file, {"event": "begin", "unit": name, "point": point["name"]})
            faulthandler.dump_traceback_later(point["limit"], exit=True)
            with process.compilations() as compiled:
                try:
                    record = work.KINDS[point["kind"]](device, **point["settings"])
                except Exception as error:
                    record = examine.failure(error)
            line = {"event": "end", "unit": name, "point": point["name"], **record}
            append(file, {**line, "compiled": compiled})
            process.leave_if_broken()  # it waits for the GPU, which may hang
            faulthandler.cancel_dump_traceback_later()
    sys.stdout.flush()
    if not any(point["kind"] == "profile" for point in unit["points"]):
        os._exit(0)  # CUDA's own ending takes a second; a profiler writes its report there


if __name__ == "__main__":
    main()
