"""`RALConfig`: TRL's `GRPOConfig` and the settings of the attention terms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import ral_kernels as rk

from . import schedule
from ._requirements import check_trl
from .losses import Divergence
from .losses import Which as Rows
from .objectives import Shape, check_floor
from .processes import check_parallelism, check_world_size

check_trl()

from trl import GRPOConfig  # noqa: E402  (after the check, whose message is clearer)

# Literals, from which `HfArgumentParser` and `TrlParser` take the choices of an option.
Granularity = Literal["token", "tile", "frame", "image"]
Scope = Literal["context", "visual"]
Reference = Literal["old", "ref", "teacher"]
Reduction = Literal["token_mean", "sequence_mean"]
EvidenceOn = Literal["good", "all"]
Credit = Literal["uniform", "looking", "evidence"]
TRACKERS = ("tensorboard", "wandb")  # that `attn_map_every` gives pictures to
_LAYERS = {  # settings of layers, and what they may be beside numbers
    "attn_layers": ("all",),
    "router_layers": ("all",),
    "evidence_layers": ("all", "none"),
    "distill_teacher_layers": ("none",),
}
_CHOICES = {
    "attn_granularity": get_args(Granularity),
    "attn_scope": get_args(Scope),
    "attn_divergence": get_args(Divergence),
    "attn_reference": get_args(Reference),
    "attn_rows": get_args(Rows),
    "attn_reduction": get_args(Reduction),
    "evidence_divergence": get_args(Divergence),
    "evidence_on": get_args(EvidenceOn),
    "evidence_schedule": get_args(Shape),
    "credit": get_args(Credit),
}


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class RALConfig(GRPOConfig):
    """Settings of `RALTrainer`: those of TRL's `GRPOConfig`, and of eq. (3) and (4).

        L = rl_coef · L_GRPO + attn_coef · E_t[A_t D(p_θ^t ‖ r^t)]                            (3)
            + distill_logit_coef · L_GKD + distill_attn_coef · E_t[D(p_θ^t ‖ p_teacher^t)]    (4)

    The equations are those of arXiv 2602.04884. The object checks everything when it is made:
    unknown values, and a schedule under which the attention term is always zero
    (`schedule.why_zero`).

    Unlike in TRL, dropout is off by default (`disable_dropout`). With dropout the old policy
    differs from the policy that starts the update.

    Raises:
        ValueError: a setting has an invalid value, or settings contradict each other; or a launcher
            started another number of processes than accelerate counts.
        NotImplementedError: parallelism_config, or accelerate's YAML, asks for more than data
            parallelism.
    """

    disable_dropout: bool = _setting(
        True, "Whether to turn off dropout, which adds noise to the old policy's attention."
    )
    attn_coef: float = _setting(
        1.0, "λ, weight of the advantage-weighted attention divergence, eq. (3). 0 = plain GRPO."
    )
    # Of a union with None, both parsers read the second type: a str, as "-1" or "3,-1".
    attn_layers: list[int] | str | int | None = _setting(
        -1, "Text decoder layers of the term: a number, negative from the end, a list, or 'all'."
    )
    attn_granularity: Granularity = _setting(
        "token", "What attention is a distribution over: 'token', 'tile', 'frame' or 'image'."
    )
    attn_tile: list[int] = field(
        default_factory=lambda: [4, 4],
        metadata={"help": "Rows and columns of visual tokens in a tile, for 'tile'."},
    )
    attn_scope: Scope = _setting(
        "context", "'context': all keys. 'visual': only visual tokens, renormalised over them."
    )
    attn_divergence: Divergence = _setting(
        "jsd",
        "'jsd', 'kl' (policy from reference), 'reverse_kl' or 'cross_entropy', which is reverse_kl "
        "plus the reference's entropy and has the same gradient.",
    )
    attn_reference: Reference = _setting(
        "old",
        "What the policy's attention is compared with: 'old' (the policy that wrote the rollouts), "
        "'ref' (TRL's reference model, with beta > 0) or 'teacher'.",
    )
    attn_rows: Rows = _setting(
        "predicting",
        "Which query belongs to a response token: the one that predicts it, or ('token') its own.",
    )
    attn_exclude_self: bool = _setting(
        True, "Whether the query's own key is left out and the rest renormalised, eq. (1)."
    )
    attn_reduction: Reduction = _setting(
        "token_mean",
        "'token_mean': over all response tokens of an optimizer step, on every process; "
        "'sequence_mean': the mean of each response first.",
    )
    attn_backend: str | None = _setting(
        None, "Backend of the attention ops; None = the first that can run."
    )
    attn_snapshot_device: str | None = _setting(
        None,
        "Device that keeps snapshots between steps, such as 'cpu'; None = where they were made.",
    )
    attn_explore_sigma: float = _setting(
        0.0,
        "σ of a Gaussian bias per span and rollout on the attention scores during generation, "
        "replayed in the update; 0 = off. Needs attn_granularity other than 'token'.",
    )
    attn_explore_coef: float = _setting(
        1.0, "Weight of E_t[A_t CE(p_noisy^t ‖ p_θ^t)] over spans, with attn_explore_sigma > 0."
    )
    router_coef: float = _setting(
        0.0,
        "Weight of E_t[A_t D(g^t ‖ g_old^t)], the divergence of a mixture's routers from those of "
        "the policy that wrote the rollouts; 0 = off.",
    )
    router_layers: list[int] | str | int | None = _setting(
        "all", "Layers with a router that the term is averaged over: as attn_layers."
    )
    rl_coef: float = _setting(1.0, "Weight of TRL's loss; with 0 only the attention terms train.")
    distill_logit_coef: float = _setting(
        0.0, "μ, weight of the generalised JSD between the teacher's and the student's tokens."
    )
    distill_attn_coef: float = _setting(
        0.0, "γ, weight of the attention divergence from the teacher, eq. (4)."
    )
    distill_beta: float = _setting(
        0.5, "β of the generalised JSD on tokens: 0 = KL from the teacher, 1 = reverse KL."
    )
    distill_teacher_layers: list[int] | str | int | None = _setting(
        None,
        "Teacher's layers for attn_layers, paired in the order of the models; None = at the same "
        "distance from the end.",
    )
    evidence_coef: float = _setting(
        0.0,
        "Weight of the divergence of the response's attention over visual tokens from annotated "
        "evidence; 0 = off. Needs rows with `evidence`.",
    )
    evidence_divergence: Divergence = _setting(
        "cross_entropy", "Its kind: 'cross_entropy', 'kl', 'reverse_kl' or 'jsd'."
    )
    evidence_layers: list[int] | str | int | None = _setting(
        None, "Its layers, as attn_layers; None = those of attn_layers."
    )
    evidence_heads: list[int] = field(
        default_factory=list,
        metadata={"help": "Query heads of each layer that it averages over; none = all."},
    )
    evidence_on: EvidenceOn = _setting(
        "good", "Rollouts that it learns from: 'good' (evidence_min_reward) or 'all'."
    )
    evidence_min_reward: float | None = _setting(
        None, "Reward from which a rollout is good; None = an advantage above 0."
    )
    evidence_schedule: Shape = _setting(
        "constant",
        "Its coefficient: 'constant'; 'warmup', the same for evidence_steps and then 0; 'linear' "
        "or 'cosine', falling to 0 over evidence_steps.",
    )
    evidence_steps: float = _setting(
        1.0, "Optimizer steps of evidence_schedule; up to 1, a share of the run."
    )
    evidence_sigma: float = _setting(
        1.0, "σ of the Gaussian that smooths evidence within an image, in visual tokens; 0 = none."
    )
    evidence_floor: float = _setting(
        0.0, "Share of the evidence that is spread over all visual tokens; 'kl' needs it."
    )
    attention_reward: float = _setting(
        0.0,
        "Weight of a reward beside the others: the response's attention on evidence, less what "
        "uniform attention over visual tokens would have; 0 = off.",
    )
    credit: Credit = _setting(
        "uniform",
        "How a response's tokens share its advantage: 'uniform', as in GRPO; 'looking', by their "
        "attention on visual tokens; 'evidence', by the share of it that is on evidence.",
    )
    credit_top_share: float = _setting(
        1.0, "Share of a response's tokens that get credit, those with the most attention."
    )
    credit_sinks: int = _setting(
        4, "First text tokens of a prompt that credit leaves out of attention, as sinks."
    )
    attn_metrics_every: int = _setting(
        10,
        "Rollout batches between measurements of attention entropy, visual share and the gradient "
        "share of RAL, which cost two more backward passes a step; 0 = never.",
    )
    attn_warn_divergence: float = _setting(
        0.1, "Mean divergence (nats) above which a warning says that RAL runs away."
    )
    attn_warn_grad_share: float = _setting(
        1.0, "‖∇RAL‖ / ‖∇GRPO‖ above which a warning says that RAL runs away."
    )
    attn_map_every: int = _setting(
        0,
        "Optimizer steps between pictures of the policy's attention in fixed rows, in tensorboard "
        "and wandb, as far as report_to has them; 0 = never.",
    )
    attn_map_rows: int = _setting(
        2, "How many of the first rows, of the evaluation set or else of the training set."
    )
    vllm_min_ratio: float = _setting(
        0.9,
        "Mean importance ratio of the tokens of the first rollout batch, each at most 1, below "
        "which training with use_vllm stops; 0 = never.",
    )

    metric_for_best_model: str | None = _setting(
        None, "Which metric load_best_model_at_end compares, such as accuracy; None = reward."
    )
    resample_equal_groups: int = _setting(
        0,
        "How often further prompts are drawn in place of those whose rollouts all have the same "
        "reward, and so no gradient; 0 = never. DAPO's dynamic sampling.",
    )
    eval_temperature: float | None = _setting(
        None, "Temperature of answers in evaluation; 0 = greedy, None = that of the rollouts."
    )

    def __post_init__(self) -> None:
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "reward"  # GRPO's loss says nothing of the policy
        super().__post_init__()
        check_world_size(self)
        check_parallelism(self)
        if self.attn_layers is None:
            self.attn_layers = -1
        if self.router_layers is None:
            self.router_layers = "all"
        for name, words in _LAYERS.items():
            given = getattr(self, name)
            if isinstance(given, str):
                setattr(self, name, _parse_layers(name, given, words))
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"RALConfig: {name} must be one of {', '.join(known)}; got "
                    f"{getattr(self, name)!r}"
                )
        for name in (
            "attn_coef",
            "attn_explore_sigma",
            "attn_explore_coef",
            "router_coef",
            "rl_coef",
            "distill_logit_coef",
            "distill_attn_coef",
            "attn_metrics_every",
            "attn_map_every",
            "evidence_coef",
            "evidence_sigma",
            "attention_reward",
            "credit_sinks",
            "resample_equal_groups",
        ):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"RALConfig: {name} must be finite and >= 0; got {getattr(self, name)!r}"
                )
        if self.eval_temperature is not None and not 0 <= self.eval_temperature < float("inf"):
            raise ValueError(
                f"RALConfig: eval_temperature must be None, or finite and >= 0; got "
                f"{self.eval_temperature!r}"
            )
        for name in ("distill_beta", "vllm_min_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"RALConfig: {name} must lie in [0, 1]; got {getattr(self, name)!r}"
                )
        if not 0 < self.credit_top_share <= 1:
            raise ValueError(
                f"RALConfig: credit_top_share must lie in (0, 1]; got {self.credit_top_share!r}"
            )
        if not 0 < self.evidence_steps < float("inf"):
            raise ValueError(
                f"RALConfig: evidence_steps must be finite and > 0; got {self.evidence_steps!r}"
            )
        check_floor("RALConfig: evidence_floor", self.evidence_floor, self.evidence_divergence)
        heads = self.evidence_heads
        if len(set(heads)) < len(heads) or not all(head >= 0 for head in heads):
            raise ValueError(
                f"RALConfig: evidence_heads must be different numbers >= 0; got {heads!r}"
            )
        backends = list(rk.available_backends())
        if self.attn_backend is not None and self.attn_backend not in backends:
            raise ValueError(
                f"RALConfig: attn_backend must be None or one of {', '.join(backends)}; got "
                f"{self.attn_backend!r}"
            )
        if self.attn_map_rows < 1:
            raise ValueError(f"RALConfig: attn_map_rows must be >= 1; got {self.attn_map_rows!r}")
        if len(self.attn_tile) != 2 or not all(n >= 1 for n in self.attn_tile):
            raise ValueError(
                f"RALConfig: attn_tile must be [rows, columns], both >= 1; got {self.attn_tile!r}"
            )
        self._check_together()

    @property
    def optimizer_steps_per_generation(self) -> float:
        """Optimizer steps on one rollout batch; below 1 where a step takes several batches."""
        assert self.steps_per_generation is not None
        micro_steps = self.steps_per_generation * self.num_iterations
        return micro_steps / self.gradient_accumulation_steps

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with a teacher."""
        return (
            self.distill_logit_coef > 0
            or self.distill_attn_coef > 0
            or (self.attn_coef > 0 and self.attn_reference == "teacher")
        )

    @property
    def needs_evidence(self) -> bool:
        """Whether rows must say where their evidence is."""
        return self.evidence_coef > 0 or self.attention_reward > 0 or self.credit == "evidence"

    @property
    def looks(self) -> bool:
        """Whether the rollouts' attention is measured, for a reward or for credit."""
        return self.attention_reward > 0 or self.credit != "uniform"

    @property
    def explores(self) -> bool:
        """Whether rollouts run under noise on the attention scores."""
        return self.attn_explore_sigma > 0

    def _check_together(self) -> None:
        if self.attn_map_every > 0 and not set(TRACKERS).intersection(self.report_to):
            raise ValueError(
                f"RALConfig: attn_map_every needs report_to with {' or '.join(TRACKERS)}, which "
                f"keep pictures; got report_to={self.report_to!r}"
            )
        if self.attn_coef > 0 and self.attn_reference == "ref" and self.beta == 0:
            raise ValueError(
                "RALConfig: attn_reference='ref' needs beta > 0, for which TRL keeps its "
                "reference model; got beta=0"
            )
        if self.explores and self.attn_granularity == "token":
            raise ValueError(
                "RALConfig: attn_explore_sigma needs attn_granularity 'tile', 'frame' or "
                "'image', whose spans get the noise; got 'token'"
            )
        if self.explores and self.resample_equal_groups > 0:
            raise ValueError(
                "RALConfig: resample_equal_groups is not supported with attn_explore_sigma > 0: "
                "the noise of a rollout does not move with it"
            )
        if self.explores and self.use_vllm:
            raise ValueError(
                "RALConfig: attn_explore_sigma is not supported with use_vllm=True: vLLM takes no "
                "bias on attention scores"
            )
        if self.explores and self.use_transformers_continuous_batching:
            raise ValueError(
                "RALConfig: attn_explore_sigma is not supported with "
                "use_transformers_continuous_batching=True: its paged cache takes no bias on "
                "attention scores"
            )
        if self.explores and self.max_tool_calling_iterations not in (None, 0):
            raise ValueError(
                "RALConfig: attn_explore_sigma is not supported with tools; got "
                f"max_tool_calling_iterations={self.max_tool_calling_iterations}"
            )
        if self.evidence_on == "all" and self.evidence_min_reward is not None:
            raise ValueError(
                "RALConfig: evidence_min_reward needs evidence_on='good'; got 'all', which takes "
                f"every rollout, and evidence_min_reward={self.evidence_min_reward}"
            )
        if self.credit == "uniform" and self.credit_top_share < 1:
            raise ValueError(
                "RALConfig: credit_top_share needs credit='looking' or 'evidence'; got "
                f"credit='uniform' and credit_top_share={self.credit_top_share}"
            )
        if self.attention_reward > 0 and not schedule.runs_old_policy(self):
            raise ValueError(
                "RALConfig: attention_reward > 0 needs more than one optimizer step on a rollout "
                "batch, for which TRL runs the policy that wrote it before it asks for rewards: "
                "num_iterations >= 2, or steps_per_generation > gradient_accumulation_steps; got "
                f"num_iterations={self.num_iterations}, steps_per_generation="
                f"{self.steps_per_generation} and gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}"
            )
        reason = schedule.why_zero(self)
        if reason is not None:
            raise ValueError(f"RALConfig: {reason}")


def _parse_layers(name: str, text: str, words: tuple[str, ...]) -> list[int] | int | str | None:
    """Layers as a command line gives them: "-1", "3,-1", "all" or "none".

    Args:
        name, text: of the setting.
        words: those of "all" and "none" that it takes.
    """
    word = text.lower()
    if word in words:
        return None if word == "none" else word
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"RALConfig: {name} must be a number, a list of numbers, or "
            f"{' or '.join(map(repr, words))}; got {text!r}"
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers
