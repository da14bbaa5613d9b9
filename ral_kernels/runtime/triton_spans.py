"""Blocks of keys made for spans: the table by which Triton kernels sum over spans.

A kernel takes keys a block at a time. The keys of a block need not be neighbours, because K and V
are read row by row. So the table cuts runs of keys, each of one span or of none, into blocks:

- *whole* blocks: `block_k` keys of one run. They are neighbours, and come first, in order.
- *short* blocks, where they are asked for: `block_k` neighbours from runs that are shorter.
- *gathered* blocks hold what is left: one span that almost fills a block, keys of no span, or keys
  of several spans. Each stays within CHUNK keys.

Short blocks, and gathered ones of several spans, are *mixed*: they need a product with one-hot
rows. The table is made on the device, without a wait of the host, and kept as long as the ids. Ids
need not be sorted.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdRef, WeakTensorKeyDictionary

from . import triton_runtime
from .triton_blocks import Range, Ranges

# Kinds of blocks: a span >= 0, or one of these. RETURNS - span is a span whose keys may have come
# before: what is stored for it must be added to.
NO_SPAN = tl.constexpr(-1)
MIXED = tl.constexpr(-2)
EMPTY = tl.constexpr(-3)
RETURNS = tl.constexpr(-4)
SHORT_KEYS = 48  # of a span; `least_keys` of the largest block
CHUNK = tl.constexpr(4096)  # keys; a program at the diagonal visits no gathered block beyond


@dataclass(frozen=True)
class SpanBlocks:
    """What `span_blocks` finds, for samples or packed sequences one after another.

    Those of a sequence begin at `first_span_block`. Positions count from its first key.
    """

    block_k: int
    blocks: int  # of a sample, or of all packed sequences: a bound, the last ones are EMPTY
    samples: int  # with ids of their own; 1 where the batch shares them
    entries: Tensor  # int64 [samples * blocks + 1]: the kind of a block << 32 | its first key
    positions: Tensor  # int32 [samples * blocks + 1, block_k]: keys, -1 after the last
    counts: Tensor  # int32 [samples * blocks]: of a MIXED block, how many distinct spans
    ids: Tensor  # int32 [samples * blocks + 1, block_k]: these, by first appearance; then -1
    local: Tensor  # int32 [samples * blocks, block_k]: of every key, its index into `ids`
    whole_before: Tensor  # int32 [samples * N + 1]: whole blocks that begin before a key
    short_before: Tensor | None  # int32 [samples * N + 1]: short blocks that do; None: none is made
    gathered_before: Tensor  # int32 [samples * N + 1]: gathered blocks that do


def num_blocks(total: int, block: int, num_sequences: int | None) -> int:
    """How many blocks there are. With packed sequences some of them are empty.

    Sequence n owns the blocks from cu_seqlens[n] // block + n on. They are at least as many as it
    needs, and the host need not read cu_seqlens.
    """
    # Not triton.cdiv: on the host it wraps its arguments for the compiler, which takes longer.
    return -(-total // block) if num_sequences is None else total // block + num_sequences


def least_keys(block_k: int) -> int:
    """Keys of one span from which on they get a gathered block of their own.

    With r keys the block wastes (block_k - r) / block_k of its work. In a mixed block they cost
    r / block_k of one, which takes 1.6 times the instructions in the forward, 1.3 in dq and 1.1 in
    dk and dv (sm_90, Triton 3.7.1). So three quarters balance both.
    """
    return block_k * 3 // 4


def has_short_spans(seqlen_k: int, num_spans: int) -> bool:
    """Whether spans, on average, have too few keys for blocks of their own. No value is read."""
    return seqlen_k < SHORT_KEYS * num_spans


def num_span_blocks(seqlen_k: int, num_sequences: int | None, block_k: int) -> int:
    """A bound of the blocks of a sample, or of all packed sequences.

    Each block holds `least_keys`, but for the last two gathered ones of each chunk.
    """
    chunks = 2 * (seqlen_k // CHUNK.value) + 2 * (num_sequences or 1)
    return seqlen_k // least_keys(block_k) + chunks


@triton.jit
def first_span_block(start, sequence, BLOCK_K: tl.constexpr):
    """The first block of a packed sequence whose first key is `start`: see `num_span_blocks`."""
    return start // (BLOCK_K * 3 // 4) + 2 * (start // CHUNK) + 2 * sequence


@triton.jit
def sequence_of_block(cu_seqlens_ptr, num_sequences, block, BLOCK: tl.constexpr):
    """The packed sequence that owns `block`: the last n with cu_seqlens[n] // BLOCK + n <= block.

    Returns the sequence's first token, its length and the block's number within it, which is
    beyond the sequence's end for the few blocks that are empty.
    """
    low = block * 0
    high = low + num_sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        first = tl.load(cu_seqlens_ptr + middle) // BLOCK + middle
        low = tl.where(first <= block, middle, low)
        high = tl.where(first <= block, high, middle - 1)
    start = tl.load(cu_seqlens_ptr + low)
    stop = tl.load(cu_seqlens_ptr + low + 1)
    return low, start, stop - start, block - (start // BLOCK + low)


@triton.jit
def sequence_of_span_blocks(
    cu_seqlens_ptr, num_sequences, program, BLOCK_K: tl.constexpr, SLOTS: tl.constexpr
):
    """(sequence, its first token, its length, number of `program` in it), SLOTS blocks a program.

    Sequence n owns the programs from first_span_block // SLOTS + n on.
    """
    low = program * 0
    high = low + num_sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        first = first_span_block(tl.load(cu_seqlens_ptr + middle), middle, BLOCK_K) // SLOTS
        low = tl.where(first + middle <= program, middle, low)
        high = tl.where(first + middle <= program, high, middle - 1)
    start = tl.load(cu_seqlens_ptr + low)
    stop = tl.load(cu_seqlens_ptr + low + 1)
    first = first_span_block(start, low, BLOCK_K) // SLOTS + low
    return low, start, stop - start, program - first


@triton.jit
def blocks_before(before_ptr, position, length):
    """How many blocks of a sequence begin before `position`."""
    return tl.load(before_ptr + tl.minimum(tl.maximum(position, 0), length)) - tl.load(before_ptr)


@triton.jit
def blocks_of_sequence(spans, first_key, length):
    """How many blocks a sequence has in a table of spans."""
    number = blocks_before(spans.whole_before_ptr + first_key, length, length)
    if spans.short_before_ptr is not None:
        number += blocks_before(spans.short_before_ptr + first_key, length, length)
    return number + blocks_before(spans.gathered_before_ptr + first_key, length, length)


@triton.jit
def _range_of_neighbours(
    before_ptr, start, length, low, high, full_low, full_high, BLOCK: tl.constexpr
):
    """The Range of whole or of short blocks; the first of the sequence has the number `start`."""
    first = blocks_before(before_ptr, low - BLOCK + 1, length)
    last = tl.where(high > low, blocks_before(before_ptr, high, length), first)
    first_full = blocks_before(before_ptr, full_low, length)
    first_full = tl.minimum(tl.maximum(first_full, first), last)
    last_full = blocks_before(before_ptr, full_high - BLOCK + 1, length)
    last_full = tl.maximum(tl.minimum(last_full, last), first_full)
    return Range(start + first, start + first_full, start + last_full, start + last)


@triton.jit
def span_block_ranges(
    spans, first_key, length, low, high, full_low, full_high, BLOCK: tl.constexpr
):
    """As `block_ranges`, of the blocks of a table of spans; `first_key` of the sequence in it."""
    low = tl.minimum(tl.maximum(low, 0), length)
    high = tl.maximum(tl.minimum(high, length), low)
    whole_ptr = spans.whole_before_ptr + first_key
    gathered_ptr = spans.gathered_before_ptr + first_key
    whole = _range_of_neighbours(whole_ptr, 0, length, low, high, full_low, full_high, BLOCK)
    start = blocks_before(whole_ptr, length, length)
    short = Range(0, 0, 0, 0)
    if spans.short_before_ptr is not None:
        short_ptr = spans.short_before_ptr + first_key
        short = _range_of_neighbours(
            short_ptr, start, length, low, high, full_low, full_high, BLOCK
        )
        start += blocks_before(short_ptr, length, length)
    # A gathered block stays within a chunk, and none goes without a mask.
    first = start + blocks_before(gathered_ptr, low // CHUNK * CHUNK, length)
    last = start + blocks_before(gathered_ptr, high, length)
    last = tl.where(high > low, last, first)
    return Ranges(whole, short, Range(first, first, first, last))


@triton.jit
def mixed_blocks_kernel(
    entries_ptr,  # as int32: first key, kind
    counts_ptr,
    positions_ptr,
    ids_ptr,  # the span of every key, -1 of none and after the last; replaced by the block's spans
    local_ptr,
    BLOCK_K: tl.constexpr,
):
    """One program: one block of keys, where it is mixed. One span after all makes it its kind."""
    block = tl.program_id(0).to(tl.int64)
    if tl.load(entries_ptr + block * 2 + 1) != MIXED:
        return
    offs = tl.arange(0, BLOCK_K)
    places = block * BLOCK_K + offs
    # [BLOCK_K]
    ids = tl.load(ids_ptr + places)
    mask_k = ids >= 0
    has_gap = tl.max((tl.load(positions_ptr + places) >= 0).to(tl.int32) * (ids < 0), 0) > 0
    tl.debug_barrier()  # before `ids` are overwritten

    # A key's local id is the number of spans whose first key comes before the first of its own.
    row, column = tl.expand_dims(offs, 1), tl.expand_dims(offs, 0)
    same = tl.expand_dims(ids, 1) == tl.expand_dims(ids, 0)
    first = tl.min(tl.where(same, column, BLOCK_K), 1)  # [BLOCK_K]
    opens = (first == offs) & mask_k
    before = tl.cumsum(opens.to(tl.int32), 0) - 1
    local = tl.sum(tl.where(tl.expand_dims(first, 1) == column, tl.expand_dims(before, 0), 0), 1)
    local = tl.where(mask_k, local, -1)
    tl.store(local_ptr + places, local)

    # ids_of_block[j] is the id whose first key has local id j: a sum with one term.
    opens_row = tl.expand_dims(opens, 1) & (tl.expand_dims(local, 1) == column) & (row >= 0)
    ids_of_block = tl.sum(tl.where(opens_row, tl.expand_dims(ids, 1) + 1, 0), 0) - 1
    tl.store(ids_ptr + places, ids_of_block)

    count = tl.sum(opens.to(tl.int32), 0)
    tl.store(counts_ptr + block, count)
    is_one = (count == 1) & (has_gap == 0)
    tl.store(entries_ptr + block * 2 + 1, tl.where(is_one, tl.max(ids, 0), MIXED))


def _prefix(mask: Tensor) -> Tensor:
    """[n + 1]: how many are true before each index."""
    return torch.nn.functional.pad(mask.cumsum(0), (1, 0))


def _cut(opens: Tensor, block_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of every index, in runs cut into blocks: the run's first, its place, its block's size."""
    index = torch.arange(len(opens), device=opens.device)
    first = torch.where(opens, index, 0).cummax(0).values
    last = torch.where(opens.roll(-1), index, len(opens) - 1).flip(0).cummin(0).values.flip(0)
    place = (index - first) % block_k
    return first, place, (last + 1 - index + place).clamp(max=block_k)


