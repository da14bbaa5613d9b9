"""Tile sizes of the Triton kernels of `attention`."""

from __future__ import annotations

import dataclasses
import functools

import torch

from ....runtime.triton_runtime import INTERPRETER, Tile
from ....runtime.triton_tiles import ANY, FLOAT32, HALF, HEAD_DIMS, HEAVY, PLAIN, Row, find, row

KERNELS = ("fwd", "decode", "bwd_dkdv", "bwd_dq")


def head_dim_class(head_dim: int, head_dim_v: int) -> int:
    """64, 128 or 256: tables are by the larger of the head dims."""
    return next(size for size in HEAD_DIMS if size >= max(head_dim, head_dim_v))


# The interpreter takes time by the operation: few programs, but every test has block boundaries.
_INTERPRETED = {
    "fwd": Tile(64, 64, 4, 1),
    "decode": Tile(16, 64, 4, 1),
    "bwd_dkdv": Tile(32, 64, 4, 1),
    "bwd_dq": Tile(64, 64, 4, 1),
}
# Registers limit them all. Of the calls that tests compile none spills, with Triton 3.7.1, with
# 3.9.0, and on sm_90 with 3.6.0. wgmma and tcgen05 take 64 rows; a tile with fewer stands where
# each of 64 spilled, and mma.sync multiplies. Head dims 72 to 96 are padded to 128 and have its
# tiles.
# HEAVY: with span_bias or attn_mask. Decoding is bound by memory: one row serves both variants.
# On sm_90 ptxas serialises wgmma (C7515) in "fwd" with spans and head dims over 128. In "decode"
# the ptxas of 3.6.0 does so with (64, 32, 4), and 3.7.1 spills with (64, 64, 4).
# No tile has been compared with others on a GPU.
# fmt: off
_TABLE = (
    row("fwd", "sm_80", HALF, PLAIN, (128, 64, 8, 3), (128, 32, 8, 3), (32, 32, 8, 2)),
    row("fwd", "sm_80", HALF, HEAVY, (128, 32, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2)),
    row("fwd", "sm_80", FLOAT32, PLAIN, (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    row("fwd", "sm_80", FLOAT32, HEAVY, (32, 32, 8, 2), (32, 32, 8, 1), (32, 16, 8, 2)),
    row("fwd", "sm_90", HALF, PLAIN, (128, 64, 8, 3), (128, 64, 8, 3), (64, 32, 8, 2)),
    row("fwd", "sm_90", HALF, HEAVY, (128, 64, 8, 3), (128, 64, 8, 3), (64, 16, 8, 2)),
    row("fwd", "sm_90", FLOAT32, PLAIN, (64, 32, 4, 2), (32, 32, 8, 2), (32, 16, 8, 2)),
    row("fwd", "sm_90", FLOAT32, HEAVY, (64, 32, 4, 1), (32, 32, 8, 2), (32, 16, 8, 2)),
    row("fwd", "sm_100", HALF, PLAIN, (128, 32, 8, 2), (128, 32, 8, 2), (64, 32, 8, 3)),
    row("fwd", "sm_100", HALF, HEAVY, (128, 32, 8, 2), (128, 32, 8, 2), (64, 16, 8, 2)),
    row("fwd", "sm_100", FLOAT32, PLAIN, (64, 32, 4, 2), (32, 32, 8, 2), (32, 16, 8, 2)),
    row("fwd", "sm_100", FLOAT32, HEAVY, (64, 32, 4, 2), (32, 32, 8, 2), (32, 16, 8, 2)),
    row("decode", "sm_80", HALF, ANY, (16, 64, 4, 2), (16, 64, 4, 2), (16, 64, 4, 2)),
    row("decode", "sm_80", FLOAT32, ANY, (16, 32, 8, 2), (16, 32, 8, 2), (16, 32, 8, 2)),
    row("decode", "sm_90", HALF, ANY, (64, 64, 4, 2), (64, 64, 8, 2), (16, 64, 8, 2)),
    row("decode", "sm_90", FLOAT32, ANY, (64, 32, 4, 1), (16, 32, 8, 2), (16, 32, 8, 2)),
    row("decode", "sm_100", HALF, ANY, (64, 32, 4, 2), (64, 32, 8, 2), (64, 16, 8, 2)),
    row("decode", "sm_100", FLOAT32, ANY, (64, 32, 4, 2), (16, 32, 8, 2), (16, 32, 8, 2)),
    row("bwd_dkdv", "sm_80", HALF, PLAIN, (64, 32, 8, 2), (32, 64, 8, 2), (16, 32, 8, 2)),
    row("bwd_dkdv", "sm_80", HALF, HEAVY, (32, 32, 8, 2), (32, 32, 8, 2), (16, 16, 8, 1)),
    row("bwd_dkdv", "sm_80", FLOAT32, PLAIN, (32, 32, 8, 2), (16, 32, 8, 2), (16, 16, 8, 1)),
    row("bwd_dkdv", "sm_80", FLOAT32, HEAVY, (16, 32, 8, 2), (16, 32, 8, 2), (16, 16, 8, 1)),
    row("bwd_dkdv", "sm_90", HALF, PLAIN, (32, 128, 8, 2), (32, 128, 8, 2), (32, 32, 8, 2)),
    row("bwd_dkdv", "sm_90", HALF, HEAVY, (32, 128, 8, 2), (16, 128, 8, 1), (32, 32, 8, 2)),
    row("bwd_dkdv", "sm_90", FLOAT32, PLAIN, (16, 128, 8, 1), (16, 32, 8, 2), (16, 32, 8, 1)),
    row("bwd_dkdv", "sm_90", FLOAT32, HEAVY, (16, 128, 8, 1), (16, 32, 8, 2), (16, 32, 8, 2)),
    row("bwd_dkdv", "sm_100", HALF, PLAIN, (32, 128, 8, 2), (32, 64, 8, 1), (32, 32, 8, 2)),
    row("bwd_dkdv", "sm_100", HALF, HEAVY, (32, 64, 8, 2), (32, 64, 8, 1), (32, 32, 8, 1)),
    row("bwd_dkdv", "sm_100", FLOAT32, PLAIN, (16, 64, 4, 1), (16, 32, 8, 2), (16, 16, 8, 2)),
    row("bwd_dkdv", "sm_100", FLOAT32, HEAVY, (16, 64, 4, 1), (16, 32, 8, 2), (16, 32, 8, 2)),
    row("bwd_dq", "sm_80", HALF, PLAIN, (128, 32, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2)),
    row("bwd_dq", "sm_80", HALF, HEAVY, (128, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
    row("bwd_dq", "sm_80", FLOAT32, PLAIN, (32, 32, 8, 2), (32, 32, 8, 1), (32, 16, 8, 2)),
    row("bwd_dq", "sm_80", FLOAT32, HEAVY, (32, 16, 8, 1), (32, 16, 8, 2), (32, 16, 8, 2)),
    row("bwd_dq", "sm_90", HALF, PLAIN, (128, 64, 8, 2), (128, 64, 8, 2), (64, 16, 8, 2)),
    row("bwd_dq", "sm_90", HALF, HEAVY, (128, 64, 8, 2), (128, 32, 8, 2), (32, 16, 8, 1)),
    row("bwd_dq", "sm_90", FLOAT32, PLAIN, (64, 16, 4, 1), (32, 32, 8, 2), (32, 16, 8, 2)),
    row("bwd_dq", "sm_90", FLOAT32, HEAVY, (64, 32, 4, 1), (32, 16, 8, 2), (32, 16, 8, 2)),
    row("bwd_dq", "sm_100", HALF, PLAIN, (128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
    row("bwd_dq", "sm_100", HALF, HEAVY, (128, 32, 8, 2), (64, 16, 8, 2), (32, 16, 8, 1)),
    row("bwd_dq", "sm_100", FLOAT32, PLAIN, (64, 32, 4, 1), (32, 32, 8, 2), (32, 16, 8, 2)),
    row("bwd_dq", "sm_100", FLOAT32, HEAVY, (64, 32, 4, 1), (32, 32, 8, 1), (32, 16, 8, 2)),
)
# With spans of few keys: they come with a loop more.
_SHORT = (
    row("bwd_dq", "sm_90", HALF, PLAIN, None, None, (32, 32, 8, 1)),
    row("bwd_dq", "sm_90", FLOAT32, PLAIN, None, (32, 32, 8, 1), None),
)
# With spans, where a row of the table spills.
_SPANS = (
    row("fwd", "sm_80", HALF, PLAIN, (128, 32, 8, 2), (64, 64, 8, 2), None),
    row("fwd", "sm_80", HALF, HEAVY, (64, 64, 8, 2), (32, 64, 8, 2), None),
    row("fwd", "sm_80", FLOAT32, PLAIN, None, None, (32, 16, 8, 2)),
    row("fwd", "sm_90", HALF, PLAIN, None, None, (32, 64, 8, 2)),
    row("fwd", "sm_90", HALF, HEAVY, None, (128, 32, 8, 2), (32, 64, 8, 2)),
    row("fwd", "sm_100", HALF, PLAIN, None, (64, 64, 8, 2), (32, 64, 8, 2)),
    row("fwd", "sm_100", HALF, HEAVY, None, (64, 64, 8, 2), (32, 64, 8, 2)),
    row("decode", "sm_90", HALF, ANY, None, (64, 32, 8, 2), None),
    row("bwd_dkdv", "sm_80", FLOAT32, PLAIN, (16, 32, 8, 2), None, None),
    row("bwd_dkdv", "sm_90", HALF, PLAIN, None, None, (16, 32, 8, 2)),
    row("bwd_dkdv", "sm_90", HALF, HEAVY, None, (16, 128, 8, 2), None),
    row("bwd_dq", "sm_80", HALF, HEAVY, None, (32, 64, 8, 2), None),
    row("bwd_dq", "sm_90", HALF, PLAIN, None, None, (32, 16, 8, 1)),
    row("bwd_dq", "sm_90", HALF, HEAVY, None, (128, 16, 8, 2), None),
    row("bwd_dq", "sm_90", FLOAT32, HEAVY, (64, 16, 4, 1), None, None),
    row("bwd_dq", "sm_100", HALF, PLAIN, None, None, (64, 32, 8, 2)),
    row("bwd_dq", "sm_100", FLOAT32, ANY, (64, 16, 4, 1), None, None),
)
# Offsets of packed sequences take registers, too.
_SPANS_PACKED = (
    row("bwd_dkdv", "sm_90", HALF, PLAIN, None, (16, 128, 8, 2), None),
    row("fwd", "sm_90", HALF, PLAIN, None, (128, 32, 8, 2), None),
    row("bwd_dq", "sm_90", HALF, PLAIN, None, (128, 32, 8, 2), None),
)
# With attn_mask, which takes more of them than a bias does.
_SPANS_MASKED = (
    row("bwd_dkdv", "sm_90", HALF, HEAVY, None, (16, 64, 8, 2), None),
    row("fwd", "sm_100", HALF, HEAVY, None, (64, 32, 8, 2), None),
)
# Where other versions of Triton than 3.7 spill.
_NO_SPANS_OF_VERSION = {
    "3.6": (row("bwd_dq", "sm_100", HALF, PLAIN, None, (128, 64, 4, 2), None),),
}
_SPANS_OF_VERSION = {
    "3.6": (
        row("fwd", "sm_90", FLOAT32, PLAIN, (64, 32, 4, 1), None, None),
        row("bwd_dkdv", "sm_90", HALF, HEAVY, None, (16, 64, 8, 2), None),
    ),
    "3.9": (
        row("fwd", "sm_80", HALF, HEAVY, None, (32, 64, 8, 2), None),
        row("fwd", "sm_100", HALF, PLAIN, None, (128, 32, 8, 2), None),
        row("fwd", "sm_100", HALF, HEAVY, None, (64, 32, 8, 2), None),
        row("bwd_dkdv", "sm_90", FLOAT32, PLAIN, (16, 64, 8, 1), None, None),
    ),
}
_SPANS_MASKED_OF_VERSION = {
    "3.6": (row("bwd_dkdv", "sm_90", HALF, HEAVY, None, (32, 32, 8, 2), None),),
    "3.9": (
        row("bwd_dkdv", "sm_90", HALF, HEAVY, None, (32, 32, 8, 2), None),
        row("bwd_dq", "sm_100", HALF, HEAVY, None, (64, 32, 8, 1), None),
    ),
}
_SPANS_PACKED_OF_VERSION = {
    "3.6": (row("bwd_dkdv", "sm_90", HALF, PLAIN, (16, 128, 8, 2), (16, 64, 8, 2), None),),
}
# fmt: on


def _version() -> str:
    """Triton's, as "3.7"."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


@functools.cache
def tile(
    kernel: str,
    architecture: str,
    dtype: torch.dtype,
    size: int,
    is_biased: bool,
    needs_spans: bool = False,
    is_packed: bool = False,
    has_short_spans: bool = False,
    has_attn_mask: bool = False,
) -> Tile:
    """The tile of one of KERNELS for head dims of class `size`."""
    if architecture == INTERPRETER:
        return _INTERPRETED[kernel]
    rows: tuple[Row, ...] = _TABLE
    if not needs_spans:
        rows = (*_NO_SPANS_OF_VERSION.get(_version(), ()), *rows)
    else:
        rows = (*_SPANS_OF_VERSION.get(_version(), ()), *_SPANS, *rows)
        if has_attn_mask:
            rows = (*_SPANS_MASKED_OF_VERSION.get(_version(), ()), *_SPANS_MASKED, *rows)
        if has_short_spans:
            rows = (*_SHORT, *rows)
        if is_packed:
            rows = (*_SPANS_PACKED_OF_VERSION.get(_version(), ()), *_SPANS_PACKED, *rows)
    found = find(rows, kernel, architecture, dtype, HEAVY if is_biased else PLAIN, size)
    # The loop over short blocks takes the registers of a pipeline.
    is_crowded = needs_spans and has_short_spans and kernel in ("fwd", "decode")
    return dataclasses.replace(found, num_stages=1) if is_crowded else found


def candidates(best: Tile) -> list[Tile]:
    """What RAL_AUTOTUNE=1 tries: the table's tile and its neighbours."""
    found = [best]
    for block_q in (best.block_q, max(best.block_q // 2, 16), best.block_q * 2):
        for block_k in (best.block_k, max(best.block_k // 2, 16), best.block_k * 2):
            for num_warps in (4, 8):
                for num_stages in (2, 3):
                    other = Tile(block_q, block_k, num_warps, num_stages, best.flags)
                    if other not in found and block_q * block_k <= 128 * 128:
                        found.append(other)
    return found
