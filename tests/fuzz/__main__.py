"""Random calls of every CPU variant for FUZZ_MINUTES (10): `make fuzz`.

Failing examples stay in .hypothesis/examples, and the next run begins with them. A child process
makes the calls. If it crashes, this one prints the call that it was at.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.database import DirectoryBasedExampleDatabase

EXAMPLES = Path(".hypothesis") / "examples"
BATCH = 200  # calls between two looks at the clock


def _fuzz(log: Path, seconds: float) -> None:
    if "RAL_SANITIZED" in os.environ:
        importlib.import_module("tests.native.sanitized")
    from ral_kernels.runtime import cpu_library
    from tests.fuzz.calls import Plan, check, plans

    kept = settings(
        max_examples=BATCH,
        deadline=None,
        database=DirectoryBasedExampleDatabase(EXAMPLES),
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
        print_blob=True,
    )
    count = 0

    def looked_at(plan: Plan) -> None:
        nonlocal count
        count += 1
        log.write_text(f"RAL_CPU_ISA={os.environ['RAL_CPU_ISA']} {plan!r}")
        check(plan)

    def valid(plan: Plan) -> None:
        looked_at(plan)

    def malformed(plan: Plan) -> None:
        looked_at(plan)

    tests = [kept(given(plans(False))(valid)), kept(given(plans(True))(malformed))]
    end, isas, turn = time.monotonic() + seconds, cpu_library.supported_isas(), 0
    while time.monotonic() < end:
        os.environ["RAL_CPU_ISA"] = isas[turn // 2 % len(isas)]
        tests[turn % 2]()
        turn += 1
    print(f"fuzz: {count} calls of {', '.join(isas)} in {seconds / 60:g} minutes, no finding")


def main() -> int:
    seconds = 60 * float(os.environ.get("FUZZ_MINUTES", "10"))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "call"
        code = f"from tests.fuzz.__main__ import _fuzz, Path; _fuzz(Path({str(log)!r}), {seconds})"
        done = subprocess.run([sys.executable, "-X", "faulthandler", "-c", code])
        if done.returncode != 0 and log.exists():
            print(f"fuzz: status {done.returncode} after this call:\n{log.read_text()}")
        return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
