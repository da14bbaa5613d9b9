"""`policy_loss`: the RAL objective of any categorical choice, by hand in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ral_kernels as rk
from ral_kernels.ops.policy.loss import REDUCTIONS
from tests.ops.accuracy import FLOAT32_EPS

B, T, K = 3, 5, 7
NAN, INF = float("nan"), float("inf")
# The third sequence has no row that counts: it is not in the mean over sequences.
MASK = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 1, 0, 1], [0, 0, 0, 0, 0]]).bool()


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_hand(policy: Tensor, reference: Tensor, advantages: Tensor, reduction: str) -> Tensor:
    """The formulas as they stand, of logits, row by row."""
    per_sequence = []
    for b in range(B):
        values = []
        for t in range(T):
            if MASK[b, t]:
                p, r = policy[b, t].exp(), reference[b, t].exp()
                p, r = p / p.sum(), r / r.sum()
                m = (p + r) / 2
                jsd = ((p * (p / m).log()).sum() + (r * (r / m).log()).sum()) / 2
                values.append(advantages[b, t] * jsd)
        if values:
            per_sequence.append(torch.stack(values))
    if reduction == "sequence_mean":
        return torch.stack([values.mean() for values in per_sequence]).mean()
    total = torch.cat(per_sequence)
    return total.mean() if reduction == "token_mean" else total.sum()


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_policy_loss(dtype: torch.dtype, reduction: Any, logits: bool) -> None:
    policy, reference, advantages = drawn(B, T, K, dtype=dtype), drawn(B, T, K, seed=1), drawn(B, T)
    given = [policy, reference] if logits else [policy.softmax(-1), reference.softmax(-1)]
    mine, theirs = given[0].requires_grad_(), given[1]
    loss = rk.policy_loss(mine, theirs, advantages, MASK, logits=logits, reduction=reduction)
    (gradient,) = torch.autograd.grad(loss, mine)
    assert loss.shape == () and gradient.dtype == dtype
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    exact = mine.detach().double().requires_grad_()
    if logits:
        wanted = by_hand(exact, reference.double(), advantages.double(), reduction)
        (wanted_gradient,) = torch.autograd.grad(wanted, exact)
    else:
        # By hand from logits, whose softmax is the row; bfloat16 rows do not sum to 1, though.
        p, r = exact, theirs.double()
        m = (p + r) / 2
        jsd = ((p * (p / m).log()).sum(-1) + (r * (r / m).log()).sum(-1)) / 2
        weights = torch.where(MASK, advantages.double(), 0.0)
        if reduction == "token_mean":
            weights = weights / MASK.sum()
        elif reduction == "sequence_mean":
            weights = weights / MASK.sum(-1, keepdim=True).clamp(min=1) / 2
        wanted = (weights * jsd).sum()
        (wanted_gradient,) = torch.autograd.grad(wanted, exact)
    near = {"rtol": 20 * FLOAT32_EPS, "atol": 1e-7}
    torch.testing.assert_close(loss.double(), wanted, **near)
    if dtype == torch.bfloat16:
        near = {"rtol": 2**-8, "atol": 1e-6}  # the gradient's own rounding
    torch.testing.assert_close(gradient.double(), wanted_gradient, **near)
    assert (gradient[~MASK] == 0).all() and (gradient[MASK] != 0).any()


@pytest.mark.parametrize("kind", ["jsd", "kl", "reverse_kl", "cross_entropy"])
def test_kinds(kind: Any) -> None:
    policy, reference = drawn(B, T, K), drawn(B, T, K, seed=1)
    policy.requires_grad_()
    loss = rk.policy_loss(policy, reference, torch.ones(B), logits=True, kind=kind)
    (gradient,) = torch.autograd.grad(loss, policy)
    p, r = (x.double().softmax(-1) for x in (policy, reference))
    m = (p + r) / 2
    values = {
        "jsd": ((p * (p / m).log()).sum(-1) + (r * (r / m).log()).sum(-1)) / 2,
        "kl": (p * (p / r).log()).sum(-1),
        "reverse_kl": (r * (r / p).log()).sum(-1),
        "cross_entropy": -(r * p.log()).sum(-1),
    }
    assert loss.item() == pytest.approx(values[kind].mean().item(), rel=1e-5)
    (wanted,) = torch.autograd.grad(values[kind].mean(), policy)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["jsd", "kl", "reverse_kl", "cross_entropy"])
@pytest.mark.parametrize("logits", [True, False])
def test_nothing_at_the_reference(logits: bool, kind: Any) -> None:
    """Exactly, whatever the dtype that the rows are kept in; cross-entropy is then the entropy."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = drawn(B, T, K, dtype=dtype)
        rows = (rows if logits else rows.softmax(-1)).requires_grad_()
        loss = rk.policy_loss(rows, rows, drawn(B, seed=2), logits=logits, kind=kind)
        assert (loss.item() == 0.0) == (kind != "cross_entropy")
        (gradient,) = torch.autograd.grad(loss, rows)
        assert (gradient == 0).all()


