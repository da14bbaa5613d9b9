"""Runs of `RALTrainer`: what it logs, keeps, refuses and leaves alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from ral import RALTrainer, attention_statistics
from ral.rewards import paper_reward

from . import by_hand, tiny

METRICS = (
    "attn/loss", "attn/divergence", "attn/grad_share", "attn/differing_prefixes",
    "attn/visual_share", "attn/entropy", "time/rollout", "time/old_policy", "time/update",
    "entropy", "reward",
)  # fmt: skip


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "checkpoints"
    return {family: tiny.checkpoint(folder, family) for family in ("qwen2_5_vl", "qwen3_vl")}


def _footprint(model: nn.Module) -> list:
    """Hooks and configurations of every module."""
    return [
        (len(m._forward_hooks), len(m._forward_pre_hooks), id(getattr(m, "config", None)))
        for m in model.modules()
    ]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_run_and_its_metrics(family, paths, tmp_path) -> None:
    trainer = tiny.trainer(paths[family], tmp_path, max_steps=6, attn_coef=5.0)
    before = _footprint(trainer.model)
    trainer.train()
    assert _footprint(trainer.model) == before
    for name in METRICS:
        assert tiny.logged(trainer, name), name
        assert all(math.isfinite(value) for value in tiny.logged(trainer, name)), name
    # Two rollout batches: four inner steps, then two. RAL is zero at the first of each.
    of_steps = tiny.logged(trainer, "attn/divergence")
    assert [value < 1e-7 for value in of_steps] == [True, False, False, False, True, False]
    assert tiny.logged(trainer, "attn/divergence/inner_3") == of_steps[3:4]
    shares = tiny.logged(trainer, "attn/grad_share")
    assert shares[0] < 1e-3 < shares[1]
    assert all(0 < share < 1 for share in tiny.logged(trainer, "attn/visual_share"))
    assert tiny.logged(trainer, "time/rollout")[0] > 0 == tiny.logged(trainer, "time/rollout")[1]


def test_ral_changes_the_run_and_measuring_does_not(paths, tmp_path) -> None:
    def weights(name: str, **config) -> torch.Tensor:
        trainer = tiny.trainer(paths["qwen2_5_vl"], tmp_path / name, **config)
        trainer.train()
        return nn.utils.parameters_to_vector(trainer.model.parameters()).detach()

    measured, silent = weights("1"), weights("2", attn_metrics_every=0)
    assert torch.equal(measured, silent)
    assert not torch.allclose(measured, weights("3", attn_coef=0.0), atol=1e-5)


def test_without_terms_it_is_grpo(paths, tmp_path) -> None:
    from trl import GRPOTrainer

    class Plain(GRPOTrainer):
        def __init__(self, *args, teacher_model=None, terms=(), **kwargs) -> None:
            super().__init__(*args, **kwargs)

    runs = []
    for name, trainer_class in (("1", RALTrainer), ("2", Plain)):
        trainer = tiny.trainer(
            paths["qwen2_5_vl"], tmp_path / name, trainer_class=trainer_class, attn_coef=0.0
        )
        trainer.train()
        runs.append(tiny.logged(trainer, "loss"))
    assert runs[0] == runs[1]


def test_the_reference_under_lora_is_the_base_model(paths, tmp_path) -> None:
    trainer = tiny.trainer(
        paths["qwen2_5_vl"], tmp_path, peft_config=tiny.lora(), beta=0.04, attn_reference="ref",
        rl_coef=0.0,
    )  # fmt: skip
    by_hand.stepped(trainer)  # base and adapters, before the rollouts
    inputs = by_hand.batch_of(trainer)
    loss = trainer._compute_loss(trainer.model, inputs)
    base = trainer.model.get_base_model()
    with torch.no_grad(), by_hand.weights(base, None):
        p = by_hand.policies(base, inputs, [-1])
        with trainer.model.disable_adapter():
            r = by_hand.policies(base, inputs, [-1])
    values = by_hand.divergence(p, r)[0]
    assert values.mean() > 1e-4
    mean = by_hand.response_mean(inputs["advantages"][:, None] * values, inputs)
    share = inputs["completion_mask"].sum() / (inputs["num_items_in_batch"] / 2)
    torch.testing.assert_close(loss.detach(), mean * share, rtol=2e-4, atol=1e-7)


def test_another_reference_acts_in_the_first_step(paths, tmp_path) -> None:
    """With a reference model a single step on each rollout batch is allowed."""
    trainer = tiny.trainer(
        paths["qwen2_5_vl"], tmp_path, attn_reference="ref", beta=0.04, num_iterations=1,
        steps_per_generation=1,
    )  # fmt: skip
    trainer.train()
    divergences = tiny.logged(trainer, "attn/divergence")
    assert divergences[0] == 0.0  # the start is the reference
    assert all(value > 1e-6 for value in divergences[1:])


def test_evaluation_between_inner_steps(paths, tmp_path) -> None:
    """It makes rollouts of its own, and must not take the references of the batch away."""
    trainer = tiny.trainer(paths["qwen2_5_vl"], tmp_path)
    trainer.eval_dataset = tiny.dataset(4)
    inputs = by_hand.batch_of(trainer)
    by_hand.stepped(trainer)
    before = trainer._compute_loss(trainer.model, inputs).item()
    scores = trainer.evaluate()
    assert math.isfinite(scores["eval_loss"])
    trainer.model.train()
    assert trainer._compute_loss(trainer.model, inputs).item() == before


def test_warnings_when_it_runs_away(paths, tmp_path, caplog) -> None:
    trainer = tiny.trainer(
        paths["qwen2_5_vl"], tmp_path, attn_warn_divergence=1e-6, attn_warn_grad_share=1e-6
    )
    trainer.train()
    messages = [record.getMessage() for record in caplog.records]
    for name in ("attn/divergence is ", "attn/grad_share is "):
        assert sum(name in message for message in messages) == 1, messages  # not at every step
    assert "Lower attn_coef" in messages[0]


def test_a_single_span_is_reported(paths, tmp_path, caplog) -> None:
    trainer = tiny.trainer(
        paths["qwen2_5_vl"], tmp_path, attn_granularity="image", attn_scope="visual"
    )
    trainer.train()
    assert sum("attention is always 1" in record.getMessage() for record in caplog.records) == 1
    assert all(abs(value) < 1e-12 for value in tiny.logged(trainer, "attn/loss"))


def test_images_are_needed_for_spans(paths, tmp_path) -> None:
    rows = tiny.dataset().remove_columns("images")
    trainer = tiny.trainer(
        paths["qwen2_5_vl"], tmp_path, train_dataset=rows, attn_granularity="frame"
    )
    with pytest.raises(ValueError, match="needs images in the prompts"):
        trainer.train()


def test_text_alone(paths, tmp_path) -> None:
    rows = tiny.dataset().remove_columns("images")
    trainer = tiny.trainer(paths["qwen2_5_vl"], tmp_path, train_dataset=rows)
    trainer.train()
    assert tiny.logged(trainer, "attn/divergence")[1] > 0
    assert tiny.logged(trainer, "attn/visual_share") == [0.0]


@pytest.mark.parametrize("opening", ["", "<think>\n"])
def test_rewards_see_a_think_tag_that_the_template_writes(opening, paths, tmp_path) -> None:
    written = {
        "": "<think>it barks</think><answer>B</answer>",
        "<think>\n": "it barks\n</think><answer>B</answer>",
    }
    forms: list[dict[str, list[float]]] = []

    def reward(completions, **columns):
        count = len(completions)
        columns |= {"solution": ["B"] * count, "problem_type": ["multiple choice"] * count}
        forms.append(
            {start: paper_reward([text] * count, **columns) for start, text in written.items()}
        )
        return tiny.reward(completions)

    rows = tiny.dataset().remove_columns("images")
    trainer = tiny.trainer(
        paths["qwen2_5_vl"], tmp_path, reward_funcs=reward, max_steps=1, train_dataset=rows
    )
    processor: Any = trainer.processing_class
    template = processor.chat_template
    assert template.endswith("assistant\n{% endif %}")
    strict = "{% if messages[0]['content'] is string %}{{ raise_exception('no parts') }}{% endif %}"
    processor.chat_template = (
        strict + template.removesuffix("{% endif %}") + opening + "{% endif %}"
    )
    trainer.train()
    assert forms
    for of in forms:
        for start, rewards in of.items():
            assert set(rewards) == {0.9 + 0.1 * (start == opening)}


def test_wrong_arguments(paths, tmp_path) -> None:
    from trl import GRPOConfig

    with pytest.raises(TypeError, match="args must be a RALConfig; got GRPOConfig"):
        RALTrainer(str(paths["qwen2_5_vl"]), tiny.reward, GRPOConfig(use_cpu=True, bf16=False))
    with pytest.raises(ValueError, match="layers must"):
        tiny.trainer(paths["qwen2_5_vl"], tmp_path, attn_layers=7)


def test_bfloat16_autocast_keeps_the_loss_in_float32(paths, tmp_path) -> None:
    trainer = tiny.trainer(paths["qwen2_5_vl"], tmp_path, bf16=True)
    inputs = by_hand.batch_of(trainer)
    by_hand.stepped(trainer)
    with trainer.compute_loss_context_manager():
        loss = trainer._compute_loss(trainer.model, inputs)
    assert loss.dtype == torch.float32
    trainer.train()
    assert all(map(math.isfinite, tiny.logged(trainer, "loss")))


def test_differing_prefixes() -> None:
    ids = torch.tensor(
        [
            [5, 6, 7, 0], [5, 6, 8, 9], [5, 6, 7, 3],  # shared up to and including position 1
            [1, 2, 0, 0], [3, 2, 0, 0], [1, 2, 0, 0],  # differ from position 0 on
        ]
    )  # fmt: skip
    mask = torch.tensor(
        [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    )
    # group 1: prefixes of positions 0-2 are shared, that of 3 is not (two rollouts reach it);
    # group 2: position 0 is shared, 1 is not (three rollouts)
    assert attention_statistics.differing_prefixes(ids, mask, 3).tolist() == [5.0, 17.0]


def test_differing_prefixes_see_an_end() -> None:
    """A rollout that has ended is no longer where the others are."""
    ids = torch.tensor([[4, 0, 0], [4, 4, 4]])
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    assert attention_statistics.differing_prefixes(ids, mask, 2).tolist() == [1.0, 4.0]


def test_statistics_from_eager_maps(paths, tmp_path) -> None:
    import ral_kernels as rk
    from ral.losses import PolicyView

    trainer = tiny.trainer(paths["qwen2_5_vl"], tmp_path)
    inputs = by_hand.batch_of(trainer)
    mask, visual = inputs["completion_mask"].bool(), inputs["visual"]
    prompt, length = inputs["prompt_ids"].shape[1], inputs["completion_ids"].shape[1]
    with torch.no_grad():
        with rk.capture(trainer.model) as captured:
            trainer.model(**by_hand.model_inputs(inputs))
        view = PolicyView((prompt - 1, prompt - 1 + length))
        got = attention_statistics.attention_statistics(captured, -1, mask, visual, view)
        with by_hand.weights(trainer.model, None):
            p = by_hand.policies(trainer.model, inputs, [-1])[0]
    assert visual.sum() == (inputs["mm_token_type_ids"] == 1).sum()
    share = (p * visual[:, None]).sum(-1)[mask].sum()
    entropy = torch.special.entr(p).sum(-1)[mask].sum()
    wanted = torch.stack([share, entropy, mask.sum().float()])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
