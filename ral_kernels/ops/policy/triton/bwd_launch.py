"""Launches of the backward of `policy`, in parts that `policy_divergence` uses too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ral_kernels.runtime import triton_runtime
from ral_kernels.runtime.triton_runtime import Tile

from ..arguments import PolicyArgs
from . import tiles
from .bwd_kernels import policy_bwd_dk_kernel, policy_bwd_dq_join_kernel, policy_bwd_dq_kernel
from .bwd_bias import policy_bwd_dspan_bias_kernel
from .bwd_rows import policy_bwd_rows_kernel, policy_bwd_sums_kernel
from .launch import Keys, Side, blocks, cdiv, splits_of, tensor_arguments


@dataclass(frozen=True)
class Rows:
    """What the gradient of a row's scores needs beside dp; the weight of the row is in it."""

    factor: Tensor  # [B, T], 1 / (Z H), 0 for a row without gradient
    c: Tensor  # [B, T], (9)
    delta: Tensor  # [B, H, T], (11)

    def arguments(self) -> dict[str, Any]:
        return {"factor_ptr": self.factor, "c_ptr": self.c, "delta_ptr": self.delta}


@dataclass(frozen=True)
class Gradient:
    """A policy, and the gradient dp [B, T, N or S] that reaches it, as the kernels take them."""

    side: Side
    keys: Keys
    norm: Tensor  # [2, B, H, T]
    dp: Tensor

    def arguments(self) -> dict[str, Any]:
        return {
            **self.side.tensors(),
            **self.side.spans(),
            **self.side.view(self.keys),
            **self.keys.arguments(),
            **tensor_arguments("norm", self.norm, "ibh"),
            **tensor_arguments("dp", self.dp, "bt"),
        }


