"""Tile sizes of the Triton kernels of `attention`: one table, each row with what limits it."""

from __future__ import annotations

import torch

from ral_kernels.runtime.triton_runtime import INTERPRETER, Tile

KERNELS = ("fwd", "decode", "bwd_dkdv", "bwd_dq")
HALF, FLOAT32 = False, True
PLAIN, BIASED = False, True  # BIASED: with span_bias or attn_mask, which take registers


def head_dim_class(head_dim: int, head_dim_v: int) -> int:
    """64, 128 or 256: tables are by the larger of the head dims."""
    return next(size for size in (64, 128, 256) if size >= max(head_dim, head_dim_v))


# The interpreter pays by the operation: few programs, but boundaries of blocks in every test.
_INTERPRETED = {
    "fwd": Tile(64, 64, 4, 1),
    "decode": Tile(16, 64, 4, 1),
    "bwd_dkdv": Tile(32, 64, 4, 1),
    "bwd_dq": Tile(64, 64, 4, 1),
}
# Tiles that do not spill ahead of time, with triton 3.7.1 and on sm_90 with 3.6.0 too. With them
# stand the registers a thread (of 255) and the shared memory that they take, by 3.7.1 where no
# version is named: registers limit them all. Where "mma" stands, no tile with the rows that the
# architecture's own instruction takes did without spilling. Nothing has been measured on a GPU.
# fmt: off
_TABLE: dict[tuple[str, str, bool, int, bool], Tile] = {
    ("fwd", "sm_80", HALF, 64, PLAIN): Tile(128, 64, 8, 3),  # 248 registers, 56 KiB
    ("fwd", "sm_80", HALF, 64, BIASED): Tile(128, 32, 8, 2),  # 255 registers, 32 KiB
    ("fwd", "sm_80", HALF, 128, PLAIN): Tile(128, 32, 8, 3),  # 244 registers, 72 KiB
    ("fwd", "sm_80", HALF, 128, BIASED): Tile(64, 64, 8, 2),  # 255 registers, 68 KiB
    ("fwd", "sm_80", HALF, 256, PLAIN): Tile(32, 32, 8, 2),  # 186 registers, 54 KiB
    ("fwd", "sm_80", HALF, 256, BIASED): Tile(32, 32, 8, 2),  # 214 registers, 54 KiB
    ("fwd", "sm_80", FLOAT32, 64, PLAIN): Tile(32, 32, 8, 2),  # 230 registers, 8 KiB
    ("fwd", "sm_80", FLOAT32, 64, BIASED): Tile(32, 32, 8, 2),  # 255 registers, 8 KiB
    ("fwd", "sm_80", FLOAT32, 128, PLAIN): Tile(32, 32, 8, 2),  # 237 registers, 16 KiB
    ("fwd", "sm_80", FLOAT32, 128, BIASED): Tile(32, 32, 8, 2),  # 255 registers, 16 KiB
    ("fwd", "sm_80", FLOAT32, 256, PLAIN): Tile(32, 32, 8, 2),  # 255 registers, 32 KiB
    ("fwd", "sm_80", FLOAT32, 256, BIASED): Tile(32, 16, 8, 2),  # 250 registers, 16 KiB
    ("fwd", "sm_90", HALF, 64, PLAIN): Tile(128, 64, 8, 3),  # 254 registers, 72 KiB
    ("fwd", "sm_90", HALF, 64, BIASED): Tile(128, 64, 8, 3),  # 252 registers, 57 KiB
    ("fwd", "sm_90", HALF, 128, PLAIN): Tile(128, 64, 8, 3),  # 242 registers, 136 KiB
    ("fwd", "sm_90", HALF, 128, BIASED): Tile(128, 64, 8, 3),  # 254 registers, 105 KiB
    # With spans ptxas serialises wgmma (C7515); in 3.6.0 with each such tile that does not spill.
    ("fwd", "sm_90", HALF, 256, PLAIN): Tile(64, 32, 8, 2),  # 255 registers, 101 KiB
    ("fwd", "sm_90", HALF, 256, BIASED): Tile(64, 16, 8, 2),  # 255 registers, 69 KiB
    ("fwd", "sm_90", FLOAT32, 64, PLAIN): Tile(64, 32, 4, 2),  # 252 registers, 20 KiB
    ("fwd", "sm_90", FLOAT32, 64, BIASED): Tile(64, 32, 4, 1),  # 246 registers, 16 KiB
    ("fwd", "sm_90", FLOAT32, 128, PLAIN): Tile(32, 32, 8, 2),  # 222 registers, 16 KiB; mma
    ("fwd", "sm_90", FLOAT32, 128, BIASED): Tile(32, 32, 8, 2),  # 243 registers, 16 KiB; mma
    ("fwd", "sm_90", FLOAT32, 256, PLAIN): Tile(32, 16, 8, 2),  # 224 registers, 16 KiB; mma
    ("fwd", "sm_90", FLOAT32, 256, BIASED): Tile(32, 16, 8, 2),  # 232 registers, 16 KiB; mma
    ("fwd", "sm_100", HALF, 64, PLAIN): Tile(128, 32, 8, 2),  # 236 registers, 48 KiB
    ("fwd", "sm_100", HALF, 64, BIASED): Tile(128, 32, 8, 2),  # 238 registers, 49 KiB
    ("fwd", "sm_100", HALF, 128, PLAIN): Tile(128, 32, 8, 2),  # 242 registers, 80 KiB
    ("fwd", "sm_100", HALF, 128, BIASED): Tile(128, 32, 8, 2),  # 252 registers, 81 KiB
    ("fwd", "sm_100", HALF, 256, PLAIN): Tile(64, 32, 8, 3),  # 255 registers, 136 KiB
    ("fwd", "sm_100", HALF, 256, BIASED): Tile(64, 16, 8, 2),  # 250 registers, 70 KiB
    ("fwd", "sm_100", FLOAT32, 64, PLAIN): Tile(64, 32, 4, 2),  # 248 registers, 20 KiB
    ("fwd", "sm_100", FLOAT32, 64, BIASED): Tile(64, 32, 4, 2),  # 247 registers, 20 KiB
    ("fwd", "sm_100", FLOAT32, 128, PLAIN): Tile(32, 32, 8, 2),  # 205 registers, 16 KiB; mma
    ("fwd", "sm_100", FLOAT32, 128, BIASED): Tile(32, 32, 8, 2),  # 236 registers, 16 KiB; mma
    ("fwd", "sm_100", FLOAT32, 256, PLAIN): Tile(32, 32, 8, 2),  # 254 registers, 32 KiB; mma
    ("fwd", "sm_100", FLOAT32, 256, BIASED): Tile(32, 16, 8, 2),  # 222 registers, 16 KiB; mma
    ("decode", "sm_80", HALF, 64, BIASED): Tile(16, 64, 4, 2),  # 226 registers, 24 KiB
    ("decode", "sm_80", HALF, 128, BIASED): Tile(16, 64, 4, 2),  # 234 registers, 42 KiB
    ("decode", "sm_80", HALF, 256, BIASED): Tile(16, 64, 4, 2),  # 244 registers, 78 KiB
    ("decode", "sm_80", FLOAT32, 64, BIASED): Tile(16, 32, 8, 2),  # 222 registers, 8 KiB
    ("decode", "sm_80", FLOAT32, 128, BIASED): Tile(16, 32, 8, 2),  # 247 registers, 16 KiB
    ("decode", "sm_80", FLOAT32, 256, BIASED): Tile(16, 32, 8, 2),  # 255 registers, 32 KiB
    ("decode", "sm_90", HALF, 64, BIASED): Tile(64, 64, 4, 2),  # 247 registers, 45 KiB
    # 3.6.0: 254 registers. Its ptxas serialises the wgmma of (64, 32, 4), and 3.7.1 spills with
    # (64, 64, 4).
    ("decode", "sm_90", HALF, 128, BIASED): Tile(64, 64, 8, 2),  # 252 registers, 103 KiB
    ("decode", "sm_90", HALF, 256, BIASED): Tile(64, 16, 8, 2),  # 255 registers, 69 KiB
    ("decode", "sm_90", FLOAT32, 64, BIASED): Tile(64, 32, 4, 2),  # 255 registers, 20 KiB
    ("decode", "sm_90", FLOAT32, 128, BIASED): Tile(16, 32, 8, 2),  # 233 registers, 16 KiB; mma
    ("decode", "sm_90", FLOAT32, 256, BIASED): Tile(16, 32, 8, 2),  # 248 registers, 32 KiB; mma
    ("decode", "sm_100", HALF, 64, BIASED): Tile(64, 32, 4, 2),  # 232 registers, 32 KiB
    ("decode", "sm_100", HALF, 128, BIASED): Tile(64, 32, 8, 2),  # 234 registers, 56 KiB
    ("decode", "sm_100", HALF, 256, BIASED): Tile(64, 16, 8, 2),  # 253 registers, 70 KiB
    ("decode", "sm_100", FLOAT32, 64, BIASED): Tile(64, 32, 4, 2),  # 248 registers, 20 KiB
    ("decode", "sm_100", FLOAT32, 128, BIASED): Tile(16, 32, 8, 2),  # 226 registers, 16 KiB; mma
    ("decode", "sm_100", FLOAT32, 256, BIASED): Tile(16, 32, 8, 2),  # 239 registers, 32 KiB; mma
    ("bwd_dkdv", "sm_80", HALF, 64, PLAIN): Tile(64, 32, 8, 2),  # 182 registers, 28 KiB
    ("bwd_dkdv", "sm_80", HALF, 64, BIASED): Tile(32, 32, 8, 2),  # 239 registers, 20 KiB
    ("bwd_dkdv", "sm_80", HALF, 128, PLAIN): Tile(32, 64, 8, 2),  # 240 registers, 56 KiB
    ("bwd_dkdv", "sm_80", HALF, 128, BIASED): Tile(32, 64, 8, 1),  # 243 registers, 56 KiB
    ("bwd_dkdv", "sm_80", HALF, 256, PLAIN): Tile(16, 32, 8, 2),  # 255 registers, 50 KiB
    ("bwd_dkdv", "sm_80", HALF, 256, BIASED): Tile(16, 32, 8, 1),  # 252 registers, 56 KiB
    ("bwd_dkdv", "sm_80", FLOAT32, 64, PLAIN): Tile(32, 32, 8, 2),  # 247 registers, 8 KiB
    ("bwd_dkdv", "sm_80", FLOAT32, 64, BIASED): Tile(16, 32, 8, 2),  # 182 registers, 8 KiB
    ("bwd_dkdv", "sm_80", FLOAT32, 128, PLAIN): Tile(16, 32, 8, 2),  # 212 registers, 8 KiB
    ("bwd_dkdv", "sm_80", FLOAT32, 128, BIASED): Tile(16, 32, 8, 2),  # 228 registers, 8 KiB
    ("bwd_dkdv", "sm_80", FLOAT32, 256, PLAIN): Tile(16, 16, 8, 1),  # 215 registers, 16 KiB
    ("bwd_dkdv", "sm_80", FLOAT32, 256, BIASED): Tile(16, 16, 8, 1),  # 229 registers, 16 KiB
    ("bwd_dkdv", "sm_90", HALF, 64, PLAIN): Tile(32, 128, 8, 2),  # 255 registers, 53 KiB
    ("bwd_dkdv", "sm_90", HALF, 64, BIASED): Tile(32, 128, 8, 2),  # 255 registers, 53 KiB
    ("bwd_dkdv", "sm_90", HALF, 128, PLAIN): Tile(16, 128, 8, 2),  # 238 registers, 85 KiB
    ("bwd_dkdv", "sm_90", HALF, 128, BIASED): Tile(16, 128, 8, 1),  # 255 registers, 80 KiB
    ("bwd_dkdv", "sm_90", HALF, 256, PLAIN): Tile(32, 32, 8, 2),  # 171 registers, 68 KiB; mma
    ("bwd_dkdv", "sm_90", HALF, 256, BIASED): Tile(32, 32, 8, 1),  # 252 registers, 80 KiB; mma
    ("bwd_dkdv", "sm_90", FLOAT32, 64, PLAIN): Tile(16, 128, 8, 1),  # 255 registers, 32 KiB
    ("bwd_dkdv", "sm_90", FLOAT32, 64, BIASED): Tile(16, 128, 8, 1),  # 255 registers, 32 KiB
    ("bwd_dkdv", "sm_90", FLOAT32, 128, PLAIN): Tile(16, 32, 8, 2),  # 222 registers, 8 KiB; mma
    ("bwd_dkdv", "sm_90", FLOAT32, 128, BIASED): Tile(16, 32, 8, 2),  # 204 registers, 8 KiB; mma
    ("bwd_dkdv", "sm_90", FLOAT32, 256, PLAIN): Tile(16, 32, 8, 1),  # 253 registers, 16 KiB; mma
    ("bwd_dkdv", "sm_90", FLOAT32, 256, BIASED): Tile(16, 32, 8, 2),  # 248 registers, 16 KiB; mma
    ("bwd_dkdv", "sm_100", HALF, 64, PLAIN): Tile(32, 128, 8, 2),  # 255 registers, 57 KiB
    ("bwd_dkdv", "sm_100", HALF, 64, BIASED): Tile(32, 64, 8, 2),  # 247 registers, 42 KiB
    ("bwd_dkdv", "sm_100", HALF, 128, PLAIN): Tile(32, 128, 8, 1),  # 254 registers, 80 KiB
    ("bwd_dkdv", "sm_100", HALF, 128, BIASED): Tile(32, 64, 8, 1),  # 162 registers, 48 KiB
    ("bwd_dkdv", "sm_100", HALF, 256, PLAIN): Tile(32, 32, 8, 2),  # 170 registers, 68 KiB; mma
    ("bwd_dkdv", "sm_100", HALF, 256, BIASED): Tile(32, 32, 8, 1),  # 252 registers, 80 KiB; mma
    ("bwd_dkdv", "sm_100", FLOAT32, 64, PLAIN): Tile(16, 64, 4, 1),  # 232 registers, 8 KiB
    ("bwd_dkdv", "sm_100", FLOAT32, 64, BIASED): Tile(16, 64, 4, 1),  # 235 registers, 8 KiB
    ("bwd_dkdv", "sm_100", FLOAT32, 128, PLAIN): Tile(16, 32, 8, 2),  # 215 registers, 8 KiB; mma
    ("bwd_dkdv", "sm_100", FLOAT32, 128, BIASED): Tile(16, 32, 8, 2),  # 197 registers, 8 KiB; mma
    ("bwd_dkdv", "sm_100", FLOAT32, 256, PLAIN): Tile(16, 32, 8, 1),  # 253 registers, 16 KiB; mma
    ("bwd_dkdv", "sm_100", FLOAT32, 256, BIASED): Tile(16, 32, 8, 2),  # 240 registers, 16 KiB; mma
    ("bwd_dq", "sm_80", HALF, 64, PLAIN): Tile(128, 32, 8, 2),  # 255 registers, 48 KiB
    ("bwd_dq", "sm_80", HALF, 64, BIASED): Tile(128, 64, 8, 2),  # 255 registers, 56 KiB
    ("bwd_dq", "sm_80", HALF, 128, PLAIN): Tile(64, 64, 8, 2),  # 252 registers, 80 KiB
    ("bwd_dq", "sm_80", HALF, 128, BIASED): Tile(64, 32, 8, 2),  # 255 registers, 60 KiB
    ("bwd_dq", "sm_80", HALF, 256, PLAIN): Tile(32, 32, 8, 1),  # 250 registers, 64 KiB
    ("bwd_dq", "sm_80", HALF, 256, BIASED): Tile(32, 32, 8, 1),  # 255 registers, 64 KiB
    ("bwd_dq", "sm_80", FLOAT32, 64, PLAIN): Tile(32, 32, 8, 2),  # 234 registers, 8 KiB
    ("bwd_dq", "sm_80", FLOAT32, 64, BIASED): Tile(32, 16, 8, 1),  # 228 registers, 8 KiB
    ("bwd_dq", "sm_80", FLOAT32, 128, PLAIN): Tile(32, 32, 8, 1),  # 251 registers, 16 KiB
    ("bwd_dq", "sm_80", FLOAT32, 128, BIASED): Tile(32, 16, 8, 2),  # 254 registers, 8 KiB
    ("bwd_dq", "sm_80", FLOAT32, 256, PLAIN): Tile(32, 16, 8, 2),  # 229 registers, 16 KiB
    ("bwd_dq", "sm_80", FLOAT32, 256, BIASED): Tile(32, 16, 8, 2),  # 255 registers, 16 KiB
    ("bwd_dq", "sm_90", HALF, 64, PLAIN): Tile(128, 64, 8, 2),  # 221 registers, 72 KiB
    ("bwd_dq", "sm_90", HALF, 64, BIASED): Tile(128, 64, 8, 2),  # 249 registers, 72 KiB
    ("bwd_dq", "sm_90", HALF, 128, PLAIN): Tile(128, 64, 8, 2),  # 254 registers, 136 KiB
    ("bwd_dq", "sm_90", HALF, 128, BIASED): Tile(128, 32, 8, 2),  # 252 registers, 120 KiB
    ("bwd_dq", "sm_90", HALF, 256, PLAIN): Tile(64, 16, 8, 2),  # 250 registers, 100 KiB
    ("bwd_dq", "sm_90", HALF, 256, BIASED): Tile(32, 16, 8, 1),  # 182 registers, 48 KiB; mma
    ("bwd_dq", "sm_90", FLOAT32, 64, PLAIN): Tile(64, 16, 4, 1),  # 228 registers, 16 KiB
    ("bwd_dq", "sm_90", FLOAT32, 64, BIASED): Tile(64, 32, 4, 1),  # 254 registers, 16 KiB
    ("bwd_dq", "sm_90", FLOAT32, 128, PLAIN): Tile(32, 32, 8, 2),  # 250 registers, 16 KiB; mma
    ("bwd_dq", "sm_90", FLOAT32, 128, BIASED): Tile(32, 16, 8, 2),  # 235 registers, 8 KiB; mma
    ("bwd_dq", "sm_90", FLOAT32, 256, PLAIN): Tile(32, 16, 8, 2),  # 231 registers, 16 KiB; mma
    ("bwd_dq", "sm_90", FLOAT32, 256, BIASED): Tile(32, 16, 8, 2),  # 242 registers, 16 KiB; mma
    ("bwd_dq", "sm_100", HALF, 64, PLAIN): Tile(128, 64, 8, 2),  # 216 registers, 79 KiB
    ("bwd_dq", "sm_100", HALF, 64, BIASED): Tile(128, 32, 8, 2),  # 248 registers, 69 KiB
    ("bwd_dq", "sm_100", HALF, 128, PLAIN): Tile(128, 64, 8, 2),  # 227 registers, 151 KiB
    ("bwd_dq", "sm_100", HALF, 128, BIASED): Tile(64, 32, 8, 2),  # 227 registers, 81 KiB
    ("bwd_dq", "sm_100", HALF, 256, PLAIN): Tile(128, 32, 8, 2),  # 219 registers, 214 KiB
    ("bwd_dq", "sm_100", HALF, 256, BIASED): Tile(32, 16, 8, 1),  # 183 registers, 48 KiB; mma
    ("bwd_dq", "sm_100", FLOAT32, 64, PLAIN): Tile(64, 32, 4, 1),  # 254 registers, 16 KiB
    ("bwd_dq", "sm_100", FLOAT32, 64, BIASED): Tile(64, 32, 4, 1),  # 244 registers, 16 KiB
    ("bwd_dq", "sm_100", FLOAT32, 128, PLAIN): Tile(32, 32, 8, 2),  # 235 registers, 16 KiB; mma
    ("bwd_dq", "sm_100", FLOAT32, 128, BIASED): Tile(32, 32, 8, 1),  # 254 registers, 16 KiB; mma
    ("bwd_dq", "sm_100", FLOAT32, 256, PLAIN): Tile(32, 16, 8, 2),  # 233 registers, 16 KiB; mma
    ("bwd_dq", "sm_100", FLOAT32, 256, BIASED): Tile(32, 16, 8, 2),  # 222 registers, 16 KiB; mma
}
# In place of rows that spill where triton 3.6 cannot pipeline the loop (launch.py), with
# what 3.6.0 needs. No tile of the 64 rows that wgmma takes did without spilling.
_UNPIPELINED: dict[tuple[str, str, bool, int, bool], Tile] = {
    ("bwd_dkdv", "sm_90", HALF, 256, PLAIN): Tile(64, 32, 8, 1),  # 182 registers, 128 KiB; mma
    ("bwd_dkdv", "sm_90", HALF, 256, BIASED): Tile(64, 32, 8, 1),  # 250 registers, 128 KiB; mma
    ("bwd_dq", "sm_90", HALF, 256, PLAIN): Tile(32, 64, 8, 1),  # 180 registers, 96 KiB; mma
}
# And rows that spill there for packed sequences alone, whose offsets take registers.
_UNPIPELINED_PACKED: dict[tuple[str, str, bool, int, bool], Tile] = {
    ("bwd_dkdv", "sm_90", HALF, 128, PLAIN): Tile(16, 64, 8, 1),  # 226 registers, 42 KiB
    ("bwd_dkdv", "sm_90", FLOAT32, 256, PLAIN): Tile(16, 16, 8, 1),  # 205 registers, 16 KiB; mma
}
# fmt: on


def tile(
    kernel: str,
    architecture: str,
    dtype: torch.dtype,
    size: int,
    is_biased: bool,
    is_pipelined: bool = True,
    is_packed: bool = False,
) -> Tile:
    """The tile of one of KERNELS for head dims of class `size`."""
    if architecture == INTERPRETER:
        return _INTERPRETED[kernel]
    # Decoding is bound by memory, not registers: one row serves both.
    is_biased = is_biased or kernel == "decode"
    key = (kernel, architecture, dtype == torch.float32, size, is_biased)
    if not is_pipelined and is_packed and key in _UNPIPELINED_PACKED:
        return _UNPIPELINED_PACKED[key]
    if not is_pipelined and key in _UNPIPELINED:
        return _UNPIPELINED[key]
    return _TABLE[key]


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
