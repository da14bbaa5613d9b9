"""Where the evidence of a rollout batch's rows is among its keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import ral_kernels as rk

from .looking import Evidence


def locate(
    rows: Sequence[Mapping[str, Any]],
    model_config: Any,
    ids: Tensor,
    mask: Tensor,
    fields: Mapping[str, Any],
) -> Evidence:
    """The evidence of a batch of token ids, whole images and frames of several images.

    Args:
        rows: of the dataset, with `evidence` or without: [{"image": 2}, {"frames": [3, 5]}], the
            last one included.
        model_config: the configuration of the vision-language model.
        ids, mask: int64 [B, N], padded; the first tokens are the prompt's.
        fields: the processor's output, as far as TRL keeps it.
    """
    empty = torch.full((len(rows), 1), -1, dtype=torch.int64, device=ids.device)
    none = Evidence(empty, torch.zeros(len(rows), 1, device=ids.device))
    if fields.get("pixel_values") is None or not any(row.get("evidence") for row in rows):
        return none
    inputs = {n: fields[n] for n in ("image_grid_thw", "image_sizes") if fields.get(n) is not None}
    spans = rk.spans_for(
        model_config, {**inputs, "input_ids": ids, "attention_mask": mask}, "image"
    )
    wanted = []
    for row, of_row in zip(rows, spans.spans.ids, strict=True):
        items: set[int] = set()
        for region in row.get("evidence") or ():
            first, last = region.get("frames") or (region["image"],) * 2
            items.update(range(first, last + 1))
        chosen = torch.tensor(sorted(items), device=ids.device, dtype=of_row.dtype)
        wanted.append(torch.isin(of_row, chosen).nonzero()[:, 0])
    keys = torch.nn.utils.rnn.pad_sequence(wanted, batch_first=True, padding_value=-1)
    return Evidence(keys, (keys >= 0).float()) if keys.shape[1] else none
