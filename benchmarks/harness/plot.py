"""The picture of a sweep, from its JSON alone: time and memory against visual tokens.

    python -m benchmarks.harness.plot results.json    # draws the PNG beside the JSON again

If the sweep measured span layouts, another row shows the cost of marginals in each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from ..problems import OBJECTIVES
from .layouts import LABELS
from .measure import MODES
from .objective import Objective

# Okabe and Ito's palette, which the colour-blind tell apart; dashes and markers carry the same
# distinction again.
STYLES: dict[str, tuple[str, str, str]] = {
    "ral": ("#D55E00", "o", "-"),
    "ral_plain": ("#E69F00", "s", "--"),
    "sdpa": ("#000000", "D", "-"),
    "sdpa_one_hot": ("#0072B2", "^", "-"),
    "flex_one_hot": ("#56B4E9", "v", "--"),
    "per_span": ("#CC79A7", "P", "-."),
    "chunked": ("#009E73", "X", "-"),
    "eager": ("#7F7F7F", "p", ":"),
    "ral_again": ("#CC79A7", "P", "-."),
    "ral_dense": ("#E69F00", "s", "--"),
    "chunked_16": ("#000000", "D", "-"),
    "chunked_64": ("#0072B2", "^", "-"),
    "chunked_256": ("#009E73", "X", "-"),
    "sdpa_cudnn": ("#000000", "<", "--"),
    "sdpa_flash": ("#000000", ">", "-."),
    "sdpa_efficient": ("#000000", "d", ":"),
}
LAYOUT_STYLES = {
    "aligned": ("#000000", "D", ":"),
    "offset": ("#D55E00", "o", "-"),
    "64": ("#0072B2", "^", "--"),
    "16": ("#CC79A7", "P", "-."),
}
OTHER_STYLE = ("#F0E442", "h", "-")
FONT = 11
# smallest distance between two labels at the right edge, as a share of the panel's height
GAP = 0.052
LAYOUT_GAP = 0.085  # of a panel of layouts
# inches
WIDTH, TOP, BOTTOM = 17.0, 1.122, 0.726
PANEL, BETWEEN, LAYOUT_PANEL = 4.752, 1.25, 2.9

Series = dict[str, list[tuple[int, float]]]  # line -> points


def draw(path: Path, mode: str | None = None) -> Path:
    """Draw `path` (a sweep's JSON) into a PNG beside it, for `mode` or the fullest there is."""
    run = json.loads(path.read_text())
    objective = OBJECTIVES[run["objective"]]
    mode = mode or run["settings"]["modes"][-1]
    target = path.with_suffix(".png")
    lines = {
        "time, ms": _series(run, mode, "ms", lambda row: row["ms"]["median"]),
        "peak memory beyond the inputs, MiB": _series(
            run, mode, "peak_bytes", lambda row: row["peak_bytes"] / 2**20
        ),
    }
    costs = _layout_costs(run)
    heights = [PANEL] + [LAYOUT_PANEL] * len(costs)
    figure, panels = _grid(heights)
    labels = {name: contestant.label for name, contestant in objective.registry.items()}
    for panel, (what, series) in zip(panels[0], lines.items(), strict=True):
        _draw_panel(panel, what, run)
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))
        _draw_lines(panel, series, STYLES, labels, GAP)
    _mark_fewer_runs(panels[0][0], run, mode)
    for row, (ours, by_mode) in zip(panels[1:], costs.items(), strict=True):
        for panel, each in zip(row, MODES, strict=True):
            if each not in by_mode:
                panel.remove()
                continue
            what = f"cost of marginals by layout, {each}: time / without"
            what += "" if ours == "ral" else f" ({ours})"
            _draw_panel(panel, what, run)
            panel.axhline(1.0, color="#7F7F7F", linewidth=1.0)
            _draw_lines(panel, by_mode[each], LAYOUT_STYLES, LABELS, LAYOUT_GAP)
    height = figure.get_figheight()
    figure.suptitle(
        _title(run, mode, objective),
        fontsize=FONT + 4, x=0.05, y=1 - 0.132 / height, ha="left", weight="bold",
    )  # fmt: skip
    figure.text(
        0.05, 1 - 0.6468 / height, _subtitle(run), fontsize=FONT, color="#444444", ha="left"
    )
    figure.savefig(target)
    plt.close(figure)
    return target


