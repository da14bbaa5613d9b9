"""What every compiled library shares: the structs of csrc/include/ral, filled from tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import c_int64, c_void_p

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


def tensor_struct(x: Tensor | None) -> TensorStruct:
    return TensorStruct() if x is None else TensorStruct(x.data_ptr(), *x.stride()[:3])


def broadcast_struct(x: Tensor | None) -> BroadcastStruct:
    return BroadcastStruct() if x is None else BroadcastStruct(x.data_ptr(), *x.stride())


def pointer(x: Tensor | None) -> int | None:
    return None if x is None or x.numel() == 0 else x.data_ptr()


def shapes(tensors: Mapping[str, Tensor]) -> str:
    """For messages."""
    return ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())


def check_struct_sizes(
    library: ctypes.CDLL, symbol: str, structs: Sequence[type[ctypes.Structure] | None]
) -> None:
    """Refuse a library whose structs are not the ones that this package fills.

    Args:
        structs: in the order in which `symbol` writes their sizes; None for one of another op.
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
