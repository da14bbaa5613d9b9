"""The tables of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .layouts import BLOCKS, LABELS
from .objective import Objective


def problem(run: Mapping[str, Any]) -> str:
    """What is computed, in a line."""
    settings = run["settings"]
    heads = "{num_heads}:{num_kv_heads} heads of {head_dim}".format(**settings["heads"])
    rows = f", the last {settings['rows']} rows" if settings.get("rows") else ""
    return (
        f"problem   {run['objective']}: {settings['input']} inputs, causal, {heads}, "
        f"{settings['dtype']}{rows}, up to {settings['repeats']} interleaved repeats"
    )


def _cells(objective: Objective, row: Mapping[str, Any]) -> list[str]:
    name = objective.registry[row["contestant"]].label
    errors = row.get("errors", {})
    columns = (
        *objective.outputs,
        *(objective.gradients if row["mode"].endswith("backward") else ()),
    )
    shown = [f"{errors[key]:.0e}" if key in errors else "-" for key in columns]
    if "ms" not in row:
        return [name, f"{row['status']}: {row['reason']}"]
    ms, ratio = row["ms"], row["ratio"]
    return [
        name,
        f"{ms['median']:.1f}",
        f"{ratio['median']:.2f}",
        f"{ratio['p20']:.2f}-{ratio['p80']:.2f}",
        str(row["repeats"]),
        f"{row['gflops']:.0f}",
        f"{100 * row['gemm_share']:.0f} %",
        f"{row['peak_bytes'] / 2**20:.1f}",
        *shown,
    ]


def table(objective: Objective, size: Mapping[str, Any]) -> str:
    """An aligned table for each mode of one size: by time, then those that did not run, and why."""
    facts = (
        f"{size['visual_tokens']} visual tokens of {size['seqlen']}",
        f"GEMM {size['gemm_gflops']:.0f} GFLOP/s",
        *objective.summary(size),
    )
    lines = [f"{size['name']}: {'; '.join(facts)}"]
    for mode in dict.fromkeys(row["mode"] for row in size["results"]):
        rows = [row for row in size["results"] if row["mode"] == mode]
        rows.sort(key=lambda row: row["ms"]["median"] if "ms" in row else float("inf"))
        headings = [mode, "ms", objective.peer_heading, "p20-p80", "n", "GFLOP/s", "of GEMM", "MiB"]
        headings += objective.outputs
        headings += objective.gradients if mode.endswith("backward") else ()
        lines += ["", *_aligned(headings, [_cells(objective, row) for row in rows])]
    return "\n".join(lines + _layouts(size))


def _layouts(size: Mapping[str, Any]) -> list[str]:
    """What marginals cost in each layout: a table for each of ours, its modes side by side."""
    by_ours: dict[str, dict[str, dict[str, Any]]] = {}  # ours -> layout -> mode -> row
    for row in size.get("layouts", []):
        if "layout" in row:
            ours = row["contestant"].removesuffix(f"_{row['layout']}")
            by_ours.setdefault(ours, {}).setdefault(row["layout"], {})[row["mode"]] = row
    lines = []
    for ours, found in by_ours.items():
        modes = list(dict.fromkeys(mode for rows in found.values() for mode in rows))
        headings = [f"{ours}: with marginals / without", "spans"]
        headings += [f"border in {block}" for block in BLOCKS]
        headings += [text for mode in modes for text in (f"{mode} ms", "ratio", "p20-p80", "n")]
        cells = [_layout_cells(layout, rows, modes) for layout, rows in found.items()]
        lines += ["", *_aligned(headings, cells)]
    return lines


def _layout_cells(
    layout: str, rows: Mapping[str, Mapping[str, Any]], modes: Sequence[str]
) -> list[str]:
    first, label = rows[modes[0]], f"{layout}: {LABELS[layout]}"
    if not any("ms" in row for row in rows.values()):
        return [label, f"{first['status']}: {first['reason']}"]
    cells = [label, str(first["spans"])]
    cells += [f"{100 * first['border_share'][str(block)]:.0f} %" for block in BLOCKS]
    for mode in modes:
        row = rows[mode]
        if "ms" not in row:
            cells += [row["status"], "-", "-", "-"]
            continue
        ratio = row["ratio"]
        cells += [f"{row['ms']['median']:.1f}", f"{ratio['median']:.3f}"]
        cells += [f"{ratio['p20']:.3f}-{ratio['p80']:.3f}", str(row["repeats"])]
    return cells


def _aligned(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    full = [row for row in rows if len(row) > 2]
    widths = [max(len(row[i]) for row in [headings, *full]) for i in range(len(headings))]
    widths[0] = max([widths[0], *(len(row[0]) for row in rows)])
    lines = []
    for row in [headings, *rows]:
        cells = [row[0].ljust(widths[0])]
        short = len(row) == 2
        cells += (
            row[1:] if short else [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        )
        lines.append("  " + "  ".join(cells))
    rule = "  " + "-" * (sum(widths) + 2 * (len(widths) - 1))
    return [lines[0], rule, *lines[1:]]


def mistakes(objective: Objective, run: Mapping[str, Any]) -> list[str]:
    """What must fail a run: a wrong answer of any contestant, or one of ours that did not run."""
    found = []
    for size in run["sizes"]:
        for row in [*size["results"], *size.get("layouts", [])]:
            ours = objective.registry[row["contestant"]].ours
            # a layout may have no span, or no room in memory
            excused = row["status"] == "skipped" and "layout" in row
            if row["status"] == "wrong" or (ours and row["status"] != "ok" and not excused):
                which = f"{size['name']}, {row['contestant']} {row['mode']}"
                found.append(f"{which}: {row['status']}: {row['reason']}")
    return found
