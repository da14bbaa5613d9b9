"""GRPO with the attention terms of `ral`, on the study's own decoder.

It does what `ral.RALTrainer` does, in its order and with its terms, for one process and one model.
The prompts of a run are encoded once, and a prompt runs once for all of its rollouts.
`tests/benchmarks/test_engine.py` compares losses, gradients and weights with the trainer's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import get_scheduler

import ral_kernels as rk
from ral import RALConfig, losses, schedule
from ral.attention_statistics import differing_prefixes, gradient_norm
from ral.configured import terms_of
from ral.exploration import draw_bias
from ral.looking import (
    Evidence,
    Looks,
    attention_reward,
    credit_weights,
    joined,
    looking,
    without_sinks,
)
from ral.objectives import evidence_share, good_rollouts
from ral.references import References
from ral.rollouts import media_tokens
from ral.terms import ATTENTION, Batch, Role, Terms, check_references

from .decoder import Decoder, Past, Tokens
from .prompts import Prompts, find_evidence, spans_of

# Settings of TRL that the loss here has no other form for.
_ONLY: dict[str, Any] = {
    "loss_type": "dapo", "importance_sampling_level": "token", "scale_rewards": "group",
    "multi_objective_aggregation": "sum_then_normalize", "gradient_accumulation_steps": 1,
    "delta": None, "top_entropy_quantile": 1.0, "entropy_coef": 0.0, "top_k": 0, "top_p": 1.0,
    "min_p": None, "repetition_penalty": 1.0, "mask_truncated_completions": False,
    "use_bias_correction_kl": True, "weight_decay": 0.0, "credit_top_share": 1.0,
    "resample_equal_groups": 0, "router_coef": 0.0, "warmup_steps": 0,
}  # fmt: skip


@dataclass
class Rollouts:
    """B rollouts, in any order.

    Attributes:
        prompt: int64 [B], the number of each rollout's prompt.
        width: tokens of a prompt, padded.
        ids: int64 [B, C].
        mask: bool [B, C], the responses' tokens.
        inputs: what `ral.terms.Batch` has as inputs: advantages, rollout_index, visual, ...
        begun: of `Engine._begin` by the policy that wrote them, without gradients; or None.
    """

    prompt: Tensor
    width: int
    ids: Tensor
    mask: Tensor
    inputs: dict[str, Tensor]
    begun: tuple[Tokens, Past | None] | None = None

    def rows(self, index: Tensor) -> Rollouts:
        """Some of the rollouts."""
        inputs = {name: x[index] if x.dim() else x for name, x in self.inputs.items()}
        return Rollouts(self.prompt[index], self.width, self.ids[index], self.mask[index], inputs)


class Engine:
    """Trains a decoder on prompts, one after another.

    Args:
        policy: what is trained.
        config: the settings. Those that this engine has no form for are refused.
        prompts, rows: the prompts and their rows, one for each group of rollouts.
        tokenizer: of the responses.
        suppressed: tokens that no response may hold.
        reward: as TRL calls it.
        teacher: for the terms that compare with one; it is frozen.
        control: what is done to the advantages that attention terms see; see `Arm`.

    Attributes:
        log: what each rollout batch gave: by name, a list.

    Raises:
        NotImplementedError: a setting that it does not support.
    """

    def __init__(
        self,
        policy: Decoder,
        config: RALConfig,
        prompts: Prompts,
        rows: Sequence[Mapping[str, Any]],
        tokenizer: Any,
        reward: Callable[..., list[float]],
        *,
        suppressed: Sequence[int] = (),
        teacher: Decoder | None = None,
        control: str | None = None,
    ) -> None:
        for name, wanted in _ONLY.items():
            got = getattr(config, name)
            if got != wanted:
                raise NotImplementedError(f"Engine: {name} must be {wanted!r}; got {got!r}")
        terms = terms_of(config)
        check_references(terms, config, teacher)
        self.policy, self.config, self.prompts, self.rows = policy, config, prompts, rows
        self._tokenizer, self._reward = tokenizer, reward
        self._allowed = torch.zeros(policy.lm_head.out_features)  # added to logits
        self._allowed[list(suppressed)] = float("-inf")
        self.teacher, self._control = teacher, control
        if teacher is not None:
            teacher.requires_grad_(False)
        self.reference: Decoder | None = None
        if config.beta > 0:
            self.reference = copy.deepcopy(policy).requires_grad_(False)
            if control == "random":
                _scramble(self.reference, config.seed)
        self._references = References()
        assert config.attn_layers is not None  # RALConfig has put the last one
        self._terms = Terms(terms, policy, config.attn_layers, self._references)
        self._generator = torch.Generator(policy.device).manual_seed(config.seed)
        self._evidence: Evidence | None = None
        if config.needs_evidence:
            self._evidence = find_evidence(prompts, rows, policy.config, config.evidence_sigma)
        self._spans: rk.Spans | None = None
        if config.attn_granularity != "token":
            self._spans, self._text_span = spans_of(prompts, policy.config, config)
        self._parameters = list(policy.parameters())
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=config.learning_rate, weight_decay=0.0, fused=True,
            betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon,
        )  # fmt: skip
        self._scheduler = get_scheduler(
            config.lr_scheduler_type, self._optimizer, 0, config.max_steps
        )
        self.steps = self.batches = 0
        self.log: dict[str, list[float]] = {}
        policy.train()

    # -- a run -----------------------------------------------------------------------------------

    def train(self, on_batch: Callable[[int], object] | None = None) -> None:
        """Run `max_steps` optimizer steps.

        Args:
            on_batch: called after each rollout batch with how many there were.
        """
        while self.steps < self.config.max_steps:
            self.one_batch()
            if on_batch is not None:
                on_batch(self.batches)

    def one_batch(self) -> None:
        """Write and reward rollouts of the next prompts, and run the optimizer steps on them."""
        groups = self.config.generation_batch_size // self.config.num_generations
        first = self.batches * groups
        self.update(self.roll_out(torch.arange(first, first + groups) % len(self.prompts)))

    def update(self, rollouts: Rollouts) -> None:
        """The optimizer steps on a rollout batch."""
        order = torch.randperm(len(rollouts.prompt), generator=self._generator)
        parts = [
            rollouts.rows(index) for index in order.chunk(self.config.steps_per_generation or 1)
        ]
        self._references.split([part.inputs["rollout_index"] for part in parts])
        for _ in range(self.config.num_iterations):
            for part in parts:
                self.step(part)
        self.batches += 1

    def step(self, part: Rollouts) -> None:
        """One optimizer step, on a minibatch."""
        self.loss(part).backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, self.config.max_grad_norm, foreach=True)
        self._advance()

    def _advance(self) -> None:
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad()
        self.steps += 1

    # -- rollouts --------------------------------------------------------------------------------

    def roll_out(self, rows: Tensor) -> Rollouts:
        """Write, reward and measure a rollout batch.

        Args:
            rows: int64, the prompts, each for a group.
        """
        config = self.config
        prompt = rows.repeat_interleave(config.num_generations)
        width = self.prompts.longest(rows)
        inputs = {"rollout_index": torch.arange(len(prompt))}
        if config.explores:
            assert self._spans is not None
            of_prompts = rk.Spans(self._spans.ids[prompt, -width:], self._spans.num_spans)
            inputs["explore_bias"] = draw_bias(
                config.attn_explore_sigma, len(self._terms.layers), of_prompts,
                self.prompts.visual[prompt, -width:], self._generator,
            )  # fmt: skip
        return self.score(self._write(prompt, width, inputs))

    def _write(self, prompt: Tensor, width: int, inputs: dict[str, Tensor]) -> Rollouts:
        end, pad = self._tokenizer.eos_token_id, self._tokenizer.pad_token_id
        with torch.no_grad(), ExitStack() as stack:
            if "explore_bias" in inputs:
                assert self._spans is not None
                spans = rk.Spans(self._spans.ids[prompt, -width:], self._spans.num_spans)
                for number, layer in enumerate(self._terms.layers):
                    bias = inputs["explore_bias"][:, number]
                    stack.enter_context(rk.steer(self.policy, bias, spans=spans, layers=layer))
            begun = self._begin(self.policy, prompt, width, "explore_bias" in inputs)
            ids = self.policy.generate(
                *begun, self.prompts.start[prompt], self._sample,
                longest=self.config.max_completion_length, end=end, pad=pad,
            )  # fmt: skip
        ended = (ids == end).long().cumsum(-1)
        mask = (ended - (ids == end).long()) == 0
        return Rollouts(prompt, width, torch.where(mask, ids, pad), mask, inputs, begun)

    def _sample(self, logits: Tensor) -> Tensor:
        p = torch.add(self._allowed, logits, alpha=1 / self.config.temperature).softmax(-1)
        # One draw a row, where multinomial draws one for each token of the vocabulary.
        below = p.cumsum(-1)
        drawn = torch.rand(len(p), 1, generator=self._generator) * below[:, -1:]
        chosen = torch.searchsorted(below, drawn, right=True)[:, 0]
        return chosen.clamp(max=p.shape[1] - 1)  # where a draw rounds to the whole

    def score(self, rollouts: Rollouts) -> Rollouts:
        """Measure rollouts with the old policy and others, reward them, and say what each is for.

        Args:
            rollouts: with a prompt's rollouts side by side.
        """
        config, inputs = self.config, rollouts.inputs
        visual = self.prompts.visual[rollouts.prompt, -rollouts.width :]
        inputs["visual"] = functional.pad(visual, (0, rollouts.mask.shape[1]))
        self._references.clear()
        self._place_evidence(rollouts)
        looks: Looks | None = None
        if schedule.runs_old_policy(config):
            inputs["old_per_token_logps"], looks = self._look(self.policy, "old", rollouts)
        if self.reference is not None:
            inputs["ref_per_token_logps"], _ = self._look(self.reference, "ref", rollouts)
        rewards = self._rewards(rollouts, looks)
        grouped = rewards.view(-1, config.num_generations)
        spread = grouped.std(1, keepdim=True) + 1e-4
        advantages = ((grouped - grouped.mean(1, keepdim=True)) / spread).flatten()
        inputs["num_items_in_batch"] = rollouts.mask.sum()
        self._weigh_evidence(rollouts, advantages, rewards)
        inputs["advantages"] = advantages
        if config.credit != "uniform":
            assert looks is not None
            share = looks.visual if config.credit == "looking" else looks.evidence
            inputs["advantages"] = advantages[:, None] * credit_weights(share, rollouts.mask)
        if self.teacher is not None:
            self._look(self.teacher, "teacher", rollouts)
        self._note("reward", rewards.mean())
        differing, counted = differing_prefixes(
            rollouts.ids, rollouts.mask, config.num_generations,
            own_token=config.attn_rows == "token",
        )  # fmt: skip
        self._note("attn/differing_prefixes", differing / counted.clamp(min=1))
        return rollouts

    @torch.no_grad()
    def _look(self, model: Decoder, role: Role, rollouts: Rollouts) -> tuple[Tensor, Looks | None]:
        """A forward over rollouts, from which the terms take; log-probabilities [B, C], looks."""
        config, inputs = self.config, rollouts.inputs
        view = self._view(rollouts, self._spans_of(rollouts))
        looks = role == "old" and config.looks
        with ExitStack() as stack:
            if "explore_bias" in inputs and role != "teacher":
                self._steer(stack, model, rollouts)
            stack.enter_context(self._terms.taking(role, model, view))
            if looks:
                visual = inputs["visual"]
                kept = without_sinks(self._key_mask(rollouts), visual, config.credit_sinks)
                seen = stack.enter_context(
                    looking(model, self._terms.layers, view, visual, kept, _evidence(inputs))
                )
            begun = rollouts.begun if role == "old" else None
            hidden = self._hidden(model, rollouts, begun)
        flat = self._log_probabilities(model, hidden, rollouts)
        logps = flat.new_zeros(rollouts.mask.shape).masked_scatter_(rollouts.mask, flat)
        return logps, joined(seen) if looks else None

    def _rewards(self, rollouts: Rollouts, looks: Looks | None) -> Tensor:
        """float32 [B], weighted sums."""
        # Most rollouts of a group say the same.
        ids = torch.cat([rollouts.prompt[:, None], rollouts.ids], 1)
        different, of = torch.unique(ids, dim=0, return_inverse=True)
        rows = [self.rows[number] for number in different[:, 0].tolist()]
        said = self._tokenizer.batch_decode(different[:, 1:], skip_special_tokens=True)
        rewards = torch.tensor(
            self._reward(
                completions=[[{"role": "assistant", "content": text}] for text in said],
                **{name: [row[name] for row in rows] for name in ("solution", "problem_type")},
            ),
            dtype=torch.float32,
        )[of]
        if self.config.attention_reward > 0:
            assert looks is not None
            place = _evidence(rollouts.inputs)
            assert place is not None
            given = attention_reward(looks, place, rollouts.inputs["visual"], rollouts.mask)
            rewards = rewards + self.config.attention_reward * given.nan_to_num(0.0)
        return rewards

    # -- evidence --------------------------------------------------------------------------------

    def _place_evidence(self, rollouts: Rollouts) -> None:
        if self._evidence is None:
            return
        ids = self._evidence.ids[rollouts.prompt]
        cut = self.prompts.mask.shape[1] - rollouts.width
        rollouts.inputs["evidence_ids"] = torch.where(ids >= 0, ids - cut, -1)
        rollouts.inputs["evidence_weights"] = self._evidence.weights[rollouts.prompt]

    def _weigh_evidence(self, rollouts: Rollouts, advantages: Tensor, rewards: Tensor) -> None:
        place = _evidence(rollouts.inputs)
        if place is None:
            return
        if self._control == "shuffled":
            advantages = advantages[self._shuffled(len(advantages))]
        chosen = place.given & good_rollouts(self.config, advantages, rewards)
        tokens = rollouts.mask.sum(-1)
        totals = torch.stack([(chosen * tokens).sum(), chosen.sum()]).float()
        parts = self.config.steps_per_generation or 1
        rollouts.inputs["evidence_share"] = evidence_share(
            chosen, tokens, totals, 1, parts, self.config.attn_reduction
        )

    # -- the loss --------------------------------------------------------------------------------

    def loss(self, part: Rollouts) -> Tensor:
        """The loss of a minibatch, eq. (3) and (4) of `RALConfig`."""
        config, inputs = self.config, part.inputs
        mask = part.mask
        spans = self._spans_of(part)
        with ExitStack() as stack:
            if "explore_bias" in inputs:
                spans = self._steer(stack, self.policy, part)
            captured = stack.enter_context(self._terms.capturing(self.policy))
            hidden = self._hidden(self.policy, part)
        logps = self._log_probabilities(self.policy, hidden, part)
        normaliser = inputs["num_items_in_batch"].clamp(min=1) / (config.steps_per_generation or 1)
        policy_loss = self._policy_loss(logps, part) / normaliser
        weighted_normaliser: Tensor | float = normaliser
        if config.attn_reduction == "sequence_mean":
            weighted_normaliser = float(len(mask))
        advantages = self._controlled(inputs["advantages"])
        batch = Batch(
            captured=captured[ATTENTION],
            layers=self._terms.layers,
            references={},
            advantages=advantages[:, None] if advantages.dim() == 1 else advantages,
            mask=mask,
            weights=losses.token_weights(mask, config.attn_reduction, weighted_normaliser),
            num_tokens=normaliser,
            view=self._view(part, spans),
            inputs=inputs,
            model=self.policy,
            teacher=self.teacher,
        )
        found = self._terms.seen(captured, batch, inputs["rollout_index"])
        terms = [
            (term, term.coefficient_at(self.steps, config.max_steps), of) for term, of in found
        ]
        values = [
            (term.on_attention, factor * term.loss(of)) for term, factor, of in terms if factor > 0
        ]
        rl_loss = config.rl_coef * policy_loss
        every = config.attn_metrics_every
        if every > 0 and self.batches % every == 0:
            self._measure(found, [value for on, value in values if on], rl_loss)
        return torch.stack([rl_loss, *(value for _, value in values)]).sum()

    def _policy_loss(self, logps: Tensor, part: Rollouts) -> Tensor:
        """Σ over tokens of GRPO's clipped loss, and of β times KL."""
        config, inputs, mask = self.config, part.inputs, part.mask
        advantages = inputs["advantages"]
        if advantages.dim() == 1:
            advantages = advantages[:, None].expand_as(mask)
        advantages = advantages[mask]
        old = inputs.get("old_per_token_logps")
        ratio = (logps - (logps.detach() if old is None else old[mask])).exp()
        high = config.epsilon if config.epsilon_high is None else config.epsilon_high
        clipped = ratio.clamp(1 - config.epsilon, 1 + high)
        loss = -torch.min(ratio * advantages, clipped * advantages)
        if config.beta > 0:
            gap = inputs["ref_per_token_logps"][mask] - logps
            kl = gap.exp() - gap - 1
            loss = loss + config.beta * kl * ratio
            self._note("kl", kl.mean())
        return loss.sum()

    def _controlled(self, advantages: Tensor) -> Tensor:
        if self._control == "flipped":
            return -advantages
        if self._control == "shuffled":
            return advantages[self._shuffled(len(advantages))]
        return advantages

    def _shuffled(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self._generator)

    def _measure(self, found: Any, attention: list[Tensor], rl_loss: Tensor) -> None:
        with torch.no_grad():
            for term, of in found:
                for name, sums in term.metrics(of).items():
                    self._note(name, sums[0] / sums[1].clamp(min=1))
        if not attention:
            return
        ours = gradient_norm(torch.stack(attention).sum(), self._parameters)
        theirs = gradient_norm(rl_loss, self._parameters)
        if theirs > 0:  # in some group rewards differ
            self._note("attn/grad_share", ours / theirs)

    def _note(self, name: str, value: Tensor) -> None:
        self.log.setdefault(name, []).append(float(value.detach()))

    # -- forwards --------------------------------------------------------------------------------

    def _hidden(self, model: Decoder, rollouts: Rollouts, begun: Any = None) -> Tensor:
        """[B, rows, hidden size]: the last token of the prompt, or all of it, and the response."""
        ids, mask = rollouts.ids, rollouts.mask
        later = torch.arange(ids.shape[1]) + self.prompts.start[rollouts.prompt][:, None]
        response = model.text(ids, mask, later)
        noisy = "explore_bias" in rollouts.inputs
        tokens, past = begun or self._begin(model, rollouts.prompt, rollouts.width, noisy)
        rows: Tokens = tokens.then(response)
        hidden: Tensor = model(**rows._asdict(), past=past).last_hidden_state
        return hidden

    def _begin(
        self, model: Decoder, prompt: Tensor, width: int, noisy: bool
    ) -> tuple[Tokens, Past | None]:
        """The tokens of each rollout's prompt that are its own, and what is before them."""
        if noisy:  # each rollout has noise of its own in its prompt, too
            return self.prompts.tokens(model, prompt, width), None
        return self.prompts.begun(model, prompt, width)

    def _log_probabilities(self, model: Decoder, hidden: Tensor, rollouts: Rollouts) -> Tensor:
        """[tokens of responses], in their order."""
        length = rollouts.mask.shape[1]
        predicting = hidden[:, -length - 1 : -1][rollouts.mask]
        logits = model.lm_head(predicting) / self.config.temperature
        return -functional.cross_entropy(logits, rollouts.ids[rollouts.mask], reduction="none")

    def _view(self, rollouts: Rollouts, spans: rk.Spans | None) -> losses.PolicyView:
        own = rollouts.width if "explore_bias" in rollouts.inputs else 1
        scope = None
        if self.config.attn_scope == "visual" and spans is None:
            scope = rollouts.inputs["visual"]
        return losses.view_of(self.config, own, rollouts.mask.shape[1], spans, scope)

    def _key_mask(self, rollouts: Rollouts) -> Tensor:
        """bool [B, N]."""
        of_prompts = self.prompts.mask[rollouts.prompt, -rollouts.width :]
        return torch.cat([of_prompts, rollouts.mask], 1)

    def _spans_of(self, rollouts: Rollouts) -> rk.Spans | None:
        """Over the N keys; what is written belongs to the text."""
        if self._spans is None:
            return None
        of_prompts = self._spans.ids[rollouts.prompt, -rollouts.width :]
        written = torch.where(rollouts.mask, self._text_span, -1).to(of_prompts.dtype)
        return rk.Spans(torch.cat([of_prompts, written], 1), self._spans.num_spans)

    def _steer(self, stack: ExitStack, model: Decoder, rollouts: Rollouts) -> rk.Spans:
        """Run `model` under the rollouts' noise; the spans that the steer has."""
        spans = self._spans_of(rollouts)
        assert spans is not None
        bias = rollouts.inputs["explore_bias"]
        for number, layer in enumerate(self._terms.layers):
            stack.enter_context(rk.steer(model, bias[:, number], spans=spans, layers=layer))
        return spans


def _scramble(model: Decoder, seed: int) -> None:
    """Let the entries of each layer's weights of queries, keys and values change places."""
    generator = torch.Generator(model.device).manual_seed(seed)
    for name, weight in model.named_parameters():
        if name.endswith("qkv_proj.weight"):
            order = torch.randperm(weight.numel(), generator=generator)
            weight.data = weight.flatten()[order].view_as(weight)


def _evidence(inputs: Mapping[str, Tensor]) -> Evidence | None:
    if "evidence_ids" not in inputs:
        return None
    return Evidence(inputs["evidence_ids"], inputs["evidence_weights"])


def suppressed_tokens(config: Any, processor: Any) -> list[int]:
    """The tokens of media, which `RALTrainer` keeps out of rollouts."""
    size = config.get_text_config().vocab_size
    tokens = media_tokens(config, processor) - {processor.tokenizer.eos_token_id}
    return sorted(token for token in tokens if token < size)
