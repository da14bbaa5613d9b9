"""Builds the native libraries with CMake; all else about the package stands in pyproject.toml.

The libraries know neither torch nor Python, so a wheel that carries them is tagged
`py3-none-<platform>`. Where they cannot be built the installation goes on without them: what is
missing is printed, and also left in `ral_kernels/lib/<library>.missing.txt`, where
`ral_kernels.runtime.native` finds it at run time (pip hides what a build prints).
`RAL_REQUIRE_NATIVE=1` makes it an error instead; a machine without nvcc goes without `ral_cuda`
even then.
`RAL_BUILD_LATER=1` lets an editable installation leave them as they are, for the command below.
`RAL_LIBRARIES=ral_cuda` builds that one alone and leaves the other as it is, and
`RAL_CUDA_ARCHITECTURES=90-real` builds it for these GPUs alone: minutes less on a rented one.
`MAX_JOBS`, or `CMAKE_BUILD_PARALLEL_LEVEL`, limits how many compilers run at once.
`CXX` may have several words: `ccache g++`.

`python setup.py build_ext --inplace` rebuilds in a checkout, without pip, without a network, and
without the `cmake` and `ninja` modules where the system has a CMake.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD_DIR = ROOT / "build" / "cmake"
LIBRARIES = ("ral_cpu", "ral_cuda")  # targets of CMakeLists.txt
# As ral_kernels.runtime.native finds them.
LIBRARY_FILE, CHECKSUM_FILE, NOTE_FILE = "lib{}.so", "lib{}.so.sha256", "{}.missing.txt"
CMAKE_MINIMUM = (3, 18)  # as in CMakeLists.txt
INSTALL_AGAIN = (
    "pip install --no-cache-dir --force-reinstall --no-deps . "
    "(or, in a checkout: python setup.py build_ext --inplace)"
)


class BuildError(Exception):
    """The native libraries cannot be built; the text says what is missing."""


def find_cmake() -> str:
    """The first CMake that runs and is recent enough."""
    refused = ""
    for program in candidates("cmake", "CMAKE_BIN_DIR"):
        version = re.search(r"version (\d+)\.(\d+)", output_of_version(program) or "")
        if version is None:
            refused += f"; {program} does not run"
        elif (int(version[1]), int(version[2])) < CMAKE_MINIMUM:
            refused += f"; {program} is version {version[1]}.{version[2]}"
        else:
            return program
    wanted = ".".join(map(str, CMAKE_MINIMUM))
    raise BuildError(f"CMake >= {wanted} was not found{refused}; `pip install cmake` supplies it")


def find_ninja() -> str | None:
    """A ninja that runs, or None: CMake's default generator builds as well, if more slowly."""
    return next((p for p in candidates("ninja", "BIN_DIR") if output_of_version(p)), None)


def candidates(name: str, module_directory: str) -> list[str]:
    """Where a build tool may be: in its Python module, as under build isolation, or on PATH."""
    found = [shutil.which(name)]
    try:
        module = importlib.import_module(name)
        found.insert(0, shutil.which(name, path=getattr(module, module_directory)))
    except (ImportError, AttributeError):
        pass  # no such module, or another one of that name
    return [program for program in found if program is not None]


def output_of_version(program: str) -> str | None:
    """What `program --version` prints; None where it does not run, as a stale wrapper does not."""
    try:
        result = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout


def cached(key: str) -> str | None:
    """The value of `key` in the CMake cache of an earlier build."""
    cache = BUILD_DIR / "CMakeCache.txt"
    if not cache.is_file():
        return None
    text = cache.read_text(errors="replace")
    match = re.search(rf"^{key}:\w+=(.*)$", text, flags=re.MULTILINE)
    return None if match is None else match[1]


def is_cache_stale(ninja: str | None) -> bool:
    """Whether an earlier build's cache would stop or mislead CMake."""
    generator, compiler = cached("CMAKE_GENERATOR"), os.environ.get("CXX")
    return generator is not None and (
        (generator == "Ninja") != (ninja is not None)
        or cached("CMAKE_HOME_DIRECTORY") != str(ROOT)  # the tree was moved, build/ with it
        or (compiler is not None and not is_cached_compiler(compiler))
    )


def is_cached_compiler(compiler: str) -> bool:
    """Whether an earlier build had this CXX, and it still is the same program."""
    program = shutil.which(shlex.split(compiler)[0]) if compiler.strip() else None
    return cached("RAL_CXX") == compiler and cached("CMAKE_CXX_COMPILER") == program


def requested_libraries() -> tuple[str, ...]:
    """Those that RAL_LIBRARIES names; without it, all."""
    names = words("RAL_LIBRARIES") or LIBRARIES
    if unknown := set(names) - set(LIBRARIES):
        known = ", ".join(LIBRARIES)
        raise SystemExit(f"RAL_LIBRARIES: {', '.join(unknown)} is none of {known}")
    return tuple(name for name in LIBRARIES if name in names)


