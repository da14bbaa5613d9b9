"""Run every conformance suite and write the table: `python -m tests.conformance`.

The table goes to docs/conformance.md. With arguments for pytest, such as `-k test_flex`, the run is
a part of the suites, and the table is printed alone.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import sys
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TABLE = HERE.parents[1] / "docs" / "conformance.md"
OUTCOMES = ("passed", "refused", "not applicable", "failed")
SUITES = {
    "test_opinfo": "OpInfo samples of SDPA",
    "test_sdpa": "SDPA on the CPU",
    "test_flash": "flash-attention 2 and 3",
    "test_flex": "FlexAttention",
    "test_models": "transformers, eager against ral",
}
HEAD = """\
# Conformance

`make conformance` writes this file. It compares `ral_kernels` with what its neighbours document.
[tests/conformance](../tests/conformance) has the cases and the rules. A case passes where our
values, and gradients if it has them, are as accurate as the neighbour's.

- **Refused by name**: the call raises an error that says what is not supported. See below.
- **Not applicable**: the case cannot be asked of this package or this machine. See below.
- **Failed**: everything else.
"""


class Table:
    """A pytest plugin that counts the outcome of each case by its test."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        self.reasons: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
        self.failures: list[tuple[str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test counts once: by its call, or by a setup or teardown that did not pass.
        if report.when != "call" and report.passed:
            return
        path, _, name = report.nodeid.partition("@")[0].partition("::")  # "@": the xdist group
        suite = Path(path).stem
        outcome, reason = self._outcome(report)
        self.counts[suite, name.partition("[")[0]][outcome] += 1
        if outcome == "failed":
            self.failures.append((f"{suite}.py::{name}", reason))
        elif reason:
            self.reasons[outcome][suite, reason] += 1

    @staticmethod
    def _outcome(report: pytest.TestReport) -> tuple[str, str]:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            return "failed", crash.message if crash else str(report.longrepr)
        if hasattr(report, "wasxfail"):  # known to fail, and counted as such where it does
            return ("passed", "") if report.passed else ("failed", report.wasxfail)
        if report.skipped:
            why = str(report.longrepr[2])  # type: ignore[index]
            return "not applicable", why.removeprefix("Skipped: ")
        return next(
            (("refused", str(x)) for key, x in report.user_properties if key == "refused"),
            ("passed", ""),
        )

    def markdown(self) -> str:
        lines = [HEAD, self._versions(), "", "## Cases", ""]
        lines += ["| suite | test | cases | passed | refused by name | not applicable | failed |"]
        lines += ["|---|---|" + "---:|" * 5]
        total: Counter[str] = Counter()
        for suite, title in SUITES.items():
            for (of, test), counts in sorted(self.counts.items()):
                if of == suite:
                    lines.append(_row(f"{title} | `{test}`", counts))
                    total += counts
        lines.append(_row("**all** |", total))
        for outcome in ("refused", "not applicable"):
            lines += ["", f"## {'Refused by name' if outcome == 'refused' else 'Not applicable'}"]
            lines += ["", "| suite | sentence | cases |", "|---|---|---:|"]
            by_sentence: Counter[tuple[str, str]] = Counter()
            for (suite, reason), count in self.reasons[outcome].items():
                by_sentence[suite, _shape(reason)] += count
            for (suite, reason), count in sorted(by_sentence.items()):
                lines.append(f"| {SUITES[suite]} | {reason} | {count} |")
        lines += ["", "## Failed", ""]
        causes: dict[tuple[str, str], list[str]] = defaultdict(list)
        for case, reason in sorted(self.failures):
            causes[case.partition("[")[0], re.sub(r"[\d.]+(e[-+]\d+)?", "…", reason)].append(case)
        first = dict(self.failures)
        lines += [
            f"- {len(cases)} as `{cases[0]}`: {_shape(first[cases[0]])}"
            for cases in causes.values()
        ]
        return "\n".join(lines if self.failures else [*lines, "None."]) + "\n"

    @staticmethod
    def _versions() -> str:
        found = (f"{name} {version(name)}" for name in ("torch", "transformers"))
        return f"Versions: {', '.join(found)}, Python {platform.python_version()}."


def _row(name: str, counts: Counter[str]) -> str:
    columns = [sum(counts.values()), *(counts[outcome] for outcome in OUTCOMES)]
    return f"| {name} | " + " | ".join(map(str, columns)) + " |"


def _shape(reason: str) -> str:
    """The first line of a message as one cell of a table, of equal text for equal causes."""
    line = next((line for line in reason.splitlines() if line.strip()), "")
    line = re.sub(r"(, layer )\d+", r"\1N", line).replace("|", "\\|")
    return line if len(line) <= 300 else f"{line[:297]}..."


def main(arguments: list[str]) -> int:
    workers = ["-n", "auto", "--dist", "loadgroup"] if importlib.util.find_spec("xdist") else []
    table = Table()
    options = ["-q", "-p", "no:cacheprovider", *(arguments or workers)]
    status = pytest.main([*options, str(HERE)], plugins=[table])
    if table.counts and not arguments:
        TABLE.write_text(table.markdown())
    print(table.markdown())
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
