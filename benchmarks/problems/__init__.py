"""The objectives of the sweeps, by the name of `--objective`."""

from __future__ import annotations

from benchmarks.harness.objective import Objective

from .attention import ATTENTION
from .ral import RAL

OBJECTIVES: dict[str, Objective] = {objective.name: objective for objective in (ATTENTION, RAL)}
