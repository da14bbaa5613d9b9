"""The arms of the study: ways to train from the same start on the same budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Common to all arms. 2 iterations of 2 minibatches: 4 optimizer steps on 128 rollouts. The learning
# rate and the length of responses are the task's.
BUDGET: dict[str, Any] = {
    "num_generations": 8,
    "per_device_train_batch_size": 64,
    "steps_per_generation": 2,
    "gradient_accumulation_steps": 1,
    "num_iterations": 2,
    "lr_scheduler_type": "linear",
    "temperature": 0.9,
    "beta": 0.0,
    "max_grad_norm": 5.0,
    "attn_coef": 0.0,
}
ROLLOUTS = 128  # per rollout batch, as BUDGET makes them
_ONE_LOOK = ("frames", "resolution")
_CHAINS_OF_FRAMES = ("chain", "chain_long")
_CHAINS = (*_CHAINS_OF_FRAMES, "chain_cells")
_ALL_TASKS = (*_ONE_LOOK, *_CHAINS)
SHARPENING = 1.4  # factor on all attention scores of a trained model, as one more evaluation


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: as on the command line and in files.
        label: as in tables and pictures.
        settings: of `RALConfig`, over `BUDGET`.
        control: what is done to the advantages that the attention terms see: None, "flipped" or
            "shuffled" over the rollouts of a minibatch (of a rollout batch where evidence chooses
            good ones by them); "wrong": the evidence is the frame or cell after the right one;
            "random": the reference model's weights of queries, keys and values change places.
        teacher: whether a teacher takes part.
        style: form of the responses, and of the start: "direct" for RAL-zero, None for the task's.
        against: the arms that it is compared with, seed by seed.
        tasks: where the study runs it.
        curve: whether its accuracy is also taken during training.
        study: "figure3", or "objectives" for those of docs/objectives.md.
    """

    name: str
    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    control: str | None = None
    teacher: bool = False
    style: str | None = None
    against: tuple[str, ...] = ("grpo",)
    tasks: tuple[str, ...] = _ONE_LOOK
    curve: bool = False
    study: str = "figure3"


_FRAMES, _RESOLUTION = ("frames",), ("resolution",)
_RAL = {"attn_coef": 5.0, "attn_layers": "all"}
_INNER = {"num_iterations": 4}
# Without β there is no reference model.
_FROM_START: dict[str, Any] = {"attn_reference": "ref", "beta": 1e-6}
_NOISE = {"attn_layers": "all", "attn_explore_sigma": 1.0}  # of spans that the task names
_EVIDENCE = {"evidence_coef": 1.0, "evidence_divergence": "jsd", "evidence_sigma": 0.0}
_ALL = {**_EVIDENCE, "evidence_on": "all"}
_REWARD = {"attention_reward": 0.1}
_CREDIT = {"credit": "looking", "attn_layers": "all"}
_DISTILL = {"distill_logit_coef": 1.0, "distill_beta": 1.0, "rl_coef": 0.0}

