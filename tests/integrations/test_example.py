"""The examples run as they stand, offline."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOOP = ROOT / "examples" / "ral_loss_in_your_loop.py"


def test_ral_loss_in_your_loop():
    assert len(LOOP.read_text().splitlines()) < 40
    offline = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, str(LOOP)],
        env=os.environ | offline,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    divergences = [float(line.rpartition(" ")[2]) for line in done.stdout.splitlines()]
    # Nothing at the policy that made the rollouts, exactly; then a little more at every step
    assert len(divergences) == 6 and divergences[0] == 0.0
    assert 0.0 < divergences[1] < divergences[-1] < 0.1
