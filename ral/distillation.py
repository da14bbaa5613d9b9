"""The teacher of On-Policy Attention Distillation, eq. (4): its checks, and the term on tokens."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import ProcessorMixin
from trl.trainer.distillation_trainer import _chunked_divergence_loss
from trl.trainer.utils import add_fused_lm_head, create_model_from_path

from .config import RALConfig
from .losses import PolicyView
from .terms import Batch, Layers, Role, Term

_OP = "RALTrainer"


def load_teacher(teacher: Any, config: RALConfig, dtype: torch.dtype) -> nn.Module:
    """The teacher as a frozen model in evaluation mode, from a path or a model."""
    if not isinstance(teacher, nn.Module):
        options = dict(config.model_init_kwargs or {})
        options.setdefault("dtype", dtype)
        options.setdefault("trust_remote_code", config.trust_remote_code)
        teacher = create_model_from_path(teacher, **options)
    teacher.requires_grad_(False)
    add_fused_lm_head(teacher, temperature=config.temperature)
    frozen: nn.Module = teacher.eval()
    return frozen


def check_teacher(
    student: Any, teacher: Any, processing_class: Any, *, on_tokens: bool = False
) -> None:
    """Check that a teacher reads the student's rollouts as the student does.

    Token ids must have the same meaning, and an image must give as many tokens at the same places.

    Args:
        student, teacher: transformers models.
        processing_class: the student's processor or tokenizer.
        on_tokens: whether their next tokens are compared, too.

    Raises:
        ValueError: vocabularies, image tokens or patches differ.
        NotImplementedError: ZeRO-3 has partitioned weights of which a part would be needed.
    """
    tokenizer = (
        processing_class.tokenizer
        if isinstance(processing_class, ProcessorMixin)
        else processing_class
    )
    num_tokens = len(tokenizer)
    wanted, got = (_vocab_size(model) for model in (student, teacher))
    # Embeddings are padded to a multiple of their own (152,064 rows in Qwen2.5-VL-7B, 151,936 in
    # 3B, for the same tokens): rows after the tokenizer's are never written.
    if got < num_tokens:
        raise ValueError(
            f"{_OP}: teacher_model must have the student's vocabulary of {num_tokens} tokens; got "
            f"{got} (the student has {wanted})"
        )
    if on_tokens and got < wanted and _is_partitioned(student.get_output_embeddings().weight):
        raise NotImplementedError(
            f"{_OP}: distill_logit_coef under DeepSpeed's ZeRO-3 needs a teacher of at least the "
            f"student's {wanted} rows of embeddings (ZeRO-2 and FSDP2 do not); got {got}"
        )
    own = _own_vocabulary(teacher)
    if own is not None and own != tokenizer.get_vocab():
        different = sorted(set(own.items()) ^ set(tokenizer.get_vocab().items()))
        raise ValueError(
            f"{_OP}: teacher_model must have the student's vocabulary, token by token; got one "
            f"that differs in {len(different)} entries, such as {different[0][0]!r}"
        )
    for name in ("image_token_id", "video_token_id"):
        ours, theirs = (getattr(model.config, name, None) for model in (student, teacher))
        if ours != theirs:
            raise ValueError(f"{_OP}: teacher_model must have {name}={ours}; got {theirs}")
    for name in ("patch_size", "spatial_merge_size", "temporal_patch_size", "in_channels"):
        ours, theirs = (
            getattr(getattr(model.config, "vision_config", None), name, None)
            for model in (student, teacher)
        )
        if ours != theirs:
            raise ValueError(
                f"{_OP}: teacher_model must cut images as the student does, vision_config.{name}="
                f"{ours}; got {theirs}"
            )


def pair_layers(
    student_layers: list[int], wanted: Any, teacher_depth: int, student_depth: int
) -> list[int]:
    """The teacher's layer that is paired with each of the student's, in the model's order.

    Args:
        student_layers: numbers from 0 of the student's captured layers.
        wanted: `distill_teacher_layers`: numbers, negative from the end, or None for the same
            distance from the end (the last with the last).
        teacher_depth, student_depth: number of decoder layers.

    Raises:
        ValueError: the numbers of layers differ, or a layer does not exist.
    """
    if wanted is None:
        numbers = [layer - student_depth for layer in student_layers]
    else:
        numbers = [wanted] if isinstance(wanted, int) else list(wanted)
    if len(numbers) != len(student_layers):
        raise ValueError(
            f"{_OP}: distill_teacher_layers must name a layer for each of the student's "
            f"{len(student_layers)}; got {len(numbers)}"
        )
    for number in numbers:
        if not -teacher_depth <= number < teacher_depth:
            raise ValueError(
                f"{_OP}: distill_teacher_layers must lie among the teacher's {teacher_depth} "
                f"layers; got {number}"
            )
    return sorted(number % teacher_depth for number in numbers)


class LogitDistillation(Term):
    """The term of eq. (4) on tokens: generalised JSD between the teacher's and the student's.

    Args:
        config: μ (`distill_logit_coef`), β and the temperature.
    """

    name = "distill/logits"
    reference: Role | None = "teacher"
    rows = "predicting"
    on_attention = False

    def __init__(self, config: RALConfig) -> None:
        super().__init__(config.distill_logit_coef, layers=-1)
        self._config = config

    def capture(self, model: nn.Module, layers: Layers) -> HiddenStates:
        return HiddenStates(model)

    def take(self, captured: HiddenStates, layer: int, view: PolicyView) -> Tensor:
        return captured.states(view).clone()  # or the memory would grow with the prompts

    def loss(self, batch: Batch) -> Tensor:
        (teacher_hidden,) = batch.references.values()
        student, teacher = map(extract_model_from_parallel, (batch.model, batch.teacher))
        return logit_divergence(
            student, batch.captured.states(batch.view), teacher, teacher_hidden, batch.mask,
            batch.num_tokens, self._config,
        )  # fmt: skip


class HiddenStates:
    """Capture the last hidden states of a model's forwards, as `rk.capture` does q and k.

    Args:
        model: a transformers model, or one inside peft, DDP, FSDP or DeepSpeed.
    """

    def __init__(self, model: nn.Module) -> None:
        unwrapped: Any = extract_model_from_parallel(model)
        self._backbone = backbone_of(unwrapped)
        self.layers = [unwrapped.config.get_text_config().num_hidden_layers - 1]
        self._last: Tensor | None = None

    def states(self, view: PolicyView) -> Tensor:
        """[B, C, D], those of the view's rows in the last forward."""
        assert self._last is not None
        return self._last[:, slice(*view.rows)]

    def clear(self) -> None:
        self._last = None

    def __enter__(self) -> HiddenStates:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._last = output.last_hidden_state

        self._handle = self._backbone.register_forward_hook(keep)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._handle.remove()


