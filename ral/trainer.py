"""`RALTrainer`: TRL's GRPO trainer with the attention terms of eq. (3) and (4)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers.utils import logging

import ral_kernels as rk

from . import losses, rollouts, schedule
from .attention_maps import LogsAttentionMaps
from .config import RALConfig
from .configured import terms_of
from .crediting import CreditingTrainer, check_evidence
from .distillation import check_teacher, load_teacher, pair_layers
from .exploration import check_can_explore, draw_bias, steered
from .fsdp import gathered_head
from .looking import joined, looking, without_sinks
from .references import References
from .resampling import Resampler, equal_groups
from .rewards.tags import rendered_end
from .terms import ATTENTION, Batch, Role, Term, Terms, check_references
from .validation import Validates
from .vision import (
    VisionLayout,
    blank_for,
    has_images,
    image_lists,
    lay_out,
    without_empty_images,
)

logger = logging.get_logger(__name__)


class RALTrainer(Validates, CreditingTrainer):
    """GRPO with Reinforced Attention Learning, and On-Policy Attention Distillation.

    TRL's `GRPOTrainer` does the rest as usual: rollouts, advantages, KL, LoRA, checkpoints,
    logging, DDP, FSDP. This class adds to its loss the terms of eq. (3) and (4), of
    arXiv 2602.04884 (`RALConfig`). q and k of the chosen layers are captured in the trainer's own
    forwards, under any attention of the model; those of the old policy are kept as snapshots. The
    loss is computed in float32.

    Metrics, besides TRL's:
        attn/divergence, attn/divergence/inner_<i>: mean divergence from the reference policy
            (nats), also by optimizer step on the rollout batch. From the first micro-batch of each
            step.
        attn/loss, distill/attention, distill/logits, explore/loss, evidence/loss: the terms,
            unweighted.
        evidence/divergence, evidence/share, evidence/rollouts: of the evidence term: mean
            divergence (nats), share of attention on evidence, of that on visual tokens, and share
            of the rollouts that it learns from.
        looking/visual, looking/evidence, looking/entropy: where rollouts looked (`Looks`), with
            attention_reward or credit.
        credit/tokens: (Σ w)² / (n Σ w²), the share of a response's tokens that have its credit.
        router/loss, router/divergence, router/load, router/dead: with router_coef (`RouterLoss`).
        attn/grad_share, attn/grad_share/inner_<i>: ‖∇ weighted attention terms‖ / ‖∇ GRPO‖, of the
            first micro-batch of a step and of this process, every `attn_metrics_every` batches.
        attn/visual_share, attn/entropy: share of the policy's attention on images, and its entropy
            over keys (nats), every `attn_metrics_every` batches.
        attn/differing_prefixes: share of response tokens whose prefix differs within the group;
            the others have no RAL signal.
        groups/equal: groups of a rollout batch whose rewards are all equal: they have no gradient.
            With `resample_equal_groups` also groups/drawn, the further prompts that were drawn for
            it, and groups/left_equal.
        time/rollout, time/old_policy, time/update: seconds of an optimizer step.
        eval_reward, eval_accuracy, ...: of evaluations (`Validates`).

    Args:
        model, reward_funcs, args, ...: as in `GRPOTrainer`; args is a `RALConfig`.
        teacher_model: a frozen model, or its path, for the terms that compare with a teacher. It
            must read the same tokens and cut images in the same way. Depth, heads and head dim may
            differ.
        terms: more terms of the loss, after those of args.

    Raises:
        TypeError: args is not a `RALConfig`, or a term not a `Term`.
        ValueError: a teacher is missing or not needed, or it reads rollouts differently; two terms
            have one name, or a term compares with what this schedule does not have.
        NotImplementedError: the model's decoder layers are not found, or not usable.
    """

    _tag_names: ClassVar = ["trl", "grpo", "ral"]
    _name = "RAL"
    log_multimodal: bool

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: RALConfig | None = None,
        *positional: Any,
        teacher_model: str | nn.Module | None = None,
        terms: Sequence[Term] = (),
        **named: Any,
    ) -> None:
        if not isinstance(args, RALConfig):
            raise TypeError(f"RALTrainer: args must be a RALConfig; got {type(args).__name__}")
        terms = [*terms_of(args), *terms]
        check_references(terms, args, teacher_model)
        self.teacher_model: Any = None
        self._references = References(args.attn_snapshot_device)
        self._rolling_out = False
        self._generations = 0  # rollout batches so far
        self._bias: Any = None  # [B, layers, S] of the rollout batch being made, if it explores
        self._num_spans = 0
        self._needs_images = True  # unless there is a column of images: a batch may have none
        super().__init__(model, reward_funcs, args, *positional, **named)
        # For its table TRL gathers images in processes that have any: the others would not join.
        self._tables_images = self.log_multimodal and self.log_completions and not self.tools
        self.log_multimodal = self.log_multimodal and bool(self.tools)
        self._blank = blank_for(self)
        self._resampler: Resampler | None = None
        if args.resample_equal_groups > 0:
            self._resampler = Resampler(self, args.resample_equal_groups)
        rollouts.keep_media_out(self)
        self._unexpanded = rollouts.UnexpandedPrompts(self)
        if args.use_vllm and self._is_vlm:
            rollouts.forget_images(self)
            if args.vllm_mode == "server":
                rollouts.check_server_images(self)
            else:
                engine = self.vllm_generation
                engine.generate = self._unexpanded.around(engine.generate)
        self._agrees = not args.use_vllm or not rollouts.samples_the_whole_distribution(self)
        # TRL pads prompts on the left, but takes token types as the processor pads them. On another
        # side, image positions would be wrong in a batch of prompts of different lengths.
        self._tokenizer.padding_side = "left"
        if args.explores:
            check_can_explore(self)
        # It raises now, and not in the first step, if the layers cannot be captured.
        assert args.attn_layers is not None  # RALConfig has put the last one
        self._terms = Terms(terms, self.model, args.attn_layers, self._references)
        self._layers = self._terms.layers
        if self._needs_evidence:
            check_evidence(self.train_dataset)
        if teacher_model is not None:
            self._set_up_teacher(teacher_model)
        if args.attn_map_every > 0:
            self.add_callback(LogsAttentionMaps(self))
        if schedule.stands_still(args) and len(self._terms) == 1:
            logger.warning(
                "RALTrainer: rl_coef=0 with attn_reference='old': the policy's divergence from "
                "itself has no gradient, and nothing else moves it: no weight will change"
            )
        if not args.disable_dropout and args.attn_coef > 0:
            logger.warning(
                "RALTrainer: disable_dropout=False: the old policy's attention is drawn with "
                "dropout, and differs from the policy's by that noise"
            )

    # -- the teacher -----------------------------------------------------------------------------

    def _set_up_teacher(self, teacher: Any) -> None:
        unwrapped = self.accelerator.unwrap_model(self.model)
        teacher = load_teacher(teacher, self.args, unwrapped.dtype)
        on_tokens = self.args.distill_logit_coef > 0
        check_teacher(unwrapped, teacher, self.processing_class, on_tokens=on_tokens)
        depths = [m.config.get_text_config().num_hidden_layers for m in (teacher, unwrapped)]

        def pair(term: Term, layers: list[int]) -> list[int]:
            wanted = self.args.distill_teacher_layers if term.layers is None else None
            return pair_layers(layers, wanted, *depths)

        self._terms.pair("teacher", pair)
        self.teacher_model = self._prepare_frozen(teacher)

    def _prepare_frozen(self, model: nn.Module) -> Any:
        """Prepare the teacher as TRL prepares its reference model."""
        if self.is_deepspeed_enabled:
            from trl.models import prepare_deepspeed

            return prepare_deepspeed(model, self.accelerator)
        if self.is_fsdp_enabled:
            from trl.models import prepare_fsdp

            return prepare_fsdp(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    # -- rollouts --------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = image_lists(inputs)
        if not self.model.training:
            self._table_images(inputs)
            return super()._generate_and_score_completions(inputs)
        self._needs_images = not has_images(inputs)
        self._references.clear()
        self._bias = None
        self._forget_rollouts(inputs)
        self._rolling_out = True
        try:
            with self._timed("rollout"), ExitStack() as stack:  # less the forwards inside
                if self._resampler is not None:
                    inputs, replayed = self._resampler.fill(inputs, self._generations)
                    stack.enter_context(replayed)
                    self._forget_rollouts(inputs)
                self._table_images(inputs)
                output = super()._generate_and_score_completions(inputs)
        finally:
            self._rolling_out = False
        self._generations += 1
        self._check_agreement(output)
        self._log_prefixes(output)
        if not self._has_terms:
            return output
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
        # A response holds images only where a tool returned them.
        response = 0 if "tool_mask" in output else output["completion_ids"].shape[1]
        layout = self._lay_out(ids, mask, output, response)
        output["rollout_index"] = torch.arange(ids.shape[0], device=ids.device)
        output["visual"] = layout.visual
        if layout.spans is not None:
            self._warn_single_span(layout.spans)
            self._num_spans = layout.spans.num_spans
            output["span_ids"] = layout.spans.ids
        self._place_evidence(output, ids, mask)
        if self._looks is not None:
            self._log_looks(self._looks, output)
            if self.args.credit != "uniform":
                self._give_credit(output, self._looks)
        if self._bias is not None:
            output["explore_bias"] = self._bias
        if self.teacher_model is not None:
            length = output["completion_ids"].shape[1]
            view = losses.view_of(self.args, ids.shape[1] - length, length, layout.spans)
            with (
                self._timed("old_policy"),
                self._mixing(self.teacher_model),
                self._terms.taking("teacher", self.teacher_model, view),
                torch.no_grad(),
            ):
                super()._get_per_token_logps_and_entropies(
                    self.teacher_model, ids, mask, length,
                    batch_size=self.args.per_device_train_batch_size,
                    **{name: output.get(name) for name in _MODEL_FIELDS},
                )  # fmt: skip
        return output

    def _mixing(self, model: Any) -> AbstractContextManager[None]:
        """For forwards of rows some of which have no images."""
        return without_empty_images(model, self._blank)

    def _table_images(self, rows: list[dict[str, Any]]) -> None:
        if self._tables_images and has_images(rows):
            self._logs["images"].extend(gather_object([row["images"] for row in rows]))

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], *completions: Any
    ) -> Tensor:
        """Reward functions see the `<think>` that a chat template ends its prompts with."""
        from trl.data_utils import prepare_multimodal_messages

        prompt = prompts[0]
        if self._is_vlm and not isinstance(prompt, str):  # as TRL renders it
            prompt = prepare_multimodal_messages(prompt)
        end = rendered_end(
            self.processing_class, prompt,
            chat_template=self.chat_template, **self.chat_template_kwargs,
        )  # fmt: skip
        inputs = [{**row, "prompt_end": end} for row in inputs]
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, *completions)
        if self.model.training:
            rewards = self._complete_rewards(rewards)
            equal = equal_groups(self, rewards).sum().item()
            self._metrics["train"]["groups/equal"].append(equal)
        return rewards

    def _check_agreement(self, output: dict[str, Any]) -> None:
        """Compare vLLM's probabilities with the model's, in the first rollout batch."""
        ours, theirs = (
            output.get(name) for name in ("old_per_token_logps", "sampling_per_token_logps")
        )
        if self._agrees or ours is None or theirs is None:
            return
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        value = rollouts.agreement(ours, theirs, mask, self.accelerator.gather)
        rollouts.check_agreement(value, self.args.vllm_min_ratio * self.top_p)
        self._agrees = True

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        ids, images, fields = super()._tokenize_prompts(prompts)
        if images is not None:  # the processor takes no None beside lists
            images = [each or [] for each in images]
        if images is not None and self.use_vllm and self.vllm_mode == "colocate":
            self._unexpanded.remember(prompts, ids)
        return ids, images, fields

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before = self._generations
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        if self._generations != before and "rollout_index" in inputs:
            # Split now: when a micro-batch asks, its activations take the memory.
            self._references.split([part["rollout_index"] for part in self._buffered_inputs])
        return inputs

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: Any,
        multimodal_fields: Any,
        *rest: Any,
        **kw: Any,
    ) -> Any:
        if images is not None and self.use_vllm:  # which takes None for a prompt without images
            images = [each or None for each in images]
        if not (self.args.explores and self._rolling_out):
            with self._mixing(self.accelerator.unwrap_model(self.model)):
                return super()._generate_single_turn(
                    prompt_ids, images, multimodal_fields, *rest, **kw
                )
        ids, mask = self._pad_prompts(prompt_ids)
        layout = self._lay_out(ids, mask, multimodal_fields)
        assert layout.spans is not None
        self._bias = draw_bias(
            self.args.attn_explore_sigma, len(self._layers), layout.spans, layout.visual
        )
        with ExitStack() as stack:
            for number, layer in enumerate(self._layers):
                stack.enter_context(
                    rk.steer(self.model, self._bias[:, number], spans=layout.spans, layers=layer)
                )
            stack.enter_context(self._mixing(self.accelerator.unwrap_model(self.model)))
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, *rest, **kw)

    def _lay_out(
        self, ids: Tensor, mask: Tensor, fields: dict[str, Any], response: int = 0
    ) -> VisionLayout:
        return lay_out(
            self.args, self.model.config, ids, mask, fields, response, self._needs_images
        )

    def _pad_prompts(self, prompt_ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Prompts as `generate` gets them: padded on the left."""
        from trl.trainer.utils import pad

        rows = [torch.tensor(ids) for ids in prompt_ids]
        kwargs = {"padding_side": "left", "pad_to_multiple_of": self.pad_to_multiple_of}
        ids = pad(rows, padding_value=self._tokenizer.pad_token_id, **kwargs)
        mask = pad([torch.ones_like(row) for row in rows], padding_value=0, **kwargs)
        return ids.to(self.accelerator.device), mask.to(self.accelerator.device)

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if not self._rolling_out:
            with gathered_head(model), self._mixing(model):
                found = super()._get_per_token_logps_and_entropies(
                    model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
                )
            if self._after_forward is not None:
                self._after_forward()
            return found
        role: Role = "old" if self._is_policy(model) else "ref"
        spans, looks = None, role == "old" and self.args.looks
        with ExitStack() as stack:
            stack.enter_context(self._timed("old_policy"))
            stack.enter_context(gathered_head(model))
            stack.enter_context(self._mixing(model))
            if self._bias is not None or role in self._terms.roles or looks:
                fields = {"pixel_values": kwargs.get("pixel_values")}
                fields |= {name: kwargs.get(name) for name in ("image_grid_thw", "image_sizes")}
                response = 0 if self.tools else logits_to_keep
                layout = self._lay_out(input_ids, attention_mask, fields, response)
                spans = layout.spans
            if self._bias is not None:
                # Also for TRL's reference model, or KL would measure the noise.
                assert spans is not None
                stack.enter_context(steered(model, self._layers, self._bias, spans))
            prompt = input_ids.shape[1] - logits_to_keep
            view = losses.view_of(self.args, prompt, logits_to_keep, spans)
            stack.enter_context(self._terms.taking(role, model, view))
            if looks:
                place = None
                if self._needs_evidence:
                    place = self._find_evidence(input_ids, attention_mask, fields)
                kept = without_sinks(attention_mask, layout.visual, self.args.credit_sinks)
                seen = stack.enter_context(
                    looking(model, self._layers, view, layout.visual, kept, place)
                )
            found = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        if looks:
            self._reward_attention(joined(seen), place, layout.visual, attention_mask[:, prompt:])
        return found

    def _is_policy(self, model: Any) -> bool:
        """Whether `model` is now the policy and not TRL's reference model.

        Under peft both are the same object: TRL's reference model is the policy with its adapters
        off, or with the adapter "ref".
        """
        if model is self.ref_model:
            return False
        if not hasattr(self.accelerator.unwrap_model(model), "peft_config"):
            return True
        from peft.tuners.tuners_utils import BaseTunerLayer

        tuned = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
        return not any(layer.disable_adapters or "ref" in layer.active_adapters for layer in tuned)

    # -- the loss --------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if not self.model.training or not self._has_terms:
            return self.args.rl_coef * super()._compute_loss(model, inputs)
        spans = None
        if "span_ids" in inputs:
            spans = rk.Spans(inputs["span_ids"], self._num_spans)
        with ExitStack() as stack:
            if "explore_bias" in inputs:
                assert spans is not None
                seen = stack.enter_context(
                    steered(model, self._layers, inputs["explore_bias"], spans)
                )
            captured = stack.enter_context(self._terms.capturing(model))
            if self.args.credit != "uniform" and inputs["advantages"].dim() == 1:
                inputs = dict(inputs)  # the rollout batch keeps its own advantages
                self._after_forward = partial(self._credit_update, inputs, captured[ATTENTION])
                stack.callback(setattr, self, "_after_forward", None)
            rl_loss = self.args.rl_coef * super()._compute_loss(model, inputs)
        if "explore_bias" in inputs:
            spans = seen[-1]
        batch = self._batch(model, captured, inputs, spans)
        terms = self._terms.seen(captured, batch, inputs["rollout_index"])
        step, steps = self.state.global_step, self.state.max_steps
        factors = [(term, term.coefficient_at(step, steps), of) for term, of in terms]
        values = [(term, factor, term.loss(of)) for term, factor, of in factors if factor > 0]
        self._measure(batch, terms, values, rl_loss)
        weighted = [factor * value for _, factor, value in values]
        return torch.stack([rl_loss, *weighted]).sum()

    def _batch(
        self, model: Any, captured: Any, inputs: dict[str, Any], spans: rk.Spans | None
    ) -> Batch:
        """The micro-batch as all terms see it."""
        args, mask = self.args, inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        advantages = inputs["advantages"].float()
        scope = inputs["visual"] if args.attn_scope == "visual" and spans is None else None
        return Batch(
            captured=captured[ATTENTION],
            layers=self._layers,
            references={},
            advantages=advantages[:, None] if advantages.dim() == 1 else advantages,
            mask=mask.bool(),
            weights=losses.token_weights(mask, args.attn_reduction, self._normaliser(inputs)),
            num_tokens=self._normaliser(inputs, "token_mean"),
            view=losses.view_of(args, inputs["prompt_ids"].shape[1], mask.shape[1], spans, scope),
            inputs=inputs,
            model=model,
            teacher=self.teacher_model,
            accumulated=self.current_gradient_accumulation_steps,
        )

    @property
    def _has_terms(self) -> bool:
        return len(self._terms) > 0 or self.args.explores or self.args.looks

    def _normaliser(self, inputs: dict[str, Any], reduction: str | None = None) -> Tensor | float:
        """The divisor of the sum over this micro-batch, so that an optimizer step is a mean.

        Micro-batches are added, and processes averaged. Tokens are counted as in TRL's "dapo": over
        the whole step and all processes.
        """
        accumulated: int = self.current_gradient_accumulation_steps
        if (reduction or self.args.attn_reduction) == "sequence_mean":
            return float(inputs["completion_ids"].shape[0] * accumulated)
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        normaliser: Tensor = tokens * accumulated / self.args.steps_per_generation
        return normaliser


# What TRL passes to the model besides token ids, by the names of the model's arguments.
_MODEL_FIELDS = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes",
    "num_tiles", "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip
