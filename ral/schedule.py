"""Inner steps on one rollout batch, and schedules under which the RAL term is always zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import RALConfig


def micro_steps_per_generation(config: RALConfig) -> int:
    """Forward-backward passes between two rollout batches, as TRL counts them."""
    assert config.steps_per_generation is not None
    return config.steps_per_generation * config.num_iterations


def runs_old_policy(config: RALConfig) -> bool:
    """Whether TRL runs the policy that wrote a rollout batch over it: what "old" is taken from."""
    one_step = config.gradient_accumulation_steps % micro_steps_per_generation(config) == 0
    return not one_step or (config.use_vllm and config.vllm_importance_sampling_correction)


def inner_step(config: RALConfig, micro_step: int) -> int:
    """The optimizer step on its rollout batch that a micro-step belongs to, from 0."""
    return (micro_step % micro_steps_per_generation(config)) // config.gradient_accumulation_steps


def stands_still(config: RALConfig) -> bool:
    """Whether the only term is that of eq. (3), against the starting policy: no weight changes."""
    return (
        config.attn_coef > 0
        and config.attn_reference == "old"
        and config.rl_coef == 0
        and not config.needs_teacher
        and not config.explores
    )


def why_zero(config: RALConfig) -> str | None:
    """Why the term of eq. (3), or that of routers, is always zero under this schedule, or None.

    1. JSD and its gradient vanish at θ = θ_old, so RAL needs a second optimizer step on the same
       rollouts, or a reference policy other than the one that wrote them.
    2. Rollouts of a group that share a response's prefix have the same attention, and their
       advantages sum to zero: the first response position has no signal.

    Returns:
        A sentence that says which settings to change.
    """
    against_old = [
        name
        for name, is_old in (
            ("attn_coef", config.attn_coef > 0 and config.attn_reference == "old"),
            ("router_coef", config.router_coef > 0),
        )
        if is_old
    ]
    if against_old and (
        config.gradient_accumulation_steps % micro_steps_per_generation(config) == 0
    ):
        otherwise = "; or compare with another policy: attn_reference='ref'"
        return (
            f"{against_old[0]} > 0 needs more than one optimizer step on a rollout batch, since "
            "the policy's divergence from itself is exactly 0 before the first: with "
            f"gradient_accumulation_steps={config.gradient_accumulation_steps}, "
            f"steps_per_generation={config.steps_per_generation} and num_iterations="
            f"{config.num_iterations} this would be plain GRPO. Set num_iterations >= 2, or "
            "steps_per_generation to a multiple of gradient_accumulation_steps greater than it"
            + (otherwise if against_old[0] == "attn_coef" else "")
        )
    used = [name for name in ("attn_coef", "router_coef") if getattr(config, name) > 0]
    if used and config.max_completion_length == 1 and config.attn_rows == "predicting":
        return (
            f"{used[0]} > 0 needs max_completion_length > 1: the query that predicts the "
            "first token is the same in every rollout of a group, and their advantages sum to "
            "zero. Allow longer responses, or set attn_rows='token'"
        )
    return None
