"""What nvcc made of the CUDA C++ kernels.

Every one is there for every architecture, uses the tensor cores where it multiplies, fits, and
keeps to registers but for the known exceptions.
"""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.codegen.cuda import (
    PRODUCTS,
    STACK_LIMIT,
    CudaKernel,
    find_cuobjdump,
    kernels,
    markdown,
    problems,
)
from ral_kernels import native
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
    assert forms == {
        (dtype, head_dim, architecture)
        for dtype in ("bf16", "fp16")
        for head_dim in (64, 128)
        for architecture in ("sm_80", "sm_90")
    }


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
