"""Loads the compiled libraries of the package, and says why when one is missing."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

import torch

LIBRARY_DIR = Path(__file__).resolve().parents[1] / "lib"

_HOW_TO_BUILD = (
    "to build it, install a C++17 compiler (g++ or clang++) and reinstall the package, "
    "or in a checkout run `python setup.py build_ext --inplace`"
)


@functools.cache  # a failure is not cached: the library may be built meanwhile
def load(name: str) -> ctypes.CDLL:
    """The library `name` of this package, for example `ral_cpu`, loaded once per process.

    Raises:
        RuntimeError: it was not built (the message says why, and how to build it), or the system's
            loader refuses it (the message is the loader's).
    """
    path = LIBRARY_DIR / f"lib{name}.so"
    if not path.is_file():
        raise RuntimeError(f"{path.name} is not built{_build_note(name)}; {_HOW_TO_BUILD}")
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeError(f"{path.name} does not load: {error}; {_HOW_TO_BUILD}") from error


def why_missing(name: str) -> str | None:
    """None if the library `name` loads, else the reason why not."""
    try:
        load(name)
    except RuntimeError as error:
        return str(error)
    return None


def _build_note(name: str) -> str:
    """What stopped the build, as setup.py wrote it down in place of the library."""
    try:
        note = (LIBRARY_DIR / f"{name}.missing.txt").read_text(encoding="utf-8").strip()
    except OSError:
        return ""
    return f" (at installation: {note})" if note else ""


@functools.cache
def openmp_runtime() -> int | None:
    """The address of `GOMP_parallel` in the OpenMP runtime that torch runs on, or None without one.

        void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags)

    runs `function(data)` on every thread of a team. GNU's libgomp has it, and for compatibility so
    do Intel's and LLVM's runtimes.

    The libraries of this package run their parallel regions through it and do not link OpenMP
    themselves. Torch ships its own copy of a runtime, as scikit-learn and others do, so a linked
    one would usually be a second one. After a region, worker threads spin for a while in case
    another follows. A second runtime would compete with them for the same cores in every operator.

    The name is looked up where torch's own calls are bound, in the loader's order. First come the
    program's global symbols, which hold an LD_PRELOADed runtime. Then come `libtorch_cpu` and the
    libraries that it was linked with. The look-up loads no library.
    """
    if not sys.platform.startswith("linux"):
        return None  # elsewhere no runtime has this entry point
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    for library in (None, str(torch_cpu)):
        try:
            scope = ctypes.CDLL(library, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            address = ctypes.cast(scope.GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
        if address is not None:
            return address
    return None
