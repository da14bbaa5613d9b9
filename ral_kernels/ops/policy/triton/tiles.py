"""Tile sizes of the Triton kernels of `policy` and `policy_divergence`."""

from __future__ import annotations

import torch

from ral_kernels.runtime.triton_runtime import INTERPRETER, Tile

# Kernels, by what fills their registers and shared memory:
#   statistics    a tile of scores; K streams through
#   heads         a tile of Σ_h P_h (policy_divergence: two, and the terms), and one of scores
#   sums, dq, dk  a tile of scores and one of dp; for dq and dk an accumulator [rows or keys, D] too
KERNELS = ("statistics", "heads", "sums", "dq", "dk", "spans", "bias")

ROWS = 64  # of one program of the kernels that work on statistics alone
SPANS = 32  # of one program of the kernels that sum over spans
JOINED_ROWS = 16  # of one program that joins the pieces of dq

_INTERPRETED = Tile(64, 128, 4, 1, {"BLOCK_D": 128})


_Row = tuple[Tile, Tile, Tile]  # for padded head dims up to 64, 128 and 256

# 16 bit inputs. Limit: 255 registers a thread, which hold scores, dp and the accumulators.
_HALF: dict[str, _Row] = {
    "statistics": (Tile(128, 128, 8, 3), Tile(128, 128, 8, 3), Tile(64, 64, 4, 2)),
    "heads": (Tile(64, 128, 8, 3), Tile(64, 128, 8, 3), Tile(64, 64, 8, 2)),
    "sums": (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 2)),
    "dq": (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 64, 8, 2)),
    "dk": (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
}
# A soft cap or a bias of spans: tanh and the gather want registers of their own.
_IN_PARTS = {"BLOCK_D": 128}
_HEAVY: dict[str, _Row] = {
    "statistics": (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2, _IN_PARTS)),
    "heads": (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2, _IN_PARTS)),
    "sums": (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2, _IN_PARTS)),
    # sm_90: ptxas of triton 3.6.0 serialises the wgmma of 64 rows (C7515). 128 take, on sm_90,
    # 254 registers with 3.7.1 and 209 with 3.6.0, and 80 KiB of shared memory.
    "dq": (Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2, _IN_PARTS)),
    "dk": (Tile(32, 64, 8, 2), Tile(32, 64, 8, 2), Tile(32, 64, 8, 2, _IN_PARTS)),
    "bias": (Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(64, 32, 8, 1, _IN_PARTS)),
}
# float16: dS and the other factor are float32 in the products of dq and dk, twice the registers.
_FLOAT16 = {
    "dq": Tile(64, 64, 8, 2, {"BLOCK_D": 64}),
    "dk": Tile(32, 64, 8, 2, {"BLOCK_D": 64}),
}
# float32. Limit: registers again, through which operands pass to be split in three of tf32; hence
# so few features at a time.
_WIDE = Tile(64, 64, 8, 2, {"BLOCK_D": 32})
_HEAVY_WIDE = Tile(64, 32, 8, 2, {"BLOCK_D": 32})
_HEAVY_WIDE_DK = Tile(32, 64, 8, 2, {"BLOCK_D": 32})
_SPANS = Tile(64, 64, 8, 1)  # float32 whatever the inputs are

# Where an architecture wants more registers: sm_80 has the operands of mma.sync in them too, sm_100
# copies what tcgen05.mma has summed to them. (architecture, kernel) -> tile, whatever the head dim.
_TIGHT = {
    ("sm_80", "sums"): Tile(64, 32, 8, 2, _IN_PARTS),
    ("sm_80", "dq"): Tile(64, 32, 8, 2, _IN_PARTS),
    ("sm_80", "dk"): Tile(64, 32, 8, 2, _IN_PARTS),
    ("sm_100", "sums"): Tile(64, 32, 8, 2, _IN_PARTS),
}
_TIGHT_HEAVY = {("sm_100", "heads"): Tile(64, 32, 8, 1, _IN_PARTS)}  # and head dims over 128
_TIGHT_FLOAT16 = {
    ("sm_80", "dk"): Tile(64, 32, 8, 2, {"BLOCK_D": 64}),
    ("sm_100", "dk"): Tile(32, 64, 8, 1, {"BLOCK_D": 64}),
}
_TIGHT_HEAVY_WIDE = {
    ("sm_80", "dk"): Tile(32, 16, 8, 2, {"BLOCK_D": 32}),
    # 202 registers with triton 3.7.1, 200 with 3.6.0, which spills 8 bytes with 32 rows.
    ("sm_90", "dk"): Tile(16, 64, 8, 2, {"BLOCK_D": 32}),
}


def tile(kernel: str, architecture: str, dtype: torch.dtype, head_dim: int, heavy: bool) -> Tile:
    """The tile of one of KERNELS for a padded head dim; heavy: with a soft cap or a bias."""
    if architecture == INTERPRETER:
        return _INTERPRETED
    if kernel == "spans":
        return _SPANS
    if dtype == torch.float32:
        if not heavy and architecture != "sm_80" and kernel not in ("dq", "dk"):
            return _WIDE
        wide = _HEAVY_WIDE_DK if kernel == "dk" else _HEAVY_WIDE
        return _TIGHT_HEAVY_WIDE.get((architecture, kernel), wide)
    if dtype == torch.float16 and kernel in _FLOAT16:
        return _TIGHT_FLOAT16.get((architecture, kernel), _FLOAT16[kernel])
    if (architecture, kernel) in _TIGHT:
        return _TIGHT[architecture, kernel]
    if (heavy or head_dim > 128) and (architecture, kernel) in _TIGHT_HEAVY:
        return _TIGHT_HEAVY[architecture, kernel]
    return (_HEAVY if heavy else _HALF)[kernel][(64, 128, 256).index(max(head_dim, 64))]


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


def scratch_elements(architecture: str) -> int:
    """How many float32 a call may hold for some rows times all keys, unless one tile needs more.

    32 MiB: 1,024 tiles of 64 x 128, eight for each multiprocessor of an H200.
    """
    return 2**14 if architecture == INTERPRETER else 2**23


def num_splits(programs: int, key_blocks: int, multiprocessors: int) -> int:
    """Over how many programs the keys of some rows are split, to have two a multiprocessor.

    A piece has at least four blocks of keys: less would pay more for joining than it gains.
    """
    wanted = -(-2 * multiprocessors // max(programs, 1))
    return max(1, min(wanted, key_blocks // 4, 64))
