"""Two results of one benchmark, point by point: ratios B / A with their 95 % intervals.

    python -m benchmarks compare A.json B.json

Points are matched by what was measured: size, dtype, contestant, mode, and so on. Where both files
have repeats, the ratio is that of geometric means. Its interval is Welch's t over the logarithms of
the repeats. It says what the scatter within each run leaves open, and not what changes from run to
run: between machines or days, compare the figures named `ratio`, whose peer ran in turn with ours.

The exit status is 1 if no point is in both files, or if a hash differs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy import stats

CONFIDENCE = 0.95
# What tells the points of a file apart.
IDENTITY = (
    "frames", "tokens_per_image", "images", "task", "arm", "dtype", "batch_size", "heads", "seqlen",
    "seqlen_k", "rows", "num_spans", "kind", "form", "distance", "implementation", "padded",
    "layout", "contestant", "mode",
)  # fmt: skip
# Settings of how much is measured, and how often; all others say what is measured.
EXTENT = {
    "quick", "keep_memory", "repeats", "rounds", "parts", "modes", "layouts", "frames", "tokens",
    "tasks", "arms", "seeds", "first_seed", "tag",
}  # fmt: skip
# Single numbers that are compared; so are all below `errors` and `accuracy`, and all with a median.
FIGURES = {
    "peak_bytes", "seconds", "scratch_mib", "scratch", "bytes_per_pair", "host_ms", "gemm_gflops",
    "least_us", "median_us", "loss", "dq", "dk", "largest_gradient", "step_ratio", "update_ratio",
    "old_policy_ratio", "peak_ratio", "memory_ratio",
}  # fmt: skip
BELOW = {"errors", "accuracy"}
# Of the head of a file, and lists whose name says nothing of their items.
HEAD = {
    "benchmark", "machine", "versions", "commit", "settings", "load", "started", "seconds",
    "expected_seconds", "schema", "objective",
}  # fmt: skip
UNSAID = {"sizes", "results", "rows", "runs", "speed", "points"}

Row = tuple[str, ...]


@dataclass
class Figure:
    """One measured quantity of a point."""

    repeats: list[float] = field(default_factory=list)
    median: float | None = None  # of a file that has no repeats
    text: str | None = None  # of a hash

    @property
    def middle(self) -> float:
        """The geometric mean of repeats, or the one number there is."""
        if self.median is not None:
            return self.median
        if min(self.repeats) > 0:
            return statistics.geometric_mean(self.repeats)
        return statistics.mean(self.repeats)


@dataclass
class Points:
    """The figures of a file by point, and why points have none."""

    rows: dict[Row, dict[str, Figure]] = field(default_factory=dict)
    reasons: dict[Row, str] = field(default_factory=dict)

    def add(self, row: Row, path: Sequence[str]) -> Figure:
        return self.rows.setdefault(row, {}).setdefault(" ".join(path), Figure())


def points_of(run: Mapping[str, Any]) -> Points:
    """All points of a file. Items that differ by a seed alone are repeats of one point."""
    found = Points()
    _collect({key: value for key, value in run.items() if key not in HEAD}, (), (), found)
    return found


def _collect(node: Any, row: Row, path: tuple[str, ...], found: Points) -> None:
    if isinstance(node, list):
        for item in node:
            if isinstance(item, dict):
                _collect(item, row, path, found)
    elif isinstance(node, dict) and "median" in node:
        figure = found.add(row, path)
        figure.repeats += node.get("all", [])
        figure.median = None if figure.repeats else node["median"]
    elif isinstance(node, dict):
        names = {key: node[key] for key in IDENTITY if _names(node.get(key))}
        if names:
            row, path = (*row, *path, *(_said(key, value) for key, value in names.items())), ()
        if node.get("status", "ok") != "ok" or node.get("wrong"):
            reason = node.get("reason") or node["wrong"]
            found.reasons[row] = " ".join((*path, f"{node.get('status', 'wrong')}: {reason}"))
        for key, value in node.items():
            if key not in names:
                said = () if key in UNSAID and isinstance(value, list) else (key,)
                _collect(value, row, (*path, *said), found)
    elif isinstance(node, (int, float)) and not isinstance(node, bool):
        if path and (path[-1] in FIGURES or BELOW & set(path)):
            found.add(row, path).repeats.append(float(node))
    elif isinstance(node, str) and path[:1] == ("calls",):
        found.add(row, path).text = node


def _names(value: Any) -> bool:
    return isinstance(value, (str, int, float))


def _said(key: str, value: Any) -> str:
    if isinstance(value, str) and key not in ("heads", "layout"):
        return value
    return f"{key}={value:.0e}" if isinstance(value, float) else f"{key}={value}"


def ratio(a: Figure, b: Figure) -> tuple[float, tuple[float, float] | None]:
    """B / A, and its interval where both have two repeats or more that scatter."""
    whole = b.middle / a.middle if a.middle else math.inf
    if min(len(a.repeats), len(b.repeats)) < 2 or min(*a.repeats, *b.repeats) <= 0:
        return whole, None
    logs = [[math.log(value) for value in figure.repeats] for figure in (b, a)]
    if all(max(each) == min(each) for each in logs):
        return whole, None
    found = stats.ttest_ind(*logs, equal_var=False).confidence_interval(CONFIDENCE)
    return whole, (math.exp(found.low), math.exp(found.high))


def warnings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What else than the code may be the reason of a difference."""
    found = []
    for name in ("machine", "versions"):
        both = a.get(name, {}).keys() & b.get(name, {}).keys()
        changed = [key for key in a.get(name, {}) if key in both and a[name][key] != b[name][key]]
        found += [
            f"{name}: {key} {a[name][key]} / {b[name][key]}"
            for key in changed
            if key not in ("cpu_id", "cpu_family_model")
        ]
    models = [_model(run.get("machine", {})) for run in (a, b)]
    if "cpu" in a.get("machine", {}) and not (models[0] in models[1] or models[1] in models[0]):
        found.append(f"machine: model of the processor {models[0]} / {models[1]}")
    for letter, run in (("A", a), ("B", b)):
        if run.get("commit", {}).get("dirty"):
            found.append(f"{letter} is of no commit: files had changed")
        load, facts = run.get("load", {}), run.get("machine", {})
        before = load.get("before")
        if before is not None and before > facts["cores"] / 2:
            found.append(f"{letter} began at a load average of {before} on {facts['cores']} cores")
    return found


