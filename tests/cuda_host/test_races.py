"""Random accesses: the harness finds a race exactly where comparing all pairs finds one."""

from __future__ import annotations

import random
from itertools import combinations
from typing import NamedTuple

import pytest
import torch

from tests.cuda_host.small_kernels import VIOLATION, SmallKernels

THREADS, STEPS, LANES = 64, 8, 32
NOTHING, READ, WRITE, SYNC_WARP, SYNC_BLOCK, LOAD_MATRICES = range(6)
PLACES = 16  # bytes that accesses fall on
# Few, so that many a script has one racy pair and no more.
ACTIVE = (0, 1, 31, 32, 33)


class Step(NamedTuple):
    action: int = NOTHING
    offset: int = 0
    size: int = 1


class Access(NamedTuple):
    """`warp_epoch` counts the barriers of the warp and of the block, `block_epoch` the latter."""

    block: int
    thread: int
    warp_epoch: int
    block_epoch: int
    writes: bool
    whole_warp: bool
    first: int
    end: int


def random_script(draw: random.Random, shared: bool, density: float) -> list[list[Step]]:
    """Of each thread of a block, its steps; barriers and load_matrices are for all lanes."""
    steps = [[Step()] * STEPS for _ in range(THREADS)]
    sizes = draw.choice([(1, 2, 4), (4, 8, 16), (16,)])
    active = draw.sample(ACTIVE, draw.choice([1, 2, 2, 4]))
    for i in range(STEPS):
        of_block = draw.choices([None, SYNC_BLOCK], [5, 1])[0]
        for warp in (0, 1):
            warps = [None, SYNC_WARP, LOAD_MATRICES if shared else None]
            of_warp = of_block or draw.choices(warps, [10, 2, 1])[0]
            for thread in range(LANES * warp, LANES * (warp + 1)):
                if of_warp is not None:
                    # One lane's row of the matrices is where the other accesses are.
                    row = 0 if thread % LANES == active[0] % LANES else PLACES
                    steps[thread][i] = Step(of_warp, row, 16)
        if of_block is None and draw.random() < density:
            thread = draw.choice(active)
            size = draw.choice(sizes)
            if steps[thread][i].action == NOTHING:
                place = size * draw.randrange(PLACES // size)
                steps[thread][i] = Step(draw.choices([READ, WRITE], [3, 1])[0], place, size)
    return steps


def accesses(block: int, script: list[list[Step]]) -> list[Access]:
    found = []
    for thread, steps in enumerate(script):
        warp_epoch = block_epoch = 0
        for action, offset, size in steps:
            warp_epoch += action in (SYNC_WARP, SYNC_BLOCK)
            block_epoch += action == SYNC_BLOCK
            if action in (READ, WRITE, LOAD_MATRICES):
                kind = (action == WRITE, action == LOAD_MATRICES)
                at = (block, thread, warp_epoch, block_epoch)
                found.append(Access(*at, *kind, offset, offset + size))
    return found


def is_race(a: Access, b: Access) -> bool:
    if a.first >= b.end or b.first >= a.end or not (a.writes or b.writes):
        return False
    if a.block != b.block:
        return True
    if a.thread // LANES != b.thread // LANES:
        return a.block_epoch == b.block_epoch
    alone = a.thread == b.thread and not (a.whole_warp or b.whole_warp)
    return a.warp_epoch == b.warp_epoch and not alone


@pytest.mark.parametrize("num_blocks", [0, 1, 2], ids=["shared", "global", "two_blocks"])
def test_races_of_random_scripts(small_kernels: SmallKernels, num_blocks: int) -> None:
    shared, blocks = num_blocks == 0, max(num_blocks, 1)
    racy = 0
    for seed in range(600):
        draw = random.Random(seed)
        scripts = [random_script(draw, shared, 0.6 / blocks) for _ in range(blocks)]
        out = None if shared else torch.zeros(PLACES, dtype=torch.int8)
        every = [access for i, script in enumerate(scripts) for access in accesses(i, script)]
        expected = any(is_race(a, b) for a, b in combinations(every, 2))
        small_kernels.clear()
        small_kernels.set_order(seed)
        a = torch.zeros(blocks, THREADS, STEPS, 3, dtype=torch.int32)
        for i, script in enumerate(scripts):
            for thread, steps in enumerate(script):
                if any(step.action != NOTHING for step in steps):
                    a[i, thread] = torch.tensor(steps)
        status = small_kernels.launch("script", out, a, num_blocks=blocks)
        assert status == (VIOLATION if expected else 0), (seed, small_kernels.report())
        assert ("race" in small_kernels.report()) == expected
        racy += expected
    assert 100 < racy < 450
