"""Compile every Triton kernel ahead of time and write what came out.

    python -m benchmarks.codegen                 # all of it, and benchmarks/results/codegen.md
    python -m benchmarks.codegen --json F --only "attention spans bfloat16 128"
    python -m benchmarks.codegen --kernel attention_fwd --variant spans --arch 90

`--kernel` compiles one kernel and prints its main loops; `--tile 128,64,8,3` tries a tile that is
not in the table. `--borders` compiles nothing: it prints how many blocks of keys hold a border of
spans, in the layouts of the sweeps, at 16,384 keys.

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

from .borders import border_table
from .calls import calls, compiled_in_tests
from .table import loop_table, markdown, problems
from .work import Task, compile_all

RESULT = Path(__file__).resolve().parents[1] / "results" / "codegen.md"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=RESULT, help="the table (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the facts here, and no table")
    parser.add_argument("--only", nargs="+", metavar="CALL", help="some calls, by name")
    parser.add_argument("--tested", action="store_true", help="what the tests look at")
    parser.add_argument(
        "--architectures", "--arch", nargs="+", type=_architecture, metavar="sm_XX",
        default=triton_runtime.ARCHITECTURES,
    )  # fmt: skip
    parser.add_argument("--kernel", help="print the main loops of this kernel alone")
    parser.add_argument("--variant", nargs="+", help="with --kernel: in these variants")
    parser.add_argument("--dtype", default="bfloat16", help="with --kernel (default: %(default)s)")
    parser.add_argument(
        "--head-dim", type=int, default=128, help="with --kernel (default: %(default)s)"
    )
    parser.add_argument("--tile", type=_tile, help="with --kernel: rows,keys,warps,stages")
    parser.add_argument("--borders", action="store_true", help="print blocks with a border alone")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)
    if triton_runtime.interpreted():
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing")
    if importlib.util.find_spec("triton") is None:
        parser.error("triton is not installed (pip install triton)")
    if options.borders:
        print("\n".join(border_table(16384)))
        return 0
    tested = [(call.name, architecture) for call, architecture in compiled_in_tests()]
    known = [call.name for call in calls()]
    unknown = [name for name in options.only or [] if name not in known]
    if unknown:
        parser.error(f"--only: {', '.join(unknown)} unknown; there are {', '.join(known)}")
    if options.kernel is not None:
        return _one_kernel(parser, options)
    with_loops = options.json is None
    tasks = [
        Task(call.name, architecture, with_loops=with_loops and call.dtype == "bfloat16")
        for call in calls()
        for architecture in options.architectures
        if call.name in (options.only or known)
        and (not options.tested or (call.name, architecture) in tested)
    ]
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


def _one_kernel(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Print the main loops of one kernel, in the calls that launch it."""
    kernel = options.kernel.removesuffix("_kernel") + "_kernel"
    tasks = [
        Task(call.name, architecture, kernel, with_loops=True, tile=options.tile)
        for call in calls()
        if (call.dtype, call.head_dim) == (options.dtype, options.head_dim)
        and call.variant in (options.variant or [call.variant])
        and kernel.startswith(call.op.partition("_")[0])
        for architecture in options.architectures
    ]
    rows = compile_all(tasks, min(options.jobs, len(tasks))) if tasks else []
    if not rows:
        parser.error(f"--kernel: no call with these options launches {kernel}")
    print("\n".join(loop_table(rows)))
    wrong = problems(rows)
    for line in wrong:
        print(f"FAILED: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _architecture(text: str) -> str:
    return f"sm_{text.removeprefix('sm_')}"


def _tile(text: str) -> tuple[int, ...]:
    rows, keys, warps, stages = map(int, text.split(","))
    return rows, keys, warps, stages


if __name__ == "__main__":
    sys.exit(main())
