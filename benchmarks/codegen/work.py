"""Calls -> rows of facts, in processes beside each other."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import torch

from ral_kernels.runtime import triton_runtime

from .calls import Call, calls
from .compiler import compile_launches, failure
from .table import Row


def rows_of(call: Call, architecture: str) -> list[Row]:
    """Record the launches of a call, and compile them."""
    try:
        with triton_runtime.record_launches(architecture) as launches:
            call.run()
        facts = compile_launches(launches, architecture)
    except Exception as error:  # a call that cannot even be recorded: one row says why
        facts = [failure("(the call)", architecture, error)]
    return [Row(call.op, call.variant, call.dtype, call.head_dim, fact) for fact in facts]


def _work(task: tuple[str, str]) -> list[Row]:
    torch.set_num_threads(1)
    name, architecture = task
    (call,) = (call for call in calls() if call.name == name)
    return rows_of(call, architecture)


def compile_all(names: Sequence[tuple[str, str]], jobs: int) -> list[Row]:
    """The rows of (call, architecture) pairs, in their order; `jobs` processes share the work."""
    found: list[Row] = []
    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for index, rows in enumerate(pool.map(_work, names)):
            found += rows
            seconds = time.perf_counter() - start
            what = f"{index + 1}/{len(names)} {names[index][1]} {names[index][0]}"
            print(f"{seconds:6.0f} s  {what}: {len(rows)} kernels", file=sys.stderr, flush=True)
    return found
