"""What a warp issues in a turn of a main loop: the counts of benchmarks/codegen/loops.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.codegen.loops import Loop, Turn, main_loops
from ral_kernels.runtime import triton_runtime
from tests.conftest import skip_or_fail

ROOT = Path(__file__).resolve().parents[2]

# Two loops with products. The first skips 3 instructions and a loop within it by a branch, and has
# one block after the loop's end; the second is by a uniform branch. A third has no product.
CODE = """
.text.toy_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P0 EXIT ;
.L_x_1:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0050*/               @P1 BRA `(.L_x_3) ;
        /*0060*/                   LDG.E R4, desc[UR4][R6.64] ;
        /*0070*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_2:
        /*0080*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0090*/                   STG.E.64 desc[UR4][R6.64], R4 ;
        /*00a0*/              @!P2 BRA `(.L_x_2) ;
.L_x_3:
        /*00b0*/                   LDG.E.U16 R4, desc[UR4][R6.64] ;
        /*00c0*/                   BRA.DIV UR4, `(.L_x_9) ;
        /*00d0*/               @P4 BRA `(.L_x_8) ;
        /*00e0*/               @P3 BRA `(.L_x_1) ;
.L_x_4:
        /*00f0*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0100*/                   BRA.U UP0, `(.L_x_4) ;
.L_x_5:
        /*0110*/                   FADD R4, R4, R5 ;
        /*0120*/               @P0 BRA `(.L_x_5) ;
        /*0130*/                   EXIT ;
.L_x_8:
        /*0140*/                   FADD R4, R4, R5 ;
        /*0150*/                   BRA `(.L_x_1) ;
.L_x_9:
        /*0160*/                   SHFL.BFLY PT, R4, R5, 0x1, 0x1f ;
        /*0170*/                   BRA `(.L_x_3) ;
.L_x_10:
        /*0180*/                   BRA `(.L_x_10);
"""


def test_paths_of_loops() -> None:
    shape = "HGMMA.64x64x16"
    inner = Turn(3, 0, {"HGMMA.64x16x16": 1}, {}, 1)
    assert main_loops(CODE) == [
        Loop(
            "1",
            Turn(8, 1, {shape: 1}, {"LDG 2": 1, "LDGSTS 16": 1}, 0),
            Turn(
                14, 2, {"HGMMA.64x16x16": 1, shape: 1}, {"LDG 2": 1, "LDG 4": 1, "LDGSTS 16": 1}, 1
            ),
        ),
        Loop("1.1", inner, inner),
        Loop("2", *[Turn(2, 0, {"HMMA.16816": 1}, {}, 0)] * 2),
    ]


def test_a_kernel_without_loops() -> None:
    assert (
        main_loops("        /*0000*/   HMMA.16816.F32 R4, R8, R12, R4 ;\n  /*0010*/  EXIT ;") == []
    )


@pytest.mark.slow(stands_in="test_paths_of_loops")
def test_one_kernel_alone() -> None:
    """The forward of 64 keys a block: two products of 8 and 4 steps, and one tile of K and V."""
    if not triton_runtime._installed():
        skip_or_fail("triton", "triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.codegen", "--kernel", "attention_fwd"]
    command += ["--variant", "no spans", "--arch", "90", "--tile", "128,64,8,3"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, _, *lines = [line.split(" | ") for line in done.stdout.splitlines()]
    found = [dict(zip(head, line, strict=True)) for line in lines]
    assert [row["loop"] for row in found] == ["1", "2"]  # without masks, and at the edges
    assert found[0]["tile"] == "128 x 64 x 128 x 128"
    assert (found[0]["programs, 4k"], found[0]["programs, 16k"]) == ("512", "2048")
    for row in found:
        assert row["products"] == "4 HGMMA.64x128x16, 8 HGMMA.64x64x16"
        assert row["loads, bytes"] == "8 LDGSTS 16"
    plain, edge = (int(row["instructions"]) for row in found)
    assert 300 < plain < edge < 700
