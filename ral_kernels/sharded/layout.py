"""Which rank holds which positions of a sequence, what its rows see, and what that moves.

`ShardedPolicy` makes one `Plan` for a call. Every rank makes the same one, from arguments that are
the same on every rank, so that ranks agree on what they send without asking each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..runtime import checks

Range = tuple[int, int]  # half-open, of positions in the whole sequence
Layout = Literal["contiguous", "head_tail"] | Sequence[Sequence[Range]]
Moves = Literal["keys", "rows"]

# Bytes of keys that a rank may receive before the form that moves rows is considered. Below it the
# keys take less time than that form, which is plain PyTorch, would lose to the kernels.
MOST_KEYS = 256 << 20


class Piece(NamedTuple):
    """Chosen rows of one sequence that lie in one chunk of a rank."""

    rows: Range
    keys: Range  # what they see
    local: int  # place of the first one among the rank's queries


class BytesMoved(NamedTuple):
    """Bytes that ranks send each other for one loss and its backward.

    forward, backward: of all ranks together. busiest: what the rank that sends or receives the most
    does of it, in both directions of the loss.
    """

    forward: int
    backward: int
    busiest: int


@dataclass(frozen=True)
class Plan:
    """Positions of a sequence, or of several packed ones, over ranks.

    Attributes:
        chunks: of each rank, in the order in which it holds them.
        sequences: each sequence's positions.
        rows: each sequence's chosen rows, which have a policy.
        window_left: keys that a row sees before its own; -1 = all of its sequence.
    """

    chunks: tuple[tuple[Range, ...], ...]
    sequences: tuple[Range, ...]
    rows: tuple[Range, ...]
    window_left: int

    @property
    def world_size(self) -> int:
        return len(self.chunks)

    @property
    def num_rows(self) -> int:
        return sum(stop - start for start, stop in self.rows)

    @property
    def seqlen(self) -> int:
        return sum(stop - start for chunks in self.chunks for start, stop in chunks)

    def calls(self, rank: int) -> list[list[Piece]]:
        """The rank's rows: for each of its chunks that has any, one piece for each sequence."""
        calls, local = [], 0
        for chunk in self.chunks[rank]:
            pieces = []
            for (first, _), rows in zip(self.sequences, self.rows, strict=True):
                if (own := overlap(chunk, rows)) is not None:
                    keys = max(first, own[0] - self.window_left) if self.window_left >= 0 else first
                    pieces.append(Piece(own, (keys, own[1]), local + own[0] - chunk[0]))
            if pieces:
                calls.append(pieces)
            local += chunk[1] - chunk[0]
        return calls

    def keys_seen(self) -> list[list[Range]]:
        """Per rank, the positions of all keys that its rows see."""
        return [
            union(piece.keys for pieces in self.calls(rank) for piece in pieces)
            for rank in range(self.world_size)
        ]

    def all_rows(self) -> list[list[Range]]:
        """Per rank, the positions of all chosen rows."""
        return [union(self.rows) for _ in self.chunks]

    def place(self, position: int) -> int:
        """The place of a chosen row among all T of them."""
        return sum(min(max(position - start, 0), stop - start) for start, stop in self.rows)

    def bytes_moved(
        self, moves: Moves, batch_size: int, heads: tuple[int, int], head_dim: int, itemsize: int
    ) -> BytesMoved:
        """See `sharded_bytes`."""
        if moves == "keys":
            sent, received = self._exchanged(self.keys_seen())
            row = batch_size * heads[1] * head_dim * itemsize
            statistics = 4  # the rank's part of the loss
        else:
            sent, received = self._exchanged(self.all_rows())
            row = batch_size * heads[0] * head_dim * itemsize
            # Of each head and row: three statistics of both sides, and U. Of each row: D.
            statistics = 4 * batch_size * self.num_rows * (7 * heads[0] + 1)
        statistics *= self.world_size - 1  # to every other rank
        backward = sum(sent) * row  # gradients go back the way that keys or rows came
        busiest = max(map(max, sent, received)) * row
        return BytesMoved(
            backward + self.world_size * statistics, backward, 2 * busiest + statistics
        )

    def choose(self, *sizes: Any) -> Moves:
        """Which of the two ways to take, from arguments of `bytes_moved` after the first."""
        _, received = self._exchanged(self.keys_seen())
        batch_size, (_, num_kv_heads), head_dim, itemsize = sizes
        if max(received) * batch_size * num_kv_heads * head_dim * itemsize <= MOST_KEYS:
            return "keys"
        by_rows, by_keys = (self.bytes_moved(x, *sizes) for x in ("rows", "keys"))
        return "rows" if sum(by_rows[:2]) < sum(by_keys[:2]) else "keys"

    def _exchanged(self, needs: list[list[Range]]) -> tuple[list[int], list[int]]:
        """Positions that each rank sends to others, and receives from others."""
        sent, received = [0] * self.world_size, [0] * self.world_size
        for source, chunks in enumerate(self.chunks):
            for target, ranges in enumerate(needs):
                if source != target:
                    count = sum(stop - start for start, stop in overlaps(chunks, ranges))
                    sent[source] += count
                    received[target] += count
        return sent, received


def overlap(a: Range, b: Range) -> Range | None:
    start, stop = max(a[0], b[0]), min(a[1], b[1])
    return (start, stop) if start < stop else None


def overlaps(chunks: Iterable[Range], ranges: Sequence[Range]) -> list[Range]:
    """What `ranges` have of `chunks`: by chunk, then by range."""
    found = (overlap(chunk, each) for chunk in chunks for each in ranges)
    return [each for each in found if each is not None]


