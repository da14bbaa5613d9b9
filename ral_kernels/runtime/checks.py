"""Checks that ops share: messages name the op, the argument, what was wanted and what came."""

from __future__ import annotations

import functools
import math
import numbers
import sys
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

HALF_OR_FLOAT = (torch.float32, torch.bfloat16, torch.float16)

# Parameters, and what tensors are while a graph is traced. Kernels read the memory of a tensor, so
# a subclass that gives its memory another meaning would be misread.
_TENSOR_TYPES = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)

_KEYS = torch._C._TorchDispatchModeKey
_TRACING_MODES = (_KEYS.FAKE, _KEYS.FUNCTIONAL, _KEYS.PROXY)


def has_values(tensor: Tensor) -> bool:
    """Whether the elements can be read, and kept: not traced, fake, meta or under torch.func."""
    return not (
        torch.compiler.is_compiling()
        or tensor.is_meta
        or isinstance(tensor, (FakeTensor, FunctionalTensor))
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(torch._C._get_dispatch_mode(mode) is not None for mode in _TRACING_MODES)
    )


@functools.cache  # `choose` asks at every call
def wrong_device(wanted: str, device: torch.device) -> str:
    """Why a backend for one kind of device cannot run tensors of another kind."""
    return f"needs {wanted} tensors; got {device}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_int(value: Any) -> bool:
    """Whether an argument counts as an integer: symbolic and numpy's do, `True` does not."""
    return isinstance(value, (int, torch.SymInt, numbers.Integral)) and not isinstance(value, bool)


def to_int(value: Any) -> int:
    """An integer as `is_int` takes it, in Python's type; a symbolic one stays symbolic."""
    return cast(int, value) if isinstance(value, (int, torch.SymInt)) else int(value)


def to_number(value: Any) -> Any:
    """For drop-ins of functions that take a tensor of no dimensions as a number: its value."""
    if not isinstance(value, Tensor) or value.dim() > 0 or value.requires_grad:
        return value
    return value.item()


def is_plain(value: Any) -> bool:
    """Whether it is a dense tensor and of no subclass, which needs no other check."""
    return type(value) is Tensor and value.layout is torch.strided and not value.is_nested


def check_tensor(op: str, name: str, value: Any, what: str) -> None:
    """`value` must be a dense tensor, and of no subclass that kernels would misread."""
    if is_plain(value):
        return
    if type(value) is not Tensor:
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be {what}; got {type(value).__name__}")
        if type(value) not in _TENSOR_TYPES and not _waits_for_a_collective(value):
            raise TypeError(
                f"{op}: {name} must be {what}; got {type(value).__name__}, a subclass of Tensor "
                "that is not supported"
            )
    if value.layout is not torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{op}: {name} must be a dense tensor; got a {kind} one")


def _waits_for_a_collective(value: Any) -> bool:
    """Whether it is a result of torch.distributed's functional collectives: read, it waits."""
    module = sys.modules.get("torch.distributed._functional_collectives")
    return module is not None and type(value) is module.AsyncCollectiveTensor