def bwd(
    args: PolicyArgs,
    norm: Tensor,
    z: Tensor,
    dp: Tensor,
    dq: Tensor,
    dk: Tensor,
    dspan_bias: Tensor | None,
) -> None:
    """Write dq, dk and, where asked for, dspan_bias."""
    given = Gradient(Side.of(args), Keys.of(args), norm, dp)
    rows = rows_of(*sums(given, z), z)
    assert rows is not None
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
        programs = cdiv(keys.num_rows, tile.block_q) * side.num_heads * side.batch_size
        splits, per_split = splits_of(programs, keys.seqlen_k, tile.block_k, z.device)
        partial = z.new_empty((2, splits, side.batch_size, side.num_heads, keys.num_rows))
        triton_runtime.launch(
            policy_bwd_sums_kernel,
            (programs * splits,),
            {
                **given.arguments(),
                **tensor_arguments("z", z, "b"),
                "partial_ptr": partial,
                "batch_size": side.batch_size,
                "num_splits": splits,
                "keys_per_split": per_split,
                **blocks(side, tile),
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


_NOT_COMPARED: dict[str, Any] = {
    "ref_z_ptr": None, "ref_z_stride_b": 0, "value_parts_ptr": None, "value_parts_stride_part": 0,
    "value_parts_stride_b": 0, "value_parts": 0, "weight_ptr": None, "weight_stride_b": 0,
    "value_ptr": None, "value_stride_b": 0, "u_total_ptr": None, "w_total_ptr": None,
    "total_stride_b": 0, "total_stride_h": 0,
}  # fmt: skip


def rows_of(
    u_parts: Tensor,
    w_parts: Tensor,
    z: Tensor,
    compared: Compared | None = None,
    wants_gradient: bool = True,
) -> Rows | None:
    """Join the pieces [pieces, B, H, T] of U and W, and those of D; write D, U and W."""
    num_parts, batch_size, num_heads, num_rows = u_parts.shape
    strides = u_parts.stride()[:3]
    assert w_parts.stride()[:3] == strides
    rows = None
    if wants_gradient:
        factor, c = z.new_empty((2, batch_size, num_rows))
        rows = Rows(factor, c, z.new_empty((batch_size, num_heads, num_rows)))
    arguments = _NOT_COMPARED
    if compared is not None:
        arguments = {
            **tensor_arguments("ref_z", compared.ref_z, "b"),
            **tensor_arguments("value_parts", compared.value_parts, ("part", "b")),
            "value_parts": compared.value_parts.shape[0],
            **tensor_arguments("weight", compared.weight, "b"),
            **tensor_arguments("value", compared.value, "b"),
            **tensor_arguments("total", compared.u, "bh"),
            "u_total_ptr": compared.u,
            "w_total_ptr": compared.w,
        }
        del arguments["total_ptr"]
    triton_runtime.launch(
        policy_bwd_rows_kernel,
        (batch_size * cdiv(num_rows, tiles.ROWS),),
        {
            "u_ptr": u_parts,
            "w_ptr": w_parts,
            **{f"parts_stride_{d}": s for d, s in zip(("part", "b", "h"), strides, strict=True)},
            **tensor_arguments("z", z, "b"),
            **arguments,
            **(rows.arguments() if rows else dict.fromkeys(("factor_ptr", "c_ptr", "delta_ptr"))),
            "num_heads": num_heads,
            "num_rows": num_rows,
            "num_parts": num_parts,
            "BLOCK_R": tiles.ROWS,
        },
        num_warps=2,
        num_stages=1,
    )
    return rows


def query_gradient(given: Gradient, rows: Rows, dq: Tensor) -> None:
    """Write dq, over pieces of the keys where there are too few rows and heads for the device."""
    side, keys = given.side, given.keys
    parts = dq[None]

    def run(tile: Tile) -> None:
        nonlocal parts
        sizes = blocks(side, tile)
        programs = cdiv(keys.num_rows, tile.block_q) * side.num_heads * side.batch_size
        splits, per_split = splits_of(programs, keys.seqlen_k, tile.block_k, dq.device)
        parts = dq[None]
        if splits > 1:
            parts = dq.new_empty((splits, *dq.shape), dtype=torch.float32)
        triton_runtime.launch(
            policy_bwd_dq_kernel,
            (programs * splits, cdiv(side.padded_head_dim, sizes["BLOCK_D"])),
            {
                **given.arguments(),
                **rows.arguments(),
                **tensor_arguments("dq", parts, "sbht"),
                "batch_size": side.batch_size,
                "keys_per_split": per_split,
                "scale": side.scale,
                **sizes,
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
            **tensor_arguments("dq", dq, "bht"),
            "batch_size": side.batch_size,
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


def key_gradient(given: Gradient, rows: Rows, before: Tensor | None, dk: Tensor) -> None:
    """Write dk; `before` is the sum over earlier rows, float32 [B, Hk, N, D], and may be dk."""
    side, keys = given.side, given.keys

    def run(tile: Tile) -> None:
        sizes = blocks(side, tile)
        programs = cdiv(keys.seqlen_k, tile.block_k) * side.num_kv_heads * side.batch_size
        triton_runtime.launch(
            policy_bwd_dk_kernel,
            (programs, cdiv(side.padded_head_dim, sizes["BLOCK_D"])),
            {
                **given.arguments(),
                **rows.arguments(),
                "before_ptr": before,
                **tensor_arguments("dk", dk, "bhn"),
                "scale": side.scale,
                **sizes,
            },
            tile.num_warps,
            tile.num_stages,
        )

    # A search repeats the launch, which would add to `before` each time.
    run(side.tuned("dk", keys, run) if before is None else side.tile("dk"))


def _bias_gradient(given: Gradient, rows: Rows, dspan_bias: Tensor) -> None:
    side, keys = given.side, given.keys
    tile = side.tile("bias")
    span_blocks = cdiv(dspan_bias.shape[3], tiles.SPANS)
    row_blocks = cdiv(keys.num_rows, tile.block_q)
    triton_runtime.launch(
        policy_bwd_dspan_bias_kernel,
        (row_blocks * span_blocks * side.num_heads * side.batch_size,),
        {
            **given.arguments(),
            **rows.arguments(),
            "dspan_bias_ptr": dspan_bias,
            "num_spans": dspan_bias.shape[3],
            **blocks(side, tile),
            "BLOCK_S": tiles.SPANS,
        },
        tile.num_warps,
        tile.num_stages,
    )
