"""The arguments of the `divergence` op, bundled for `can_run` of every backend."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

KINDS = ("jsd", "kl", "reverse_kl")


@dataclass(frozen=True)
class DivergenceArgs:
    """The inputs of one `divergence` call, as every backend receives them."""

    p: Tensor  # [rows, N] float32 (reference: also float64), contiguous, elements >= 0
    r: Tensor  # the same shape and dtype, contiguous
    kind: str  # one of KINDS
