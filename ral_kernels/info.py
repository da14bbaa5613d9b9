"""What this installation has: `python -m ral_kernels info`, for people and with `--json`."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch

from .runtime import backends, cpu_library, cuda_library, native

# What changes how a call runs, or which one is right.
PACKAGES = ("torch", "triton", "transformers", "trl", "accelerate", "peft", "numpy", "flash-attn")
LIBRARIES = ("ral_cpu", "ral_cuda")


def facts() -> dict[str, Any]:
    """Versions, CPU, GPUs, libraries with their checksums, and the backends of each op.

    Its paths are those of the libraries, and what variables named RAL_ hold.
    """
    from . import __version__

    return {
        "ral_kernels": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": _gpus(),
        "libraries": {name: _library(name) for name in LIBRARIES},
        "cpu_variant": _cpu_variant(),
        "hopper": cuda_library.hopper() or "on",
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("RAL_")},
        "backends": {
            op: {name: "yes" if why is None else f"skipped: {why}" for name, why in order.items()}
            for op, order in backends.automatic_order().items()
        },
    }


def lines() -> Iterator[str]:
    """The facts, as people read them."""
    found = facts()
    yield f"ral_kernels {found['ral_kernels']}"
    yield f"Python {found['python']}, {found['system']}, {found['libc']}"
    for name, version in found["packages"].items():
        yield f"{name} {version}" if version else f"{name} is not installed"
    yield f"CPU: {found['cpu']['name']}, {found['threads']} threads of torch"
    yield f"variant of the cpu backend: {found['cpu_variant']}"
    for number, gpu in enumerate(found["gpus"]):
        yield f"cuda:{number}: {gpu['name']}, compute capability {gpu['compute_capability']}"
    if not found["gpus"]:
        yield "torch sees no CUDA device"
    for name, library in found["libraries"].items():
        yield f"{name}: {library['missing'] or library['path']}"
    yield f"ral_cuda's kernels for Hopper: {found['hopper']}"
    for op, order in found["backends"].items():
        yield ""
        yield f"{op}: the first of these that can run a call"
        for name, answer in order.items():
            yield f"  {name:<{max(map(len, order))}}  {answer}"


def _version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__  # with its build: +cpu, +cu130
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    """By py-cpuinfo where it is installed, else as Python's own library sees it."""
    try:
        from cpuinfo import get_cpu_info
    except ImportError:
        return {"name": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    found = get_cpu_info()
    wanted = ("vendor_id_raw", "family", "model", "stepping", "count")
    flags = [x for x in found.get("flags", ()) if x.startswith(("avx", "amx", "fma", "f16c"))]
    name = found.get("brand_raw") or platform.machine()
    return {"name": name, **{key: found.get(key) for key in wanted}, "flags": flags}


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": x.name, "compute_capability": f"{x.major}.{x.minor}", "memory": x.total_memory}
        for x in found
    ]


def _library(name: str) -> dict[str, str | None]:
    path = native.LIBRARY_DIR / f"lib{name}.so"
    checksum = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    return {"path": str(path), "sha256": checksum, "missing": native.why_missing(name)}


def _cpu_variant() -> str:
    try:
        chosen = cpu_library.chosen_isa()
        return next(name for name, index in cpu_library.isas().items() if index == chosen)
    except RuntimeError as error:
        return str(error)
