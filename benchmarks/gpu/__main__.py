"""Run everything that needs a GPU, stage by stage, and keep what came out.

    make gpu OUT=folder                       # all stages, nine minutes at most
    python -m benchmarks.gpu --out folder --stages tiles --seconds 540
    python -m benchmarks.gpu --out folder --rehearse       # no GPU: each stage's code, tiny shapes

gpu.json has machine, versions, commit and the record of every stage; it is written anew after each.
gpu.log has all that the stages printed, and the sweeps leave JSON and PNG of their own. The exit
status is 1 if a stage failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.sweeps import machine

from .stages import STAGES, Setting, Stage, run

SECONDS = 520.0  # of nine minutes; the rest is for starting and ending
LEAST = 10.0  # a stage that would get less is left out


def _budget(stage: Stage, left: float, waiting: Sequence[Stage]) -> float:
    """The stage's share of what is left: at least its budget, if that much is left at all."""
    planned = sum(other.budget for other in waiting) + stage.budget
    return min(left, max(stage.budget, left * stage.budget / planned))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    names = [stage.name for stage in STAGES]
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help=f"some of {', '.join(names)}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, on tiny shapes")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.stages or [] if name not in names]
    if unknown:
        parser.error(f"--stages: {', '.join(unknown)} unknown; there are {', '.join(names)}")
    if not options.rehearse and (reason := _no_gpu()) is not None:
        parser.error(f"{reason} (--rehearse runs the stages without one)")
    stages = [stage for stage in STAGES if stage.name in (options.stages or names)]
    return run_stages(stages, options.out.resolve(), options.seconds, options.rehearse)


def _no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "torch sees no GPU here"


def run_stages(stages: Sequence[Stage], out: Path, seconds: float, rehearse: bool) -> int:
    """Run stages one after the other within `seconds`; the exit status of the command."""
    out.mkdir(parents=True, exist_ok=True)
    log, result, began = out / "gpu.log", out / "gpu.json", time.monotonic()
    log.write_text("")
    found: dict[str, Any] = {
        "benchmark": "gpu",
        "schema": 1,
        "rehearsal": rehearse,
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "stages": [],
    }
    scratch = Path(tempfile.mkdtemp(prefix="ral-gpu-"))
    try:
        for index, stage in enumerate(stages):
            left = seconds - (time.monotonic() - began)
            if left < LEAST:
                reason = "no time left"
                record = {"stage": stage.name, "status": "skipped", "reason": reason}
            else:
                budget = _budget(stage, left, stages[index + 1 :])
                print(f"{stage.name}: up to {budget:.0f} s", flush=True)
                folder = scratch / str(index)
                record = run(stage, Setting(out, folder, budget, rehearse), log)
            found["stages"].append(record)
            found["seconds"] = round(time.monotonic() - began, 1)
            result.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{stage.name}: {_line(record)}", flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _report(found, result)
    return int(any(record["status"] in ("failed", "out of time") for record in found["stages"]))


def _line(record: dict[str, Any]) -> str:
    parts = [record["status"]]
    if "seconds" in record:
        parts.append(f"{record['seconds']} s")
    outcomes = (record.get("result") or {}).get("outcomes")
    if outcomes:
        parts.append(", ".join(f"{count} {name}" for name, count in sorted(outcomes.items())))
    if record.get("reason"):
        parts.append(record["reason"])
    return ", ".join(parts)


def _report(found: dict[str, Any], result: Path) -> None:
    """The last lines that are printed: one a stage, and the end of what failed printed."""
    print(f"\n{found['seconds']:.0f} s in all; wrote {result}")
    for record in found["stages"]:
        print(f"  {record['stage']:24} {_line(record)}")
    for record in found["stages"]:
        for line in record.get("output", [])[-8:]:
            print(f"  {record['stage']}> {line[:160]}")


if __name__ == "__main__":
    sys.exit(main())
