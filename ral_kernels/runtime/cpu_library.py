"""What the `cpu` backends of all ops share: the library, its structs, variants and errors."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from ctypes import c_char_p, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from . import c_interface, checks, native

COMPUTED = (torch.float32, torch.bfloat16, torch.float16)  # supported dtypes of q, k and v
_WORTH_ADVICE = 4 << 20  # bytes of an output: two huge pages
# ral_status
STATUS = {
    1: "out of memory for its scratch",
    2: "the chosen variant does not run on this processor",
    3: "pointers or sizes do not fit together",
    4: "a span id lies outside [-1, num_spans); were the ids changed after Spans checked them?",
    5: "a prefix_index of the snapshot lies outside [0, number of prefixes)",
    6: "cu_seqlens must start at 0, never decrease, and end within the tokens",
    7: "ids or index of the AttentionTarget are not what it checked; were they changed since?",
}
_FIRST_OF_THE_CALLER = 3  # statuses from here on are about arguments


@functools.cache
def library() -> ctypes.CDLL:
    """`ral_cpu`, told to run on torch's own threads.

    Raises:
        RuntimeError: it is missing or does not load.
    """
    found = native.load("ral_cpu")
    found.ral_cpu_isa_name.restype = c_char_p
    found.ral_cpu_set_openmp.argtypes = [c_void_p]
    found.ral_cpu_set_openmp(native.openmp_runtime())
    found.ral_cpu_tile_flops.argtypes = [c_int32, c_int32, c_int32, c_int64]
    found.ral_cpu_tile_flops.restype = c_int64
    found.ral_cpu_expect_writes.argtypes = [c_void_p, c_int64]
    found.ral_cpu_expect_writes.restype = None
    return found


def checked(symbol: str, structs: Sequence[type[ctypes.Structure] | None]) -> ctypes.CDLL:
    """The library, after a check that its structs are those that this package fills."""
    c_interface.check_struct_sizes(library(), symbol, structs)
    return library()


def available(load: Callable[[], object]) -> str | None:
    """None if `load` loads the library, else the reason why not."""
    try:
        load()
    except RuntimeError as error:
        return str(error)
    return None


def cannot_run(x: Tensor) -> str | None:
    """Why the kernels cannot run on a tensor of this device and dtype; None if they can."""
    if not x.is_cpu:
        return checks.wrong_device("CPU", x.device)
    if x.dtype not in COMPUTED:
        return f"supports float32, bfloat16 and float16; got {checks.dtype_name(x.dtype)}"
    return None


@functools.cache
def isas() -> dict[str, int]:
    """Variants that this processor runs, best first: name -> index in the library."""
    found, index = {}, 0
    while name := library().ral_cpu_isa_name(c_int32(index)):
        if library().ral_cpu_isa_supported(c_int32(index)):
            found[name.decode()] = index
        index += 1
    return found


@functools.cache
def _best_isa() -> int:
    advisable = library().ral_cpu_isa_advisable
    return next(index for index in isas().values() if advisable(c_int32(index)))


def supported_isas() -> list[str]:
    """Names of the variants that this machine runs, best first; `RAL_CPU_ISA` forces one."""
    return list(isas())


def chosen_isa() -> int:
    """Index of the variant to run: the best, or the one that `RAL_CPU_ISA` names."""
    forced = os.environ.get("RAL_CPU_ISA")
    if not forced:
        return _best_isa()
    supported = isas()
    if forced not in supported:
        raise RuntimeError(
            f"RAL_CPU_ISA must be one of {', '.join(supported)} on this machine; got {forced!r}"
        )
    return supported[forced]


def expect_writes(*outputs: Tensor | None) -> None:
    """Tell the system that every byte of these dense tensors is about to be written.

    With 64 spans at 8k tokens, a forward then has 1,100 page faults in place of 25,000. In bfloat16
    it takes 0.94x the time (Emerald Rapids, 2026-11). Outputs smaller than two huge pages are left
    alone, because their memory is rarely fresh.
    """
    for x in outputs:
        if x is not None and x.nbytes >= _WORTH_ADVICE:
            library().ral_cpu_expect_writes(x.data_ptr(), x.nbytes)


def run_tiles(dtype: torch.dtype, repeats: int) -> int:
    """Run the register tile of the matrix products on operands in L1.

    No op can exceed its rate on this machine. Benchmarks time it to say what bounds a kernel.

    Returns:
        How many floating-point operations it did.
    """
    return int(
        library().ral_cpu_tile_flops(
            chosen_isa(), c_interface.DTYPES[dtype], torch.get_num_threads(), repeats
        )
    )


def scratch(reset: bool = False) -> tuple[int, int]:
    """Bytes of scratch memory that the kernels took since the last reset.

    Returns:
        The largest allocation, and the sum of all.
    """
    sizes = (c_int64 * 2)()
    library().ral_cpu_scratch_sizes(sizes, c_int32(reset))
    return sizes[0], sizes[1]


def raise_for_status(op: str, status: int, **tensors: Tensor) -> None:
    """Turn a status of the library into an exception that names op and shapes."""
    if status != 0:
        reason = STATUS.get(status, f"status {status}")
        message = f"{op}: backend 'cpu' failed: {reason}; {c_interface.shapes(tensors)}"
        raise ValueError(message) if status >= _FIRST_OF_THE_CALLER else RuntimeError(message)
