"""Launches of the backward of `policy`, in parts that `policy_divergence` uses too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....runtime import triton_runtime
from ....runtime.triton_runtime import Tile
from ..arguments import PolicyArgs
from ..chunks import clear_packed
from . import tiles
from .bwd_bias import policy_bwd_dspan_bias_kernel
from .bwd_kernels import policy_bwd_dk_kernel, policy_bwd_dq_join_kernel, policy_bwd_dq_kernel
from .bwd_rows import (
    policy_bwd_dhead_weights_kernel,
    policy_bwd_rows_kernel,
    policy_bwd_sums_kernel,
)
from .launch import Keys, Side, cdiv, splits_of
from .parameters import Parts, PerRow, RowTerms, Totals, ValueParts


@dataclass(frozen=True)
class RowGradient:
    """What the gradient of a row's scores needs beside dp. The row's weight is a factor of it."""

    factor: Tensor  # [B, T], 1 / (Z H), 0 for a row without gradient
    c: Tensor  # [B, T], (9)
    delta: Tensor  # [B, H, T], (11)

    @property
    def terms(self) -> RowTerms:
        return RowTerms(self.factor, self.c, self.delta)


@dataclass(frozen=True)
class Gradient:
    """A policy, and the gradient dp [B, T, N or S] that reaches it, as the kernels take them."""

    side: Side
    keys: Keys
    norm: Tensor  # [2, B, H, T]
    dp: Tensor

    def arguments(self, tile: Tile) -> dict[str, Any]:
        return {
            **self.side.arguments(self.keys, tile),
            "norm": self.keys.norm(self.norm),
            "dp": self.keys.outcomes(self.dp),
        }


def bwd(
    args: PolicyArgs,
    norm: Tensor,
    z: Tensor,
    dp: Tensor,
    dq: Tensor,
    dk: Tensor,
    dspan_bias: Tensor | None,
    dhead_weights: Tensor | None,
) -> None:
    """Write dq, dk and, where given, dspan_bias and dhead_weights."""
    clear_packed(args, dq, dk, dspan_bias)
    given = Gradient(Side.of(args), Keys.of(args), norm, dp)
    rows = rows_of(given.side, given.keys, *sums(given, z), z)
    assert rows is not None
    if dhead_weights is not None:
        weights_gradient(given.keys, rows.delta, dhead_weights)
    query_gradient(given, rows, dq)
    key_gradient(given, rows, None, dk)
    if dspan_bias is not None:
        _bias_gradient(given, rows, dspan_bias)


def sums(given: Gradient, z: Tensor) -> tuple[Tensor, Tensor]:
    """U_h and W_h of each piece of the keys, [splits, B, H, T]."""
    side, keys = given.side, given.keys
    partial: Tensor = z

    def run(tile: Tile) -> None:
        nonlocal partial
        programs = keys.row_blocks(tile.block_q, side.batch_size) * side.num_heads
        splits, per_split = splits_of(programs, keys.seqlen_k, tile.block_k, z.device)
        partial = z.new_empty((2, splits, side.batch_size, side.num_heads, keys.num_rows))
        triton_runtime.launch(
            policy_bwd_sums_kernel,
            (programs * splits,),
            {
                **given.arguments(tile),
                "z": keys.per_row(z),
                "partial_ptr": partial,
                "num_splits": splits,
                "keys_per_split": per_split,
            },
            tile.num_warps,
            tile.num_stages,
        )

    run(side.tuned("sums", keys, run))
    return partial[0], partial[1]


@dataclass(frozen=True)
class Compared:
    """What makes a row's gradient that of a divergence."""

    ref_z: Tensor  # [B, T]
    value_parts: Tensor  # [parts, B, T], sums over pieces of the keys
    weight: Tensor | None = None  # [B, T], what arrives for D
    value: Tensor | None = None  # [B, T], to write D to
    u: Tensor | None = None  # [B, H, T], to write U and W to, both or none
    w: Tensor | None = None


def _per_row(x: Tensor | None) -> PerRow:
    return PerRow(None, 0) if x is None else PerRow(x, x.stride(0))


_NOT_COMPARED: dict[str, Any] = {
    "ref_z": PerRow(None, 0),
    "value_parts": ValueParts(None, 0, 0),
    "num_value_parts": 0,
    "weight": PerRow(None, 0),
    "value": PerRow(None, 0),
    "totals": Totals(None, None, 0, 0),
}


