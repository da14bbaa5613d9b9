"""The study's picture, from its JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .arms import BY_NAME
from .statistics import estimate
from .tasks import TASKS

# An arm keeps its colour in every panel. Controls are grey or dashed.
_STYLES: dict[str, dict[str, Any]] = {
    "start": {"color": "#9aa0a6", "linestyle": ":"},
    "grpo": {"color": "#202124"},
    "ral": {"color": "#1a73e8"},
    "explore": {"color": "#d93025"},
    "noise": {"color": "#d93025", "linestyle": "--", "alpha": 0.6},
    "logits": {"color": "#188038", "linestyle": "--", "alpha": 0.7},
    "opad": {"color": "#188038"},
    "zero_grpo": {"color": "#9334e6", "linestyle": "--", "alpha": 0.7},
    "zero_ral": {"color": "#9334e6"},
}


def label_of(arm: str) -> str:
    """An arm's name in tables and pictures."""
    return "start (SFT)" if arm == "start" else BY_NAME[arm].label


def draw(path: Path) -> Path:
    """Accuracy against size, and attention on the target over training, one row a task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    study = json.loads(path.read_text())
    tasks = [name for name in TASKS if any(r["task"] == name for r in study["runs"])]
    figure, grid = plt.subplots(
        len(tasks), 2, figsize=(11, 4.2 * len(tasks)), squeeze=False, constrained_layout=True
    )
    for (left, right), name in zip(grid, tasks, strict=True):
        runs = [r for r in study["runs"] if r["task"] == name]
        _accuracy(left, name, runs)
        _attention(right, runs)
    settings = study["settings"]
    figure.suptitle(
        f"{settings['seeds']} seeds, {settings['batches']} rollout batches of 128, held-out digits;"
        " bands: 95 % of the mean",
        fontsize=10, color="#5f6368",
    )  # fmt: skip
    out = path.with_suffix(".png")
    figure.savefig(out, dpi=150)
    plt.close(figure)
    return out


def _of(runs: list[dict[str, Any]], arm: str) -> list[dict[str, Any]]:
    return [r for r in runs if r["arm"] == arm]


def _accuracy(axes: Any, name: str, runs: list[dict[str, Any]]) -> None:
    task = TASKS[name]
    for arm, style in _STYLES.items():
        mine = _of(runs, arm)
        if not mine:
            continue
        sizes = list(task.evaluated)
        estimates = [estimate([r["accuracy"][str(size)] for r in mine]) for size in sizes]
        means = [100 * e.mean for e in estimates]
        x = [size if task.axis == "frames" else size**2 for size in sizes]
        axes.plot(x, means, marker="o", markersize=3.5, linewidth=1.8, label=label_of(arm), **style)
        if all(math.isfinite(e.half_width) for e in estimates):
            low, high = (
                [100 * (e.mean + sign * e.half_width) for e in estimates] for sign in (-1, 1)
            )
            axes.fill_between(x, low, high, color=style["color"], alpha=0.10, linewidth=0)
    axes.set_ylim(top=102)  # an interval may reach beyond what can be
    longest = max(task.trained) if task.axis == "frames" else max(task.trained) ** 2
    axes.axvspan(0.9, longest, color="#f1f3f4", zorder=0)
    axes.text(longest, axes.get_ylim()[0], " RL trains up to here", fontsize=8, color="#5f6368",
              va="bottom")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [str(value) for value in x])
    axes.set_xlabel("frames" if task.axis == "frames" else "cells (visual tokens)")
    axes.set_ylabel("accuracy, %")
    axes.set_title(f"{name}: right answers", loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7.5, frameon=False, loc="lower left")


def _attention(axes: Any, runs: list[dict[str, Any]]) -> None:
    for arm, style in _STYLES.items():
        mine = [r for r in _of(runs, arm) if r.get("target_curve")]
        if not mine:
            continue
        steps = [step for step, _ in mine[0]["target_curve"]]
        means = [
            100 * sum(max(r["target_curve"][i][1]) for r in mine) / len(mine)
            for i in range(len(steps))
        ]
        axes.plot(steps, means, linewidth=1.8, label=label_of(arm), **style)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("attention on the target, %")
    axes.set_title(
        "share of visual attention on what is asked, best layer", loc="left", fontsize=11
    )
    axes.grid(alpha=0.25)
