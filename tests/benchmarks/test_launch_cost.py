"""What a call of the Triton backend costs the host: benchmarks/launch_cost.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import launch_cost
from ral_kernels.runtime import triton_runtime
from tests.conftest import skip_or_fail

ROOT = Path(__file__).resolve().parents[2]


class Kernel:
    """Stands in for a JITFunction: counts its launches."""

    __name__ = "toy_fwd_kernel"
    launches = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(**arguments: Any) -> None:
            self.launches += 1

        return launch


def test_launches_are_told_from_their_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that launches twice is timed with its own work, and its launches without it."""
    kernel = Kernel()
    ran = [0]

    def call() -> None:
        ran[0] += 1
        triton_runtime.launch(kernel, (1,), {"n": 1}, 4, 2)
        triton_runtime.launch(kernel, (1,), {"n": 2}, num_warps=4, num_stages=2, fp_fusion=False)

    monkeypatch.setattr(launch_cost, "calls", lambda: {"toy": call})
    row = launch_cost.costs(rounds=3)["toy"]
    assert row["launches"] == 2
    timed = 20 + 3  # measure() warms up
    repeated = 20 + launch_cost.REPEATED
    assert ran[0] == 1 + timed + repeated
    assert kernel.launches == 2 * (1 + 2 * timed + repeated)
    assert row["repeated_least_us"] > 0
    assert row["triton_least_us"] > 0 and row["least_us"] <= row["us"]["median"]


@pytest.mark.slow(stands_in="test_launches_are_told_from_their_call")
def test_a_driver_that_launches_nothing(tmp_path: Path) -> None:
    """The profile of a forward: through Triton's `run` for the table of spans and the kernel."""
    if not triton_runtime._installed():
        skip_or_fail("triton", "triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "out.json")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    assert json.loads((tmp_path / "out.json").read_text()) == {
        "launched": ["mixed_blocks_kernel", "attention_fwd_kernel"],
        "runs": 5,  # the table of spans is kept
    }


PROGRAM = """
import json, sys
from benchmarks import launch_cost
launch_cost.begin()
call = launch_cost.calls()["attention, 8 spans"]
launched = [launch.args[0].__name__ for launch in launch_cost.launches_of(call)]
counts = launch_cost.profile(call, 5).stats.items()
runs = sum(n for (file, _, name), (n, *_) in counts if (file[-6:], name) == ("jit.py", "run"))
json.dump({"launched": launched, "runs": runs}, open(sys.argv[1], "w"))
"""
