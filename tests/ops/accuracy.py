"""The accuracy rule: how far from float64 a result may be.

The error of a tensor is ‖x − truth‖. It must be at most twice the baseline's, or a floor that is
there because a baseline may be exact by luck (one key: p = 1):

- a quarter ulp at 1.0 of the tensor's dtype, relative to ‖truth‖: about what rounding the exact
result once costs
  (0.2 ulp in the mean); four ulps in float32, where a result is a sum of many rounded terms;
- four float32 ulps of the size of the inputs per element: where the true gradient vanishes by
cancellation (again one
  key), only rounding is left.

Gradients are judged as vectors too: their cosine with the truth, and their signed bias, the
relative error of their projection on the truth. Unbiased rounding averages out in the bias,
truncation or a wrong constant do not.

Marginals and lse are float32 whatever the dtype of the inputs: their baseline is the eager
computation in float32 from the same rounded inputs, with a floor of 1/16 ulp of the inputs' dtype.
That is far below the error of what a user would do instead (bfloat16 SDPA with one-hot values: 1/4
ulp), and lets a kernel evaluate exp to the accuracy of its inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOAT32_EPS = torch.finfo(torch.float32).eps


def floor_of(dtype: torch.dtype) -> float:
    eps = torch.finfo(dtype).eps
    return 4 * eps if dtype in (torch.float32, torch.float64) else eps / 4


def error(x: Tensor, truth: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.double() - truth))


def assert_accurate(
    name: str, x: Tensor, truth: Tensor, baseline: Tensor, floor: float, magnitude: float = 1.0
) -> float:
    """Check the norm of the error; returns the bound it had to meet, relative to ‖truth‖."""
    assert x.shape == truth.shape, f"{name}: shape {tuple(x.shape)}, wanted {tuple(truth.shape)}"
    assert not x.isnan().any(), f"{name}: NaN in {int(x.isnan().sum())} of {x.numel()} elements"
    x, truth, baseline = x.detach(), truth.detach(), baseline.detach()
    size = float(torch.linalg.vector_norm(truth))
    bound = max(
        2 * error(baseline, truth),
        floor * size,
        4 * FLOAT32_EPS * magnitude * math.sqrt(truth.numel()),
    )
    got = error(x, truth)
    assert got <= bound, (
        f"{name}: error {got:.3e} exceeds {bound:.3e} (‖truth‖ {size:.3e}, baseline's error "
        f"{error(baseline, truth):.3e})"
    )
    return bound / size if size > 0 else math.inf


def assert_gradient_accurate(
    name: str,
    x: Tensor,
    truth: Tensor,
    baseline: Tensor,
    magnitude: float = 1.0,
    condition: float = 0.0,
) -> None:
    """Check a gradient: norm of the error, cosine and signed bias.

    `condition` is the relative error that the inputs of a backward (a float32 lse) leave possible.
    """
    floor = max(floor_of(x.dtype), condition)
    relative = assert_accurate(name, x, truth, baseline, floor, magnitude)
    x, truth, baseline = (tensor.detach().double() for tensor in (x, truth, baseline))
    squared = float((truth * truth).sum())
    if relative > 0.1:
        return  # a gradient of zero, or a baseline that is noise: no direction to compare
    eps = torch.finfo(baseline.dtype if x.dtype == torch.float64 else x.dtype).eps
    cosine = float(torch.nn.functional.cosine_similarity(x.flatten(), truth.flatten(), dim=0))
    assert cosine >= 1 - max(eps, relative**2), (
        f"{name}: cosine with the truth is 1 - {1 - cosine:.2e}"
    )
    bias = float(((x - truth) * truth).sum()) / squared
    baseline_bias = float(((baseline - truth) * truth).sum()) / squared
    # Errors of one row share the rounding of delta, so that a row counts as one independent sample.
    samples = max(truth.numel() // truth.shape[-1], 1)
    bound = max(
        2 * abs(baseline_bias), 4 * relative / math.sqrt(samples), 4 * FLOAT32_EPS, condition
    )
    assert abs(bias) <= bound, f"{name}: signed bias {bias:+.2e} exceeds {bound:.2e}"


def assert_lse_accurate(x: Tensor, truth: Tensor, baseline: Tensor, floor: float) -> None:
    """Check lse by its absolute error: the relative error of the weights made from it."""
    masked = truth == float("-inf")
    assert torch.equal(x == float("-inf"), masked), (
        "lse: -inf must stand in fully masked rows alone"
    )
    x, truth, baseline = (
        tensor.detach().masked_fill(masked, 0.0) for tensor in (x, truth, baseline)
    )
    assert_accurate(
        "lse",
        x,
        truth,
        baseline,
        floor,
        magnitude=1 + float(truth.abs().max()) if truth.numel() else 1.0,
    )
