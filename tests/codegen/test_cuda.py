"""What nvcc made of the CUDA C++ kernels.

Every one is there for every architecture, uses the tensor cores where it multiplies, fits, and
keeps to registers but for the known exceptions.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import sys
from itertools import product
from pathlib import Path

import pytest

from benchmarks.codegen import build_steps
from benchmarks.codegen.cuda import (
    BLOCKS,
    LOOP_LIMIT,
    PRODUCTS,
    STACK_LIMIT,
    CudaKernel,
    blocks,
    find_cuobjdump,
    kernels,
    loop_facts,
    markdown,
    named_loops,
    problems,
)
from benchmarks.codegen.main_loop import MainLoop, Step, main_loops, parse, way
from benchmarks.codegen.model import Handover, timing
from ral_kernels.ops.attention.cuda import WIDE_SHARED_BYTES
from ral_kernels.runtime import native
from tests.conftest import skip_or_fail

pytestmark = pytest.mark.xdist_group("cuda_codegen")  # disassemble once

MULTIPLY = {
    "attention_fwd_kernel",
    "attention_bwd_dq_kernel",
    "attention_bwd_dkdv_kernel",
    "attention_fwd_general_kernel",
    "attention_fwd_split_kernel",
    "attention_bwd_dq_general_kernel",
    "attention_bwd_dkdv_general_kernel",
    "policy_statistics_kernel",
    "policy_terms_kernel",
    "policy_moments_kernel",
    "policy_bwd_dq_kernel",
    "policy_bwd_dk_kernel",
}
HOPPER = {
    "attention_fwd_sm90_kernel",
    "attention_bwd_dq_sm90_kernel",
    "attention_bwd_dkdv_sm90_kernel",
    "attention_bwd_dkdv_wide_sm90_kernel",
    "policy_statistics_sm90_kernel",
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


def test_the_largest_cta_of_wide_heads_is_known(found: list[CudaKernel]) -> None:
    """By its size GPUs are refused that have too little; all that run it have 99 KiB."""
    known = [kernel for kernel in found if "sm90" not in kernel.name]  # Hopper has enough
    assert max(k.shared for k in known if k.head_dim == 256) == WIDE_SHARED_BYTES
    assert max(k.shared for k in known if k.head_dim < 256) <= 99 << 10


def test_main_loops_stay_short(found: list[CudaKernel]) -> None:
    """`problems` holds them to LOOP_LIMIT, which leaves them no more room than a compiler needs."""
    loops = dict(named for kernel in found for named in named_loops(kernel))
    if not loops:
        skip_or_fail("cuda", "a library without kernels for Hopper")
    assert sorted(loops) == sorted(LOOP_LIMIT)
    for name, loop in loops.items():
        assert LOOP_LIMIT[name][0] <= 1.05 * loop_facts(loop)[0], name


def test_marginals_stay_cheap(found: list[CudaKernel]) -> None:
    """By the model: no block takes more clocks than BLOCKS allows, which is little more room."""
    described = blocks(found)
    if not described:
        skip_or_fail("cuda", "a library without kernels for Hopper")
    assert {block.kernel for block in described} == set(BLOCKS)
    for block in described:
        assert block.ratio <= block.limit, block
        assert block.limit <= 1.15 * block.ratio, block


def test_ways_of_other_blocks() -> None:
    code = parse(LOOP.splitlines())
    shortest = way(code, {})
    assert shortest is not None and len(shortest) == 13
    assert shortest[-1] == Step("@P4 BRA 0x0010", True)
    assert way(code, {"loads": 1}) == shortest
    assert way(code, {"loads": 2}) is None
    # The longer way, through a mask outside the loop's addresses, has the additions.
    added = parse(LOOP.replace("FMUL R7, R7, R8", "FADD R7, R7, R8").splitlines())
    detour = way(added, {"additions": 2})
    assert detour is not None and len(detour) == 16
    assert sum(step.taken for step in detour) == 3


def test_the_model_queues_products() -> None:
    """Of two warps: 2 products of 64 clocks, then a wait. Latency is hidden, or not."""
    product = "HGMMA.64x128x16.F32.BF16 R24, R8, gdesc[UR4], R24, gsb0"
    products = [Step(product, False)] * 2
    wait = Step("WARPGROUP.DEPBAR.LE gsb0, 0x0", False)
    full = timing([[*products, wait]] * 2)
    assert full.clocks == pytest.approx(256, abs=2) and full.utilisation > 0.99
    # A chain of 100 additions of 4 clocks after each wait: 128 + 400 clocks and some.
    chain = [Step("FADD R7, R7, R8", False)] * 100
    slow = timing([[*products, wait, *chain]] * 2)
    assert 528 <= slow.clocks < 560 and slow.utilisation == pytest.approx(256 / slow.clocks)
    # The accumulators are read by the products, so a load to them is waited for.
    load = Step("LDG.E R40, desc[UR6][R4.64]", False)
    assert timing([[load, *products, wait]] * 2).clocks > full.clocks


def test_the_model_waits_for_another_consumer() -> None:
    """Two chains of 100 additions of 4 clocks: beside each other, or each after the other."""
    additions = [Step("FADD R7, R7, R8", False)] * 100
    arrive = Step("SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R6+URZ], RZ", False)
    wait = Step("SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [R16+URZ+0x18], R17", False)
    ways = [*additions, arrive, wait], [wait, *additions, arrive]
    there, back = Handover(0, 0, 1, 0), Handover(1, 0, 0, 0)
    assert timing(ways).clocks == pytest.approx(400, abs=30)
    assert timing(ways, [there]).clocks == pytest.approx(400, abs=30)
    assert timing(ways, [there, back]).clocks == pytest.approx(800, abs=60)
    # One consumer of a short way waits in each round.
    assert timing([ways[0], [wait]], [there]).clocks == pytest.approx(400, abs=30)
    with pytest.raises(AssertionError, match="each waits for another"):
        timing([[wait, arrive], [wait, arrive]], [there, back])


# A loop of two products. P0: an inner wait, P1: a mask outside the loop's addresses. P2 skips all.
LOOP = """
    /*0000*/  S2R R0, SR_TID.X ;  /* 0x0 */
    /*0010*/  @P2 BRA 0x00b0 ;
    /*0020*/  SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
    /*0030*/  @!P0 BRA 0x0020 ;
    /*0040*/  UIADD3 UR4, UR5, 0x2, URZ ;
    /*0050*/  HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
    /*0060*/  UIADD3 UR4, UR5, 0x4, URZ ;
    /*0070*/  UMOV UR5, 0x40000040 ;
    /*0080*/  HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
    /*0090*/  @!P1 BRA P3, 0x00f0 ;
    /*00a0*/  LDG.E R3, desc[UR6][R4.64] ;
    /*00b0*/  IADD3 R0, R0, 0x1, RZ ;
    /*00c0*/  ISETP.LT.AND P4, PT, R0, R9, PT ;
    /*00d0*/  @P4 BRA 0x0010 ;
    /*00e0*/  EXIT ;
    /*00f0*/  FMUL R7, R7, R8 ;
    /*0100*/  FMUL R7, R7, R8 ;
    /*0110*/  BRA 0x00a0 ;
