"""Load weights of a checkpoint into the model in training, under any names in the file."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class LoadsSavedWeights(_Base):
    """A mixin for `Trainer`: resuming loads what `save_pretrained` wrote.

    `save_pretrained` gives weights the names of the model's first checkpoints (Qwen2.5-VL:
    "visual." for "model.visual."), and `from_pretrained` maps them back. `Trainer` does not: it
    finds no known name, warns, and trains on from the weights that it started from
    (transformers#43701, as of 5.23). Adapters, FSDP and DeepSpeed keep names, so this mixin leaves
    them alone.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        unwrapped = self._whole_model()
        if unwrapped is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(unwrapped, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        unwrapped = self._whole_model()
        if unwrapped is None:
            super()._load_best_model()
        else:
            assert self.state.best_model_checkpoint is not None
            load_weights(unwrapped, self.state.best_model_checkpoint)

    def _whole_model(self) -> PreTrainedModel | None:
        """The model, if each process saves and loads all of its weights."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return None
        unwrapped = self.accelerator.unwrap_model(self.model)
        return unwrapped if isinstance(unwrapped, PreTrainedModel) else None


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Copy the weights that `model.save_pretrained(folder)` wrote into `model`, bit for bit.

    They pass through a second model on the CPU, in the widest dtype of the parameters.

    Args:
        model: a `PreTrainedModel`, on any device.
        folder: with configuration and weights.

    Raises:
        ValueError: a weight of the model is missing, or has another shape.
        OSError: the folder has no weights.
    """
    widest = reduce(torch.promote_types, {parameter.dtype for parameter in model.parameters()})
    model_class: Any = type(model)
    read, report = model_class.from_pretrained(
        folder, dtype=widest, ignore_mismatched_sizes=True, output_loading_info=True
    )
    wrong = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if wrong:
        raise ValueError(
            f"load_weights: folder must hold all weights of {model_class.__name__}; got {folder}, "
            f"where {wrong[0]} and {len(wrong) - 1} others are missing or of another shape"
        )
    model.load_state_dict(read.state_dict())
