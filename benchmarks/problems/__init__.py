"""The objectives of the sweeps, by the name of `--objective`."""

from __future__ import annotations

from benchmarks.harness.objective import Objective

from .attention import ATTENTION
from .ral import RAL
from .target import TARGET

OBJECTIVES: dict[str, Objective] = {x.name: x for x in (ATTENTION, RAL, TARGET)}
