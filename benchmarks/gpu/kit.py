"""Files to carry to a GPU machine, so that it spends no time in compilers.

    make gpu-kit                 # build/gpu-kit: the CUDA library, Triton's kernels, a newer ptxas
    python -m benchmarks.gpu.kit check --kit build/gpu-kit

Triton looks a kernel up by a key of its own sources and binaries (`triton_key`), the kernel's
source, the ptxas and the options. `triton_key` differs between the wheels of two Pythons, although
they compile alike. So `use` pins it on both sides, for one release of Triton.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.harness import machine

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = "RAL_GPU_KIT"  # the folder that `unpack` made
DESCRIPTION, CACHE, PTXAS, LIBRARY = "kit.json", "cache.tar.xz", "ptxas.xz", "libral_cuda.so"
LIMIT_BYTES = 40 * 2**20
KEPT = (".json", ".cubin", ".so")  # of a cache entry: what a hit reads


# -- on the GPU machine ----------------------------------------------------------------------------


def unpack(folder: Path, into: Path) -> dict[str, Any]:
    """Lay out a kit: cache, ptxas, library; what it is, and what of it is missing."""
    into.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"kit": None, "kernels": 0, "problems": []}
    steps = {DESCRIPTION: _describe, CACHE: _unpack_cache, PTXAS: _unpack_ptxas, LIBRARY: _place}
    for name, step in steps.items():
        try:
            step(folder / name, into, found)
        except (OSError, ValueError, lzma.LZMAError, tarfile.TarError) as error:
            found["problems"].append(f"{name}: {type(error).__name__}: {error}")
    return found


def _describe(file: Path, into: Path, found: dict[str, Any]) -> None:
    found["kit"] = json.loads(file.read_text())
    shutil.copy(file, into / DESCRIPTION)


def _unpack_cache(file: Path, into: Path, found: dict[str, Any]) -> None:
    with tarfile.open(file) as archive:
        # Without the filter only before Python 3.10.12 and 3.11.4, which do not have it.
        options: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(into / "cache", **options)
    found["kernels"] = write_groups(into / "cache")


def _unpack_ptxas(file: Path, into: Path, found: dict[str, Any]) -> None:
    path = into / "ptxas"
    path.write_bytes(lzma.decompress(file.read_bytes()))
    path.chmod(0o755)


def _place(file: Path, into: Path, found: dict[str, Any]) -> None:
    target = ROOT / "ral_kernels" / "lib" / LIBRARY
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_name(f"{LIBRARY}.sha256").unlink(missing_ok=True)  # of another build
        shutil.copy(file, target)


def write_groups(cache: Path) -> int:
    """Write the files by which Triton finds an entry; they hold absolute paths. Counts entries."""
    count = 0
    for file in cache.glob("*/*.json"):
        if file.name.startswith("__grp__"):
            continue
        parts = {part.name: str(part) for part in file.parent.iterdir() if part.stem == file.stem}
        group = file.with_name(f"__grp__{file.name}")
        group.write_text(json.dumps({"child_paths": parts}))
        count += 1
    return count


def use() -> None:
    """Have Triton look kernels up under the kit's key, if it is the kit's release."""
    folder = os.environ.get(VARIABLE)
    if not folder or importlib.util.find_spec("triton") is None:
        return
    try:
        wanted = json.loads((Path(folder) / DESCRIPTION).read_text())["versions"]["triton"]
    except (OSError, ValueError, KeyError):
        return
    if machine.versions()["triton"] == wanted:
        _pin(wanted)


TRITON_KEY: list[str] = []  # Triton's own, once another is pinned


def _pin(version: str) -> None:
    from triton.runtime import build, cache

    if not TRITON_KEY:
        TRITON_KEY.append(cache.triton_key())
    cache.triton_key = lambda: f"ral-kit-{version}"
    # of launchers; Triton's own asks the program `file`, which a machine may lack
    build.platform_key = lambda: "ral-kit"


def triton_sources() -> str:
    """A digest of Triton's Python sources, which two wheels of one release share."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        return "absent"
    digest, root = hashlib.sha256(), Path(found.origin).parent
    for folder in ("compiler", "language", "runtime", "backends"):
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def facts() -> dict[str, Any]:
    """What decides whether a kit fits: both sides record it."""
    found: dict[str, Any] = {"versions": machine.versions(), "triton_sources": triton_sources()}
    found["variables"] = {name: x for name, x in os.environ.items() if name.startswith("TRITON_")}
    if importlib.util.find_spec("triton") is not None:
        from triton.runtime import cache

        key = TRITON_KEY[0] if TRITON_KEY else cache.triton_key()
        found["triton_key"] = hashlib.sha256(key.encode()).hexdigest()[:16]
        found["pinned"] = bool(TRITON_KEY)
        found["ptxas"] = output(_bundled_ptxas(), "--version").splitlines()[-1:]
    return found


def _bundled_ptxas() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


def output(*command: Path | str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}"
    return done.stdout.strip()


# -- where it is made ------------------------------------------------------------------------------


