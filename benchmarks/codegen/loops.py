"""What a warp issues in one turn of a main loop, read from the machine code.

A main loop has matrix instructions of its own, apart from those of loops within it. One turn is a
block of keys; in the kernels of dk and dv, a block of queries. A branch in the loop gives paths of
different lengths, so that counts are those of the shortest and of the longest path.
"""

from __future__ import annotations

import collections
import functools
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# HGMMA is wgmma.mma_async, HMMA mma.sync, UTC*MMA tcgen05.mma.
PRODUCT = re.compile(r"HGMMA|HMMA|UTC\w*MMA")
BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@dataclass(frozen=True)
class Turn:
    """What a warp issues in one turn of a loop, along one path."""

    instructions: int
    barriers: int  # of the CTA
    products: dict[str, int]  # matrix instructions, by shape
    loads: dict[str, int]  # from global memory; keys such as "LDGSTS 16": bytes of a thread
    stores: int  # to global memory


@dataclass(frozen=True)
class Loop:
    """One main loop. In kernels with two, the first has no masks and the second is for edges.

    Attributes:
        name: 1, 2, ... in the order of the code; 1.1 is a loop within 1.
        least, most: the shortest and the longest path, inner loops with one turn.
    """

    name: str
    least: Turn
    most: Turn

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Loop:
        return cls(record["name"], Turn(**record["least"]), Turn(**record["most"]))


@dataclass
class _Block:
    """Instructions without a branch among them, and the blocks that may follow."""

    opcodes: list[str]
    next: list[int]


def disassemble(cubin: bytes) -> str:
    """The machine code of a cubin, by the nvdisasm of Triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--print-code", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main_loops(code: str) -> list[Loop]:
    """The main loops of the one kernel in what nvdisasm prints."""
    blocks = _blocks(code)
    order = _order(blocks)
    loops = _loops(blocks, order)
    inside = {
        head: [other for other in loops if other != head and other in body]
        for head, body in loops.items()
    }
    found: list[Loop] = []
    names: dict[int, str] = {}
    for head in sorted(loops):
        inner = set().union(*(loops[other] for other in inside[head]))
        own = loops[head] - inner
        if not any(PRODUCT.match(x) for i in own for x in blocks[i].opcodes):
            continue
        around = [other for other in names if head in loops[other]]
        prefix = names[around[-1]] + "." if around else ""
        level = [n for n in names.values() if n.startswith(prefix) and "." not in n[len(prefix) :]]
        names[head] = f"{prefix}{len(level) + 1}"
        least, most = (
            _path(blocks, loops[head], head, order, longest) for longest in (False, True)
        )
        found.append(Loop(names[head], _counted(least), _counted(most)))
    return found


def _blocks(code: str) -> list[_Block]:
    """The control flow graph. A call returns, so that it ends no block."""
    blocks = [_Block([], [])]
    labels: dict[str, int] = {}
    targets: list[tuple[int, str]] = []
    falls = [True]  # whether a block runs on into the next one

    def begin() -> None:
        blocks.append(_Block([], []))
        falls.append(True)

    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            begin()
            labels[label[1]] = len(blocks) - 1
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\S+\s+)?([A-Z][\w.]*)(.*)", line):
            predicate, opcode, operands = match.groups()
            blocks[-1].opcodes.append(opcode)
            name = opcode.partition(".")[0]
            if name not in ("BRA", "EXIT", "RET"):
                continue
            target = re.search(r"`\((\.L_x_\d+)\)", operands)
            # BRA.DIV leaves for the rare case of a warp whose threads are apart.
            if name == "BRA" and target and opcode != "BRA.DIV":
                targets.append((len(blocks) - 1, target[1]))
            is_conditional = predicate is not None or re.match(r"\s+!?U?P\d", operands)
            falls[-1] = bool(is_conditional) or opcode == "BRA.DIV"
            begin()
    for index in range(len(blocks) - 1):
        if falls[index]:
            blocks[index].next.append(index + 1)
    for index, label_ in targets:
        blocks[index].next.append(labels[label_])
    return blocks


def _order(blocks: Sequence[_Block]) -> dict[int, int]:
    """Block -> its place in reverse postorder from the first; what cannot be reached has none."""
    done: list[int] = []
    seen = {0}
    stack = [(0, iter(blocks[0].next))]
    while stack:
        block, rest = stack[-1]
        following = next((n for n in rest if n not in seen), None)
        if following is None:
            done.append(block)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(blocks[following].next)))
    return {block: place for place, block in enumerate(reversed(done))}


def _loops(blocks: Sequence[_Block], order: Mapping[int, int]) -> dict[int, set[int]]:
    """First block of each loop -> all its blocks. Compilers make loops with one entry."""
    before = collections.defaultdict(list)
    for index in order:
        for following in blocks[index].next:
            before[following].append(index)
    loops: dict[int, set[int]] = {}
    for index in order:
        for head in blocks[index].next:
            if order[head] > order[index]:
                continue
            body = loops.setdefault(head, {head})
            todo = [index]
            while todo:
                block = todo.pop()
                if block not in body:
                    body.add(block)
                    todo += before[block]
    return loops


def _path(
    blocks: Sequence[_Block],
    body: set[int],
    head: int,
    order: Mapping[int, int],
    longest: bool,
) -> list[str]:
    """Opcodes of the shortest or longest path from `head` back to it."""

    @functools.cache
    def rest(block: int) -> list[str] | None:
        ends: list[list[str]] = [[]] if head in blocks[block].next else []
        ahead = [n for n in blocks[block].next if n in body and order[n] > order[block]]
        ends += [path for n in ahead if (path := rest(n)) is not None]
        if not ends:
            return None
        return blocks[block].opcodes + (max if longest else min)(ends, key=len)

    path = rest(head)
    assert path is not None, "a loop has a way back"
    return path


def _counted(opcodes: Sequence[str]) -> Turn:
    # HGMMA.64x64x16.F32.BF16: the shape is enough
    shapes = (".".join(x.split(".")[:2]) for x in opcodes if PRODUCT.match(x))
    products = collections.Counter(shapes)
    loads: collections.Counter[str] = collections.Counter()
    for opcode in opcodes:
        name, *modifiers = opcode.split(".")
        if name in ("LDG", "LDGSTS"):
            size = next((BYTES[m] for m in modifiers if m in BYTES), 4)
            loads[f"{name} {size}"] += 1
        elif name in ("UTMALDG", "UBLKCP"):
            loads[name] += 1
    return Turn(
        instructions=len(opcodes),
        barriers=sum(x.startswith("BAR.SYNC") for x in opcodes),
        products=dict(sorted(products.items())),
        loads=dict(sorted(loads.items())),
        stores=sum(x.partition(".")[0] == "STG" for x in opcodes),
    )
