"""The `divergence` op: public function, checks, torch.library op and the choice of a backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...runtime import backends, checks
from ...runtime.backends import Backend, BackendName
from .. import allocation, schema
from .arguments import KINDS, DivergenceArgs, DivergenceOutputs, Kind
from .cpu import CpuDivergence
from .reference import TorchDivergence
from .triton import TritonDivergence

BACKENDS: dict[str, Backend[DivergenceArgs, DivergenceOutputs]] = {
    "triton": TritonDivergence(),
    "cpu": CpuDivergence(),
    "reference": TorchDivergence(),
}
backends.register("divergence", BACKENDS)


def divergence(
    p: Tensor, r: Tensor, kind: Kind = "jsd", *, backend: BackendName | None = None
) -> Tensor:
    """How far apart two rows of probabilities are, in one sweep that yields value and gradients.

        jsd         ½ Σ p log(p/m) + ½ Σ r log(r/m),  m = (p + r) / 2
        kl          Σ p log(p/r)
        reverse_kl  Σ r log(r/p)
        cross_entropy  −Σ r log p

    (README.md of this folder, equations 1 to 12.) Natural logarithms and no epsilon: 0 log 0 = 0,
    kl is +inf where r = 0 < p, reverse_kl and cross_entropy where p = 0 < r. The formulas hold for
    rows that do not sum to 1 too. Near p = r nothing cancels, and p == r gives exactly 0, except
    for cross_entropy, which is then the entropy of r. Everything accumulates in float32 and repeats
    bit for bit. The op keeps the gradients for the backward, each of the size of its input.

    Gradients flow into p and into r. An element that is exactly 0 counts as a constant: it has a
    gradient of 0, where the derivative may be infinite. A row whose value is infinite has a
    gradient of 0.

    Args:
        p: [..., N] in any floating dtype, elements >= 0 (not checked). Half precision is converted
            to float32; float64 runs on the reference backend.
        r: the rows that p is compared with, in the shape of p.
        kind: "jsd", "kl", "reverse_kl" or "cross_entropy".
        backend: name of a backend, or None for the first that can run the call.

    Returns:
        [...] in float32 (float64 if p or r is).

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, device or value.
        NotImplementedError: the requested backend cannot run this call, or no backend can.
        RuntimeError: the requested backend is missing on this machine.
    """
    requested = backends.check_backend("divergence", backend)
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
    return call_divergence(p, r, kind, requested)


def check_kind(op: str, kind: Any) -> None:
    wanted = f"one of {', '.join(KINDS)}"
    if not isinstance(kind, str):
        raise TypeError(f"{op}: kind must be {wanted}; got {type(kind).__name__}")
    if kind not in KINDS:
        raise ValueError(f"{op}: kind must be {wanted}; got {kind!r}")


def call_divergence(p: Tensor, r: Tensor, kind: str, backend: str) -> Tensor:
    """Call the op with checked arguments."""
    dtype = torch.float64 if torch.float64 in (p.dtype, r.dtype) else torch.float32
    args = DivergenceArgs(
        p=p.to(dtype),
        r=r.to(dtype),
        kind=kind,
        wants_dp=torch.is_grad_enabled() and p.requires_grad,
        wants_dr=torch.is_grad_enabled() and r.requires_grad,
    )
    value, _, _ = divergence_fwd(args, backend)
    return value


_SIGNATURE = schema.Signature(DivergenceArgs)


def _allocate_outputs(args: DivergenceArgs) -> tuple[Tensor, Tensor, Tensor]:
    p, new_empty = args.p, allocation.new_empty
    return (
        new_empty(p, p.shape[:-1], p.dtype),
        new_empty(p, p.shape if args.wants_dp else (0,), p.dtype),
        new_empty(p, p.shape if args.wants_dr else (0,), p.dtype),
    )


def _divergence_fwd(args: DivergenceArgs, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """-> (value, dp, dr): the gradients for dvalue = 1, of shape [0] where not wanted."""
    value, dp, dr = _allocate_outputs(args)
    # Backends get contiguous rows, whatever the leading dimensions are.
    length = args.p.shape[-1]
    rows = (-1, length) if args.p.numel() > 0 else (value.numel(), length)
    args = replace(args, p=args.p.contiguous().view(rows), r=args.r.contiguous().view(rows))
    chosen = backends.choose("divergence", BACKENDS, args, backend)
    if args.p.numel() == 0:
        for output in (value, dp, dr):
            output.zero_()
    else:
        outputs = DivergenceOutputs(
            value.view(-1),
            dp.view(rows) if args.wants_dp else None,
            dr.view(rows) if args.wants_dr else None,
        )
        chosen.fwd(args, outputs)
    return value, dp, dr


def _divergence_fwd_fake(args: DivergenceArgs, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate_outputs(args)


def _scaled_gradient(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient * factor, and 0 where the gradient is 0.

    It is the backward of ops whose forward returns their gradients. As an op without a derivative
    it makes a second derivative raise; PyTorch's product would give one that lacks a part.
    """
    # `where`, because inf or NaN may arrive for a row of infinite value
    return torch.where(gradient == 0, 0.0, gradient * factor)


def _scaled_gradient_fake(gradient: Tensor, factor: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    ctx.wanted = (inputs[_SIGNATURE.index("wants_dp")], inputs[_SIGNATURE.index("wants_dr")])
    ctx.save_for_backward(*outputs[1:])


def _backward(ctx: Any, dvalue: Tensor | None, *unused: Tensor | None) -> tuple[Any, ...]:
    if dvalue is None:
        return _SIGNATURE.gradients()
    dp, dr = (
        scaled_gradient(gradient, dvalue[..., None]) if wanted else None
        for gradient, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    )
    return _SIGNATURE.gradients(p=dp, r=dr)


divergence_fwd = schema.define_with_args(
    "divergence_fwd",
    _SIGNATURE,
    "",
    3,
    _divergence_fwd,
    _divergence_fwd_fake,
    (_setup_context, _backward),
)
scaled_gradient = schema.define(
    "scaled_gradient",
    "Tensor gradient, Tensor factor",
    1,
    _scaled_gradient,
    _scaled_gradient_fake,
)
