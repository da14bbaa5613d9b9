"""The head of a run, and the file that it is written to: for sweeps, benches and studies alike.

By default files go to `benchmarks/results/local/`, which git ignores, so that a run leaves the tree
clean. `--commit-results` writes into the folder of the machine, whose files are committed, and
`--out` into any other folder. The name of a file holds the benchmark, the settings that are not the
defaults, the processor and the commit. A repeat gets another name, and overwrites nothing.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import itertools
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import commands, machine

RESULTS = Path(__file__).resolve().parents[1] / "results"
LOCAL = RESULTS / "local"
CPU = torch.device("cpu")
# options that change no result
UNNAMED = {"out", "commit_results", "no_plot", "runs", "workers", "keep_weights", "minutes"}
LONGEST = 60  # characters of the settings in a file's name
SLOWER = 2.0  # times the expected time, from where on a run says so


def add_arguments(parser: argparse.ArgumentParser, quick: str) -> None:
    """The options `--quick`, and `--out` or `--commit-results`, of which a call may give one.

    Args:
        quick: what `--quick` changes.
    """
    parser.add_argument("--quick", action="store_true", help=f"{quick}; aims at a minute")
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--out", type=Path, help="folder to write to (default: benchmarks/results/local)"
    )
    group.add_argument(
        "--commit-results",
        action="store_true",
        help="write to benchmarks/results/<machine>, which git tracks",
    )


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, always: Sequence[str] = ()
) -> argparse.Namespace:
    """Parse, and keep what else a run needs.

    `given` holds the settings that are not the defaults, `named` those in the name of its file, and
    `began` the time.

    Args:
        always: options whose values the name holds first, even those of the defaults.
    """
    options = parser.parse_args(arguments)
    given = {
        name: value if isinstance(value, (list, tuple)) else [value]
        for name, value in vars(options).items()
        if name not in UNNAMED and value != parser.get_default(name)
    }
    first = [getattr(options, name) for name in always]
    parts = [str(value) for value in first if value is not None]
    for name, values in given.items():
        if name not in always:
            parts += [name, *(str(value) for value in values if value is not True)]
    named = _slug("-".join(parts))
    if len(named) > LONGEST:
        named = f"{named[:LONGEST]}-{hashlib.sha256(named.encode()).hexdigest()[:8]}"
    options.given, options.named, options.began = list(given), named, time.perf_counter()
    return options


def begin(
    benchmark: str,
    options: argparse.Namespace,
    settings: Mapping[str, Any],
    device: torch.device = CPU,
) -> dict[str, Any]:
    """The head of a run: printed, with the time it will take, and returned as the JSON has it."""
    run: dict[str, Any] = {
        "benchmark": benchmark,
        "machine": machine.describe(device),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load": {"before": machine.load()},
        "settings": dict(settings),
    }
    facts, commit = run["machine"], run["commit"]
    where = f"{facts['cpu']} ({facts['cpu_id']}), {facts['threads']} threads of {facts['cores']} "
    where += (
        f"cores, {' '.join(facts['vector_extensions']) or 'no AVX2'}, {facts['memory_gib']} GiB"
    )
    if "gpu" in facts:
        where = f"{facts['gpu']}, {facts['gpu_memory_gib']} GiB; {where}"
    print(f"machine   {where}")
    print("versions  " + ", ".join(f"{name} {text}" for name, text in run["versions"].items()))
    print(f"commit    {commit['hash'] or 'none yet'}{' with changes' if commit['dirty'] else ''}")
    run["expected_seconds"], source = _expected(benchmark, options, run)
    print(f"takes     {source}")
    _warn_of_load(run, "before", 0)
    print(flush=True)
    return run


def new_file(run: Mapping[str, Any], options: argparse.Namespace) -> Path:
    """An empty file for the JSON of a run, under a name that no file had."""
    commit = run["commit"]
    version = (commit["hash"] or "uncommitted") + ("-dirty" if commit["dirty"] else "")
    name = f"{_stem(run['benchmark'], options, run)}-{version}"
    for count in itertools.count(1):
        file = folder(options, run["machine"]) / f"{name}{f'-{count}' * (count > 1)}.json"
        try:
            file.touch(exist_ok=False)
        except FileExistsError:
            continue
        return file
    raise AssertionError


def finish(run: dict[str, Any], options: argparse.Namespace, file: Path | None = None) -> Path:
    """Write the JSON of a run that is over, say how long it took, and return the file.

    Args:
        file: of `new_file`; one is made without it.
    """
    file = file or new_file(run, options)
    seconds, expected = time.perf_counter() - options.began, run["expected_seconds"]
    run["seconds"] = round(seconds, 1)
    run["load"]["after"] = machine.load()
    save(run, file)
    print(f"\n{seconds:.0f} s in all; written to {file}")
    if expected and seconds > SLOWER * expected:  # 0.0 s, rounded, is no measure
        print(f"warning   that is {seconds / expected:.1f}x the {expected:.0f} s it should take")
    _warn_of_load(run, "after", run["machine"]["threads"])
    return file


def save(run: Mapping[str, Any], file: Path) -> None:
    """Write the JSON of a run, each list of numbers on one line."""
    text = json.dumps(run, indent=1)
    numbers = r"\[\s+(?:-?[\d.][\d.e+-]*,?\s+)+\]"
    file.write_text(re.sub(numbers, lambda found: " ".join(found[0].split()), text) + "\n")


def folder(options: argparse.Namespace, facts: Mapping[str, Any]) -> Path:
    """The folder to write to, made where it is missing.

    Args:
        options: parsed, with what `add_arguments` added.
        facts: the machine, as `machine.describe` returns it.
    """
    if options.out is not None:
        chosen = Path(options.out)
    else:
        chosen = RESULTS / machine.slug(dict(facts)) if options.commit_results else LOCAL
    chosen.mkdir(parents=True, exist_ok=True)
    return chosen


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-")


def _stem(benchmark: str, options: argparse.Namespace, run: Mapping[str, Any]) -> str:
    """The name without the commit: runs of one stem are of the same settings and processor."""
    facts = run["machine"]
    processor = _slug(facts["gpu"].lower()) if "gpu" in facts else facts["cpu_id"]
    parts = (benchmark, options.named, processor, f"{facts['threads']}t")
    return "-".join(part for part in parts if part)


def _expected(
    benchmark: str, options: argparse.Namespace, run: Mapping[str, Any]
) -> tuple[float | None, str]:
    """Seconds that the run should take, and a sentence with their source.

    They are those of the last run with the same settings on the same processor. Without one they
    are those of the table in benchmarks/README.md, which holds for the defaults and --quick.
    """
    earlier = []
    for file in RESULTS.rglob(f"{_stem(benchmark, options, run)}-*.json"):
        record = json.loads(file.read_text() or "{}")  # a run that was stopped leaves nothing
        if "seconds" in record:
            earlier.append((record["started"], record["seconds"], record["commit"]["hash"]))
    if earlier:
        _, seconds, commit = max(earlier)
        return seconds, f"{seconds:.0f} s, as at {commit}"
    documented = commands.seconds(benchmark, options.quick)
    if documented is None:
        return None, "a time that is not known yet: no earlier run has these settings"
    source = f"about {documented:.0f} s, by benchmarks/README.md"
    if more := [name for name in options.given if name != "quick"]:
        return None, f"{source}, with other {', '.join(more)}"
    return documented, source


def _warn_of_load(run: Mapping[str, Any], when: str, own: int) -> None:
    """Say so if more than half of the cores seem busy with other work.

    Args:
        own: threads of this run that the average counts.
    """
    load, cores = run["load"][when], run["machine"]["cores"]
    if load is not None and load > own + cores / 2:
        print(f"warning   load average {load:.1f} {when} the run, on {cores} cores: other work "
              "disturbs the times")  # fmt: skip
