"""The three scripts: lists of stages that fit, one after the other, into fifteen minutes.

first    are the kernels right at all, and how fast are they: one answer for each contestant
second   correctness case by case, the RAL loss, compute-sanitizer, Nsight Compute
third    what failed, under other compilers; else tiles

`SECONDS` says how long each may take; one without limits runs all of it and both sweeps.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import mock, sanitizer
from .kit import DESCRIPTION
from .lines import append, parsed
from .stages import ROOT, Setting, Stage, python, read

SECONDS = {"first": 210.0, "second": 380.0, "third": 150.0}
LIBRARY = ROOT / "ral_kernels" / "lib" / "libral_cuda.so"
# Tracing and fake tensors do not depend on the device; tests/gpu/test_gpu.py compiles on it.
TRITON_TESTS = "(triton and not (opcheck or compile or fake))"
# One test a kernel, of dtypes that are quick without a GPU.
REHEARSED = {
    "first": "gqa_2 and (gpu or triton and (test_attention or test_policy) and float)",
    "hopper": "gpu and gqa_2",
    "on device": "repeats and float16 and (divergence or policy)",
}


def _cores() -> int:
    """How many processes may compile beside each other; one core is for handing out work."""
    return max(len(os.sched_getaffinity(0)) - 1, 1)


def _unpack(setting: Setting) -> list[str]:
    return python(
        "-m", "benchmarks.gpu.kit", "unpack", "--kit", str(setting.kit), "--state",
        str(setting.state), "--json", str(setting.scratch / "kit.json"),
    )  # fmt: skip


def _is_unpacked(setting: Setting) -> str | None:
    return "it is unpacked" if (setting.state / DESCRIPTION).exists() else None


def _library_loads(setting: Setting) -> str | None:
    """Why the library need not be built: it is there. A process tries, as a broken one kills it."""
    code = f"import ctypes; ctypes.CDLL({str(LIBRARY)!r}).ral_cuda_error_string"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    return "the library is there" if done.returncode == 0 else None


def _build(setting: Setting) -> list[str]:
    build = python("setup.py", "--quiet", "build_ext", "--inplace")
    return ["bash", "-c", 'rm -f "$0" && exec "$@"', str(LIBRARY), *build]


def _build_alone(setting: Setting) -> dict[str, str]:
    """ral_cuda, for the GPU at hand: no file of it takes more than 15 s."""
    return {"RAL_LIBRARIES": "ral_cuda", "RAL_CUDA_ARCHITECTURES": "90-real"}


def _facts(setting: Setting) -> list[str]:
    file = str(setting.scratch / "facts.json")
    return python("-m", "benchmarks.gpu.facts", "--json", file)


def _points(plan: str, workers: int, alone: bool) -> Callable[[Setting], list[str]]:
    def command(setting: Setting) -> list[str]:
        command = python("-m", "benchmarks.gpu.supervise", plan, "--lines", str(setting.lines))
        at_once = min(workers, _cores() + 1)
        command += ["--until", str(setting.until), "--workers", str(at_once)]
        return command + ["--alone"] * alone + ["--rehearse"] * setting.rehearse

    return command


def _counted(plan: str) -> Callable[[Setting], Any]:
    """How many points of a plan came to what end."""

    def collect(setting: Setting) -> Any:
        counts: dict[str, int] = {}
        for record in parsed(setting.lines.read_text()):
            if record.get("part") == plan:
                counts[record["status"]] = counts.get(record["status"], 0) + 1
        return {"outcomes": counts}

    return collect


def _tests(
    what: str, *files: str, expression: str, workers: int = 15
) -> Callable[[Setting], list[str]]:
    def command(setting: Setting) -> list[str]:
        command = python("-m", "pytest", "-q", "-p", "no:cacheprovider", *files)
        command += ["-p", "benchmarks.gpu.log", "-n", str(min(_cores(), workers))]
        # few tests ahead for a worker, or it would hold valuable ones back
        command += ["--dist", "load", "--maxschedchunk", "4", "--max-worker-restart", "1000"]
        if not setting.rehearse:
            return [*command, "-k", expression]
        # tests with this mark make tensors of a GPU
        return [*command, "-k", REHEARSED[what], "-m", "" if what == "on device" else "not gpu"]

    return command


def _tests_environment(required: str, hopper: bool = False) -> Callable[[Setting], dict[str, str]]:
    def environment(setting: Setting) -> dict[str, str]:
        return {
            "RAL_GPU_TEST_LOG": str(setting.scratch / "tests.jsonl"),
            "RAL_GPU_TEST_UNTIL": str(setting.until),
            "RAL_REQUIRE": required,
            "RAL_CUDA_HOPPER": str(int(hopper)),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }

    return environment


def _tests_result(setting: Setting) -> dict[str, Any]:
    """The summary; what failed becomes a record like any point's."""
    from .log import summary

    found = summary(setting.scratch / "tests.jsonl")
    for failure in found["failures"]:
        why = " / ".join(failure.get("why", []))[-400:]
        record = {"part": "tests", "point": failure["test"], "status": "failed", "reason": why}
        append(setting.lines, record)
    return found