"""


def test_main_loops_are_found() -> None:
    code = parse(LOOP.splitlines())
    assert len(code) == 18
    expected = MainLoop(products=2, instructions=13, uniform=3, branches=1, loads=1, between=2)
    assert main_loops(code) == [expected]
    assert main_loops([line for line in code if "HGMMA" not in line[1]]) == []
    # Without a way around it, a detour counts: two instructions, a branch there and one back.
    detour = parse(LOOP.replace("@!P1 BRA P3, 0x00f0", "BRA 0x00f0").splitlines())
    assert main_loops(detour) == [dataclasses.replace(expected, instructions=16, branches=3)]


def test_each_role_has_a_main_loop() -> None:
    """Two loops of as many products, the second with one more instruction."""
    first = LOOP.replace("S2R R0, SR_TID.X", "@P5 BRA 0x0200")
    second = re.sub(r"(0x|/\*)00([0-9a-f]0)\b", r"\g<1>02\2", LOOP)
    second = second.replace("@P2 BRA 0x02b0", "FMUL R7, R7, R8")
    code = parse((first + second).splitlines())
    expected = MainLoop(products=2, instructions=13, uniform=3, branches=1, loads=1, between=2)
    assert main_loops(code) == [expected, expected]
    assert way(code, {}, role=1) != way(code, {})
    assert way(code, {}, role=2) is None
    kernel = CudaKernel(
        "attention_bwd_dkdv_wide_sm90_kernel", "bf16", 256, "sm_90", 384, 0, 168, 0, {},
        main_loops(code), code,
    )  # fmt: skip
    assert [name.split()[-1] for name, _ in named_loops(kernel)] == ["dk", "dv"]


def test_products_run_on_tensor_cores(found: list[CudaKernel]) -> None:
    assert {kernel.name for kernel in found} >= MULTIPLY
    for kernel in found:
        products = sum(kernel.instructions.get(name, 0) for name in PRODUCTS)
        assert (products > 0) == (kernel.name in MULTIPLY | HOPPER), kernel


@pytest.mark.parametrize("name", sorted(MULTIPLY | HOPPER))
def test_every_form_is_compiled(name: str, found: list[CudaKernel]) -> None:
    forms = {(k.dtype, k.head_dim, k.architecture) for k in found if k.name == name}
    architectures = {k.architecture for k in found if k.name in MULTIPLY}
    assert CHOSEN or architectures == {"sm_80", "sm_90"}
    if name in HOPPER:
        architectures &= {"sm_90"}
    head_dims: tuple[int, ...] = (64, 128)
    if name.startswith("attention"):
        is_general = "general" in name or "split" in name
        head_dims = (64, 128, 256) if is_general or "sm90" in name else (64, 96, 128)
    if "wide" in name:
        head_dims = (256,)
    elif name == "attention_bwd_dkdv_sm90_kernel":
        head_dims = (64, 128)
    assert forms == set(product(("bf16", "fp16"), head_dims, architectures))


def test_what_is_wrong_is_said(found: list[CudaKernel]) -> None:
    good = next(k for k in found if k.name == "attention_bwd_dq_kernel")
    spilled = dataclasses.replace(good, stack=8)
    large = dataclasses.replace(good, shared=300 * 1024)
    loop = MainLoop(products=20, instructions=551, uniform=222, branches=40, loads=0, between=12)
    hopper = dataclasses.replace(
        good, name="attention_bwd_dq_sm90_kernel", head_dim=128, loops=[loop], code=[]
    )
    where = f"{good.architecture} {good.name} {good.dtype} {good.head_dim}"
    assert problems([hopper]) == [
        f"{good.architecture} {hopper.name} {good.dtype} 128: its main loop issues "
        "(551, 40, 0, 12), (405, 9, 0, 6) are allowed"
    ]
    assert "_sm90_kernel` | 128 | 20 | 551 | 222 | 40 | 0 | 12 |" in markdown([hopper], "nvcc 0")
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
