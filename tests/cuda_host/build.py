"""Compiles CUDA sources for the host, with the harness, into a shared library.

Every object file is cached under the hash of all that goes into it, so a test session compiles each
source once, whichever of its workers comes first.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HARNESS = ROOT / "tests" / "cuda_host"
INCLUDE = ROOT / "csrc" / "include"
CUDA = ROOT / "csrc" / "cuda"

COMPILER = tuple(shlex.split(os.environ.get("CXX", "c++")))
FLAGS = ("-std=c++17", "-fPIC", "-DRAL_CUDA_ON_HOST")
# A variable without a value gets one that spoils results, where a fresh stack would hold zeros.
FILL = "-ftrivial-auto-var-init=pattern"  # GCC 12, Clang 8
# A library's own functions win over those of another one, say of the same kernels with a patch.
LINK_FLAGS = ("-shared", "-Wl,-Bsymbolic") if sys.platform == "linux" else ("-shared",)

# (file relative to csrc/cuda, text in it, text to put in its place)
Patch = tuple[str, str, str]


def only(*kept: str) -> tuple[Patch, ...]:
    """Patches that compile the kernels of these dtypes and columns alone, such as "Fp16, 64"."""
    call = r"return function<ral::cuda::(\w+, \d+)>\(__VA_ARGS__\);"
    dispatched = re.finditer(call, (CUDA / "core/launch.h").read_text())
    found = {match[1]: match[0] for match in dispatched}
    assert set(kept) <= set(found)
    return tuple(("core/launch.h", line, "break;") for k, line in found.items() if k not in kept)


def switched(bugs: Sequence[Patch]) -> tuple[Patch, ...]:
    """Patches that put all `bugs` into one library, of which `HostLibrary.with_bug` chooses one.

    Old texts that are statements become branches, others conditional expressions. Bugs of one place
    share their old text.
    """
    places: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for number, (file, old, new) in enumerate(bugs, start=1):
        places.setdefault((file, old), []).append((number, new))
    patches = []
    for (file, old), here in places.items():
        if ";" in old:
            text = "".join(f"if (host::seeded_bug == {n}) {{\n{new}\n}} else " for n, new in here)
            text += f"{{\n{old}\n}}"
        else:
            text = "".join(f"host::seeded_bug == {n} ? ({new}) : " for n, new in here)
            text = f"({text}({old}))"
        patches.append((file, old, text))
    return tuple(patches)


def has_compiler() -> bool:
    return shutil.which(COMPILER[0]) is not None


def sources_of(pattern: str) -> tuple[str, ...]:
    """core/entry.cu and the `.cu` files of csrc/cuda of such paths, without those for Hopper."""
    found = {CUDA / "core" / "entry.cu", *CUDA.glob(f"{pattern}.cu")}
    kept = (path for path in found if not path.stem.endswith("_sm90"))
    return tuple(sorted(str(path.relative_to(CUDA)) for path in kept))


def build(
    sources: Sequence[Path | str],
    folder: Path,
    patches: Sequence[Patch] = (),
    *,
    cuda: Path = CUDA,
    flags: Sequence[str] = (),
) -> Path:
    """Compile `sources` and the harness into one shared library.

    Args:
        sources: `.cu` or `.cpp` files, relative to `cuda` or absolute.
        folder: Where objects and libraries are kept; workers of a test session share it.
        patches: Seeded bugs, applied to a copy of `cuda`. Each old text must occur exactly once.
        cuda: The folder of the kernels and of `device.h`.
        flags: More flags for the compiler.

    Returns:
        The library's path, which names its content.

    Raises:
        ValueError: An old text of a patch does not occur exactly once.
        RuntimeError: The compiler failed; its output is the message.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if patches:
        cuda = _patched_copy(cuda, folder, patches)
    # A seeded bug is compiled for one call, which takes less than optimising it would.
    optimised = "-O0" if patches else "-O2"
    for_harness = [*flags, *FLAGS, "-O2", f"-I{HARNESS}"]
    for_kernels = [*_known_flags(FILL), *flags, *FLAGS, optimised]
    for_kernels += [f"-I{INCLUDE}", f"-I{cuda}", f"-I{HARNESS}"]
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:  # the kernels first: they take longest
        kernels = [
            pool.submit(_compile, cuda / source, folder, for_kernels, [INCLUDE, cuda, HARNESS])
            for source in sources
        ]
        harness = [
            pool.submit(_compile, path, folder, for_harness, [HARNESS])
            for path in sorted(HARNESS.glob("*.cpp"))
        ]
    objects = [str(compiled.result()) for compiled in (*harness, *kernels)]
    library = folder / f"{_hash(objects)}.so"
    _make_once(library, [*COMPILER, *LINK_FLAGS, *objects, "-lm"])
    return library


@functools.cache
def _known_flags(*flags: str) -> tuple[str, ...]:
    """Those that the compiler knows."""
    command = [*COMPILER, "-Werror", "-x", "c++", "-fsyntax-only", "-"]
    return tuple(
        flag
        for flag in flags
        if subprocess.run([*command, flag], input=b"", capture_output=True).returncode == 0
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One worker, and one thread of it, at a time makes `path`."""
    with path.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _patched_copy(cuda: Path, folder: Path, patches: Sequence[Patch]) -> Path:
    texts: dict[Path, str] = {}
    for file, old, new in patches:
        text = texts.get(cuda / file) or (cuda / file).read_text()
        if text.count(old) != 1:
            raise ValueError(f"{file}: {old!r} occurs {text.count(old)} times, not once")
        texts[cuda / file] = text.replace(old, new)
    copy = folder / f"sources-{_hash([_contents([cuda]), *map(repr, patches)])}"
    with _locked(copy):
        if not copy.exists():
            unfinished = copy.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)  # left by a run that was stopped
            shutil.copytree(cuda, unfinished)
            for path, text in texts.items():
                (unfinished / path.relative_to(cuda)).write_text(text)
            unfinished.replace(copy)
    return copy


def _compile(source: Path, folder: Path, flags: Sequence[str], includes: Sequence[Path]) -> Path:
    # Where the sources lie counts for nothing: flags that name folders are left out.
    named = [flag for flag in flags if not flag.startswith("-I")]
    key = _hash([*COMPILER, *named, source.read_text(), _contents(includes)])
    target = folder / f"{source.stem}-{key}.o"
    _make_once(target, [*COMPILER, *flags, "-x", "c++", "-c", str(source)])
    return target


def _make_once(target: Path, command: Sequence[str]) -> None:
    with _locked(target):
        if not target.exists():
            _run(command, target)


def _contents(folders: Sequence[Path]) -> str:
    """Hash of every header under `folders`, and of every source that may be included as one."""
    files = [
        (path.relative_to(f), path)
        for f in folders
        for path in f.rglob("*")
        if path.suffix in (".h", ".cpp", ".cu")
    ]
    return _hash(f"{name}\n{path.read_text()}" for name, path in sorted(files))


def _hash(texts: Iterator[str] | Sequence[str]) -> str:
    sha = hashlib.sha256()
    for text in texts:
        sha.update(text.encode() + b"\0")
    return sha.hexdigest()[:16]


def _run(command: Sequence[str], target: Path) -> None:
    """Run a compiler that makes `target`, which appears whole or not at all."""
    unfinished = target.with_suffix(".unfinished")
    done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    unfinished.replace(target)
