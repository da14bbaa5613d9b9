"""The study's pictures, one a task, from its JSON, and that of `confirm` from its lines.

python -m benchmarks.study.plot FILE.json FILE.jsonl    # draws them again
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ral.digits.chains import LOOKS

from .arms import ARMS, BY_NAME
from .report import FIXED_LABELS, Run, at_endpoint, by_arm, compare, label_of
from .statistics import Estimate, estimate, paired
from .tasks import TASKS, StudyTask

# An arm keeps its colour in every panel.
_STYLES: dict[str, dict[str, Any]] = {
    "start": {"color": "#9aa0a6", "linestyle": ":"},
    "teacher": {"color": "#9aa0a6", "linestyle": "-."},
    "grpo": {"color": "#202124"},
    "grpo_t12": {"color": "#e37400"},
    "ral": {"color": "#1a73e8"},
    "noise": {"color": "#d93025", "linestyle": "--", "alpha": 0.7},
    "explore": {"color": "#d93025"},
    "zero_grpo": {"color": "#9334e6", "linestyle": "--", "alpha": 0.8},
    "zero_ral": {"color": "#9334e6"},
    "logits": {"color": "#188038", "linestyle": "--", "alpha": 0.8},
    "opad": {"color": "#188038"},
    # of the study of objectives
    "plain": {"color": "#202124"},
    "plain_ral": {"color": "#1a73e8"},
    "evidence": {"color": "#9334e6"},
    "evidence_shuffled": {"color": "#9334e6", "linestyle": "--", "alpha": 0.8},
    "evidence_all": {"color": "#d93025"},
    "evidence_warmup": {"color": "#e37400"},
    "evidence_wrong": {"color": "#d93025", "linestyle": ":"},
    "reward": {"color": "#188038", "linestyle": "--", "alpha": 0.8},
    "credit": {"color": "#188038"},
    "sum": {"color": "#12a4af"},
}
_BASES = ("grpo", "plain")  # what gains are over; a study has one of them
_EVIDENCE = ("evidence", "evidence_shuffled", "evidence_all", "evidence_warmup", "evidence_wrong")
_ACCURACY = (
    "start", "grpo", "grpo_t12", "ral", "noise", "explore", "zero_grpo", "zero_ral",
    "plain", "plain_ral", *_EVIDENCE,
)  # fmt: skip
_GAIN = ("grpo_t12", "ral", "noise", "explore", "plain_ral", *_EVIDENCE[:4], "credit")
_BANDS = ("ral", "explore", "opad", "evidence_all")  # of the gain: five at once cannot be read
_ATTENTION = ("grpo", "ral", "noise", "explore", "logits", "opad", "plain", *_EVIDENCE, "credit")
_GREY = "#5f6368"
# Arms without a style of their own, where a study has little else.
_OTHERS = ("#1a73e8", "#e37400", "#188038", "#9334e6", "#12a4af", "#d93025")


def draw(path: Path) -> list[Path]:
    """For each task: accuracy, gain over GRPO, attention over training, and every arm's endpoint.

    Args:
        path: the study's JSON; pictures lie beside it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    study = json.loads(path.read_text())
    drawn = []
    for name, task in TASKS.items():
        of = by_arm(study["runs"], name)
        if not of:
            continue
        lower = max(3.6, 0.26 * len(compare(of, name)) + 1.3)
        figure = plt.figure(figsize=(12, 4.6 + lower), constrained_layout=True)
        # Of their own, so that the long names below leave the panels above as they are.
        parts: Any = figure.subfigures(2, 1, height_ratios=(4.4, lower))
        above, below = parts
        upper: Any = above.subplots(1, 2)
        _accuracy(upper[0], task, of)
        _gain(upper[1], task, of)
        under: Any = below.subplots(1, 2)
        _attention(under[0], task, of)
        _endpoint(under[1], name, of)
        settings = study["settings"]
        batches = settings["batches"] or task.batches
        figure.suptitle(
            f"{name}: tiny Qwen2.5-VL on held-out handwritten digits; {settings['seeds']} seeds, "
            f"{batches} batches of 128 rollouts"
            + ("; bands: 95 % of the mean" if settings["seeds"] > 2 else ""),
            fontsize=10, color=_GREY,
        )  # fmt: skip
        out = path.with_name(f"{path.stem}-{name}.png")
        figure.savefig(out, dpi=110)
        plt.close(figure)
        drawn.append(out)
    return drawn


