"""Launches of the forward of `policy`, in parts that `policy_divergence` runs for both sides."""

from __future__ import annotations

from torch import Tensor

from ....runtime import triton_runtime
from ....runtime.triton_runtime import Tile
from ..arguments import PolicyArgs
from ..chunks import clear_packed
from . import tiles
from .fwd_kernels import policy_fwd_kernel, policy_fwd_spans_kernel
from .launch import NO_TARGET, Keys, Side, cdiv, row_chunks, splits_of
from .parameters import Target
from .statistics import policy_normaliser_kernel, policy_statistics_kernel


def statistics(side: Side, keys: Keys, norm: Tensor, z: Tensor) -> None:
    """Write norm [2, B, H, T] and z [B, T]."""
    partial: Tensor = norm

    def run(tile: Tile) -> None:
        nonlocal partial
        programs = keys.row_blocks(tile.block_q, side.batch_size) * side.num_heads
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
            "head_weights": side.weights(),
            "samples": keys.samples(side.batch_size),
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
    clear_packed(args, p)
    side, keys = Side.of(args), Keys.of(args)
    statistics(side, keys, norm, z)
    if args.span_ids is None:
        over_keys(side, keys, norm, z, p)
        return
    # Some rows at a time: p over keys is written and read once, beside the products of all heads.
    for chunk in row_chunks(keys, args.batch_size, args.q.device):
        batch, rows = chunk.batch, chunk.rows
        part, part_keys = side.part(chunk), keys.part(chunk)
        p_keys = part_keys.scratch(part)
        over_keys(part, part_keys, norm[:, batch, :, rows], z[batch, rows], p_keys)
        _over_spans(part, part_keys, p_keys, p[batch, rows])


def over_keys(
    side: Side, keys: Keys, norm: Tensor, z: Tensor, p: Tensor, target: Target = NO_TARGET
) -> Tensor | None:
    """Write p [B, T, N], but not beyond the keys of a packed row.

    One kernel serves both policies: equal inputs give equal bits. With a target, it writes ∂D/∂p
    instead; D is returned, in blocks of keys [blocks, B, T].
    """
    value_parts: Tensor | None = None

    def run(tile: Tile) -> None:
        nonlocal value_parts
        row_blocks = keys.row_blocks(tile.block_q, side.batch_size)
        key_blocks = cdiv(keys.seqlen_k, tile.block_k)
        if target is not NO_TARGET:
            value_parts = p.new_empty((key_blocks, *p.shape[:2]))
        triton_runtime.launch(
            policy_fwd_kernel,
            (row_blocks * key_blocks,),
            {
                **side.arguments(keys, tile),
                "prefix": side.prefix(),
                "norm": keys.norm(norm),
                "z": keys.per_row(z),
                "target": target._replace(value_parts_ptr=value_parts),
                "p": keys.outcomes(p),
            },
            tile.num_warps,
            tile.num_stages,
            fp_fusion=False,
        )

    run(side.tuned("heads", keys, run))
    return value_parts


def _over_spans(side: Side, keys: Keys, p_keys: Tensor, p: Tensor) -> None:
    tile = side.tile("spans")
    num_spans = p.shape[2]
    ids, stride = keys.per_key(side.span_ids)
    triton_runtime.launch(
        policy_fwd_spans_kernel,
        (keys.row_blocks(tile.block_q, side.batch_size) * cdiv(num_spans, tiles.SPANS),),
        {
            "p_keys": keys.outcomes(p_keys),
            "span_ids_ptr": ids,
            "span_ids_stride_b": stride,
            "p": keys.outcomes(p),
            "samples": keys.samples(side.batch_size),
            "num_rows": keys.num_rows,
            "seqlen_k": keys.seqlen_k,
            "num_spans": num_spans,
            "BLOCK_Q": tile.block_q,
            "BLOCK_K": tile.block_k,
            "BLOCK_S": tiles.SPANS,
        },
        tile.num_warps,
        tile.num_stages,
    )
