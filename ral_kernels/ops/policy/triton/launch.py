"""What the launches of `policy` and `policy_divergence` share: arguments, tiles, chunks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ....runtime import triton_runtime
from ....runtime.triton_rows import Rows, SpanValues, constant
from ....runtime.triton_runtime import Tile
from ...divergence.triton.kernels import RowEnds
from ..arguments import PolicyArgs
from ..chunks import Chunk, Packing, chunks_of_samples, chunks_of_sequences
from . import tiles
from .parameters import (
    Flags,
    Heads,
    HeadWeights,
    Norm,
    Outcomes,
    PerRow,
    Prefix,
    Samples,
    Score,
    Target,
    TileSizes,
)

LOG2_E = math.log2(math.e)
VECTOR_BYTES = 16  # of one load of a thread
SPECIALISED = 16  # Triton compiles strides that are multiples of it apart from others
# A bound of a window that every key is within, where the host knows no position of a row. Twice it
# fits int32.
BEYOND = 2**29


def precision() -> str:
    """How float32 is multiplied: in three products of tf32, whose sum has float32's accuracy."""
    return "ieee" if triton_runtime.interpreted() else "tf32x3"


@dataclass(frozen=True)
class Keys:
    """What the two policies of a comparison share: rows, and the keys that count for them."""

    num_rows: int
    seqlen_k: int  # of the longest packed sequence
    total_k: int  # of all packed sequences
    query_start: int
    key_padding_mask: Tensor | None  # uint8 [B, N], unit last stride
    scope: Tensor | None  # uint8 [B or 1, N], unit last stride
    padding_before: Tensor | None  # int32 [B, N + 1]: `Flags`
    scope_before: Tensor | None  # int32 [B or 1, N + 1]
    exclude_self: bool
    packing: Packing | None = None

    @classmethod
    def of(cls, args: PolicyArgs) -> Keys:
        padding, scope = args.key_padding_mask, args.scope
        packing = Packing.of(args)
        return cls(
            num_rows=args.num_rows,
            seqlen_k=args.seqlen_k if packing is None else args.max_keys,
            total_k=args.seqlen_k,
            query_start=args.query_start,
            key_padding_mask=None if padding is None else padding.contiguous().view(torch.uint8),
            scope=None if scope is None else scope.contiguous().view(torch.uint8),
            padding_before=_counts_before(padding),
            scope_before=_counts_before(scope),
            exclude_self=args.exclude_self,
            packing=packing,
        )

    def part(self, chunk: Chunk) -> Keys:
        batch, rows, keys = chunk.batch, chunk.rows, chunk.keys
        to_end = slice(keys.start, keys.stop + 1)
        return replace(
            self,
            num_rows=rows.stop - rows.start,
            seqlen_k=chunk.seqlen_k,
            total_k=keys.stop - keys.start,
            query_start=chunk.query_start,
            key_padding_mask=_columns(self.key_padding_mask, batch, keys),
            scope=_columns(self.scope, batch, keys),
            padding_before=_columns(self.padding_before, batch, to_end),
            scope_before=_columns(self.scope_before, batch, to_end),
            packing=chunk.packing,
        )

    def row_blocks(self, block_q: int, batch_size: int) -> int:
        """Blocks of rows of all samples, or of all packed sequences; some of these are empty."""
        if self.packing is None:
            return cdiv(self.num_rows, block_q) * batch_size
        return self.num_rows // block_q + self.packing.num_sequences

    def key_blocks(self, block_k: int, batch_size: int) -> int:
        if self.packing is None:
            return cdiv(self.total_k, block_k) * batch_size
        return self.total_k // block_k + self.packing.num_sequences

    def ends(self) -> RowEnds | None:
        if self.packing is None:
            return None
        return RowEnds(self.packing.row_offsets, self.packing.key_offsets)

    def samples(self, batch_size: int) -> Samples:
        if self.packing is None:
            return Samples(batch_size, None, None, None, None)
        packing = self.packing
        return Samples(
            packing.num_sequences, self.total_k, packing.row_offsets, packing.key_offsets,
            packing.query_starts,
        )  # fmt: skip

    def scratch(self, side: Side) -> Tensor:
        """float32 [B, T, N] whose rows begin at multiples of VECTOR_BYTES, for any N."""
        width = cdiv(self.seqlen_k, SPECIALISED) * SPECIALISED
        shape = (side.batch_size, self.num_rows, width)
        return side.q.new_empty(shape, dtype=torch.float32)[:, :, : self.seqlen_k]

    def rows(self, x: Tensor) -> Rows:
        """A tensor [B, H, T or N, D] as kernels take it."""
        b, h, t, _ = x.stride()
        return Rows(x, b if self.packing is None else t, h, t)

    def span_values(self, x: Tensor | None) -> SpanValues | None:
        values = SpanValues.of(x)
        if values is None or self.packing is None:
            return values
        return values._replace(stride_b=values.stride_t)

    def outcomes(self, x: Tensor) -> Outcomes:
        b, t = x.stride()[:2]
        b = b if self.packing is None else t
        aligned = not any(n % VECTOR_BYTES for n in (x.data_ptr(), 4 * b, 4 * t))
        return Outcomes(x, b, t, constant(aligned))

    def per_row(self, x: Tensor) -> PerRow:
        return PerRow(x, x.stride(0) if self.packing is None else x.stride(1))

    def norm(self, x: Tensor) -> Norm:
        i, b, h, t = x.stride()
        return Norm(x, i, b if self.packing is None else t, h)

    def per_key(self, x: Tensor | None) -> tuple[Tensor | None, int]:
        """A tensor [N] or [B, N], and what is between two samples: 0 where they share it."""
        if x is None:
            return None, 0
        if self.packing is not None:
            return x, x.stride(-1)
        return x, 0 if x.dim() == 1 or x.shape[0] == 1 else x.stride(0)

    def flags(self, span_ids: Tensor | None) -> Flags:
        return Flags(
            *self.per_key(span_ids), *self.per_key(self.key_padding_mask),
            *self.per_key(self.scope), *self.per_key(self.padding_before),
            *self.per_key(self.scope_before),
        )  # fmt: skip


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
    head_weights: Tensor | None = None  # float32 [B, H, T]

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
            head_weights=weights_of_rows(args.head_weights, args),
        )

    def weights(self) -> HeadWeights:
        x = self.head_weights
        return HeadWeights(None, 0, 0, 0) if x is None else HeadWeights(x, *x.stride())

    def part(self, chunk: Chunk) -> Side:
        index, bias, ids = self.prefix_index, self.span_bias, self.span_ids
        weights = self.head_weights
        batch, rows, keys = chunk.batch, chunk.rows, chunk.keys
        return replace(
            self,
            q=self.q[batch, :, rows],
            k=self.k[batch, :, keys],
            prefix_index=None if index is None else index[batch],
            span_bias=None if bias is None else bias[batch, :, rows],
            span_ids=None if ids is None else of_sample(ids, batch)[..., keys],
            head_weights=None if weights is None else weights[batch, :, rows],
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

    @functools.cached_property
    def padded_head_dim(self) -> int:
        return max(16, 1 << (self.q.shape[3] - 1).bit_length())

    def tile(self, kernel: str) -> Tile:
        return tiles.tile(kernel, *self._tile_key)

    def tuned(self, kernel: str, keys: Keys, run: Callable[[Tile], None]) -> Tile:
        """The tile to `run` a kernel with: the table's, or what RAL_AUTOTUNE=1 finds.

        Two policies of one shape get one tile: only then are equal policies equal bit for bit.
        """
        key = self._tile_key
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

    @functools.cached_property
    def _tile_key(self) -> tuple[str, torch.dtype, int, bool]:
        heavy = self.softcap != 0.0 or self.span_bias is not None
        architecture = triton_runtime.architecture(self.q.device)
        return architecture, self.q.dtype, self.padded_head_dim, heavy

    def prefix(self) -> Prefix:
        if self.k_prefix is None:
            return NO_PREFIX
        b, h, t, _ = self.k_prefix.stride()
        return Prefix(self.k_prefix, b, h, t, self.prefix_index, self.k_prefix.shape[2])

    def arguments(self, keys: Keys, tile: Tile) -> dict[str, Any]:
        """What every kernel takes that multiplies rows and keys."""
        has_softcap = self.softcap != 0.0
        factor = self.scale / self.softcap if has_softcap else self.scale * LOG2_E
        return {
            "q": keys.rows(self.q),
            "k": keys.rows(self.k),
            "bias": keys.span_values(self.span_bias),
            "flags": keys.flags(self.span_ids),
            "samples": keys.samples(self.batch_size),
            "heads": Heads(self.num_heads, self.num_kv_heads, keys.seqlen_k),
            **self.positions(keys),
            "score": Score(self.scale, factor, self.softcap * LOG2_E, constant(has_softcap)),
            "tile": _tile_sizes(
                self.q.shape[3], self.padded_head_dim, self.features(tile), tile.block_q,
                tile.block_k, keys.exclude_self, precision(),
            ),
        }  # fmt: skip

    def positions(self, keys: Keys) -> dict[str, int]:
        """Where rows stand and how far they see; a missing bound is one beyond every key."""
        beyond = keys.num_rows + keys.seqlen_k + abs(keys.query_start)
        if keys.packing is not None:
            beyond = BEYOND
        left, right = self.window_left, self.window_right
        return {
            "num_rows": keys.num_rows,
            "query_start": keys.query_start,
            "window_left": beyond if left < 0 else min(left, beyond),
            "window_right": beyond if right < 0 else min(right, beyond),
        }

    def features(self, tile: Tile) -> int:
        """How many features a product takes at a time."""
        return min(tile.flags.get("BLOCK_D", self.padded_head_dim), self.padded_head_dim)


def weights_of_rows(weights: Tensor | None, args: PolicyArgs) -> Tensor | None:
    """Weights [B, H], or [S, H] of packed sequences, as [B, H, T]."""
    packing = Packing.of(args)
    if weights is None or packing is None:
        return None if weights is None else weights[:, :, None].expand(-1, -1, args.num_rows)
    rows = torch.arange(args.num_rows, dtype=torch.int32, device=weights.device)
    # How many sequences end before a row; rows after the last one take any.
    index = torch.searchsorted(packing.row_offsets[1:], rows, right=True)
    return weights[index.clamp_(max=packing.num_sequences - 1)].T[None]


NO_PREFIX = Prefix(None, 0, 0, 0, None, 0)
NO_TARGET = Target(None, 0, 0, None, 0, 0, 0, PerRow(None, 0), PerRow(None, 0), None, constant(0))


@functools.lru_cache(1024)
def _tile_sizes(*sizes: int | bool | str) -> TileSizes:
    return TileSizes(*map(constant, sizes))


def _counts_before(mask: Tensor | None) -> Tensor | None:
    """int32 [B, N + 1]: how many of the keys before each key are True."""
    if mask is None:
        return None
    before = mask.new_zeros((mask.shape[0], mask.shape[1] + 1), dtype=torch.int32)
    torch.cumsum(mask, 1, dtype=torch.int32, out=before[:, 1:])
    return before


def _columns(x: Tensor | None, batch: slice, columns: slice) -> Tensor | None:
    return None if x is None else of_sample(x, batch)[:, columns]


def of_sample(x: Tensor, batch: slice) -> Tensor:
    """Samples of a tensor [N], [1, N] or [B, N]."""
    return x if x.dim() == 1 or x.shape[0] == 1 else x[batch]


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def splits_of(programs: int, seqlen_k: int, block_k: int, device: torch.device) -> tuple[int, int]:
    """(number of pieces of the keys, keys of a piece), where a piece takes `programs` programs."""
    key_blocks = cdiv(seqlen_k, block_k)
    multiprocessors = triton_runtime.num_multiprocessors(device)
    splits = tiles.num_splits(programs, key_blocks, multiprocessors)
    per_split = cdiv(key_blocks, splits) * block_k
    return cdiv(seqlen_k, per_split), per_split


def row_chunks(keys: Keys, batch_size: int, device: torch.device) -> Iterator[Chunk]:
    """Chunks for which a float32 for each row and key fits the scratch of a call."""
    architecture = triton_runtime.architecture(device)
    limit, step = tiles.scratch_elements(architecture), tiles.chunk_rows(architecture)
    if keys.packing is not None:
        return chunks_of_sequences(
            keys.packing, keys.num_rows, keys.seqlen_k, keys.total_k, limit, step
        )
    return chunks_of_samples(
        batch_size, keys.num_rows, keys.seqlen_k, keys.query_start, limit, step
    )
