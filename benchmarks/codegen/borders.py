"""How many blocks of keys hold a border of spans: as they come, and in the table of spans."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

from torch import Tensor

from benchmarks.harness.layouts import FRAME_TOKENS, LABELS, border_share, spans_of
from ral_kernels.runtime import triton_runtime

BLOCKS = (32, 64)  # keys of a block, as the tiles with spans have them


def border_table(seqlen: int) -> Iterator[str]:
    """A line for each layout and size of blocks.

    The table is that of `span_blocks`, whose kernel, which only numbers spans, need not run.
    """
    yield "| layout | keys of a block | with a border | made, of several spans | blocks more |"
    yield "|---|---|---|---|---|"
    for layout in FRAME_TOKENS:
        spans = spans_of(layout, seqlen)
        for block in BLOCKS:
            number, mixed = made_blocks(spans.ids, block)
            more = number * block / seqlen - 1
            before = border_share(spans, block)
            after = f"{mixed / number:.1%} | {more:.1%}"
            yield f"| {LABELS[layout]} | {block} | {before:.1%} | {after} |"


def made_blocks(ids: Tensor, block: int) -> tuple[int, int]:
    """(blocks of the table, those of several spans) for ids [N] of one sequence."""
    from ral_kernels.runtime.triton_spans import has_short_spans, span_blocks

    interpreted = triton_runtime.interpreted()
    with nullcontext() if interpreted else triton_runtime.record_launches("sm_90"):
        with_short = has_short_spans(len(ids), int(ids.max()) + 1)
        table = span_blocks(ids.clone(), block, None, with_short)
    before = (table.whole_before, table.short_before, table.gathered_before)
    number = sum(int(x[-1]) for x in before if x is not None)
    spans = table.ids[:number]
    lowest = spans.where(spans >= 0, spans.amax(1, keepdim=True)).amin(1)
    return number, int((spans.amax(1) != lowest).sum())