def union(ranges: Iterable[Range]) -> list[Range]:
    """Disjoint ranges in ascending order; ranges that touch are joined."""
    joined: list[Range] = []
    for start, stop in sorted(each for each in ranges if each[0] < each[1]):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def make_plan(
    op: str,
    layout: Any,
    world_size: int,
    seqlen: int,
    *,
    rows: Any,
    cu_seqlens: Any,
    window_left: int,
) -> Plan:
    """Check the arguments that say where rows are.

    Args:
        seqlen: of the whole, where the layout has a name.
        rows, cu_seqlens: as in `ShardedPolicy`.
    """
    chunks = resolve_layout(op, layout, world_size, seqlen)
    total = sum(stop - start for each in chunks for start, stop in each)
    if cu_seqlens is None:
        return Plan(chunks, ((0, total),), (checks.resolve_rows(op, rows, total),), window_left)
    offsets = _offsets(op, cu_seqlens, total)
    sequences = tuple(pairwise(offsets))
    if rows is None:
        return Plan(chunks, sequences, sequences, window_left)
    if not isinstance(rows, (list, tuple)) or len(rows) != len(sequences):
        raise ValueError(
            f"{op}: rows must be None or (start, stop) for each of the {len(sequences)} packed "
            f"sequences; got {rows!r}"
        )
    chosen = []
    for (start, stop), own in zip(sequences, rows, strict=True):
        first, last = checks.resolve_rows(op, own, stop - start)
        chosen.append((start + first, start + last))
    return Plan(chunks, sequences, tuple(chosen), window_left)


def resolve_layout(
    op: str, layout: Any, world_size: int, seqlen: int
) -> tuple[tuple[Range, ...], ...]:
    """The chunks of each rank, in the order in which it holds them."""
    if isinstance(layout, str):
        if layout not in ("contiguous", "head_tail"):
            raise ValueError(
                f"{op}: layout must be 'contiguous', 'head_tail' or the chunks of each rank; got "
                f"{layout!r}"
            )
        parts = world_size if layout == "contiguous" else 2 * world_size
        if seqlen % parts != 0:
            raise ValueError(
                f"{op}: layout {layout!r} must have {parts} chunks of one length; got "
                f"{seqlen} positions over {world_size} ranks"
            )
        size = seqlen // parts
        numbers = [
            (rank,) if layout == "contiguous" else (rank, parts - 1 - rank)
            for rank in range(world_size)
        ]
        return tuple(tuple((n * size, (n + 1) * size) for n in each) for each in numbers)
    if not isinstance(layout, (list, tuple)) or len(layout) != world_size:
        raise ValueError(
            f"{op}: layout must be 'contiguous', 'head_tail' or (start, stop) chunks for each of "
            f"the {world_size} ranks; got {layout!r}"
        )
    chunks = tuple(tuple((int(start), int(stop)) for start, stop in each) for each in layout)
    at = 0
    for start, stop in sorted(chunk for each in chunks for chunk in each if chunk[0] != chunk[1]):
        if start != at or stop < start:
            raise ValueError(
                f"{op}: layout must give every position from 0 on to one rank; got {layout!r}"
            )
        at = stop
    return chunks


def _offsets(op: str, cu_seqlens: Any, total: int) -> list[int]:
    wanted = "None, or the offsets of the packed sequences, int [S + 1]"
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"{op}: cu_seqlens must be {wanted}; got {checks.dtype_name(cu_seqlens.dtype)} "
                f"{tuple(cu_seqlens.shape)}"
            )
        cu_seqlens = cu_seqlens.tolist()
    if not isinstance(cu_seqlens, (list, tuple)) or not all(map(checks.is_int, cu_seqlens)):
        raise TypeError(f"{op}: cu_seqlens must be {wanted}; got {cu_seqlens!r}")
    offsets = [int(each) for each in cu_seqlens]
    if not offsets or offsets[0] != 0 or offsets != sorted(offsets) or offsets[-1] > total:
        raise ValueError(
            f"{op}: cu_seqlens must ascend from 0 to at most {total}, the positions of all ranks; "
            f"got {offsets}"
        )
    return offsets


def sharded_bytes(
    seqlen: int,
    world_size: int,
    *,
    rows: Any = None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    batch_size: int = 1,
    layout: Layout = "contiguous",
    window: int | tuple[int | None, int | None] | None = None,
    moves: Moves | None = None,
) -> BytesMoved:
    """What ranks send each other for one `ShardedPolicy.ral_loss` and its backward, in bytes.

    It counts keys or queries, their gradients, and the float32 sums of rows, against a snapshot and
    without spans. A snapshot moves its keys or queries once more, when it is made.

    Args:
        seqlen: N, of the whole sequence.
        world_size: W, the ranks that hold it.
        rows, layout, window, moves: as in `ShardedPolicy`.
        num_heads, num_kv_heads, head_dim, dtype, batch_size: of q and k.

    Raises:
        TypeError, ValueError: an argument of a wrong type or value.
    """
    op = "sharded_bytes"
    left, _ = checks.resolve_window(op, window, is_causal=True)
    plan = make_plan(op, layout, world_size, seqlen, rows=rows, cu_seqlens=None, window_left=left)
    sizes = batch_size, (num_heads, num_kv_heads), head_dim, dtype.itemsize
    return plan.bytes_moved(plan.choose(*sizes) if moves is None else moves, *sizes)
