"""The study's tables, from its JSON.

python -m benchmarks.study.report FILE.json ...                           # Markdown
python -m benchmarks.study.report --into docs/figure3-tables.md FILE...   # into its place there
python -m benchmarks.study.report FILE.json ... --compare noise grpo_t15  # any two arms
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from .arms import ARMS, BY_NAME, ROLLOUTS
from .evaluate import TEST_SEED
from .statistics import Estimate, deviation, estimate, holm, paired
from .tasks import TASKS

Run = dict[str, Any]
FIXED_LABELS = {"start": "start (SFT)", "teacher": "teacher"}


def label_of(arm: str) -> str:
    """An arm's name in tables and pictures."""
    return FIXED_LABELS.get(arm) or BY_NAME[arm].label


def by_arm(runs: Sequence[Run], task: str) -> dict[str, dict[int, Run]]:
    """Runs of a task by arm and seed, in the order of tables."""
    found: dict[str, dict[int, Run]] = {}
    for name in (*FIXED_LABELS, *(arm.name for arm in ARMS)):
        mine = {r["seed"]: r for r in runs if r["task"] == task and r["arm"] == name}
        if mine:
            found[name] = mine
    return found


@dataclass(frozen=True)
class Comparison:
    """An arm against the one it is compared with, at the endpoint.

    Attributes:
        arm, against: names.
        difference: the paired one.
        adjusted: its p, by Holm's method over the task's comparisons.
    """

    arm: str
    against: str
    difference: Estimate
    adjusted: float


def at_endpoint(task: str, runs: dict[int, Run], which: str = "accuracy") -> dict[int, float]:
    """By seed."""
    return {seed: TASKS[task].at_endpoint(run[which]) for seed, run in runs.items()}


def compare(of: dict[str, dict[int, Run]], task: str) -> list[Comparison]:
    """All comparisons of a task that its runs allow."""
    found = []
    for arm, runs in of.items():
        for against in BY_NAME[arm].against if arm in BY_NAME else ():
            ours, theirs = (at_endpoint(task, r) for r in (runs, of.get(against, {})))
            difference = paired(ours, theirs)
            if difference is not None:
                found.append((arm, against, difference))
    adjusted = holm([difference.p for *_, difference in found])
    return [Comparison(*one, p) for one, p in zip(found, adjusted, strict=True)]


def table(task: str, runs: Sequence[Run]) -> list[list[str]]:
    """Accuracy at every size and at the endpoint; first the heads."""
    study, of = TASKS[task], by_arm(runs, task)
    lines = [
        ["arm", "seeds", *map(str, study.evaluated), "endpoint", "SD", "scores × 1.4", "on target"]
    ]
    for arm, seeds in of.items():
        every = list(seeds.values())
        cells = [label_of(arm), str(len(every))]
        cells += [
            f"{100 * estimate([r['accuracy'][str(size)] for r in every]).mean:.1f}"
            for size in study.evaluated
        ]
        ours = list(at_endpoint(task, seeds).values())
        cells += [str(estimate(ours)), "" if len(ours) == 1 else f"{100 * deviation(ours):.1f}"]
        cells += [str(estimate(list(at_endpoint(task, seeds, "sharpened").values())))]
        cells += [str(estimate([_target(study.endpoint, r) for r in every]))]
        lines.append(cells)
    return lines


def comparisons(task: str, runs: Sequence[Run]) -> list[list[str]]:
    """Paired differences at the endpoint, and what sharpening does; first the heads."""
    of = by_arm(runs, task)
    lines = [["arm", "compared with", "seeds", "difference", "p", "p, Holm"]]
    lines += [
        [label_of(one.arm), label_of(one.against), str(one.difference.seeds),
         one.difference.signed, _p(one.difference.p), _p(one.adjusted)]
        for one in compare(of, task)
    ]  # fmt: skip
    return lines


def _target(extents: Sequence[int], run: Run) -> float:
    """Share of attention on the target in the layer that has the most, over the endpoint."""
    layers = zip(*(run["target"][str(extent)] for extent in extents), strict=True)
    return max(sum(shares) / len(extents) for shares in layers)


def _p(value: float) -> str:
    return "" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def curves(task: str, runs: Sequence[Run]) -> list[list[str]]:
    """Where distillation's gain ends: accuracy at the endpoint's sizes as training goes on."""
    of = by_arm(runs, task)
    if "logits" not in of or "opad" not in of:
        return []
    lines = [["rollout batches", label_of("logits"), label_of("opad"), "difference", "p"]]
    marks = [done for done, _ in next(iter(of["opad"].values()))["curve"]]
    points: list[tuple[str, Callable[[Run], float]]] = [
        (str(done), lambda run, i=i: run["curve"][i][1])  # type: ignore[misc]
        for i, done in enumerate(marks)
    ]
    points.append(("the end", lambda run: TASKS[task].at_endpoint(run["accuracy"])))
    for name, value in points:
        logits, opad = (
            {seed: value(run) for seed, run in of[arm].items()} for arm in ("logits", "opad")
        )
        difference = paired(opad, logits)
        lines.append([
            name, str(estimate(list(logits.values()))), str(estimate(list(opad.values()))),
            *(("", "") if difference is None else (difference.signed, _p(difference.p))),
        ])  # fmt: skip
    return lines


