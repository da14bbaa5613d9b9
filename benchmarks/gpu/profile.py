"""The kernels of one forward and backward under Nsight Compute: what bounds them.

    python -m benchmarks.gpu.profile --out FOLDER --until T

Clocks stay as they are. FOLDER/profiles.json has the metrics of each kernel; the tool's own report
goes into <name>.csv.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import points
from .points import Unit

METRICS = {
    "gpu__time_duration.sum": "time",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor_pipe_percent",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "l2_percent",
    "l1tex__data_bank_conflicts_pipe_lsu.sum": "bank_conflicts",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "programs",
}


def parsed(text: str) -> list[dict[str, Any]]:
    """Kernel by kernel what `ncu --csv` says of METRICS."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        kernel = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"][:80]})
        name = METRICS.get(row["Metric Name"])
        if name is not None:
            kernel[name] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return list(kernels.values())


def command(unit: Path, lines: Path) -> list[str]:
    """A worker under ncu, which replays each kernel a few times."""
    ncu = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin") or "ncu"
    options = ["--clock-control", "none", "--csv", "--page", "details", "--metrics"]
    options += [",".join(METRICS), "--launch-count", "4", "--print-units", "base"]
    options += ["--kernel-name-base", "demangled", "-k", f"regex:.*{points.PROFILED}.*"]
    worker = [sys.executable, "-m", "benchmarks.gpu.worker", str(unit), str(lines), ""]
    return [ncu, *options, *worker]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True, help="on the monotonic clock")
    parser.add_argument("--rehearse", action="store_true", help="the worker alone, without ncu")
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {}
    given = list(points.profiles(options.rehearse))
    for index, (name, point, environment) in enumerate(given):
        left = (options.until - time.monotonic()) / (len(given) - index)
        with tempfile.TemporaryDirectory() as folder:
            unit = Path(folder) / "unit.json"
            unit.write_text(json.dumps(asdict(Unit(name, (point,)))))
            full = command(unit, Path(folder) / "lines")
            words = full[full.index(sys.executable) :] if options.rehearse else full
            found[name] = _run(words, environment, left, options.out / f"{name}.csv")
        (options.out / "profiles.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))
    return int(any("error" in result for result in found.values()))


def _run(
    command: Sequence[str], environment: dict[str, str], seconds: float, file: Path
) -> dict[str, Any]:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **environment},
            timeout=None if math.isinf(seconds) else max(seconds, 1.0),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": "no time left"}
    file.write_text(done.stdout + done.stderr)
    if done.returncode != 0:
        return {"error": (done.stdout + done.stderr).strip().splitlines()[-6:]}
    return {"kernels": parsed(done.stdout)}


if __name__ == "__main__":
    sys.exit(main())
