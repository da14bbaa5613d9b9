"""Reference backend of `divergence`: plain PyTorch in the dtype of its inputs.

Comments cite the equations of README.md. The reference backend of `policy_divergence` uses
`generalised` too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.backends import Backend
from .arguments import DivergenceArgs, DivergenceOutputs

# Below this |x|, differences of logarithms cancel: atanh, log1p or a series take their place.
_NEAR = 0.5
# atanh(x) - x by its series below this; the terms kept leave 1e-17 of x³ / 3.
_SERIES = 0.1
_SERIES_TERMS = 8
# the kind of (r, p); cross_entropy has none
_SWAPPED = {"jsd": "jsd", "kl": "reverse_kl", "reverse_kl": "kl"}


def _relative_difference(p: Tensor, r: Tensor) -> Tensor:
    """x = (p - r) / (p + r), in [-1, 1], and 0 where both are 0."""
    s = p + r
    return (p - r) / torch.where(s == 0, 1.0, s)  # (4)


def _log_ratio(p: Tensor, r: Tensor, x: Tensor) -> Tensor:
    """log(p/r), without cancellation near p = r; 0 where p is 0."""
    near = 2 * torch.atanh(torch.where(x.abs() < _NEAR, x, 0.0))  # (5)
    return torch.where(p == 0, 0.0, torch.where(x.abs() < _NEAR, near, torch.log(p) - torch.log(r)))


def _log_ratio_to_mean(p: Tensor, r: Tensor, x: Tensor) -> Tensor:
    """log(p/m) = log1p(x) for m = (p + r)/2; 0 where p is 0."""
    near = torch.log1p(torch.where(x.abs() < _NEAR, x, 0.0))  # (5)
    far = torch.log(p) - torch.log((p + r) / 2)
    return torch.where(p == 0, 0.0, torch.where(x.abs() < _NEAR, near, far))


def _atanh_minus_x(x: Tensor) -> Tensor:
    """atanh(x) - x = x³/3 + x⁵/5 + …, for |x| < _NEAR."""
    square = x * x
    series = torch.zeros_like(x)
    for n in range(_SERIES_TERMS, 0, -1):
        series = series * square + 1 / (2 * n + 1)
    return torch.where(x.abs() < _SERIES, series * square * x, torch.atanh(x) - x)


def _jsd_terms(p: Tensor, r: Tensor, x: Tensor) -> Tensor:
    near = torch.where(x.abs() < _NEAR, x, 0.0)
    near_terms = (p + r) / 4 * (2 * near * torch.atanh(near) + torch.log1p(-near * near))  # (6)
    far_terms = (p * _log_ratio_to_mean(p, r, x) + r * _log_ratio_to_mean(r, p, -x)) / 2  # (1)
    return torch.where(x.abs() < _NEAR, near_terms, far_terms)


def _generalised_kl_terms(p: Tensor, r: Tensor, x: Tensor) -> Tensor:
    """p log(p/r) - p + r >= 0; +inf where r = 0 < p."""
    near = torch.where(x.abs() < _NEAR, x, 0.0)
    near_terms = (p + r) * (near * torch.atanh(near) + _atanh_minus_x(near))  # (7)
    far_terms = p * _log_ratio(p, r, x) - (p - r)
    return torch.where(x.abs() < _NEAR, near_terms, far_terms)


def _cross_entropy_terms(p: Tensor, r: Tensor) -> Tensor:
    """-r log p, +inf where p = 0 < r, and 0 where r is 0."""
    return torch.where(r == 0, 0.0, -r * torch.log(p))  # (12)


def generalised(p: Tensor, r: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The term of each element, >= 0, and its derivative by p.

    For kl and reverse_kl the terms are those of Σ p log(p/r) − p + r and Σ r log(r/p) − r + p. For
    rows that sum to 1 their sum is the divergence. cross_entropy has the derivative of reverse_kl.
    The derivative is 0 where p is 0.
    """
    x = _relative_difference(p, r)
    if kind == "jsd":
        return _jsd_terms(p, r, x), _log_ratio_to_mean(p, r, x) / 2  # (8)
    if kind == "kl":
        return _generalised_kl_terms(p, r, x), _log_ratio(p, r, x)  # (9)
    safe = torch.where(p == 0, 1.0, p)
    is_kl = kind == "reverse_kl"
    terms = _generalised_kl_terms(r, p, -x) if is_kl else _cross_entropy_terms(p, r)
    return terms, torch.where(p == 0, 0.0, ((p - r) / safe).clamp_min(-1e34))  # (10)


def _as_defined(p: Tensor, r: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The term of each element in (1) to (3), and its derivative by p; 0 where p is 0.

    Only close p and r take the generalised term. In rows far from normalised, its - p + r would
    cancel with what takes it back.
    """
    x = _relative_difference(p, r)
    if kind == "jsd":
        return generalised(p, r, kind)
    if kind == "cross_entropy":
        terms = _cross_entropy_terms(p, r)
    else:
        a, b, x = (p, r, x) if kind == "kl" else (r, p, -x)
        near = _generalised_kl_terms(a, b, x) + (a - b)
        log_ratio = _log_ratio(a, b, x)
        terms = torch.where(x.abs() < _NEAR, near, a * log_ratio)  # (2), (3)
    if kind == "kl":
        return terms, torch.where(p == 0, 0.0, log_ratio + 1)  # (9)
    safe = torch.where(p == 0, 1.0, p)
    return terms, torch.where(p == 0, 0.0, (-r / safe).clamp_min(-1e34))  # (10)


class TorchDivergence(Backend[DivergenceArgs, DivergenceOutputs]):
    """PyTorch in the dtype of the inputs."""

    def fwd(self, args: DivergenceArgs, outputs: DivergenceOutputs) -> None:
        p, r, kind = args.p, args.r, args.kind
        terms, dterms = _as_defined(p, r, kind)
        outputs.value[:] = terms.sum(-1)
        infinite = outputs.value.isinf()[..., None]
        if outputs.dp is not None:
            outputs.dp[:] = torch.where(infinite, 0.0, dterms)  # (8) to (10)
        if outputs.dr is not None:
            if kind == "cross_entropy":
                dterms = torch.where((r == 0) | (p == 0), 0.0, -torch.log(p))  # (11)
            else:
                # By symmetry: jsd(p, r) = jsd(r, p), and reverse_kl(p, r) = kl(r, p).
                _, dterms = _as_defined(r, p, _SWAPPED[kind])
            outputs.dr[:] = torch.where(infinite, 0.0, dterms)  # (11)
