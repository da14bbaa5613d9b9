"""The term of a mixture's routers: which experts a token goes to, as a policy beside attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import ral_kernels as rk

from .losses import PolicyView
from .terms import Batch, Layers, Term


class RouterLoss(Term):
    """RAL, eq. (2), of the choice of experts: the mean over layers of advantage times divergence.

        L = λ E_t[A_t D(g_θ^t ‖ g_old^t)]

    g^t is the router's distribution over experts for a response token's row, as
    `rk.capture_router` has it. The term is ours; the paper (arXiv 2602.04884) has it for attention.
    The model's balance loss stays what TRL adds (`router_aux_loss_coef`).

    Args:
        coefficient: λ.
        layers: layers with a router, as in `rk.capture_router`; default all that have one.
        renormalised: compare the shares of the chosen experts, and not the softmax over all. Then
            the divergence does not see how near the others came, and is not smooth where the
            choice changes.

    Metrics, of the first micro-batch of an optimizer step and the tokens of its mask:
        router/divergence: mean divergence over tokens and layers (nats).
        router/load: choices of the busiest expert over the mean, averaged over layers and
            processes; 1 = balanced.
        router/dead: experts of a layer that no token of a process chose, averaged likewise.
    """

    name = "router/loss"
    reference = "old"
    on_attention = False

    def __init__(
        self,
        coefficient: float = 1.0,
        *,
        layers: Layers | None = "all",
        renormalised: bool = False,
    ) -> None:
        self.renormalised = renormalised
        super().__init__(coefficient, layers=layers)

    def capture(self, model: nn.Module, layers: Layers) -> rk.capture_router:
        return rk.capture_router(model, layers)

    def take(self, captured: Any, layer: int, view: PolicyView) -> Tensor:
        taken: Tensor = captured.snapshot(layer, rows=view.rows, renormalised=self.renormalised)
        return taken

    def loss(self, batch: Batch) -> Tensor:
        weights = batch.weights * batch.advantages
        total = torch.zeros((), device=weights.device)
        for layer in batch.layers:
            p, r = self._pair(batch, layer)
            total = total + rk.policy_loss(
                p, r, weights, weights != 0, logits=False, kind=batch.view.kind, reduction="sum"
            )
        return total / len(batch.layers)

    def metrics(self, batch: Batch) -> dict[str, Tensor]:
        divergence, load, dead = (torch.zeros(2, device=batch.mask.device) for _ in range(3))
        tokens = batch.mask.sum()
        one = torch.ones((), device=tokens.device)
        for layer in batch.layers:
            values = rk.divergence(*self._pair(batch, layer), batch.view.measured.kind)
            chosen = batch.mask & values.isfinite()
            divergence += torch.stack([values[chosen].sum(), chosen.sum().float()])
            counts = batch.captured.load(layer, rows=batch.view.rows, mask=batch.mask)
            if tokens > 0:
                load += torch.stack([counts.max() / counts.mean(), one])
                dead += torch.stack([(counts == 0).sum().float(), one])
        return {"router/divergence": divergence, "router/load": load, "router/dead": dead}

    def _pair(self, batch: Batch, layer: int) -> tuple[Tensor, Tensor]:
        """[B, C, E] each: the policy's probabilities and the reference's."""
        rows = batch.view.rows
        p = batch.captured.policy(layer, rows=rows, renormalised=self.renormalised)
        return p, batch.references[layer]
