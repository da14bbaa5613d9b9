"""The loops of the attention kernels with spans: what blocks of one span and of several cost."""

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
    ("kernel", "variant", "loop", "least", "most"),
    [
        # (instructions, barriers) of the shortest and of the longest path; without spans 390 and 2
        ("attention_fwd", "spans", "1", (390, 2), (429, 4)),  # the longest returns to a span
        ("attention_bwd_dq", "spans", "1", (400, 2), (400, 2)),  # without spans 391 and 2
        # Loop 1 is of mixed blocks. At most 5 % more than without spans.
        ("attention_bwd_dkdv", "spans", "2", (308, 2), (308, 2)),
        ("attention_bwd_dkdv", "no spans", "1", (300, 2), (300, 2)),
        # Loop 2 is of neighbours in several spans. Before it was, they took 1038 and 47, 626 and 6.
        ("attention_fwd", "short spans", "2", (430, 4), (800, 11)),
        ("attention_bwd_dq", "short spans", "2", (410, 3), (610, 7)),
    ],
)
def test_blocks_of_keys(
    kernel: str, variant: str, loop: str, least: tuple[int, int], most: tuple[int, int]
) -> None:
    row = _loop(kernel, variant, loop)
    for column, limits in (
        ("instructions", (least[0], most[0])),
        ("barriers", (least[1], most[1])),
    ):
        found = [int(x) for x in row[column].split(" – ")]
        assert found[0] <= limits[0] and found[-1] <= limits[1], (column, found)


@pytest.mark.slow(stands_in="tests/codegen/test_loops.py::test_paths_of_loops")
def test_tensor_descriptors() -> None:
    """Two copies of the CTA in place of eight by each thread, and fewer instructions by a tenth."""
    row = _loop("attention_fwd", "no spans", "1", RAL_TRITON_TMA="1")
    assert row["loads, bytes"] == "2 UTMALDG"
    assert max(int(x) for x in row["instructions"].split(" – ")) <= 350  # 390 without


def _loop(kernel: str, variant: str, loop: str, **environment: str) -> dict[str, str]:
    """A loop of a kernel on sm_90, as `benchmarks.codegen` prints it."""
    if not triton_runtime._installed():
        skip_or_fail("triton", "triton is not installed")
    rest = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.codegen", "--kernel", kernel]
    command += ["--variant", variant, "--arch", "90", "--jobs", "1"]
    done = subprocess.run(command, cwd=ROOT, env=rest | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, _, *lines = [line.split(" | ") for line in done.stdout.splitlines()]
    rows = [dict(zip(head, line, strict=True)) for line in lines]
    (row,) = (row for row in rows if row["loop"] == loop)
    return row
