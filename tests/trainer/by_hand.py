"""What the trainer's terms are compared with: eq. (1)-(4) from eager's full attention maps."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ral import RALTrainer
from tests.integrations.eager_maps import perturbed

FIELDS = ("pixel_values", "image_grid_thw", "mm_token_type_ids")


def batch_of(trainer: RALTrainer) -> dict[str, Any]:
    """A rollout batch, made now, and its first micro-batch, as `_compute_loss` gets it."""
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def stepped(trainer: RALTrainer, size: float = 0.02) -> dict[str, Tensor]:
    """Move the trained weights as an optimizer step would; returns them as they were before."""
    before = {name: x.detach().clone() for name, x in trainer.model.named_parameters()}
    perturbed(trainer.model, size)
    return before


def model_inputs(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Arguments of the model's own forward over prompt and response."""
    batch = {name: inputs[name] for name in FIELDS if name in inputs}
    batch["input_ids"] = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    batch["attention_mask"] = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    return batch


@contextlib.contextmanager
def weights(model: Any, values: dict[str, Tensor] | None):
    """The model with other weights, and eager attention, inside the block."""
    now = {name: x.detach().clone() for name, x in model.named_parameters()}
    implementation = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        if values is not None:
            _set(model, values)
        yield model
    finally:
        model.set_attn_implementation(implementation)
        if values is not None:
            _set(model, now)


def _set(model: Any, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])


def policies(model: Any, inputs: dict[str, Any], layers: list[int], **options: Any) -> Tensor:
    """[L, B, C, n] policies of eq. (1) for the response's rows, from full maps.

    Args:
        options: rows ("predicting" or "token"), exclude_self, and groups: bool [B, n, N], which
            keys make up each of the n outcomes (default: each key by itself, padding too).
    """
    maps = model(**model_inputs(inputs), output_attentions=True, use_cache=False).attentions
    return torch.stack([policy(maps[layer], inputs, **options) for layer in layers])


def policy(
    attention: Tensor,
    inputs: dict[str, Any],
    rows: str = "predicting",
    exclude_self: bool = True,
    groups: Tensor | None = None,
) -> Tensor:
    mean = attention.mean(1)  # over heads: [B, N, N]
    if exclude_self:
        mean = mean.masked_fill(torch.eye(mean.shape[-1], dtype=torch.bool), 0.0)
    length, total = inputs["completion_ids"].shape[1], mean.shape[1]
    start = total - length - (1 if rows == "predicting" else 0)
    chosen = mean[:, start : start + length]
    if groups is not None:
        chosen = torch.einsum("bcn,bgn->bcg", chosen, groups.to(chosen.dtype))
    return chosen / chosen.sum(-1, keepdim=True).clamp(min=1e-30)


def divergence(p: Tensor, r: Tensor, kind: str = "jsd") -> Tensor:
    """Σ over the last dimension, natural log, 0 log 0 = 0."""

    def relative_entropy(a: Tensor, b: Tensor) -> Tensor:
        used = a > 0
        ratio = torch.where(used, a, 1.0) / torch.where(used, b, 1.0)
        return torch.where(used, a * ratio.log(), 0.0).sum(-1)

    if kind == "kl":
        return relative_entropy(p, r)
    if kind == "reverse_kl":
        return relative_entropy(r, p)
    if kind == "cross_entropy":
        return -torch.where(r > 0, r * torch.where(r > 0, p, 1.0).log(), 0.0).sum(-1)
    m = (p + r) / 2
    return (relative_entropy(p, m) + relative_entropy(r, m)) / 2


def response_mean(values: Tensor, inputs: dict[str, Any], reduction: str = "token_mean") -> Tensor:
    """The mean of [B, C] values over the response tokens that count."""
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    if reduction == "sequence_mean":
        return ((values * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
    return (values * mask).sum() / mask.sum()
