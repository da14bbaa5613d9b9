"""What was once wrong: memory of references, noise without a replay, families, false alarms."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch import nn

from ral import RALConfig, RALTrainer, attention_statistics
from ral.exploration import check_can_explore
from ral.vision import lay_out
from ral_kernels import AttentionSnapshot

from . import by_hand, tiny


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.getbasetemp() / "checkpoints")


@pytest.fixture(scope="module")
def teacher_path(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "checkpoints"
    return str(tiny.checkpoint(folder, num_hidden_layers=3))


def _config(**settings) -> RALConfig:
    return RALConfig(**{**tiny.DEFAULTS, "output_dir": "unused", **settings})


def test_references_are_kept_once(path, tmp_path) -> None:
    """Not as a rollout batch and again as its micro-batches; their normalisers formed once."""
    trainer = tiny.trainer(path, tmp_path, attn_layers="all")
    inputs = by_hand.batch_of(trainer)
    batches = trainer._buffered_inputs
    references, device = trainer._references, torch.device("cpu")
    before = references.nbytes
    parts = [references.of("old", batch["rollout_index"], device) for batch in batches]
    assert references.nbytes == before == sum(s.nbytes for p in parts for s in p.values())
    again = references.of("old", inputs["rollout_index"], device)
    assert all(again[layer] is parts[0][layer] for layer in again)

    formed = []
    keep = AttentionSnapshot.keep_normalisers

    def spy(*arguments) -> None:
        formed.append(arguments)
        keep(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttentionSnapshot, "keep_normalisers", spy)
        for _ in range(3):
            trainer._compute_loss(trainer.model, inputs)
    assert len(formed) == len(again)


def test_references_of_any_rollouts(path, tmp_path) -> None:
    """After the split, those of other rollouts than a micro-batch's are still right."""
    trainer = tiny.trainer(path, tmp_path)
    by_hand.batch_of(trainer)
    references, device = trainer._references, torch.device("cpu")
    whole = references.of("old", torch.arange(8), device)[1]
    for batch in trainer._buffered_inputs:
        index = batch["rollout_index"]
        assert not torch.equal(index, index.sort().values)  # shuffled
        part = references.of("old", index, device)[1]
        assert torch.equal(part.q, whole.q[index]) and torch.equal(part.k, whole.k[index])


def test_the_reference_model_reads_under_the_same_noise(path, tmp_path) -> None:
    """At θ = θ_ref the KL is 0: it must not measure, and pull at, the noise of the rollouts."""
    for peft_config in (None, tiny.lora()):
        trainer = tiny.trainer(
            path, tmp_path, train_dataset=tiny.dataset(images=3), peft_config=peft_config,
            beta=0.04, attn_coef=0.0, attn_explore_sigma=2.0, attn_granularity="image",
            attn_layers="all",
        )  # fmt: skip
        trainer._compute_loss(trainer.model, by_hand.batch_of(trainer))
        assert trainer._metrics["train"]["kl"] == pytest.approx([0.0], abs=1e-9)


def test_noise_must_reach_the_rollouts(path, tmp_path) -> None:
    """A rollout_func wrote them without noise, and nothing said so."""
    settings = {"attn_coef": 0.0, "attn_explore_sigma": 1.0, "attn_granularity": "image"}

    class Trainer(RALTrainer):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, rollout_func=lambda prompts, trainer: {}, **kwargs)

    with pytest.raises(ValueError, match="is not supported with rollout_func"):
        tiny.trainer(path, tmp_path, trainer_class=Trainer, **settings)
    with pytest.raises(ValueError, match="is not supported with tools"):
        check_can_explore(SimpleNamespace(rollout_func=None, tools=[len]))
    with pytest.raises(ValueError, match="use_transformers_continuous_batching=True"):
        _config(**settings, use_transformers_continuous_batching=True)


@pytest.mark.parametrize("name", ["image_token_id", "image_token_index"])
@pytest.mark.parametrize("scope", ["context", "visual"])
def test_a_policy_over_tokens_needs_no_known_family(name: str, scope: str) -> None:
    config = SimpleNamespace(model_type="another", **{name: 7})
    ids = torch.tensor([[0, 7, 7, 3, 7, 4], [7, 7, 3, 3, 4, 4]])
    fields = {"pixel_values": torch.zeros(1)}
    found = lay_out(_config(attn_scope=scope), config, ids, torch.ones_like(ids), fields, 2)
    assert found.spans is None
    wanted = [[False, True, True, False, False, False], [True, True, False, False, False, False]]
    assert found.visual.tolist() == wanted
    with pytest.raises(NotImplementedError, match="'another'"):
        spans = _config(attn_scope=scope, attn_granularity="image")
        lay_out(spans, config, ids, torch.ones_like(ids), fields, 2)


