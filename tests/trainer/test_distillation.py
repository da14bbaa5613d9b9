"""On-Policy Attention Distillation, eq. (4): both terms by hand, and teachers that are refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ral.distillation import pair_layers
from tests.integrations import tiny_checkpoint
from tests.integrations.eager_maps import assert_same_gradients, gradients

from . import by_hand, tiny

# Deeper, wider, other heads and head dim than the student's 2 layers, 4:2 heads, 64 wide.
TEACHER = {
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "hidden_size": 96,
    "head_dim": 16,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.getbasetemp() / "checkpoints")


@pytest.fixture(scope="module")
def teacher_path(tmp_path_factory):
    """A larger Qwen2.5-VL whose vision tower ends in its own width, with the same tokenizer."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    folder = tmp_path_factory.getbasetemp() / "teacher"
    vocabulary = tiny_checkpoint.tokenizer()
    config = tiny_checkpoint.model(vocabulary).config
    text = config.text_config
    for name, value in TEACHER.items():
        setattr(text, name, value)
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    config.vision_config.out_hidden_size = TEACHER["hidden_size"]
    torch.manual_seed(1)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    vocabulary.save_pretrained(folder)
    return folder


def _distiller(path, tmp_path, teacher, **config):
    settings = {"attn_coef": 0.0, "rl_coef": 0.0, **config}
    return tiny.trainer(path, tmp_path, teacher_model=teacher, **settings)


@pytest.mark.parametrize(
    "config, student_layers, teacher_layers",
    [
        ({}, [-1], [-1]),
        ({"attn_layers": "all"}, [0, 1], [1, 2]),
        ({"attn_layers": "all", "distill_teacher_layers": [0, 2]}, [0, 1], [0, 2]),
        ({"attn_rows": "token", "attn_divergence": "kl"}, [-1], [-1]),
    ],
)
def test_attention_term(
    config, student_layers, teacher_layers, path, teacher_path, tmp_path
) -> None:
    trainer = _distiller(path, tmp_path, str(teacher_path), distill_attn_coef=2.0, **config)
    inputs = by_hand.batch_of(trainer)
    loss = trainer._compute_loss(trainer.model, inputs)
    got = gradients(trainer.model, loss)

    rows = {"rows": trainer.args.attn_rows}
    with torch.no_grad(), by_hand.weights(trainer.teacher_model, None) as teacher:
        r = by_hand.policies(teacher, inputs, teacher_layers, **rows)
    with by_hand.weights(trainer.model, None):
        p = by_hand.policies(trainer.model, inputs, student_layers, **rows)
        values = by_hand.divergence(p, r, trainer.args.attn_divergence).mean(0)
        share = inputs["completion_mask"].sum() / (inputs["num_items_in_batch"] / 2)
        wanted_loss = 2.0 * by_hand.response_mean(values, inputs) * share
        wanted = gradients(trainer.model, wanted_loss)
    assert values.min() > 1e-3  # no term vanishes at the start
    torch.testing.assert_close(loss.detach(), wanted_loss.detach(), rtol=1e-4, atol=1e-7)
    assert_same_gradients(got, wanted, 5e-4)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_logit_term(beta, path, teacher_path, tmp_path) -> None:
    trainer = _distiller(
        path, tmp_path, str(teacher_path), distill_logit_coef=1.5, distill_beta=beta,
        temperature=0.7,
    )  # fmt: skip
    inputs = by_hand.batch_of(trainer)
    loss = trainer._compute_loss(trainer.model, inputs)
    got = gradients(trainer.model, loss)

    batch = by_hand.model_inputs(inputs)
    length = inputs["completion_ids"].shape[1]

    def log_probs(model):
        logits = model(**batch, use_cache=False).logits[:, -length - 1 : -1]
        return (logits / 0.7).log_softmax(-1)

    with torch.no_grad():
        teacher = log_probs(trainer.teacher_model)
    student = log_probs(trainer.model)
    # Generalised JSD of arXiv 2306.13649: β KL(teacher ‖ m) + (1 − β) KL(student ‖ m), with
    # m = β teacher + (1 − β) student; its ends are KL(teacher ‖ student) and the reverse.
    t, s = teacher.exp(), student.exp()
    if beta == 0.0:
        values = (t * (teacher - student)).sum(-1)
    elif beta == 1.0:
        values = (s * (student - teacher)).sum(-1)
    else:
        m = (beta * t + (1 - beta) * s).log()
        values = beta * (t * (teacher - m)).sum(-1) + (1 - beta) * (s * (student - m)).sum(-1)
    share = inputs["completion_mask"].sum() / (inputs["num_items_in_batch"] / 2)
    wanted_loss = 1.5 * by_hand.response_mean(values, inputs) * share
    wanted = gradients(trainer.model, wanted_loss)
    torch.testing.assert_close(loss.detach(), wanted_loss.detach(), rtol=1e-4, atol=1e-6)
    assert_same_gradients(got, wanted, 5e-4)