def test_the_reference_gets_no_gradient() -> None:
    """Also where it is computed from the same weights."""
    policy, reference = drawn(B, T, K).requires_grad_(), drawn(B, T, K, seed=1).requires_grad_()
    rk.policy_loss(policy, reference, drawn(B), logits=True).backward()
    assert policy.grad is not None and reference.grad is None


def test_small_differences_do_not_cancel() -> None:
    """Float32 against float64 where the divergence is 1e-8: a formula with logarithms drowns."""
    reference = drawn(B, T, K).double()
    policy = reference + 1e-4 * drawn(B, T, K, seed=1).double()
    exact = rk.policy_loss(policy, reference, torch.ones(B), logits=True)
    rows = [x.softmax(-1).float() for x in (policy, reference)]
    p, r = rows
    wanted = rk.divergence(p.double(), r.double()).mean()
    loss = rk.policy_loss(p, r, torch.ones(B), logits=False)
    assert 1e-10 < exact < 1e-8
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_shapes_of_rows_and_advantages() -> None:
    """More dimensions than time, one row a sequence, and none at all."""
    policy, reference, advantages = drawn(2, 3, 4, K), drawn(2, 3, 4, K, seed=1), drawn(2)
    loss = rk.policy_loss(policy, reference, advantages, logits=True, reduction="sum")
    of_rows = advantages[:, None, None].expand(2, 3, 4).reshape(24, 1)
    p, r = policy.reshape(24, 1, K), reference.reshape(24, 1, K)
    one_each = rk.policy_loss(p, r, of_rows, logits=True, reduction="sum")
    torch.testing.assert_close(loss, one_each, rtol=1e-6, atol=1e-8)
    p, r = p[:, 0], r[:, 0]
    without_time = rk.policy_loss(p, r, of_rows[:, 0], logits=True, reduction="sum")
    torch.testing.assert_close(loss, without_time, rtol=1e-6, atol=1e-8)
    empty = torch.empty(0, 3, K)
    assert rk.policy_loss(empty, empty, torch.empty(0), logits=True).item() == 0.0


def test_masked_rows_may_hold_anything() -> None:
    policy, reference, advantages = drawn(B, T, K), drawn(B, T, K, seed=1), drawn(B, seed=2)
    clean = rk.policy_loss(policy, reference, advantages, MASK, logits=True)
    for broken in (NAN, -INF):
        rows = policy.masked_fill(~MASK[..., None], broken).requires_grad_()
        loss = rk.policy_loss(rows, reference, advantages, MASK, logits=True)
        assert loss.item() == clean.item()
        (gradient,) = torch.autograd.grad(loss, rows)
        assert gradient.isfinite().all() and (gradient[~MASK] == 0).all()
    nothing = torch.zeros_like(MASK)
    assert rk.policy_loss(policy, reference, advantages, nothing, logits=True).item() == 0.0


