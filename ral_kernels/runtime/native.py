"""Loads the compiled libraries of the package, and says why when one is missing."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import struct
import sys
from pathlib import Path
from typing import Any

import torch

LIBRARY_DIR = Path(__file__).resolve().parents[1] / "lib"

_HOW_TO_BUILD = (
    "to build it, install a C++17 compiler (g++ or clang++) and run, where the sources are, "
    "`pip install --no-cache-dir --force-reinstall --no-deps .`, "
    "or in a checkout `python setup.py build_ext --inplace`"
)


class MissingSymbolError(RuntimeError, AttributeError):
    """A library does not have what this package calls."""


class Library(ctypes.CDLL):
    """A library of this package, which says why where a symbol is missing."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise MissingSymbolError(
                f"{Path(self._name).name} has no symbol {name}: it is another library, or was "
                f"built from other sources than this package; {_HOW_TO_BUILD}"
            ) from error


@functools.cache  # a failure is not cached: the library may be built meanwhile
def load(name: str) -> ctypes.CDLL:
    """The library `name` of this package, for example `ral_cpu`, loaded once per process.

    Raises:
        RuntimeError: it was not built (the message says why, and how to build it), it is damaged
            or another library, or the system's loader refuses it (the message is the loader's).
    """
    path = LIBRARY_DIR / f"lib{name}.so"
    if not path.is_file():
        raise RuntimeError(f"{path.name} is not built{_build_note(name)}; {_HOW_TO_BUILD}")
    # Before loading: the loader maps a truncated file, and the process dies at the first access.
    if (damage := _damage(path)) is not None:
        raise RuntimeError(f"{path.name} is damaged: {damage}; {_HOW_TO_BUILD}")
    try:
        library = Library(str(path))
    except OSError as error:
        raise RuntimeError(f"{path.name} does not load: {error}; {_HOW_TO_BUILD}") from error
    getattr(library, f"{name}_attention_struct_sizes")
    return library


def _damage(path: Path) -> str | None:
    """What shows that a library is not what the build wrote; None if nothing does."""
    content = path.read_bytes()
    checksum = path.with_name(f"{path.name}.sha256")  # of the build: `sha256sum -c` reads it
    if not checksum.is_file():
        return _truncation(content)
    wanted, found = checksum.read_text("utf-8").split(), hashlib.sha256(content).hexdigest()
    if found == (wanted or [""])[0]:
        return None
    return _truncation(content) or f"its SHA-256 is {found}, not that of {checksum.name}"


def _truncation(content: bytes) -> str | None:
    """How many bytes are missing by the headers of a 64-bit ELF file; None if none are."""
    if content[:6] != b"\x7fELF\x02\x01":
        return None  # another format, or no library at all, as the loader will say
    try:
        segments, sections = struct.unpack_from("<QQ", content, 32)
        segment_size, num_segments, section_size, num_sections = struct.unpack_from(
            "<HHHH", content, 54
        )
        size = sections + section_size * num_sections
        for i in range(num_segments):
            offset, _, _, length = struct.unpack_from(
                "<QQQQ", content, segments + i * segment_size + 8
            )
            size = max(size, offset + length)
    except struct.error:
        return f"it ends within its headers, after {len(content)} bytes"
    return f"it has {len(content)} of {size} bytes" if len(content) < size else None


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
