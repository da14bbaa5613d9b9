"""What `make gpu` runs: an ordered list of stages, each a process of its own with a budget.

A stage that crashes, hangs or runs over its budget is recorded as such, with the end of what it
printed, and the others go on. A rehearsal runs the same stages without a GPU, on tiny shapes, as
far as they go.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TAIL_LINES = 60  # of a stage's output that go into the JSON when it fails
GRACE = 5.0  # seconds to end in, before a stage is killed


@dataclass(frozen=True)
class Setting:
    """What a stage's command depends on."""

    out: Path  # for files that stay
    scratch: Path  # for files of the stage, which do not
    budget: float  # seconds
    rehearse: bool

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
    missing: Callable[[], str | None] = lambda: None  # why it cannot run here


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _read(name: str) -> Callable[[Setting], Any]:
    """What a stage wrote to a JSON file of that name in its scratch folder."""

    def read(setting: Setting) -> Any:
        return json.loads((setting.scratch / name).read_text())

    return read


def _library(setting: Setting) -> list[str]:
    """The native library in place, without venv, pip or network; Triton needs none of it."""
    if setting.rehearse:
        return _python("setup.py", "--name")
    return _python("setup.py", "--quiet", "build_ext", "--inplace")


def _facts(setting: Setting) -> list[str]:
    file = str(setting.scratch / "facts.json")
    return _python("-m", "benchmarks.gpu.facts", "--device", setting.device, "--json", file)


REHEARSED = "triton and float32 and (test_attention and gqa_2 or test_policy and length_2)"
REHEARSED_ON_DEVICE = "repeats and divergence"
# Tracing and fake tensors do not depend on the device; tests/test_gpu.py compiles on it.
CHECKED = "triton and not (opcheck or compile or fake)"


def _correctness(setting: Setting) -> list[str]:
    """The ops' own tests: all cases and dtypes against float64, repeats, exact zeros."""
    command = _python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.log")
    if setting.rehearse:
        return [*command, "tests/ops", "-k", REHEARSED]
    return [*command, *_workers(), "tests/ops", "-k", CHECKED]


def _correctness_cuda(setting: Setting) -> list[str]:
    """The same cases for the CUDA C++ kernels, and those of their own tiles."""
    command = _python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.log")
    if setting.rehearse:
        return [*command, "tests/cuda_host/test_attention.py", "-k", "host and gqa_2"]
    return [*command, *_workers(), "tests/cuda_host", "-k", "gpu"]


def _on_device(setting: Setting) -> list[str]:
    """Large shapes, torch.compile, CUDA graphs, two streams, offsets beyond 2**31."""
    command = _python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.log")
    if setting.rehearse:
        return [
            *command,
            "tests/test_gpu.py",
            "-k",
            "repeats and float32 and (divergence or policy)",
        ]
    return [*command, *_workers(), "tests/test_gpu.py"]


def _cores() -> int:
    """How many processes may compile beside each other; one core is for handing out work."""
    return max(len(os.sched_getaffinity(0)) - 1, 1)


def _workers() -> list[str]:
    """Options of pytest-xdist where it is there: compiling kernels takes the most time by far."""
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(_cores()), "--dist", "load"]


def _tests_environment(setting: Setting, required: str = "triton") -> dict[str, str]:
    environment = {
        "RAL_GPU_TEST_LOG": str(setting.scratch / "tests.jsonl"),
        "RAL_GPU_TEST_SECONDS": str(setting.budget - 10),
        "RAL_REQUIRE": required,
    }
    if setting.rehearse:
        environment["TRITON_INTERPRET"] = "1"
    return environment


def _cuda_environment(setting: Setting) -> dict[str, str]:
    # A machine without nvcc has no such kernels: the tests are skipped, and the log says so. In a
    # rehearsal they run in the harness alone, as there is no GPU.
    built = shutil.which("nvcc") and not setting.rehearse
    return _tests_environment(setting, required="cuda" if built else "triton")


def _tests_result(setting: Setting) -> dict[str, Any]:
    from .log import summary

    return summary(setting.scratch / "tests.jsonl")


@dataclass(frozen=True)
class SweepPlan:
    """One run of benchmarks/frames_sweep.py."""

    objective: str
    heads: tuple[int, int, int]  # query heads, key and value heads, head dim
    frames: tuple[int, ...]  # of 256 visual tokens
    repeats: int
    folder: str = ""  # within the results; "" the folder itself
    more: tuple[str, ...] = field(default=())

    def command(self, setting: Setting) -> list[str]:
        frames, grid, heads = self.frames, (16, 16), self.heads
        if setting.rehearse:
            frames, grid, heads = (2, 3), (3, 4), (4, 2, 32)
        numbers = ["--heads", heads[0], "--kv-heads", heads[1], "--head-dim", heads[2]]
        numbers += ["--frames", *frames, "--grid", *grid, "--repeats", self.repeats]
        numbers += ["--budget", max(setting.budget - 25, 10)]
        command = _python("benchmarks/frames_sweep.py", *(str(x) for x in numbers))
        command += ["--objective", self.objective, "--input", "random", *self.more]
        command += ["--device", setting.device, "--out", str(setting.out / self.folder)]
        if self.folder:
            command += ["--no-plot"]
        if setting.rehearse:
            command += ["--dtype", "float32", "--repeats", "1"]
            command += ["--rows", "8"] if self.objective == "ral" else []
            few = {"attention": "ral,sdpa_one_hot", "ral": "ral,chunked_16"}
            command += ["--contestants", few[self.objective]]
        return command

    def collect(self, setting: Setting) -> dict[str, Any]:
        """The sweep's file and what it has; a picture too if the sweep was stopped before it."""
        pattern = f"frames_sweep-{self.objective}-*.json"
        files = (setting.out / self.folder).glob(pattern)
        file = max(files, key=lambda file: file.stat().st_mtime)
        run = json.loads(file.read_text())
        if not self.folder and not file.with_suffix(".png").exists():
            from benchmarks.sweeps import plot

            plot.draw(file)
        return {"file": str(file.relative_to(setting.out)), "sizes": len(run["sizes"])}