def test_options_that_are_not_there() -> None:
    """A logit of -inf leaves an option out: as if the row were shorter."""
    policy, reference = drawn(B, T, K).requires_grad_(), drawn(B, T, K, seed=1)
    short = rk.policy_loss(policy[..., :4], reference[..., :4], torch.ones(B), logits=True)
    absent = torch.arange(K) >= 4
    rows = policy.masked_fill(absent, -INF)
    loss = rk.policy_loss(rows, reference.masked_fill(absent, -INF), torch.ones(B), logits=True)
    torch.testing.assert_close(loss, short, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss, policy)
    (wanted,) = torch.autograd.grad(short, policy)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-9)


def test_gradcheck() -> None:
    policy = drawn(2, 3, 4, dtype=torch.float64).requires_grad_()
    reference, advantages = drawn(2, 3, 4, seed=1).double(), drawn(2, 3, seed=2).double()

    def loss(rows: Tensor) -> Tensor:
        return rk.policy_loss(rows, reference, advantages, logits=True)

    assert torch.autograd.gradcheck(loss, (policy,))


@pytest.mark.slow(stands_in="test_policy_loss")
def test_compile_without_a_graph_break() -> None:
    policy, reference, advantages = drawn(B, T, K), drawn(B, T, K, seed=1), drawn(B)

    def loss(rows: Tensor) -> Tensor:
        return rk.policy_loss(rows, reference, advantages, MASK, logits=True)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        rows = policy.clone().requires_grad_()
        value = function(rows)
        results.append((value.detach(), *torch.autograd.grad(value, rows)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-9)


BAD: tuple[tuple[str, dict[str, Any], type[Exception], str], ...] = (
    ("policy_type", {"policy": [0.5]}, TypeError, r"policy must be a \[B, ..., K\] tensor; got li"),
    ("policy_dtype", {"policy": torch.ones(B, T, K).long()}, TypeError, "policy must be floating"),
    ("policy_shape", {"policy": torch.ones(K)}, ValueError, r"must be \[B, ..., K\]; got \(7,\)"),
    ("reference", {"reference": drawn(B, T, K + 1)}, ValueError, "reference must have policy's sh"),
    ("advantages", {"advantages": drawn(T)}, ValueError, r"\[B\] = \(3,\) or .*; got \(5,\)"),
    ("integers", {"advantages": torch.ones(B).int()}, TypeError, "advantages must be floating"),
    ("gradient", {"advantages": drawn(B).requires_grad_()}, NotImplementedError, "detach"),
    ("mask_dtype", {"mask": torch.ones(B, T)}, TypeError, "mask must be bool .*; got float32"),
    ("mask_shape", {"mask": MASK[:2]}, ValueError, r"in the shape of the rows, \(3, 5\); got"),
    ("logits", {"logits": 1}, TypeError, "logits must be True or False; got 1"),
    ("kind", {"kind": "tv"}, ValueError, "kind must be one of jsd, kl, .*; got 'tv'"),
    ("reduction", {"reduction": "mean"}, ValueError, "reduction must be one of .*; got 'mean'"),
    ("backend", {"backend": "tpu"}, ValueError, "backend must be None or one of"),
    (
        "device",
        {"reference": torch.ones(B, T, K, device="meta")},
        ValueError,
        "on the device of po",
    ),
)


@pytest.mark.parametrize("case", BAD, ids=lambda case: case[0])
def test_bad_input(case: tuple[str, dict[str, Any], type[Exception], str]) -> None:
    _, changes, error, message = case
    given: dict[str, Any] = {
        "policy": drawn(B, T, K), "reference": drawn(B, T, K), "advantages": drawn(B),
        "logits": True, **changes,
    }  # fmt: skip
    with pytest.raises(error, match=f"^policy_loss: .*{message}"):
        rk.policy_loss(**given)


def test_the_form_must_be_said() -> None:
    with pytest.raises(TypeError, match="logits"):
        rk.policy_loss(drawn(B, T, K), drawn(B, T, K), drawn(B))  # type: ignore[call-arg]