def _model(facts: Mapping[str, Any]) -> str:
    """Family, model and so on; older files have no vendor and no stepping."""
    return f"-{facts.get('cpu_id') or '-'.join(facts.get('cpu_family_model', []))}-"


def changed_settings(
    a: Mapping[str, Any], b: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, str]]:
    """Settings that differ: those of what is measured, and those of how much of it."""
    ours, theirs = a.get("settings", {}), b.get("settings", {})
    changed = {
        key: f"{ours[key]} / {theirs[key]}"
        for key in ours
        if key in theirs and ours[key] != theirs[key]
    }
    return (
        {key: text for key, text in changed.items() if key not in EXTENT},
        {key: text for key, text in changed.items() if key in EXTENT},
    )


def only_in(ours: Points, theirs: Points) -> list[str]:
    """Points, and figures of common points, that only `ours` has; and why, where it is known."""
    found = []
    for row, figures in ours.rows.items():
        others = theirs.rows.get(row, {})
        missing = [name for name in figures if name not in others]
        if missing:
            what = [] if len(missing) == len(figures) and row else [", ".join(missing)]
            reason = theirs.reasons.get(row)
            found.append("  ".join([*row, *what]) + (f"  (other file: {reason})" if reason else ""))
    return found


def table(a: Points, b: Points) -> tuple[list[str], int, int]:
    """The lines of figures that are in both, how many there are, and how many hashes differ."""
    lines: list[str] = []
    common, equal, hashes = 0, 0, 0
    for row, figures in a.rows.items():
        rows = []
        for name, figure in figures.items():
            other = b.rows.get(row, {}).get(name)
            if other is None:
                continue
            common += 1
            if figure == other or _are_close(figure, other):
                equal += 1
            elif figure.text is not None:
                hashes += 1
                rows.append(f"    {name}  differs")
            else:
                rows.append(_line(name, figure, other))
        if rows:
            lines += ["  ".join(row), *rows] if row else rows
    if equal:
        lines.append(f"{equal} of {common} figures are equal, or single numbers within 1 %")
    return lines, common, hashes


def _are_close(a: Figure, b: Figure) -> bool:
    single = a.text is None and max(len(a.repeats), len(b.repeats)) < 2
    return single and math.isclose(a.middle, b.middle, rel_tol=0.01)


def _line(name: str, a: Figure, b: Figure) -> str:
    whole, interval = ratio(a, b)
    text = f"    {name:28} {a.middle:11.4g} {b.middle:11.4g}  {whole:7.3f}"
    if interval is None:
        return text
    low, high = interval
    sure = " *" if low > 1 or high < 1 else ""
    return f"{text}  {low:.3f} to {high:.3f}, n={len(a.repeats)} and {len(b.repeats)}{sure}"


def _print(title: str, lines: Iterable[str]) -> None:
    lines = list(lines)
    if lines:
        print(f"\n{title}")
        for line in lines:
            print(f"    {line}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("a", type=Path, metavar="A.json")
    parser.add_argument("b", type=Path, metavar="B.json")
    options = parser.parse_args(arguments)
    a, b = (json.loads(path.read_text()) for path in (options.a, options.b))
    kinds = [(run.get("benchmark"), run.get("objective")) for run in (a, b)]
    if kinds[0] != kinds[1]:
        said = [" ".join(str(part) for part in kind if part) for kind in kinds]
        parser.error(f"A and B must be of one benchmark; got {said[0]!r} and {said[1]!r}")
    for letter, path, run in (("A", options.a, a), ("B", options.b, b)):
        commit = run.get("commit", {}).get("hash")
        print(f"{letter}  {path}, commit {commit}, {run.get('started', 'no date')}")
    for line in warnings(a, b):
        print(f"warning   {line}")
    what, extent = changed_settings(a, b)
    for key, text in extent.items():
        print(f"note      {key}: {text}")
    if what:
        _print("other settings, so no point is in both:", (f"{k}: {v}" for k, v in what.items()))
        return 1
    ours, theirs = points_of(a), points_of(b)
    lines, common, hashes = table(ours, theirs)
    if common:
        print(
            f"\nA and B are geometric means of the repeats (medians or single numbers where a file "
            f"has none).\nB/A has the {100 * CONFIDENCE:.0f} % interval of Welch's t over their "
            f"logarithms; * marks an interval without 1.\n\n{'':32} {'A':>11} {'B':>11}  {'B/A':>7}"
        )
        print("\n".join(lines))
    _print("only in A:", only_in(ours, theirs))
    _print("only in B:", only_in(theirs, ours))
    if not common:
        print("\nno point is in both")
    return int(hashes > 0 or common == 0)


if __name__ == "__main__":
    sys.exit(main())