def check_flag(op: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False; got {value!r}")


def check_same_device(op: str, name: str, tensor: Tensor, reference: Tensor, of: str) -> None:
    if tensor.device != reference.device:
        raise ValueError(
            f"{op}: {name} must be on the device of {of}, {reference.device}; got {tensor.device}"
        )


def check_unit_last_stride(op: str, name: str, tensor: Tensor) -> None:
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(
            f"{op}: {name} must have a unit last stride; got strides {tuple(tensor.stride())}, "
            "call .contiguous() on it"
        )


def check_broadcastable(
    op: str, name: str, tensor: Tensor, shape: tuple[int, ...], dims: str
) -> None:
    """`tensor` must broadcast to `shape`, whose axes `dims` names, e.g. `[B, H, T, N]`."""
    ok = tensor.dim() <= len(shape)
    if ok:
        for got, wanted in zip(reversed(tensor.shape), reversed(shape), strict=False):
            ok = ok and (got == wanted or got == 1)
    if not ok:
        raise ValueError(
            f"{op}: {name} must be broadcastable to {dims} = {tuple(shape)}; got "
            f"{tuple(tensor.shape)}"
        )


# Kernels hold the number in float32, and its reciprocal, and its product with log2 e.
_LEAST, _GREATEST = 2.0**-126, 2.0**126


def _finite_number(op: str, name: str, value: Any, wanted: str) -> float:
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return cast(float, value)  # a symbolic number has no value before the graph runs
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{op}: {name} must be {wanted}; got {type(value).__name__}")
    number = cast(float, value)
    # Comparisons alone: torch.compile traces them for a symbolic number, but not math.isfinite.
    if not _LEAST <= number <= _GREATEST:
        if 0 < number < math.inf:
            wanted += " that float32 holds, 2**-126 to 2**126"
        raise ValueError(f"{op}: {name} must be {wanted}; got {number}")
    return float(number)


def resolve_scale(op: str, scale: Any, head_dim: int, name: str = "scale") -> float:
    """The factor on the scores: `scale`, or 1/sqrt(head_dim)."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    return _finite_number(op, name, scale, "None or a finite number > 0")


def resolve_softcap(op: str, softcap: Any) -> float:
    """The soft cap of the scores; 0.0 means no soft cap."""
    if softcap is None:
        return 0.0
    return _finite_number(op, "softcap", softcap, "None or a finite number > 0")


FARTHEST = 2**31 - 1  # larger than every sequence length


def _window_bound(op: str, name: str, bound: Any) -> int:
    if bound is None:
        return -1
    if not is_int(bound):
        raise TypeError(
            f"{op}: {name} must hold integers or None; got {bound!r} of type {type(bound).__name__}"
        )
    if bound < -1:
        raise ValueError(f"{op}: {name} must hold bounds >= 0, or -1 for no bound; got {bound}")
    return min(to_int(bound), FARTHEST)  # kernels add it to positions


def resolve_window(op: str, window: Any, is_causal: bool, name: str = "window") -> tuple[int, int]:
    """(left, right) around the diagonal, -1 for no bound. `is_causal` sets right to 0."""
    left: int
    right: int
    if window is None:
        left, right = -1, -1
    elif is_int(window):
        left = right = _window_bound(op, name, window)
    elif isinstance(window, (tuple, list)):
        if len(window) != 2:
            raise ValueError(
                f"{op}: {name} must be None, an int or (left, right); got {len(window)} elements"
            )
        left, right = _window_bound(op, name, window[0]), _window_bound(op, name, window[1])
    else:
        raise TypeError(
            f"{op}: {name} must be None, an int or (left, right); got {type(window).__name__}"
        )
    return left, 0 if is_causal else right


def resolve_rows(op: str, rows: Any, seqlen_q: int, name: str = "rows") -> tuple[int, int]:
    """The half-open range of queries that `rows` picks: a slice of step 1 or (start, stop).

    Negative indices count from the end, as in Python. Unlike Python's slices it clamps nothing: a
    range that leaves the queries raises, because a clamped one would silently give fewer rows.
    """
    if rows is None:
        return 0, seqlen_q
    if isinstance(rows, slice):
        if rows.step is not None and rows.step != 1:
            raise ValueError(f"{op}: {name} must be a slice of step 1; got step {rows.step!r}")
        bounds = (rows.start, rows.stop)
    elif isinstance(rows, (tuple, list)):
        if len(rows) != 2:
            raise ValueError(f"{op}: {name} must be (start, stop); got {len(rows)} elements")
        bounds = (rows[0], rows[1])
    else:
        raise TypeError(
            f"{op}: {name} must be None, a slice of step 1 or (start, stop); got "
            f"{type(rows).__name__}"
        )
    for bound in bounds:
        if bound is not None and not is_int(bound):
            raise TypeError(f"{op}: {name} must hold integers; got {bound!r}")
    start, stop = (None if bound is None else to_int(bound) for bound in bounds)
    start = 0 if start is None else start + seqlen_q if start < 0 else start
    stop = seqlen_q if stop is None else stop + seqlen_q if stop < 0 else stop
    if not 0 <= start <= stop <= seqlen_q:
        raise ValueError(
            f"{op}: {name} must satisfy 0 <= start <= stop <= T={seqlen_q}; got {bounds[0]}, "
            f"{bounds[1]}"
        )
    return start, stop
