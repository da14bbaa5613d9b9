"""What a run of RAL is watched by: shares, entropies and the size of its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .losses import Captured, PolicyView

_ROWS_AT_ONCE = 64  # rows of a dense policy, [B, 64, N] float32


def differing_prefixes(
    completion_ids: Tensor, mask: Tensor, group_size: int, own_token: bool = False
) -> Tensor:
    """How many response tokens have a prefix that is not the whole group's: [count, tokens].

    Where all rollouts of a group share the prefix of a position, they share its attention. Their
    advantages sum to zero, so the RAL term of that position is zero.

    Args:
        completion_ids: int64 [B, C], the G rollouts of a prompt side by side.
        mask: [B, C], 1 for a response token that counts.
        group_size: G.
        own_token: whether a position's own token counts as its prefix, because its own query
            stands for it (`attn_rows="token"`).
    """
    groups = completion_ids.unflatten(0, (-1, group_size))  # [B / G, G, C]
    counted = mask.unflatten(0, (-1, group_size)).bool()
    # A rollout that has ended is another prefix than one that goes on.
    tokens = torch.where(counted, groups, -1)
    same = (tokens == tokens[:, :1]).all(1).long().cumprod(-1)  # all equal up to and including t
    if not own_token:
        same = torch.nn.functional.pad(same, (1, 0), value=1)[:, :-1]  # the prefix before t
    differing = (same == 0)[:, None] & counted
    return torch.stack([differing.sum(), counted.sum()]).float()


@torch.no_grad()
def attention_statistics(
    captured: Captured, layer: int, mask: Tensor, visual: Tensor, view: PolicyView
) -> Tensor:
    """[Σ visual share, Σ entropy in nats, number of rows] of a layer's policy over keys.

    Args:
        captured: a forward.
        layer: its number.
        mask: bool [B, C], the rows that count.
        visual: bool [B, N], the keys that show an image.
        view: gives the rows; its spans and scope are not used.
    """
    totals = torch.zeros(3, device=mask.device)
    start, stop = view.rows
    for first in range(start, stop, _ROWS_AT_ONCE):
        last = min(first + _ROWS_AT_ONCE, stop)
        p = captured.policy(
            layer=layer,
            rows=(first, last),
            exclude_self=view.exclude_self,
            backend=view.backend,
            steered=False,
        )
        counted = mask[:, first - start : last - start]
        share = (p * visual[:, None]).sum(-1)
        entropy = torch.special.entr(p).sum(-1)
        totals += torch.stack([share[counted].sum(), entropy[counted].sum(), counted.sum().float()])
    return totals


def gradient_norm(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """‖∂loss/∂parameters‖₂, a float32 scalar; the graph stays for the backward to come."""
    if not loss.requires_grad:
        return torch.zeros((), device=loss.device)
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    squares = [grad.float().square().sum() for grad in grads if grad is not None]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), device=loss.device)


def can_measure_gradients(trainer: Any) -> str | None:
    """None, or why gradients of single terms cannot be had under the trainer's set-up."""
    if trainer.is_fsdp_enabled:
        return "FSDP shards gradients as it computes them"
    if trainer.is_deepspeed_enabled:
        return "DeepSpeed's engine owns the backward"
    options = trainer.args.gradient_checkpointing_kwargs or {}
    if trainer.args.gradient_checkpointing and options.get("use_reentrant"):
        return "reentrant checkpointing has no gradients of single inputs"
    return None