def test_only_the_states_that_predict_are_kept(path, teacher_path, tmp_path) -> None:
    """The teacher's states of a whole rollout batch would grow with its prompts."""
    trainer = tiny.trainer(path, tmp_path, teacher_model=teacher_path, distill_logit_coef=1.0)
    inputs = by_hand.batch_of(trainer)
    index, length = inputs["rollout_index"], inputs["completion_ids"].shape[1]
    name, device = "teacher of distill/logits", torch.device("cpu")
    (kept,) = trainer._references.of(name, index, device).values()
    assert kept.shape[:2] == (len(index), length)
    assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()
    hidden = []
    base = trainer.teacher_model.base_model
    handle = base.register_forward_hook(lambda *call: hidden.append(call[-1].last_hidden_state))
    with torch.no_grad():
        trainer.teacher_model(**by_hand.model_inputs(inputs), use_cache=False)
    handle.remove()
    torch.testing.assert_close(kept, hidden[0][:, -length - 1 : -1], rtol=1e-4, atol=1e-5)


def test_states_are_kept_for_the_logits_alone(path, teacher_path, tmp_path) -> None:
    trainer = tiny.trainer(path, tmp_path, teacher_model=teacher_path, distill_attn_coef=1.0)
    by_hand.batch_of(trainer)
    assert "teacher" in trainer._references
    assert "teacher of distill/logits" not in trainer._references


def test_a_teacher_may_be_far_away(path, teacher_path, tmp_path, caplog) -> None:
    """A divergence from it is what there is to learn, and no sign that a term runs away."""
    trainer = tiny.trainer(
        path, tmp_path, teacher_model=teacher_path, distill_attn_coef=1.0, attn_coef=0.0,
        attn_warn_divergence=1e-6, attn_warn_grad_share=1e6, max_steps=1,
    )  # fmt: skip
    trainer.train()
    assert tiny.logged(trainer, "attn/divergence")[0] > 1e-3
    assert not any("runs away" in record.getMessage() for record in caplog.records)


def test_differing_prefixes_of_own_queries() -> None:
    """With attn_rows="token" a position's own token is part of what its attention depends on."""
    ids = torch.tensor([[5, 6, 7], [5, 8, 7]])
    counted = torch.ones_like(ids)
    assert attention_statistics.differing_prefixes(ids, counted, 2).tolist() == [2.0, 6.0]
    assert attention_statistics.differing_prefixes(ids, counted, 2, own_token=True).tolist() == [
        4.0,
        6.0,
    ]


MIXED = [
    {"attn_scope": "visual"},
    {"attn_granularity": "image"},
    {"attn_granularity": "tile", "attn_tile": [1, 2], "attn_scope": "visual"},
    {"attn_granularity": "image", "attn_coef": 0.0, "attn_explore_sigma": 1.0},
]


@pytest.mark.parametrize("config", MIXED)
def test_a_rollout_batch_without_images_among_others(config, path, tmp_path) -> None:
    """It ended the run, hours after its start; it has no attention on images to learn from."""
    rows = list(tiny.dataset(4, images=2))
    for row in rows[::2]:
        row["images"] = []
    trainer = tiny.trainer(
        path, tmp_path, train_dataset=Dataset.from_list(rows), per_device_train_batch_size=2,
        num_iterations=1, max_steps=8, **config,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 8  # four rollout batches, of one prompt each
    shares = tiny.logged(trainer, "attn/visual_share")
    assert sorted(share > 0 for share in shares) == [False, False, True, True]
    assert all(map(math.isfinite, tiny.logged(trainer, "grad_norm")))
    values = tiny.logged(trainer, "explore/loss" if "attn_explore_sigma" in config else "attn/loss")
    assert len(values) == 8 and all(map(math.isfinite, values))
    for share, of_batch in zip(shares, zip(*[iter(values)] * 2, strict=True), strict=True):
        assert any(abs(value) > 1e-9 for value in of_batch) == (share > 0)


def test_a_term_that_nothing_starts_is_reported(path, tmp_path, caplog) -> None:
    """The divergence from itself has no gradient: without TRL's loss the policy stays there."""
    trainer = tiny.trainer(path, tmp_path, rl_coef=0.0)
    before = nn.utils.parameters_to_vector(trainer.model.parameters()).detach().clone()
    trainer.train()
    after = nn.utils.parameters_to_vector(trainer.model.parameters()).detach()
    assert (after - before).abs().max() < 1e-2 * trainer.args.learning_rate
    assert any("no weight will change" in record.getMessage() for record in caplog.records)
