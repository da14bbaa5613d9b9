"""Triton kernels of `divergence`: one sweep over the rows, and the end of rows cut in pieces."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ....runtime import triton_runtime
from ....runtime.triton_spans import num_blocks, sequence_of_block
from ..arguments import KINDS
from . import tiles
from .terms import divergence_gradient, divergence_gradient_of_r, divergence_terms


@dataclass(frozen=True)
class RowEnds:
    """Where rows end that belong to packed sequences: sequence n has numbers of its own length."""

    row_offsets: Tensor  # int32 [S + 1], the first row of each sequence
    offsets: Tensor  # int32 [S + 1], whose differences are the lengths


@triton.jit(do_not_specialize=["num_rows", "length_per_split"])
def divergence_fwd_kernel(
    p_ptr,
    r_ptr,
    partial_ptr,
    dp_ptr,
    dr_ptr,
    row_offsets_ptr,
    offsets_ptr,
    num_sequences,
    num_rows,
    length,
    row_stride,
    length_per_split,
    KIND: tl.constexpr,
    GENERALISED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum the terms of a piece of BLOCK_R rows into partial [splits, rows]; write dp and dr.

    With GENERALISED, terms of kl keep − p + r, and those of reverse_kl − r + p. Over rows that sum
    to 1 these vanish, and gradients have no constant. dp may be p. Rows of packed sequences
    (`RowEnds`) end where their sequence's do; what lies beyond is neither read nor written.
    """
    split = tl.program_id(1)
    start = split.to(tl.int64) * length_per_split
    if row_offsets_ptr is None:
        offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask_r = offs_r < num_rows
        stop = tl.minimum(start + length_per_split, length)
    else:
        n, first_row, own_rows, block = sequence_of_block(
            row_offsets_ptr, num_sequences, tl.program_id(0), BLOCK_R
        )
        offs_r = block * BLOCK_R + tl.arange(0, BLOCK_R)
        mask_r = offs_r < own_rows
        offs_r = first_row.to(tl.int64) + offs_r
        own_length = tl.load(offsets_ptr + n + 1) - tl.load(offsets_ptr + n)
        own_length = tl.where(block * BLOCK_R < own_rows, own_length, 0)
        stop = tl.minimum(start + length_per_split, own_length)
    value = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for first in range(start, stop, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        offsets = offs_r[:, None] * row_stride + offs_n[None, :]
        mask = mask_r[:, None] & (offs_n < stop)[None, :]
        # [BLOCK_R, BLOCK_N]
        p = tl.load(p_ptr + offsets, mask=mask, other=0.0)
        r = tl.load(r_ptr + offsets, mask=mask, other=0.0)
        value += divergence_terms(p, r, KIND, GENERALISED)
        if dp_ptr is not None:
            dp = divergence_gradient(p, r, KIND, GENERALISED)  # (8) to (10)
            tl.store(dp_ptr + offsets, dp, mask=mask)
        if dr_ptr is not None:
            dr = divergence_gradient_of_r(p, r, KIND, GENERALISED)  # (11), (12)
            tl.store(dr_ptr + offsets, dr, mask=mask)
    tl.store(partial_ptr + split.to(tl.int64) * num_rows + offs_r, tl.sum(value, 1), mask=mask_r)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def divergence_rows_kernel(
    partial_ptr,
    value_ptr,
    dp_ptr,
    dr_ptr,
    num_rows,
    num_splits,
    length,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum the pieces of each row in order; a row of infinite value gets gradients of 0."""
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < num_rows
    value = tl.zeros([BLOCK_R], tl.float32)
    partial = partial_ptr + offs_r
    for _ in range(num_splits):
        # [BLOCK_R]
        value += tl.load(partial, mask=mask_r, other=0.0)
        partial += num_rows
    tl.store(value_ptr + offs_r, value, mask=mask_r)
    infinite = mask_r & (value == float("inf"))
    # Most blocks have no infinite row: their loop is empty.
    stop = tl.where(tl.max(infinite.to(tl.int32), 0) > 0, length, 0)
    for first in range(0, stop, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        offsets = offs_r[:, None] * length + offs_n[None, :]
        mask = infinite[:, None] & (offs_n < length)[None, :]
        zero = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
        if dp_ptr is not None:
            tl.store(dp_ptr + offsets, zero, mask=mask)
        if dr_ptr is not None:
            tl.store(dr_ptr + offsets, zero, mask=mask)


def sweep(
    p: Tensor,
    r: Tensor,
    kind: str,
    generalised: bool,
    dp: Tensor | None,
    dr: Tensor | None,
    ends: RowEnds | None = None,
) -> Tensor:
    """The sums [pieces, rows] of rows p and r [rows, N], in order; write dp and dr where given.

    All have the strides of p.
    """
    num_rows, length = p.shape
    tile = _tile(p)
    multiprocessors = triton_runtime.num_multiprocessors(p.device)
    splits = tiles.num_splits(tile, num_rows, length, multiprocessors)
    per_split = -(-num_blocks(length, tile.block_n, None) // splits) * tile.block_n
    splits = num_blocks(length, per_split, None)
    partial = p.new_empty((splits, num_rows))
    num_sequences = None if ends is None else ends.row_offsets.shape[0] - 1
    row_blocks = num_blocks(num_rows, tile.block_r, num_sequences)
    # jsd(p, r) and jsd(r, p) agree bit for bit only if nothing is fused.
    triton_runtime.launch(
        divergence_fwd_kernel,
        (row_blocks, splits),
        {
            "p_ptr": p,
            "r_ptr": r,
            "partial_ptr": partial,
            "dp_ptr": dp,
            "dr_ptr": dr,
            "row_offsets_ptr": None if ends is None else ends.row_offsets,
            "offsets_ptr": None if ends is None else ends.offsets,
            "num_sequences": num_sequences,
            "num_rows": num_rows,
            "length": length,
            "row_stride": p.stride(0),
            "length_per_split": per_split,
            "KIND": KINDS.index(kind),
            "GENERALISED": generalised,
            "BLOCK_R": tile.block_r,
            "BLOCK_N": tile.block_n,
        },
        tile.num_warps,
        num_stages=2,
        fp_fusion=False,
    )
    return partial


def fwd(
    p: Tensor, r: Tensor, kind: str, value: Tensor, dp: Tensor | None, dr: Tensor | None
) -> None:
    """Write the value of each row and, where given, dp and dr for a gradient of 1."""
    partial = sweep(p, r, kind, False, dp, dr)
    num_rows, length = p.shape
    tile = _tile(p)
    finite = kind == "jsd"  # no gradients to take back
    triton_runtime.launch(
        divergence_rows_kernel,
        (num_blocks(num_rows, tile.block_r, None),),
        {
            "partial_ptr": partial,
            "value_ptr": value,
            "dp_ptr": None if finite else dp,
            "dr_ptr": None if finite else dr,
            "num_rows": num_rows,
            "num_splits": partial.shape[0],
            "length": length,
            "BLOCK_R": tile.block_r,
            "BLOCK_N": tile.block_n,
        },
        tile.num_warps,
        num_stages=2,
        fp_fusion=False,
    )


def _tile(p: Tensor) -> tiles.RowTile:
    return tiles.tile(triton_runtime.architecture(p.device), p.shape[1])
