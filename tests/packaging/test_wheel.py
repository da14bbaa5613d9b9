"""The wheel of `make wheel`: its tag, and an empty environment that installs it.

The libraries are those of the checkout, which took minutes to compile; setup.py packages them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from ral_kernels.runtime import native

from .test_documents import blocks, compare
from .test_packaging import Tree

LIBRARY = native.LIBRARY_DIR / "libral_cpu.so"
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the wheel is Linux's"),
    pytest.mark.skipif(
        not LIBRARY.is_file() and "cpu" not in os.environ.get("RAL_REQUIRE", "").split(","),
        reason="the library is not built",
    ),
]
PLATFORM = "manylinux_2_28_x86_64"
# In place of a build: CMake's configuration, then each library, at the place that setup.py names.
CMAKE = """#!/bin/sh
case "$*" in
  *--version*) echo "cmake version 3.31.0";;
  *-DRAL_OUTPUT_DIR=*) mkdir -p build/cmake; : > build/cmake/ral_cuda.missing.txt
    for word; do case "$word" in -DRAL_OUTPUT_DIR=*) echo "${word#*=}" > output;; esac; done;;
  *) for word; do library=$word; done; cp "LIBRARIES/lib$library".so* "$(cat output)";;
esac
"""


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """What `make wheel` makes, with ral_cuda where it is built."""
    (tmp_path / "tree").mkdir()
    tree = Tree(tmp_path / "tree")
    tree.hide_module("cmake")
    tree.hide_program("cmake")
    (tree.hidden / "cmake").write_text(CMAKE.replace("LIBRARIES", str(LIBRARY.parent)))
    names = [x for x in ("ral_cpu", "ral_cuda") if (LIBRARY.parent / f"lib{x}.so").is_file()]
    path, packed, _ = tree.wheel(RAL_LIBRARIES=" ".join(names))
    assert {f"ral_kernels/lib/lib{name}.so" for name in names} <= packed
    programs = Path(sysconfig.get_path("scripts"))
    result = subprocess.run(
        [programs / "auditwheel", "repair", "--plat", PLATFORM, "--wheel-dir", "dist", path],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    (repaired,) = (tmp_path / "dist").iterdir()
    return repaired


@pytest.mark.slow(stands_in="tests/packaging/test_packaging.py::test_version_has_one_source")
def test_wheel_runs_the_readme_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    name, version, python, abi, platform = wheel.stem.split("-")
    assert (name, python, abi) == ("ral_kernels", "py3", "none")
    assert PLATFORM in platform.split(".")

    empty = tmp_path / "empty"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", empty], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(empty / "bin" / "python"), "install"]
    subprocess.run([*pip, "--quiet", "--no-index", "--no-deps", str(wheel)], check=True)
    # For torch. A folder in a .pth file comes last, and the .pth files in it do not count.
    (site,) = (empty / "lib").glob("python*/site-packages")
    (site / "torch.pth").write_text(f"{sysconfig.get_path('purelib')}\n")

    def run(*words: str) -> str:
        return subprocess.run(
            [empty / "bin" / words[0], *words[1:]], cwd=tmp_path, env={"HOME": str(tmp_path)},
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip

    info = json.loads(run("python", "-m", "ral_kernels", "info", "--json"))
    assert info["libraries"]["ral_cpu"]["path"].startswith(str(site))
    assert info["backends"]["attention"]["cpu"] == "yes"
    assert info["ral_kernels"] == version
    if (LIBRARY.parent / "libral_cuda.so").is_file():
        assert info["libraries"]["ral_cuda"]["missing"] is None
    found = blocks("README.md")
    at = next(i for i, x in enumerate(found) if x.language == "python" and x.not_run is None)
    compare(run("python", "-c", found[at].text), found[at + 1].text, "README.md, from the wheel")
    assert "Reinforced Attention Learning" in run("ral", "--help")
    shutil.rmtree(empty)
