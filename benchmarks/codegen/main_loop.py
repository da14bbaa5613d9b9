"""The main loop of a kernel, read from its machine code, for benchmarks/codegen/cuda.py."""

from __future__ import annotations

import heapq
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

Code = list[tuple[int, str]]  # (address, instruction), in order of addresses


@dataclass(frozen=True)
class MainLoop:
    """What a warp issues for one block of a loop that holds most products.

    Of all ways through the loop it is that with the most products, and of these the shortest: no
    masks, no spans, no wait that lasts. A branch to the next instruction counts as not taken.

    Attributes:
        products: HGMMA; instructions: all, products too; uniform: those on uniform registers.
        branches: that are taken, the one back to the start of the loop too.
        loads: from global memory.
        between: the most instructions between neighbouring products of one group.
    """

    products: int
    instructions: int
    uniform: int
    branches: int
    loads: int
    between: int


class Step(NamedTuple):
    """One instruction of a way through a loop. taken: a branch to elsewhere than the next."""

    instruction: str
    taken: bool


# What `way` counts. ST: the compiler does not know that the pointer is of global memory.
_COUNTED = {
    "HGMMA": "products",
    "FADD": "additions",
    "FFMA": "fused multiply-additions",
    "LDG": "loads",
    "STG": "stores",
    "ST": "stores",
    "SHFL": "shuffles",
    "LDS": "shared loads",
    "STS": "shared stores",
    "VOTE": "votes",
    "VOTEU": "votes",
}


def way(code: Code, counts: Mapping[str, int], role: int = 0) -> list[Step] | None:
    """The shortest way through a main loop with all products and so many of what is counted.

    Args:
        code: of the kernel.
        counts: of what _COUNTED names; "loads" and "stores" are of global memory. Others are not
            looked at.
        role: which of `main_loops`.

    Returns:
        The steps from the start of the loop to the jump back; None if there is no such way.
    """
    best = _best(code)
    if role >= len(best):
        return None
    path, products = best[role][0], best[role][1].products
    after = _successors(code)
    names = ["products", *counts]
    wanted = (products, *counts.values())
    counted_at = [
        names.index(name) if (name := _COUNTED.get(opcode_of(x))) in names else -1 for _, x in code
    ]

    def counted(index: int, before: tuple[int, ...]) -> tuple[int, ...]:
        at = counted_at[index]
        if at < 0:
            return before
        return (*before[:at], before[at] + 1, *before[at + 1 :])

    start = path[0]
    first = (start, counted(start, (0,) * len(wanted)))
    came_from: dict[tuple[int, tuple[int, ...]], tuple[int, tuple[int, ...]]] = {}
    queue = [(1, *first)]
    seen = {first}
    while queue:
        length, index, sums = heapq.heappop(queue)
        if start in after[index] and sums == wanted:
            found = [(index, sums)]
            while found[-1] != first:
                found.append(came_from[found[-1]])
            indices = [x for x, _ in reversed(found)]
            nexts = [*indices[1:], start]
            return [Step(code[x][1], y != x + 1) for x, y in zip(indices, nexts, strict=True)]
        for target in after[index]:
            state = (target, counted(target, sums))
            if state in seen or any(x > y for x, y in zip(state[1], wanted, strict=True)):
                continue
            seen.add(state)
            came_from[state] = (index, sums)
            heapq.heappush(queue, (length + 1, *state))
    return None


def parse(lines: Iterable[str]) -> Code:
    """The instructions in lines of `cuobjdump -sass`."""
    matches = (re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line) for line in lines)
    return [(int(match[1], 16), match[2]) for match in matches if match]


def main_loops(code: Code) -> list[MainLoop]:
    """The main loops of a kernel's code, in its order: where warps have roles, one of each role.

    They have as many products as any loop, and share none. Empty if no loop has an HGMMA.
    """
    return [loop for _, loop in _best(code)]


