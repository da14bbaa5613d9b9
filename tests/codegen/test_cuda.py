"""What nvcc made of the CUDA C++ kernels.

Every one is there for every architecture, uses the tensor cores where it multiplies, fits, and
keeps to registers but for the known exceptions.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
from itertools import product
from pathlib import Path

import pytest

from benchmarks.codegen import build_steps
from benchmarks.codegen.cuda import (
    PRODUCTS,
    STACK_LIMIT,
    CudaKernel,
    find_cuobjdump,
    kernels,
    markdown,
    problems,
)
from ral_kernels.runtime import native
from tests.conftest import skip_or_fail

pytestmark = pytest.mark.xdist_group("cuda_codegen")  # disassemble once

MULTIPLY = {
    "attention_fwd_kernel",
    "attention_bwd_dq_kernel",
    "attention_bwd_dkdv_kernel",
    "policy_statistics_kernel",
    "policy_terms_kernel",
    "policy_bwd_dq_kernel",
    "policy_bwd_dk_kernel",
}
HOPPER = {
    "attention_fwd_sm90_kernel",
    "attention_bwd_dq_sm90_kernel",
    "attention_bwd_dkdv_sm90_kernel",
}

# Whether the library is for chosen architectures, as setup.py builds it on request.
CHOSEN = bool(os.environ.get("RAL_CUDA_ARCHITECTURES"))


@pytest.fixture(scope="module")
def found() -> list[CudaKernel]:
    missing = native.why_missing("ral_cuda")
    if missing is not None:
        skip_or_fail("cuda", missing)
    if find_cuobjdump() is None:
        skip_or_fail("cuda", "no cuobjdump")
    return kernels()


def test_limits_hold(found: list[CudaKernel]) -> None:
    assert not problems(found), "\n".join(problems(found))
    for kernel in found:
        assert 0 < kernel.registers <= 255
    if CHOSEN:
        return  # one architecture needs less than another
    # An allowance that nothing needs any more is to go.
    for name, limit in STACK_LIMIT.items():
        used = [k.stack for k in found if f"{k.name} {k.head_dim}" == name]
        assert 0 < max(used) <= limit <= 2 * max(used)


def test_products_run_on_tensor_cores(found: list[CudaKernel]) -> None:
    assert {kernel.name for kernel in found} >= MULTIPLY
    for kernel in found:
        products = sum(kernel.instructions.get(name, 0) for name in PRODUCTS)
        assert (products > 0) == (kernel.name in MULTIPLY | HOPPER), kernel


@pytest.mark.parametrize("name", sorted(MULTIPLY))
def test_every_form_is_compiled(name: str, found: list[CudaKernel]) -> None:
    forms = {(k.dtype, k.head_dim, k.architecture) for k in found if k.name == name}
    architectures = {k.architecture for k in found if k.name in MULTIPLY}
    assert CHOSEN or architectures == {"sm_80", "sm_90"}
    assert forms == set(product(("bf16", "fp16"), (64, 128), architectures))


def test_what_is_wrong_is_said(found: list[CudaKernel]) -> None:
    good = next(k for k in found if k.name == "attention_bwd_dq_kernel")
    spilled = dataclasses.replace(good, stack=8)
    large = dataclasses.replace(good, shared=300 * 1024)
    where = f"{good.architecture} {good.name} {good.dtype} {good.head_dim}"
    assert problems([good, spilled, large]) == [
        f"{where}: 8 bytes in local memory, 0 are known of",
        f"{where}: {300 * 1024} bytes of shared memory do not fit",
    ]
    assert f"| `{good.name}` | {good.head_dim} |" in markdown([good], "nvcc 0")


def test_build_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only what nvcc compiles, by CMake's own command, and the build's objects stay."""
    code = "import sys; s = sum(range(int(sys.argv[1]))); open(sys.argv[3], 'w')"
    entries = [
        {
            "file": f"/csrc/cuda/attention/{name}",
            "command": shlex.join([sys.executable, "-c", code, n, "-o", "o"]),
        }
        for name, n in (("fast.cu", "1"), ("slow.cu", "10000000"), ("cpu.cpp", "1"))
    ]
    (tmp_path / "compile_commands.json").write_text(json.dumps(entries))
    build_steps.main(["--build-dir", str(tmp_path), "--json", str(tmp_path / "steps.json")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["attention/slow.cu", "attention/fast.cu", "all,"]
    seconds = json.loads((tmp_path / "steps.json").read_text())["cpu_seconds"]
    assert seconds["attention/slow.cu"] > seconds["attention/fast.cu"] > 0
    assert not (tmp_path / "o").exists()
