"""Supervised fine-tuning on worked answers, before RL: TRL's SFTTrainer with images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from ._requirements import check_trl

check_trl()

from transformers import TrainerCallback  # noqa: E402  (after the check, whose message is better)
from trl import SFTConfig, SFTTrainer  # noqa: E402

from .sealing import SealsCheckpoints  # noqa: E402
from .vision import image_lists  # noqa: E402


class _SFTTrainer(SealsCheckpoints, SFTTrainer):
    """TRL's SFTTrainer, with checkpoints that can be resumed, of Qwen-VL, too."""


def sft_trainer(
    model: Any,
    processor: Any,
    rows: Any,
    config: SFTConfig,
    *,
    peft_config: Any = None,
    eval_rows: Any = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> SFTTrainer:
    """TRL's SFTTrainer for rows with prompt, images and completion, with loss on completions.

    Args:
        model: of transformers.
        processor: the model's; one for images only suffices.
        rows: a `datasets.Dataset` or IterableDataset, of `ral.data.to_sft` or `ral.digits`. In some
            `images` may be None or an empty list.
        config: TRL's; `max_length` None, since cutting a prompt would cut its visual tokens.
        peft_config: of LoRA, for a model without adapters.
        eval_rows: the same, for evaluation during training.
        callbacks: further ones.

    Raises:
        ValueError: a row lacks prompt, images or completion, or the configuration asks for a
            length or a loss that these rows do not support.
    """
    first = next(iter(rows), None)
    missing = {"prompt", "completion"} - set(first or {})
    if missing:
        got = "no rows" if first is None else f"rows without {' and '.join(sorted(missing))}"
        raise ValueError(f"sft_trainer: rows must have prompt and completion; got {got}")
    if config.max_length is not None and "images" in (first or {}):
        raise ValueError(
            "sft_trainer: max_length must be None, since a prompt that is cut loses visual tokens; "
            f"got {config.max_length}: limit max_pixels or max_frames instead"
        )
    if config.completion_only_loss is False:
        raise ValueError(
            "sft_trainer: completion_only_loss must be true: a prompt's visual tokens have no "
            "loss; got false"
        )
    trainer_class: Any = _SFTTrainer
    trainer = trainer_class(
        model=model,
        args=config,
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        peft_config=peft_config,
        callbacks=list(callbacks),
    )
    trainer.data_collator = partial(_collated, trainer.data_collator)
    return trainer


def _collated(collate: Any, examples: list[dict[str, Any]]) -> Any:
    return collate(image_lists(examples))
