"""The loop of the policy kernels over blocks that need no masks: what a warp issues in a turn."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ral_kernels.runtime import triton_runtime
from tests.conftest import skip_or_fail

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow(stands_in="tests/codegen/test_loops.py::test_paths_of_loops")
@pytest.mark.parametrize(
    ("kernel", "most", "loads"),
    [
        ("policy_statistics", 540, "8 LDGSTS 16"),
        # of K 4, and of dp 8, which were 32 of 4 bytes
        ("policy_bwd_dq", 500, "12 LDGSTS 16"),
    ],
)
def test_blocks_without_masks(kernel: str, most: int, loads: str) -> None:
    found = _printed("benchmarks.codegen", "--kernel", kernel, "--variant", "keys", "--arch", "90")
    head, _, *lines = [line.split(" | ") for line in found]
    interior, edge = (dict(zip(head, line, strict=True)) for line in lines)
    assert int(interior["instructions"]) <= most < int(edge["instructions"])
    assert interior["loads, bytes"] == loads


@pytest.mark.slow(stands_in="tests/codegen/test_loops.py::test_paths_of_loops")
def test_policies_of_a_long_video() -> None:
    """1,024 rows of 131,072 keys: what the kernels issue takes a few milliseconds."""
    lines = _printed("benchmarks.codegen.count")
    policy, loss = (float(line.split(" | ")[-1].strip("| ")) for line in lines if "| all |" in line)
    assert 0 < policy <= 5.5 and 0 < loss <= 7


def _printed(module: str, *arguments: str) -> list[str]:
    """The lines of a command that compiles kernels."""
    if not triton_runtime._installed():
        skip_or_fail("triton", "triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
