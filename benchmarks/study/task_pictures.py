"""A picture of each task, with its question and a right response.

python -m benchmarks.study.task_pictures docs/figure3-tasks.png
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from .evaluate import TEST_SEED
from .tasks import TASKS

_EXTENTS = {"frames": 8, "resolution": 6, "chain": 8}


def draw(path: Path) -> Path:
    """One row of each task, of those that are evaluated; frames of a chain say which look they get.

    Args:
        path: of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from PIL import Image

    figure = plt.figure(figsize=(9.4, 7.0))
    above, below = cast("Any", figure.subfigures(2, 1, height_ratios=(4.6, 2.4)))
    parts: Any = [*above.subfigures(1, 2, width_ratios=(1.9, 1)), below]
    for part, (name, extent) in zip(parts, _EXTENTS.items(), strict=True):
        task = TASKS[name]
        (row,) = task.rows(1, extent, "test", TEST_SEED, style=task.style)
        content = row["prompt"][0]["content"]
        times = [text["text"] for text in content[:-1] if text["type"] == "text"]
        columns = 1 if len(row["images"]) == 1 else 8 if name == "chain" else 4
        lines = len(row["images"]) // columns
        grid: Any = part.subplots(lines, columns, squeeze=False)
        for axes, image, time in zip(
            grid.flat, row["images"], times or [""] * len(row["images"]), strict=True
        ):
            axes.imshow(image, interpolation="nearest")
            axes.set_title(time, fontsize=9)
            axes.set_axis_off()
        if name == "chain":
            for look, region in enumerate(row["evidence"], 1):
                grid[0, region["image"]].text(
                    0.5, -0.06, f"look {look}", transform=grid[0, region["image"]].transAxes,
                    ha="center", va="top", fontsize=9, color="#188038",
                )  # fmt: skip
        bottom = 0.32 if name == "chain" else 0.2
        part.subplots_adjust(
            left=0.03, right=0.97, top=0.84, bottom=bottom, wspace=0.08, hspace=0.3
        )
        size = f"{extent} frames" if task.axis == "frames" else f"{extent} × {extent} cells"
        part.suptitle(f"{name}: {size}", fontsize=11, x=0.03, ha="left")
        heights = (0.17, 0.05) if name == "chain" else (0.1, 0.03)
        part.text(0.03, heights[0], content[-1]["text"], fontsize=10)
        part.text(
            0.03, heights[1], row["completion"][0]["content"], fontsize=8, family="monospace",
            color="#188038",
        )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    # Noise is what takes room: 64 colours show it well enough.
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)
    return path


if __name__ == "__main__":
    arguments: Sequence[str] = sys.argv[1:]
    print(draw(Path(arguments[0] if arguments else "docs/figure3-tasks.png")))