def _sanitizer(tool: str) -> Callable[[Setting], list[str]]:
    """Small calls under a tool of compute-sanitizer, shared out to processes."""

    def command(setting: Setting) -> list[str]:
        command = python("-m", "benchmarks.gpu.sanitizer")
        command += ["--json", str(setting.scratch / "small.json"), "--processes"]
        command[3:3] = ["--until", str(setting.until)]
        if setting.rehearse:  # `env` stands for a tool that finds nothing
            calls = sanitizer.names()[:: 9 if tool == "memcheck" else 11]
            return [*command, "2", "--calls", *calls, "--", "env"]
        command += [str(min(_cores(), 12)), "--", str(_tool("compute-sanitizer"))]
        command += ["--tool", tool, "--error-exitcode", "86", "--print-limit", "20"]
        return command + (["--racecheck-report", "analysis"] if tool == "racecheck" else [])

    return command


def _tool(name: str) -> str | None:
    places = "/usr/local/cuda/bin:/opt/cuda/bin"
    return shutil.which(name) or shutil.which(name, path=places)


def _without(name: str) -> Callable[[Setting], str | None]:
    def missing(setting: Setting) -> str | None:
        mocked = mock.settings() is not None
        return None if mocked or _tool(name) else f"{name} is not on the PATH"

    return missing


