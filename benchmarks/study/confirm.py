"""The hypotheses about the chains of looks, fixed before their runs; it runs and reports them.

python -m benchmarks.study.confirm run FOLDER       # resumable: every run is a file; --start N
python -m benchmarks.study.confirm report FOLDER    # once all planned runs are there

`--task chain_cells` is the chain over cells; without it the chain over frames.

FOLDER gets a folder for each start, of the form of `benchmarks.figure3 --runs`. Runs go seed by
seed over both starts and all arms, so that any prefix is balanced. There is one stopping rule: all
planned seeds. So `report` compares nothing before.

A difference is the mean over the two starts of a seed's paired differences, because both see the
same prompts. Its interval is Student's over seeds. p is adjusted by Holm's method over the
hypotheses.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from .arms import BY_NAME
from .report import Run, label_of, markdown
from .run import Plan, be_on, be_quiet, make_start, make_teacher, run
from .statistics import Estimate, holm, paired
from .tasks import TASKS, StudyTask

Runs = dict[tuple[str, int], dict[int, Run]]  # by arm and start, by seed
STARTS = 1, 2  # their seeds; everything was tuned on seed 0
SHAPE = 2, 96  # layers and hidden size; of 64, starts of fresh seeds look at a wrong frame
SEEDS = range(2000, 2020)
ROWS = 256
KEPT = "arm", "seed", "accuracy", "sharpened", "curve", "looks", "target", "cpu_seconds"


@dataclass(frozen=True)
class Hypothesis:
    """An arm against another.

    Attributes:
        arm, against: names.
        mark: which point of the arms' curves, from 0; None for the end of training.
        predicted: in points of the endpoint, least and most of the mean difference.
    """

    arm: str
    against: str
    predicted: tuple[float, float]
    mark: int | None = None

    @property
    def label(self) -> str:
        when = "" if self.mark is None else f", point {self.mark + 1} of the curve"
        return f"{label_of(self.arm)} over {label_of(self.against)}{when}"

    def value(self, task: StudyTask, found: Run) -> float:
        """The accuracy that is compared, as a share."""
        if self.mark is not None:
            return float(found["curve"][self.mark][1])
        return task.at_endpoint(found["accuracy"])


@dataclass(frozen=True)
class Study:
    """What is compared on a task.

    Attributes:
        task: of the study.
        test_seed: of the evaluation's rows: others than those of tuning.
        hypotheses: at most four.
        batches: rollout batches of a run; None for the task's own number.
    """

    task: StudyTask
    test_seed: int
    hypotheses: tuple[Hypothesis, ...]
    batches: int | None = None

    def arms(self) -> list[str]:
        """Those that take part, each once."""
        pairs = ((one.against, one.arm) for one in self.hypotheses)
        return list(dict.fromkeys(itertools.chain.from_iterable(pairs)))

    def plans(self, folder: Path) -> list[Plan]:
        """One for each start."""
        return [
            Plan(folder / f"start-{start}", self.batches, ROWS, start, test_seed=self.test_seed,
                 keep_weights=True, shape=SHAPE)
            for start in STARTS
        ]  # fmt: skip

    def jobs(self, folder: Path) -> Iterator[tuple[Plan, str, int]]:
        """Plan, arm and seed of each run, in order."""
        for seed in SEEDS:
            for plan in self.plans(folder):
                for arm in self.arms():
                    yield plan, arm, seed

    def difference(self, one: Hypothesis, runs: Runs) -> Estimate | None:
        """The mean over starts, seed by seed."""
        used = sorted({start for _, start in runs})
        values = []
        for arm in (one.arm, one.against):
            of = [runs.get((arm, start), {}) for start in used]
            common = set(of[0]).intersection(*of)
            values.append(
                {n: fmean(one.value(self.task, seeds[n]) for seeds in of) for n in common}
            )
        return paired(*values)

    def table(self, runs: Runs) -> list[list[str]]:
        """Each hypothesis, over both starts and at each; first the heads."""
        used = sorted({start for _, start in runs})
        lines = [["hypothesis", "predicted", "seeds", "difference", "p, Holm",
                  *(f"start {start}" for start in used)]]  # fmt: skip
        found = [self.difference(one, runs) for one in self.hypotheses]
        assert all(one is not None for one in found)
        estimates = [one for one in found if one is not None]
        adjusted = holm([one.p for one in estimates])
        for one, estimate, p in zip(self.hypotheses, estimates, adjusted, strict=True):
            of_starts = []
            for start in used:
                ours, theirs = (
                    {seed: one.value(self.task, r) for seed, r in runs[arm, start].items()}
                    for arm in (one.arm, one.against)
                )
                of_start = paired(ours, theirs)
                of_starts.append("" if of_start is None else of_start.signed)
            low, high = (f"{x:+g}".replace("-", "−") for x in one.predicted)
            lines.append([one.label, f"{low} to {high}", str(estimate.seeds), estimate.signed,
                          "< 0.001" if p < 0.001 else f"{p:.3f}", *of_starts])  # fmt: skip
        return lines

    def means(self, runs: Runs) -> list[list[str]]:
        """Of each arm and start at the endpoint, in per cent: right answers, and attention of the
        last layer on where to look, where it was measured; first the heads.

        Args:
            runs: those that are compared, and that of each start as it is, of arm "start".
        """
        used = sorted({start for _, start in runs})
        heads = [f"start {start}: {what}" for start in used for what in ("right", "attention")]
        lines = [["arm", *heads]]
        for arm in ("start", *self.arms()):
            line = [label_of(arm)]
            for start in used:
                of = list(runs[arm, start].values())
                right = fmean(self.task.at_endpoint(one["accuracy"]) for one in of)
                last = [
                    {n: shares[-1] for n, shares in one.get("target", {}).items()} for one in of
                ]
                there = [self.task.at_endpoint(shares) for shares in last if shares]
                line += [f"{100 * right:.1f}", f"{100 * fmean(there):.1f}" if there else ""]
            lines.append(line)
        return lines

    def starts(self, folder: Path) -> Runs:
        """What the starts are right in, as they are."""
        files = {
            plan.start_seed: plan.result(self.task.name, "start", 0) for plan in self.plans(folder)
        }
        return {
            ("start", start): {0: json.loads(file.read_text())}
            for start, file in files.items()
            if file.exists()
        }

    def collect(self, folder: Path) -> tuple[Runs, int]:
        """The runs that are there, and how many are not."""
        runs: Runs = {}
        missing = 0
        for plan, arm, seed in self.jobs(folder):
            file = plan.result(self.task.name, arm, seed)
            if file.exists():
                runs.setdefault((arm, plan.start_seed), {})[seed] = json.loads(file.read_text())
            else:
                missing += 1
        return runs, missing


STUDIES = {
    "chain": Study(
        TASKS["chain"], 7_200_003,
        (
            Hypothesis("ral_1_last", "grpo", (-1.0, 1.5)),  # the paper's form
            # The best of screening, where its term counts.
            Hypothesis("ral_30_all", "grpo", (-1.0, 2.0)),
            Hypothesis("ral_30_all", "ral_30_all_shuffled", (-1.5, 1.5)),
            Hypothesis("opad", "logits", (1.0, 6.0), mark=0),  # after 16 rollout batches
        ),
    ),
    # 40 rollout batches: on tuning seed 1000 GRPO gained 2.5 points in them, 3.7 in 200.
    "chain_cells": Study(
        TASKS["chain_cells"], 7_300_003,
        (
            Hypothesis("ral_1_last", "grpo", (-1.0, 1.0)),
            Hypothesis("ral_30_all", "grpo", (-1.0, 1.5)),
        ),
        batches=40,
    ),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", choices=STUDIES, default="chain", help="default: %(default)s")
    parser.add_argument("--start", type=int, choices=STARTS,
                        help="run from this start alone: two processes share the runs")  # fmt: skip
    parser.add_argument("--json", type=Path, help="with report: also write all runs to this file")
    options = parser.parse_args(arguments)
    study = STUDIES[options.task]
    task = study.task
    if options.what == "report":
        runs, missing = study.collect(options.folder)
        if missing:
            total = len(STARTS) * len(SEEDS) * len(study.arms())
            there = sum(len(seeds) for seeds in runs.values())
            print(f"confirm: {there} of {total} runs are there; nothing is compared before all are")
            return 1
        print(markdown(study.table(runs)))
        if starts := study.starts(options.folder):
            print("\n" + markdown(study.means({**starts, **runs})))
        if options.json is not None:
            found = [
                {"task": task.name, "start": start, **{k: one[k] for k in KEPT if k in one}}
                for (_, start), seeds in runs.items()
                for one in seeds.values()
            ]
            options.json.write_text("\n".join(map(json.dumps, found)) + "\n")
        return 0
    be_on("cpu")
    be_quiet()
    has_teacher = any(BY_NAME[arm].teacher for arm in study.arms())
    mine = [
        plan for plan in study.plans(options.folder) if options.start in (None, plan.start_seed)
    ]
    for plan in mine:
        make_start(plan, task, task.style)
        right = task.at_endpoint(run(plan, task.name, "start", 0)["accuracy"])
        print(f"start {plan.start_seed} is right in {right:.1%} at the endpoint", flush=True)
        if has_teacher:
            make_teacher(plan, task)
    planned = [job for job in study.jobs(options.folder) if job[0] in mine]
    for number, (plan, arm, seed) in enumerate(planned, start=1):
        done = run(plan, task.name, arm, seed)
        print(f"{number} of {len(planned)}: start {plan.start_seed}, seed {seed}, {arm}, "
              f"{done['cpu_seconds']:.0f} CPU-seconds", flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
