"""What `RALTrainer` does with where a rollout looked: a reward, credit, and the evidence's weights.

What happens to a rollout batch, in TRL's order:

1. Rollouts are written. With `resample_equal_groups` they are rewarded, without attention.
2. The old policy's forward runs over them. `looking` measures where it attends.
3. Reward functions run. `_complete_rewards` puts the attention reward into its column.
4. TRL makes advantages of the groups' rewards: it needs no change.
5. `_place_evidence` and `_give_credit` add to the batch what terms and tokens get.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from . import evidence, losses
from .config import RALConfig
from .looking import (
    Evidence,
    Looks,
    attention_reward,
    credit_weights,
    look,
    without_sinks,
)
from .metrics import MeasuringTrainer
from .objectives import EvidenceLoss, evidence_share, good_rollouts


def check_evidence(rows: Any) -> None:
    """Check that a training set says where its evidence is. A streamed set is not read.

    Raises:
        ValueError: it has columns, and `evidence` is none of them, or has nothing in any row.
    """
    asked = (
        "RALTrainer: evidence_coef > 0, attention_reward > 0 and credit='evidence' need a column "
        "`evidence` in the training set"
    )
    columns = getattr(rows, "column_names", None)
    if columns is not None and "evidence" not in columns:
        raise ValueError(f"{asked}; got {', '.join(columns)}")
    if isinstance(rows, Dataset) and not any(map(bool, rows["evidence"])):
        raise ValueError(f"{asked}; got {len(rows)} rows, none of which has evidence")


class CreditingTrainer(MeasuringTrainer):
    """The trainer's measurements of looking, and what is made of them."""

    _terms: Any
    tools: Any

    def __init__(
        self, model: Any, reward_funcs: Any, args: RALConfig, *positional: Any, **named: Any
    ) -> None:
        self._rows: list[dict[str, Any]] = []  # of the rollout batch being made
        self._evidence: Evidence | None = None  # of these rows
        self._looks: Looks | None = None  # of the old policy
        self._attention_rewards: Tensor | None = None  # [B], of these rows
        self._rewards = torch.zeros(0)  # [B], weighted sums
        self._after_forward: Callable[[], None] | None = None  # of an update
        with self._rewarding_attention(reward_funcs, args, named) as functions:
            super().__init__(model, functions, args, *positional, **named)
        if args.attention_reward > 0 and self.tools:
            raise ValueError(
                "RALTrainer: attention_reward > 0 is not supported with tools: what they return "
                "would count as the response's"
            )

    def _forget_rollouts(self, rows: list[dict[str, Any]]) -> None:
        """Begin a rollout batch of these rows."""
        self._rows = rows
        self._evidence = self._looks = self._attention_rewards = None

    # -- the reward ------------------------------------------------------------------------------

    @contextmanager
    def _rewarding_attention(
        self, given: Any, args: RALConfig, named: dict[str, Any]
    ) -> Iterator[Any]:
        """One more reward function, with its weight, while TRL reads those that were given."""
        if args.attention_reward == 0:
            yield given
            return
        functions = list(given) if isinstance(given, list) else [] if given is None else [given]
        self._attention_column = len(functions)
        weights = args.reward_weights
        own = [1.0] * len(functions) if weights is None else weights
        args.reward_weights = [*own, args.attention_reward]
        processors = named.get("reward_processing_classes")
        if isinstance(processors, list):
            named["reward_processing_classes"] = [*processors, None]

        def attention(completions: list[Any], **columns: Any) -> list[float | None]:
            # In training `_complete_rewards` puts it in; evaluation does not measure it.
            return [0.0 if self.model.training else None] * len(completions)

        try:
            yield [*functions, attention]
        finally:
            args.reward_weights = weights

    def _complete_rewards(self, rewards: Tensor) -> Tensor:
        """The rewards of a rollout batch, with those that the old policy's forward gave.

        Here alone the attention reward reaches the advantages, which TRL makes of the result.

        Args:
            rewards: [rollouts, functions] of all processes.
        """
        if self._attention_rewards is not None:
            rewards = rewards.clone()
            rewards[:, self._attention_column] = self.accelerator.gather(self._attention_rewards)
        weighted = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        share = len(weighted) // self.accelerator.num_processes
        first = self.accelerator.process_index * share
        self._rewards = weighted[first : first + share]
        return rewards

    def _reward_attention(
        self, looks: Looks, place: Evidence | None, visual: Tensor, mask: Tensor
    ) -> None:
        """Keep where the old policy looked, and what it is rewarded for that.

        Args:
            looks: of the rollout batch, whose evidence is at `place`.
            visual: bool [B, N].
            mask: [B, C], 1 for the responses' tokens.
        """
        self._looks = looks
        if self.args.attention_reward > 0:
            assert place is not None  # the setting needs evidence
            self._attention_rewards = attention_reward(looks, place, visual, mask)

    # -- evidence --------------------------------------------------------------------------------

    def _find_evidence(self, ids: Tensor, mask: Tensor, fields: dict[str, Any]) -> Evidence:
        """The evidence of the rollout batch being made, once."""
        if self._evidence is None:
            self._evidence = evidence.locate(
                self._rows, self.model.config, ids, mask, fields, self.args.evidence_sigma
            )
        return self._evidence

    def _place_evidence(self, output: dict[str, Any], ids: Tensor, mask: Tensor) -> None:
        """Add the evidence to a rollout batch, and what its rollouts weigh in the term's mean."""
        if not self._needs_evidence:
            return
        place = self._find_evidence(ids, mask, output)
        output["evidence_ids"], output["evidence_weights"] = place
        chosen = place.given & good_rollouts(self.args, output["advantages"], self._rewards)
        tokens = _response_mask(output).sum(-1)
        totals = torch.stack([(chosen * tokens).sum(), chosen.sum()]).float()
        output["evidence_share"] = evidence_share(
            chosen, tokens, self.accelerator.reduce(totals, reduction="sum"),
            self.accelerator.num_processes, self.args.steps_per_generation,
            self.args.attn_reduction,
        )  # fmt: skip

    @property
    def _needs_evidence(self) -> bool:
        own = any(isinstance(term, EvidenceLoss) for term in self._terms.terms)
        return own or self.args.needs_evidence

    # -- credit ----------------------------------------------------------------------------------

    def _give_credit(self, batch: dict[str, Any], looks: Looks) -> None:
        """Weigh the advantages of a response's tokens by where they look."""
        mask = _response_mask(batch)
        share = looks.visual if self.args.credit == "looking" else looks.evidence
        weights = credit_weights(share, mask, self.args.credit_top_share)
        batch["advantages"] = batch["advantages"][:, None] * weights
        count = mask.sum(-1)
        spread = weights.sum(-1).square() / (count * weights.square().sum(-1)).clamp(min=1e-30)
        self._log_mean("credit/tokens", torch.stack([spread.sum(), (count > 0).sum()]))

    def _credit_update(self, inputs: dict[str, Any], captured: Any) -> None:
        """Give credit in the update's own forward, where none of the old policy ran.

        Such a schedule takes one step on a rollout batch: the policy is the old one. TRL reads
        `inputs["advantages"]` after the forward.
        """
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        length = inputs["completion_ids"].shape[1]
        view = losses.view_of(self.args, mask.shape[1] - length, length)
        visual = inputs["visual"]
        kept = without_sinks(mask, visual, self.args.credit_sinks)
        place = None
        if "evidence_ids" in inputs:
            place = Evidence(inputs["evidence_ids"], inputs["evidence_weights"])
        looks = look(captured, self._layers, view, visual, kept, place)
        self._log_looks(looks, inputs)
        self._give_credit(inputs, looks)

    def _log_looks(self, looks: Looks, batch: dict[str, Any]) -> None:
        mask = _response_mask(batch).bool()
        for name, values in looks._asdict().items():
            counted = mask
            if name == "evidence":
                if "evidence_ids" not in batch:
                    continue
                place = Evidence(batch["evidence_ids"], batch["evidence_weights"])
                counted = mask & place.given[:, None]
            self._log_mean(f"looking/{name}", torch.stack([values[counted].sum(), counted.sum()]))

    def _log_mean(self, name: str, sums: Tensor) -> None:
        """Log a mean over all processes, from the [sum, count] of this one."""
        total, count = self.accelerator.reduce(sums.float(), reduction="sum").tolist()
        self._metrics["train"][name].append(total / max(count, 1.0))


def _response_mask(batch: dict[str, Any]) -> Tensor:
    """[B, C], 1 for the tokens that the policy wrote."""
    mask: Tensor = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask
