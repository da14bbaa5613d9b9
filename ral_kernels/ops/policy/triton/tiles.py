"""Tile sizes of the Triton kernels of `policy` and `policy_divergence`."""

from __future__ import annotations

import functools

import torch

from ....runtime.triton_runtime import INTERPRETER, Tile
from ....runtime.triton_tiles import (
    ANY,
    FLOAT16,
    FLOAT32,
    HALF,
    HEAVY,
    PLAIN,
    find,
    row,
)

# Kernels, by what fills their registers and shared memory:
#   statistics    a tile of scores; K streams through
#   heads         a tile of Σ_h P_h (policy_divergence: two, and the terms), and one of scores
#   sums, dq, dk  a tile of scores and one of dp; for dq and dk an accumulator [rows or keys, D] too
#   target        a tile of weights
KERNELS = ("statistics", "heads", "sums", "dq", "dk", "spans", "target", "bias")

ROWS = 64  # of one program of the kernels that work on statistics alone
SPANS = 32  # of one program of the kernels that sum over spans
JOINED_ROWS = 16  # of one program that joins the pieces of dq

_INTERPRETED = Tile(64, 128, 4, 1, {"BLOCK_D": 128})

# Limit: 255 registers a thread, which hold scores, dp and the accumulators. BLOCK_D: a product
# takes so many features at a time. HEAVY: with a soft cap or a bias of spans; tanh and the gather
# take registers.
_TABLE = (
    # float32 whatever the inputs are
    row("spans", ANY, ANY, ANY, (64, 64, 8, 1)),
    row("target", ANY, ANY, ANY, (64, 32, 4, 2)),
    # float32: operands pass through registers, to be split into three of tf32.
    row("dk", "sm_80", FLOAT32, ANY, (32, 16, 8, 2), BLOCK_D=32),
    # Triton 3.6.0 spills 8 bytes with 32 rows.
    row("dk", "sm_90", FLOAT32, ANY, (16, 64, 8, 2), BLOCK_D=32),
    row("dk", ANY, FLOAT32, ANY, (32, 64, 8, 2), BLOCK_D=32),
    row("dq", ANY, FLOAT32, ANY, (64, 32, 8, 2), BLOCK_D=32),
    row(ANY, "sm_80", FLOAT32, ANY, (64, 32, 8, 2), BLOCK_D=32),
    row(ANY, ANY, FLOAT32, HEAVY, (64, 32, 8, 2), BLOCK_D=32),
    # With eight warps the terms of a target spill up to 64 bytes.
    row("heads", "sm_100", FLOAT32, PLAIN, (64, 64, 4, 2), BLOCK_D=32),
    row(ANY, ANY, FLOAT32, PLAIN, (64, 64, 8, 2), BLOCK_D=32),
    # float16: dS and the other factor are float32 in these products, twice the registers.
    row("dq", ANY, FLOAT16, ANY, (64, 64, 8, 2), BLOCK_D=64),
    row("dk", "sm_80", FLOAT16, ANY, (64, 32, 8, 2), BLOCK_D=64),
    row("dk", "sm_100", FLOAT16, ANY, (32, 64, 8, 2), (32, 64, 8, 1), (32, 64, 8, 1), BLOCK_D=64),
    row("dk", ANY, FLOAT16, ANY, (32, 64, 8, 2), BLOCK_D=64),
    # sm_80 has the operands of mma.sync in registers, sm_100 copies what tcgen05.mma sums to them.
    row("statistics", "sm_80", HALF, PLAIN, None, None, (64, 32, 8, 2)),
    row("statistics", "sm_100", HALF, PLAIN, None, None, (64, 32, 8, 2)),
    row("heads", "sm_80", HALF, PLAIN, None, None, (64, 32, 8, 2)),
    row("sums", "sm_80", HALF, PLAIN, (64, 64, 8, 2), BLOCK_D=128),
    row("sums", "sm_80", HALF, HEAVY, (64, 32, 8, 2), BLOCK_D=128),
    # With two stages, packed sequences with spans spill 32 bytes.
    row("dq", "sm_80", HALF, HEAVY, (64, 32, 8, 1), None, None),
    row("dq", "sm_80", HALF, ANY, (64, 32, 8, 2), BLOCK_D=128),
    row("dk", "sm_80", HALF, ANY, (64, 32, 8, 2), BLOCK_D=128),
    row("sums", "sm_100", HALF, ANY, (64, 32, 8, 2), BLOCK_D=128),
    row("heads", "sm_100", HALF, HEAVY, (64, 32, 8, 1), BLOCK_D=128),
    row("heads", "sm_100", HALF, PLAIN, (64, 128, 8, 2), None, None),
    row("heads", "sm_100", HALF, PLAIN, None, None, (64, 32, 8, 2), BLOCK_D=128),
    row("dk", "sm_100", HALF, PLAIN, None, None, (32, 64, 8, 1)),
    row("statistics", ANY, HALF, PLAIN, (128, 128, 8, 3), (128, 128, 8, 3), (64, 64, 4, 2)),
    row("heads", ANY, HALF, PLAIN, (64, 128, 8, 3), (64, 128, 8, 3), (64, 64, 8, 2)),
    row("sums", ANY, HALF, PLAIN, (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2)),
    row("dq", ANY, HALF, PLAIN, (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2)),
    row("dk", ANY, HALF, PLAIN, (32, 128, 8, 2), (32, 128, 8, 2), (32, 64, 8, 2)),
    # Head dims over 128 go in parts; BLOCK_D is no limit to smaller ones.
    row("statistics", ANY, HALF, HEAVY, (64, 64, 8, 2), BLOCK_D=128),
    row("heads", ANY, HALF, HEAVY, (64, 64, 8, 2), BLOCK_D=128),
    row("sums", ANY, HALF, HEAVY, (64, 64, 8, 2), BLOCK_D=128),
    # With 32 keys, packed sequences with spans spill 16 bytes.
    row("dq", "sm_90", HALF, HEAVY, None, (128, 16, 8, 2), None),
    # On sm_90 the ptxas of Triton 3.6.0 serialises the wgmma of 64 rows (C7515).
    row("dq", ANY, HALF, HEAVY, (128, 32, 8, 2), (128, 32, 8, 2), None),
    row("dq", ANY, HALF, HEAVY, (64, 32, 8, 2), BLOCK_D=128),
    # With 32 rows and 8 warps all warps issue half as much again, and Triton 3.6.0 spills.
    row("dk", "sm_90", HALF, HEAVY, None, (16, 64, 4, 2), None),
    row("dk", ANY, HALF, HEAVY, (32, 64, 8, 2), BLOCK_D=128),
    row("bias", ANY, HALF, HEAVY, (64, 32, 8, 1), BLOCK_D=128),
)


