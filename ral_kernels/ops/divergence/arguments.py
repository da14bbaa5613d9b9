"""What every backend of `divergence` receives: arguments and outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Kind = Literal["jsd", "kl", "reverse_kl", "cross_entropy"]
KINDS: tuple[Kind, ...] = ("jsd", "kl", "reverse_kl", "cross_entropy")


@dataclass(slots=True)
class DivergenceArgs:
    """The inputs of one `divergence` call. Backends get `p` and `r` as contiguous rows."""

    p: Tensor  # [rows, N] float32 (reference backend: also float64), elements >= 0
    r: Tensor  # as p
    kind: str  # one of KINDS
    wants_dp: bool
    wants_dr: bool


@dataclass(slots=True)
class DivergenceOutputs:
    """What the forward writes. Its gradients are those for dvalue = 1."""

    value: Tensor  # [rows], p's dtype
    dp: Tensor | None  # as p, contiguous; None where it is not wanted
    dr: Tensor | None
