"""What `RALTrainer` logs and warns about: metrics by inner step, shares, times."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

import ral_kernels as rk

from . import attention_statistics, schedule
from .config import RALConfig
from .resuming import ResumableTrainer
from .terms import Batch, Term

logger = logging.get_logger(__name__)
_WARN_AGAIN = 50  # optimizer steps between two warnings of a kind
_PARTS = ("rollout", "old_policy", "update")  # of an optimizer step's time


class MeasuringTrainer(ResumableTrainer):
    """The trainer's metrics. `RALTrainer` says what each of them is."""

    model: Any
    args: RALConfig
    _layers: list[int]
    _references: Any

    def __init__(self, *positional: Any, **named: Any) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._warned: dict[str, int] = {}
        super().__init__(*positional, **named)

    def _measure(
        self, batch: Batch, terms: list[tuple[Term, Batch]],
        values: list[tuple[Term, float, Tensor]], rl_loss: Tensor,
    ) -> None:  # fmt: skip
        accumulated: int = self.current_gradient_accumulation_steps
        for term, _, value in values:
            total = self.accelerator.gather(value.detach() * accumulated).mean().item()
            self._metrics["train"][term.name].append(total)
        if self._step % self.args.gradient_accumulation_steps != 0:
            return
        inner = schedule.inner_step(self.args, self._step)
        every = self.args.attn_metrics_every
        in_detail = every > 0 and (self._generations - 1) % every == 0
        for term, of in terms:
            self._log_metrics(term, of, inner)
        if in_detail:
            if inner == 0:
                self._log_statistics(batch)
            self._log_gradient_share(rl_loss, values, inner)

    @torch.no_grad()
    def _log_metrics(self, term: Term, batch: Batch, inner: int) -> None:
        for name, sums in term.metrics(batch).items():
            total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
            mean = total / max(count, 1.0)
            self._log_inner(name, mean, inner)
            # A student may start at any distance from its teacher.
            if name == "attn/divergence" and term.reference != "teacher":
                self._warn_above(name, mean, "attn_warn_divergence")

    def _log_statistics(self, batch: Batch) -> None:
        sums = sum(
            attention_statistics.attention_statistics(
                batch.captured, layer, batch.mask, batch.inputs["visual"], batch.view
            )
            for layer in batch.layers
        )
        share, entropy, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        self._metrics["train"]["attn/visual_share"].append(share / max(count, 1.0))
        self._metrics["train"]["attn/entropy"].append(entropy / max(count, 1.0))

    def _log_gradient_share(
        self, rl_loss: Tensor, values: list[tuple[Term, float, Tensor]], inner: int
    ) -> None:
        reason = attention_statistics.can_measure_gradients(self)
        if reason is not None:
            if self._generations == 1 and inner == 0:
                logger.info("RALTrainer: attn/grad_share is not measured: %s", reason)
            return
        attention = [factor * value for term, factor, value in values if term.on_attention]
        if not attention:
            return
        parameters = [x for x in self.model.parameters() if x.requires_grad]
        ours = attention_statistics.gradient_norm(torch.stack(attention).sum(), parameters)
        theirs = attention_statistics.gradient_norm(rl_loss, parameters)
        norms = self.accelerator.gather(torch.stack([ours, theirs])[None]).square().mean(0).sqrt()
        if norms[1] == 0:  # in each group all rollouts had the same reward
            return
        share = (norms[0] / norms[1]).item()
        self._log_inner("attn/grad_share", share, inner)
        self._warn_above("attn/grad_share", share, "attn_warn_grad_share")

    def _log_inner(self, name: str, value: float, inner: int) -> None:
        self._metrics["train"][name].append(value)
        if self.args.optimizer_steps_per_generation > 1:
            self._metrics["train"][f"{name}/inner_{inner}"].append(value)

    def _log_prefixes(self, output: dict[str, Any]) -> None:
        """Log `attn/differing_prefixes` from all processes, which may share a group's rollouts."""
        ids, mask = (
            self.accelerator.gather(self.accelerator.pad_across_processes(output[name], dim=1))
            for name in ("completion_ids", "completion_mask")
        )
        differing, counted = attention_statistics.differing_prefixes(
            ids, mask, self.num_generations, own_token=self.args.attn_rows == "token"
        ).tolist()
        self._metrics["train"]["attn/differing_prefixes"].append(differing / max(counted, 1.0))

    def _warn_single_span(self, spans: rk.Spans) -> None:
        """Warn once if there is one span: attention over it is always 1, so its divergence is 0."""
        if spans.num_spans > 1 or self._warned.get("single span") is not None:
            return
        self._warned["single span"] = self.state.global_step
        logger.warning(
            "RALTrainer: every prompt of this rollout batch has one span (attn_granularity=%r, "
            "attn_scope=%r), over which attention is always 1: the attention term is zero. Use "
            "'tile' or 'token', attn_scope='context', or prompts of several images",
            self.args.attn_granularity, self.args.attn_scope,
        )  # fmt: skip

    def _warn_above(self, name: str, value: float, setting: str) -> None:
        limit = getattr(self.args, setting)
        step = self.state.global_step
        if not value > limit or step - self._warned.get(name, -_WARN_AGAIN) < _WARN_AGAIN:
            return
        self._warned[name] = step
        if self.accelerator.is_main_process:
            logger.warning(
                "RALTrainer: %s is %.3g at step %d, above %s=%g: the attention term runs away. "
                "Lower attn_coef (distill_attn_coef, attn_explore_coef) or learning_rate, or take "
                "fewer optimizer steps on a rollout batch (num_iterations, steps_per_generation)",
                name, value, step, setting, limit,
            )  # fmt: skip

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        """Count the seconds of a block, less those of blocks inside."""
        inside = sum(self._seconds.values())
        started = time.perf_counter()
        try:
            yield
        finally:
            inner = sum(self._seconds.values()) - inside
            self._seconds[what] += time.perf_counter() - started - inner

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        with self._timed("update"):
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self._step % self.current_gradient_accumulation_steps == 0:
            for what in _PARTS:
                self._metrics["train"][f"time/{what}"].append(self._seconds[what])
            self._seconds.clear()
        return loss
