"""`head_weights`, over backend x dtype x case: policies and gradients; what must be exact."""

from __future__ import annotations

import copy
import pickle
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ral_kernels as rk
from ral_kernels.ops import qkv
from ral_kernels.ops.divergence.arguments import KINDS
from ral_kernels.ops.policy import attention_divergence, attention_policy, ral_loss
from ral_kernels.snapshot import AttentionSnapshot
from tests.ops.packed_cases import WEIGHTED as PACKED
from tests.ops.packed_cases import PackedCase
from tests.ops.policy_cases import (
    BY_NAME,
    WEIGHTED_CASES,
    WEIGHTED_SPAN_CASES,
    PolicyCase,
    PolicyInputs,
    draw_weights,
    snapshot_inputs,
)
from tests.ops.target_cases import rows_of, target_of
from tests.ops.test_policy import check_case, gradients, op_inputs_of, random_like
from tests.ops.test_policy_divergence import check_case as check_divergence
from tests.ops.test_policy_divergence import snapshot_of
from tests.ops.test_policy_divergence_at_reference import assert_exactly_zero, check_unchanged
from tests.ops.test_policy_packed import check_divergence as check_packed_divergence
from tests.ops.test_policy_packed import check_policy as check_packed_policy
from tests.ops.test_snapshot import assert_same, packed, shared

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKEN_NAMES = tuple(case.name for case in WEIGHTED_CASES)


@pytest.fixture
def backend(packed_backend: str) -> str:
    """Every backend that takes head weights."""
    return packed_backend


def weighted(name: str, dtype: torch.dtype = torch.float32) -> PolicyInputs:
    return BY_NAME[name].inputs(dtype).requires_grad_()


def without(inputs: PolicyInputs, *names: str) -> dict[str, Any]:
    return {name: x for name, x in inputs.options.items() if name not in names}


# -- against float64 -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", WEIGHTED_CASES + WEIGHTED_SPAN_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_policy(case: PolicyCase, dtype: torch.dtype, backend: str) -> None:
    check_case(case, dtype, backend)


@pytest.mark.parametrize(("name", "kind"), [*zip(TOKEN_NAMES, cycle(KINDS), strict=False)])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
def test_divergence(name: str, kind: str, dtype: torch.dtype, backend: str) -> None:
    """From a snapshot of another model, with weights of its own."""
    check_divergence(BY_NAME[name], dtype, backend, kind, other_model=True)


@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
def test_packed(case: PackedCase, dtype: torch.dtype, backend: str) -> None:
    check_packed_policy(case, dtype, backend)
    if not case.num_spans:
        check_packed_divergence(case, dtype, backend, "jsd")


