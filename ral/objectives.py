"""Terms that teach a policy to look at annotated evidence, and coefficients that change with steps.

The form is ours. It follows the abstract of EASE (arXiv 2605.30912).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

import ral_kernels as rk

from .looking import Evidence, look
from .losses import Divergence, mean_divergence, weighted_divergence
from .terms import Batch, Layers, Term

if TYPE_CHECKING:
    from .config import RALConfig  # which imports TRL

Shape = Literal["constant", "warmup", "linear", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """How a coefficient changes with the optimizer step s of a run of n steps.

    It depends on the step alone, so a resumed run goes on as it was.

    Attributes:
        shape: "constant"; "warmup", 1 before `length` and 0 from there; or from 1 to 0 over
            `length`, as a line ("linear") or half a cosine ("cosine").
        length: a number of steps; up to 1, a share of the run.

    Raises:
        ValueError: another shape, or a length that is not finite and > 0.
    """

    shape: Shape = "constant"
    length: float = 1.0

    def __post_init__(self) -> None:
        if self.shape not in get_args(Shape):
            raise ValueError(
                f"Schedule: shape must be one of {', '.join(get_args(Shape))}; got {self.shape!r}"
            )
        if not 0 < self.length < math.inf:
            raise ValueError(f"Schedule: length must be finite and > 0; got {self.length!r}")

    def at(self, step: int, steps: int) -> float:
        """The factor, in [0, 1].

        Args:
            step: optimizer steps so far.
            steps: those of the whole run.
        """
        length = self.length * steps if self.length <= 1 else self.length
        if self.shape == "constant":
            return 1.0
        if step >= length:
            return 0.0
        if self.shape == "warmup":
            return 1.0
        done = step / length
        return 1 - done if self.shape == "linear" else (1 + math.cos(math.pi * done)) / 2


class EvidenceLoss(Term):
    """Pulls the response's attention over visual tokens towards annotated evidence.

        L = mean over layers of E_t[D(p̂^t ‖ r)]

    p̂^t is the policy of response token t over the visual tokens, averaged over the chosen heads,
    r the rollout's evidence, both renormalised over the visual tokens. E_t is the mean over the
    tokens of those rollouts that have evidence and are good (`evidence_on`). Other rollouts add
    nothing and are not in the mean. The form is ours, after the abstract of EASE
    (arXiv 2605.30912).

    Args:
        coefficient, layers: as in `Term`.
        heads: numbers of query heads in each layer; None or empty = all.
        kind: D: "cross_entropy", −Σ r log p̂; or "kl", "reverse_kl", "jsd" as in `rk.divergence`.
        floor: share of r that is spread over all visual tokens. "kl" needs it: it is infinite where
            the policy looks and r has no weight.
        schedule: a factor on the coefficient.

    Raises:
        ValueError: as `Term`, another kind, a floor outside of [0, 1), or "kl" without one.
        NotImplementedError: in the first step, rollouts without evidence in the batch's inputs.
    """

    name = "evidence/loss"

    def __init__(
        self,
        coefficient: float = 1.0,
        *,
        layers: Layers | None = None,
        heads: Sequence[int] | None = None,
        kind: Divergence = "cross_entropy",
        floor: float = 0.0,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(coefficient, layers=layers)
        if kind not in get_args(Divergence):
            raise ValueError(
                f"EvidenceLoss: kind must be one of {', '.join(get_args(Divergence))}; got {kind!r}"
            )
        check_floor("EvidenceLoss: floor", floor, kind)
        self.heads, self.kind, self.floor = list(heads or ()), kind, floor
        self.schedule = Schedule() if schedule is None else schedule

    def coefficient_at(self, step: int, steps: int) -> float:
        return self.coefficient * self.schedule.at(step, steps)

    def loss(self, batch: Batch) -> Tensor:
        captured, targets, of = self._compared(batch)
        return weighted_divergence(captured, targets, self._weights(of), of.view)

    def metrics(self, batch: Batch) -> dict[str, Tensor]:
        captured, targets, of = self._compared(batch)
        counted = self._weights(of) > 0
        found = {"evidence/divergence": mean_divergence(captured, targets, counted, of.view)}
        visual, evidence = of.inputs["visual"], _evidence(of)
        looks = look(captured, of.layers, of.view, visual, visual, evidence)
        share = looks.evidence[counted]
        found["evidence/share"] = torch.stack([share.sum(), counted.sum()])
        chosen = (of.inputs["evidence_share"] > 0).float()
        found["evidence/rollouts"] = torch.stack([chosen.sum(), torch.ones_like(chosen).sum()])
        return found

    def _compared(self, batch: Batch) -> tuple[Any, dict[int, Any], Batch]:
        """The captured heads, the target by layer, and the batch over its visual tokens."""
        evidence, visual = _evidence(batch), batch.inputs["visual"]
        if self.floor == 0:
            target = rk.AttentionTarget(evidence.weights[:, None], evidence.ids[:, None])
        else:
            target = rk.AttentionTarget(with_floor(evidence, visual, self.floor)[:, None])
        view = replace(batch.view, spans=None, scope=visual, kind=self.kind)
        captured = _Heads(batch.captured, self.heads) if self.heads else batch.captured
        return captured, dict.fromkeys(batch.layers, target), replace(batch, view=view)

    def _weights(self, batch: Batch) -> Tensor:
        """[B, C], the share of each token in the mean over an optimizer step."""
        share: Tensor = batch.inputs["evidence_share"]
        return batch.mask * (share / batch.accumulated)[:, None]


class _Heads:
    """A captured forward whose policies are means over some heads."""

    def __init__(self, captured: Any, heads: list[int]) -> None:
        self._captured, self._heads = captured, heads

    def _of(self, layer: int) -> Any:
        return self._captured.layer(layer).of_heads(self._heads)

    def ral_loss(self, *args: Any, layer: int, **options: Any) -> Tensor:
        loss: Tensor = self._of(layer).ral_loss(*args, **options)
        return loss

    def divergence(self, *args: Any, layer: int, **options: Any) -> Tensor:
        values: Tensor = self._of(layer).divergence(*args, **options)
        return values

    def policy(self, *, layer: int, **options: Any) -> Tensor:
        p: Tensor = self._of(layer).policy(**options)
        return p

    def marginals(self, *, layer: int, **options: Any) -> Tensor:
        marginals: Tensor = self._of(layer).marginals(**options)
        return marginals


def _evidence(batch: Batch) -> Evidence:
    missing = {"evidence_ids", "evidence_weights", "evidence_share"} - set(batch.inputs)
    if missing:
        raise NotImplementedError(
            "EvidenceLoss: batch.inputs must have evidence_ids, evidence_weights and "
            f"evidence_share, as RALTrainer gives them; it lacks {', '.join(sorted(missing))}"
        )
    return Evidence(batch.inputs["evidence_ids"], batch.inputs["evidence_weights"])


def check_floor(name: str, floor: float, kind: str) -> None:
    """Check a floor, and that "kl" has one.

    Raises:
        ValueError: it is outside of [0, 1), or 0 with "kl".
    """
    if not 0 <= floor < 1:
        raise ValueError(f"{name} must lie in [0, 1); got {floor!r}")
    if kind == "kl" and floor == 0:
        raise ValueError(
            f"{name} must be > 0 with 'kl', which is infinite where the policy looks and the "
            "evidence has no weight; got 0"
        )


def with_floor(evidence: Evidence, visual: Tensor, floor: float) -> Tensor:
    """(1 − floor) w / Σ w + floor / n over the n visual tokens: float32 [B, N].

    A row without evidence is 0.
    """
    dense = torch.zeros(visual.shape, device=visual.device)
    weights = torch.where(evidence.ids >= 0, evidence.weights, 0.0)
    dense.scatter_add_(1, evidence.ids.clamp(min=0), weights)
    dense = dense * visual
    total = dense.sum(-1, keepdim=True)
    spread = floor * visual / visual.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(total > 0, (1 - floor) * dense / total.clamp(min=1e-30) + spread, 0.0)


def evidence_share(
    chosen: Tensor, tokens: Tensor, totals: Tensor, processes: int, micro_steps: int, reduction: str
) -> Tensor:
    """What one token of each rollout weighs in a mean over an optimizer step: float32 [B].

    The mean is over the chosen rollouts of all processes. Micro-batches are added, and processes
    averaged, as TRL does. The caller divides by the micro-batches of a step.

    Args:
        chosen: bool [B].
        tokens: [B], how many tokens of each rollout count.
        totals: [2], tokens and number of the chosen rollouts of the rollout batch, on all
            processes.
        processes: how many there are.
        micro_steps: micro-batches of a rollout batch.
        reduction: "token_mean" or "sequence_mean".
    """
    if reduction == "token_mean":
        of_token = chosen / totals[0].clamp(min=1)
    else:
        of_token = chosen / (totals[1].clamp(min=1) * tokens.clamp(min=1))
    return of_token.float() * processes * micro_steps


def good_rollouts(config: RALConfig, advantages: Tensor, rewards: Tensor) -> Tensor:
    """Which rollouts the evidence term learns from: bool [B].

    Args:
        config: evidence_on and evidence_min_reward.
        advantages: [B], of the rollouts, before credit is given to tokens.
        rewards: [B], their weighted sums.
    """
    if config.evidence_on == "all":
        return torch.ones_like(rewards, dtype=torch.bool)
    if config.evidence_min_reward is None:
        return advantages > 0
    return rewards >= config.evidence_min_reward