def rows_of(
    side: Side,
    keys: Keys,
    u_parts: Tensor,
    w_parts: Tensor,
    z: Tensor,
    compared: Compared | None = None,
    wants_gradient: bool = True,
) -> RowGradient | None:
    """Join the pieces [pieces, B, H, T] of U and W, and those of D; write D, U and W."""
    num_parts, batch_size, num_heads, num_rows = u_parts.shape
    stride_part, stride_b, stride_h = u_parts.stride()[:3]
    assert w_parts.stride()[:3] == (stride_part, stride_b, stride_h)
    rows = None
    if wants_gradient:
        factor, c = z.new_empty((2, batch_size, num_rows))
        rows = RowGradient(factor, c, z.new_empty((batch_size, num_heads, num_rows)))
    arguments = _NOT_COMPARED
    if compared is not None:
        value_parts, u = compared.value_parts, compared.u
        arguments = {
            "ref_z": _per_row(compared.ref_z),
            "value_parts": ValueParts(value_parts, *value_parts.stride()[:2]),
            "num_value_parts": value_parts.shape[0],
            "weight": _per_row(compared.weight),
            "value": _per_row(compared.value),
            "totals": Totals(u, compared.w, *((0, 0) if u is None else u.stride()[:2])),
        }
    triton_runtime.launch(
        policy_bwd_rows_kernel,
        (batch_size * cdiv(num_rows, tiles.ROWS),),
        {
            "parts": Parts(u_parts, w_parts, stride_part, stride_b, stride_h),
            "z": _per_row(z),
            **arguments,
            "terms": RowTerms(None, None, None) if rows is None else rows.terms,
            "head_weights": side.weights(),
            "samples": keys.samples(batch_size),
            "num_heads": num_heads,
            "num_rows": num_rows,
            "num_parts": num_parts,
            "BLOCK_R": tiles.ROWS,
        },
        num_warps=2,
        num_stages=1,
    )
    return rows


def weights_gradient(keys: Keys, delta: Tensor, dhead_weights: Tensor) -> None:
    """Write dhead_weights [B, H], or [S, H] of packed sequences, from δ of all rows [B, H, T]."""
    triton_runtime.launch(
        policy_bwd_dhead_weights_kernel,
        (dhead_weights.numel(),),
        {
            "delta_ptr": delta,
            "dhead_weights_ptr": dhead_weights,
            "samples": keys.samples(delta.shape[0]),
            "num_heads": delta.shape[1],
            "num_rows": keys.num_rows,
            "BLOCK_R": tiles.ROWS,
        },
        num_warps=2,
        num_stages=1,
    )


def query_gradient(given: Gradient, rows: RowGradient, dq: Tensor) -> None:
    """Write dq. Where rows and heads are too few for the device, programs share the keys, too."""
    side, keys = given.side, given.keys
    parts = dq[None]

    def run(tile: Tile) -> None:
        nonlocal parts
        programs = keys.row_blocks(tile.block_q, side.batch_size) * side.num_heads
        splits, per_split = splits_of(programs, keys.seqlen_k, tile.block_k, dq.device)
        parts = dq[None]
        if splits > 1:
            parts = dq.new_empty((splits, *dq.shape), dtype=torch.float32)
        triton_runtime.launch(
            policy_bwd_dq_kernel,
            (programs * splits, cdiv(side.padded_head_dim, side.features(tile))),
            {
                **given.arguments(tile),
                "terms": rows.terms,
                "dq": keys.rows(parts[0]),
                "dq_stride_split": parts.stride(0),
                "keys_per_split": per_split,
            },
            tile.num_warps,
            tile.num_stages,
        )

    run(side.tuned("dq", keys, run))
    if parts.shape[0] == 1:
        return
    block_r = tiles.JOINED_ROWS
    triton_runtime.launch(
        policy_bwd_dq_join_kernel,
        (cdiv(keys.num_rows, block_r) * side.num_heads * side.batch_size,),
        {
            "parts_ptr": parts,
            "dq": keys.rows(dq),
            "samples": keys.samples(side.batch_size),
            "num_heads": side.num_heads,
            "num_rows": keys.num_rows,
            "num_splits": parts.shape[0],
            "head_dim": side.q.shape[3],
            "HEAD_DIM": side.padded_head_dim,
            "BLOCK_R": block_r,
        },
        num_warps=4,
        num_stages=1,
    )


def key_gradient(given: Gradient, rows: RowGradient, before: Tensor | None, dk: Tensor) -> None:
    """Write dk; `before` is the sum over earlier rows, float32 [B, Hk, N, D], and may be dk."""
    side, keys = given.side, given.keys

    def run(tile: Tile) -> None:
        programs = keys.key_blocks(tile.block_k, side.batch_size) * side.num_kv_heads
        triton_runtime.launch(
            policy_bwd_dk_kernel,
            (programs, cdiv(side.padded_head_dim, side.features(tile))),
            {
                **given.arguments(tile),
                "terms": rows.terms,
                "before_ptr": before,
                "dk": keys.rows(dk),
            },
            tile.num_warps,
            tile.num_stages,
        )

    # A search repeats the launch, which would add to `before` each time.
    run(side.tuned("dk", keys, run) if before is None else side.tile("dk"))


def _bias_gradient(given: Gradient, rows: RowGradient, dspan_bias: Tensor) -> None:
    side, keys = given.side, given.keys
    tile = side.tile("bias")
    span_blocks = cdiv(dspan_bias.shape[3], tiles.SPANS)
    row_blocks = keys.row_blocks(tile.block_q, side.batch_size)
    triton_runtime.launch(
        policy_bwd_dspan_bias_kernel,
        (row_blocks * span_blocks * side.num_heads,),
        {
            **given.arguments(tile),
            "terms": rows.terms,
            "dspan_bias_ptr": dspan_bias,
            "num_spans": dspan_bias.shape[3],
            "BLOCK_S": tiles.SPANS,
        },
        tile.num_warps,
        tile.num_stages,
    )
