"""What the launches of `policy` and `policy_divergence` share: arguments by name, tiles, chunks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ral_kernels.runtime import triton_runtime
from ral_kernels.runtime.triton_runtime import Tile

from ..arguments import PolicyArgs
from . import tiles

LOG2_E = math.log2(math.e)


def tensor_arguments(name: str, x: Tensor | None, dims: Sequence[str]) -> dict[str, Any]:
    """A tensor and its strides along `dims`; None and 0 where there is none."""
    strides = x.stride() if x is not None else (0,) * len(dims)
    return {f"{name}_ptr": x} | {
        f"{name}_stride_{d}": s for d, s in zip(dims, strides, strict=False)
    }


def precision() -> str:
    """How float32 is multiplied: in three products of tf32, whose sum has float32's accuracy."""
    return "ieee" if triton_runtime.interpreted() else "tf32x3"


@dataclass(frozen=True)
class Keys:
    """What the two policies of a comparison have in common: rows, and which keys count for them."""

    num_rows: int
    seqlen_k: int
    query_start: int
    key_padding_mask: Tensor | None  # uint8 [B, N], unit last stride
    scope: Tensor | None  # uint8 [B or 1, N], unit last stride
    exclude_self: bool

    @classmethod
    def of(cls, args: PolicyArgs) -> Keys:
        padding, scope = args.key_padding_mask, args.scope
        return cls(
            num_rows=args.num_rows,
            seqlen_k=args.seqlen_k,
            query_start=args.query_start,
            key_padding_mask=None if padding is None else padding.contiguous().view(torch.uint8),
            scope=None if scope is None else scope.contiguous().view(torch.uint8),
            exclude_self=args.exclude_self,
        )

    def part(self, batch: slice, rows: slice) -> Keys:
        padding, scope = self.key_padding_mask, self.scope
        return replace(
            self,
            num_rows=rows.stop - rows.start,
            query_start=self.query_start + rows.start,
            key_padding_mask=None if padding is None else padding[batch],
            scope=scope if scope is None or scope.shape[0] == 1 else scope[batch],
        )

    def arguments(self) -> dict[str, Any]:
        padding, scope = self.key_padding_mask, self.scope
        return {
            "padding_ptr": padding,
            "padding_stride_b": 0 if padding is None else padding.stride(0),
            "scope_ptr": scope,
            "scope_stride_b": 0 if scope is None or scope.shape[0] == 1 else scope.stride(0),
            "num_rows": self.num_rows,
            "seqlen_k": self.seqlen_k,
            "query_start": self.query_start,
            "EXCLUDE_SELF": self.exclude_self,
        }


