"""The structs that both compiled libraries share (csrc/include/ral), filled from tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from struct import Struct, calcsize
from typing import Any

import torch
from torch import Tensor

# ral_dtype
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}


class TensorStruct(ctypes.Structure):
    """`ral_tensor`: [batch, head, token, feature] with unit feature stride."""

    _fields_ = [("data", c_void_p), *((f"stride_{d}", c_int64) for d in "bht")]


class BroadcastStruct(ctypes.Structure):
    """`ral_broadcast`: [batch, head, query, key or span] with any strides."""

    _fields_ = [("data", c_void_p), *((f"stride_{d}", c_int64) for d in "bhts")]


_FORMATS = {c_void_p: "P", c_int64: "q", c_int32: "i", c_float: "f"}


def packer(struct: type[ctypes.Structure]) -> Callable[..., bytes]:
    """A function that takes the fields of `struct` by keyword and returns its bytes.

    It is quicker than ctypes. A pointer is an integer, 0 for NULL. A nested struct is a tuple of
    its fields.
    """
    names, formats = [], ""
    fields: Any = struct._fields_
    for name, kind in fields:
        nested = issubclass(kind, ctypes.Structure)
        names.append((name, f"*{name}" if nested else name))
        formats += "".join(_FORMATS[k] for _, k in kind._fields_) if nested else _FORMATS[kind]
    padding = ctypes.sizeof(struct) - calcsize(formats)
    pack = Struct(f"{formats}{padding}x").pack
    parameters, values = (", ".join(part) for part in zip(*names, strict=True))
    packed: Callable[..., bytes] = eval(f"lambda *, {parameters}: pack({values})", {"pack": pack})
    return packed


def tensor_fields(x: Tensor | None) -> tuple[int, ...]:
    """The fields of a TensorStruct."""
    if x is None:
        return 0, 0, 0, 0
    stride_b, stride_h, stride_t, _ = x.stride()
    return x.data_ptr(), stride_b, stride_h, stride_t


def broadcast_fields(x: Tensor | None) -> tuple[int, ...]:
    """The fields of a BroadcastStruct."""
    return (0, 0, 0, 0, 0) if x is None else (x.data_ptr(), *x.stride())


def tensor_struct(x: Tensor | None) -> TensorStruct:
    return TensorStruct(*tensor_fields(x))


def broadcast_struct(x: Tensor | None) -> BroadcastStruct:
    return BroadcastStruct(*broadcast_fields(x))


def address(x: Tensor | None) -> int:
    """The address of the first element; 0 for None and for a tensor without elements."""
    return 0 if x is None or x.numel() == 0 else x.data_ptr()


def shapes(tensors: Mapping[str, Tensor]) -> str:
    """The shapes of tensors, for messages."""
    return ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())


def check_struct_sizes(
    library: ctypes.CDLL, symbol: str, structs: Sequence[type[ctypes.Structure] | None]
) -> None:
    """Check that the structs of a library are those that this package fills.

    Args:
        structs: in the order in which `symbol` writes their sizes. None skips the struct of another
            op.

    Raises:
        RuntimeError: a size differs.
    """
    sizes = (c_int64 * len(structs))()
    getattr(library, symbol)(sizes)
    expected = [
        size if struct is None else ctypes.sizeof(struct)
        for size, struct in zip(sizes, structs, strict=True)
    ]
    if list(sizes) != expected:
        raise RuntimeError(
            f"{library._name} was built from other sources than this package ({symbol}: "
            f"{list(sizes)}, expected {expected}); rebuild it with "
            "`python setup.py build_ext --inplace`"
        )
