"""Right or wrong: the error of a contestant's answer against the exact one, and its bound."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Largest relative error (Frobenius norm) that still counts as right: a few roundings of the inputs'
# own dtype. It tells a wrong answer from a right one; how close the right ones come stands in the
# table.
TOLERANCE = {
    torch.float64: {"forward": 1e-10, "gradient": 1e-9},
    torch.float32: {"forward": 2e-5, "gradient": 1e-4},
    torch.bfloat16: {"forward": 1.5e-2, "gradient": 3e-2},
    torch.float16: {"forward": 2e-3, "gradient": 5e-3},
}
GRADIENTS = ("dq", "dk", "dv")


def relative_errors(
    got: Mapping[str, Tensor | None], wanted: Mapping[str, Tensor]
) -> dict[str, float]:
    """||got - wanted|| / ||wanted|| of every tensor that is there; NaN where the answer is.

    `wanted` may bring the size to divide by, as `size_<name>`.
    """
    errors = {}
    for name, tensor in got.items():
        if tensor is None:
            continue
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"gate: {name} must be {tuple(wanted[name].shape)}; got {tuple(tensor.shape)}"
            )
        difference = tensor.detach().double() - wanted[name]
        size = wanted.get(f"size_{name}", wanted[name].norm())
        errors[name] = float(difference.norm() / size)
    return errors


def verdict(
    errors: Mapping[str, float], dtype: torch.dtype, wanted: Mapping[str, Tensor] | None = None
) -> str | None:
    """None when every error is within `TOLERANCE` plus thrice its slack, or which are not.

    `slack_<name>` of `wanted` is the error that the dtype itself brings about at that problem.
    """
    bad = []
    for name, error in errors.items():
        bound = TOLERANCE[dtype]["gradient" if name in GRADIENTS else "forward"]
        if wanted is not None and f"slack_{name}" in wanted:
            bound += 3 * float(wanted[f"slack_{name}"])
        if not error <= bound:  # also true of NaN
            bad.append(f"{name} error {error:.1e} > {bound:.1e}")
    return ", ".join(bad) or None
