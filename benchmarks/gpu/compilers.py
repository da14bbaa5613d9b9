"""What failed, once more under other releases of ptxas: is it the kernel or the compiler?

    python -m benchmarks.gpu.compilers --records FILE ... --lines FILE --until T --workers N

ptxas 12.8, which Triton 3.6 brings, is known to compile wgmma wrongly (triton#11781, #10573). Every
failure of a Triton kernel runs again as it was, with nvcc's ptxas, and with the kit's newer one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import kit
from .lines import parsed
from .points import Point, Unit
from .supervise import PLANS, Supervisor, exit_on_sigterm, failed

BUNDLED = "as before"
MOST = 24  # failures that are looked at; the first are the most valuable
TEST_SECONDS = 90.0


def ptxas(state: Path) -> dict[str, Path]:
    """label -> program, of those that this machine has."""
    found = {}
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    for program in (Path(nvcc).resolve().with_name("ptxas"), state / "ptxas"):
        if program.is_file():
            lines = kit.output(program, "--version").splitlines()
            version = next((line for line in lines if "release" in line), None)
            if version is not None:  # Triton would take its own in place of one that does not run
                found[version.split(",")[-1].strip()] = program
    return found


def failures(files: Iterable[Path], rehearse: bool) -> list[Point]:
    """The points that failed with Triton's kernels, in the order in which they were recorded."""
    known = {
        point.name: point
        for plan in PLANS.values()
        for unit in plan(rehearse)
        for point in unit.points
        if unit.group in ("", "triton", "ral", "ral_again")
    }
    found: dict[str, Point] = {}
    for file in files:
        for record in _records(file):
            name = record["point"]
            if not failed([record]) or name.startswith(("cuda", "hopper")):
                continue
            if record.get("part") == "tests" and "cuda_host" not in name:
                found[name] = Point(name, "test", TEST_SECONDS, {"test": name})
            elif name in known:
                found[name] = known[name]
    return list(found.values())[:MOST]


def _records(file: Path) -> list[dict[str, Any]]:
    """Of a file of lines, or of a script's JSON."""
    if not file.is_file():
        return []
    if file.suffix == ".json":
        return list(json.loads(file.read_text())["points"])
    return parsed(file.read_text())


def units(points: Sequence[Point], programs: dict[str, Path], state: Path) -> list[Unit]:
    """Each point under each ptxas, in a process and with a cache of its own."""
    made = []
    for point in points:
        for label, program in {BUNDLED: None, **programs}.items():
            environment = {}
            if program is not None:
                environment["TRITON_PTXAS_PATH"] = str(program)
                environment["TRITON_CACHE_DIR"] = str(state / "cache-of-other-ptxas")
            named = replace(point, name=f"{point.name} @ {label}")
            made.append(Unit(named.name, (named,), environment))
    return made


def verdicts(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """failure -> its status under each ptxas, and what follows."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        name, label = record["point"].rsplit(" @ ", 1)
        found.setdefault(name, {})[label] = record["status"]
    for name, statuses in found.items():
        others = [status for label, status in statuses.items() if label != BUNDLED]
        if statuses.get(BUNDLED) == "ok":
            verdict = "not seen again"
        elif "ok" in others:
            right = [label for label, status in statuses.items() if status == "ok"]
            verdict = f"the compiler: right with {', '.join(right)}"
        elif "no time" in statuses.values():
            verdict = "open: no time"
        else:
            verdict = "ours, or every compiler's"
        found[name] = {**statuses, "verdict": verdict}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--records", type=Path, nargs="*", required=True)
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True, help="on the monotonic clock")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    state = Path(os.environ.get(kit.VARIABLE, "/nonexistent"))
    points, programs = failures(options.records, options.rehearse), ptxas(state)
    exit_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="ral-gpu-") as folder:
        supervisor = Supervisor(
            options.lines, Path(folder), options.workers, options.until, alone=False,
            what={"part": "compilers"},
        )  # fmt: skip
        records = supervisor.run(units(points, programs, state))
    found = {"ptxas": {label: str(path) for label, path in programs.items()}}
    options.json.write_text(json.dumps({**found, "verdicts": verdicts(records)}, indent=1))
    for name, statuses in verdicts(records).items():
        print(f"{name}: {statuses['verdict']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
