"""The two tasks of the study: what is trained on, and along which axis it is evaluated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StudyTask:
    """A bundled digits task.

    Attributes:
        name: of `ral.digits`.
        style: form of the responses, whose thought names the time of the frame, or the colour.
        axis: what grows: "frames" of a video, or "cells" of an image.
        trained: extents (frames, or cells on a side) of the rows that the arms train on. The start
            has seen a few rows of every extent, or it would lose the form of its answers.
        evaluated: extents that are evaluated, one visual token a cell.
        endpoint: the extent at which arms are compared. Fixed before any run.
    """

    name: str
    style: str
    axis: str
    trained: tuple[int, ...]
    evaluated: tuple[int, ...]
    endpoint: int

    def visual_tokens(self, extent: int) -> int:
        return 4 * extent if self.axis == "frames" else extent**2

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
    "frames": StudyTask("timestamp", "think", "frames", (2, 4, 8), (1, 2, 4, 8, 16, 32, 64), 32),
    "resolution": StudyTask("cell", "think", "cells", (2, 3), (1, 2, 3, 4, 6, 8), 8),
}