def test_a_run_comes_nearer_to_the_teacher(path, teacher_path, tmp_path) -> None:
    trainer = _distiller(
        path, tmp_path, str(teacher_path), distill_attn_coef=10.0, distill_logit_coef=1.0,
        num_iterations=12, max_steps=24, learning_rate=2e-3,
    )  # fmt: skip
    teacher = nn.utils.parameters_to_vector(trainer.teacher_model.parameters()).clone()
    trainer.train()
    for name in ("distill/attention", "distill/logits"):
        values = tiny.logged(trainer, name)
        assert all(map(math.isfinite, values))
        assert sum(values[-2:]) < 0.7 * sum(values[:2]), name
    assert torch.equal(nn.utils.parameters_to_vector(trainer.teacher_model.parameters()), teacher)
    assert tiny.logged(trainer, "attn/divergence")[0] > 1e-3


def test_the_advantage_weighted_term_may_have_the_teacher_as_reference(
    path, teacher_path, tmp_path
) -> None:
    trainer = tiny.trainer(
        path, tmp_path, teacher_model=str(teacher_path), attn_reference="teacher", rl_coef=0.0
    )
    inputs = by_hand.batch_of(trainer)
    loss = trainer._compute_loss(trainer.model, inputs)
    with torch.no_grad():
        with by_hand.weights(trainer.teacher_model, None) as teacher:
            r = by_hand.policies(teacher, inputs, [-1])
        with by_hand.weights(trainer.model, None):
            p = by_hand.policies(trainer.model, inputs, [-1])
        values = by_hand.divergence(p, r)[0] * inputs["advantages"][:, None]
    share = inputs["completion_mask"].sum() / (inputs["num_items_in_batch"] / 2)
    wanted = by_hand.response_mean(values, inputs) * share
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-4, atol=1e-7)


def test_layers_side_by_side() -> None:
    assert pair_layers([27], None, 64, 28) == [63]
    assert pair_layers([26, 27], None, 64, 28) == [62, 63]
    assert pair_layers([0, 27], [5, -1], 64, 28) == [5, 63]
    assert pair_layers([27], 40, 64, 28) == [40]
    with pytest.raises(ValueError, match="a layer for each of the student's 2; got 1"):
        pair_layers([0, 1], -1, 64, 28)
    with pytest.raises(ValueError, match="among the teacher's 4 layers; got -6"):
        pair_layers([0], None, 4, 6)


class TestRefusals:
    """A teacher that would read the rollouts in another way."""

    def test_none(self, path, tmp_path) -> None:
        with pytest.raises(ValueError, match="teacher_model must be given"):
            _distiller(path, tmp_path, None, distill_attn_coef=1.0)

    def test_one_that_nothing_uses(self, path, tmp_path) -> None:
        with pytest.raises(ValueError, match="a teacher that nothing compares with"):
            tiny.trainer(path, tmp_path, teacher_model=str(path))

    def test_fewer_tokens(self, path, tmp_path) -> None:
        teacher = tiny_checkpoint.model(tiny_checkpoint.tokenizer())
        teacher.resize_token_embeddings(100)
        with pytest.raises(ValueError, match=r"vocabulary of .* tokens; got 100"):
            _distiller(path, tmp_path, teacher, distill_attn_coef=1.0)

    def test_other_tokens(self, path, tmp_path) -> None:
        tokenizer = tiny_checkpoint.tokenizer()
        model = tiny_checkpoint.model(tokenizer)
        model.save_pretrained(tmp_path / "other")
        tokenizer.add_tokens(["another"])
        tokenizer.save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match="differs in 1 entries, such as 'another'"):
            _distiller(path, tmp_path, str(tmp_path / "other"), distill_attn_coef=1.0)

    def test_other_image_token(self, path, tmp_path) -> None:
        teacher = tiny_checkpoint.model(tiny_checkpoint.tokenizer())
        teacher.config.image_token_id += 1
        with pytest.raises(ValueError, match="must have image_token_id="):
            _distiller(path, tmp_path, teacher, distill_attn_coef=1.0)

    def test_other_patches(self, path, tmp_path) -> None:
        teacher = tiny_checkpoint.model(tiny_checkpoint.tokenizer())
        teacher.config.vision_config.spatial_merge_size = 1
        with pytest.raises(ValueError, match=r"vision_config.spatial_merge_size=2; got 1"):
            _distiller(path, tmp_path, teacher, distill_attn_coef=1.0)

    def test_padded_embeddings_are_fine(self, path, tmp_path) -> None:
        """As of Qwen2.5-VL-3B and 7B, whose embeddings differ in rows that no token has."""
        teacher = tiny_checkpoint.model(tiny_checkpoint.tokenizer())
        teacher.resize_token_embeddings(640)
        trainer = _distiller(path, tmp_path, teacher, distill_attn_coef=1.0, distill_logit_coef=1.0)
        trainer.train()
        assert all(map(math.isfinite, tiny.logged(trainer, "distill/logits")))