def _make(
    span_ids: Tensor, block_k: int, cu_seqlens_k: Tensor | None, with_short: bool
) -> SpanBlocks:
    """The table, by operations over all keys: none of them has a size that depends on values."""
    samples = span_ids.shape[0] if span_ids.dim() == 2 else 1
    seqlen_k = span_ids.shape[-1]
    ids, total = span_ids.reshape(-1).long(), samples * seqlen_k
    index = torch.arange(total, device=ids.device)
    if cu_seqlens_k is None:
        sequence, num_sequences = index // seqlen_k, None
        starts = torch.arange(samples + 1, device=ids.device) * seqlen_k
    else:
        num_sequences = cu_seqlens_k.numel() - 1
        starts = cu_seqlens_k.long()
        sequence = torch.bucketize(index, starts[1:], right=True)  # num_sequences: of none
    blocks = num_span_blocks(seqlen_k, num_sequences, block_k)
    bound = samples * blocks
    start = starts[sequence]
    position = index - start

    # Runs, and every key's place in the block that it would have without others.
    opens = torch.ones_like(index, dtype=torch.bool)
    opens[1:] = (ids[1:] != ids[:-1]) | (sequence[1:] != sequence[:-1])
    first, place, size = _cut(opens, block_k)
    has_span = ids >= 0
    is_whole = size == block_k
    is_own = has_span & ~is_whole & (size >= least_keys(block_k))
    # A span is fresh where its id exceeds all before: nothing is stored for it yet.
    highest = (ids + (sequence << 32)).cummax(0).values
    is_fresh = torch.ones_like(opens)
    is_fresh[1:] = highest[1:] > highest[:-1]
    is_fresh = is_fresh[first]

    # Neighbours in runs that are short, and again every key's place.
    is_left = ~is_whole & ~is_own
    is_short = torch.zeros_like(is_left)
    if with_short:
        opens[1:] = (is_left[1:] != is_left[:-1]) | (sequence[1:] != sequence[:-1])
        _, place_in_short, size = _cut(opens, block_k)
        is_short = is_left & (size == block_k)
        place = torch.where(is_short, place_in_short, place)
        is_left = is_left & ~is_short

    # What is left is gathered within a chunk: keys of spans, and keys of none.
    chunk = start + position // CHUNK.value * CHUNK.value
    opens_gathered = is_own & (place == 0)
    lists = [is_left & has_span, is_left & ~has_span]
    for is_listed in lists:
        before = _prefix(is_listed)[:-1]
        place = torch.where(is_listed, (before - before[chunk]) % block_k, place)
        opens_gathered = opens_gathered | (is_listed & (place == 0))
    opens_whole, opens_short = is_whole & (place == 0), is_short & (place == 0)
    whole_before, short_before = _prefix(opens_whole), _prefix(opens_short)
    gathered_before = _prefix(opens_gathered)
    gathered = gathered_before[1:] - 1
    for is_listed in lists:
        opened = torch.where(is_listed & (place == 0), gathered, -1).cummax(0).values
        gathered = torch.where(is_listed, opened, gathered)

    # A sequence's whole blocks stand before its short ones, and these before its gathered ones.
    if cu_seqlens_k is None:
        block = sequence * blocks
    else:
        block = start // least_keys(block_k) + 2 * (start // CHUNK.value) + 2 * sequence
    stops = starts[1:][sequence.clamp(max=len(starts) - 2)]
    num_whole, num_short = (x[stops] - x[start] for x in (whole_before, short_before))
    whole = whole_before[1:] - 1 - whole_before[start]
    short = num_whole + short_before[1:] - 1 - short_before[start]
    gathered += num_whole + num_short - gathered_before[start]
    block += torch.where(is_whole, whole, torch.where(is_short, short, gathered))
    if num_sequences is not None:
        block = torch.where(sequence < num_sequences, block, bound)

    code = torch.where(has_span, ids, NO_SPAN.value)
    code = torch.where(is_whole & has_span & ~is_fresh, RETURNS.value - ids, code)
    code = torch.where(is_short | lists[0], MIXED.value, code)

    def filled(value: int, *shape: int) -> Tensor:
        return torch.full(shape, value, dtype=torch.int32, device=ids.device)

    # Entry `bound` takes what has no place.
    positions, spans = (filled(-1, bound + 1, block_k) for _ in range(2))
    entries = torch.full((bound + 1,), EMPTY.value << 32, dtype=torch.int64, device=ids.device)
    opens = opens_whole | opens_short | opens_gathered
    entries[torch.where(opens, block, bound)] = (code << 32) | position
    positions.view(-1)[block * block_k + place] = position.int()
    spans.view(-1)[block * block_k + place] = ids.int()
    table = SpanBlocks(
        block_k=block_k,
        blocks=blocks,
        samples=samples,
        entries=entries,
        positions=positions,
        counts=filled(0, bound),
        ids=spans,
        local=filled(-1, bound, block_k),
        whole_before=whole_before.int(),
        short_before=short_before.int() if with_short else None,
        gathered_before=gathered_before.int(),
    )
    arguments = {
        "entries_ptr": entries.view(torch.int32),
        "counts_ptr": table.counts,
        "positions_ptr": positions,
        "ids_ptr": spans,
        "local_ptr": table.local,
        "BLOCK_K": block_k,
    }
    num_warps = max(4, block_k // 4)  # a thread's part of [block_k, block_k] stays in registers
    triton_runtime.launch(mixed_blocks_kernel, (bound,), arguments, num_warps, 1)
    return table


_Made = tuple[object, SpanBlocks]  # what the table was made from, and the table
_tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # ids -> {key: _Made}


def span_blocks(
    span_ids: Tensor, block_k: int, cu_seqlens_k: Tensor | None = None, with_short: bool = False
) -> SpanBlocks:
    """The table of blocks of `block_k` keys, a power of two.

    It is kept until torch writes into the ids, or they are freed. None is kept where torch cannot
    tell (inference mode), nor what is made while a CUDA graph is captured.

    Args:
        span_ids: int32 [N], or [B, N] with unit last stride; -1 = no span. N > 0.
        block_k: keys in a block.
        cu_seqlens_k: int32 [num_sequences + 1] where sequences are packed along N.
        with_short: make short blocks. Kernels that visit them have a loop more.
    """
    stream: Any = None
    if span_ids.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return _make(span_ids, block_k, cu_seqlens_k, with_short)
        stream = torch.cuda.current_stream(span_ids.device)
    inputs = [x for x in (span_ids, cu_seqlens_k) if x is not None]
    if any(x.is_inference() for x in inputs):
        return _make(span_ids, block_k, cu_seqlens_k, with_short)
    made_from = (stream, [(WeakIdRef(x), x._version) for x in inputs])
    kept: dict[tuple[int, bool], _Made] = _tables.setdefault(span_ids, {})
    key = block_k, with_short
    if key not in kept or kept[key][0] != made_from:
        kept[key] = made_from, _make(span_ids, block_k, cu_seqlens_k, with_short)
    return kept[key][1]
