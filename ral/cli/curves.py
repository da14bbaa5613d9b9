"""curves.png: how a run went, from its metrics file."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .progress import METRICS, read_metrics

CURVES = "curves.png"
Row = dict[str, Any]


def draw_curves(folder: Path, title: str = "") -> Path | None:
    """Draw the metrics of a run.

    For RL: reward with its parts, and by inner step divergence and gradient share of the attention
    terms. For supervised fine-tuning: loss and token accuracy.

    Args:
        folder: output_dir of a run.
        title: above the picture.

    Returns:
        The picture, or None if matplotlib or the metrics are missing.
    """
    if importlib.util.find_spec("matplotlib") is None or not (folder / METRICS).exists():
        return None
    rows = read_metrics(folder / METRICS)
    panels = [
        (draw, name)
        for draw, name in (
            (_rewards, "reward"),
            (_inner("attn/divergence", "mean divergence, nats"), "attn/divergence"),
            (_inner("attn/grad_share", "‖∇ attention‖ / ‖∇ GRPO‖"), "attn/grad_share"),
            (_distillation, "distill/attention"),
            (_distillation, "distill/logits"),
            (_loss, "mean_token_accuracy"),
        )
        if any(row.get(name) is not None for row in rows)
    ]
    names = [name for _, name in panels]
    # One panel of distillation, whichever of its terms are on; the divergence is then the same.
    panels = list({draw: (draw, name) for draw, name in panels}.values())
    if "distill/attention" in names and "attn/loss" not in rows[0]:
        panels = [(draw, name) for draw, name in panels if name != "attn/divergence"]
    if not panels:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 3.6), layout="constrained", squeeze=False
    )
    for panel, (draw, _) in zip(axes[0], panels, strict=True):
        draw(panel, rows)
        panel.grid(alpha=0.3)
        panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    if title:
        figure.suptitle(title)
    path = folder / CURVES
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _series(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _smooth(values: Sequence[float]) -> list[float]:
    """Running mean over a tenth of the run, looking back only."""
    window = max(1, len(values) // 10)
    return [
        sum(part) / len(part)
        for part in (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))
    ]


def _rewards(axes: Any, rows: Sequence[Row]) -> None:
    names = {"reward": "reward", "accuracy": "accuracy", "format": "format"}
    for number, (name, label) in enumerate(names.items()):
        steps, values = _series(rows, name)
        if not values:
            continue
        colour = f"C{number}"
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(values), color=colour, label=label)
    axes.set(xlabel="optimizer step", ylabel="mean over rollouts")
    top = max(axes.get_ylim()[1], 1.02)  # most rewards end at 1
    axes.set_ylim(0, top)
    axes.legend(frameon=False, loc="lower right")


def _inner(name: str, label: str) -> Callable[[Any, Sequence[Row]], None]:
    def draw(axes: Any, rows: Sequence[Row]) -> None:
        found = {
            int(match[1]): key
            for row in rows
            for key in row
            if (match := re.fullmatch(rf"{re.escape(name)}/inner_(\d+)", key))
        }
        lines = {f"inner step {n + 1}": found[n] for n in sorted(found)} or {"every step": name}
        positive = False
        for number, (legend, key) in enumerate(lines.items()):
            steps, values = _series(rows, key)
            positive |= any(value > 0 for value in values)
            colour = f"C{number % 10}"
            if len(values) > 20:
                axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
                axes.plot(steps, _smooth(values), color=colour, label=legend)
            else:
                axes.plot(steps, values, color=colour, marker="o", markersize=3, label=legend)
        axes.set(xlabel="optimizer step", ylabel=label)
        if positive:
            axes.set_ylim(bottom=0)
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        if len(lines) <= 8:
            axes.legend(frameon=False)

    return draw


def _distillation(axes: Any, rows: Sequence[Row]) -> None:
    for number, (name, label) in enumerate(
        {"distill/attention": "attention", "distill/logits": "tokens"}.items()
    ):
        steps, values = _series(rows, name)
        if values:
            axes.plot(steps, values, color=f"C{number}", alpha=0.25, linewidth=0.8)
            axes.plot(steps, _smooth(values), color=f"C{number}", label=label)
    axes.set(xlabel="optimizer step", ylabel="divergence from the teacher, nats")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _loss(axes: Any, rows: Sequence[Row]) -> None:
    for number, (name, label) in enumerate(
        {"loss": "loss", "mean_token_accuracy": "token accuracy"}.items()
    ):
        steps, values = _series(rows, name)
        axes.plot(steps, values, color=f"C{number}", alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(values), color=f"C{number}", label=label)
    axes.set(xlabel="optimizer step")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
