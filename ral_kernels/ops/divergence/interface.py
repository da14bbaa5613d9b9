"""The `divergence` op: public function, checks, torch.library op and the choice of a backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ral_kernels.ops import allocation
from ral_kernels.runtime import backends, checks

from . import cpu, reference, triton
from .arguments import KINDS, DivergenceArgs

BACKENDS: dict[str, Any] = {"triton": triton, "cpu": cpu, "reference": reference}
backends.register("divergence", BACKENDS)


def divergence(p: Tensor, r: Tensor, kind: str = "jsd", *, backend: str | None = None) -> Tensor:
    """How far apart two rows of probabilities are, in one sweep that yields value and gradients.

        jsd         ½ Σ p log(p/m) + ½ Σ r log(r/m),  m = (p + r) / 2
        kl          Σ p log(p/r)
        reverse_kl  Σ r log(r/p)

    (README.md of this folder, equations 1 to 11.) Natural logarithms and no epsilon: 0 log 0 = 0,
    kl is +inf where r = 0 < p, reverse_kl where p = 0 < r. Values are those of the formulas also
    for rows that do not sum to 1. Near p = r nothing cancels, and p == r gives exactly 0.
    Everything accumulates in float32 and repeats bit for bit. Kept for the backward: the gradients,
    each of the size of its input.

    Gradients flow into p and into r. An element that is exactly 0 counts as a constant, so that it
    has a gradient of 0 where the derivative is infinite; a row whose value is infinite has a
    gradient of 0.

    Args:
        p: [..., N] in any floating dtype, elements >= 0 (not checked). Half precision is converted
            to float32; float64 runs on the reference backend.
        r: the reference rows, in the shape of p.
        kind: "jsd", "kl" or "reverse_kl".
        backend: name of a backend, or None for the first that can run the call.

    Returns:
        [...] in float32 (float64 if p or r is).

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, device or value.
        NotImplementedError: no backend, or not the requested one, can run this.
        RuntimeError: the requested backend is missing on this machine.
    """
    backend = backends.check_backend("divergence", backend)
    check_kind("divergence", kind)
    for name, tensor in (("p", p), ("r", r)):
        checks.check_tensor("divergence", name, tensor, "a [..., N] tensor")
        if not tensor.is_floating_point():
            raise TypeError(
                f"divergence: {name} must be floating; got {checks.dtype_name(tensor.dtype)}"
            )
    if p.dim() < 1:
        raise ValueError(f"divergence: p must be [..., N]; got {tuple(p.shape)}")
    if r.shape != p.shape:
        raise ValueError(
            f"divergence: r must have p's shape {tuple(p.shape)}; got {tuple(r.shape)}"
        )
    checks.check_same_device("divergence", "r", r, p, "p")
    return call_divergence(p, r, kind, backend)


def check_kind(op: str, kind: Any) -> None:
    wanted = f"one of {', '.join(KINDS)}"
    if not isinstance(kind, str):
        raise TypeError(f"{op}: kind must be {wanted}; got {type(kind).__name__}")
    if kind not in KINDS:
        raise ValueError(f"{op}: kind must be {wanted}; got {kind!r}")


def call_divergence(p: Tensor, r: Tensor, kind: str, backend: str) -> Tensor:
    """Call the op with checked arguments."""
    dtype = torch.float64 if torch.float64 in (p.dtype, r.dtype) else torch.float32
    wants_dp = torch.is_grad_enabled() and p.requires_grad
    wants_dr = torch.is_grad_enabled() and r.requires_grad
    value, _, _ = torch.ops.ral.divergence_fwd(
        p.to(dtype), r.to(dtype), kind, wants_dp, wants_dr, backend
    )
    return value


def _allocate_outputs(p: Tensor, wants_dp: bool, wants_dr: bool) -> tuple[Tensor, Tensor, Tensor]:
    new_empty = allocation.new_empty
    return (
        new_empty(p, p.shape[:-1], p.dtype),
        new_empty(p, p.shape if wants_dp else (0,), p.dtype),
        new_empty(p, p.shape if wants_dr else (0,), p.dtype),
    )


@torch.library.custom_op(
    "ral::divergence_fwd",
    mutates_args=(),
    schema="(Tensor p, Tensor r, str kind, bool wants_dp, bool wants_dr, str backend) -> "
    "(Tensor, Tensor, Tensor)",
)
def divergence_fwd(
    p: Tensor, r: Tensor, kind: str, wants_dp: bool, wants_dr: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (value, dp, dr), the gradients for a gradient of 1, of shape [0] where not wanted."""
    outputs = _allocate_outputs(p, wants_dp, wants_dr)
    # Backends get contiguous rows, whatever the leading dimensions are.
    rows = (-1, p.shape[-1]) if p.numel() > 0 else (outputs[0].numel(), p.shape[-1])
    args = DivergenceArgs(p.contiguous().view(rows), r.contiguous().view(rows), kind)
    chosen = backends.choose("divergence", BACKENDS, args, backend)
    if p.numel() == 0:
        for output in outputs:
            output.zero_()
        return outputs
    value, dp, dr = outputs
    chosen.fwd(
        args.p,
        args.r,
        kind,
        value.view(-1),
        dp.view(rows) if wants_dp else None,
        dr.view(rows) if wants_dr else None,
    )
    return outputs


@divergence_fwd.register_fake
def _divergence_fwd_fake(
    p: Tensor, r: Tensor, kind: str, wants_dp: bool, wants_dr: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate_outputs(p, wants_dp, wants_dr)


@torch.library.custom_op("ral::scaled_gradient", mutates_args=())
def scaled_gradient(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient * factor, 0 where the gradient is: a backward that has only that left to do.

    An op without an autograd formula: a second derivative raises instead of missing a part.
    """
    # 0 also if inf or NaN arrives for a row of infinite value
    return torch.where(gradient == 0, 0.0, gradient * factor)


@scaled_gradient.register_fake
def _scaled_gradient_fake(gradient: Tensor, factor: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.wanted = inputs[3:5]
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, dvalue: Tensor | None, *unused: Tensor | None) -> tuple[Any, ...]:
    if dvalue is None:
        return (None,) * 6
    gradients = [
        scaled_gradient(gradient, dvalue[..., None]) if wanted else None
        for gradient, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    ]
    return (*gradients, None, None, None, None)


divergence_fwd.register_autograd(_backward, setup_context=_setup_context)
