"""The trained tiny model that comes with the package, for a first attention map without a download.

`python -m ral.digits` trains it again: supervised fine-tuning on demonstrations that are all right
(`ral.digits.start`), five minutes of one core. The file holds the weights in float16.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch

from .model import make_model, make_processor

WEIGHTS = "pretrained.safetensors"
RECIPE: dict[str, Any] = {
    "task": "timestamp", "style": "think", "wrong_share": 0.0, "seed": 0, "steps": 1200,
}  # fmt: skip


def load_pretrained(*, attn_implementation: str = "sdpa") -> tuple[Any, Any]:
    """The bundled model and its processor, for the task `timestamp` of `make_dataset`.

    The frames of a prompt stand after their times: "37s", picture, and so on. The question is
    "Which digit is in the red tile?"; the response names the time, then the digit. scikit-learn's
    scans of the split "test" were in no picture of the training.

    Args:
        attn_implementation: as in transformers; "ral" works once ral_kernels is imported.

    Returns:
        A `Qwen2_5_VLForConditionalGeneration` of 256,128 weights, float32, in evaluation mode; and
        its processor, for images.

    Raises:
        ImportError: transformers is missing.
    """
    from safetensors.torch import load_file

    with as_file(files("ral.digits") / WEIGHTS) as path:
        weights = load_file(path)
    model = make_model(attn_implementation=attn_implementation)
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return model, make_processor()


def train_pretrained(
    path: str | Path, *, log: Callable[[str], None] | None = print, **changes: Any
) -> None:
    """Train the bundled model by its recipe, and write its weights in float16.

    Args:
        path: of the safetensors file, whose metadata hold the recipe.
        log: gets a line now and then; None for silence.
        changes: of `RECIPE`; further arguments of `ral.digits.start.train_start`.
    """
    import tempfile

    from safetensors.torch import save_file
    from transformers import AutoModelForImageTextToText

    from .start import train_start

    recipe = {**RECIPE, **changes}
    with tempfile.TemporaryDirectory() as folder:
        train_start(folder, **recipe, log=log)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float16)
    save_file(model.state_dict(), path, metadata={"recipe": json.dumps(recipe)})
