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

_EXTENTS = {"frames": 8, "resolution": 6, "chain": 8, "chain_cells": 4}
_GREEN = "#188038"


def draw(path: Path) -> Path:
    """One row of each task, of those that are evaluated; in chains it says where each look is.

    Args:
        path: of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from PIL import Image

    figure = plt.figure(figsize=(9.4, 9.0))
    parts: Any = figure.subfigures(2, 2, width_ratios=(1.9, 1), height_ratios=(1, 1.05))
    for part, (name, extent) in zip(cast("Any", parts).flat, _EXTENTS.items(), strict=True):
        task = TASKS[name]
        (row,) = task.rows(1, extent, "test", TEST_SEED, style=task.style)
        content = row["prompt"][0]["content"]
        times = [text["text"] for text in content[:-1] if text["type"] == "text"]
        columns = 1 if len(row["images"]) == 1 else 4
        lines = len(row["images"]) // columns
        grid: Any = part.subplots(lines, columns, squeeze=False)
        for axes, image, time in zip(
            grid.flat, row["images"], times or [""] * len(row["images"]), strict=True
        ):
            axes.imshow(image, interpolation="nearest")
            axes.set_title(time, fontsize=9)
            axes.set_axis_off()
        for look, region in enumerate(row["evidence"] if "chain" in name else [], 1):
            axes = grid.flat[region["image"]]
            if region.get("box") is None:
                axes.text(0.5, -0.04, f"look {look}", transform=axes.transAxes, ha="center",
                          va="top", fontsize=9, color=_GREEN)  # fmt: skip
                continue
            left, top, right, bottom = (x - 0.5 for x in region["box"])
            axes.plot([left, right, right, left, left], [top, top, bottom, bottom, top],
                      color="white", linewidth=2)  # fmt: skip
            axes.text(left + 2, top + 2, str(look), ha="left", va="top", fontsize=8, color="white",
                      bbox={"facecolor": _GREEN, "pad": 1, "linewidth": 0})  # fmt: skip
        part.subplots_adjust(left=0.03, right=0.97, top=0.86, bottom=0.2, wspace=0.08, hspace=0.3)
        size = f"{extent} frames" if task.axis == "frames" else f"{extent} × {extent} cells"
        part.suptitle(f"{name}: {size}", fontsize=11, x=0.03, ha="left")
        part.text(0.03, 0.11, content[-1]["text"], fontsize=9)
        answer = row["completion"][0]["content"].replace("</think>", "</think>\n")
        part.text(0.03, 0.015, answer, fontsize=7.5, family="monospace", color=_GREEN)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    # Noise is what takes room: 64 colours show it well enough.
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)
    return path


if __name__ == "__main__":
    arguments: Sequence[str] = sys.argv[1:]
    print(draw(Path(arguments[0] if arguments else "docs/figure3-tasks.png")))
