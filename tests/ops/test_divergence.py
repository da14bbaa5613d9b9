"""`divergence` over backend x kind x shape: value and gradients against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ral_kernels.ops.divergence import divergence, interface, reference
from ral_kernels.ops.divergence.arguments import KINDS
from tests.ops.accuracy import FLOAT32_EPS, assert_accurate, assert_gradient_accurate

INF = float("inf")
DISTANCES = KINDS[:3]  # 0 for equal rows, unlike cross_entropy
SHAPES = ((5,), (3, 1), (2, 7), (2, 3, 61), (4, 1000), (33, 127), (1, 8191), (0, 7), (3, 0), (0,))


def random_rows(shape: tuple[int, ...], seed: int, temperature: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(temperature * torch.randn(shape, generator=generator), -1)


def exact(p: Tensor, r: Tensor, kind: str) -> Tensor:
    """The formulas as they stand, in float64, for p and r without zeros."""
    p, r = p.double(), r.double()
    if kind == "jsd":
        m = (p + r) / 2
        return ((p * (p / m).log()).sum(-1) + (r * (r / m).log()).sum(-1)) / 2
    if kind == "cross_entropy":
        return -(r * p.log()).sum(-1)
    return (p * (p / r).log()).sum(-1) if kind == "kl" else (r * (r / p).log()).sum(-1)


def naive(p: Tensor, r: Tensor, kind: str) -> Tensor:
    """What one writes first, in float32."""
    if kind == "jsd":
        m = (p + r) / 2
        return ((p * (p / m).log()).sum(-1) + (r * (r / m).log()).sum(-1)) / 2
    if kind == "cross_entropy":
        return -(r * p.log()).sum(-1)
    return (p * (p / r).log()).sum(-1) if kind == "kl" else (r * (r / p).log()).sum(-1)


def check_shape(
    kind: str, shape: tuple[int, ...], backend: str, sums: tuple[float, float] = (1.0, 1.0)
) -> None:
    p, r = ((random_rows(shape, seed) * total).requires_grad_() for seed, total in enumerate(sums))
    value = divergence(p, r, kind, backend=backend)
    assert value.shape == shape[:-1] and value.dtype == torch.float32
    dvalue = torch.randn(value.shape, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad(value, (p, r), dvalue)
    p64, r64, p32, r32 = (x.detach().to(d).requires_grad_() for d in (torch.float64, torch.float32)
                          for x in (p, r))  # fmt: skip
    truth, baseline = exact(p64, r64, kind), naive(p32, r32, kind)
    assert_accurate("value", value, truth, baseline, 4 * FLOAT32_EPS)
    true_grads = torch.autograd.grad(truth, (p64, r64), dvalue.double())
    baseline_grads = torch.autograd.grad(baseline, (p32, r32), dvalue)
    for i, name in enumerate(("dp", "dr")):
        assert_gradient_accurate(name, grads[i], true_grads[i], baseline_grads[i], magnitude=4.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_divergence(kind: str, shape: tuple[int, ...], backend: str) -> None:
    check_shape(kind, shape, backend)


@pytest.mark.parametrize("sums", [(1e4, 1.0), (1.0, 1e4), (1e-4, 1.0), (1.0, 3.0)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_far_from_normalised(kind: str, sums: tuple[float, float], backend: str) -> None:
    """The definition does not ask for rows that sum to 1, and nothing of their sums may cancel."""
    check_shape(kind, (4, 1000), backend, sums)


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("kind", DISTANCES)
def test_close_rows_do_not_cancel(kind: str, distance: float, backend: str) -> None:
    """Relative errors stay at rounding level as p comes near r, where the plain formula drowns."""
    r = random_rows((8, 1000), 0)
    noise = torch.randn(r.shape, generator=torch.Generator().manual_seed(1))
    p = (r * (1 + distance * noise)).requires_grad_()
    value = divergence(p, r, kind, backend=backend)
    truth = exact(p.detach(), r, kind)
    # kl is literal for rows that do not sum to 1: Σ (p - r) is most of it, rounded when summed.
    slack = 0.0 if kind == "jsd" else FLOAT32_EPS * distance / float(truth.abs().min()) * 10
    torch.testing.assert_close(value.detach().double(), truth, rtol=2e-6 + slack, atol=0)
    if kind == "jsd":
        (dp,) = torch.autograd.grad(value.sum(), p)
        p64, r64 = p.detach().double(), r.double()
        wanted = torch.log1p((p64 - r64) / (p64 + r64)) / 2
        torch.testing.assert_close(dp.double(), wanted, rtol=2e-6, atol=1e-11)


@pytest.mark.parametrize("kind", DISTANCES)
def test_terms_of_the_reference(kind: str) -> None:
    """Element by element: >= 0 and right to a few ulp, from a part in a million apart to far."""
    y = torch.logspace(-6, 3, 400)
    r = torch.full_like(y, 0.125)
    for p in (r * (1 + y), r / (1 + y)):
        terms, _ = reference.generalised(p, r, kind)
        x = (p.double() - r) / (p.double() + r)  # exact for what float32 made of p
        if kind == "jsd":
            truth = (p.double() + r) / 4 * ((1 + x) * x.log1p() + (1 - x) * (-x).log1p())
        else:
            a, b = (p.double(), r.double()) if kind == "kl" else (r.double(), p.double())
            z = (a - b) / b
            truth = b * ((1 + z) * z.log1p() - z)
        assert (terms >= 0).all()
        torch.testing.assert_close(terms.double(), truth, rtol=2e-6, atol=1e-18)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rows(kind: str, backend: str) -> None:
    p = random_rows((3, 500), 0)
    p[:, ::7] = 0
    p.requires_grad_()
    value = divergence(p, p.detach().clone(), kind, backend=backend)
    if kind == "cross_entropy":
        torch.testing.assert_close(value, -torch.special.xlogy(p, p).sum(-1))
    else:
        assert torch.equal(value, torch.zeros(3))
    (dp,) = torch.autograd.grad(value.sum(), p)
    constant = {"jsd": 0.0, "kl": 1.0, "reverse_kl": -1.0, "cross_entropy": -1.0}[kind]
    assert torch.equal(dp, torch.where(p == 0, 0.0, constant))


ZEROS = (  # p, r, jsd, kl, reverse_kl, cross_entropy
    ([0.5, 0.5, 0.0], [0.5, 0.5, 0.0], 0.0, 0.0, 0.0, math.log(2)),
    ([1.0, 0.0], [0.0, 1.0], math.log(2), INF, INF, INF),
    ([0.5, 0.5], [1.0, 0.0], 0.75 * math.log(4 / 3), INF, math.log(2), math.log(2)),
    ([1.0, 0.0], [0.5, 0.5], 0.75 * math.log(4 / 3), math.log(2), INF, INF),
    ([0.0, 0.0], [0.0, 0.0], 0.0, 0.0, 0.0, 0.0),
    ([0.0, 0.0], [0.5, 0.5], 0.5 * math.log(2), 0.0, INF, INF),
)


@pytest.mark.parametrize("index", range(len(ZEROS)))
def test_zeros_are_exact(index: int, backend: str) -> None:
    p_row, r_row, *wanted = ZEROS[index]
    p, r = (torch.tensor([row], requires_grad=True) for row in (p_row, r_row))
    for kind, target in zip(KINDS, wanted, strict=True):
        value = divergence(p, r, kind, backend=backend)
        torch.testing.assert_close(value, torch.tensor([target]), rtol=1e-6, atol=0)
        for poison in (1.0, INF, float("nan")):
            dp, dr = torch.autograd.grad(value, (p, r), torch.tensor([poison]), retain_graph=True)
            assert not dp[p == 0].any() and not dr[r == 0].any(), "zeros are constants"
            if target == INF:
                assert not dp.any() and not dr.any(), "an infinite row has no gradient"
            if poison == 1.0:
                assert dp.isfinite().all() and dr.isfinite().all()


@pytest.mark.parametrize("tiny", [1e-30, 1e-38, 1e-44])
def test_tiny_probabilities(tiny: float, backend: str) -> None:
    """Far from zero in the logarithm, and lost against 1 in p + r."""
    p, r = torch.tensor([tiny, 1.0], requires_grad=True), torch.tensor([0.5, 0.5])
    for kind in KINDS:
        value = divergence(p, r, kind, backend=backend)
        truth = exact(p.detach(), r, kind)
        torch.testing.assert_close(value.detach().double(), truth, rtol=2e-6, atol=0)
        (dp,) = torch.autograd.grad(value, p)
        assert dp.isfinite().all() and dp[0] < -10  # -r/p may exceed float32


def test_nan_propagates(backend: str) -> None:
    p = torch.tensor([[float("nan"), 0.5], [0.5, 0.5]])
    for kind in KINDS:
        value = divergence(p, torch.full((2, 2), 0.5), kind, backend=backend)
        assert value[0].isnan() and value[1].isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    p, r = (random_rows((3, 5), seed).double().requires_grad_() for seed in (0, 1))
    p_near = (r.detach() * (1 + 1e-2 * torch.randn(3, 5, dtype=torch.float64))).requires_grad_()
    for first in (p, p_near):
        assert torch.autograd.gradcheck(lambda a, b: divergence(a, b, kind), (first, r))


@pytest.mark.parametrize("kind", DISTANCES)
def test_exchanging_the_rows(kind: str, backend: str) -> None:
    p, r = random_rows((4, 61), 0), random_rows((4, 61), 1)
    swapped = {"jsd": "jsd", "kl": "reverse_kl", "reverse_kl": "kl"}[kind]
    torch.testing.assert_close(
        divergence(p, r, kind, backend=backend), divergence(r, p, swapped, backend=backend)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_converted(dtype: torch.dtype, backend: str) -> None:
    p, r = random_rows((4, 61), 0).to(dtype).requires_grad_(), random_rows((4, 61), 1)
    value = divergence(p, r, backend=backend)
    assert torch.equal(value, divergence(p.float(), r, backend=backend))
    (dp,) = torch.autograd.grad(value.sum(), p)
    assert dp.dtype == dtype


def test_layouts(backend: str) -> None:
    """Any strides, also in the gradient that arrives."""
    p, r = random_rows((61, 2, 3), 0).permute(1, 2, 0), random_rows((2, 1, 61), 1).expand(2, 3, 61)
    p.requires_grad_()
    value = divergence(p, r, backend=backend)
    torch.testing.assert_close(value, divergence(p.contiguous(), r.contiguous(), backend=backend))
    (dp,) = torch.autograd.grad(value.sum(), p)
    assert dp.shape == p.shape


def test_only_wanted_gradients_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []
    backend = interface.BACKENDS["reference"]
    reference_fwd = backend.fwd

    def fwd(args: Any, outputs: Any) -> None:
        seen.append((outputs.dp is not None, outputs.dr is not None))
        reference_fwd(args, outputs)

    monkeypatch.setattr(backend, "fwd", fwd)
    p, r = random_rows((2, 5), 0), random_rows((2, 5), 1)
    divergence(p, r, backend="reference")
    divergence(p.requires_grad_(), r, backend="reference")
    divergence(p.detach(), r.requires_grad_(), backend="reference")
    with torch.no_grad():
        divergence(p, r, backend="reference")
    assert seen == [(False, False), (True, False), (False, True), (False, False)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, False)])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_opcheck(kind: str, wants: tuple[bool, bool], backend: str) -> None:
    p, r = random_rows((2, 3, 5), 0), random_rows((2, 3, 5), 1)
    p.requires_grad_(wants[0])
    r.requires_grad_(wants[1])
    torch.library.opcheck(torch.ops.ral.divergence_fwd.default, (p, r, kind, *wants, backend))


def test_compile_without_graph_break(backend: str) -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        p, r = torch.softmax(x, -1), torch.softmax(y, -1)
        return sum(
            (divergence(p, r, kind, backend=backend).sum() for kind in KINDS), x.new_zeros(())
        )

    x, y = (torch.randn(3, 17, requires_grad=True) for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), f(x, y))
    for a, b in zip(
        torch.autograd.grad(compiled(x, y), (x, y)),
        torch.autograd.grad(f(x, y), (x, y)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_fake_tensors() -> None:
    with FakeTensorMode() as mode:
        p = mode.from_tensor(torch.rand(2, 3, 5)).requires_grad_()
        value = divergence(p, p.detach())
        (dp,) = torch.autograd.grad(value.sum(), p)
    assert value.shape == (2, 3) and dp.shape == (2, 3, 5)


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.in_interpreter(when=lambda threads: threads == 1)
def test_repeats_bit_for_bit(backend: str, threads: int) -> None:
    p, r = random_rows((50, 1001), 0), random_rows((50, 1001), 1)
    first = divergence(p, r, backend=backend)
    assert all(torch.equal(first, divergence(p, r, backend=backend)) for _ in range(3))
