"""What a measurement depends on: machine, versions, commit, free memory, GEMM rate."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
FLUSH_BYTES = 256 << 20  # more than any GPU's L2
SLEEP_CYCLES = 4_000_000  # about 2 ms
GPU_STATE = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")


def _proc(path: str, key: str) -> str | None:
    """The first value of `key` in a `key : value` file of /proc."""
    try:
        text = Path(path).read_text()
    except OSError:
        return None
    found = re.search(rf"^{re.escape(key)}\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else None


VENDORS = {"GenuineIntel": "intel", "AuthenticAMD": "amd"}


def cpu_id() -> str:
    """Vendor, family, model and stepping, as in `intel-6-207-2`: names of models repeat."""
    vendor = _proc("/proc/cpuinfo", "vendor_id")
    if vendor is not None:
        first, keys = VENDORS.get(vendor, vendor), ["cpu family", "model", "stepping"]
    else:  # ARM's names for the same
        first = platform.machine()
        keys = ["CPU implementer", "CPU part", "CPU variant", "CPU revision"]
    parts = [first, *(_proc("/proc/cpuinfo", key) for key in keys)]
    return re.sub(r"[^a-z0-9]+", "-", "-".join(part for part in parts if part).lower())


def load() -> float | None:
    """The load average of the last minute."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def describe(device: torch.device) -> dict[str, Any]:
    """CPU, cores, threads, vector extensions, memory and, where one is used, the GPU."""
    flags = (_proc("/proc/cpuinfo", "flags") or "").split()
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    total = _proc("/proc/meminfo", "MemTotal")
    facts: dict[str, Any] = {
        "cpu": _proc("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cpu_id": cpu_id(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector_extensions": [flag for flag in wanted if flag in flags],
        "memory_gib": round(int(total.split()[0]) / 2**20, 1) if total else None,
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = properties.name
        facts["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
    return facts


def keep_freed_memory() -> None:
    """Have glibc's malloc return no memory to the system, as jemalloc and tcmalloc mostly do.

    Otherwise each tensor of megabytes may be mapped again, depending on what was freed before. The
    first touch of its pages then costs as much as a small kernel.

    Raises:
        RuntimeError: the allocator is another.
    """
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        raise RuntimeError("keep_freed_memory: this system's malloc has no mallopt") from None
    if not (mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1)):
        raise RuntimeError("keep_freed_memory: mallopt refused")


def slug(machine: dict[str, Any]) -> str:
    """A folder name: `amd-epyc-26-2-1-2-cores` or the GPU's name."""
    model = machine["cpu_id"].partition("-")[2]
    name = machine.get("gpu") or f"{machine['cpu']} {model} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")


def versions() -> dict[str, str]:
    """Versions of all that takes part."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "triton", "numpy", "scikit-image", "ral-kernels"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def commit() -> dict[str, Any]:
    """The commit of this checkout and whether files differ from it, results aside.

    For a copy without .git, RAL_COMMIT names the commit.
    """

    def git(*arguments: str) -> str | None:
        try:
            command = ["git", "-C", str(ROOT), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    told = os.environ.get("RAL_COMMIT")
    if told and git("rev-parse", "HEAD") is None:
        return {"hash": told[:10], "dirty": None}
    changes = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"hash": git("rev-parse", "--short=10", "HEAD"), "dirty": bool(changes)}


def available_bytes(device: torch.device) -> int | None:
    """Memory that a contestant may take: of the GPU, or the machine and its control group."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the allocator only keeps is free as well
        return torch.cuda.mem_get_info(device)[0]
    free = _proc("/proc/meminfo", "MemAvailable")
    limits = [int(free.split()[0]) * 1024] if free else []
    try:
        group = Path("/sys/fs/cgroup")
        used, limit = (group / "memory.current").read_text(), (group / "memory.max").read_text()
        if limit.strip() != "max":
            limits.append(int(limit) - int(used))
    except (OSError, ValueError):
        pass
    return min(limits) if limits else None


def reset_peak_memory(device: torch.device) -> int:
    """Forget the peak and return the bytes in use now (or the peak where it stays known)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts again from VmRSS
    except OSError:
        pass
    return peak_memory(device)


def peak_memory(device: torch.device) -> int:
    """The most bytes in use since `reset_peak_memory`: resident on CPU, allocated on CUDA."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = _proc("/proc/self/status", "VmHWM")
    if peak is not None:
        return int(peak.split()[0]) * 1024
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_rss if sys.platform == "darwin" else peak_rss * 1024


def gpu_state() -> dict[str, float] | None:
    """Clocks in MHz, degrees Celsius and watts of the first GPU now; None without nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_STATE)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        values = [float(value) for value in done.stdout.splitlines()[0].split(",")]
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    return dict(zip(GPU_STATE, values, strict=True))


@functools.cache
def _flush_buffer(device: torch.device) -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)


def clock(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, by events on CUDA; its result is dropped after the clock stops.

    On CUDA the L2 cache is emptied first. The GPU then waits for 2 ms while the host enqueues the
    call, so that the time of a short call is not the host's.
    """
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _flush_buffer(device).zero_()
        torch.cuda.synchronize(device)
        torch.cuda._sleep(SLEEP_CYCLES)
        begin.record()
        result = call()
        end.record()
        torch.cuda.synchronize(device)
        seconds = begin.elapsed_time(end) / 1e3
    else:
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
    del result
    return seconds


def host_seconds(call: Callable[[], Any], device: torch.device, repeats: int = 7) -> float:
    """Seconds that the host needs to issue one call; the median of a few.

    On CUDA the GPU computes meanwhile, and the wait for it is outside the clock. `clock` hides this
    time. On a CPU it is the time of the call.
    """
    seconds = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
        del result
    return statistics.median(seconds)


def gemm_gflops(dtype: torch.dtype, device: torch.device) -> float:
    """The rate of torch's own matrix product here and now, median of a few, in GFLOP/s."""
    # torch has no fast float16 product on CPUs: 2 GFLOP/s, which would take minutes at full size
    slow = dtype == torch.float16 and device.type == "cpu"
    size = GEMM_SIZE[device.type] // (8 if slow else 1)
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    first = clock(lambda: left @ right, device)
    # bfloat16 without instructions for it takes a second: two more are enough
    seconds = [clock(lambda: left @ right, device) for _ in range(6 if first < 0.25 else 2)]
    return 2 * size**3 / statistics.median(seconds) / 1e9
