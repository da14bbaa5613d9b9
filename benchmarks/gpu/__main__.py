"""Run what needs a GPU, stage by stage, and keep what came out whatever fails.

    python -m benchmarks.gpu all --out folder               # a GPU of one's own: no limits
    python -m benchmarks.gpu first --out folder             # 210 s; then second (380), third (150)
    python -m benchmarks.gpu first --out folder --rehearse  # no GPU: a mocked one, tiny shapes

gpu-<script>.json has machine, versions, commit, the record of every stage and of every point; it is
rewritten after each stage. gpu-<script>.tar.xz has all that was printed, and reports of tools.
README.md beside this file says how to read them. The exit status is 1 if a stage failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness import machine

from . import mock
from .kit import DESCRIPTION
from .lines import parsed
from .scripts import SCRIPTS, SECONDS, needs_xdist, result_files
from .stages import ROOT, Setting, Stage, run

LEAST = 10.0  # a stage that would get less is left out
RESERVE = 4.0  # for the archive


def _budget(stage: Stage, left: float, waiting: Sequence[Stage]) -> float:
    """The stage's share of what is left: at least its budget, if that much is left at all."""
    if math.isinf(left):
        return left
    planned = sum(other.budget for other in waiting) + stage.budget
    return min(left, max(stage.budget, left * stage.budget / planned))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("script", choices=SCRIPTS)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="some of the script's")
    parser.add_argument("--seconds", type=float, help="for all of it; 0: no limit")
    parser.add_argument("--kit", type=Path, default=ROOT / "build" / "gpu-kit")
    parser.add_argument("--state", type=Path, default=ROOT / "build" / "gpu-state")
    parser.add_argument("--rehearse", action="store_true", help="on a mocked GPU, tiny shapes")
    options = parser.parse_args(arguments)
    names = [stage.name for stage in SCRIPTS[options.script]]
    unknown = [name for name in options.stages or [] if name not in names]
    if unknown:
        parser.error(f"--stages: {', '.join(unknown)} unknown; there are {', '.join(names)}")
    reason = needs_xdist() or (None if options.rehearse else _no_gpu())
    if reason is not None:
        parser.error(f"{reason} (--rehearse runs the stages without a GPU)")
    stages = [stage for stage in SCRIPTS[options.script] if stage.name in (options.stages or names)]
    seconds = SECONDS.get(options.script, 0) if options.seconds is None else options.seconds
    if options.rehearse:
        os.environ.setdefault(mock.VARIABLE, "{}")
    setting = Setting(
        out=options.out.resolve(),
        scratch=Path(),
        budget=seconds or math.inf,
        rehearse=options.rehearse,
        state=options.state.resolve(),
        kit=options.kit.resolve(),
    )
    return run_stages(options.script, stages, setting)


def _no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "torch sees no GPU here"


def run_stages(name: str, stages: Sequence[Stage], setting: Setting) -> int:
    """Run stages one after the other within the setting's budget; the exit status."""
    out, began = setting.out, time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    setting.state.mkdir(parents=True, exist_ok=True)
    log, result = out / "gpu.log", out / f"gpu-{name}.json"
    log.write_text("")
    setting.lines.write_text("")
    found: dict[str, Any] = {
        "benchmark": "gpu",
        "script": name,
        "schema": 2,
        "rehearsal": mock.settings() or {} if setting.rehearse else None,
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": machine.versions(),
        "commit": _commit(setting.kit),
        "stages": [],
    }
    scratch = Path(tempfile.mkdtemp(prefix="ral-gpu-"))
    try:
        for index, stage in enumerate(stages):
            left = setting.budget - RESERVE - (time.monotonic() - began)
            if left < LEAST:
                reason = "no time left"
                record = {"stage": stage.name, "status": "skipped", "reason": reason}
            else:
                budget = _budget(stage, left, stages[index + 1 :])
                print(f"{stage.name}: up to {budget:.0f} s", flush=True)
                folder = scratch / stage.name.replace(" ", "-")
                record = run(stage, replace(setting, scratch=folder, budget=budget), log)
            found["stages"].append(record)
            found["seconds"] = round(time.monotonic() - began, 1)
            found["points"] = parsed(setting.lines.read_text())
            result.write_text(json.dumps(found, indent=1) + "\n")
            shutil.copy(setting.lines, setting.state / f"records-{name}.jsonl")
            print(f"{stage.name}: {_line(record)}", flush=True)
        _archive(out / f"gpu-{name}.tar.xz", scratch, result_files(out, name), out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _report(found, result)
    return int(any(record["status"] in ("failed", "out of time") for record in found["stages"]))


def _commit(carried: Path) -> dict[str, Any]:
    """Of the checkout; where it came without its .git, that of the kit."""
    found = machine.commit()
    try:
        if found["hash"] is None:
            return {**json.loads((carried / DESCRIPTION).read_text())["commit"], "of": "the kit"}
    except (OSError, ValueError, KeyError):
        pass  # no kit, and no commit
    return found


def _archive(file: Path, scratch: Path, results: Sequence[Path], out: Path) -> None:
    """All that stages left, in one file: few come back from a machine that is lent."""
    with tarfile.open(file, "w:xz", preset=1) as archive:
        archive.add(scratch, "scratch")
        for path in results:
            archive.add(path, str(path.relative_to(out)))
    for path in results:
        if path.suffix not in (".png", ".json"):
            path.unlink()


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
    for record in found["stages"]:
        for line in record.get("output", [])[-8:]:
            print(f"  {record['stage']}> {line[:160]}")
    print(f"\n{found['seconds']:.0f} s in all; wrote {result}")
    for record in found["stages"]:
        print(f"  {record['stage']:24} {_line(record)}")


if __name__ == "__main__":
    sys.exit(main())
