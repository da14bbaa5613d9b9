"""The trainer's attention terms, value and gradient, against full maps of eager attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.integrations.eager_maps import assert_same_gradients, gradients

from . import by_hand, tiny


@dataclass(frozen=True)
class Case:
    """Settings of a trainer, and how many images a prompt has."""

    name: str
    family: str = "qwen2_5_vl"
    images: int = 1
    config: dict[str, Any] = field(default_factory=dict)
    lora: bool = False


CASES = (
    Case("last_layer"),
    Case("qwen3_vl", family="qwen3_vl"),
    Case("every_layer", config={"attn_layers": "all"}),
    Case("first_layer", config={"attn_layers": 0}),
    Case("own_query", config={"attn_rows": "token"}),
    Case("own_key", config={"attn_exclude_self": False}),
    Case("kl", config={"attn_divergence": "kl"}),
    Case("reverse_kl", config={"attn_divergence": "reverse_kl"}),
    Case("cross_entropy", config={"attn_divergence": "cross_entropy"}),
    Case("visual", config={"attn_scope": "visual"}),
    Case("images", images=3, config={"attn_granularity": "image", "attn_scope": "visual"}),
    Case("images_and_text", images=2, config={"attn_granularity": "frame"}),
    Case(
        "tiles",
        images=2,
        config={"attn_granularity": "tile", "attn_tile": [1, 2], "attn_scope": "visual"},
    ),
    Case("mean_of_means", config={"attn_reduction": "sequence_mean"}),
    Case("kept_on_cpu", config={"attn_snapshot_device": "cpu"}),
    Case("accumulated", config={"gradient_accumulation_steps": 2, "steps_per_generation": 4}),
    Case("lora", lora=True),
    Case("checkpointed", config={"gradient_checkpointing": True}),
    Case(
        "checkpointed_reentrant",
        config={
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
    ),
    Case("ral_attention", config={"model_init_kwargs": {"attn_implementation": "ral"}}),
    Case("eager_attention", config={"model_init_kwargs": {"attn_implementation": "eager"}}),
)


def outcomes(
    inputs: dict[str, Any], visual: torch.Tensor, granularity: str, scope: str
) -> torch.Tensor | None:
    """Which keys make up each outcome, from what the pictures are: tiny.dataset's 2 x 3 tokens."""
    ids = by_hand.model_inputs(inputs)["input_ids"]
    if granularity == "token":
        if scope == "context":
            return None
        return torch.diag_embed(visual)
    if granularity == "tile":  # tiles of 1 x 2 tokens in grids of 2 x 3 and 3 x 2
        grids = inputs["image_grid_thw"]
        per_sample = grids.view(ids.shape[0], -1, 3)[..., 1:] // 2
        groups = torch.zeros(ids.shape[0], 16, ids.shape[1], dtype=torch.bool)
        for sample, keys in enumerate(visual):
            places, group = iter(keys.nonzero()[:, 0].tolist()), 0
            for height, width in per_sample[sample].tolist():
                for _ in range(height):
                    for column in range(width):
                        groups[sample, group + column // 2, next(places)] = True
                    group += (width + 1) // 2
        return groups
    starts = visual & ~torch.nn.functional.pad(visual, (1, -1))  # one run of tokens an image
    number = starts.long().cumsum(-1) * visual
    found = [number == image for image in range(1, int(number.max()) + 1)]
    if scope == "context":
        found.append(~visual & by_hand.model_inputs(inputs)["attention_mask"].bool())
    return torch.stack(found or [visual], 1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_eq_2_from_eager_maps(case: Case, tmp_path, tmp_path_factory) -> None:
    path = tiny.checkpoint(tmp_path_factory.getbasetemp() / "checkpoints", case.family)
    trainer = tiny.trainer(
        path, tmp_path, train_dataset=tiny.dataset(images=case.images),
        peft_config=tiny.lora() if case.lora else None, rl_coef=0.0, attn_coef=3.0, **case.config,
    )  # fmt: skip
    inputs = by_hand.batch_of(trainer)
    before = by_hand.stepped(trainer)
    args = trainer.args
    model = trainer.model.get_base_model() if case.lora else trainer.model
    if case.lora:
        before = {name.removeprefix("base_model.model."): x for name, x in before.items()}
    layers = list(range(2)) if args.attn_layers == "all" else [args.attn_layers]

    loss = trainer._compute_loss(trainer.model, inputs)
    got = gradients(trainer.model, loss)

    options: dict[str, Any] = {"rows": args.attn_rows, "exclude_self": args.attn_exclude_self}
    visual = inputs["mm_token_type_ids"] == 1
    options["groups"] = outcomes(inputs, visual, args.attn_granularity, args.attn_scope)
    with torch.no_grad(), by_hand.weights(model, before):
        r = by_hand.policies(model, inputs, layers, **options)
    with by_hand.weights(model, None):
        p = by_hand.policies(model, inputs, layers, **options)
        values = by_hand.divergence(p, r, args.attn_divergence).mean(0)
        weighted = inputs["advantages"][:, None] * values
        mean = by_hand.response_mean(weighted, inputs, args.attn_reduction)
        # A mean over the step's tokens: here this micro-batch's share of it.
        share = 1 / args.gradient_accumulation_steps
        if args.attn_reduction == "token_mean":
            counted = inputs["completion_mask"].sum()
            step = inputs["num_items_in_batch"] / args.steps_per_generation
            share = counted / (step * args.gradient_accumulation_steps)
        wanted_loss = 3.0 * mean * share
        wanted = gradients(trainer.model, wanted_loss)

    assert values.mean() > 1e-4  # the step moved the policy
    torch.testing.assert_close(loss.detach(), wanted_loss.detach(), rtol=2e-4, atol=1e-6)
    logged = trainer._metrics["train"]["attn/divergence"]
    distance = by_hand.divergence(p, r, args.attn_divergence.replace("cross_entropy", "reverse_kl"))
    measured = by_hand.response_mean(distance.mean(0).detach(), inputs)
    assert logged == pytest.approx([measured.item()], rel=2e-3)  # without the reference's entropy
    largest = max(float(x.norm()) for x in wanted.values())
    assert largest > 1e-5
    assert_same_gradients(got, wanted, 5e-4)


def test_unchanged_policy_gives_exactly_zero(tmp_path, tmp_path_factory) -> None:
    """The rollouts run again in the order and the batch of the old policy's forward."""
    path = tiny.checkpoint(tmp_path_factory.getbasetemp() / "checkpoints")
    trainer = tiny.trainer(
        path, tmp_path, rl_coef=0.0, per_device_train_batch_size=8, steps_per_generation=1
    )
    inputs = by_hand.batch_of(trainer)
    order = inputs["rollout_index"].argsort()
    patches = inputs["image_grid_thw"].prod(-1).tolist()
    pictures = inputs["pixel_values"].split(patches)
    inputs = {
        name: x[order] if isinstance(x, torch.Tensor) and x.dim() > 0 else x
        for name, x in inputs.items()
        if name != "pixel_values"
    }
    inputs["pixel_values"] = torch.cat([pictures[i] for i in order])
    loss = trainer._compute_loss(trainer.model, inputs)
    assert loss == 0.0
    assert not any(x.any() for x in gradients(trainer.model, loss).values())


def test_tool_tokens_and_advantages_of_tokens(tmp_path, tmp_path_factory) -> None:
    path = tiny.checkpoint(tmp_path_factory.getbasetemp() / "checkpoints")
    trainer = tiny.trainer(path, tmp_path, rl_coef=0.0, steps_per_generation=1)
    inputs = by_hand.batch_of(trainer)
    shape = inputs["completion_ids"].shape
    generator = torch.Generator().manual_seed(0)
    inputs["advantages"] = torch.randn(shape, generator=generator)
    inputs["tool_mask"] = torch.randint(0, 2, shape, generator=generator)
    inputs["num_items_in_batch"] = (inputs["completion_mask"] * inputs["tool_mask"]).sum()
    before = by_hand.stepped(trainer)
    loss = trainer._compute_loss(trainer.model, inputs)
    with torch.no_grad(), by_hand.weights(trainer.model, before):
        r = by_hand.policies(trainer.model, inputs, [-1])
    with torch.no_grad(), by_hand.weights(trainer.model, None):
        p = by_hand.policies(trainer.model, inputs, [-1])
    values = inputs["advantages"] * by_hand.divergence(p, r)[0]
    torch.testing.assert_close(
        loss.detach(), by_hand.response_mean(values, inputs), rtol=2e-4, atol=1e-7
    )


def test_micro_batches_add_up(tmp_path, tmp_path_factory) -> None:
    """A step in two micro-batches has the gradient of one, whatever the responses' lengths."""
    path = tiny.checkpoint(tmp_path_factory.getbasetemp() / "checkpoints")
    whole = tiny.trainer(
        path, tmp_path / "1", rl_coef=0.0, per_device_train_batch_size=8, steps_per_generation=1
    )
    inputs = by_hand.batch_of(whole)
    lengths = torch.tensor([8, 1, 3, 8, 2, 5, 8, 4])
    inputs["completion_mask"] = (torch.arange(8) < lengths[:, None]).long()
    inputs["num_items_in_batch"] = lengths.sum()
    by_hand.stepped(whole)
    wanted = gradients(whole.model, whole._compute_loss(whole.model, inputs))
    whole.args.steps_per_generation = whole.args.gradient_accumulation_steps = 2
    whole.current_gradient_accumulation_steps = 2
    patches = inputs["image_grid_thw"].prod(-1).cumsum(0)
    for half in (slice(0, 4), slice(4, 8)):
        part = {
            name: x[half] if isinstance(x, torch.Tensor) and x.dim() > 0 else x
            for name, x in inputs.items()
        }
        cut = patches[3]
        part["pixel_values"] = (
            inputs["pixel_values"][:cut] if half.start == 0 else inputs["pixel_values"][cut:]
        )
        part["num_images"] = inputs["num_images"][half]
        whole._compute_loss(whole.model, part).backward()
    got = {n: x.grad.clone() for n, x in whole.model.named_parameters() if x.grad is not None}
    assert_same_gradients(got, wanted, 1e-5)
