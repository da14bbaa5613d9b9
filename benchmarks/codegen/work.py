"""Calls -> rows of facts, in processes beside each other."""

from __future__ import annotations

import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from ral_kernels.ops.attention.triton import tiles as attention_tiles
from ral_kernels.ops.policy.triton import tiles as policy_tiles
from ral_kernels.runtime import triton_runtime
from ral_kernels.runtime.triton_runtime import Launch, Tile

from .calls import COMPILED, COUNTED, Call, Sizes, calls
from .compiler import compile_launches, failure
from .table import Row


@dataclass(frozen=True)
class Task:
    """A call to compile for an architecture."""

    call: str
    architecture: str
    kernel: str | None = None  # this one alone
    with_loops: bool = False
    tile: tuple[int, ...] | None = None  # rows, keys, warps and stages in place of the table's


def rows_of(call: Call, task: Task) -> list[Row]:
    """Record the launches of a call, and compile them."""
    try:
        launches = _recorded(call, task)
        facts = compile_launches(launches, task.architecture, task.with_loops)
    except Exception as error:  # a call that cannot even be recorded: one row says why
        facts = [failure("(the call)", task.architecture, error)]
    counted = _programs(task) if task.with_loops else {}
    return [
        Row(call.op, call.variant, call.dtype, call.head_dim, fact, counted.get(fact.kernel, ()))
        for fact in facts
    ]


def _recorded(call: Call, task: Task) -> list[Launch]:
    with triton_runtime.record_launches(task.architecture) as launches, _tile(task.tile):
        call.run()
    return [x for x in launches if task.kernel in (None, x.name)]


def _programs(task: Task) -> dict[str, tuple[str, ...]]:
    """Kernel -> its programs at each of the sizes COUNTED; several where it is launched so."""
    found: dict[str, list[str]] = {}
    for place, sizes in enumerate(COUNTED):
        launched: dict[str, list[int]] = {}
        for launch in _recorded(_call(task.call, sizes), task):
            launched.setdefault(launch.name, []).append(math.prod(launch.grid))
        for kernel, programs in launched.items():
            row = found.setdefault(kernel, [""] * len(COUNTED))
            row[place] = ", ".join(map(str, dict.fromkeys(programs)))
    return {kernel: tuple(row) for kernel, row in found.items()}


@contextmanager
def _tile(sizes: tuple[int, ...] | None) -> Iterator[None]:
    """Inside, every kernel of attention and policy has this tile; flags are those of the table."""
    if sizes is None:
        yield
        return
    block_q, block_k, num_warps, num_stages = sizes

    def changed(table: Callable[..., Tile]) -> Callable[..., Tile]:
        def find(*key: Any) -> Tile:
            return Tile(block_q, block_k, num_warps, num_stages, table(*key).flags)

        return find

    with ExitStack() as stack:
        for module in (attention_tiles, policy_tiles):
            stack.enter_context(mock.patch.object(module, "tile", changed(module.tile)))
        yield


def _call(name: str, sizes: Sizes = COMPILED) -> Call:
    (call,) = (call for call in calls(sizes) if call.name == name)
    return call


def _work(task: Task) -> list[Row]:
    torch.set_num_threads(1)
    return rows_of(_call(task.call), task)


def compile_all(tasks: Sequence[Task], jobs: int) -> list[Row]:
    """The rows of the tasks, in their order; `jobs` processes share the work."""
    found: list[Row] = []
    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for index, rows in enumerate(pool.map(_work, tasks)):
            found += rows
            seconds = time.perf_counter() - start
            task = tasks[index]
            what = f"{index + 1}/{len(tasks)} {task.architecture} {task.call}"
            print(f"{seconds:6.0f} s  {what}: {len(rows)} kernels", file=sys.stderr, flush=True)
    return found