class Launchers:
    """Triton 3.6 compiles a launcher in C for each kernel's signature: made for another Python."""

    def __init__(self, python: str) -> None:
        code = (
            "import sysconfig as s; print(s.get_paths()['include'], s.get_config_var('EXT_SUFFIX'))"
        )
        self.include, self.suffix = output(python, "-c", code).split()
        self.stubs = Path(tempfile.mkdtemp(prefix="ral-kit-"))
        stub = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", "/dev/null", "-o"]
        subprocess.run([*stub, self.stubs / "libcuda.so.1"], check=True)

    def launcher(self) -> Any:
        """Triton's own launcher class, whose module is compiled into the cache and not loaded."""
        from triton.backends.nvidia import driver

        driver.library_dirs = lambda: [str(self.stubs)]
        driver.compile_module_from_src = self.store
        source = (Path(driver.dirname) / "driver.c").read_text()
        self.store(source, "cuda_utils", [str(self.stubs)], driver.include_dirs, driver.libraries)
        return driver.CudaLauncher

    def store(
        self,
        src: str,
        name: str,
        library_dirs: list[str],
        include_dirs: list[str],
        libraries: list[str],
        ccflags: Any = None,
    ) -> Any:
        from triton.runtime import build
        from triton.runtime.cache import get_cache_manager

        key = hashlib.sha256((src + build.platform_key()).encode()).hexdigest()
        cache, file = get_cache_manager(key), f"{name}{self.suffix}"
        if cache.get_file(file) is None:
            with tempfile.TemporaryDirectory() as folder:
                source, made = Path(folder) / f"{name}.c", Path(folder) / file
                source.write_text(src)
                command = [
                    "gcc",
                    str(source),
                    "-O1",
                    "-shared",
                    "-fPIC",
                    "-Wno-psabi",
                    "-s",
                    "-o",
                    str(made),
                ]
                command += [f"-L{path}" for path in library_dirs]
                # the stub has no symbols, so that the linker would take it for not needed
                command += ["-Wl,--no-as-needed", *(f"-l:{library}" for library in libraries)]
                command += [f"-I{path}" for path in (*include_dirs, self.include)]
                subprocess.run(command, check=True)
                cache.put(made.read_bytes(), file, binary=True)
        return SimpleNamespace(launch=lambda *arguments: None)


def launcher() -> Any:
    """For `mock.begin`; None where Triton makes launchers otherwise, or there is no such Python."""
    python = os.environ.get("RAL_GPU_PYTHON") or shutil.which("python3.12")
    try:
        return Launchers(python or "python3.12").launcher()
    except (ImportError, AttributeError, ValueError, OSError, subprocess.SubprocessError) as error:
        print(f"kit: without launchers ({type(error).__name__}: {error})", file=sys.stderr)
        return None


def entries(cache: Path) -> Iterator[tuple[str, bytes]]:
    """What is packed: name in the archive and content, always in the same order."""
    for file in sorted(cache.rglob("*")):
        if file.is_file() and file.suffix in KEPT and not file.name.startswith("__grp__"):
            yield str(file.relative_to(cache)), file.read_bytes()


def pack(cache: Path, file: Path) -> int:
    """Write the archive of a cache; the number of kernels in it."""
    count = 0
    with tarfile.open(file, "w:xz", preset=6) as archive:
        for name, content in entries(cache):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            entry.mode = 0o755 if name.endswith(".so") else 0o644
            archive.addfile(entry, io.BytesIO(content))
            count += name.endswith(".cubin")
    return count


def make(folder: Path, ptxas: Path | None, seconds: float) -> dict[str, Any]:
    """Compile what the scripts will ask for, in order of value, and pack it with the rest."""
    from .rehearsal import compile_all

    folder.mkdir(parents=True, exist_ok=True)
    work, cache = folder.parent / "gpu-kit-work", folder.parent / "gpu-kit-work" / "cache"
    start = time.perf_counter()
    described: dict[str, Any] = {**facts(), "commit": machine.commit()}
    work.mkdir(parents=True, exist_ok=True)
    (work / DESCRIPTION).write_text(json.dumps(described))
    described["compiled"] = compile_all(work, seconds)
    described["kernels"] = pack(cache, folder / CACHE)
    if ptxas is not None:
        (folder / PTXAS).write_bytes(lzma.compress(ptxas.read_bytes(), preset=6))
        described["newer_ptxas"] = output(ptxas, "--version").splitlines()[-1:]
    library = ROOT / "ral_kernels" / "lib" / LIBRARY
    if library.exists():
        shutil.copy(library, folder / LIBRARY)
    described["seconds"] = round(time.perf_counter() - start)
    (folder / DESCRIPTION).write_text(json.dumps(described, indent=1) + "\n")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {described['kernels']} kernels, {size / 2**20:.1f} MiB")
    if size > LIMIT_BYTES:
        raise SystemExit(f"the kit takes more than {LIMIT_BYTES / 2**20:.0f} MiB")
    return described


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("command", choices=("make", "unpack", "check"))
    parser.add_argument("--kit", type=Path, default=ROOT / "build" / "gpu-kit")
    parser.add_argument("--state", type=Path, default=ROOT / "build" / "gpu-state")
    parser.add_argument("--ptxas", type=Path, help="a newer one, to tell compiler faults from ours")
    parser.add_argument("--seconds", type=float, default=900, help="for compiling kernels of tests")
    parser.add_argument("--json", type=Path, help="where the outcome goes")
    options = parser.parse_args()
    if options.command == "make":
        found = make(options.kit, options.ptxas, options.seconds)
    elif options.command == "unpack":
        found = unpack(options.kit, options.state)
    else:
        from .rehearsal import check_kit

        found = check_kit(options.kit)
    print(json.dumps(found, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(found.get("misses")))


if __name__ == "__main__":
    sys.exit(main())