def _uncached(setting: Setting) -> dict[str, str]:
    # every tensor an allocation of its own, so that memcheck sees where it ends
    return {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def _profiles(setting: Setting) -> list[str]:
    command = python("-m", "benchmarks.gpu.profile", "--out", str(setting.scratch))
    command += ["--until", str(setting.until)]
    return command + ["--rehearse"] * setting.rehearse


def _failures(setting: Setting) -> list[str]:
    command = python("-m", "benchmarks.gpu.compilers", "--lines", str(setting.lines))
    command += ["--json", str(setting.scratch / "compilers.json")]
    command += ["--until", str(setting.until), "--workers", str(min(_cores(), 8))]
    command += ["--rehearse"] * setting.rehearse
    # of this machine, or of another one, carried here
    records = [*setting.state.glob("records-*.jsonl"), *setting.kit.glob("gpu-*.json")]
    return [*command, "--records", *map(str, sorted(records)), str(setting.lines)]


@dataclass(frozen=True)
class SweepPlan:
    """One run of benchmarks.frames_sweep: the picture that people look at."""

    objective: str
    frames: tuple[int, ...]  # of 256 visual tokens
    more: tuple[str, ...] = ()

    def command(self, setting: Setting) -> list[str]:
        command = python("-m", "benchmarks.frames_sweep", "--objective", self.objective)
        command += ["--input", "random", *self.more, "--device", setting.device]
        command += ["--out", str(setting.out)]
        if setting.rehearse:
            command += ["--heads", "4", "--head-dim", "32", "--frames", "2", "3", "--grid", "3"]
            command += ["4", "--repeats", "1", "--dtype", "float32", "--contestants"]
            return [*command, "ral,chunked_16" if self.objective == "ral" else "ral,sdpa_one_hot"]
        budget = 3600 if math.isinf(setting.budget) else max(setting.budget - 25, 10)
        command += ["--budget", str(budget), "--repeats", "9", "--grid", "16", "16", "--frames"]
        return [*command, *(str(frames) for frames in self.frames)]

    def collect(self, setting: Setting) -> dict[str, Any]:
        """The sweep's file and what it has; a picture too if the sweep was stopped before it."""
        files = setting.out.glob(f"frames_sweep-{self.objective}-*.json")
        file = max(files, key=lambda file: file.stat().st_mtime)
        run = json.loads(file.read_text())
        if not file.with_suffix(".png").exists():
            from benchmarks.harness import plot

            plot.draw(file)
        return {"file": file.name, "sizes": len(run["sizes"])}


TO_64K = (4, 8, 16, 64, 256)  # 1k, 2k, 4k, 16k and 64k visual tokens
SWEEPS = (
    SweepPlan("attention", TO_64K, ("--layout", "offset")),
    SweepPlan("ral", TO_64K, ("--rows", "1024", "--layout", "offset")),
)

HOST = "tests/cuda_host"
# Each script begins so: the machine may be another than the one before it had.
BEGIN = (
    Stage("kit", 15, _unpack, read("kit.json"), missing=_is_unpacked),
    Stage("library", 45, _build, environment=_build_alone, missing=_library_loads),
)
FIRST = (
    *BEGIN,
    Stage("facts", 20, _facts, read("facts.json")),
    Stage("each op", 40, _points("each_op", 12, False), _counted("each_op")),
    Stage("times", 130, _points("attention_times", 6, True), _counted("attention_times")),
)
SECOND = (
    *BEGIN,
    Stage(
        "correctness", 140,
        _tests("first", "tests/ops", f"{HOST}/test_attention.py",
               f"{HOST}/test_policy.py", f"{HOST}/test_policy_divergence.py",
               expression=f"{TRITON_TESTS} or gpu"),
        _tests_result, _tests_environment("triton,cuda"),
    ),
    Stage(
        "correctness hopper", 45,
        _tests("hopper", *(f"{HOST}/test_{x}.py"
                           for x in ("hopper", "hopper_bwd", "hopper_policy", "attention")),
               expression="gpu"),
        _tests_result, _tests_environment("triton,cuda", hopper=True),
    ),
    Stage("times of the loss", 45, _points("ral_times", 6, True), _counted("ral_times")),
    *(
        Stage(tool, 38, _sanitizer(tool), read("small.json"), _uncached,
              _without("compute-sanitizer"))
        for tool in ("memcheck", "racecheck")
    ),
    Stage("profile", 40, _profiles, read("profiles.json"), missing=_without("ncu")),
    Stage(
        "on device", 30,
        _tests("on device", "tests/gpu/test_gpu.py", expression="", workers=6),
        _tests_result, _tests_environment("triton"),
    ),
)  # fmt: skip
THIRD = (
    *BEGIN,
    Stage("failures", 80, _failures, read("compilers.json")),
    Stage("tiles", 60, _points("tiles", 4, True), _counted("tiles")),
)
SCRIPTS: dict[str, tuple[Stage, ...]] = {"first": FIRST, "second": SECOND, "third": THIRD}
SCRIPTS["all"] = (
    *FIRST,
    *SECOND[len(BEGIN) :],
    *(Stage(f"sweep {plan.objective}", 120, plan.command, plan.collect) for plan in SWEEPS),
    *THIRD[len(BEGIN) :],
)


def needs_xdist() -> str | None:
    """What a GPU machine must have for the tests' stages; None if it has it."""
    if importlib.util.find_spec("xdist") is None:
        return "pytest-xdist is not installed: a test that ends its process would end its stage"
    return None


def result_files(out: Path, name: str) -> list[Path]:
    """What a script has left in its folder, beside the JSON and the archive."""
    kept = {f"gpu-{name}.json", f"gpu-{name}.tar.xz"}
    return [file for file in sorted(out.rglob("*")) if file.is_file() and file.name not in kept]
