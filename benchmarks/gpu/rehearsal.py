"""The three scripts without a GPU, with faults seeded: what comes back in each case.

    python -m benchmarks.gpu.rehearsal --out folder [--scenarios hang "cold cache"]

Prints a table: scenario, script, what ended how. Everything but the GPU is real: processes, time
limits, caches, the build, the archive. benchmarks/gpu/mock.py says what stands for the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock as unittest_mock

import torch

from benchmarks.harness import machine

from . import kit, mock, points, process, work
from .points import Point
from .scripts import LIBRARY, SECONDS
from .stages import ROOT

# scenario -> kernels and what they do; the last two change what is carried instead
SCENARIOS: dict[str, list[dict[str, str]]] = {
    "no fault": [],
    "crash": [{"kernel": "hopper attention bwd", "kind": "crash"}],
    "illegal access": [{"kernel": "triton attention bwd", "kind": "illegal access"}],
    "hang": [{"kernel": "hopper attention fwd", "kind": "hang"}],
    "wrong": [{"kernel": "triton policy_divergence loss", "kind": "wrong"}],
    "compiler": [{"kernel": "triton attention fwd", "kind": "compiler"}],
    "all at once": [
        {"kernel": "hopper attention bwd", "kind": "crash"},
        {"kernel": "cuda attention bwd", "kind": "hang"},
        {"kernel": "triton policy bwd", "kind": "illegal access"},
        {"kernel": "triton divergence fwd", "kind": "wrong"},
        {"kernel": "triton policy_divergence loss", "kind": "compiler"},
    ],
    "no library": [],
    "cold cache": [],
}


def rehearse(scenario: str, out: Path, given_kit: Path, scripts: Sequence[str]) -> dict[str, Any]:
    """All scripts of a scenario, as on the GPU machine: one state, one budget each."""
    folder = out / scenario.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    carried = folder / "kit"
    shutil.copytree(given_kit, carried)
    leave_out = {"no library": kit.LIBRARY, "cold cache": kit.CACHE}.get(scenario)
    if leave_out is not None:
        (carried / leave_out).unlink(missing_ok=True)
    environment = {**os.environ, mock.VARIABLE: json.dumps({"faults": SCENARIOS[scenario]})}
    # whatever lies in the checkout: what the kit brings is what the machine has
    aside = LIBRARY.with_suffix(".aside")
    if LIBRARY.exists():
        LIBRARY.rename(aside)
    found: dict[str, Any] = {}
    try:
        for script in scripts:
            command = [sys.executable, "-m", "benchmarks.gpu", script, "--rehearse", "--out"]
            command += [str(folder / script), "--kit", str(carried), "--state"]
            command += [str(folder / "state")]
            start = time.monotonic()
            done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
            run = json.loads((folder / script / f"gpu-{script}.json").read_text())
            found[script] = _told(run, done.returncode, time.monotonic() - start)
            found[script]["files"] = sorted(f.name for f in (folder / script).iterdir())
            print(_row(scenario, script, found[script]), flush=True)
    finally:
        LIBRARY.unlink(missing_ok=True)
        if aside.exists():
            aside.rename(LIBRARY)
    return found


def _told(run: dict[str, Any], code: int, seconds: float) -> dict[str, Any]:
    """What a script says in the end."""
    stages = {record["stage"]: record["status"] for record in run["stages"]}
    ended = Counter(record["status"] for record in run["points"] if record.get("part") != "tests")
    tests: Counter[str] = Counter()
    for record in run["stages"]:
        if record["stage"].startswith(("correctness", "on device")):
            tests.update((record.get("result") or {}).get("outcomes", {}))
    compiled = [record["compiled"] for record in run["points"] if "compiled" in record]
    verdicts = [
        f"{name}: {verdict['verdict']}"
        for record in run["stages"]
        for name, verdict in ((record.get("result") or {}).get("verdicts") or {}).items()
    ]
    return {
        "exit": code,
        "seconds": round(seconds),
        "stages": stages,
        "points": dict(ended),
        "tests": dict(tests),
        "failed": sorted(
            {r["point"] for r in run["points"] if r["status"] not in ("ok", "no time", "given up")}
        ),
        "cache_hits": sum(c["hits"] for c in compiled),
        "cache_misses": sum(c["misses"] for c in compiled),
        "verdicts": verdicts,
    }


def _row(scenario: str, script: str, told: dict[str, Any]) -> str:
    def counted(counts: dict[str, int]) -> str:
        return ", ".join(f"{n} {name}" for name, n in sorted(counts.items())) or "-"

    bad = {name: status for name, status in told["stages"].items() if status != "ok"}
    return (
        f"{scenario:15} {script:7} {told['seconds']:4} s of {SECONDS[script]:.0f}  "
        f"points: {counted(told['points'])}; tests: {counted(told['tests'])}; "
        f"cache {told['cache_hits']} of {told['cache_hits'] + told['cache_misses']}; "
        f"stages not ok: {', '.join(f'{n} {s}' for n, s in bad.items()) or '-'}"
    )


# -- compiling ahead -------------------------------------------------------------------------------


def _kit_points() -> Iterator[Point]:
    """What scripts ask of Triton, at its own shapes, in order of value."""
    for plan in (points.each_op, points.attention_times, points.tiles, points.ral_times):
        for unit in plan(False):
            for point in unit.points:
                backend = point.settings.get("backend", unit.group)
                if backend in ("", "triton", "ral") and point.settings.get("mode") != "forward":
                    yield point  # a forward is part of forward and backward


def compile_all(work_folder: Path, seconds: float) -> dict[str, Any]:
    """Fill the cache in `work_folder`: first the points, then tests until the time is over."""
    environment = {
        **os.environ,
        mock.VARIABLE: json.dumps({"computes": False, "launchers": True}),
        kit.VARIABLE: str(work_folder),
        "TRITON_CACHE_DIR": str(work_folder / "cache"),
        "TRITON_STORE_BINARY_ONLY": "1",
        "OMP_NUM_THREADS": "1",
    }
    jobs = max(len(os.sched_getaffinity(0)), 1)
    shares = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.rehearsal", "--share", str(i), str(jobs)],
            env=environment, cwd=ROOT,
        )
        for i in range(jobs)
    ]  # fmt: skip
    codes = [share.wait() for share in shares]
    environment[mock.VARIABLE] = json.dumps({"launchers": True})
    log = work_folder / "tests.jsonl"
    log.unlink(missing_ok=True)
    environment |= {
        "RAL_GPU_TEST_LOG": str(log),
        "RAL_GPU_TEST_UNTIL": str(time.monotonic() + seconds),
    }
    expression = "triton and not (opcheck or compile or fake)"
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops", "-k"]
    tests += [
        expression,
        "-p",
        "benchmarks.gpu.log",
        "-n",
        str(jobs),
        "--dist",
        "load",
        "--maxschedchunk",
        "2",
    ]
    subprocess.run(tests, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
    from .log import summary

    return {"shares": codes, "tests": summary(log)["outcomes"] if log.exists() else {}}


def run_share(share: tuple[int, int]) -> int:
    """Compile every n-th point; prints those that fail."""
    device = process.begin()
    failed = 0
    for point in list(_kit_points())[share[0] :: share[1]]:
        with process.compilations() as compiled:
            try:
                work.KINDS[point.kind](device, **point.settings)
            except Exception as error:
                failed += 1
                print(f"{point.name}: {type(error).__name__}: {error}", flush=True)
        print(f"{point.name}: {json.dumps(compiled)}", flush=True)
    return failed


def check_kit(folder: Path) -> dict[str, Any]:
    """Unpack a kit elsewhere and look up all that scripts ask for: hits and misses."""
    with tempfile.TemporaryDirectory(prefix="ral-kit-") as state:
        found = kit.unpack(folder, Path(state))
        given = {
            mock.VARIABLE: json.dumps({"computes": False}),
            kit.VARIABLE: state,
            "TRITON_CACHE_DIR": str(Path(state) / "cache"),
        }
        code = (
            "import json; from benchmarks.gpu import rehearsal; print(json.dumps(rehearsal.hits()))"
        )
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, env={**os.environ, **given}, cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise RuntimeError(f"kit: {done.stderr.strip()[-400:]}")
        return {**found, **json.loads(done.stdout.splitlines()[-1])}


def hits() -> dict[str, Any]:
    """Every point that a script would run with Triton, once, against the cache of this process."""
    device = process.begin()
    with process.compilations() as compiled:
        for point in _kit_points():
            with unittest_mock.patch("builtins.print"):
                work.KINDS[point.kind](device, **point.settings)
    return compiled


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-rehearsal")
    parser.add_argument("--kit", type=Path, default=ROOT / "build" / "gpu-kit")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--scripts", nargs="+", choices=SECONDS, default=list(SECONDS))
    parser.add_argument("--share", type=int, nargs=2, help="compile a share of the kit's kernels")
    options = parser.parse_args()
    if options.share is not None:
        return int(bool(run_share(tuple(options.share))))
    options.out.mkdir(parents=True, exist_ok=True)
    scenarios: dict[str, Any] = {}
    found = {
        "benchmark": "gpu rehearsal",
        "machine": machine.describe(torch.device("cpu")),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "faults": {name: SCENARIOS[name] for name in options.scenarios},
        "scenarios": scenarios,
    }
    for scenario in options.scenarios:
        scenarios[scenario] = rehearse(scenario, options.out, options.kit, options.scripts)
        (options.out / "rehearsal.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