def _grid(heights: Sequence[float]) -> tuple[Figure, Any]:
    """Rows of two panels, of these heights in inches, and room for labels right of each."""
    height = TOP + sum(heights) + BETWEEN * (len(heights) - 1) + BOTTOM
    figure, panels = plt.subplots(
        len(heights), 2, figsize=(WIDTH, height), dpi=120, squeeze=False, height_ratios=heights
    )
    figure.subplots_adjust(
        left=0.05, right=0.82, top=1 - TOP / height, bottom=BOTTOM / height, wspace=0.75,
        hspace=BETWEEN * len(heights) / sum(heights),
    )  # fmt: skip
    return figure, panels


def _layout_costs(run: Mapping[str, Any]) -> dict[str, dict[str, Series]]:
    """ours -> mode -> layout -> [(visual tokens, time / time without spans)]."""
    costs: dict[str, dict[str, Series]] = {}
    for size in run["sizes"]:
        for row in size.get("layouts", []):
            if "layout" in row and "ms" in row:
                ours = row["contestant"].removesuffix(f"_{row['layout']}")
                series = costs.setdefault(ours, {}).setdefault(row["mode"], {})
                point = (size["visual_tokens"], row["ratio"]["median"])
                series.setdefault(row["layout"], []).append(point)
    return costs


def _series(run: Mapping[str, Any], mode: str, field: str, value: Any) -> Series:
    """contestant -> [(visual tokens, value)] of the sizes at which it was right and measured."""
    series: Series = {}
    for size in run["sizes"]:
        for row in size["results"]:
            if row["mode"] == mode and field in row and row.get("status") != "wrong":
                point = (size["visual_tokens"], max(value(row), 1e-2))
                series.setdefault(row["contestant"], []).append(point)
    return series


def _mark_fewer_runs(panel: Axes, run: Mapping[str, Any], mode: str) -> None:
    """The number of runs at each point that has fewer than others of its size."""
    for size in run["sizes"]:
        rows = [row for row in size["results"] if row["mode"] == mode and "repeats" in row]
        most = max((row["repeats"] for row in rows), default=0)
        for row in rows:
            if row["repeats"] < most:
                panel.annotate(
                    f"n={row['repeats']}",
                    (size["visual_tokens"], row["ms"]["median"]),
                    xytext=(0, 7), textcoords="offset points", ha="center", fontsize=FONT - 3,
                )  # fmt: skip


def _draw_panel(panel: Axes, what: str, run: Mapping[str, Any]) -> None:
    """All but the lines and the vertical scale."""
    tokens = sorted({size["visual_tokens"] for size in run["sizes"]})
    panel.set_xscale("log")
    panel.set_xlabel("visual tokens", fontsize=FONT + 1)
    panel.set_title(what, fontsize=FONT + 2, loc="left")
    panel.xaxis.set_major_locator(FixedLocator(tokens))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    panel.tick_params(labelsize=FONT)
    panel.grid(True, which="major", color="#DDDDDD", linewidth=0.8)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    if len(tokens) > 1:
        panel.set_xlim(tokens[0] / 1.12, tokens[-1] * 1.06)


def _draw_lines(
    panel: Axes,
    series: Series,
    styles: Mapping[str, tuple[str, str, str]],
    labels: Mapping[str, str],
    gap: float,
) -> None:
    for name, points in series.items():
        colour, marker, dash = styles.get(name, OTHER_STYLE)
        ours = name == "ral"
        panel.plot(
            *zip(*points, strict=True),
            color=colour,
            marker=marker,
            linestyle=dash,
            linewidth=3.2 if ours else 1.8,
            markersize=9 if ours else 7,
            markeredgecolor="white",
            markeredgewidth=0.6,
            zorder=3 if ours else 2,
        )
    low, high = panel.get_ylim()
    panel.set_ylim(low, high)  # fixed: the labels are placed in it
    _label_lines(panel, series, styles, labels, gap)


