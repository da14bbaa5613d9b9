"""Some heads of a captured layer: their policies, snapshots and gradients, from eager's maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ral_kernels as rk
from ral_kernels.integrations.transformers import register
from tests.integrations.eager_maps import (
    assert_same_gradients,
    eager_maps,
    eager_policy,
    eager_ral_loss,
    gradients,
    perturbed,
)
from tests.integrations.models import build, inputs

HEADS = 4  # of queries, over 2 of keys
BATCH = inputs("qwen2")


@pytest.fixture(autouse=True, scope="module")
def implementations() -> None:
    register()


@pytest.fixture
def model() -> Any:
    return build("qwen2", "eager")


def captured_of(model: Any) -> Any:
    with rk.capture(model) as captured:
        model(**BATCH, use_cache=False)
    return captured


@pytest.mark.parametrize(
    "heads, num_kv_heads",
    [([0], 1), ([3, 2], 1), ([0, 2], 2), ([0, 1, 3], 3), ([0, 1, 2, 3], 2)],
)
def test_heads_from_eager_maps(model: Any, heads: list[int], num_kv_heads: int) -> None:
    layer = captured_of(model).layer()
    assert layer.q.shape[1] == HEADS and layer.k.shape[1] == 2
    chosen = layer.of_heads(heads)
    # k is not repeated where the chosen heads still share it in groups of one size
    assert (chosen.q.shape[1], chosen.k.shape[1]) == (len(heads), num_kv_heads)
    maps = eager_maps(model, BATCH)[-1][:, heads]
    torch.testing.assert_close(chosen.policy(), eager_policy(maps), rtol=1e-4, atol=1e-6)
    assert layer.q.shape[1] == HEADS  # the whole layer is as it was


def test_gradients_and_snapshots_of_heads(model: Any) -> None:
    heads = [1, 2, 3]
    mask = torch.ones_like(BATCH["input_ids"], dtype=torch.bool)
    mask[:, 0] = False  # a row that sees no other key
    advantages = torch.linspace(-1, 1, len(mask))
    before = captured_of(model).layer().of_heads(heads)
    snapshot = before.snapshot()
    with torch.no_grad():
        r = eager_policy(eager_maps(model, BATCH)[-1][:, heads])
    assert before.ral_loss(snapshot, advantages, mask) == 0.0
    perturbed(model, 0.05)
    after = captured_of(model).layer().of_heads(heads)
    loss = after.ral_loss(snapshot, advantages, mask)
    got = gradients(model, loss)
    p = eager_policy(eager_maps(model, BATCH)[-1][:, heads])
    wanted_loss = eager_ral_loss(p, r, advantages, mask)
    wanted = gradients(model, wanted_loss)
    assert wanted_loss.abs() > 1e-6
    torch.testing.assert_close(loss.detach(), wanted_loss.detach(), rtol=1e-4, atol=1e-7)
    assert_same_gradients(got, wanted, 1e-4)


def test_weighted_heads_from_eager_maps(model: Any) -> None:
    layer, mask = captured_of(model).layer(), torch.ones_like(BATCH["input_ids"], dtype=torch.bool)
    mask[:, 0] = False  # a row that sees no other key
    weights = torch.tensor([0.5, 0.0, 2.0, 1.5])
    maps = eager_maps(model, BATCH)[-1] * weights[:, None, None]
    p = layer.policy(head_weights=weights)
    torch.testing.assert_close(p, eager_policy(maps), rtol=1e-4, atol=1e-6)
    own = layer.snapshot(head_weights=weights)
    assert own.head_weights is not None and torch.equal(own.head_weights[0], weights)
    for snapshot in (layer.snapshot(), own):
        assert layer.divergence(snapshot, head_weights=weights).eq(0).all()
        assert layer.ral_loss(snapshot, torch.ones(2), head_weights=weights) == 0.0
    assert layer.divergence(own).gt(0).any()  # from all heads alike

    of_two = torch.tensor([0.0, 1.0, 0.0, 3.0])
    torch.testing.assert_close(
        layer.of_heads([1, 3]).policy(head_weights=of_two[[1, 3]]),
        layer.policy(head_weights=of_two),
    )
    loss = layer.ral_loss(own, torch.ones(2), mask, head_weights=of_two)
    q, r = (
        eager_policy(eager_maps(model, BATCH)[-1] * x[:, None, None]) for x in (of_two, weights)
    )
    wanted = eager_ral_loss(q, r, torch.ones(2), mask)
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-7)


def test_heads_of_heads_and_of_a_bias_per_head(model: Any) -> None:
    spans = rk.Spans(torch.zeros_like(BATCH["input_ids"], dtype=torch.int32), 1)
    spans.ids[:, 2:] = -1
    bias = torch.randn(len(spans.ids), HEADS, 1, 1, generator=torch.Generator().manual_seed(0))
    with rk.capture(model) as captured, rk.steer(model, bias, spans=spans, layers=-1):
        model(**BATCH, use_cache=False)
    layer = captured.layer()
    every = torch.cat([layer.of_heads([h]).marginals(spans=spans) for h in range(HEADS)], 1)
    torch.testing.assert_close(every, layer.marginals(spans=spans))
    twice = layer.of_heads([1, 3]).of_heads([1])
    assert torch.equal(twice.marginals(spans=spans), layer.of_heads([3]).marginals(spans=spans))


def test_wrong_heads(model: Any) -> None:
    layer = captured_of(model).layer()
    for heads in ([], [0, 0], [4], [-1]):
        with pytest.raises(ValueError, match=r"heads must be different numbers in \[0, 4\)"):
            layer.of_heads(heads)
    wrong: Any
    for wrong in (0, [0.5], "0", None):
        with pytest.raises(TypeError, match="heads must be a sequence of ints; got"):
            layer.of_heads(wrong)
    with pytest.raises(NotImplementedError, match=r"must have all heads; got \[0\]"):
        layer.of_heads([0]).sharded()
