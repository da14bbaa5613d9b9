"""How fast a main loop for Hopper would run: a scoreboard model of its machine code.

For benchmarks/codegen/cuda.py. It is a model, no measurement: ASSUMPTIONS says what it takes for
granted.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from .main_loop import Step, opcode_of

LOAD_LATENCY = 250  # of global memory: a hit in L2
SHARED_TAKEN = 0.2  # of the port of shared memory, by copies of TMA
TAKEN_BRANCH = 10
ROUNDS, FIRST, LAST = 40, 8, -4  # rounds that run, and those that count
OFFSETS = (100, 400, 700)  # clocks between the starts of two warps

ASSUMPTIONS = (
    "One quadrant of an SM: a warp of each consumer, in order, with a scoreboard.",
    "One instruction a clock. Of warps that could issue, always the first does, or the one that "
    "has waited longest: nobody says which, and the mean of both counts.",
    "Clocks that a pipe is busy / until the result: FP32 1/4, ALU 2/5, integer multiply-add 2/4, "
    "2^x and log2 8/20, conversion to 16 bits 2/6, uniform 2/6, shuffle 4/24, shared memory 4/26, "
    f"global memory 4/{LOAD_LATENCY}, mbarrier 2/20.",
    f"A taken branch costs {TAKEN_BRANCH} clocks. No wait at an mbarrier lasts, but where one "
    "consumer waits for another.",
    "A product of n columns takes n/2 clocks of the tensor pipe, or the time in which shared "
    f"memory gives its operands at 128 bytes a clock, of which TMA takes {SHARED_TAKEN:.0%}. "
    "Products queue in order of issue.",
    f"{ROUNDS} rounds; the warps start {', '.join(map(str, OFFSETS))} clocks apart, and the mean "
    "of these three runs counts.",
)


class Timing(NamedTuple):
    """Clocks of a round of all consumers, and the share of it in which tensor cores multiply."""

    clocks: float
    utilisation: float


class Handover(NamedTuple):
    """In every round the wait of one consumer is for the arrival of another.

    Attributes:
        giver, arrival: a consumer, and which of its arrivals at mbarriers in a round.
        taker, wait: another one, and which of its waits for mbarriers in a round.
    """

    giver: int
    arrival: int
    taker: int
    wait: int


class _Pipe(NamedTuple):
    name: str
    busy: int
    latency: int


_PIPES = {
    **dict.fromkeys(("FADD", "FMUL", "FFMA"), _Pipe("fma", 1, 4)),
    "IMAD": _Pipe("fma", 2, 4),
    "MUFU": _Pipe("mufu", 8, 20),
    **dict.fromkeys(("F2FP", "F2F"), _Pipe("alu", 2, 6)),
    "SHFL": _Pipe("memory", 4, 24),
    **dict.fromkeys(("LDS", "LDC"), _Pipe("memory", 4, 26)),
    **dict.fromkeys(("LDG", "LD"), _Pipe("memory", 4, LOAD_LATENCY)),
    **dict.fromkeys(("STS", "ST", "STG"), _Pipe("memory", 4, 1)),
    "SYNCS": _Pipe("memory", 2, 20),
    "R2UR": _Pipe("uniform", 2, 10),
    "VOTEU": _Pipe("uniform", 2, 6),
}
_ALU, _UNIFORM, _BRANCH = _Pipe("alu", 2, 5), _Pipe("uniform", 2, 6), _Pipe("branch", 2, 1)
_CONTROL = {"WARPGROUP", "WARPSYNC", "NOP", "BSSY", "BSYNC", "MEMBAR", "FENCE", "BAR"}
_NO_RESULT = {"STS", "STG", "ST", "BRA", "EXIT", "BAR", "RED", "UTMALDG"}


@dataclass(frozen=True)
class _Instruction:
    text: str
    taken: bool

    @cached_property
    def opcode(self) -> str:
        return opcode_of(self.text)

    @cached_property
    def pipe(self) -> _Pipe | None:
        if self.opcode in _CONTROL or self.opcode == "HGMMA":
            return None
        if self.opcode == "BRA":
            return _BRANCH
        return _PIPES.get(self.opcode, _UNIFORM if self.opcode.startswith("U") else _ALU)

    @cached_property
    def registers(self) -> tuple[list[str], list[str]]:
        """Those that are written, and those that are read."""
        predicate, _, body = self.text.rpartition(" " + self.opcode)
        name, _, rest = (self.opcode + body).partition(" ")
        written: list[str] = []
        read = _named(predicate)
        if self.opcode == "HGMMA":
            return self._of_product(rest, read)
        stores = self.opcode in _NO_RESULT or "ARRIVE" in name
        for place, operand in enumerate(rest.split(",")):
            found = _named(operand)
            if place == 0 and not stores:
                width = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
                width = 2 if self.opcode == "CS2R" else width
                written += [x for register in found for x in _range(register, width)]
            elif place == 1 and not stores and "P" in operand:  # a second result of a comparison
                written += found
            else:
                read += found
        return written, read

    def _of_product(self, operands: str, read: list[str]) -> tuple[list[str], list[str]]:
        # The accumulators, then A as a descriptor or registers; they are waited for elsewhere.
        out, a, *_ = operands.split(",")
        read += _range(out.strip(), self.columns // 2)
        if "gdesc" not in a:
            read += _range(a.strip(), 4)
        return [], read + re.findall(r"\bUR\d+", operands)

    @cached_property
    def columns(self) -> int:
        match = re.search(r"64x(\d+)x16", self.text)
        assert match is not None, self.text
        return int(match[1])

    @cached_property
    def product_clocks(self) -> float:
        a_in_shared = re.search(r"R\d+, gdesc", self.text) is not None and not re.search(
            r"R\d+, R\d+, gdesc", self.text
        )
        read = self.columns * 32 + (2048 if a_in_shared else 0)
        return max(self.columns / 2, read / 128 / (1 - SHARED_TAKEN))

    @cached_property
    def pending(self) -> int | None:
        """For a wait for products: how many groups may still run."""
        if self.opcode != "WARPGROUP" or "DEPBAR" not in self.text:
            return None
        return int(self.text.split(",")[1].strip(), 16)


def _named(operand: str) -> list[str]:
    return re.findall(r"\b(UR\d+|R\d+|UP\d|P\d)\b", operand)


def _range(register: str, width: int) -> list[str]:
    if re.fullmatch(r"R\d+", register) is None:
        return [register]
    return [f"R{int(register[1:]) + n}" for n in range(width)]


@dataclass
class _Warp:
    time: float
    number: int
    place: int = 0
    rounds: int = 0
    ready: dict[str, float] = field(default_factory=dict)  # when a register's value is there
    products: list[float] = field(default_factory=list)  # when each group of products is done
    ends: list[float] = field(default_factory=list)  # of rounds


def timing(ways: Sequence[Sequence[Step]], handovers: Sequence[Handover] = ()) -> Timing:
    """Of consumers, each with its way through a main loop."""
    codes = [[_Instruction(step.instruction, step.taken) for step in way] for way in ways]
    runs = [_clocks(codes, handovers, *how) for how in itertools.product(OFFSETS, (False, True))]
    clocks = sum(runs) / len(runs)
    tensor = sum(x.columns / 2 for code in codes for x in code if x.opcode == "HGMMA")
    return Timing(clocks, tensor / clocks)


def _nth(code: Sequence[_Instruction], text: str, n: int) -> int:
    return [place for place, x in enumerate(code) if text in x.text][n]


def _clocks(
    codes: Sequence[Sequence[_Instruction]],
    handovers: Sequence[Handover],
    offset: int,
    in_turn: bool,
) -> float:
    warps = [_Warp(n * offset, n) for n in range(len(codes))]
    pipes: dict[str, float] = {}
    issue = tensor = 0.0
    given: list[list[float]] = [[] for _ in handovers]  # when, in each round
    gives = {(x.giver, _nth(codes[x.giver], "ARRIVE", x.arrival)): n
             for n, x in enumerate(handovers)}  # fmt: skip
    takes = {(x.taker, _nth(codes[x.taker], "TRYWAIT", x.wait)): n
             for n, x in enumerate(handovers)}  # fmt: skip

    def earliest(warp: _Warp) -> float:
        x = codes[warp.number][warp.place]
        written, read = x.registers
        time = max([warp.time, issue, *(warp.ready.get(r, 0.0) for r in (*read, *written))])
        if (taken := takes.get((warp.number, warp.place))) is not None:
            so_far = given[taken]
            time = max(time, so_far[warp.rounds]) if warp.rounds < len(so_far) else math.inf
        if x.pending is not None and len(warp.products) > x.pending:
            time = max(time, warp.products[-1 - x.pending])
        return time if x.pipe is None else max(time, pipes.get(x.pipe.name, 0.0))

    while running := [warp for warp in warps if warp.rounds < ROUNDS]:
        now, *_, warp = min((earliest(w), w.time if in_turn else 0, w.number, w) for w in running)
        assert now < math.inf, "each waits for another"
        code = codes[warp.number]
        x = code[warp.place]
        issue = warp.time = now + 1
        if (gift := gives.get((warp.number, warp.place))) is not None:
            given[gift].append(now + _PIPES["SYNCS"].latency)
        if x.opcode == "HGMMA":
            tensor = max(tensor, now + 8) + x.product_clocks
            if "gsb0" in x.text:
                warp.products.append(tensor)
        elif x.pipe is not None:
            pipes[x.pipe.name] = now + x.pipe.busy
            warp.ready.update(dict.fromkeys(x.registers[0], now + x.pipe.latency))
            if x.taken:
                warp.time = now + TAKEN_BRANCH
        elif "ARRIVE" in x.text:
            warp.time = now + 6
        warp.place += 1
        if warp.place == len(code):
            warp.place = 0
            warp.rounds += 1
            warp.ends.append(warp.time)
            warp.products = warp.products[-4:]
    rounds = ROUNDS + LAST - FIRST
    return sum((warp.ends[LAST] - warp.ends[FIRST]) / rounds for warp in warps) / len(warps)
