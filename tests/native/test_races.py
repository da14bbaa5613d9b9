"""ThreadSanitizer over the CPU backend's parallel forward and backward (its portable variant)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX", "c++")
SOURCES = tuple(f"csrc/cpu/core/{name}.cpp" for name in ("kernels", "entry", "variants", "threads"))


@pytest.fixture(scope="module")
def race_check(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no compiler {COMPILER}")
    program = tmp_path_factory.mktemp("race_check") / "race_check"
    command = [
        *(COMPILER, "-std=c++17", "-O1", "-g", "-fsanitize=thread", "-Wno-psabi"),
        *("-DRAL_ISA=portable", f"-I{ROOT}/csrc/include", f"-I{ROOT}/csrc/cpu"),
        *(str(ROOT / source) for source in (*SOURCES, "tests/native/race_check.cpp")),
        *("-o", str(program), "-lpthread"),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode != 0 and "libtsan" in built.stderr + built.stdout:
        pytest.skip("this compiler comes without ThreadSanitizer")
    assert built.returncode == 0, built.stderr
    return program


def test_no_races_and_results_do_not_depend_on_threads(race_check: Path) -> None:
    environment = dict(os.environ, TSAN_OPTIONS="halt_on_error=1 exitcode=66")
    done = subprocess.run(
        # ThreadSanitizer's fixed memory layout collides with randomised addresses on some kernels.
        [*(["setarch", "-R"] if shutil.which("setarch") else []), str(race_check)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "race_check: ok" in done.stdout