def build_native(output_dir: Path, libraries: Sequence[str]) -> dict[str, str]:
    """Configures and builds native libraries into `output_dir`.

    Returns:
        why optional libraries were not built, by name.

    Raises:
        BuildError: a tool is missing, or the sources do not compile.
    """
    cmake, ninja = find_cmake(), find_ninja()
    if is_cache_stale(ninja):
        shutil.rmtree(BUILD_DIR)
    configure = [cmake, "-S", str(ROOT), "-B", str(BUILD_DIR), f"-DRAL_OUTPUT_DIR={output_dir}"]
    # Also when it is empty: the cache holds that of an earlier build.
    configure += [f"-DRAL_CUDA_ARCHITECTURES={';'.join(words('RAL_CUDA_ARCHITECTURES'))}"]
    if compiler := os.environ.get("CXX"):
        configure += [f"-DRAL_CXX={compiler}"]
    if ninja is not None:
        # By its path: the cache may name the ninja of an isolated build, which is gone since.
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    status, output = run(configure)
    if status != 0:
        shutil.rmtree(BUILD_DIR, ignore_errors=True)  # CMake caches a failed search, too
        if "CMAKE_CXX_COMPILER" in output:
            raise BuildError("no working C++17 compiler; install g++ or clang++, or set CXX")
        raise BuildError(f"CMake could not configure the build:\n{tail(output)}")
    build = [cmake, "--build", str(BUILD_DIR), "--parallel", num_jobs(), "--target"]
    if "ral_cpu" in libraries:
        status, output = run([*build, "ral_cpu"])
        if status != 0:
            raise BuildError(f"the C++ sources did not build:\n{tail(output)}")
    if "ral_cuda" not in libraries:
        return {}
    reason = (BUILD_DIR / NOTE_FILE.format("ral_cuda")).read_text(encoding="utf-8")
    if not reason:
        status, output = run([*build, "ral_cuda"])
        if status == 0:
            return {}
        reason = f"the CUDA sources did not build:\n{tail(output)}"
        if is_required():
            raise BuildError(reason)
    return {"ral_cuda": reason}


def num_jobs() -> str:
    """How many compilers run at once: as many as asked for, else one a CPU of this process."""
    limits = (os.environ.get(name) for name in ("MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL"))
    has_affinity = hasattr(os, "sched_getaffinity")  # Linux
    cpus = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return next(filter(None, limits), str(cpus))


def is_required() -> bool:
    return is_set("RAL_REQUIRE_NATIVE")


def is_set(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def words(variable: str) -> list[str]:
    """What an environment variable lists, between spaces, commas or semicolons."""
    return re.findall(r"[^\s,;]+", os.environ.get(variable, ""))


def run(command: list[str]) -> tuple[int, str]:
    """Runs a command, passing its output on as it comes; returns exit status and output."""
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines)


def tail(output: str) -> str:
    """The end of a long output, where compilers and CMake say what stopped them."""
    return "\n".join(output.strip().splitlines()[-20:])


class NativeDistribution(Distribution):
    """A distribution with native code, although it has no Python extension module."""

    native_missing: tuple[str, ...] = ()

    def has_ext_modules(self) -> bool:
        return True


class BuildNative(build_ext):
    """`build_ext` by CMake; a failure leaves a note in place of the library."""

    distribution: NativeDistribution

    def output_dir(self) -> Path:
        in_place = self.inplace or self.editable_mode
        return (ROOT if in_place else Path(self.build_lib).resolve()) / "ral_kernels" / "lib"

    def run(self) -> None:
        if self.editable_mode and is_set("RAL_BUILD_LATER"):
            return
        output_dir = self.output_dir()
        output_dir.mkdir(parents=True, exist_ok=True)
        libraries = requested_libraries()
        for name in libraries:
            (output_dir / NOTE_FILE.format(name)).unlink(missing_ok=True)
        try:
            missing = build_native(output_dir, libraries)
        except BuildError as error:
            missing = dict.fromkeys(libraries, str(error))
        self.go_without(output_dir, missing)

    def go_without(self, output_dir: Path, missing: dict[str, str]) -> None:
        self.distribution.native_missing = tuple(missing)
        for name, reason in missing.items():
            # An older library would not fit this version's Python code.
            for file in (LIBRARY_FILE, CHECKSUM_FILE):
                (output_dir / file.format(name)).unlink(missing_ok=True)
            (output_dir / NOTE_FILE.format(name)).write_text(f"{reason}\n", encoding="utf-8")
        if set(missing) != set(requested_libraries()):
            for name, reason in missing.items():
                print(f"ral_kernels: {name} was not built: {reason}", flush=True)
            return
        reason = next(iter(missing.values()))  # the same for all
        message = f"ral_kernels: the native libraries were NOT built: {reason}"
        if is_required():
            raise SystemExit(message)
        rule = "*" * 100
        print(
            f"{rule}\n{message}\n"
            f"The installation goes on without {' and '.join(missing)}; other backends work.\n"
            f"Afterwards: {INSTALL_AGAIN}\n"
            f"{rule}",
            file=sys.stderr,
            flush=True,
        )

    def get_outputs(self) -> list[str]:
        missing = self.distribution.native_missing
        names = requested_libraries()
        built = LIBRARY_FILE, CHECKSUM_FILE
        return [
            str(self.output_dir() / file.format(name))
            for name in names
            for file in ((NOTE_FILE,) if name in missing else built)
        ]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # an editable installation builds the libraries where they belong


class PlatformWheel(bdist_wheel):
    """Tags a wheel with its platform if it carries native libraries, and as pure if it does not.

    pip keeps the wheel that it builds, and takes it at every later installation. One without the
    libraries gets a tag that no platform has: pip installs it now, and builds again next time.
    uv would refuse it, and rebuilds on request anyway.
    """

    distribution: NativeDistribution

    def get_tag(self) -> tuple[str, str, str]:
        if set(self.distribution.native_missing) == set(requested_libraries()):
            self.root_is_pure = True
            is_pip = "PIP_BUILD_TRACKER" in os.environ  # which pip sets for the builds it starts
            return "py3", "none", "incomplete" if is_pip else "any"
        return "py3", "none", super().get_tag()[2]


setup(
    distclass=NativeDistribution,
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