@functools.cache
def tile(kernel: str, architecture: str, dtype: torch.dtype, head_dim: int, heavy: bool) -> Tile:
    """The tile of one of KERNELS for a padded head dim; heavy: with a soft cap or a bias."""
    if architecture == INTERPRETER:
        return _INTERPRETED
    return find(_TABLE, kernel, architecture, dtype, HEAVY if heavy else PLAIN, head_dim)


def candidates(
    kernel: str, architecture: str, dtype: torch.dtype, head_dim: int, heavy: bool
) -> list[Tile]:
    """What RAL_AUTOTUNE=1 tries: the table's tile first, and others that may spill or not fit."""
    best = tile(kernel, architecture, dtype, head_dim, heavy)
    sizes = [(64, 64), (64, 128), (128, 64), (128, 128)]
    sizes += [(32, 64), (32, 128)] if kernel == "dk" else [(64, 32), (128, 32)]
    others = [
        Tile(block_q, block_k, num_warps, num_stages, best.flags)
        for block_q, block_k in sizes
        for num_warps in (4, 8)
        for num_stages in (2, 3)
    ]
    return [best, *(other for other in others if other != best)]


def chunk_rows(architecture: str) -> int:
    """Of how many rows chunks are multiples: whole blocks of every kernel, however many the keys.

    With 128k keys these take 64 MiB.
    """
    return 64 if architecture == INTERPRETER else 128


def scratch_elements(architecture: str) -> int:
    """How many float32 of scratch a call may have, unless `chunk_rows` need more.

    32 MiB are 1,024 tiles of 64 x 128: eight for each multiprocessor of an H200.
    """
    return 2**14 if architecture == INTERPRETER else 2**23


def num_splits(programs: int, key_blocks: int, multiprocessors: int) -> int:
    """In how many pieces to take the keys, so that a multiprocessor has two programs.

    A piece has at least four blocks of keys: joining smaller ones would cost more than they gain.
    """
    wanted = -(-2 * multiprocessors // max(programs, 1))
    return max(1, min(wanted, key_blocks // 4, 64))
