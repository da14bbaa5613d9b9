"""One size of a sweep: admission, the gate and memory of each, interleaved timing."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .examine import FreshProcesses, leaves, run_once
from .machine import available_bytes, clock, gemm_gflops, host_seconds
from .objective import Contestant, Objective, Problem

MODES = {"forward": False, "forward+backward": True}
MEMORY_SHARE = 0.8  # of what is available; the rest is for errors of the estimate
FEWEST = 3  # rotations, whatever the time
TIMING_SHARE = 0.4  # of a size's time, kept for timing if the gate took long (it compiles, too)
# of a size's time: one run of each in the gate, and as much again for one timed run of each
EXAMINE_SHARE = 0.55


@dataclass
class Entry:
    """A contestant in one mode at one size, on its way to a row of the table."""

    contestant: Contestant
    mode: str
    essential: bool  # a peer or ours: it always runs
    record: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    host_seconds: float | None = None  # what a call takes the host; None where that is all of it

    @property
    def backward(self) -> bool:
        return MODES[self.mode]

    @property
    def once(self) -> float:
        """Seconds of one run, by its examination."""
        return max(float(self.record["seconds"]), 1e-6)

    @property
    def in_the_race(self) -> bool:
        return self.record.get("status") == "ok"


def quantiles(values: Sequence[float]) -> dict[str, Any]:
    """Median, p20 and p80, by linear interpolation, and all the values for a later comparison."""
    ordered = torch.tensor(sorted(values), dtype=torch.float64)
    median, p20, p80 = torch.quantile(
        ordered, torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    ).tolist()
    every = [float(f"{value:.6g}") for value in values]
    return {"median": median, "p20": p20, "p80": p80, "all": every}


class Sweep:
    """Runs sizes one after the other, small to large, and remembers how long each took."""

    def __init__(
        self,
        objective: Objective,
        names: Sequence[str],
        modes: Sequence[str],
        repeats: int,
        device: torch.device,
        dtype: torch.dtype,
        advance: Callable[[str], None],
        processes: FreshProcesses | None = None,
    ) -> None:
        self.objective = objective
        self.peers = objective.peers_on(device.type)
        order = dict.fromkeys([*self.peers, *names])
        self.contestants = [objective.registry[name] for name in order]
        self.modes, self.repeats, self.device, self.dtype = modes, repeats, device, dtype
        # called with what is about to run, once for each step of `steps_per_size`
        self.advance = advance
        self.gemm = 0.0  # GFLOP/s of a matrix product, measured at each size
        self.peer: dict[str, str] = {}  # mode -> the fastest peer, found at each size
        self._last: dict[tuple[str, str], tuple[int, float]] = {}  # -> (work, seconds)
        # another sweep's, which closes them, or its own
        self.processes = processes or FreshProcesses(torch.get_num_threads())

    @property
    def steps_per_size(self) -> int:
        return len(self.contestants) * len(self.modes) * (1 + self.repeats)

    def close(self) -> None:
        self.processes.close()

    def run(
        self, problem: Problem, share: float, known_gemm: float | None = None
    ) -> list[dict[str, Any]]:
        """Measure one problem in about `share` seconds; one record for each contestant and mode.

        `known_gemm` is the GEMM rate, where another sweep has just measured it.
        """
        deadline = time.perf_counter() + share
        entries = [
            Entry(c, mode, c.ours or c.name in self.peers)
            for mode in self.modes
            for c in self.contestants
        ]
        self._admit(entries, problem, share)
        with tempfile.TemporaryDirectory(prefix="ral-sweep-") as folder:
            self._examine(entries, problem, Path(folder), share)
        deadline = max(deadline, time.perf_counter() + TIMING_SHARE * share)
        gemm = gemm_gflops(self.dtype, self.device) if known_gemm is None else known_gemm
        left = deadline - time.perf_counter()
        rotations = _allot_rotations(entries, left, self.repeats)
        whole = sum(entry.once for entry in entries if entry.in_the_race)
        for mode in self.modes:
            racing = [entry for entry in entries if entry.mode == mode and entry.in_the_race]
            share = sum(entry.once for entry in racing) / max(whole, 1e-6)
            self._time(racing, problem, rotations, left * share)
            for _ in range(self.repeats * (len(self.contestants) - len(racing))):
                self.advance("")
        if known_gemm is None:
            gemm = max(gemm, gemm_gflops(self.dtype, self.device))
        self.gemm = gemm
        peers = {mode: self._fastest_peer(entries, mode) for mode in self.modes}
        self.peer = {mode: peer.contestant.name for mode, peer in peers.items() if peer}
        return [self._row(entry, peers[entry.mode], problem) for entry in entries]

    def _admit(self, entries: Sequence[Entry], problem: Problem, share: float) -> None:
        """Skip, with the reason, contestants that cannot run, do not fit, or take too long."""
        available = available_bytes(self.device)
        expected: list[tuple[float, Entry]] = []
        for entry in entries:
            needed = entry.contestant.bytes_needed(problem, entry.backward)
            if reason := entry.contestant.refuse(problem, entry.backward):
                entry.record = {"status": "skipped", "reason": reason}
            elif available is not None and needed > MEMORY_SHARE * available:
                reason = f"would need {needed / 2**30:.1f} GiB of {available / 2**30:.1f} available"
                entry.record = {"status": "skipped", "reason": reason}
            elif last := self._last.get((entry.contestant.name, entry.mode)):
                expected.append((last[1] * entry.contestant.work(problem) / last[0], entry))
        spent = 0.0
        # The peers and our own contestants come first, then the cheapest.
        for seconds, entry in sorted(expected, key=lambda e: (not e[1].essential, e[0])):
            if spent + seconds > EXAMINE_SHARE * share and not entry.essential:
                reason = (
                    f"a run takes about {seconds:.0f} s, beyond the time left (--budget, --full)"
                )
                entry.record = {"status": "skipped", "reason": reason}
            else:
                spent += seconds

    def _examine(
        self, entries: Sequence[Entry], problem: Problem, folder: Path, share: float
    ) -> None:
        """Run all admitted through the gate; record peak memory and a first duration."""
        problem_file = str(folder / "problem.pt")
        torch.save(problem.tensors(), problem_file)
        exact_file = None
        if self.device.type != "cuda":
            exact_file = str(folder / "exact.pt")
            answers = {entry.contestant.answer for entry in entries}
            torch.save(self.objective.exact(problem, answers), exact_file)
        start = time.perf_counter()
        for entry in sorted(entries, key=self._rank):
            contestant = entry.contestant
            self.advance(f"{contestant.name} {entry.mode}: gate and memory")
            if entry.record:
                continue
            late = time.perf_counter() - start > 2 * EXAMINE_SHARE * share
            first = (contestant.name, entry.mode) not in self._last  # so there is a point of each
            if late and not entry.essential and not first:
                reason = "no time left (--budget, --full)"
                entry.record = {"status": "skipped", "reason": reason}
            else:
                # a margin: the process also loads, compiles and is compared with float64
                timeout = min(60.0 + 2 * share, 3600.0)
                entry.record = self.processes.examine(
                    self.objective.name,
                    contestant.name,
                    problem_file,
                    entry.backward,
                    exact_file,
                    timeout,
                )
            if entry.in_the_race:
                self._remember(entry, problem)

    def _remember(self, entry: Entry, problem: Problem) -> None:
        """Keep the fastest run, to predict the next size's: a cold or disturbed one misleads."""
        fastest = min([entry.record["seconds"], *entry.seconds])
        self._last[(entry.contestant.name, entry.mode)] = (entry.contestant.work(problem), fastest)

    def _time(
        self, racing: Sequence[Entry], problem: Problem, rotations: int, share: float
    ) -> None:
        """Run all of a mode once in each rotation; each rotation starts with another one.

        If it takes longer than `share` seconds, the last rotations are left out for all of them.
        """
        if racing and not any(entry.contestant.name in self.peers for entry in racing):
            for entry in racing:
                entry.record = {**entry.record, "status": "skipped", "reason": "no peer ran"}
            racing = []
        runs: dict[str, Callable[[], object]] = {}
        for entry in racing:
            runs[entry.contestant.name] = self._runner(entry, problem)
            if rotations == self.repeats or entry.contestant.compiles:
                runs[entry.contestant.name]()  # compile, and touch what is made once
        deadline = time.perf_counter() + share  # warming up, which compiles, does not count
        for rotation in range(self.repeats):
            late = rotation >= FEWEST and time.perf_counter() > deadline
            turn = rotation % max(len(racing), 1)
            for entry in [*racing[turn:], *racing[:turn]]:
                self.advance(f"{entry.contestant.name} {entry.mode}: {rotation + 1}/{self.repeats}")
                if rotation < rotations and not late:
                    entry.seconds.append(clock(runs[entry.contestant.name], self.device))
        for entry in racing:
            self._remember(entry, problem)
            if self.device.type == "cuda":  # `clock` hides it
                entry.host_seconds = host_seconds(runs[entry.contestant.name], self.device)

    def _runner(self, entry: Entry, problem: Problem) -> Callable[[], object]:
        problem = entry.contestant.view(problem)
        call = entry.contestant.prepare(problem)
        inputs = leaves(problem, entry.backward)
        gradients = problem.output_gradients(gated=False)
        return lambda: run_once(self.objective, call, inputs, gradients, entry.backward)

    def _fastest_peer(self, entries: Sequence[Entry], mode: str) -> Entry | None:
        peers = [
            entry
            for entry in entries
            if entry.mode == mode and entry.seconds and entry.contestant.name in self.peers
        ]
        return min(peers, key=lambda peer: statistics.median(peer.seconds), default=None)

    def _rank(self, entry: Entry) -> tuple[bool, int]:
        """The order of examination: the peers and ours first, the full matrix last."""
        return not entry.essential, list(self.objective.registry).index(entry.contestant.name)

    def _row(self, entry: Entry, peer: Entry | None, problem: Problem) -> dict[str, Any]:
        row: dict[str, Any] = {"contestant": entry.contestant.name, "mode": entry.mode}
        row.update((key, value) for key, value in entry.record.items() if key != "seconds")
        if not entry.seconds:
            return row
        assert peer is not None  # no contestant is timed without one
        flops = self.objective.flops_per_pair[entry.mode] * problem.heads.head_dim * problem.pairs
        gflops = flops / statistics.median(entry.seconds) / 1e9
        row["repeats"] = len(entry.seconds)
        row["ms"] = quantiles([1e3 * s for s in entry.seconds])
        row["ratio"] = quantiles([s / p for s, p in zip(entry.seconds, peer.seconds, strict=False)])
        row["gflops"] = gflops
        row["gemm_share"] = gflops / self.gemm
        if entry.host_seconds is not None:
            row["host_ms"] = 1e3 * entry.host_seconds
        return row


def _allot_rotations(entries: Sequence[Entry], left: float, repeats: int) -> int:
    """The rotations that fit into `left` seconds, the same for all contestants of a size.

    The peers and ours take part in any case. Others, cheapest first, take part where `FEWEST`
    rotations of all fit; the rest are skipped with the reason, because the median of one run beside
    that of five misleads.
    """
    fewest, whole = min(FEWEST, repeats), 0.0
    racing = [entry for entry in entries if entry.in_the_race]
    for entry in sorted(racing, key=lambda e: (not e.essential, e.once)):
        if fewest * (whole + entry.once) > left and not entry.essential:
            reason = f"{fewest} runs take about {fewest * entry.once:.0f} s, beyond the time left "
            reason += "(--budget, --full)"
            entry.record = {**entry.record, "status": "skipped", "reason": reason}
        else:
            whole += entry.once
    return min(max(math.floor(left / max(whole, 1e-6)), fewest), repeats)
