"""Which rows the kernels for GPUs take together, and where packed sequences lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .arguments import PolicyArgs

ALIGNMENT = 4  # int32 in 16 bytes: for other pointers Triton compiles a kernel once more


@dataclass(frozen=True)
class Packing:
    """Sequences that lie one after another in the one sample of a call."""

    row_offsets: Tensor  # int32 [S + 1]
    key_offsets: Tensor  # int32 [S + 1]
    query_starts: Tensor  # int32 [S]

    @classmethod
    def of(cls, args: PolicyArgs) -> Packing | None:
        if args.cu_seqlens_q is None:
            return None
        assert args.cu_seqlens_k is not None and args.query_starts is not None
        return cls(
            args.cu_seqlens_q.contiguous(),
            args.cu_seqlens_k.contiguous(),
            args.query_starts.contiguous(),
        )

    @property
    def num_sequences(self) -> int:
        return self.query_starts.shape[0]


@dataclass(frozen=True)
class Chunk:
    """Whole samples, whole packed sequences, or some rows of one sample or sequence."""

    batch: slice
    rows: slice
    keys: slice
    seqlen_k: int  # of the longest sequence
    query_start: int
    packing: Packing | None
    sequences: slice  # that it has, of the packed ones; `batch` where not packed
    is_first: bool  # of the chunks that have these keys
    is_last: bool


def clear_packed(args: PolicyArgs, *outputs: Tensor | None) -> None:
    """Zero what the kernels do not write: rows and keys of no sequence, and keys of other ones."""
    for x in outputs if args.is_packed else ():
        if x is not None:
            x.zero_()


def chunks_of_samples(
    batch_size: int, num_rows: int, seqlen_k: int, query_start: int, limit: int, block_q: int
) -> Iterator[Chunk]:
    """Chunks in which a float32 for each row and key takes `limit` numbers, or block_q rows."""
    fitting = limit // seqlen_k
    samples = max(fitting // num_rows, 1)
    step = num_rows if fitting >= num_rows else max(fitting // block_q, 1) * block_q
    for b in range(0, batch_size, samples):
        for t in range(0, num_rows, step):
            stop = min(t + step, num_rows)
            batch = slice(b, min(b + samples, batch_size))
            yield Chunk(
                batch=batch,
                rows=slice(t, stop),
                keys=slice(0, seqlen_k),
                seqlen_k=seqlen_k,
                query_start=query_start + t,
                packing=None,
                sequences=batch,
                is_first=t == 0,
                is_last=stop == num_rows,
            )


def chunks_of_sequences(
    packing: Packing, num_rows: int, seqlen_k: int, total_k: int, limit: int, block_q: int
) -> Iterator[Chunk]:
    """Likewise. A sequence of its own chunks is taken as a sample.

    Where all sequences together do not fit, the host reads their offsets, once. Rows that see no
    key, and what lies beyond the last sequence, may be in no chunk.
    """
    if num_rows * seqlen_k <= limit:
        everything = slice(0, packing.num_sequences)
        yield _packed_chunk(packing, everything, slice(0, num_rows), slice(0, total_k), seqlen_k)
        return
    count = packing.num_sequences
    offsets = torch.cat([packing.row_offsets, packing.key_offsets, packing.query_starts]).tolist()
    rows, keys, starts = offsets[: count + 1], offsets[count + 1 : -count], offsets[-count:]
    widths = [keys[i + 1] - keys[i] if rows[i + 1] > rows[i] else 0 for i in range(count)]
    groups = _groups(rows, widths, limit)
    together = [range(*group) for group in groups if group[1] - group[0] > 1]
    packings = iter(_packings(together, rows, keys, starts, packing.query_starts.device))
    for first, stop in groups:
        sequences = slice(first, stop)
        own_rows, own_keys = slice(rows[first], rows[stop]), slice(keys[first], keys[stop])
        if stop - first > 1:
            width = max(widths[sequences])
            yield _packed_chunk(next(packings), sequences, own_rows, own_keys, width)
            continue
        sample = 1, own_rows.stop - own_rows.start, widths[first], starts[first]
        for chunk in chunks_of_samples(*sample, limit, block_q):
            start, end = (rows[first] + t for t in (chunk.rows.start, chunk.rows.stop))
            yield replace(chunk, rows=slice(start, end), keys=own_keys, sequences=sequences)


def _packed_chunk(
    packing: Packing, sequences: slice, rows: slice, keys: slice, seqlen_k: int
) -> Chunk:
    one = slice(0, 1)
    return Chunk(one, rows, keys, seqlen_k, 0, packing, sequences, is_first=True, is_last=True)


def _groups(rows: list[int], widths: list[int], limit: int) -> list[tuple[int, int]]:
    """Ranges of sequences: as many as fit together, or one. Ranges that see no key are left out."""
    ranges = []
    first = widest = 0
    for i, width in enumerate(widths):
        if i > first and (rows[i + 1] - rows[first]) * max(widest, width) > limit:
            ranges.append((first, i, widest))
            first, widest = i, 0
        widest = max(widest, width)
    ranges.append((first, len(widths), widest))
    return [(first, stop) for first, stop, widest in ranges if widest > 0]


def _packings(
    groups: list[range], rows: list[int], keys: list[int], starts: list[int], device: torch.device
) -> list[Packing]:
    """The offsets of each group from its first row and key, in one copy to the device."""
    numbers: list[int] = []
    bounds = []
    for group in groups:
        ends = [*group, group.stop]
        for table in (
            [rows[i] - rows[group.start] for i in ends],
            [keys[i] - keys[group.start] for i in ends],
            [starts[i] for i in group],
        ):
            bounds.append(slice(len(numbers), len(numbers) + len(table)))
            numbers += table + [0] * (-len(table) % ALIGNMENT)
    on_device = torch.tensor(numbers, dtype=torch.int32).to(device)
    tables = [on_device[bound] for bound in bounds]
    return [Packing(*tables[i : i + 3]) for i in range(0, len(tables), 3)]
