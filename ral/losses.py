"""The attention terms of eq. (3) and (4), as functions of captured layers.

They take captured layers, reference policies and masks, and return a scalar. They do not use TRL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

import ral_kernels as rk

if TYPE_CHECKING:
    from .config import RALConfig  # which imports TRL

Which = Literal["predicting", "token"]  # query of a response token
Divergence = Literal["jsd", "kl", "reverse_kl", "cross_entropy"]
_TINY = 1e-30  # below any share of attention that counts


class Captured(Protocol):
    """What `rk.capture` returns: methods that take the number of a layer."""

    def ral_loss(
        self, reference: Any, advantages: Tensor, mask: Tensor | None = None, **options: Any
    ) -> Tensor: ...

    def divergence(self, reference: Any, kind: str = "jsd", **options: Any) -> Tensor: ...

    def policy(self, **options: Any) -> Tensor: ...

    def marginals(self, **options: Any) -> Tensor: ...


@dataclass(frozen=True)
class PolicyView:
    """Which distribution of a batch the terms compare, in the policy and its reference policy.

    Attributes:
        rows: (start, stop) of the queries of the C response tokens.
        spans: S spans over the keys, or None for a distribution over keys.
        scope: bool [B, N], the keys that it is renormalised over, or None for all.
        exclude_self: whether a row's own key is left out.
        kind: "jsd", "kl", "reverse_kl" or "cross_entropy".
        backend: backend of the ops, or None.
        which: "predicting", the query that predicts a token, at the token before it; or "token",
            the token's own query.
    """

    rows: tuple[int, int]
    spans: rk.Spans | None = None
    scope: Tensor | None = None
    exclude_self: bool = True
    kind: Divergence = "jsd"
    backend: str | None = None
    which: Which = "predicting"

    def at(self, which: Which) -> PolicyView:
        """The same for the other queries of the response's tokens."""
        shift = (which == "token") - (self.which == "token")
        return replace(self, rows=(self.rows[0] + shift, self.rows[1] + shift), which=which)

    @property
    def measured(self) -> PolicyView:
        """The view whose divergence is 0 at the reference: without the entropy of r.

        Cross-entropy is reverse_kl plus that entropy, which no policy changes.
        """
        return replace(self, kind="reverse_kl") if self.kind == "cross_entropy" else self

    def options(self) -> dict[str, Any]:
        """Keyword arguments for the methods of a captured layer, without the divergence's kind."""
        return {
            "rows": self.rows,
            "spans": self.spans,
            "scope": self.scope,
            "exclude_self": self.exclude_self,
            "backend": self.backend,
            "steered": False,  # in a forward under noise: the policy without the noise
        }


def token_weights(mask: Tensor, reduction: str, normaliser: float | Tensor) -> Tensor:
    """The weight of each response token in a mean: float32 [B, C].

    Args:
        mask: [B, C], 1 for a response token that counts.
        reduction: "token_mean": 1 / normaliser each. "sequence_mean": each response's tokens share
            its 1 / normaliser.
        normaliser: how many tokens ("token_mean") or responses ("sequence_mean") the mean is over;
            for a mean over an optimizer step, its share of this micro-batch.
    """
    counted = mask.float()
    if reduction == "sequence_mean":
        counted = counted / counted.sum(-1, keepdim=True).clamp(min=1.0)
    return counted / normaliser


def weighted_divergence(
    captured: Captured,
    references: Mapping[int, Any],
    weights: Tensor,
    view: PolicyView,
) -> Tensor:
    """mean over layers of Σ_{b,t} weights · D(p^t ‖ r^t), a float32 scalar.

    With weights A_t / (number of tokens) this is eq. (2); with 1 / (number of tokens) the
    attention term of eq. (4).

    Args:
        captured: the forward of this batch.
        references: a reference policy for each layer's number.
        weights: floating [B, C]; rows of weight 0 are not compared.
        view: the distribution that is compared.
    """
    mask = weights != 0
    total = torch.zeros((), device=weights.device)
    for layer, reference in references.items():
        total = total + captured.ral_loss(
            reference, weights, mask, layer=layer, kind=view.kind, reduction="sum", **view.options()
        )
    return total / len(references)


@torch.no_grad()
def mean_divergence(
    captured: Captured, references: Mapping[int, Any], mask: Tensor, view: PolicyView
) -> Tensor:
    """[Σ D, number of rows] over layers and the rows of `mask`; the caller sums over processes."""
    total = torch.zeros(2, device=mask.device)
    for layer, reference in references.items():
        values = captured.divergence(reference, view.kind, layer=layer, **view.options())
        chosen = mask & values.isfinite()
        total += torch.stack([values[chosen].sum(), chosen.sum().float()])
    return total


def exploration_loss(
    captured: Captured, layers: list[int], weights: Tensor, view: PolicyView
) -> Tensor:
    """mean over layers of Σ_{b,t} weights · CE(p_noisy^t ‖ p_θ^t), a float32 scalar.

    Each p is a head's marginals over the spans, renormalised over them; the cross entropies are
    averaged over heads. p_noisy has the bias that the rollout was written with. p_θ has the same q
    and k without the bias, and only p_θ has a gradient. Where a weight has the sign of the
    advantage, the term moves the policy to where a good rollout was made to look ("Exploration" in
    ral/README.md).

    Args:
        captured: a forward that ran under `rk.steer`.
        layers, weights, view: as in `weighted_divergence`; the view has spans.
    """
    total = torch.zeros((), device=weights.device)
    options = {"rows": view.rows, "spans": view.spans, "backend": view.backend}
    for layer in layers:
        with torch.no_grad():
            noisy = _share(captured.marginals(layer=layer, steered=True, **options))
        clean = _share(captured.marginals(layer=layer, steered=False, **options))
        # 0 · log 0 = 0: a span that only one of the two attends to adds nothing, or a finite amount
        log_clean = torch.where(noisy > 0, clean, 1.0).clamp(min=_TINY).log()
        cross_entropy = -(noisy * log_clean).sum(-1).mean(1)  # [B, C]
        total = total + (weights * cross_entropy).sum()
    return total / len(layers)


def _share(marginals: Tensor) -> Tensor:
    """[B, H, C, S] marginals as shares of the attention on spans; 0 where no span has any."""
    return marginals / marginals.sum(-1, keepdim=True).clamp(min=_TINY)


def view_of(
    config: RALConfig,
    prompt_length: int,
    completion_length: int,
    spans: rk.Spans | None = None,
    scope: Tensor | None = None,
) -> PolicyView:
    """The view that the configuration asks for, of prompts and responses padded to P and C."""
    return PolicyView(
        rows=(prompt_length - 1, prompt_length - 1 + completion_length),
        spans=spans,
        scope=scope,
        exclude_self=config.attn_exclude_self,
        kind=config.attn_divergence,
        backend=config.attn_backend,
    ).at(config.attn_rows)
