"""Tensors of rows as Triton kernels take them, and how a tile of their rows is read and written.

Triton specialises each element of a tuple as it specialises a parameter: divisibility by 16, a
value of 1, None. `do_not_specialize` does not reach into a tuple, so what it names stays outside.
A launch pays for each element, so None stands for a tuple of what is not there.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """A tensor [B, H, T, D] with unit last stride; keys stand along T, too."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_t: Any

    @classmethod
    def of(cls, x: Tensor | None) -> Rows | None:
        return None if x is None else cls(x, *x.stride()[:3])


class SpanValues(NamedTuple):
    """A tensor [B, H, T, S], one value a span: a bias."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_t: Any
    stride_s: Any

    @classmethod
    def of(cls, x: Tensor | None) -> SpanValues | None:
        return None if x is None else cls(x, *x.stride())


class Head(NamedTuple):
    """The rows of one head, [T, D]."""

    ptr: Any
    stride: Any


class _Constant(tl.constexpr):
    """One object for each value, so that its identity is its hash: a launch hashes twenty."""

    __hash__ = object.__hash__


@functools.lru_cache(None, typed=True)
def constant(value: bool | int | str) -> Any:
    """A constant within a tuple, in place of an annotation."""
    return _Constant(value)


@triton.jit
def head_of(x, b, h):
    """The rows of head h of sample b; 0 where x is None, as functions return no None."""
    if x is None:
        return Head(0, 0)
    else:
        return Head(x.ptr + b * x.stride_b + h * x.stride_h, x.stride_t)


@triton.jit
def load_rows(
    head, rows, mask_rows, first_d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """A tile [rows, BLOCK_D], from feature first_d on; rows and features out of range are 0."""
    offs_d = first_d + tl.arange(0, BLOCK_D)
    pointers = head.ptr + rows.to(tl.int64)[:, None] * head.stride + offs_d[None, :]
    mask = mask_rows[:, None]
    if HEAD_DIM % BLOCK_D != 0:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_rows(
    head, rows, mask_rows, x, first_d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Write a tile [rows, BLOCK_D], from feature first_d on."""
    offs_d = first_d + tl.arange(0, BLOCK_D)
    pointers = head.ptr + rows.to(tl.int64)[:, None] * head.stride + offs_d[None, :]
    mask = mask_rows[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(pointers, x.to(head.ptr.dtype.element_ty), mask=mask)
