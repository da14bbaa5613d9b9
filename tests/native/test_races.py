"""The CPU backend's parallel forwards and backwards under ThreadSanitizer, and under
AddressSanitizer with UndefinedBehaviorSanitizer, in every variant that this machine runs.

`make sanitize` runs these, and tests of ops on a library that sanitizers watch.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import supported_isas
from tests.native.test_simd import AMX, FLAGS

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX", "c++")
FILES = ("core/entry.cpp", "core/variants.cpp", "core/threads.cpp")
VARIANTS = (*FLAGS, "amx_bf16")
SANITIZERS = {"thread": "libtsan", "address,undefined": "libasan"}  # and the runtime each needs


class Programs:
    """race_check, built for each sanitizer with the portable variant or with all of this machine.

    A variant is compiled once: that is what takes the time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.build = functools.cache(self._build)
        self.object = functools.cache(self._object)

    def _compile(self, sanitizer: str, *arguments: str) -> None:
        command = [
            *(COMPILER, "-std=c++17", "-O1", "-g", "-Wno-psabi", f"-fsanitize={sanitizer}"),
            *("-fno-sanitize-recover=all", f"-I{ROOT}/csrc/include", f"-I{ROOT}/csrc/cpu"),
            *arguments,
        ]
        built = subprocess.run(command, capture_output=True, text=True)
        output = built.stdout + built.stderr
        if built.returncode != 0 and SANITIZERS[sanitizer] in output:
            pytest.skip(f"this compiler comes without {SANITIZERS[sanitizer]}")
        assert built.returncode == 0, output

    def _object(self, sanitizer: str, isa: str) -> str:
        file = self.folder / f"{sanitizer}-{isa}.o"
        source = "kernels_amx" if isa == "amx_bf16" else "kernels"
        flags = AMX if isa == "amx_bf16" else (*FLAGS[isa], f"-DRAL_ISA={isa}")
        source = f"{ROOT}/csrc/cpu/core/{source}.cpp"
        self._compile(sanitizer, *flags, "-c", source, "-o", str(file))
        return str(file)

    def _build(self, sanitizer: str, isas: tuple[str, ...]) -> Path:
        program = self.folder / f"race_check-{sanitizer}-{len(isas)}"
        self._compile(
            sanitizer,
            *(f"-DRAL_HAVE_{isa.upper()}" for isa in isas if isa != "portable"),
            *(str(ROOT / "csrc" / "cpu" / file) for file in FILES),
            str(ROOT / "tests/native/race_check.cpp"),
            *(self.object(sanitizer, isa) for isa in isas),
            *("-o", str(program), "-lpthread"),
        )
        return program


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no compiler {COMPILER}")
    return Programs(tmp_path_factory.mktemp("race_check"))


def run(program: Path, isa: str) -> None:
    environment = dict(
        os.environ,
        TSAN_OPTIONS="halt_on_error=1 exitcode=66",
        ASAN_OPTIONS="exitcode=66",
        UBSAN_OPTIONS="print_stacktrace=1",
    )
    done = subprocess.run(
        # ThreadSanitizer's fixed memory layout collides with randomised addresses on some kernels.
        [*(["setarch", "-R"] if shutil.which("setarch") else []), str(program), isa],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "race_check: ok" in done.stdout


@pytest.mark.slow(stands_in="tests/ops/test_attention.py::test_repeats_bit_for_bit")
@pytest.mark.xdist_group("race_check")
def test_no_races_and_results_do_not_depend_on_threads(programs: Programs) -> None:
    run(programs.build("thread", ("portable",)), "portable")


@pytest.mark.slow(stands_in="tests/ops/test_attention.py::test_every_cpu_variant")
@pytest.mark.xdist_group("race_check")
@pytest.mark.parametrize("isa", VARIANTS)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_sanitizers_find_nothing(sanitizer: str, isa: str, programs: Programs) -> None:
    here = tuple(name for name in VARIANTS if name in supported_isas())
    if isa not in here:
        pytest.skip(f"this machine does not run {isa}")
    run(programs.build(sanitizer, here), isa)