def logit_divergence(
    student: Any,
    student_hidden: Tensor,
    teacher: Any,
    teacher_hidden: Tensor,
    mask: Tensor,
    normaliser: Tensor | float,
    config: RALConfig,
) -> Tensor:
    """Generalised JSD between the teacher's and the student's next tokens, a float32 scalar.

        Σ_{b,t} mask · JSD_β(π_teacher^t ‖ π_student^t) / normaliser     (arXiv 2306.13649, eq. (1))

    TRL's chunked form: logits exist for a few tokens at a time.

    Args:
        student, teacher: unwrapped transformers models. Under DeepSpeed's ZeRO-3 TRL gathers the
            weights of their heads, and takes a weight as a whole (`check_teacher`).
        student_hidden, teacher_hidden: [B, C, D] and [B, C, D'], the states that predict the
            response's tokens.
        mask: [B, C], 1 for a response token that counts.
        normaliser: number of tokens that the mean is over.
        config: β and the temperature.
    """
    heads = [model.get_output_embeddings() for model in (student, teacher)]
    num_tokens = min(_vocab_size(model) for model in (student, teacher))
    (student_weight, student_bias), (teacher_weight, teacher_bias) = (
        (_first(head.weight, num_tokens), _first(head.bias, num_tokens)) for head in heads
    )
    scales = [_logit_scaling(model) for model in (student, teacher)]
    loss, _, _ = _chunked_divergence_loss(
        student_hidden,
        teacher_hidden.to(student_hidden.device),
        student_weight,
        teacher_weight.to(student_weight.device),
        mask,
        config.distill_beta,
        num_items_in_batch=normaliser,
        student_lm_head_bias=student_bias,
        teacher_lm_head_bias=teacher_bias,
        student_logit_scale=scales[0][0],
        teacher_logit_scale=scales[1][0],
        student_final_logit_softcapping=scales[0][1],
        teacher_final_logit_softcapping=scales[1][1],
        temperature=config.temperature,
    )
    return loss.float()


def backbone_of(model: Any) -> nn.Module:
    """The module of a transformers model, or of one inside peft, that ends in hidden states."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    found: nn.Module = model.base_model
    return found


def _first(weight: Tensor | None, num_tokens: int) -> Any:
    """The rows of the tokens that both models have; a sharded tensor of that size is unchanged."""
    if weight is None or weight.shape[0] == num_tokens or _is_partitioned(weight):
        return weight
    return weight[:num_tokens]


def _vocab_size(model: Any) -> int:
    weight = model.get_output_embeddings().weight
    return int((weight.ds_shape if _is_partitioned(weight) else weight.shape)[0])


def _is_partitioned(weight: Tensor) -> bool:
    """Whether it is a parameter of DeepSpeed's ZeRO-3, whose own shape is that of nothing."""
    return hasattr(weight, "ds_shape")


def _own_vocabulary(teacher: Any) -> dict[str, int] | None:
    """The vocabulary of the teacher's own tokenizer, where its folder has one."""
    from pathlib import Path

    from transformers import AutoTokenizer

    name = getattr(teacher.config, "_name_or_path", "")
    if not name or not Path(name).is_dir():
        return None  # made in memory, or from the Hub: only the sizes and ids above are known
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError):  # none, or one of untrusted code
        return None
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return vocabulary


def _logit_scaling(model: Any) -> tuple[float, float | None]:
    """(logit scale, soft cap) of a model's head, by the names of its family."""
    text = model.config.get_text_config()
    scale = getattr(text, "logit_scale", None)
    if scale is None and getattr(text, "logits_scaling", None) is not None:
        scale = 1 / text.logits_scaling
    return (1.0 if scale is None else scale), getattr(text, "final_logit_softcapping", None)
