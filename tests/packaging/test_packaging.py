"""The build as users meet it: with a compiler, without one, with and without build tools.

setup.py runs on a copy of the package whose C++ sources are stand-ins of a few lines: what is
tested is CMakeLists.txt and setup.py, and the real sources take longer to compile.
"""

import ctypes
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ral_kernels
from ral_kernels.runtime import native

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the native libraries are built on Linux"
)
needs_compiler = pytest.mark.skipif(
    shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0]) is None
    and "cpu" not in os.environ.get("RAL_REQUIRE", "").split(","),
    reason="no C++ compiler",
)

ENTRY_POINT = """
extern "C" __attribute__((visibility("default"))) int answer() { return 42; }
int not_exported() { return 0; }
"""

# What the test session's own environment may ask for is no matter of these builds.
ASKED = (
    "RAL_REQUIRE_NATIVE", "RAL_LIBRARIES", "RAL_CUDA_ARCHITECTURES", "MAX_JOBS",
    "CMAKE_BUILD_PARALLEL_LEVEL", "PIP_BUILD_TRACKER",
)  # fmt: skip
NO_COMPILER = "/nonexistent/c++"


class Tree:
    """A copy of the package that setup.py runs in, with tools of the test's choice."""

    def __init__(self, path: Path):
        self.path = path
        self.lib = path / "ral_kernels" / "lib"
        for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "LICENSE"):
            shutil.copy(ROOT / name, path / name)
        (path / "README.md").write_text("# A copy\n")
        for package in ("ral_kernels", "ral"):
            shutil.copytree(
                ROOT / package,
                path / package,
                ignore=shutil.ignore_patterns("lib", "__pycache__"),
            )
        for name in re.findall(r"csrc/\S+\.cpp", (ROOT / "CMakeLists.txt").read_text()):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text("")
        self.entry = path / "csrc" / "cpu" / "core" / "entry.cpp"
        self.entry.write_text(ENTRY_POINT)
        self.hidden = path / "hidden"
        self.hidden.mkdir()
        self.hide_module("torch")  # absent under build isolation: setup.py must do without

    def hide_module(self, name: str) -> None:
        (self.hidden / f"{name}.py").write_text(f"raise ImportError('{name} is hidden')\n")

    def hide_program(self, name: str) -> None:
        """Puts a program that does not run before every other of that name."""
        program = self.hidden / name
        program.write_text("#!/bin/sh\nexit 1\n")
        program.chmod(0o755)

    def setup(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.python("setup.py", *arguments, **environment)

    def python(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {k: v for k, v in os.environ.items() if k not in ASKED}
        env["PYTHONPATH"] = str(self.hidden)
        env["PATH"] = f"{self.hidden}{os.pathsep}{env['PATH']}"
        env["CUDACXX"] = "/nonexistent/nvcc"  # asking nvcc takes seconds: one test does
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.path,
            env=env | environment,
            capture_output=True,
            text=True,
        )

    def build(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.setup("build_ext", "--inplace", **environment)

    def wheel(self, **environment: str) -> tuple[Path, set[str], str]:
        """Builds a wheel: its path, the names in it, and what the build printed."""
        result = self.setup("bdist_wheel", "--dist-dir", "wheels", **environment)
        assert result.returncode == 0, result.stderr
        (path,) = (self.path / "wheels").glob("*.whl")
        return path, set(zipfile.ZipFile(path).namelist()), result.stdout + result.stderr

    def note(self, library: str = "ral_cpu") -> str:
        return (self.lib / f"{library}.missing.txt").read_text()


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def test_version_has_one_source(tree):
    result = tree.setup("--version")
    assert result.stdout.split()[-1] == ral_kernels.__version__
    assert ral_kernels.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_without_compiler_the_wheel_is_pure_and_says_why(tree, tmp_path, monkeypatch):
    wheel, names, printed = tree.wheel(CXX=NO_COMPILER)
    reason = "no working C++17 compiler; install g++ or clang++, or set CXX"
    assert wheel.name == f"ral_kernels-{ral_kernels.__version__}-py3-none-any.whl"
    # With presets, configurations of accelerate, and the trained tiny model.
    for package in ("ral", "ral_kernels"):
        kinds = ("*.py", "*.yaml", "*.safetensors")
        files = [path for kind in kinds for path in (ROOT / package).rglob(kind)]
        assert files and {str(path.relative_to(ROOT)) for path in files} <= names
    assert f"the native libraries were NOT built: {reason}" in printed
    assert "ral_kernels/ops/attention/reference.py" in names
    assert not any(name.endswith(".so") for name in names)

    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    monkeypatch.setattr(native, "LIBRARY_DIR", tmp_path / "installed" / "ral_kernels" / "lib")
    native.load.cache_clear()
    try:
        missing = native.why_missing("ral_cpu")
    finally:
        native.load.cache_clear()
    assert missing is not None
    assert f"not built (at installation: {reason}); to build it, " in missing


def test_pip_does_not_take_a_wheel_without_the_libraries_for_later(tree):
    wheel, _, printed = tree.wheel(CXX=NO_COMPILER, PIP_BUILD_TRACKER="tracker")
    assert wheel.name == f"ral_kernels-{ral_kernels.__version__}-py3-none-incomplete.whl"
    assert "Afterwards: pip install --no-cache-dir --force-reinstall --no-deps . (or, " in printed


@needs_compiler
@pytest.mark.slow(stands_in="test_pip_does_not_take_a_wheel_without_the_libraries_for_later")
def test_pip_builds_again_once_there_is_a_compiler(tree):
    """By name and from an archive, as from an index: pip keeps the wheels of those."""
    for name in ("CHANGELOG.md", "CITATION.cff", "SECURITY.md"):
        shutil.copy(ROOT / name, tree.path / name)
    assert tree.setup("sdist").returncode == 0
    (archive,) = (tree.path / "dist").glob("*.tar.gz")
    options = ["--no-deps", "--no-build-isolation", "--cache-dir", "cache", "--target"]
    for target, environment, found in (
        ("first", {"CXX": NO_COMPILER}, ["ral_cpu.missing.txt", "ral_cuda.missing.txt"]),
        ("second", {}, ["libral_cpu.so", "libral_cpu.so.sha256", "ral_cuda.missing.txt"]),
    ):
        requirement = f"ral-kernels @ {archive.as_uri()}"
        result = tree.python("-m", "pip", "install", *options, target, requirement, **environment)
        assert result.returncode == 0, result.stdout + result.stderr
        lib = tree.path / target / "ral_kernels" / "lib"
        assert sorted(path.name for path in lib.iterdir()) == found, result.stdout


def test_required_library_that_does_not_build_is_an_error(tree):
    result = tree.build(CXX=NO_COMPILER, RAL_REQUIRE_NATIVE="1")
    assert result.returncode != 0
    assert "the native libraries were NOT built: no working C++17 compiler" in result.stderr


def test_without_cmake(tree):
    tree.hide_module("cmake")
    tree.hide_program("cmake")
    result = tree.build()
    assert result.returncode == 0, result.stderr
    hidden = tree.hidden / "cmake"
    assert tree.note() == (
        f"CMake >= 3.18 was not found; {hidden} does not run; `pip install cmake` supplies it\n"
    )
    assert "the native libraries were NOT built: CMake >= 3.18 was not found" in result.stderr


@pytest.mark.slow(stands_in="test_without_compiler_the_wheel_is_pure_and_says_why")
@needs_compiler
def test_wheel_with_the_library_is_tagged_with_the_platform_alone(tree, tmp_path):
    wheel, names, printed = tree.wheel()
    assert re.fullmatch(r"ral_kernels-[^-]+-py3-none-linux_\w+\.whl", wheel.name), printed
    assert {f"ral_kernels/lib/libral_cpu.so{x}" for x in ("", ".sha256")} <= set(names)
    assert "ral_kernels/lib/ral_cpu.missing.txt" not in names
    assert "ral_kernels/lib/libral_cuda.so" not in names
    assert "ral_kernels/lib/ral_cuda.missing.txt" in names
    with zipfile.ZipFile(wheel) as archive:
        library = ctypes.CDLL(archive.extract("ral_kernels/lib/libral_cpu.so", tmp_path))
    assert library.answer() == 42
    assert not hasattr(library, "_Z12not_exportedv")


@needs_compiler
def test_without_nvcc_the_cuda_library_alone_is_missing(tree):
    result = tree.build(RAL_REQUIRE_NATIVE="1")
    assert result.returncode == 0, result.stderr
    reason = "nvcc was not found; install the CUDA toolkit, or name its nvcc in CUDACXX"
    assert f"ral_kernels: ral_cuda was not built: {reason}\n" in result.stdout
    assert tree.note("ral_cuda") == f"{reason}\n"
    assert (tree.lib / "libral_cpu.so").is_file()


CMAKE = """#!/bin/sh
echo "$@" >> cmake.log
[ "$1" = --version ] && echo "cmake version 3.18.0"
mkdir -p build/cmake && : > build/cmake/ral_cuda.missing.txt
"""


def test_one_library_for_chosen_gpus(tree):
    """What CMake is asked for, and that the other library stays."""
    tree.hide_module("cmake")
    tree.hide_program("cmake")
    (tree.hidden / "cmake").write_text(CMAKE)
    tree.lib.mkdir()
    (tree.lib / "libral_cpu.so").write_bytes(b"of another build")
    asked = {"RAL_CUDA_ARCHITECTURES": "86 90-real", "MAX_JOBS": "3"}
    result = tree.build(RAL_LIBRARIES="ral_cuda", **asked)
    assert result.returncode == 0, result.stderr
    _, configure, build = (tree.path / "cmake.log").read_text().splitlines()
    assert "-DRAL_CUDA_ARCHITECTURES=86;90-real" in configure.split()
    assert build.endswith("--parallel 3 --target ral_cuda")
    assert [path.name for path in tree.lib.iterdir()] == ["libral_cpu.so"]

    (tree.path / "cmake.log").unlink()
    assert tree.build().returncode == 0  # without the variables, those of the last build are gone
    _, configure, *builds = (tree.path / "cmake.log").read_text().splitlines()
    assert "-DRAL_CUDA_ARCHITECTURES=" in configure.split()
    assert [line.split()[-1] for line in builds] == ["ral_cpu", "ral_cuda"]

    result = tree.build(RAL_LIBRARIES="ral_cuda,cuda")
    assert result.returncode != 0
    assert "RAL_LIBRARIES: cuda is none of ral_cpu, ral_cuda" in result.stderr


@pytest.mark.parametrize(
    "asked, jobs",
    [
        ({"MAX_JOBS": "1"}, "1"),
        ({"CMAKE_BUILD_PARALLEL_LEVEL": "1"}, "1"),
        ({"MAX_JOBS": "2", "CMAKE_BUILD_PARALLEL_LEVEL": "1"}, "2"),
        ({}, None),  # one a CPU of this process
    ],
)
def test_compilers_at_once(tree, asked, jobs):
    tree.hide_module("cmake")
    tree.hide_program("cmake")
    (tree.hidden / "cmake").write_text(CMAKE)
    assert tree.build(**asked).returncode == 0
    jobs = jobs or len(os.sched_getaffinity(0))
    builds = [
        line for line in (tree.path / "cmake.log").read_text().splitlines() if "ral_c" in line
    ]
    assert [f"--parallel {jobs} --target" in line for line in builds[-2:]] == [True, True]


CCACHE = """#!/bin/sh
for word; do case "$word" in *.cpp) echo "$word" >> ccache.log;; esac; done
exec "$@"
"""


@needs_compiler
@pytest.mark.slow(stands_in="test_rebuild_in_place_and_broken_sources")
def test_a_compiler_of_two_words_builds_what_has_changed(tree):
    tree.hide_program("ccache")
    (tree.hidden / "ccache").write_text(CCACHE.replace("ccache.log", str(tree.path / "ccache.log")))

    def compiled(compiler: str) -> list[str]:
        (tree.path / "ccache.log").write_text("")
        assert tree.build(CXX=compiler, RAL_REQUIRE_NATIVE="1").returncode == 0
        log = (tree.path / "ccache.log").read_text().split()
        return sorted({Path(name).name for name in log if str(tree.path / "csrc") in name})

    assert {"entry.cpp", "kernels.cpp", "variants.cpp"} <= set(compiled("ccache c++"))
    assert compiled("ccache c++") == []
    tree.entry.write_text(ENTRY_POINT.replace("42", "43"))
    assert compiled("ccache c++") == ["entry.cpp"]
    assert "variants.cpp" in compiled("ccache c++ -DOTHER")  # another compiler


def test_a_library_asked_for_by_name_is_missed(tree):
    result = tree.build(CXX=NO_COMPILER, RAL_LIBRARIES="ral_cuda")
    assert result.returncode == 0, result.stderr
    assert "the native libraries were NOT built: no working C++17 compiler" in result.stderr
    assert [path.name for path in tree.lib.iterdir()] == ["ral_cuda.missing.txt"]
    result = tree.build(CXX=NO_COMPILER, RAL_LIBRARIES="ral_cuda", RAL_REQUIRE_NATIVE="1")
    assert result.returncode != 0


def newest_glibc(library: Path) -> tuple[int, ...]:
    """The newest glibc of which it needs a symbol."""
    from elftools.elf.elffile import ELFFile
    from elftools.elf.gnuversions import GNUVerNeedSection

    with library.open("rb") as file:
        sections = ELFFile(file).iter_sections()
        needed = (
            x for s in sections if isinstance(s, GNUVerNeedSection) for x in s.iter_versions()
        )
        names = [aux.name for _, parts in needed for aux in parts]
    versions = [name.removeprefix("GLIBC_") for name in names if name.startswith("GLIBC_2")]
    return max(tuple(map(int, version.split("."))) for version in versions)


@pytest.mark.slow(stands_in="test_without_nvcc_the_cuda_library_alone_is_missing")
@needs_compiler
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_cuda_library_is_built_where_nvcc_is_and_its_failure_spares_the_other(tree):
    source = tree.path / "csrc" / "cuda" / "core" / "entry.cu"
    source.parent.mkdir(parents=True)
    source.write_text(f"__global__ void kernel() {{}}\n{ENTRY_POINT}")
    nvcc = str(shutil.which("nvcc"))
    result = tree.build(CUDACXX=nvcc)
    assert result.returncode == 0, result.stderr
    library = ctypes.CDLL(str(tree.lib / "libral_cuda.so"))
    assert newest_glibc(tree.lib / "libral_cuda.so") <= (2, 28)
    assert library.answer() == 42
    assert not hasattr(library, "_Z12not_exportedv")
    assert not (tree.lib / "ral_cuda.missing.txt").exists()

    source.write_text("this is not CUDA;\n")
    result = tree.build(CUDACXX=nvcc)
    assert result.returncode == 0, result.stderr
    assert tree.note("ral_cuda").startswith("the CUDA sources did not build:\n")
    assert not (tree.lib / "libral_cuda.so").exists()
    assert (tree.lib / "libral_cpu.so").is_file()
    result = tree.build(CUDACXX=nvcc, RAL_REQUIRE_NATIVE="1")
    assert result.returncode != 0
    assert "this is not CUDA" in result.stdout + result.stderr


def test_library_is_not_packaged_by_chance(tree):
    """One that lies in the checkout belongs to another build."""
    tree.lib.mkdir()
    (tree.lib / "libral_cpu.so").write_bytes(b"left behind")
    _, names, _ = tree.wheel(CXX=NO_COMPILER)
    assert "ral_kernels/lib/libral_cpu.so" not in names


@needs_compiler
def test_rebuild_in_place_and_broken_sources(tree):
    library = tree.lib / "libral_cpu.so"
    assert tree.build().returncode == 0
    assert library.is_file()

    tree.entry.write_text("this is not C++;\n")
    result = tree.build()
    assert result.returncode == 0  # and the older library, which would not fit, is gone
    assert [path.name for path in tree.lib.iterdir() if "ral_cpu" in path.name] == [
        "ral_cpu.missing.txt"
    ]
    assert tree.note().startswith("the C++ sources did not build:\n")
    assert re.search(r"entry\.cpp:1:1: error: ", tree.note())

    tree.entry.write_text(ENTRY_POINT)
    assert tree.build().returncode == 0
    assert library.is_file()
    assert not (tree.lib / "ral_cpu.missing.txt").exists()


@pytest.mark.slow(stands_in="test_rebuild_in_place_and_broken_sources")
@needs_compiler
def test_system_cmake_without_ninja_or_modules(tree):
    """A machine with a compiler and CMake of its own and no network: no pip, no tool modules."""
    tree.hide_module("cmake")
    tree.hide_module("ninja")
    tree.hide_program("ninja")
    # What a Python environment has in its bin/ are wrappers of the modules.
    own_bin = str(Path(sys.executable).parent)
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if p != own_bin)
    if shutil.which("cmake", path=path) is None or shutil.which("make", path=path) is None:
        pytest.skip("the system has no CMake and make of its own")
    result = tree.build(PATH=f"{tree.hidden}{os.pathsep}{path}")
    assert result.returncode == 0, result.stderr
    assert (tree.lib / "libral_cpu.so").is_file(), result.stderr
    assert (tree.path / "build" / "cmake" / "Makefile").is_file()

    # With ninja again, the cache of the other generator must not stand in the way.
    (tree.hidden / "ninja").unlink()
    (tree.hidden / "ninja.py").unlink()
    result = tree.build()
    assert (tree.lib / "libral_cpu.so").is_file(), result.stdout + result.stderr