def draw_starts(path: Path) -> Path:
    """For each start of a chain: accuracy and gain against its axis, with 95 % intervals.

    Args:
        path: runs as JSON lines, of `benchmarks.study.confirm report --json`; the picture lies
            beside it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    runs = [{"task": "chain", **json.loads(line)} for line in path.read_text().splitlines()]
    name = runs[0]["task"]
    task = TASKS[name]
    starts = sorted({run["start"] for run in runs})
    figure = plt.figure(figsize=(12, 4.2 * len(starts)), constrained_layout=True)
    rows: Any = figure.subplots(len(starts), 2, squeeze=False)
    for (accuracy, gain), start in zip(rows, starts, strict=True):
        of = by_arm([run for run in runs if run["start"] == start], name)
        _accuracy(accuracy, task, of)
        accuracy.set_title(f"start {start}: accuracy", loc="left", fontsize=11)
        _gain_of_each(gain, task, of)
        gain.set_title(
            f"start {start}: gain over the arm that each is compared with", loc="left", fontsize=11
        )
    figure.suptitle(
        f"{name}: tiny Qwen2.5-VL follows {LOOKS} looks; {len({run['seed'] for run in runs})} "
        "seeds from each start; 95 % of the mean",
        fontsize=10, color=_GREY,
    )  # fmt: skip
    out = path.with_suffix(".png")
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return out


def _gain_of_each(axes: Any, task: StudyTask, of: dict[str, dict[int, Run]]) -> None:
    """Paired differences at each size; points of one size lie beside one another."""
    axes.axhline(0, color=_STYLES["grpo"]["color"], linewidth=1.2)
    pairs = [
        (arm, against) for arm in of if arm in BY_NAME for against in BY_NAME[arm].against
        if against in of
    ]  # fmt: skip
    for place, (arm, against) in enumerate(pairs):
        values = [
            [{seed: run["accuracy"][str(n)] for seed, run in of[name].items()}
             for name in (arm, against)]
            for n in task.evaluated
        ]  # fmt: skip
        found = [one for one in (paired(*both) for both in values) if one is not None]
        x = [n * 1.025 ** (place - (len(pairs) - 1) / 2) for n in _sizes(task)]
        axes.errorbar(
            x, [100 * one.mean for one in found], yerr=[100 * one.half_width for one in found],
            fmt="o-", markersize=4, linewidth=1.4, capsize=2.5, color=_style_of(arm)["color"],
            label=f"{label_of(arm)} − {label_of(against)}",
        )  # fmt: skip
    _along_sizes(axes, task)
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.35 * (high - low), high + 0.08 * (high - low))  # room for the legend
    axes.set_ylabel("difference, points")
    _legend(axes, loc="lower left")


def _sizes(task: StudyTask) -> list[int]:
    """Values of the horizontal axis: frames, or cells."""
    return [n if task.axis == "frames" else n**2 for n in task.evaluated]


def _style_of(arm: str) -> dict[str, Any]:
    others = [one.name for one in ARMS if one.name not in _STYLES]
    return _STYLES.get(arm) or {"color": _OTHERS[others.index(arm) % len(_OTHERS)]}


def _shown(chosen: Sequence[str], of: dict[str, dict[int, Run]]) -> list[str]:
    """The arms of a panel: those chosen for it, or all, if a study has hardly any of them."""
    found = [arm for arm in chosen if arm in of and arm not in FIXED_LABELS and arm != "grpo"]
    if len(found) > 1:
        return [arm for arm in chosen if arm in of]
    return [arm for arm in of if arm not in FIXED_LABELS or arm in chosen]


def _line(
    axes: Any, x: list[int], estimates: list[Estimate], arm: str, band: bool = True, **more: Any
) -> None:
    style = _style_of(arm)
    means = [100 * e.mean for e in estimates]
    axes.plot(x, means, markersize=3.5, linewidth=1.8, label=label_of(arm), **style, **more)
    if band and all(e.seeds > 2 for e in estimates):  # of two seeds it covers everything
        low, high = ([100 * (e.mean + s * e.half_width) for e in estimates] for s in (-1, 1))
        axes.fill_between(x, low, high, color=style["color"], alpha=0.10, linewidth=0)


def _along_sizes(axes: Any, task: StudyTask, shortest: int = 1) -> None:
    x = [value for n, value in zip(task.evaluated, _sizes(task), strict=True) if n >= shortest]
    longest = max(task.trained) if task.axis == "frames" else max(task.trained) ** 2
    axes.axvspan(x[0] * 0.9, longest, color="#f1f3f4", zorder=0)
    axes.text(longest * 0.97, 0.985, "RL trains up to here", transform=axes.get_xaxis_transform(),
              fontsize=8, color=_GREY, va="top", ha="right")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [str(value) for value in x])
    axes.minorticks_off()
    axes.set_xlim(x[0] * 0.9, x[-1] * 1.1)
    axes.set_xlabel("frames" if task.axis == "frames" else "cells (visual tokens)")
    axes.grid(alpha=0.25)


def _legend(axes: Any, **options: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False, **options)


def _accuracy(axes: Any, task: StudyTask, of: dict[str, dict[int, Run]]) -> None:
    for arm in _shown(_ACCURACY, of):
        runs = of[arm].values()
        estimates = [estimate([r["accuracy"][str(n)] for r in runs]) for n in task.evaluated]
        _line(axes, _sizes(task), estimates, arm, marker="o")
    _along_sizes(axes, task)
    axes.set_ylim(top=min(102, axes.get_ylim()[1] + 3))
    axes.set_ylabel("right answers, %")
    axes.set_title("accuracy", loc="left", fontsize=11)
    _legend(axes, loc="lower left")


def _gain(axes: Any, task: StudyTask, of: dict[str, dict[int, Run]]) -> None:
    axes.axhline(0, color=_STYLES["grpo"]["color"], linewidth=1.2)
    # Sizes below any in training may break down, and would set the scale.
    sizes = [n for n in task.evaluated if n >= min(task.trained)]
    over_grpo = [arm for arm in _shown(_GAIN, of) if arm not in (*_BASES, "opad", *FIXED_LABELS)]
    base = next((arm for arm in _BASES if arm in of), "grpo")
    for arm, against in [*((arm, base) for arm in over_grpo), ("opad", "logits")]:
        if arm not in of or against not in of:
            continue
        estimates = []
        for n in sizes:
            ours, theirs = (
                {seed: r["accuracy"][str(n)] for seed, r in of[name].items()}
                for name in (arm, against)
            )
            difference = paired(ours, theirs)
            if difference is not None:
                estimates.append(difference)
        if len(estimates) == len(sizes):
            x = _sizes(task)[-len(sizes) :]
            _line(axes, x, estimates, arm, band=arm in _BANDS, marker="o")
    _along_sizes(axes, task, min(sizes))
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.25 * (high - low), high + 0.05 * (high - low))  # room for the legend
    axes.set_ylabel("difference, points")
    distilled = " (OPAD: over distillation of tokens)" if "opad" in of else ""
    axes.set_title(f"gain over GRPO{distilled}", loc="left", fontsize=11)
    _legend(axes, loc="lower left", ncols=2)


def _attention(axes: Any, task: StudyTask, of: dict[str, dict[int, Run]]) -> None:
    for arm in _shown(_ATTENTION, of):
        runs = list(of[arm].values())
        steps = [done for done, _ in runs[0]["target_curve"]]
        estimates = [
            estimate([max(r["target_curve"][i][1]) for r in runs]) for i in range(len(steps))
        ]
        _line(axes, steps, estimates, arm)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("rollout batches")
    axes.set_ylabel("share of visual attention, %")
    what = "frame" if task.axis == "frames" else "cell"
    extent = max(task.trained)
    size = f"{extent} frames" if task.axis == "frames" else f"{extent} × {extent} cells"
    axes.set_title(f"attention on the asked {what} ({size}, best layer)", loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    _legend(axes, loc="best")


def _endpoint(axes: Any, name: str, of: dict[str, dict[int, Run]]) -> None:
    """Every arm's difference from the one it is compared with."""
    compared = compare(of, name)
    for place, one in enumerate(compared):
        difference = one.difference
        color = _STYLES.get(one.arm, {}).get("color", _GREY)
        sure = one.adjusted < 0.05
        axes.errorbar(
            [100 * difference.mean], [place], xerr=[[100 * difference.half_width]] * 2, fmt="o",
            color=color, markersize=5 if sure else 4, markerfacecolor=color if sure else "white",
            linewidth=1.6, capsize=2.5,
        )  # fmt: skip
    labels = [
        label_of(one.arm) + ("" if one.against in _BASES else f"  − {label_of(one.against)}")
        for one in compared
    ]
    axes.set_yticks(range(len(compared)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color=_STYLES["grpo"]["color"], linewidth=1.2)
    grpo = next((of[arm] for arm in _BASES if arm in of), None)
    mean = "" if grpo is None else f" {estimate(list(at_endpoint(name, grpo).values()))} %"
    axes.set_xlabel("difference, points; filled: p < 0.05 by Holm")
    axes.set_title(f"every arm − GRPO{mean}\n{TASKS[name].endpoint_label}", loc="left", fontsize=11)
    axes.grid(alpha=0.25, axis="x")


def main(paths: Sequence[str]) -> int:
    for path in paths:
        file = Path(path)
        for picture in [draw_starts(file)] if file.suffix == ".jsonl" else draw(file):
            print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
