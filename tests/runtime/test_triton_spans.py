"""The table of blocks of keys made for spans: every key in one block, few blocks, few mixed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import ral_kernels as rk
from benchmarks.codegen.borders import border_table, made_blocks
from benchmarks.harness.layouts import LABELS, spans_of
from ral_kernels.runtime import triton_runtime
from tests.conftest import skip_or_fail

BLOCK = 16


@pytest.fixture(autouse=True)
def _triton() -> None:
    reason = rk.available_backends()["triton"]
    if reason != "yes" or not triton_runtime.interpreted():
        skip_or_fail("triton", reason)


def blocks_of(
    ids: Tensor, cu_seqlens: Tensor | None = None, with_short: bool = False
) -> Iterator[tuple[int, int, list[int], Tensor]]:
    """(first block of a sequence, kind, keys, their ids) of every block that is not empty."""
    from ral_kernels.runtime.triton_spans import EMPTY, span_blocks

    table = span_blocks(ids, BLOCK, cu_seqlens, with_short)
    kinds = (table.entries >> 32).tolist()
    bounds = [0, len(ids)] if cu_seqlens is None else cu_seqlens.tolist()
    for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
        first = start // (BLOCK * 3 // 4) + 2 * (start // 4096) + 2 * n
        number = int(table.whole_before[stop] - table.whole_before[start])
        number += int(table.gathered_before[stop] - table.gathered_before[start])
        if table.short_before is not None:
            number += int(table.short_before[stop] - table.short_before[start])
        assert EMPTY.value not in kinds[first : first + number]
        for block in range(first, first + number):
            keys = [start + x for x in table.positions[block].tolist() if x >= 0]
            if kinds[block] == -2:
                local = table.local[block][: len(keys)].long()
                listed = table.ids[block][local].where(local >= 0, -1)
                assert torch.equal(listed, ids[keys])
                assert int(table.counts[block]) == int(local.max()) + 1
            yield first, kinds[block], keys, ids[keys]


LAYOUTS = {
    "text": torch.where(torch.arange(200) % 45 < 3, -1, torch.arange(200) // 45),
    "returning": torch.arange(200) // 40 % 2,
    "random": torch.randint(-1, 5, (200,), generator=torch.Generator().manual_seed(0)),
    "single": torch.arange(200),
    "short": torch.where(torch.arange(200) % 6 < 2, -1, torch.arange(200) // 6),
    "none": torch.full((200,), -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bounds", [None, [0, 7, 7, 120, 200]], ids=["dense", "packed"])
@pytest.mark.parametrize("with_short", [False, True], ids=["", "short"])
def test_every_key_is_in_one_block(layout: str, bounds: list[int] | None, with_short: bool) -> None:
    ids = LAYOUTS[layout].int()
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    seen: list[int] = []
    before: dict[int, list[int]] = {}  # keys of a sequence that came so far
    for sequence, kind, keys, found in blocks_of(ids, cu_seqlens, with_short):
        seen += keys
        earlier = before.setdefault(sequence, [])
        earlier += keys
        if kind == -2:
            assert len(found.unique()) > 1
            # Keys of no span are among others in short blocks alone.
            is_short = keys == list(range(keys[0], keys[0] + BLOCK))
            assert int(found.min()) >= 0 or (with_short and is_short)
            continue
        (span,) = found.unique().tolist()
        assert kind in (span, -4 - span) if span >= 0 else kind == -1
        if kind >= 0 and keys == list(range(keys[0], keys[0] + BLOCK)):
            # A whole block of this kind may be stored: nothing was before its run.
            run = keys[0]
            while run > 0 and ids[run - 1] == span and run - 1 in earlier:
                run -= 1
            assert span not in {int(x) for x in ids[[k for k in earlier if k < run]].tolist()}
    assert sorted(seen) == list(range(len(ids)))


@pytest.mark.parametrize(
    ("layout", "share", "more"),
    [("aligned", 0.0, 0.0), ("offset", 0.0, 0.02), ("64", 0.0, 0.04), ("16", 1.0, 0.0)],
)
def test_blocks_with_a_border(layout: str, share: float, more: float) -> None:
    """In prompts of frames of 64 keys and more no block has one, and few are added to any."""
    number, mixed = made_blocks(spans_of(layout, 16384).ids, 64)
    assert mixed <= share * number
    assert number <= (1 + more) * 256
    table = [line.split(" | ") for line in border_table(16384)]
    (line,) = (line for line in table if line[0] == f"| {LABELS[layout]}" and line[1] == "64")
    assert line[3] == f"{mixed / number:.1%}"


@pytest.mark.parametrize("layout", ["single", "short"])
def test_short_spans_fill_blocks_of_neighbours(layout: str) -> None:
    """Without short blocks, those of keys of no span and of several are gathered."""
    blocks = [keys for *_, keys, _ in blocks_of(LAYOUTS[layout].int(), with_short=True)]
    neighbours = [keys for keys in blocks if keys == list(range(keys[0], keys[0] + BLOCK))]
    assert len(neighbours) == 200 // BLOCK and len(blocks) <= len(neighbours) + 2


def test_a_table_is_kept_until_ids_change() -> None:
    from ral_kernels.runtime.triton_spans import span_blocks

    ids = LAYOUTS["text"].int()
    table = span_blocks(ids, BLOCK)
    assert span_blocks(ids, BLOCK) is table
    assert span_blocks(ids.clone(), BLOCK) is not table
    ids[:] = 0
    changed = span_blocks(ids, BLOCK)
    assert changed is not table
    assert int(changed.whole_before[-1]) == len(ids) // BLOCK
