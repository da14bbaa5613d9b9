"""Which spans each block of keys holds: the table from which Triton kernels sum over spans.

A kernel reads each block's *kind*: one span, no span, or several. With one span, the block's row
sum is the span's sum. Several spans are numbered from 0 within the block. One small kernel makes
the table, and the host does not wait for it. Ids need not be sorted.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_runtime

NO_SPAN = tl.constexpr(-1)  # kinds: no key of the block belongs to a span
MIXED = tl.constexpr(-2)  # the block holds several spans, or some keys without one


@dataclass(frozen=True)
class SpanBlocks:
    """What `span_blocks` finds. B' is 1 where the batch shares its ids.

    Block j of a dense call holds keys [j * block_k, (j + 1) * block_k). Each packed sequence has
    blocks of its own: see `sequence_of_block`.
    """

    block_k: int
    kinds: Tensor  # int32 [B', blocks]: the only span (>= 0), NO_SPAN or MIXED
    counts: Tensor  # int32 [B', blocks]: how many distinct spans
    ids: Tensor  # int32 [B', blocks, block_k]: these, by first appearance; then -1
    local: Tensor  # int32 [B', N]: every key's index into its block's `ids`, -1 for no span

    @property
    def stride_batch(self) -> int:
        """Blocks between two samples in `kinds` and `counts`: 0 where the batch shares them."""
        return self.kinds.shape[1] if self.kinds.shape[0] > 1 else 0

    @property
    def stride_batch_local(self) -> int:
        """Keys between two samples in `local`."""
        return self.local.shape[1] if self.local.shape[0] > 1 else 0


def num_blocks(total: int, block: int, num_sequences: int | None) -> int:
    """How many blocks there are. With packed sequences some of them are empty.

    Sequence n owns the blocks from cu_seqlens[n] // block + n on. They are at least as many as it
    needs, and the host need not read cu_seqlens.
    """
    # Not triton.cdiv: on the host it wraps its arguments for the compiler, which takes longer.
    return -(-total // block) if num_sequences is None else total // block + num_sequences


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
def span_blocks_kernel(
    span_ids_ptr,
    cu_seqlens_k_ptr,
    kinds_ptr,
    counts_ptr,
    ids_ptr,
    local_ptr,
    span_ids_stride_b,
    seqlen_k,
    num_blocks,
    num_sequences,
    BLOCK_K: tl.constexpr,
):
    """One program: one block of keys of one sample."""
    block = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    if cu_seqlens_k_ptr is not None:
        _, start, length, index = sequence_of_block(cu_seqlens_k_ptr, num_sequences, block, BLOCK_K)
    else:
        start, length, index = 0, seqlen_k, block
    offs = tl.arange(0, BLOCK_K)
    mask_k = index * BLOCK_K + offs < length
    offs_k = start + index * BLOCK_K + offs
    # [BLOCK_K]
    ids = tl.load(span_ids_ptr + b * span_ids_stride_b + offs_k, mask=mask_k, other=-1)

    # A key's local id is the number of spans whose first key comes before the first of its own.
    row, column = tl.expand_dims(offs, 1), tl.expand_dims(offs, 0)
    same = tl.expand_dims(ids, 1) == tl.expand_dims(ids, 0)
    first = tl.min(tl.where(same, column, BLOCK_K), 1)  # [BLOCK_K]
    opens = (first == offs) & (ids >= 0)
    before = tl.cumsum(opens.to(tl.int32), 0) - 1
    local = tl.sum(tl.where(tl.expand_dims(first, 1) == column, tl.expand_dims(before, 0), 0), 1)
    local = tl.where(ids >= 0, local, -1)
    tl.store(local_ptr + b * seqlen_k + offs_k, local, mask=mask_k)

    # ids_of_block[j] is the id whose first key has local id j: a sum with one term.
    opens_row = tl.expand_dims(opens, 1) & (tl.expand_dims(local, 1) == column) & (row >= 0)
    ids_of_block = tl.sum(tl.where(opens_row, tl.expand_dims(ids, 1) + 1, 0), 0) - 1
    entry = b * num_blocks + block
    tl.store(ids_ptr + entry * BLOCK_K + offs, ids_of_block)

    count = tl.sum(opens.to(tl.int32), 0)
    highest = tl.max(ids, 0)
    has_gap = tl.sum((mask_k & (ids < 0)).to(tl.int32), 0) > 0
    kind = tl.where(count == 0, NO_SPAN, tl.where((count == 1) & (has_gap == 0), highest, MIXED))
    tl.store(counts_ptr + entry, count)
    tl.store(kinds_ptr + entry, kind)


def span_blocks(span_ids: Tensor, block_k: int, cu_seqlens_k: Tensor | None = None) -> SpanBlocks:
    """The table of blocks of `block_k` keys, a power of two.

    Args:
        span_ids: int32 [N], or [B, N] with unit last stride; -1 = no span.
        block_k: keys in a block.
        cu_seqlens_k: int32 [num_sequences + 1] where sequences are packed along N.
    """
    ids = span_ids if span_ids.dim() == 2 else span_ids[None]
    batch_size, seqlen_k = ids.shape
    num_sequences = None if cu_seqlens_k is None else cu_seqlens_k.numel() - 1
    blocks = num_blocks(seqlen_k, block_k, num_sequences)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=ids.device)

    table = SpanBlocks(
        block_k=block_k,
        kinds=empty(batch_size, blocks),
        counts=empty(batch_size, blocks),
        ids=empty(batch_size, blocks, block_k),
        local=empty(batch_size, seqlen_k),
    )
    arguments = {
        "span_ids_ptr": ids,
        "cu_seqlens_k_ptr": cu_seqlens_k,
        "kinds_ptr": table.kinds,
        "counts_ptr": table.counts,
        "ids_ptr": table.ids,
        "local_ptr": table.local,
        "span_ids_stride_b": ids.stride(0),
        "seqlen_k": seqlen_k,
        "num_blocks": blocks,
        "num_sequences": num_sequences or 0,
        "BLOCK_K": block_k,
    }
    num_warps = max(4, block_k // 4)  # a thread's part of [block_k, block_k] stays in registers
    triton_runtime.launch(span_blocks_kernel, (blocks, batch_size), arguments, num_warps, 1)
    return table
