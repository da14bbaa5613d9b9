"""Noise on attention in rollouts: its draw, its replay, and the loss that learns from it."""

from __future__ import annotations

import math

import pytest
import torch

import ral_kernels as rk
from ral.exploration import draw_bias, steered
from tests.integrations.eager_maps import assert_same_gradients, gradients

from . import by_hand, tiny

EXPLORE = {"attn_explore_sigma": 2.0, "attn_granularity": "image", "attn_coef": 0.0}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.getbasetemp() / "checkpoints")


def _explorer(path, tmp_path, **config):
    return tiny.trainer(
        path, tmp_path, train_dataset=tiny.dataset(images=3), **{**EXPLORE, **config}
    )


def test_bias_is_centred_over_the_spans_that_show_something() -> None:
    ids = torch.tensor([[0, 0, 1, 2, 3, 3], [0, 1, 3, 3, 3, 3]], dtype=torch.int32)
    visual = ids < 3  # span 3 is the text; the second sample has no span 2
    generator = torch.Generator().manual_seed(0)
    bias = draw_bias(1.5, 2, rk.Spans(ids, 4), visual, generator)
    assert bias.shape == (2, 2, 4)
    assert not bias[..., 3].any() and not bias[1, :, 2].any()
    assert bias[0, :, :3].ne(0).all() and bias[1, :, :2].ne(0).all()
    torch.testing.assert_close(bias.sum(-1), torch.zeros(2, 2), rtol=0, atol=1e-6)
    assert not torch.equal(bias[0, 0], bias[0, 1])  # each layer its own
    many = draw_bias(1.5, 1, rk.Spans(torch.arange(50).repeat(400, 1), 50), torch.ones(400, 50) > 0)
    assert many.std().item() == pytest.approx(1.5, rel=0.02)


def test_rollouts_are_written_under_their_noise(path, tmp_path) -> None:
    """Greedy rollouts are the argmax of the model under the noise that the batch carries."""
    trainer = _explorer(path, tmp_path, top_k=1, attn_layers="all", steps_per_generation=1)
    inputs = by_hand.batch_of(trainer)
    length = inputs["completion_ids"].shape[1]
    spans = rk.Spans(inputs["span_ids"], trainer._num_spans)
    batch = by_hand.model_inputs(inputs)

    def argmax() -> torch.Tensor:
        with torch.no_grad():
            logits = trainer.model(**batch, use_cache=False).logits[:, -length - 1 : -1]
        logits[..., trainer.generation_config.suppress_tokens] = -math.inf
        return logits.argmax(-1)

    mask = inputs["completion_mask"].bool()
    with steered(trainer.model, trainer._layers, inputs["explore_bias"], spans):
        noisy = argmax()
    assert torch.equal(noisy[mask], inputs["completion_ids"][mask])
    assert not torch.equal(argmax()[mask], inputs["completion_ids"][mask])
    assert len({tuple(row) for row in inputs["explore_bias"].flatten(1).tolist()}) == 4


def test_the_update_replays_the_noise(path, tmp_path) -> None:
    """Before the first step the ratio of probabilities is 1: the noise of the rollouts is back."""
    trainer = _explorer(path, tmp_path, attn_coef=2.0, attn_explore_coef=0.0)
    inputs = by_hand.batch_of(trainer)
    assert "old_per_token_logps" in inputs
    batch = by_hand.model_inputs(inputs)
    length, spans = inputs["completion_ids"].shape[1], rk.Spans(inputs["span_ids"], 4)

    def log_probs() -> torch.Tensor:
        with torch.no_grad():
            logits = trainer.model(**batch, use_cache=False).logits[:, -length - 1 : -1]
        picked = logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])
        return picked[..., 0] * inputs["completion_mask"]

    with steered(trainer.model, trainer._layers, inputs["explore_bias"], spans):
        replayed = log_probs()
    old = inputs["old_per_token_logps"] * inputs["completion_mask"]
    torch.testing.assert_close(replayed, old, rtol=1e-4, atol=1e-4)
    assert (log_probs() - old).abs().max() > 1e-3
    loss = trainer._compute_loss(trainer.model, inputs)
    assert trainer._metrics["train"]["attn/divergence"] == pytest.approx([0.0], abs=1e-9)
    assert trainer._metrics["train"]["clip_ratio/region_mean"] == [0.0]
    assert math.isfinite(loss)


def test_exploration_loss_by_hand(path, tmp_path) -> None:
    """A · CE(p_noisy ‖ p_θ) over the images and the text, per head, in the last layer."""
    trainer = _explorer(path, tmp_path, rl_coef=0.0, attn_explore_coef=3.0, attn_rows="token")
    inputs = by_hand.batch_of(trainer)
    loss = trainer._compute_loss(trainer.model, inputs)
    got = gradients(trainer.model, loss)

    # Noise in the last layer alone leaves its q and k as they are: the maps without noise come
    # from a plain forward, those with it from multiplying by exp(bias) and renormalising.
    ids, length = inputs["span_ids"], inputs["completion_ids"].shape[1]
    one_hot = torch.stack([(ids == span).float() for span in range(trainer._num_spans)], -1)
    with by_hand.weights(trainer.model, None):
        maps = trainer.model(
            **by_hand.model_inputs(inputs), output_attentions=True, use_cache=False
        ).attentions[-1][:, :, -length:]
        factor = torch.einsum("bns,bs->bn", one_hot, inputs["explore_bias"][:, 0]).exp()
        noisy_maps = maps.detach() * factor[:, None, None]
        clean, noisy = (
            share / share.sum(-1, keepdim=True)
            for share in (torch.einsum("bhcn,bns->bhcs", m, one_hot) for m in (maps, noisy_maps))
        )
        entropies = -(noisy * clean.clamp(min=1e-30).log()).sum(-1).mean(1)
        values = entropies * inputs["advantages"][:, None]
        share = inputs["completion_mask"].sum() / (inputs["num_items_in_batch"] / 2)
        wanted_loss = 3.0 * by_hand.response_mean(values, inputs) * share
        wanted = gradients(trainer.model, wanted_loss)
    torch.testing.assert_close(loss.detach(), wanted_loss.detach(), rtol=1e-3, atol=1e-6)
    assert_same_gradients(got, wanted, 1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layers", [-1, "all"])
def test_a_run(layers, checkpointing, path, tmp_path) -> None:
    """First order: one optimizer step on each rollout batch is enough for it."""
    trainer = _explorer(
        path, tmp_path, attn_layers=layers, num_iterations=1, steps_per_generation=1,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    trainer.train()
    values = tiny.logged(trainer, "explore/loss")
    assert len(values) == 4 and all(map(math.isfinite, values)) and any(values)
    assert "explore/loss" in trainer.state.log_history[0]
    assert tiny.logged(trainer, "attn/grad_share")[0] > 1e-4
