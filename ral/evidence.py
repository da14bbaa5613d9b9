"""Where the evidence of a rollout batch's rows is among its keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import ral_kernels as rk

from .looking import Evidence

_FIELDS = ("image_grid_thw", "image_sizes")  # of the processor's output, which TRL keeps


def locate(
    rows: Sequence[Mapping[str, Any]],
    model_config: Any,
    ids: Tensor,
    mask: Tensor,
    fields: Mapping[str, Any],
    sigma: float,
) -> Evidence:
    """The evidence of a batch of token ids, by `rk.region_weights`: all parts of a row as one.

    Args:
        rows: of the dataset, with lists of `images`, and with `evidence` as that function takes it;
            None or without in some.
        model_config: the configuration of the vision-language model.
        ids, mask: int64 [B, N], padded.
        fields: the processor's output, as far as TRL keeps it.
        sigma: standard deviation of the Gaussian that smooths it, in visual tokens.

    Raises:
        NotImplementedError: rollouts hold other images than their rows: tools returned some.
    """
    if fields.get("pixel_values") is None or not any(row.get("evidence") for row in rows):
        nowhere = torch.full((len(rows), 1), -1, dtype=torch.int64, device=ids.device)
        return Evidence(nowhere, torch.zeros(len(rows), 1, device=ids.device))
    images = [row.get("images") or [] for row in rows]
    held, own = fields.get("num_images"), [len(of_row) for of_row in images]
    if held is not None and torch.as_tensor(held).tolist() != own:
        raise NotImplementedError(
            "RALTrainer: evidence is not supported where tools return images; rows hold "
            f"{own} images, their rollouts {torch.as_tensor(held).tolist()}"
        )
    inputs = {name: fields[name] for name in _FIELDS if fields.get(name) is not None}
    found = rk.region_weights(
        model_config,
        {**inputs, "input_ids": ids, "attention_mask": mask},
        [[row.get("evidence") or []] for row in rows],
        image_sizes=[(image.height, image.width) for of_row in images for image in of_row],
        sigma=sigma,
    )
    return Evidence(found.ids[:, 0], found.values[:, 0])
