"""The tasks of the study: what is trained on, and along which axis it is evaluated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StudyTask:
    """A bundled digits task.

    Attributes:
        name: of `ral.digits`.
        style: form of the responses, whose thought names the time of the frame, or the colour.
        axis: what grows: "frames" of a video, or "cells" of an image.
        seen: extents (frames, or cells on a side) of the demonstrations that the start learns; of
            the longer ones few, so that answers keep their form there.
        trained: extents of the rows that the arms train on.
        evaluated: extents that are evaluated, one visual token a cell.
        endpoint: arms are compared by the mean accuracy over these extents, all longer than what
            they train on. Fixed before the study's runs, on other seeds.
        wrong_share: of the start's last demonstrations, those that answer for the last cell or
            frame; of a chain's looks, those at the frame after the right one.
        batches: rollout batches of a run.
        learning_rate: of its first step.
        spans: settings of `RALConfig` for noise on attention: what each draw is for.
        variant: of the extents; starts of two variants differ.
    """

    name: str
    style: str
    axis: str
    seen: tuple[int, ...]
    trained: tuple[int, ...]
    evaluated: tuple[int, ...]
    endpoint: tuple[int, ...]
    wrong_share: float
    batches: int
    learning_rate: float
    spans: dict[str, Any] = field(hash=False)
    variant: str = ""

    @property
    def named(self) -> str:
        """The task and its variant, which has a start of its own."""
        return self.name + self.variant

    @property
    def longest(self) -> int:
        """Tokens that a response may have."""
        from ral.digits.tasks import longest

        task: Any = self.name
        return longest(task)

    def visual_tokens(self, extent: int) -> int:
        return 4 * extent if self.axis == "frames" else extent**2

    def at_endpoint(self, of_extent: dict[str, float]) -> float:
        """The mean over the endpoint's extents."""
        return sum(of_extent[str(extent)] for extent in self.endpoint) / len(self.endpoint)

    @property
    def endpoint_label(self) -> str:
        unit = "frames" if self.axis == "frames" else "cells a side"
        *most, last = map(str, self.endpoint)
        return f"mean of {', '.join(most)} and {last} {unit}" if most else f"{last} {unit}"

    def rows(
        self, size: int, extents: int | tuple[int, ...], split: str, seed: int, **more: Any
    ) -> Any:
        """Rows of the task, of one or of several extents."""
        from ral.digits.tasks import make_dataset

        task: Any = self.name
        chosen: Any = split
        return make_dataset(
            task, size=size, split=chosen, grid=extents, frames=extents, seed=seed, **more
        )


TASKS = {
    "frames": StudyTask(
        "timestamp", "think", "frames", seen=(2, 4, 8, 16, 32, 64), trained=(2, 4, 8),
        evaluated=(1, 2, 4, 8, 16, 32, 64), endpoint=(16, 32, 64), wrong_share=0.6,
        batches=20, learning_rate=1e-3, spans={"attn_granularity": "frame"},
    ),
    "resolution": StudyTask(
        "cell", "think", "cells", seen=(1, 2, 3, 4, 6, 8), trained=(3, 4, 6),
        evaluated=(1, 2, 3, 4, 6, 8), endpoint=(8,), wrong_share=0.7,
        batches=30, learning_rate=5e-4, spans={"attn_granularity": "tile", "attn_tile": [1, 1]},
    ),
    "chain": StudyTask(
        "chain", "think", "frames", seen=(6, 8, 16, 32), trained=(6, 8, 16),
        evaluated=(6, 8, 16, 24, 32, 48), endpoint=(24, 32), wrong_share=0.15,
        batches=80, learning_rate=2e-4, spans={"attn_granularity": "frame"},
    ),
    "chain_cells": StudyTask(
        "chain_cells", "think", "cells", seen=(3, 4, 6), trained=(3, 4, 6),
        evaluated=(3, 4, 5, 6, 7, 8), endpoint=(7, 8), wrong_share=0.1,
        batches=200, learning_rate=2e-4, spans={"attn_granularity": "tile", "attn_tile": [1, 1]},
    ),
    # For larger models: a chain has at most 100 frames, because its numbers have two digits.
    "chain_long": StudyTask(
        "chain", "think", "frames", seen=(8, 16, 32, 64), trained=(8, 16, 32),
        evaluated=(8, 16, 32, 48, 64, 96), endpoint=(48, 64), wrong_share=0.15,
        batches=80, learning_rate=2e-4, spans={"attn_granularity": "frame"}, variant="-long",
    ),
}  # fmt: skip
