"""The kernels of kernels_for_tests.cu, by name, each right or with a bug."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path

import torch

from tests.cuda_host.build import HARNESS, build
from tests.cuda_host.library import HostLibrary

VIOLATION = 1000  # what a launch returns that broke a rule

# As in kernels_for_tests.h.
Bug = IntEnum(
    "Bug",
    """none no_barrier no_second_barrier warp_barrier_only no_wait no_commit waits_for_too_few
    touched_in_flight copied_twice source_changes too_far too_low read_only misaligned never_written
    wrong_space wrong_lane ends_early other_collective warp_ends_early reads_others writes_others
    writes_what_others_read""",
    start=0,
)


class Arguments(ctypes.Structure):
    _fields_ = (
        ("bug", ctypes.c_int32),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
    )


class SmallKernels(HostLibrary):
    def launch(
        self,
        name: str,
        out: torch.Tensor | None = None,
        a: torch.Tensor | None = None,
        b: torch.Tensor | None = None,
        *,
        bug: Bug = Bug.none,
        num_blocks: int = 1,
        allow: bool = True,
    ) -> int:
        """Launch a kernel that reads `a` and `b` (ranges 0 and 1) and writes `out` (range 2)."""
        self.forget()
        if allow:
            self.allow(a, b)
            self.allow(out, writable=True)
        pointers = [None if x is None else x.data_ptr() for x in (a, b, out)]
        arguments = Arguments(bug, *pointers)
        status = self.functions.launch_for_tests(
            name.encode(), ctypes.c_int64(num_blocks), ctypes.byref(arguments)
        )
        assert status != -1, f"no kernel {name}"
        return status

    def reset(self) -> None:
        self.forget()
        self.clear()
        self.set_order(0)


@functools.cache
def small_kernels_in(folder: Path, flags: Sequence[str] = ()) -> SmallKernels:
    return SmallKernels(build([HARNESS / "kernels_for_tests.cu"], folder, flags=flags))
