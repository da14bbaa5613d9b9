"""What the libraries receive: packed bytes are the struct that ctypes lays out."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from ral_kernels.ops.attention import c_structs
from ral_kernels.runtime import c_interface

STRUCTS = pytest.mark.parametrize(
    "struct", (c_structs.Params, c_structs.Outputs, c_structs.Gradients), ids=lambda x: x.__name__
)


def distinct(struct: Any, counter: Iterator[int]) -> dict[str, Any]:
    """A value of its own for each field; for a nested struct a tuple of them."""
    values: dict[str, Any] = {}
    for name, kind in struct._fields_:
        if issubclass(kind, ctypes.Structure):
            values[name] = tuple(distinct(kind, counter).values())
        elif kind is ctypes.c_float:
            values[name] = next(counter) + 0.5
        else:
            # Wide fields get values that need their upper half.
            wide = ctypes.sizeof(kind) == 8
            values[name] = next(counter) + (2**40 if wide else 0)
    return values


def read(struct: ctypes.Structure) -> dict[str, Any]:
    """The fields in the form that `distinct` has."""
    values = {name: getattr(struct, name) for name, *_ in struct._fields_}
    return {
        name: tuple(read(x).values()) if isinstance(x, ctypes.Structure) else x
        for name, x in values.items()
    }


@STRUCTS
def test_every_field_lands_where_ctypes_has_it(struct: type[ctypes.Structure]) -> None:
    values = distinct(struct, itertools.count(1))
    packed = c_interface.packer(struct)(**values)
    assert len(packed) == ctypes.sizeof(struct)
    assert read(struct.from_buffer_copy(packed)) == values


@STRUCTS
def test_negative_numbers_and_null(struct: type[ctypes.Structure]) -> None:
    """A window without a bound is -1, and an absent tensor is all zeros."""
    pointers = {name for name, kind, *_ in struct._fields_ if kind is ctypes.c_void_p}
    zeros = {
        name: tuple(0 for _ in value) if isinstance(value, tuple) else 0 if name in pointers else -1
        for name, value in distinct(struct, itertools.count(1)).items()
    }
    found = struct.from_buffer_copy(c_interface.packer(struct)(**zeros))
    for name, value in read(found).items():
        if name in pointers:
            assert value is None  # how ctypes reads NULL
        elif isinstance(value, tuple):
            assert not any(value)
        else:
            assert value == -1


@STRUCTS
def test_fields_that_are_missing_or_unknown_raise(struct: type[ctypes.Structure]) -> None:
    pack = c_interface.packer(struct)
    values = distinct(struct, itertools.count(1))
    for name in values:
        with pytest.raises(TypeError, match=name):
            pack(**{other: x for other, x in values.items() if other != name})
    with pytest.raises(TypeError, match="unknown"):
        pack(**values, unknown=0)
