"""The CPU backend's vectors in every variant that runs here, and its sources under clang."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX", "c++")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
FLAGS = {  # CMakeLists.txt's
    "portable": (),
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": (*AVX512, "-mavx512bf16"),  # amx_bf16's vectors are the same
}


@pytest.mark.parametrize(
    "isa",
    [
        pytest.param(isa, marks=() if isa == "avx2" else pytest.mark.slow(stands_in="test_vectors"))
        for isa in FLAGS
    ],
)
def test_vectors(isa: str, tmp_path: Path) -> None:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no compiler {COMPILER}")
    from ral_kernels.runtime.cpu_library import supported_isas

    if isa not in supported_isas():
        pytest.skip(f"this machine does not run {isa}")
    program = tmp_path / "simd_check"
    built = subprocess.run(
        [
            *(COMPILER, "-std=c++17", "-O2", "-ffp-contract=fast", "-fno-math-errno"),
            *("-fno-trapping-math", "-fno-signed-zeros", "-Wno-psabi", *FLAGS[isa]),
            *("-fsanitize=undefined", "-fno-sanitize-recover=all"),
            *(f"-DRAL_ISA={isa}", f"-I{ROOT}/csrc/include", f"-I{ROOT}/csrc/cpu"),
            *(str(ROOT / "tests/native/simd_check.cpp"), "-o", str(program)),
        ],
        capture_output=True,
        text=True,
    )
    if built.returncode != 0 and "libubsan" in built.stderr:
        pytest.skip("this compiler comes without UndefinedBehaviorSanitizer")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "simd_check: ok" in done.stdout


CHOSEN = tuple(f"-DRAL_HAVE_{isa}" for isa in ("AVX2", "AVX512", "AVX512_BF16", "AMX_BF16"))
AMX = (*FLAGS["avx512_bf16"], "-mamx-tile", "-mamx-bf16", "-DRAL_AMX", "-DRAL_ISA=amx_bf16")
SOURCES = {
    **{isa: ("kernels.cpp", (*flags, f"-DRAL_ISA={isa}")) for isa, flags in FLAGS.items()},
    "amx_bf16": ("kernels_amx.cpp", AMX),
    "variants": ("variants.cpp", CHOSEN),
}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="variants of x86-64")
@pytest.mark.parametrize("source", SOURCES)
def test_clang_takes_the_sources(source: str) -> None:
    """Messages name clang++ as a compiler that will do. Only what GCC has must not creep in."""
    versions = ("clang++", *(f"clang++-{n}" for n in range(20, 12, -1)))
    clang = next(filter(shutil.which, versions), "")
    if not clang:
        pytest.skip("no clang++ here")
    name, flags = SOURCES[source]
    done = subprocess.run(
        [
            *(clang, "-fsyntax-only", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"),
            *(*flags, f"-I{ROOT}/csrc/include", f"-I{ROOT}/csrc/cpu"),
            str(ROOT / "csrc/cpu/core" / name),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