TO_64K = (4, 8, 16, 64, 256)  # 1k, 2k, 4k, 16k and 64k visual tokens
ROWS = ("--rows", "1024")
SWEEPS = (
    SweepPlan("attention", (16, 2, 128), TO_64K, 9),
    SweepPlan("ral", (16, 2, 128), TO_64K, 9, more=ROWS),
    SweepPlan("attention", (28, 4, 128), (8, 64, 128), 5, folder="28-4-128"),
    SweepPlan("attention", (16, 2, 64), (8, 64, 128), 5, folder="16-2-64"),
)


def _sanitizer(tool: str) -> Callable[[Setting], list[str]]:
    """Small calls under a tool of compute-sanitizer, shared out to processes."""

    def command(setting: Setting) -> list[str]:
        file = str(setting.scratch / "small.json")
        command = _python("-m", "benchmarks.gpu.small", "--json", file)
        if setting.rehearse:
            return [*command, "--device", "cpu", "--share", "0" if tool == "memcheck" else "1", "9"]
        command += ["--processes", str(min(_cores(), 12)), "--", str(_sanitizer_path())]
        command += ["--tool", tool, "--error-exitcode", "86", "--print-limit", "20"]
        return command + (["--racecheck-report", "analysis"] if tool == "racecheck" else [])

    return command


def _sanitizer_path() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin:/opt/cuda/bin"
    )


def _no_sanitizer() -> str | None:
    return None if _sanitizer_path() else "compute-sanitizer is not on the PATH"


def _interpreted(setting: Setting) -> dict[str, str]:
    return {"TRITON_INTERPRET": "1"} if setting.rehearse else {}


def _uncached(setting: Setting) -> dict[str, str]:
    # every tensor an allocation of its own, so that memcheck sees where it ends
    return {**_interpreted(setting), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def _tiles(setting: Setting) -> list[str]:
    seconds, file = str(setting.budget - 15), str(setting.scratch / "tiles.json")
    return _python("-m", "benchmarks.gpu.tiles", "--seconds", seconds, "--json", file,
        "--device", setting.device)  # fmt: skip


def _tiles_environment(setting: Setting) -> dict[str, str]:
    kept = {"RAL_AUTOTUNE": "1", "RAL_CACHE_DIR": str(setting.scratch)}
    return {**_interpreted(setting), **kept}


# In order of value. The budgets add up to all the time there is; what a stage leaves over goes to
# those behind it, and where one takes more than there is left, the last ones go without.
STAGES = (
    Stage("library", 45, _library),
    Stage("facts", 25, _facts, _read("facts.json")),
    Stage("correctness", 120, _correctness, _tests_result, _tests_environment),
    Stage("correctness cuda", 30, _correctness_cuda, _tests_result, _cuda_environment),
    *(
        Stage(f"sweep {plan.objective}", budget, plan.command, plan.collect)
        for plan, budget in zip(SWEEPS[:2], (90, 50), strict=True)
    ),
    Stage("on device", 45, _on_device, _tests_result, _tests_environment),
    Stage("memcheck", 30, _sanitizer("memcheck"), _read("small.json"), _uncached, _no_sanitizer),
    Stage("racecheck", 30, _sanitizer("racecheck"), _read("small.json"), _uncached, _no_sanitizer),
    *(
        Stage(f"sweep {plan.objective} {plan.folder}", 25, plan.command, plan.collect)
        for plan in SWEEPS[2:]
    ),
    Stage("tiles", 30, _tiles, _read("tiles.json"), _tiles_environment),
)


def run(stage: Stage, setting: Setting, log: Path) -> dict[str, Any]:
    """Run one stage to its end or its budget's: status, seconds, result, and the output's end."""
    reason = None if setting.rehearse else stage.missing()
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
        "budget": round(setting.budget, 1),
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
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **stage.environment(setting)}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )
    if not setting.rehearse:
        environment.pop("TRITON_INTERPRET", None)
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
            code = process.wait(setting.budget)
            return ("ok" if code == 0 else "failed"), code
        except subprocess.TimeoutExpired:
            return "out of time", None
        finally:
            _end(process)


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
