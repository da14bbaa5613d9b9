"""The commands of benchmarks/README.md's first table, which stands there alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
QUICK_SECONDS = 60.0  # that --quick aims at, on 2 free cores


@dataclass(frozen=True)
class Command:
    """A row of the table, as plain text."""

    question: str
    command: str
    minutes: str
    quick: str  # "yes" if there is --quick, or its minutes where they are not one
    file: str


def table() -> list[Command]:
    """The rows, in the README's order."""
    text = README.read_text().split("| question |", 1)[1].split("\n\n", 1)[0]
    found = []
    for line in text.splitlines()[2:]:
        cells = [re.sub(r"\[([^]]+)\]\([^)]+\)|`", r"\1", cell).strip() for cell in _cells(line)]
        found.append(Command(*cells))
    return found


def _cells(line: str) -> list[str]:
    return line.strip().strip("|").split("|")


def seconds(benchmark: str, quick: bool) -> float | None:
    """What a benchmark takes by the table, None if no number stands there."""
    for row in table():
        number = re.match(r"([\d.]+)", row.quick if quick else row.minutes)
        if re.search(rf"benchmarks\.{benchmark}(,|$)", row.command) and number:
            return 60 * float(number[1])
    return QUICK_SECONDS if quick else None


def listing() -> str:
    """All commands, with what each answers and takes."""
    lines = []
    for row in table():
        quick = "" if row.quick == "no" else f"; --quick: {row.quick.replace('yes', '1')}"
        lines += [row.question, f"    {row.command}", f"    minutes: {row.minutes}{quick}"]
    return "\n".join(lines)
