"""Where a benchmark writes: the one place that decides, for sweeps, benches and studies.

By default files go to `benchmarks/results/local/`, which git ignores, so that a run leaves the tree
clean. `--commit-results` writes into the folder of the machine, whose files are committed, and
`--out` into any other folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import machine

RESULTS = Path(__file__).resolve().parents[1] / "results"
LOCAL = RESULTS / "local"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options `--out` and `--commit-results`, of which a call may give one."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--out", type=Path, help="folder to write to (default: benchmarks/results/local)"
    )
    group.add_argument(
        "--commit-results",
        action="store_true",
        help="write to benchmarks/results/<machine>, which git tracks",
    )


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
