"""The four rollouts of test_verl, which its processes and the computation by hand share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.integrations.models import FAMILIES

COEFFICIENT = 20.0  # so large that the term shows in the gradient's norm
LEARNING_RATE = 0.02
LENGTHS, RESPONSES = (23, 40, 31, 27), (7, 12, 9, 5)
ADVANTAGES = (1.0, -0.5, 0.7, -1.2)


@dataclass(frozen=True)
class Row:
    """A prompt and its response, without padding.

    ids: int64 [T]; position_ids: int64 [T], or [4, T] in a model with pictures.
    response: how many of the last tokens it has; mask: bool [response], False for tokens of a tool.
    pictures: what the model takes besides.
    """

    ids: Tensor
    position_ids: Tensor
    response: int
    mask: Tensor
    advantage: float
    pictures: dict[str, Tensor] = field(default_factory=dict)


def rows(family: str) -> list[Row]:
    """The rollouts, in one order everywhere."""
    generator = torch.Generator().manual_seed(5)
    of_family = FAMILIES[family].pictures
    found = []
    for i, (length, response) in enumerate(zip(LENGTHS, RESPONSES, strict=True)):
        ids = torch.randint(2, 256, (length,), generator=generator)
        positions = torch.arange(length)
        pictures: dict[str, Any] = {}
        if of_family is not None:
            pictures, tokens = of_family(i)
            ids[2 : 2 + len(tokens)] = torch.tensor(tokens)
            positions = positions.expand(4, -1).clone()
        mask = torch.ones(response, dtype=torch.bool)
        if i == 1:
            mask[3:6] = False
        found.append(Row(ids, positions, response, mask, ADVANTAGES[i], pictures))
    return found
