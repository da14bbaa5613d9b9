"""Answers of a model to held-out digits: right, and right for the right reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .tasks import StudyTask

_BATCH = 128


def accuracies(
    model: Any,
    processor: Any,
    task: StudyTask,
    style: str,
    rows: int,
    extents: Sequence[int],
    seed: int,
) -> tuple[dict[int, float], dict[int, float]]:
    """Shares of greedy responses at each extent; the same rows for every model.

    Returns:
        Those whose answer is right, which is what is rewarded; and those that are the demonstration
        word by word, which also name the frame, or the colour, that the answer is in.
    """
    from ral.digits.evaluate import respond
    from ral.rewards import accuracy_reward

    training = model.training
    model.eval()
    right, grounded = {}, {}
    for extent in extents:
        held_out = list(task.rows(rows, extent, "test", seed, style=style))
        scores, whole = 0.0, 0
        for first in range(0, rows, _BATCH):
            batch = held_out[first : first + _BATCH]
            said = respond(model, processor, batch)
            scores += sum(
                accuracy_reward(
                    said,
                    [row["solution"] for row in batch],
                    [row["problem_type"] for row in batch],
                )
            )
            whole += sum(
                text.strip() == row["completion"][0]["content"]
                for text, row in zip(said, batch, strict=True)
            )
        right[extent], grounded[extent] = scores / rows, whole / rows
    model.train(training)
    return right, grounded