@pytest.mark.slow(stands_in="test_policy")
@pytest.mark.parametrize("threads", [3], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
def test_cpu_variants(dtype: torch.dtype, isa: str, threads: int) -> None:
    for name in ("weights_gqa_7", "weights_together"):
        check_case(BY_NAME[name], dtype, "cpu")
        check_unchanged(BY_NAME[name], "jsd", dtype, "cpu")
    check_packed_divergence(PACKED[1], dtype, "cpu", "kl")


@pytest.mark.parametrize("kind", ["heads", "samples"])
def test_gradcheck(kind: str) -> None:
    """By every input; heads of weight 0 are left out, because finite differences leave x >= 0."""
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(2, 2, 1, 2, dtype=torch.float64, generator=generator).requires_grad_()
    k = torch.randn(2, 1, 3, 2, dtype=torch.float64, generator=generator).requires_grad_()
    other = AttentionSnapshot(q[:, :1] * 2, k, head_weights=torch.ones(1))
    weights = draw_weights(kind, 2, 2).double() + 0.1
    spans = rk.Spans.from_lengths([1, 2])

    def f(q: Tensor, k: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return (
            attention_policy(q, k, head_weights=x, spans=spans, softcap=0.7),
            attention_divergence(q, k, other, "reverse_kl", head_weights=x),
            ral_loss(q, k, other, torch.tensor([1.0, -2.0]), head_weights=x),
        )

    assert torch.autograd.gradcheck(f, (q, k, weights.requires_grad_()))


# -- the loss with its gradients, and targets ------------------------------------------------------


@pytest.mark.parametrize("name", TOKEN_NAMES)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
def test_loss_is_that_of_the_separate_backward(name: str, dtype: torch.dtype, backend: str) -> None:
    inputs = weighted(name, dtype)
    snapshot = snapshot_of(snapshot_inputs(BY_NAME[name], inputs, other_model=True))
    options = {"backend": backend, **inputs.options}
    value = attention_divergence(inputs.q, inputs.k, snapshot, **options)
    advantages = random_like(value, 2)
    loss = ral_loss(inputs.q, inputs.k, snapshot, advantages, reduction="sum", **options)
    assert loss.grad_fn is not None and "policy_divergence_loss" in loss.grad_fn.name()
    torch.testing.assert_close(loss, (value * advantages).sum(), rtol=1e-5, atol=1e-5)
    half = torch.tensor(0.5)
    got, wanted = gradients(loss, inputs, half), gradients(value, inputs, 0.5 * advantages)
    bound = 1e-5 if dtype == torch.float32 else 2e-3
    for tensor, gradient in got.items():
        difference = torch.linalg.vector_norm((gradient - wanted[tensor]).double())
        assert difference <= bound * torch.linalg.vector_norm(wanted[tensor].double()), tensor


def test_weights_alone_may_be_learned(backend: str) -> None:
    inputs = BY_NAME["weights_gqa_7"].inputs(torch.float32)
    weights = inputs.options["head_weights"].requires_grad_()
    snapshot = AttentionSnapshot(inputs.q * 1.5, inputs.k)
    call = (inputs.q, inputs.k, snapshot, torch.ones(1))
    loss = ral_loss(*call, head_weights=weights, backend=backend)
    (got,) = torch.autograd.grad(loss, weights)
    value = attention_divergence(*call[:3], head_weights=weights, backend=backend)
    (wanted,) = torch.autograd.grad(value.mean(), weights)
    assert wanted.any() and torch.allclose(got, wanted, rtol=1e-4, atol=1e-7)
    assert abs(float(got @ weights.detach())) < 1e-6  # only ratios matter


@pytest.mark.parametrize("form", ["shared", "sparse"])
def test_against_a_target(form: str, backend: str) -> None:
    inputs = weighted("weights_samples")
    target = target_of(form, inputs)
    got = attention_divergence(
        inputs.q, inputs.k, target, "reverse_kl", backend=backend, **inputs.options
    )
    rows = rows_of(target, inputs, torch.float32)
    wanted = attention_divergence(
        inputs.q, inputs.k, rows, "reverse_kl", backend="reference", **inputs.options
    )
    torch.testing.assert_close(got, wanted)
    dvalue = random_like(got, 1).masked_fill(got.isinf(), 0.0)
    expected = gradients(wanted, inputs, dvalue)
    for name, gradient in gradients(got, inputs, dvalue).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


# -- exactly zero ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [*zip(TOKEN_NAMES, cycle(KINDS), strict=False)])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_unchanged_policy_is_exactly_zero(
    name: str, kind: str, dtype: torch.dtype, backend: str
) -> None:
    """Learned weights, which the snapshot takes from the call or holds itself, and fixed ones."""
    check_unchanged(BY_NAME[name], kind, dtype, backend)  # the snapshot holds the same
    inputs = weighted(name, dtype)
    plain = PolicyInputs(inputs.q, inputs.k, without(inputs, "head_weights"))
    fixed = inputs.options["head_weights"].detach()
    for given, options in ((inputs, inputs.options), (plain, {"head_weights": fixed})):
        snapshot = snapshot_of(plain)
        options = {**plain.options, **options}
        value = attention_divergence(inputs.q, inputs.k, snapshot, backend=backend, **options)
        assert_exactly_zero(value, given)
        for _ in range(2):  # the second comparison reads the snapshot's normalisers
            advantages = random_like(value, 2)
            loss = ral_loss(inputs.q, inputs.k, snapshot, advantages, backend=backend, **options)
            assert_exactly_zero(loss, given)


@pytest.mark.parametrize("case", WEIGHTED_SPAN_CASES, ids=lambda case: case.name)
def test_unchanged_policy_over_spans_is_exactly_zero(case: PolicyCase, backend: str) -> None:
    inputs = case.inputs(torch.float32).requires_grad_()
    plain = PolicyInputs(inputs.q, inputs.k, without(inputs, "head_weights"))
    snapshot = snapshot_of(plain, span_bias=inputs.options.get("span_bias"))
    value = attention_divergence(inputs.q, inputs.k, snapshot, backend=backend, **inputs.options)
    assert_exactly_zero(value, inputs)


def test_kept_normalisers_are_those_of_the_weights(backend: str) -> None:
    """A soft cap, because the cpu backend reads kept normalisers where it keeps no weights."""
    inputs = weighted("weights_together")
    other = snapshot_inputs(BY_NAME["weights_together"], inputs, other_model=False)
    del other.options["head_weights"]
    snapshot, rest = snapshot_of(other), without(inputs, "head_weights")
    drawn = draw_weights("heads", 1, 6, seed=5)
    for weights in (drawn, drawn, 2 * drawn.flip(0), None):
        kept, fresh = (
            ral_loss(
                inputs.q, inputs.k, reference, torch.ones(3), head_weights=weights,
                backend=backend, **rest,
            )
            for reference in (snapshot, snapshot.to("cpu"))
        )  # fmt: skip
        assert torch.equal(kept, fresh) and kept > 0


# -- what weights mean -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gqa_7", "padding_left", "softcap"])
def test_equal_weights_change_no_bit(name: str, backend: str) -> None:
    inputs = BY_NAME[name].inputs(torch.float32).requires_grad_()
    shape = inputs.q.shape[:2]
    snapshot = snapshot_of(snapshot_inputs(BY_NAME[name], inputs, other_model=False))

    def run(**weights: Tensor) -> list[Tensor]:
        options = {**inputs.options, **weights, "backend": backend}
        p = attention_policy(inputs.q, inputs.k, **options)
        value = attention_divergence(inputs.q, inputs.k, snapshot, **options)
        loss = ral_loss(inputs.q, inputs.k, snapshot, random_like(value, 2), **options)
        found = [p, value, loss]
        for x in (p, value, loss):
            found += torch.autograd.grad(x, (inputs.q, inputs.k), random_like(x, 1))
        return found

    plain = run()
    for weights in (torch.full(shape, 0.3), torch.full(shape[1:], 1e-42), torch.ones(shape).half()):
        for got, wanted in zip(run(head_weights=weights), plain, strict=True):
            assert torch.equal(got, wanted)


def test_only_ratios_matter(backend: str) -> None:
    inputs = BY_NAME["weights_gqa_7"].inputs(torch.float32)
    weights = inputs.options["head_weights"]

    def run(x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        p = attention_policy(inputs.q, inputs.k, head_weights=x, backend=backend)
        (dx,) = torch.autograd.grad(p, x, random_like(p, 1))
        return [p, dx * float(x.detach().max())]

    wanted = run(weights)
    for factor in (2.0**-100, 2.0**100, 1e38):  # the sum of the last ones is infinite
        p, dx = run(weights * factor)
        torch.testing.assert_close(p, wanted[0])
        if factor < 1e38:  # else dx is subnormal
            torch.testing.assert_close(dx, wanted[1])


def test_a_single_head(backend: str) -> None:
    """The policy of that head alone; heads of weight 0 get gradients of exactly 0."""
    inputs = weighted("weights_one")
    weights = inputs.options["head_weights"].detach()
    p = attention_policy(inputs.q, inputs.k, head_weights=weights, backend=backend)
    alone = attention_policy(inputs.q[:, 7:], inputs.k, backend=backend)
    torch.testing.assert_close(p, alone)
    dq, dk = torch.autograd.grad(p, (inputs.q, inputs.k), random_like(p, 1))
    wanted = torch.autograd.grad(alone, (inputs.q, inputs.k), random_like(p, 1))
    assert not dq[:, :7].any()
    torch.testing.assert_close(dq, wanted[0])
    torch.testing.assert_close(dk, wanted[1])


def test_a_head_of_weight_0_has_a_gradient(backend: str) -> None:
    """The slope towards weights > 0: without one, such a head would never come back."""
    inputs = weighted("weights_one")
    weights = inputs.options["head_weights"]
    p = attention_policy(inputs.q, inputs.k, head_weights=weights, backend=backend)
    fixed = attention_policy(inputs.q, inputs.k, head_weights=weights.detach(), backend=backend)
    torch.testing.assert_close(p, fixed, rtol=1e-6, atol=1e-9)
    dp = random_like(p, 1)
    (slope,) = torch.autograd.grad(p, weights, dp)
    for head in range(7):
        step = torch.zeros(8)
        step[head] = 1e-3 * weights[7].item()
        with torch.no_grad():
            ahead = attention_policy(
                inputs.q.double(), inputs.k.double(), head_weights=weights.double() + step
            )
            here = attention_policy(
                inputs.q.double(), inputs.k.double(), head_weights=weights.double()
            )
        wanted = float(((ahead - here) * dp).sum() / step[head])
        assert wanted != 0 and abs(float(slope[head]) - wanted) < 2e-2 * abs(wanted) + 1e-3


# -- repeatability, torch.library, torch.compile ---------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("name", ["weights_zeros", "weights_samples"])
def test_repeats_bit_for_bit(name: str, backend: str, threads: int) -> None:
    def run() -> list[Tensor]:
        inputs = weighted(name)
        snapshot = snapshot_of(snapshot_inputs(BY_NAME[name], inputs, other_model=True))
        options = {"backend": backend, **inputs.options}
        value = attention_divergence(inputs.q, inputs.k, snapshot, **options)
        loss = ral_loss(inputs.q, inputs.k, snapshot, random_like(value, 2), **options)
        return [x for y in (value, loss) for x in gradients(y, inputs, random_like(y, 1)).values()]

    for once, again in zip(run(), run(), strict=True):
        assert torch.equal(once, again)


@pytest.mark.slow(stands_in="test_policy")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_opcheck(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = BY_NAME["weights_span_bias"].inputs(torch.float32)
    args = op_inputs_of(inputs, monkeypatch, backend)
    torch.library.opcheck(torch.ops.ral.policy_fwd.default, args)
    with torch.no_grad():
        outputs = torch.ops.ral.policy_fwd(*args)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in args]
    more = (*outputs, random_like(outputs[0], 1), True, True)
    torch.library.opcheck(torch.ops.ral.policy_bwd.default, (*detached, *more))


@pytest.mark.slow(stands_in="test_divergence")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_opcheck_of_the_loss(backend: str) -> None:
    inputs = weighted("weights_samples")
    weights = inputs.options["head_weights"]
    weights = (weights / weights.mean(-1, keepdim=True)).detach().requires_grad_()
    mask, snapshot = inputs.options["key_padding_mask"], AttentionSnapshot(inputs.q, inputs.k)
    args = (
        *(inputs.q, inputs.k, weights, None, mask, None, None, None, snapshot.q, snapshot.k),
        *(None, None, weights.detach(), None, None, None, 0, 0.2, -1, 0, 0.0, True, 0, 0),
        *(0.3, -1, 0, 0.0, "kl", backend),
    )
    torch.library.opcheck(torch.ops.ral.policy_divergence_fwd.default, args)
    with torch.no_grad():
        value, *kept = torch.ops.ral.policy_divergence_fwd(*args)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in args]
    more = (*detached, *kept, random_like(value, 1), True)
    torch.library.opcheck(torch.ops.ral.policy_divergence_bwd.default, more)
    more = (*args, random_like(value, 1), None, None, True)
    torch.library.opcheck(torch.ops.ral.policy_divergence_loss.default, more)


@pytest.mark.slow(stands_in="test_divergence")
def test_compile_without_graph_break(backend: str) -> None:
    """Values that cannot be read are not checked: weights that are not valid give NaN."""
    inputs = weighted("weights_gqa_7")
    snapshot = AttentionSnapshot(inputs.q * 1.5, inputs.k)
    weights = inputs.options["head_weights"]

    def objective(q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        loss = ral_loss(q, k, snapshot, torch.ones(1), head_weights=x, backend=backend)
        return loss + attention_policy(q, k, head_weights=x, backend=backend).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    tensors = (inputs.q, inputs.k, weights)
    eager, traced = objective(*tensors), compiled(*tensors)
    torch.testing.assert_close(traced, eager)
    for got, wanted in zip(
        torch.autograd.grad(traced, tensors), torch.autograd.grad(eager, tensors), strict=True
    ):
        torch.testing.assert_close(got, wanted)
    assert compiled(inputs.q, inputs.k, -weights).isnan()


def test_a_gradient_is_not_differentiable_again(backend: str) -> None:
    inputs = weighted("weights_wide")
    p = attention_policy(inputs.q, inputs.k, backend=backend, **inputs.options)
    weights = inputs.options["head_weights"]
    (dweights,) = torch.autograd.grad(p.square().sum(), weights, create_graph=True)
    with pytest.raises(RuntimeError, match=r"ral::policy_bwd has no derivative"):
        dweights.sum().backward()


# -- snapshots -------------------------------------------------------------------------------------


def test_snapshots_keep_weights(tmp_path: Path) -> None:
    weights = draw_weights("samples", 6, 4)
    snapshot = shared(head_weights=weights)
    kept = snapshot.head_weights
    assert kept is not None
    torch.testing.assert_close(kept, weights / weights.mean(-1, keepdim=True))
    one_for_all = shared(head_weights=weights[0]).head_weights
    assert one_for_all is not None and torch.equal(one_for_all, kept[:1].expand(6, -1))

    order = torch.tensor([3, 0, 5, 1, 2, 4])
    joined = AttentionSnapshot.cat([snapshot[order[:1]], snapshot[order[1:4]], snapshot[order[4:]]])
    split = {name: x[order] for name, x in snapshot.tensors().items()}
    snapshot.save(tmp_path / "x.safetensors")
    for other, wanted in (
        (joined, kept[order]),
        (AttentionSnapshot.from_tensors(split, like=snapshot), kept[order]),
        (AttentionSnapshot.load(tmp_path / "x.safetensors"), kept),
        (pickle.loads(pickle.dumps(snapshot)), kept),
        (copy.deepcopy(snapshot), kept),
        (snapshot.to(torch.bfloat16), kept),
    ):
        assert other.head_weights is not None and torch.equal(other.head_weights, wanted)
    assert_same(joined, snapshot[order])
    with pytest.raises(ValueError, match="must agree in having head_weights"):
        AttentionSnapshot.cat([snapshot, shared()])


def test_packed_snapshots_keep_weights() -> None:
    weights = draw_weights("samples", 4, 4)
    snapshot = packed(head_weights=weights)
    kept = snapshot.head_weights
    assert kept is not None and kept.shape == (4, 4)
    order = torch.tensor([2, 0])
    picked = AttentionSnapshot.cat([snapshot[order], snapshot[3:]]).head_weights
    assert picked is not None and torch.equal(picked, kept[[2, 0, 3]])


@pytest.mark.parametrize(
    ("change", "exception", "message"),
    [
        (Tensor.half, TypeError, "must be float32 or float64; got float16"),
        (lambda x: x[:2], ValueError, r"must be \[B, H\] = \(6, 4\); got \(2, 4\)"),
        (lambda x: x[:, :2], ValueError, r"must be \[B, H\] = \(6, 4\); got \(6, 2\)"),
        (lambda x: -x, ValueError, "must be finite and >= 0, and some of them > 0; got"),
    ],
)
def test_snapshots_check_weights(change: Any, exception: type[Exception], message: str) -> None:
    snapshot = shared(head_weights=draw_weights("samples", 6, 4))
    snapshot.head_weights = change(snapshot.head_weights)
    with pytest.raises(exception, match=f"^AttentionSnapshot: head_weights {message}"):
        snapshot.check()


def test_weights_are_floored_for_their_gradient() -> None:
    x = torch.tensor([0.0, 1.0, 3.0], requires_grad=True)
    weights = qkv.prepare_head_weights("op", x, torch.zeros(2, 3, 1, 1), 2)
    assert weights[0].tolist() == [2.0**-60, 0.75, 2.25] and torch.equal(weights[0], weights[1])
    (dx,) = torch.autograd.grad(weights[:, 0].sum(), x)
    torch.testing.assert_close(dx, torch.tensor([1.5, 0.0, 0.0]))
    with torch.no_grad():
        assert qkv.prepare_head_weights("op", x, torch.zeros(1, 3, 1, 1), 1)[0, 0] == 0