def _best(code: Code) -> list[tuple[list[int], MainLoop]]:
    if not any("HGMMA" in instruction for _, instruction in code):
        return []
    found = [(path, _describe(code, path)) for path in _loops(code)]
    most = max((loop.products for _, loop in found), default=0)
    kept: dict[frozenset[int], tuple[list[int], MainLoop]] = {}
    for path, loop in sorted(found, key=lambda x: x[1].instructions):
        products = frozenset(index for index in path if "HGMMA" in code[index][1])
        if 0 < most == loop.products and products.isdisjoint(itertools.chain(*kept)):
            kept[products] = path, loop
    return sorted(kept.values(), key=lambda x: x[0][0])


def opcode_of(instruction: str) -> str:
    """Without its predicate and its modifiers."""
    return re.sub(r"^@!?\w+\s+", "", instruction).split()[0].split(".")[0]


def _successors(code: Code) -> list[list[int]]:
    """Indices of the instructions that may follow each. Calls return."""
    index_of = {address: index for index, (address, _) in enumerate(code)}
    found = []
    for index, (_, instruction) in enumerate(code):
        opcode = opcode_of(instruction)
        always = re.fullmatch(r"(EXIT|RET\S*|BRA)(\s+(R\d+|0x[0-9a-f]+))*", instruction) is not None
        after = [] if always or index + 1 == len(code) else [index + 1]
        if opcode == "BRA":
            target = int(re.findall(r"0x([0-9a-f]+)", instruction)[-1], 16)
            after.append(index_of[target])
        found.append(after)
    return found


class _Cost(NamedTuple):
    """Of a way from the start of a loop; the least is best."""

    products: int  # negative
    instructions: int


def _loops(code: Code) -> Iterator[list[int]]:
    """For each jump back: the best way from where it leads to it, as indices."""
    after = _successors(code)
    order, back = _depth_first(after)
    place = {index: n for n, index in enumerate(order)}
    cost = [_Cost(-int("HGMMA" in instruction), 1) for _, instruction in code]
    for start in {target for _, target in back}:
        best = {start: cost[start]}
        before: dict[int, int] = {}
        for index in order[place[start] :]:
            for target in after[index] if index in best else ():
                if (index, target) in back:
                    continue
                total = _Cost(*map(sum, zip(best[index], cost[target], strict=True)))
                if target not in best or total < best[target]:
                    best[target], before[target] = total, index
        for end in {source for source, target in back if target == start and source in best}:
            path = [end]
            while path[-1] != start:
                path.append(before[path[-1]])
            yield path[::-1]


def _depth_first(after: list[list[int]]) -> tuple[list[int], set[tuple[int, int]]]:
    """A topological order of what can be reached without the jumps back, and these jumps."""
    order: list[int] = []
    back: set[tuple[int, int]] = set()
    begun, active = {0}, {0}
    stack = [(0, iter(after[0]))]
    while stack:
        index, rest = stack[-1]
        for target in rest:
            if target in active:
                back.add((index, target))
            elif target not in begun:
                begun.add(target)
                active.add(target)
                stack.append((target, iter(after[target])))
                break
        else:
            order.append(index)
            active.discard(index)
            stack.pop()
    return order[::-1], back


def _describe(code: Code, path: list[int]) -> MainLoop:
    taken = sum(after != index + 1 for index, after in itertools.pairwise(path))
    opcodes = [opcode_of(code[index][1]) for index in path]
    products = [n for n, opcode in enumerate(opcodes) if opcode == "HGMMA"]
    between = [
        after - before - 1
        for before, after in itertools.pairwise(products)
        if "gsb0" not in code[path[before]][1]  # the last product of a group
    ]
    return MainLoop(
        products=len(products),
        instructions=len(path),
        uniform=sum(opcode.startswith("U") or opcode == "R2UR" for opcode in opcodes),
        branches=taken + 1,
        loads=opcodes.count("LDG"),
        between=max(between, default=0),
    )
