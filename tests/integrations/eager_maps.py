"""What a capture is compared with: policies and the RAL loss from eager's output_attentions."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def eager_maps(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """[B, H, N, N] of each layer; the model must run eager attention."""
    maps: tuple[Tensor, ...] = model(**batch, output_attentions=True, use_cache=False).attentions
    return maps


def eager_policy(maps: Tensor) -> Tensor:
    """Eq. (1) of the paper: the head mean, each row's own key left out, renormalised."""
    mean = maps.mean(1)
    mean = mean.masked_fill(torch.eye(mean.shape[-1], dtype=torch.bool), 0.0)
    return mean / mean.sum(-1, keepdim=True).clamp(min=1e-30)


def eager_ral_loss(p: Tensor, r: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Eq. (2): mean over the tokens that count of advantage times Jensen-Shannon divergence."""
    m = (p + r) / 2

    def relative_entropy(a: Tensor) -> Tensor:
        used = a > 0
        ratio = torch.where(used, a, 1.0) / torch.where(used, m, 1.0)
        return torch.where(used, a * ratio.log(), 0.0).sum(-1)

    divergence = (relative_entropy(p) + relative_entropy(r)) / 2
    return (advantages[:, None] * divergence)[mask].mean()


def perturbed(model: nn.Module, size: float = 0.02) -> nn.Module:
    """The model after a step: every weight a little off."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of each weight that the loss reaches."""
    model.zero_grad()
    loss.backward()
    found = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(
    got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    """Each weight's gradient, as a vector, within `tolerance` of the largest weight's norm."""
    assert wanted and got.keys() >= wanted.keys()
    largest = max(float(x.norm()) for x in wanted.values())
    assert largest > 0
    for name, x in got.items():  # a compiled backward writes zeros where others write nothing
        assert float((x - wanted.get(name, 0.0)).norm()) <= tolerance * largest, name


def footprint(model: nn.Module) -> Any:
    """All that a tap could leave behind: attributes, configurations, hooks, registered names."""
    modules = {
        name: (
            sorted(module.__dict__),
            id(module.__dict__.get("config")),
            module.__dict__.get("gradient_checkpointing"),
            getattr(module.__dict__.get("config"), "_attn_implementation", None),
            [len(hooks) for hooks in (module._forward_hooks, module._forward_pre_hooks)],
        )
        for name, module in model.named_modules()
    }
    return modules, sorted(ALL_ATTENTION_FUNCTIONS.valid_keys())


@contextlib.contextmanager
def leaves_nothing(model: nn.Module) -> Any:
    """Assert that the block leaves the model and transformers' registry as they were."""
    before = footprint(model)
    try:
        yield
    finally:
        assert footprint(model) == before
