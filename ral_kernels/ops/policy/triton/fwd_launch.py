"""Launches of the forward of `policy`, in parts that `policy_divergence` runs for both sides."""

from __future__ import annotations

import torch
from torch import Tensor

from ....runtime import triton_runtime
from ....runtime.triton_runtime import Tile
from ..arguments import PolicyArgs
from . import tiles
from .fwd_kernels import policy_fwd_kernel, policy_fwd_spans_kernel
from .launch import Keys, Side, cdiv, outcomes, per_row, row_chunks, splits_of, with_stride_b
from .parameters import Norm
from .statistics import policy_normaliser_kernel, policy_statistics_kernel


def statistics(side: Side, keys: Keys, norm: Tensor, z: Tensor) -> None:
    """Write norm [2, B, H, T] and z [B, T]."""
    partial: Tensor = norm

    def run(tile: Tile) -> None:
        nonlocal partial
        programs = cdiv(keys.num_rows, tile.block_q) * side.num_heads * side.batch_size
        splits, per_split = splits_of(programs, keys.seqlen_k, tile.block_k, norm.device)
        partial = norm.new_empty((3, splits, side.batch_size, side.num_heads, keys.num_rows))
        # Without FMAs: the kernel with a shared prefix must give the same sums as that without.
        triton_runtime.launch(
            policy_statistics_kernel,
            (programs * splits,),
            {
                **side.arguments(keys, tile),
                "prefix": side.prefix(),
                "partial_ptr": partial,
                "batch_size": side.batch_size,
                "num_splits": splits,
                "keys_per_split": per_split,
            },
            tile.num_warps,
            tile.num_stages,
            fp_fusion=False,
        )

    run(side.tuned("statistics", keys, run))
    triton_runtime.launch(
        policy_normaliser_kernel,
        (side.batch_size * cdiv(keys.num_rows, tiles.ROWS),),
        {
            "partial_ptr": partial,
            "norm_ptr": norm,
            "z_ptr": z,
            "batch_size": side.batch_size,
            "num_heads": side.num_heads,
            "num_rows": keys.num_rows,
            "num_splits": partial.shape[1],
            "BLOCK_R": tiles.ROWS,
        },
        num_warps=2,
        num_stages=1,
        fp_fusion=False,
    )


def fwd(args: PolicyArgs, p: Tensor, norm: Tensor, z: Tensor) -> None:
    """Write the policy, norm and z."""
    side, keys = Side.of(args), Keys.of(args)
    statistics(side, keys, norm, z)
    if args.span_ids is None:
        over_keys(side, keys, norm, z, p)
        return
    # Some rows at a time: p over keys is written and read once, beside the products of all heads.
    block_q = side.tile("heads").block_q
    chunks = row_chunks(args.batch_size, args.num_rows, args.seqlen_k, block_q, args.q.device)
    for batch, rows in chunks:
        part, part_keys = side.part(batch, rows), keys.part(batch, rows)
        shape = (part.batch_size, part_keys.num_rows, args.seqlen_k)
        p_keys = torch.empty(shape, dtype=torch.float32, device=args.q.device)
        over_keys(part, part_keys, norm[:, batch, :, rows], z[batch, rows], p_keys)
        _over_spans(part, p_keys, p[batch, rows])


def over_keys(side: Side, keys: Keys, norm: Tensor, z: Tensor, p: Tensor) -> None:
    """Write p [B, T, N]. One kernel serves both policies: equal inputs give equal bits."""

    def run(tile: Tile) -> None:
        row_blocks = cdiv(keys.num_rows, tile.block_q)
        triton_runtime.launch(
            policy_fwd_kernel,
            (row_blocks * cdiv(keys.seqlen_k, tile.block_k) * side.batch_size,),
            {
                **side.arguments(keys, tile),
                "prefix": side.prefix(),
                "norm": Norm(norm, *norm.stride()[:3]),
                "z": per_row(z),
                "p": outcomes(p),
            },
            tile.num_warps,
            tile.num_stages,
            fp_fusion=False,
        )

    run(side.tuned("heads", keys, run))


def _over_spans(side: Side, p_keys: Tensor, p: Tensor) -> None:
    batch_size, num_rows, seqlen_k = p_keys.shape
    tile = side.tile("spans")
    num_spans = p.shape[2]
    ids, stride = with_stride_b(side.span_ids)
    triton_runtime.launch(
        policy_fwd_spans_kernel,
        (cdiv(num_rows, tile.block_q) * cdiv(num_spans, tiles.SPANS) * batch_size,),
        {
            "p_keys": outcomes(p_keys),
            "span_ids_ptr": ids,
            "span_ids_stride_b": stride,
            "p": outcomes(p),
            "num_rows": num_rows,
            "seqlen_k": seqlen_k,
            "num_spans": num_spans,
            "BLOCK_Q": tile.block_q,
            "BLOCK_K": tile.block_k,
            "BLOCK_S": tiles.SPANS,
        },
        tile.num_warps,
        tile.num_stages,
    )