def reached(task: str, runs: Sequence[Run], level: float) -> list[list[str]]:
    """Rollouts until the accuracy at the endpoint reaches `level`; first the heads."""
    lines = [["arm", "seeds", f"reached {100 * level:.0f} %", "rollouts until then"]]
    for arm, seeds in by_arm(runs, task).items():
        if arm in FIXED_LABELS or BY_NAME[arm].study != "objectives":
            continue
        found = [x for run in seeds.values() if (x := rollouts_to(run["curve"], level)) is not None]
        mean = f"{estimate(found).mean:.0f}" if found else ""
        lines.append([label_of(arm), str(len(seeds)), str(len(found)), mean])
    return lines if len(lines) > 1 else []


def rollouts_to(curve: Sequence[Sequence[float]], level: float) -> float | None:
    """Rollouts until a curve of [rollout batches, accuracy] first reaches a level.

    Between two points it is a line. None if it does not get there.
    """
    last: Sequence[float] | None = None
    for done, accuracy in curve:
        if accuracy >= level:
            if last is None:
                return done * ROLLOUTS
            share = (level - last[1]) / (accuracy - last[1])
            return (last[0] + share * (done - last[0])) * ROLLOUTS
        last = done, accuracy
    return None


def training(task: str, runs: Sequence[Run]) -> list[list[str]]:
    """Means over training of each arm and its seeds; first the heads."""
    longest = max(TASKS[task].trained)
    lines = [[
        "arm", "prefixes that differ, %", "gradient of the attention term / of GRPO, runs",
        f"thought right at {longest}, %", "reward, last quarter", f"on target at {longest}",
    ]]  # fmt: skip
    for arm, seeds in by_arm(runs, task).items():
        every = list(seeds.values())
        if arm in FIXED_LABELS:
            lines.append([label_of(arm), "", "", _mean_of(every, "thought", longest), "", ""])
            continue
        differing = [x for run in every for x in run["attn/differing_prefixes"]]
        shares = [fmean(run["attn/grad_share"]) for run in every if run["attn/grad_share"]]
        rewards = [fmean(run["reward_curve"][-(len(run["reward_curve"]) // 4 or 1) :])
                   for run in every if run["reward_curve"]]  # fmt: skip
        lines.append([
            label_of(arm),
            f"{100 * fmean(differing):.0f}" if differing else "",
            f"{min(shares):.2f} to {max(shares):.2f}" if shares else "",
            _mean_of(every, "thought", longest),
            f"{fmean(rewards):.2f}" if rewards else "",
            str(estimate([max(run["target_curve"][-1][1]) for run in every])),
        ])  # fmt: skip
    return lines


def _mean_of(runs: Sequence[Run], what: str, extent: int) -> str:
    return f"{100 * fmean(run[what][str(extent)] for run in runs):.0f}"


def plain(lines: list[list[str]]) -> str:
    """A table for a terminal."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = (
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines
    )
    return "\n".join(row.rstrip() for row in rows)


def markdown(lines: list[list[str]]) -> str:
    """The same for a document."""
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])


def sections(path: Path) -> Iterator[str]:
    """The tables of a study's tasks, in Markdown."""
    study = json.loads(path.read_text())
    settings, commit = study["settings"], study["commit"]
    for task in TASKS:
        if not any(run["task"] == task for run in study["runs"]):
            continue
        batches = settings["batches"] or TASKS[task].batches
        last_seed = settings["first_seed"] + settings["seeds"] - 1
        start = f", from start {settings['start_seed']}" if settings["start_seed"] else ""
        yield (
            f"### {task}, seeds {settings['first_seed']} to {last_seed}{start}\n\n"
            f"`{path.name}`, commit {commit['hash']}{' with changes' if commit['dirty'] else ''}; "
            f"{batches} rollout batches, {settings['test_rows']} rows a size.\n"
            f"Right answers in per cent at each {_AXIS[TASKS[task].axis]} and at the endpoint "
            f"({TASKS[task].endpoint_label}), mean ± 95 %;\nthe endpoint with scores × 1.4; "
            "attention on the target at the endpoint's sizes, in per cent of that on images. The "
            "last table is of training.\n"
        )
        for make in (table, comparisons, curves, training):
            lines = make(task, study["runs"])
            if len(lines) > 1:
                yield markdown(lines) + "\n"


def pooled(task: str, paths: Sequence[Path]) -> Iterator[str]:
    """A task's comparisons over the seeds of several studies of it, in Markdown.

    It names their commits. The document says whether the code was the same.

    Raises:
        ValueError: they differ in more than seeds and arms.
    """
    studies = [json.loads(path.read_text()) for path in paths]
    kinds = [_kind(task, study) for study in studies]
    if len(set(kinds)) != 1:
        raise ValueError(f"report: pooled studies must be of one start and size; got {kinds}")
    of_task = [[run for run in study["runs"] if run["task"] == task] for study in studies]
    shared = set.intersection(*({run["arm"] for run in runs} for runs in of_task))
    runs = [run for one in of_task for run in one if run["arm"] in shared]
    lines = comparisons(task, runs)
    if len(lines) > 1:
        commits = dict.fromkeys(study["commit"]["hash"] for study in studies)
        yield (
            f"### {task}, all seeds of the arms that are in {len(studies)} studies, "
            f"commit{'s' if len(commits) > 1 else ''} {' and '.join(commits)}\n"
        )
        yield markdown(lines) + "\n"
        if points := curves(task, runs):
            yield markdown(points) + "\n"


def _kind(task: str, study: dict[str, Any]) -> tuple[Any, ...]:
    """What must be the same in two studies of a task for their seeds to be of one sample."""
    settings = study["settings"]
    batches = settings["batches"] or TASKS[task].batches
    start = settings["start_seed"], settings.get("wrong_share")
    rows = settings["test_rows"], settings.get("test_seed", TEST_SEED)
    return *start, batches, *rows, tuple(settings.get("shape") or ())


_AXIS = {"frames": "number of frames", "cells": "side of the grid"}
_BEGIN, _END = "<!-- tables: python -m benchmarks.study.report", "<!-- end of tables -->"


def difference(arm: str, other: str, paths: Sequence[Path]) -> Iterator[str]:
    """One arm against another at every size and at the endpoint, over the seeds of some files."""
    runs = [run for path in paths for run in json.loads(path.read_text())["runs"]]
    for task, study in TASKS.items():
        of = by_arm(runs, task)
        if arm not in of or other not in of:
            continue
        points: list[tuple[str, Callable[[Run], float]]] = [
            (str(size), lambda run, size=size: run["accuracy"][str(size)])  # type: ignore[misc]
            for size in study.evaluated
        ]
        points += [
            ("endpoint", lambda run, at=study.at_endpoint: at(run["accuracy"])),  # type: ignore[misc]
            ("scores × 1.4", lambda run, at=study.at_endpoint: at(run["sharpened"])),  # type: ignore[misc]
        ]
        lines = [["size", f"{label_of(arm)} − {label_of(other)}", "seeds", "p"]]
        for name, value in points:
            found = paired(
                {seed: value(run) for seed, run in of[arm].items()},
                {seed: value(run) for seed, run in of[other].items()},
            )
            if found is not None:
                lines.append([name, found.signed, str(found.seeds), _p(found.p)])
        yield markdown(lines) + "\n"


def _all(files: Sequence[Path]) -> Iterator[str]:
    """Tables of each file, and of all seeds where several files are of one kind."""
    for file in files:
        yield from sections(file)
    for task in TASKS:
        of: dict[tuple[Any, ...], list[Path]] = {}
        for file in files:
            study = json.loads(file.read_text())
            if any(run["task"] == task for run in study["runs"]):
                of.setdefault(_kind(task, study), []).append(file)
        for alike in of.values():
            if len(alike) > 1:
                yield from pooled(task, alike)


def insert(document: Path, files: Sequence[Path]) -> None:
    """Put the tables of some files in the place that a document has for them.

    Args:
        document: Markdown with a line that begins with `<!-- tables:` and one `<!-- end of
            tables -->`.
        files: studies.

    Raises:
        ValueError: the document has no such place.
    """
    text = document.read_text()
    if _BEGIN not in text or _END not in text:
        raise ValueError(f"report: {document.name} must have lines {_BEGIN!r} and {_END!r}")
    head, rest = text.split(_BEGIN, 1)
    first, rest = rest.split("\n", 1)
    tail = rest.split(_END, 1)[1]
    tables = "\n".join(_all(files))
    document.write_text(f"{head}{_BEGIN}{first}\n\n{tables}\n{_END}{tail}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--into", type=Path, help="a document with a place for tables")
    parser.add_argument("--compare", nargs=2, choices=BY_NAME, metavar="ARM",
                        help="these two arms alone, over the seeds of all files")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.compare is not None:
        first, second = options.compare
        print("\n".join(difference(first, second, options.files)))
    elif options.into is not None:
        insert(options.into, options.files)
    else:
        print("\n".join(_all(options.files)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
