"""What an objective of the sweeps is made of: problems, contestants, and the exact answer.

The attention objective and the RAL objective fill these in, each in its own folder. Gate, timing,
memory, report and plot use only what this file declares.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from .inputs import Heads, LayerInputs

Call = Callable[..., "tuple[Tensor | None, ...]"]
Answer = Mapping[str, Tensor]


class Problem(ABC):
    """One size of a sweep, as every contestant gets it; subclasses are frozen dataclasses."""

    q: Tensor  # [1, H, T, D]
    k: Tensor  # [1, Hk, N, D]
    span_ids: Tensor  # int32 [N], -1 = text
    num_spans: int

    @property
    def seqlen(self) -> int:
        return self.k.shape[2]

    @property
    def heads(self) -> Heads:
        return Heads(self.q.shape[1], self.k.shape[1], self.q.shape[3])

    @property
    @abstractmethod
    def pairs(self) -> int:
        """Query-key pairs that have to be looked at, over all query heads."""

    @abstractmethod
    def inputs(self) -> tuple[Tensor, ...]:
        """The differentiable inputs, in the order of the objective's gradients."""

    @abstractmethod
    def output_gradients(self, gated: bool) -> tuple[Tensor, ...]:
        """The gradient of the loss in each output; `gated` as the exact answer has it."""

    @abstractmethod
    def judged(self, name: str, output: Tensor) -> Tensor:
        """The part of an output that the exact answer covers."""

    @abstractmethod
    def tiny(self) -> Problem:
        """A small problem of the same heads and dtype, on the CPU, to warm up with."""

    def tensors(self) -> dict[str, Any]:
        """What another process needs to rebuild this problem (`type(problem)(**tensors)`)."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}  # type: ignore[attr-defined]


def itself(problem: Any) -> Any:
    return problem


def no_objection(problem: Any, backward: bool) -> str | None:
    return None


def no_bytes(problem: Any, backward: bool) -> int:
    return 0


def pairs_of(problem: Problem) -> int:
    return problem.pairs


@dataclass(frozen=True)
class Contestant:
    """One way to compute the problem.

    `prepare` gets the problem and returns the call that is timed, from the differentiable inputs to
    the objective's outputs (None for one that it does not compute). It prepares whatever does not
    depend on the inputs before the clock starts.
    """

    name: str  # on the command line and in the JSON
    label: str  # in the table and the plot
    prepare: Callable[[Any], Call]
    answer: str = "all"  # which of the exact answers it is held against
    # its first call at a size compiles: warm up at full size before memory is measured
    compiles: bool = False
    ours: bool = False  # a failure of ours fails the run; a peer may be unable
    on: tuple[str, ...] = ("cpu", "cuda")  # where it takes part unasked
    # the problem that it gets in place of the sweep's
    view: Callable[[Any], Any] = itself
    # why it cannot do (problem, backward)
    refuse: Callable[[Any, bool], str | None] = no_objection
    # beyond the inputs, where that grows with N^2
    bytes_needed: Callable[[Any, bool], int] = no_bytes
    # what its time grows with from size to size
    work: Callable[[Any], int] = pairs_of


@dataclass(frozen=True)
class Objective:
    """Something to compute, all contestants, and how they are judged and shown."""

    name: str  # of --objective
    title: str  # of the plot
    outputs: tuple[str, ...]  # of a forward
    gradients: tuple[str, ...]  # of a backward, one for each of Problem.inputs
    contestants: tuple[Contestant, ...]
    peers: tuple[str, ...]  # every ratio is to the fastest of these at that size,
    peer_heading: str  # of the table's column of ratios
    peer_claim: str  # "0.2 x the time of ..." in the plot
    flops_per_pair: Mapping[str, int]  # by mode, times head_dim
    problem: type[Problem]
    make: Callable[[LayerInputs, int | None], Problem]  # from a layer and --rows
    # (problem, names of answers) -> answer -> the exact outputs and gradients, and their slack
    exact: Callable[[Any, Set[str]], dict[str, dict[str, Tensor]]]
    facts: Callable[[Any], dict[str, Any]]  # of a problem, for the JSON
    summary: Callable[[Mapping[str, Any]], tuple[str, ...]]  # of these facts, for the table
    cuda_peers: tuple[str, ...] = ()  # and there of these too
    default_rows: int | None = None  # None: the objective is over all rows
    # whether the slack of the exact answer is ours as well, or that of roundings that ours avoid
    slack_for_ours: bool = True
    # ours with spans -> the same without; `<ours>_<layout>` is a contestant, too
    layout_pairs: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def registry(self) -> dict[str, Contestant]:
        return {contestant.name: contestant for contestant in self.contestants}

    def peers_on(self, device: str) -> tuple[str, ...]:
        """The peers of the ratios on this kind of device."""
        return self.peers + (self.cuda_peers if device.split(":")[0] == "cuda" else ())

    def default_names(self, device: str) -> list[str]:
        """All contestants for this kind of device."""
        return [c.name for c in self.contestants if device.split(":")[0] in c.on]
