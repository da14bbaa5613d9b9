"""What the CPU benches share: interleaved timing, the head of a run, its JSON."""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from typing import Any

import torch

from . import machine, results
from .examine import leaves, run_once
from .objective import Objective, Problem

CPU = torch.device("cpu")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every bench."""
    parser.add_argument("--threads", type=int, help="threads of torch")
    results.add_arguments(parser)


def add_keep_memory(parser: argparse.ArgumentParser) -> None:
    """The option of benches whose contestants allocate megabytes in every call."""
    parser.add_argument(
        "--keep-memory", action="store_true",
        help="freed memory stays with the process, so that page faults are not timed",
    )  # fmt: skip


def settle(options: argparse.Namespace) -> None:
    """Apply these options to the process.

    Raises:
        RuntimeError: --keep-memory where the allocator is not glibc's.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if getattr(options, "keep_memory", False):
        machine.keep_freed_memory()


def runner(objective: Objective, name: str, problem: Problem, backward: bool) -> Callable[[], Any]:
    """What is timed of a contestant."""
    call, inputs = objective.registry[name].prepare(problem), leaves(problem, backward)
    gradients = problem.output_gradients(gated=False)
    return lambda: run_once(objective, call, inputs, gradients, backward)


def interleave(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each; each repeat runs all of them once and starts with another one."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for call in runs.values():
        call()
    for repeat in range(repeats):
        turn = repeat % len(names)
        for name in [*names[turn:], *names[:turn]]:
            seconds[name].append(machine.clock(runs[name], CPU))
    return seconds


def begin(benchmark: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The head of a run: printed, and returned as the JSON has it."""
    run: dict[str, Any] = {
        "benchmark": benchmark,
        "machine": machine.describe(CPU),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "settings": settings,
    }
    facts = run["machine"]
    print(
        f"machine   {facts['cpu']}, {facts['threads']} threads of {facts['cores']} cores, "
        f"{' '.join(facts['vector_extensions'])}"
    )
    print("versions  " + ", ".join(f"{k} {v}" for k, v in run["versions"].items()))
    print(f"commit    {run['commit']['hash']}{' with changes' if run['commit']['dirty'] else ''}\n")
    return run


def write(run: dict[str, Any], options: argparse.Namespace) -> None:
    """Write the JSON of a run: one a machine and commit, and another with --keep-memory."""
    kept = "-kept" if run["settings"].get("keep_memory") else ""
    name = f"{run['benchmark']}{kept}-{run['commit']['hash'] or 'none'}.json"
    file = results.folder(options, run["machine"]) / name
    file.write_text(json.dumps(run, indent=1) + "\n")
    print(f"\nwritten to {file}")
