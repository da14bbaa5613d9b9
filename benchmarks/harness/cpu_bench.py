"""What the CPU benches share: options and interleaved timing."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import machine, results
from .examine import leaves, run_once
from .objective import Objective, Problem

CPU = torch.device("cpu")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser, quick: str) -> None:
    """The options of every bench; `quick` as in `results.add_arguments`."""
    parser.add_argument("--threads", type=int, help="threads of torch")
    results.add_arguments(parser, quick)


def add_keep_memory(parser: argparse.ArgumentParser) -> None:
    """The option of benches whose contestants allocate megabytes in every call."""
    parser.add_argument(
        "--keep-memory", action="store_true",
        help="freed memory stays with the process, so that page faults are not timed",
    )  # fmt: skip


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse, and apply the options to the process.

    Raises:
        RuntimeError: --keep-memory where the allocator is not glibc's.
    """
    options = results.parse(parser, arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if getattr(options, "keep_memory", False):
        machine.keep_freed_memory()
    return options


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
