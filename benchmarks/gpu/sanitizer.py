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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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
        wide = (call for call in small.calls(backend) if small.is_wide(backend, call))
        found += [f"{backend} {call} {dtypes[0]} 256" for call in wide]
    return found


def call(name: str, device: torch.device, seqlen: int) -> small.Results:
    """Run one of `names`."""
    backend, *words, dtype, head_dim = name.split()
    inputs = Small(device, getattr(torch, dtype), seqlen, backend, int(head_dim))
    return small.run(small.calls(backend)[" ".join(words)], inputs)


def run_calls(wanted: Sequence[str], file: Path) -> None:
    """One call after the other; `file` tells which ended."""
    device = process.begin()
    ended: dict[str, float] = {}
    for name in wanted:
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        call(name, device, SEQLEN if device.type == "cuda" else SHORT)
        if device.type == "cuda":
            torch.cuda.synchronize()
        ended[name] = round(time.perf_counter() - start, 2)
        file.write_text(json.dumps(ended))


@dataclass
class Share:
    """Calls of one process at a time: a call that ends its process costs itself."""

    index: int
    wanted: Sequence[str]
    ran: dict[str, float] = field(default_factory=dict)
    failed: list[dict[str, Any]] = field(default_factory=list)

    def run(self, tool: Sequence[str], folder: Path, until: float) -> Share:
        rest, file = list(self.wanted), folder / f"small-{self.index}.json"
        while rest and time.monotonic() < until:
            file.write_text("{}")
            output = folder / f"small-{self.index}-{len(self.failed)}.txt"
            command = [*tool, sys.executable, "-m", "benchmarks.gpu.sanitizer"]
            with output.open("w") as log:
                worker = subprocess.Popen(
                    [*command, "--json", str(file), "--calls", *rest],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
                code = _wait(worker, until)
            ran = json.loads(file.read_text())
            self.ran.update(ran)
            if code is None or code == 0:
                break
            rest = [name for name in rest if name not in ran]
            text = output.read_text(errors="replace")
            lines = [line for line in text.splitlines() if line.strip(" =")]
            failure = {"exit": code, "output": lines[-40:]}
            # A tool's own verdict comes after the last call, and is of all of them.
            self.failed.append({"call": rest.pop(0) if rest else "any of them", **failure})
            print(f"share {self.index} ended with {code}:\n{text}", flush=True)
        return self


def run_watched(
    tool: Sequence[str], processes: int, wanted: Sequence[str], file: Path, until: float = math.inf
) -> int:
    """All calls under `tool`, shared out: one process would take minutes. Ends at `until`."""
    shares = [Share(index, wanted[index::processes]) for index in range(processes)]
    found: dict[str, Any] = {"tool": list(tool), "wanted": len(wanted), "ran": {}, "failed": []}
    with ThreadPoolExecutor(processes) as pool:
        for share in pool.map(lambda share: share.run(tool, file.parent, until), shares):
            found["ran"].update(share.ran)
            found["failed"] += share.failed
            file.write_text(json.dumps(found, indent=1))
    print(f"{len(found['ran'])} of {len(wanted)} calls ran, {len(found['failed'])} failed")
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
    parser.add_argument("--processes", type=int, help="this many, each with a share, under TOOL")
    parser.add_argument("--until", type=float, default=math.inf, help="on the monotonic clock")
    parser.add_argument("--calls", nargs="+", default=names(), help="default: all")
    parser.add_argument("tool", nargs="*", help="a command to run them under")
    options = parser.parse_args()
    if options.processes is not None:
        shared = (options.tool, options.processes, options.calls, options.json)
        return run_watched(*shared, options.until)
    run_calls(options.calls, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
