"""What every process of a GPU run does first and last: device, kit, hits of the cache, faults."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from . import kit, mock
from .lines import STICKY


def begin() -> torch.device:
    """The GPU, or the CPU where one is mocked; kernels come from the kit if there is one.

    torch.library imports torch._dynamo in the first call of an op: here, before anything is timed.
    """
    importlib.import_module("torch._dynamo")
    kit.use()
    mock.begin(kit.launcher() if (mock.settings() or {}).get("launchers") else None)
    _count_compilations()
    return torch.device("cpu" if mock.device is not None else "cuda")


def is_broken() -> bool:
    """Whether an earlier error has taken the CUDA context with it, for good."""
    if mock.device is not None:
        return mock.device.broken
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:  # torch's class for it has changed
        return True
    return False


def leave_if_broken() -> None:
    """End the process, without Python's own ending: destructors would call CUDA again."""
    if is_broken():
        os._exit(STICKY)


_compiled: list[dict[str, Any]] = []


def _count_compilations() -> None:
    """Have Triton tell of each kernel whether it came from the cache."""
    try:
        from triton import knobs
    except ImportError:
        return

    def listen(
        *, src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool
    ) -> None:
        seconds = 0.0 if cache_hit else getattr(times, "total_lowering", 0) / 1e6
        name = getattr(src, "name", "") or getattr(metadata, "name", "")
        _compiled.append({"kernel": str(name), "hit": cache_hit, "seconds": round(seconds, 2)})

    knobs.compilation.listener = listen


@contextmanager
def compilations() -> Iterator[dict[str, Any]]:
    """Inside, kernels are counted: hits and misses of the cache, and which had to be compiled."""
    before, found = len(_compiled), dict[str, Any]()
    start = time.perf_counter()
    try:
        yield found
    finally:
        new = _compiled[before:]
        missed = [entry["kernel"] for entry in new if not entry["hit"]]
        found.update(hits=len(new) - len(missed), misses=len(missed), missed=missed[:8])
        found["seconds"] = round(time.perf_counter() - start, 2)
