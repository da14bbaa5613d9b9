"""Tile sizes of the Triton kernels of `attention`: one table, each row with what limits it."""

from __future__ import annotations

import torch

from ..triton_runtime import INTERPRETER, Tile

KERNELS = ("fwd", "decode", "bwd_dkdv", "bwd_dq")
HALF, FLOAT32 = False, True
PLAIN, BIASED = False, True  # BIASED: with span_bias or attn_mask, which take registers


def head_dim_class(head_dim: int, head_dim_v: int) -> int:
    """64, 128 or 256: tables are by the larger of the head dims."""
    return next(size for size in (64, 128, 256) if size >= max(head_dim, head_dim_v))


# The interpreter pays by the operation: few programs, but boundaries of blocks in every test.
_INTERPRETED = {
    "fwd": Tile(64, 32, 4, 1),
    "decode": Tile(16, 32, 4, 1),
    "bwd_dkdv": Tile(32, 64, 4, 1),
    "bwd_dq": Tile(64, 32, 4, 1),
}
# The largest of the tiles tried that do not spill (triton 3.7.1, ahead of time), with the registers
# a thread and the shared memory that they take: registers limit them all. Rows marked "smallest" or
# "guess" have not been searched, and nothing has been measured on a GPU.
# fmt: off
_TABLE: dict[tuple[str, str, bool, int, bool], Tile] = {
    ("fwd", "sm_80", HALF, 64, PLAIN): Tile(128, 64, 8, 3),  # 255 registers, 88 KiB
    ("fwd", "sm_80", HALF, 64, BIASED): Tile(16, 32, 8, 1),  # 202 registers, 8 KiB
    ("fwd", "sm_80", HALF, 128, PLAIN): Tile(128, 32, 8, 3),  # 255 registers, 88 KiB
    ("fwd", "sm_80", HALF, 128, BIASED): Tile(16, 32, 8, 1),  # 206 registers, 14 KiB
    ("fwd", "sm_80", HALF, 256, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("fwd", "sm_80", HALF, 256, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("fwd", "sm_80", FLOAT32, 64, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("fwd", "sm_80", FLOAT32, 64, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("fwd", "sm_80", FLOAT32, 128, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("fwd", "sm_80", FLOAT32, 128, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("fwd", "sm_80", FLOAT32, 256, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("fwd", "sm_80", FLOAT32, 256, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("fwd", "sm_90", HALF, 64, PLAIN): Tile(128, 64, 8, 3),  # 250 registers, 72 KiB
    ("fwd", "sm_90", HALF, 64, BIASED): Tile(128, 64, 8, 2),  # 242 registers, 80 KiB
    ("fwd", "sm_90", HALF, 128, PLAIN): Tile(128, 64, 8, 3),  # 246 registers, 136 KiB
    ("fwd", "sm_90", HALF, 128, BIASED): Tile(64, 32, 4, 2),  # 248 registers, 56 KiB
    ("fwd", "sm_90", HALF, 256, PLAIN): Tile(64, 32, 8, 2),  # 255 registers, 109 KiB
    ("fwd", "sm_90", HALF, 256, BIASED): Tile(32, 16, 8, 2),  # 219 registers, 38 KiB
    ("fwd", "sm_90", FLOAT32, 64, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("fwd", "sm_90", FLOAT32, 64, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("fwd", "sm_90", FLOAT32, 128, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("fwd", "sm_90", FLOAT32, 128, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("fwd", "sm_90", FLOAT32, 256, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("fwd", "sm_90", FLOAT32, 256, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("fwd", "sm_100", HALF, 64, PLAIN): Tile(128, 32, 8, 2),  # guess
    ("fwd", "sm_100", HALF, 64, BIASED): Tile(64, 32, 8, 2),  # guess
    ("fwd", "sm_100", HALF, 128, PLAIN): Tile(128, 32, 8, 3),  # 224 registers, 96 KiB
    ("fwd", "sm_100", HALF, 128, BIASED): Tile(64, 16, 4, 2),  # 234 registers, 38 KiB
    ("fwd", "sm_100", HALF, 256, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("fwd", "sm_100", HALF, 256, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("fwd", "sm_100", FLOAT32, 64, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("fwd", "sm_100", FLOAT32, 64, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("fwd", "sm_100", FLOAT32, 128, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("fwd", "sm_100", FLOAT32, 128, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("fwd", "sm_100", FLOAT32, 256, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("fwd", "sm_100", FLOAT32, 256, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("decode", "sm_80", HALF, 64, BIASED): Tile(16, 64, 4, 2),  # 255 registers, 30 KiB
    ("decode", "sm_80", HALF, 128, BIASED): Tile(16, 64, 4, 2),  # 255 registers, 48 KiB
    ("decode", "sm_80", HALF, 256, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("decode", "sm_80", FLOAT32, 64, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("decode", "sm_80", FLOAT32, 128, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("decode", "sm_80", FLOAT32, 256, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("decode", "sm_90", HALF, 64, BIASED): Tile(64, 64, 4, 2),  # 254 registers, 48 KiB
    ("decode", "sm_90", HALF, 128, BIASED): Tile(16, 64, 4, 2),  # 230 registers, 48 KiB
    ("decode", "sm_90", HALF, 256, BIASED): Tile(16, 64, 4, 2),  # 243 registers, 84 KiB
    ("decode", "sm_90", FLOAT32, 64, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("decode", "sm_90", FLOAT32, 128, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("decode", "sm_90", FLOAT32, 256, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("decode", "sm_100", HALF, 64, BIASED): Tile(16, 32, 4, 2),  # guess
    ("decode", "sm_100", HALF, 128, BIASED): Tile(16, 32, 4, 2),  # guess
    ("decode", "sm_100", HALF, 256, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("decode", "sm_100", FLOAT32, 64, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("decode", "sm_100", FLOAT32, 128, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("decode", "sm_100", FLOAT32, 256, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dkdv", "sm_80", HALF, 64, PLAIN): Tile(16, 64, 4, 2),  # 245 registers, 22 KiB
    ("bwd_dkdv", "sm_80", HALF, 64, BIASED): Tile(16, 64, 4, 2),  # 254 registers, 22 KiB
    ("bwd_dkdv", "sm_80", HALF, 128, PLAIN): Tile(16, 64, 8, 2),  # 233 registers, 44 KiB
    ("bwd_dkdv", "sm_80", HALF, 128, BIASED): Tile(16, 32, 8, 1),  # 230 registers, 30 KiB
    ("bwd_dkdv", "sm_80", HALF, 256, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dkdv", "sm_80", HALF, 256, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dkdv", "sm_80", FLOAT32, 64, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dkdv", "sm_80", FLOAT32, 64, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dkdv", "sm_80", FLOAT32, 128, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dkdv", "sm_80", FLOAT32, 128, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dkdv", "sm_80", FLOAT32, 256, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dkdv", "sm_80", FLOAT32, 256, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dkdv", "sm_90", HALF, 64, PLAIN): Tile(32, 128, 8, 2),  # 233 registers, 53 KiB
    ("bwd_dkdv", "sm_90", HALF, 64, BIASED): Tile(32, 128, 8, 2),  # 248 registers, 53 KiB
    ("bwd_dkdv", "sm_90", HALF, 128, PLAIN): Tile(16, 128, 8, 2),  # 244 registers, 85 KiB
    ("bwd_dkdv", "sm_90", HALF, 128, BIASED): Tile(16, 128, 8, 2),  # 232 registers, 85 KiB
    ("bwd_dkdv", "sm_90", HALF, 256, PLAIN): Tile(16, 16, 8, 1),  # 173 registers, 40 KiB
    ("bwd_dkdv", "sm_90", HALF, 256, BIASED): Tile(16, 16, 8, 1),  # 172 registers, 40 KiB
    ("bwd_dkdv", "sm_90", FLOAT32, 64, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dkdv", "sm_90", FLOAT32, 64, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dkdv", "sm_90", FLOAT32, 128, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dkdv", "sm_90", FLOAT32, 128, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dkdv", "sm_90", FLOAT32, 256, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dkdv", "sm_90", FLOAT32, 256, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dkdv", "sm_100", HALF, 64, PLAIN): Tile(16, 128, 8, 2),  # guess
    ("bwd_dkdv", "sm_100", HALF, 64, BIASED): Tile(16, 128, 8, 2),  # guess
    ("bwd_dkdv", "sm_100", HALF, 128, PLAIN): Tile(16, 64, 8, 2),  # guess
    ("bwd_dkdv", "sm_100", HALF, 128, BIASED): Tile(16, 32, 8, 1),  # guess
    ("bwd_dkdv", "sm_100", HALF, 256, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dkdv", "sm_100", HALF, 256, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dkdv", "sm_100", FLOAT32, 64, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dkdv", "sm_100", FLOAT32, 64, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dkdv", "sm_100", FLOAT32, 128, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dkdv", "sm_100", FLOAT32, 128, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dkdv", "sm_100", FLOAT32, 256, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dkdv", "sm_100", FLOAT32, 256, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dq", "sm_80", HALF, 64, PLAIN): Tile(16, 32, 8, 1),  # 128 registers, 12 KiB
    ("bwd_dq", "sm_80", HALF, 64, BIASED): Tile(64, 16, 4, 2),  # 255 registers, 28 KiB
    ("bwd_dq", "sm_80", HALF, 128, PLAIN): Tile(64, 32, 8, 2),  # 255 registers, 56 KiB
    ("bwd_dq", "sm_80", HALF, 128, BIASED): Tile(32, 16, 8, 2),  # 234 registers, 28 KiB
    ("bwd_dq", "sm_80", HALF, 256, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dq", "sm_80", HALF, 256, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dq", "sm_80", FLOAT32, 64, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dq", "sm_80", FLOAT32, 64, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dq", "sm_80", FLOAT32, 128, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dq", "sm_80", FLOAT32, 128, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dq", "sm_80", FLOAT32, 256, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dq", "sm_80", FLOAT32, 256, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dq", "sm_90", HALF, 64, PLAIN): Tile(128, 64, 8, 2),  # 247 registers, 72 KiB
    ("bwd_dq", "sm_90", HALF, 64, BIASED): Tile(128, 64, 8, 2),  # 252 registers, 72 KiB
    ("bwd_dq", "sm_90", HALF, 128, PLAIN): Tile(128, 64, 8, 2),  # 255 registers, 136 KiB
    ("bwd_dq", "sm_90", HALF, 128, BIASED): Tile(128, 32, 8, 2),  # 249 registers, 104 KiB
    ("bwd_dq", "sm_90", HALF, 256, PLAIN): Tile(64, 32, 8, 1),  # 255 registers, 96 KiB
    ("bwd_dq", "sm_90", HALF, 256, BIASED): Tile(64, 16, 8, 1),  # 255 registers, 84 KiB
    ("bwd_dq", "sm_90", FLOAT32, 64, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dq", "sm_90", FLOAT32, 64, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dq", "sm_90", FLOAT32, 128, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dq", "sm_90", FLOAT32, 128, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dq", "sm_90", FLOAT32, 256, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dq", "sm_90", FLOAT32, 256, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dq", "sm_100", HALF, 64, PLAIN): Tile(64, 32, 8, 2),  # guess
    ("bwd_dq", "sm_100", HALF, 64, BIASED): Tile(32, 16, 8, 2),  # guess
    ("bwd_dq", "sm_100", HALF, 128, PLAIN): Tile(64, 32, 8, 2),  # guess
    ("bwd_dq", "sm_100", HALF, 128, BIASED): Tile(32, 16, 8, 2),  # guess
    ("bwd_dq", "sm_100", HALF, 256, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dq", "sm_100", HALF, 256, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dq", "sm_100", FLOAT32, 64, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dq", "sm_100", FLOAT32, 64, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dq", "sm_100", FLOAT32, 128, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dq", "sm_100", FLOAT32, 128, BIASED): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dq", "sm_100", FLOAT32, 256, PLAIN): Tile(16, 16, 8, 1),  # smallest
    ("bwd_dq", "sm_100", FLOAT32, 256, BIASED): Tile(16, 16, 8, 1),  # smallest
}
# fmt: on


def tile(kernel: str, architecture: str, dtype: torch.dtype, size: int, is_biased: bool) -> Tile:
    """The tile of one of KERNELS for head dims of class `size`."""
    if architecture == INTERPRETER:
        return _INTERPRETED[kernel]
    # Decoding is bound by memory, not registers: one row serves both.
    is_biased = is_biased or kernel == "decode"
    return _TABLE[kernel, architecture, dtype == torch.float32, size, is_biased]


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
