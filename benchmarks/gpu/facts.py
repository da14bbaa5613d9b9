"""The machine of a GPU run, its ceilings (copies, matrix products), and whether the kit fits."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch

import ral_kernels as rk
from benchmarks.harness import machine

from . import kit, process, sanitizer

COPY_BYTES = 4 << 30
GEMM_SIZE = 8192
SMALL = 256  # of both, without a GPU


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def copy_gbytes(device: torch.device) -> float:
    """GB/s of a device-to-device copy, bytes read and bytes written."""
    size = COPY_BYTES if device.type == "cuda" else SMALL
    source = torch.randint(255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = [machine.clock(lambda: target.copy_(source), device) for _ in range(13)][3:]
    return 2 * size / statistics.median(seconds) / 1e9


def gemm_tflops(dtype: torch.dtype, device: torch.device) -> float:
    """TFLOP/s of a square product of normal numbers, which heat a GPU as real data does."""
    size = GEMM_SIZE if device.type == "cuda" else SMALL
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = [machine.clock(lambda: left @ right, device) for _ in range(13)][3:]
    return 2 * size**3 / statistics.median(seconds) / 1e12


def kit_fits(device: torch.device) -> dict[str, Any]:
    """What Triton is here, and whether the kernels of one call come from the cache."""
    with process.compilations() as compiled:
        try:
            sanitizer.call("triton attention spans bfloat16 128", device, sanitizer.SEQLEN)
            error = None
        except Exception as reason:  # each stage after this one says so too
            error = f"{type(reason).__name__}: {reason}"[:200]
    return {**kit.facts(), "compiled": compiled, "error": error}


def facts(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "machine": machine.describe(device),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "backends": rk.available_backends(),
        "nvcc": (_output("nvcc", "--version") or "absent").splitlines()[-1],
        "gpu_idle": machine.gpu_state(),
        "copy_gbytes": copy_gbytes(device),
        "gemm_tflops": {
            str(dtype)[6:]: gemm_tflops(dtype, device)
            for dtype in (torch.bfloat16, torch.float16, torch.float32)
        },
        "gpu_busy": machine.gpu_state(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "capability": list(torch.cuda.get_device_capability(device)),
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "shared_bytes": getattr(properties, "shared_memory_per_block_optin", None),
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    device = process.begin()
    found = facts(device)
    options.json.write_text(json.dumps(found, indent=1))
    found["kit"] = kit_fits(device)  # last: it may compile
    options.json.write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
