"""What is compared: each arm is a way to train from the same start on the same budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Common to all arms. 2 iterations of 2 minibatches: 4 optimizer steps on 128 rollouts.
BUDGET: dict[str, Any] = {
    "num_generations": 8,
    "per_device_train_batch_size": 64,
    "steps_per_generation": 2,
    "gradient_accumulation_steps": 1,
    "num_iterations": 2,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "constant",
    "temperature": 0.9,
    "beta": 0.04,
    "max_grad_norm": 5.0,
    "max_completion_length": 12,
    "attn_coef": 0.0,
}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: as on the command line and in files.
        label: as in tables and pictures.
        settings: of `RALConfig`, over `BUDGET`.
        control: what is done to the advantages that the attention terms see: None, "flipped" or
            "shuffled" over the rollouts of a minibatch.
        teacher: whether a teacher takes part.
        style: form of the responses, and of the start: "direct" for RAL-zero, None for the task's.
        sharpened: factor on the attention scores of the trained model when it is evaluated.
        against: the arm that it is compared with, seed by seed.
    """

    name: str
    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    control: str | None = None
    teacher: bool = False
    style: str | None = None
    sharpened: float = 1.0
    against: str | None = "grpo"


_RAL = {"attn_coef": 5.0, "attn_layers": "all"}
_NOISE = {"attn_layers": "all", "attn_granularity": "frame", "attn_explore_sigma": 1.0}
_DISTILL = {"distill_logit_coef": 1.0, "distill_beta": 1.0, "rl_coef": 0.0, "beta": 0.0}

ARMS: tuple[Arm, ...] = (
    Arm("grpo", "GRPO", against=None),
    Arm("grpo_t12", "GRPO, temperature 1.2", {"temperature": 1.2}),
    Arm("grpo_t15", "GRPO, temperature 1.5", {"temperature": 1.5}),
    Arm("grpo_sharp", "GRPO, scores ×1.4 when tested", sharpened=1.4),
    Arm("ral_l1", "GRPO + RAL, λ = 1, last layer", {"attn_coef": 1.0}),
    Arm("ral", "GRPO + RAL, λ = 5, all layers", _RAL),
    Arm("ral_l50", "GRPO + RAL, λ = 50, all layers", {**_RAL, "attn_coef": 50.0}),
    Arm("ral_ref", "GRPO + RAL, λ = 5, from the start", {**_RAL, "attn_reference": "ref"}),
    Arm("ral_flipped", "RAL with its sign flipped", _RAL, control="flipped", against="ral"),
    Arm("ral_shuffled", "RAL with shuffled advantages", _RAL, control="shuffled", against="ral"),
    Arm("noise", "noise on attention alone", {**_NOISE, "attn_explore_coef": 0.0}),
    Arm("explore", "noise, and learning from it", _NOISE, against="noise"),
    Arm(
        "explore_shuffled", "the same, shuffled advantages", _NOISE, control="shuffled",
        against="explore",
    ),
    Arm("zero_grpo", "GRPO, direct answers", style="direct", against=None),
    Arm("zero_ral", "RAL-zero, direct answers", _RAL, style="direct", against="zero_grpo"),
    Arm("logits", "distillation of tokens", _DISTILL, teacher=True, against=None),
    Arm(
        "opad", "On-Policy Attention Distillation",
        {**_DISTILL, "distill_attn_coef": 10.0, "attn_layers": "all"}, teacher=True,
        against="logits",
    ),
)  # fmt: skip
BY_NAME = {arm.name: arm for arm in ARMS}
QUICK = ("grpo", "ral", "noise", "explore", "logits", "opad")
