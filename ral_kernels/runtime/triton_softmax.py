"""What the Triton kernels of every softmax share: the stabiliser, biases in base 2, the soft cap.

Scores are in base 2 (times log2 e), because exp2 is the instruction that GPUs have.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # torch.finfo(torch.float32).min


@triton.jit
def stabiliser(m):
    """What exp2 subtracts: the row maximum; 0 where it is -inf, so that exp2 gives 0, not NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def in_base_2(bias):
    """A bias times log2 e. finfo.min stays finite: such keys count where a row has no others."""
    return tl.where(bias == float("-inf"), bias, tl.maximum(bias * LOG2E, LOWEST))


@triton.jit
def tanh(x):
    """tanh to float32's accuracy: near 0, where exp2 cancels, by a polynomial (Cephes)."""
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, x + x * square * series, tl.where(x < 0, -far, far))