def _label_lines(
    panel: Axes,
    series: Series,
    styles: Mapping[str, tuple[str, str, str]],
    labels: Mapping[str, str],
    gap: float,
) -> None:
    """Name each line at the right edge, level with its end, moved apart where two overlap.

    The label of a line that ends early is at the height where the line was heading, and says how
    far it went.
    """
    if not series:
        panel.text(0.5, 0.5, "nothing was measured", transform=panel.transAxes, ha="center")
        return
    to_axes = panel.transAxes.inverted()

    def place(point: tuple[int, float]) -> tuple[float, float]:
        x, y = to_axes.transform(panel.transData.transform(point))
        return float(x), float(y)

    last = max(points[-1][0] for points in series.values())
    levels = {}
    for name, points in series.items():
        x, level = place(points[-1])
        if points[-1][0] < last and len(points) > 1:
            x_before, before = place(points[-2])
            level += (level - before) / (x - x_before) * (place((last, 1.0))[0] - x)
        levels[name] = min(max(level, 0.0), 1.0)
    names = sorted(levels, key=lambda name: levels[name])
    heights = _spread([levels[name] for name in names], gap)
    for name, height in zip(names, heights, strict=True):
        colour, marker, dash = styles.get(name, OTHER_STYLE)
        end, value = series[name][-1]
        label = labels[name]
        text = label if end == last else f"{label}, to {end:,}"
        style: dict[str, Any] = {"color": colour, "transform": panel.transAxes, "clip_on": False}
        if end == last:
            x, y = place((end, value))
            panel.plot([x, 1.04], [y, height], linewidth=0.7, alpha=0.6, **style)
        panel.plot([1.04, 1.085, 1.13], [height] * 3, linestyle=dash, linewidth=1.8, **style)
        panel.plot([1.085], [height], marker=marker, markersize=6, **style)
        weight = "bold" if name == "ral" else "normal"
        panel.text(1.145, height, text, va="center", fontsize=FONT - 1, weight=weight, **style)


def _spread(heights: Sequence[float], gap: float = GAP) -> list[float]:
    """The ascending heights, moved as little as it takes to stand `gap` apart in the panel."""
    blocks: list[tuple[list[float], float]] = []  # labels that touch move as one, about their mean

    def push(members: list[float]) -> None:
        half = gap * (len(members) - 1) / 2
        blocks.append((members, min(max(sum(members) / len(members), half), 1.0 - half)))

    for height in heights:
        push([height])
        while len(blocks) > 1:
            (low, low_centre), (high, high_centre) = blocks[-2:]
            if high_centre - low_centre >= gap * (len(low) + len(high)) / 2:
                break
            del blocks[-2:]
            push(low + high)
    return [
        centre + gap * (index - (len(members) - 1) / 2)
        for members, centre in blocks
        for index in range(len(members))
    ]


def _title(run: Mapping[str, Any], mode: str, objective: Objective) -> str:
    growth = {
        "frames_sweep": "as video frames grow",
        "resolution_sweep": "as image resolution grows",
    }
    words = {"forward": "forward", "forward+backward": "forward and backward"}[mode]
    claim = _claim(run, mode, objective)
    return f"{objective.title} {growth.get(run['benchmark'], '')}: {words}{claim}"


def _claim(run: Mapping[str, Any], mode: str, objective: Objective) -> str:
    """Our time against the fastest peer's at the largest size at which both ran."""
    for size in reversed(run["sizes"]):
        for row in size["results"]:
            if row["contestant"] == "ral" and row["mode"] == mode and "ratio" in row:
                where = f"at {size['visual_tokens']:,} tokens"
                ratio = f"{row['ratio']['median']:.2f}"
                return f", {ratio} × the time of {objective.peer_claim} {where}"
    return ""


def _subtitle(run: Mapping[str, Any]) -> str:
    machine, settings, commit = run["machine"], run["settings"], run["commit"]
    threads = machine["threads"]
    where = machine.get("gpu") or f"{machine['cpu']}, {threads} thread{'s' * (threads > 1)}"
    rows = f", the last {settings['rows']} rows" if settings.get("rows") else ""
    source = {"model": "q, k, v of a Qwen2.5-VL over real pictures", "random": "random q, k, v"}
    heads = "{num_heads}:{num_kv_heads} heads of {head_dim}".format(**settings["heads"])
    facts = (where, f"{settings['dtype']}, causal, {heads}{rows}", source[settings["input"]])
    state = " with changes" if commit["dirty"] else ""
    return "; ".join((*facts, f"commit {commit['hash'] or 'none yet'}{state}"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the pictures of sweeps from their JSON.")
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of the sweeps")
    parser.add_argument("--mode", choices=MODES, help="default: forward+backward where it is there")
    options = parser.parse_args(arguments)
    for path in options.results:
        print(f"wrote {draw(path, options.mode)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
