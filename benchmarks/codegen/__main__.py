"""Compile every Triton kernel ahead of time and write what came out.

    python -m benchmarks.codegen                 # all of it, and benchmarks/results/codegen.md
    python -m benchmarks.codegen --json F --only "attention spans bfloat16 128"

No GPU is needed, and none is used. The exit status is 1 if a kernel spills, does not fit, or
multiplies without matrix instructions.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import machine
from ral_kernels.runtime import triton_runtime

from .calls import calls, compiled_in_tests
from .table import markdown, problems
from .work import compile_all

RESULT = Path(__file__).resolve().parents[1] / "results" / "codegen.md"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=RESULT, help="the table (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the facts here, and no table")
    parser.add_argument("--only", nargs="+", metavar="CALL", help="some calls, by name")
    parser.add_argument("--tested", action="store_true", help="what the tests look at")
    parser.add_argument(
        "--architectures", nargs="+", default=triton_runtime.ARCHITECTURES, metavar="sm_XX"
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)
    if triton_runtime.interpreted():
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing")
    if importlib.util.find_spec("triton") is None:
        parser.error("triton is not installed (pip install triton)")
    known = [call.name for call in calls()]
    unknown = [name for name in options.only or [] if name not in known]
    if unknown:
        parser.error(f"--only: {', '.join(unknown)} unknown; there are {', '.join(known)}")
    tasks = [(name, a) for name in options.only or known for a in options.architectures]
    if options.tested:
        tasks = [(call.name, a) for call, a in compiled_in_tests() if a in options.architectures]
    rows = compile_all(tasks, options.jobs)
    if options.json is not None:
        options.json.write_text(json.dumps([row.as_json() for row in rows], indent=1) + "\n")
    else:
        versions = {name: machine.versions()[name] for name in ("triton", "torch")}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(markdown(rows, versions))
        print(f"wrote {options.out}")
    wrong = problems(rows)
    for line in wrong:
        print(f"FAILED: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
