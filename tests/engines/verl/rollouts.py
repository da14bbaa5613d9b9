"""What test_update's processes and its computation by hand share: four rollouts, and the cases."""

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
ENVIRONMENT = {"VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "tests.engines.verl.on_cpu"}
WORKER = "worker"  # a case of its own: verl's worker runs it
FLASH = "varlen_on_cpu"  # an attention that runs where flash attention runs: `on_cpu`


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


@dataclass(frozen=True)
class Case:
    """A family, and how its actor runs.

    ral: settings of the term. micro: rows of a micro-batch. shuffled: micro-batches of the update
    hold other rows than those of the old log-probabilities. tokens: of a dynamic micro-batch, or 0.
    """

    family: str = "qwen2"
    ral: tuple[tuple[str, Any], ...] = ()
    attention: str = "sdpa"
    checkpointing: bool = False
    packed: bool = True
    micro: int = 4
    tokens: int = 0
    shuffled: bool = False
    ulysses: int = 1
    lora: int = 0
    dtype: str = "fp32"


CASES: dict[str, Case] = {
    "packed": Case(),
    "checkpointed": Case(checkpointing=True, attention="ral"),
    "padded": Case(packed=False),
    "micro-batches": Case(
        micro=2, shuffled=True, ral=(("layers", "all"), ("snapshot_device", "cpu"))
    ),
    "dynamic": Case(tokens=64, shuffled=True),
    "sequence mean": Case(ral=(("reduction", "sequence_mean"), ("divergence", "kl")), micro=2),
    "pictures": Case(family="qwen2_5_vl", checkpointing=True),
    "pictures of Qwen3-VL": Case(family="qwen3_vl", checkpointing=True),
    "lora": Case(lora=4),
    "bfloat16": Case(dtype="bf16", checkpointing=True),
    "ulysses": Case(ulysses=2, attention=FLASH, micro=2, shuffled=True),
    "ulysses pictures": Case(ulysses=2, family="qwen2_5_vl", checkpointing=True, shuffled=True),
}
