"""The calls of small.py under a tool of compute-sanitizer, shared out to processes.

python -m benchmarks.gpu.sanitizer --json F --processes 12 -- compute-sanitizer --tool memcheck
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import process, small
from .small import Small

SEQLEN, SHORT = 200, 33  # a tool slows a call down a hundred times; without a GPU all is slow


def names(backends: Sequence[str] = small.BACKENDS) -> list[str]:
    """As `triton attention spans bfloat16 128`; the kernels for Hopper and bfloat16 come first."""
    found = []
    for backend in sorted(backends, key=small.BACKENDS.index, reverse=True):
        dtypes = ("bfloat16", "float32") if backend == "triton" else ("bfloat16", "float16")
        for dtype, head_dim in ((dtypes[0], 128), (dtypes[0], 64), (dtypes[1], 64)):
            found += [f"{backend} {call} {dtype} {head_dim}" for call in small.calls(backend)]
    return found


def call(name: str, device: torch.device, seqlen: int) -> small.Results:
    """Run one of `names`."""
    backend, *words, dtype, head_dim = name.split()
    inputs = Small(device, getattr(torch, dtype), seqlen, backend, int(head_dim))
    return small.run(small.calls(backend)[" ".join(words)], inputs)


def run_share(share: tuple[int, int], wanted: Sequence[str], file: Path) -> None:
    """Every n-th call, starting with call i, for share (i, n); `file` tells which ended."""
    device = process.begin()
    ended: dict[str, float] = {}
    for name in wanted[share[0] :: share[1]]:
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        call(name, device, SEQLEN if device.type == "cuda" else SHORT)
        if device.type == "cuda":
            torch.cuda.synchronize()
        ended[name] = round(time.perf_counter() - start, 2)
        file.write_text(json.dumps({"ran": ended}))


def run_watched(
    tool: Sequence[str], processes: int, wanted: Sequence[str], file: Path, until: float = math.inf
) -> int:
    """All calls under `tool`, shared out: one process would take minutes. Ends at `until`."""
    folder = file.parent
    running = []
    for index in range(processes):
        command = [*tool, sys.executable, "-m", "benchmarks.gpu.sanitizer"]
        command += ["--share", str(index), str(processes), "--calls", *wanted]
        output = (folder / f"small-{index}.txt").open("w")
        command += ["--json", str(folder / f"small-{index}.json")]
        running.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT))
    found: dict[str, Any] = {"tool": list(tool), "wanted": len(wanted), "ran": {}, "failed": []}
    found["unfinished"] = []  # shares whose time was over
    for index, worker in enumerate(running):
        code = _wait(worker, until)
        try:
            record = json.loads((folder / f"small-{index}.json").read_text())
            found["ran"].update(record["ran"])
        except (OSError, ValueError):
            pass  # it ended before its first call did
        if code is None:
            found["unfinished"].append(index)
        elif code != 0:
            text = (folder / f"small-{index}.txt").read_text(errors="replace")
            lines = [line for line in text.splitlines() if line.strip(" =")]
            found["failed"].append({"share": index, "exit": code, "output": lines[-40:]})
            print(f"share {index} ended with {code}:\n{text}", flush=True)
        file.write_text(json.dumps(found, indent=1))
    ran, failed = len(found["ran"]), len(found["failed"])
    print(f"{ran} of {len(wanted)} calls ran, {failed} of {processes} shares failed")
    return int(bool(found["failed"]))


def _wait(worker: subprocess.Popen[bytes], until: float) -> int | None:
    """The exit status; None of a process that has to be ended."""
    try:
        return worker.wait(None if math.isinf(until) else max(until - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), metavar=("I", "N"))
    parser.add_argument("--processes", type=int, help="this many, each with a share, under TOOL")
    parser.add_argument("--until", type=float, default=math.inf, help="on the monotonic clock")
    parser.add_argument("--calls", nargs="+", default=names(), help="default: all")
    parser.add_argument("tool", nargs="*", help="a command to run them under")
    options = parser.parse_args()
    if options.processes is not None:
        shared = (options.tool, options.processes, options.calls, options.json)
        return run_watched(*shared, options.until)
    run_share(tuple(options.share), options.calls, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