@dataclass(frozen=True)
class Side:
    """One policy: its tensors, its scores, and what its rows see."""

    q: Tensor  # [B, H, T, D]
    k: Tensor  # [B, Hk, N - N0, D]
    scale: float
    window_left: int
    window_right: int
    softcap: float
    k_prefix: Tensor | None = None  # [P, Hk, N0, D]
    prefix_index: Tensor | None = None  # int64 [B]
    span_bias: Tensor | None = None  # [B, H, T, S]
    span_ids: Tensor | None = None  # int32 [N] or [B, N]

    @classmethod
    def of(cls, args: PolicyArgs) -> Side:
        return cls(
            args.q,
            args.k,
            args.scale,
            args.window_left,
            args.window_right,
            args.softcap,
            span_bias=args.span_bias,
            span_ids=args.span_ids,
        )

    def part(self, batch: slice, rows: slice) -> Side:
        index, bias, ids = self.prefix_index, self.span_bias, self.span_ids
        return replace(
            self,
            q=self.q[batch, :, rows],
            k=self.k[batch],
            prefix_index=None if index is None else index[batch],
            span_bias=None if bias is None else bias[batch, :, rows],
            span_ids=ids if ids is None or ids.dim() == 1 else ids[batch],
        )

    @property
    def batch_size(self) -> int:
        return self.q.shape[0]

    @property
    def num_heads(self) -> int:
        return self.q.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def padded_head_dim(self) -> int:
        return max(16, 1 << (self.q.shape[3] - 1).bit_length())

    def tile(self, kernel: str) -> Tile:
        return tiles.tile(kernel, *self._tile_key())

    def tuned(self, kernel: str, keys: Keys, run: Callable[[Tile], None]) -> Tile:
        """The tile to `run` a kernel with: the table's, or what RAL_AUTOTUNE=1 finds.

        Two policies of one shape get one tile: only then are equal policies equal bit for bit.
        """
        key = self._tile_key()
        length = (1 << (n - 1).bit_length() for n in (keys.num_rows, keys.seqlen_k))
        shape = (*key, *length, self.num_heads, self.num_kv_heads)
        return triton_runtime.tuned(
            f"policy_{kernel}",
            shape,
            tiles.tile(kernel, *key),
            functools.partial(tiles.candidates, kernel, *key),
            run,
            self.q.device,
        )

    def _tile_key(self) -> tuple[str, torch.dtype, int, bool]:
        heavy = self.softcap != 0.0 or self.span_bias is not None
        architecture = triton_runtime.architecture(self.q.device)
        return architecture, self.q.dtype, self.padded_head_dim, heavy

    def tensors(self) -> dict[str, Any]:
        """q and k, and sizes of heads."""
        return {
            **tensor_arguments("q", self.q, "bht"),
            **tensor_arguments("k", self.k, "bhn"),
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.q.shape[3],
            "HEAD_DIM": self.padded_head_dim,
            "PRECISION": precision(),
        }

    def prefix(self) -> dict[str, Any]:
        return {
            **tensor_arguments("prefix", self.k_prefix, "bhn"),
            "prefix_index_ptr": self.prefix_index,
            "prefix_length": 0 if self.k_prefix is None else self.k_prefix.shape[2],
        }

    def spans(self) -> dict[str, Any]:
        return {**tensor_arguments("bias", self.span_bias, "bhts"), **self.ids()}

    def ids(self) -> dict[str, Any]:
        ids = self.span_ids
        stride = ids.stride(0) if ids is not None and ids.dim() == 2 else 0
        return {"span_ids_ptr": ids, "span_ids_stride_b": stride}

    def view(self, keys: Keys) -> dict[str, Any]:
        """Scale, soft cap and window, a missing bound as one beyond every key."""
        beyond = keys.num_rows + keys.seqlen_k + abs(keys.query_start)
        left, right = self.window_left, self.window_right
        return {
            "window_left": beyond if left < 0 else min(left, beyond),
            "window_right": beyond if right < 0 else min(right, beyond),
            "score_factor": self.scale * LOG2_E
            if self.softcap == 0.0
            else self.scale / self.softcap,
            "softcap_log2": self.softcap * LOG2_E,
            "SOFTCAP": self.softcap != 0.0,
        }


def blocks(side: Side, tile: Tile) -> dict[str, int]:
    """Sizes of a tile: rows, keys, and features at a time."""
    block_d = min(tile.flags.get("BLOCK_D", side.padded_head_dim), side.padded_head_dim)
    return {"BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k, "BLOCK_D": block_d}


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def splits_of(programs: int, seqlen_k: int, block_k: int, device: torch.device) -> tuple[int, int]:
    """(number of pieces of the keys, keys of a piece), for so many programs a piece."""
    key_blocks = cdiv(seqlen_k, block_k)
    multiprocessors = triton_runtime.num_multiprocessors(device)
    splits = tiles.num_splits(programs, key_blocks, multiprocessors)
    per_split = cdiv(key_blocks, splits) * block_k
    return cdiv(seqlen_k, per_split), per_split


def row_chunks(
    batch_size: int, num_rows: int, seqlen_k: int, block_q: int, device: torch.device
) -> Iterator[tuple[slice, slice]]:
    """(samples, rows) such that a float32 for each row and key fits the scratch of a call.

    Whole samples where several fit, else blocks of rows of one sample.
    """
    fitting = tiles.scratch_elements(triton_runtime.architecture(device)) // seqlen_k
    if fitting >= num_rows:
        samples = fitting // num_rows
        for b in range(0, batch_size, samples):
            yield slice(b, min(b + samples, batch_size)), slice(0, num_rows)
        return
    rows = max(fitting // block_q, 1) * block_q
    for b in range(batch_size):
        for t in range(0, num_rows, rows):
            yield slice(b, b + 1), slice(t, min(t + rows, num_rows))
