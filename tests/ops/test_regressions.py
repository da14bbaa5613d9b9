"""Defects that a review found, each with the call that showed it."""

from __future__ import annotations

import sys

import pytest
import torch

import ral_kernels as rk


@pytest.mark.slow_in_interpreter(
    stands_in="tests/ops/test_policy_divergence.py::test_against_snapshot"
)
def test_unseen_chunk_with_softcap(backend: str) -> None:
    """A chunk of keys that no query of a block sees: its slopes were never written, and 0 * NaN."""
    torch.manual_seed(0)
    for _ in range(20):  # the scratch of other calls must not shine through
        q = torch.randn(1, 1, 2, 8, requires_grad=True)
        k = torch.randn(1, 1, 60, 8, requires_grad=True)
        nan = torch.full((1, 1, 60, 8), float("nan"))
        dirty = rk.ral_loss(
            q, k, rk.AttentionSnapshot(q, nan), torch.ones(1), softcap=5.0, backend=backend
        )
        assert dirty.isnan()
        snapshot = rk.AttentionSnapshot(torch.randn(1, 1, 2, 8), k, window=2, softcap=5.0)
        loss = rk.ral_loss(q, k, snapshot, torch.ones(1), window=2, softcap=5.0, backend=backend)
        for grad in torch.autograd.grad(loss, (q, k)):
            assert grad.isfinite().all()


@pytest.mark.parametrize("gap", [60.0, 80.0, 87.0, 89.0, 200.0])
@pytest.mark.parametrize("weight", [1.0, 1e4])
def test_own_key_takes_all_weight(gap: float, weight: float, backend: str) -> None:
    """1 / (Z H) and its product with a weight overflowed where the own key has all the weight."""
    q = torch.ones(1, 1, 2, 1, requires_grad=True)
    k = torch.tensor([[[[0.0], [gap]]]], requires_grad=True)
    p = rk.attention_policy(q, k, scale=1.0, backend=backend)
    assert p.isfinite().all() and p.max() <= 1 + 1e-5  # |score - lse| * eps, as everywhere
    snapshot = rk.AttentionSnapshot(q, k, scale=1.0)
    value = rk.attention_divergence(q, k, snapshot, scale=1.0, backend=backend)
    loss = rk.ral_loss(q, k, snapshot, torch.full((1,), weight), scale=1.0, backend=backend)
    assert not value.any() and loss == 0
    for result in ((value * weight).sum(), loss):
        for grad in torch.autograd.grad(result, (q, k)):
            assert not grad.any()


@pytest.mark.parametrize("index", [torch.tensor([0, 0, 70000, 70000]), torch.tensor([0, 0, -1, 1])])
def test_prefix_index_out_of_range(index: torch.Tensor) -> None:
    """It crashed the process: kernels follow the index without looking."""
    k = torch.randn(2, 1, 9, 8).repeat_interleave(2, 0)
    snapshot = rk.AttentionSnapshot(torch.randn(4, 2, 3, 8), k, group_size=2, shared_prefix=6)
    tensors = {**snapshot.tensors(), "prefix_index": index}
    with pytest.raises(ValueError, match="prefix_index must lie in"):
        rk.AttentionSnapshot.from_tensors(tensors, like=snapshot)


def test_prefix_index_of_another_integer_type(backend: str) -> None:
    k = torch.randn(2, 1, 9, 8).repeat_interleave(2, 0)
    q = torch.randn(4, 2, 3, 8)
    snapshot = rk.AttentionSnapshot(q, k, group_size=2, shared_prefix=6)
    tensors = snapshot.tensors()
    tensors["prefix_index"] = tensors["prefix_index"].int()
    again = rk.AttentionSnapshot.from_tensors(tensors, like=snapshot)
    assert not rk.attention_divergence(q, k, again, backend=backend).any()


def test_second_derivatives_are_refused(backend: str) -> None:
    """They were silently incomplete."""
    q = torch.randn(1, 2, 3, 8, requires_grad=True)
    k = torch.randn(1, 2, 5, 8, requires_grad=True)
    snapshot = rk.AttentionSnapshot(torch.randn_like(q), k)
    p, r = (torch.rand(3, 5).softmax(-1).requires_grad_() for _ in range(2))
    for value, leaf in (
        (rk.ral_loss(q, k, snapshot, torch.ones(1), backend=backend), q),
        (rk.divergence(p, r, backend=backend).sum(), p),
    ):
        (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="has no derivative"):
            grad.square().sum().backward()


def test_window_bounds_beyond_every_sequence(backend: str) -> None:
    """Positions plus sys.maxsize overflowed: rows saw nothing."""
    q, k = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8)
    wide = rk.attention(q, k, k, window=(None, sys.maxsize), backend=backend)
    assert torch.equal(wide.out, rk.attention(q, k, k, backend=backend).out)


def test_reverse_kl_of_a_subnormal_policy(backend: str) -> None:
    """(p - r) / p was -inf there, and the gradient of the whole call NaN."""
    q = torch.ones(1, 1, 3, 1, requires_grad=True)
    k = torch.tensor([[[[0.0], [90.0], [0.0]]]], requires_grad=True)
    snapshot = rk.AttentionSnapshot(torch.zeros(1, 1, 3, 1), k, scale=1.0)
    value = rk.attention_divergence(q, k, snapshot, "reverse_kl", scale=1.0, backend=backend)
    for grad in torch.autograd.grad(value[value.isfinite()].sum(), (q, k)):
        assert grad.isfinite().all()


def test_span_bias_of_finfo_min_on_all_keys(backend: str) -> None:
    """A bias of finfo.min is a score like others, as in a mask: a row of them is uniform."""
    q, k = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 6, 8)
    spans = rk.Spans.from_lengths([6])
    bias = torch.full((1, 1, 1, 1), torch.finfo(torch.float32).min)
    out = rk.attention(q, k, k, spans, span_bias=bias, backend=backend).out
    torch.testing.assert_close(out, k.mean(2, keepdim=True).expand_as(out))