ARMS: tuple[Arm, ...] = (
    Arm("grpo", "GRPO", against=(), tasks=_ALL_TASKS),
    Arm("grpo_t12", "GRPO, temperature 1.2", {"temperature": 1.2}, tasks=_ALL_TASKS),
    Arm("grpo_t15", "GRPO, temperature 1.5", {"temperature": 1.5}, tasks=_ALL_TASKS),
    Arm("ral_l1", "RAL λ = 1, last layer", {"attn_coef": 1.0}),
    Arm("ral", "RAL λ = 5, all layers", _RAL),
    Arm("ral_last", "RAL λ = 5, last layer", {"attn_coef": 5.0}, tasks=_FRAMES),
    Arm("ral_l50", "RAL λ = 50, all layers", {**_RAL, "attn_coef": 50.0}),
    Arm(
        "ral_ref", "RAL λ = 5, from the start",
        {**_RAL, **_FROM_START},
        tasks=_FRAMES,
    ),
    Arm("ral_frame", "RAL λ = 5, of frames", {**_RAL, "attn_granularity": "frame"}, tasks=_FRAMES),
    Arm("ral_visual", "RAL λ = 5, visual", {**_RAL, "attn_scope": "visual"}, tasks=_FRAMES),
    Arm("ral_flipped", "RAL λ = 5, sign flipped", _RAL, control="flipped", against=("ral",)),
    Arm("ral_shuffled", "RAL λ = 5, shuffled", _RAL, control="shuffled", against=("ral",)),
    Arm("grpo_inner", "GRPO, 4 iterations", _INNER, tasks=("frames", *_CHAINS)),
    Arm(
        "ral_inner", "RAL λ = 5, 4 iterations", {**_RAL, **_INNER}, against=("grpo_inner",),
        tasks=_FRAMES,
    ),
    Arm(
        "noise", "noise on attention alone", {**_NOISE, "attn_explore_coef": 0.0}, tasks=_ALL_TASKS
    ),
    Arm(
        "explore", "noise, and learning from it", _NOISE, against=("grpo", "noise"),
        tasks=_ALL_TASKS,
    ),
    Arm(
        "explore_shuffled", "noise, learning, shuffled", _NOISE, control="shuffled",
        against=("explore",), tasks=_FRAMES,
    ),
    Arm(
        "explore_t12", "noise, learning, temperature 1.2", {**_NOISE, "temperature": 1.2},
        against=("grpo", "grpo_t12"), tasks=_FRAMES,
    ),
    Arm("zero_grpo", "GRPO, direct answers", style="direct", against=(), tasks=_RESOLUTION),
    Arm(
        "zero_ral", "RAL-zero λ = 5, all layers", _RAL, style="direct", against=("zero_grpo",),
        tasks=_RESOLUTION,
    ),
    Arm(
        "logits", "distillation of tokens", _DISTILL, teacher=True, against=(), curve=True,
        tasks=_ALL_TASKS,
    ),
    Arm(
        "opad", "On-Policy Attention Distillation",
        {**_DISTILL, "distill_attn_coef": 10.0, "attn_layers": "all"}, teacher=True,
        against=("logits",), curve=True, tasks=_ALL_TASKS,
    ),
)  # fmt: skip
_LAYERS: dict[str, Any] = {"first": [0], "last": [-1], "all": "all"}
# What is tried on the tuning seeds of `chain`: λ by layers, of tokens and of frames, from the old
# policy and from the start, with 2 iterations and with 4; larger λ, because steps are small there.
CHAIN: tuple[Arm, ...] = tuple(
    Arm(
        f"ral_{coefficient:g}_{layers}{suffix}",
        f"RAL λ = {coefficient:g}, {layers} layer{'s' * (layers == 'all')}{more}",
        {"attn_coef": coefficient, "attn_layers": _LAYERS[layers], **settings},
        against=(against,), tasks=_CHAINS_OF_FRAMES if suffix == "_frame" else _CHAINS,
    )
    for suffix, more, settings, against, places in (
        ("", "", {}, "grpo", ("first", "last", "all")),
        ("_frame", ", of frames", {"attn_granularity": "frame"}, "grpo", ("last", "all")),
        ("_ref", ", from the start", _FROM_START, "grpo", ("all",)),
        ("_inner", ", 4 iterations", _INNER, "grpo_inner", ("all",)),
    )
    for layers in places
    for coefficient in (0.3, 1.0, 3.0, 10.0)
) + tuple(
    Arm(
        name, f"RAL λ = {settings['attn_coef']:g}, all layers{more}",
        {"attn_layers": "all", **settings}, control=control, against=(against,), tasks=_CHAINS,
    )
    for name, more, settings, control, against in (
        ("ral_30_all", "", {"attn_coef": 30.0}, None, "grpo"),
        ("ral_100_all", "", {"attn_coef": 100.0}, None, "grpo"),
        ("ral_10_all_flipped", ", sign flipped", {"attn_coef": 10.0}, "flipped", "ral_10_all"),
        ("ral_10_all_shuffled", ", shuffled", {"attn_coef": 10.0}, "shuffled", "ral_10_all"),
        ("ral_30_all_shuffled", ", shuffled", {"attn_coef": 30.0}, "shuffled", "ral_30_all"),
        ("ral_10_all_random", ", from a random model", {"attn_coef": 10.0, **_FROM_START},
         "random", "ral_10_all_ref"),
    )
)  # fmt: skip
OBJECTIVES: tuple[Arm, ...] = tuple(
    Arm(
        name, label, settings, control=control, against=against, curve=True, study="objectives",
    )
    for name, label, settings, control, against in (
        ("plain", "GRPO", {}, None, ()),
        ("plain_ral", "RAL λ = 1", {"attn_coef": 1.0}, None, ("plain",)),
        ("evidence", "evidence, good rollouts", _EVIDENCE, None, ("plain",)),
        ("evidence_shuffled", "evidence, good ones shuffled", _EVIDENCE, "shuffled",
         ("evidence",)),
        ("evidence_all", "evidence, all", _ALL, None, ("plain", "evidence")),
        ("evidence_warmup", "evidence, all, the first quarter",
         {**_ALL, "evidence_schedule": "warmup", "evidence_steps": 0.25}, None,
         ("plain", "evidence_all")),
        ("evidence_wrong", "evidence, all, wrong place", _ALL, "wrong", ("plain", "evidence_all")),
        ("reward", "attention reward", _REWARD, None, ("plain",)),
        ("credit", "credit by looking", _CREDIT, None, ("plain",)),
        ("sum", "evidence on all, reward, credit",
         {**_ALL, "evidence_layers": [-1], **_REWARD, **_CREDIT}, None, ("plain", "evidence_all")),
    )
)  # fmt: skip
ARMS += CHAIN + OBJECTIVES
BY_NAME = {arm.name: arm for arm in ARMS}
QUICK = ("grpo", "ral")  # what --quick does in a minute: no teacher
