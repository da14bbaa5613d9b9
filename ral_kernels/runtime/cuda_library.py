"""What the `cuda` backends of all ops share: the library, what it can run, its errors."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from ctypes import c_char_p, c_int32
from typing import Any

import torch
from torch import Tensor

from . import c_interface, checks, native

HEAD_DIMS = (64, 128)
COMPUTED = (torch.bfloat16, torch.float16)
ALIGNMENT = 16  # bytes that one copy to shared memory moves
# Whether the kernels have run on a GPU. Until then `backend=None` skips them (only_on_request).
MEASURED = False
NOT_TAKEN = -2  # kNotTaken of csrc/cuda/core/launch.h


@functools.cache
def library() -> ctypes.CDLL:
    """`ral_cuda`.

    Raises:
        RuntimeError: it is missing or does not load.
    """
    found = native.load("ral_cuda")
    found.ral_cuda_error_string.argtypes = [c_int32]
    found.ral_cuda_error_string.restype = c_char_p
    found.ral_cuda_failed_kernel.restype = c_char_p
    return found


def checked(symbol: str, structs: Sequence[type[ctypes.Structure]]) -> ctypes.CDLL:
    """The library, after a check that its structs are those that this package fills."""
    c_interface.check_struct_sizes(library(), symbol, structs)
    return library()


def available(load: Callable[[], Any] | None = None) -> str | None:
    """None if the kernels can run on this machine, else the reason why not.

    Args:
        load: loads the library; the default is `library`.
    """
    try:
        (load or library)()
    except RuntimeError as error:
        return str(error)
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.hip is not None:
        return f"supports NVIDIA GPUs; got torch for ROCm {torch.version.hip}"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"needs compute capability 8.0 or newer; got {capability[0]}.{capability[1]}"
    return _driver_too_old()


def _driver_too_old() -> str | None:
    """Why the driver cannot serve the CUDA runtime that the library is linked with; None if it can.

    A driver serves every runtime of its own major version and of those before it.
    """
    versions = (c_int32 * 2)()
    library().ral_cuda_versions(versions)
    driver, runtime = versions
    if driver // 1000 >= runtime // 1000:
        return None
    return (
        f"the library is linked with CUDA {_dotted(runtime)}; got a driver for CUDA "
        f"{_dotted(driver)}: update the driver, or build with an older nvcc"
    )


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def only_on_request() -> str | None:
    """Why the automatic choice skips these kernels; None if it does not."""
    if MEASURED:
        return None
    return "its kernels have run on no GPU yet, so no measurement says where they are fastest"


def hopper() -> str | None:
    """None if the kernels for Hopper are on for the current device, else the reason why not."""
    if os.environ.get("RAL_CUDA_HOPPER", "0") in ("", "0"):
        return (
            "off until it has passed `make gpu` on a Hopper GPU; RAL_CUDA_HOPPER=1 switches it on"
        )
    reason = available()
    if reason is not None:
        return reason
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return f"needs compute capability 9.0; got {capability[0]}.{capability[1]}"
    return hopper_missing()


def hopper_missing() -> str | None:
    """Why `ral_cuda` was built without kernels for Hopper; None if it has them."""
    try:
        why = library().ral_cuda_hopper_missing
    except AttributeError:
        return "the library was built from other sources than this package"
    why.restype = c_char_p
    missing: bytes | None = why()
    return None if missing is None else missing.decode()


def cannot_run(*tensors: Tensor, head_dims: Sequence[int] = HEAD_DIMS) -> str | None:
    """Why the kernels cannot run on these queries, keys and values; None if they can."""
    if not tensors[0].is_cuda:
        return checks.wrong_device("CUDA", tensors[0].device)
    return cannot_compute(*tensors, head_dims=head_dims)


def cannot_compute(*tensors: Tensor, head_dims: Sequence[int] = HEAD_DIMS) -> str | None:
    """The same for dtypes and head dims alone, on any device."""
    for tensor in tensors:
        if tensor.dtype not in COMPUTED:
            return f"supports bfloat16 and float16; got {checks.dtype_name(tensor.dtype)}"
        if tensor.shape[-1] not in head_dims:
            if isinstance(head_dims, range):
                supported = f"{head_dims[0]} to {head_dims[-1]} in steps of {head_dims.step}"
            else:
                supported = f"{', '.join(map(str, head_dims[:-1]))} and {head_dims[-1]}"
            return f"head dims {supported} are supported; got {tensor.shape[-1]}"
    return None


def aligned(x: Tensor) -> Tensor:
    """`x`, or a copy of it, with rows that begin at multiples of 16 bytes."""
    size = x.element_size()
    strides = [x.stride(d) * size for d in range(x.dim() - 1) if x.shape[d] > 1]
    if x.stride(-1) == 1 and not any(n % ALIGNMENT for n in (x.data_ptr(), *strides)):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def scratch(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised float32 memory on the device of `like`."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """A context in which launches go to the device of `x`."""
    if x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def multiprocessors(x: Tensor) -> int:
    """How many the device of `x` has."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def has_too_little_shared_memory(x: Tensor, size: int) -> str | None:
    """Why the device of `x` has no room for a CTA of `size` bytes; None if it has."""
    properties = torch.cuda.get_device_properties(x.device)
    found = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    if found >= size:
        return None
    return (
        f"head dims above 128 need {size >> 10} KiB of shared memory a CTA; this GPU has "
        f"{found >> 10} KiB"
    )


def stream(x: Tensor) -> int:
    """The current stream of the device of `x`."""
    return int(torch.cuda.current_stream(x.device).cuda_stream)


def raise_for_status(op: str, status: int, **tensors: Tensor) -> None:
    """Turn a launch's status into an exception that names op, kernel and shapes."""
    if status != 0:
        kernel = library().ral_cuda_failed_kernel().decode()
        reason = library().ral_cuda_error_string(status).decode()
        shapes = c_interface.shapes(tensors)
        raise RuntimeError(f"{op}: backend 'cuda' failed: {kernel}: {reason}; {shapes}")
