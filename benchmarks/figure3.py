"""What reinforcing attention does to accuracy as frames and resolution grow: the paper's Figure 3.

    python benchmarks/figure3.py --quick               # some arms, two seeds, five minutes
    python benchmarks/figure3.py --seeds 5 --workers 2 # the whole study
    python benchmarks/figure3.py --arms grpo ral --tasks frames --seeds 8 --first-seed 100

A tiny Qwen2.5-VL learns to look things up in pictures of real handwritten digits (`ral.digits`): in
frames of a video, and in a grid of cells. Each arm trains from the same supervised start, on the
same number of rollouts, and is evaluated on held-out digits, up to sizes that no rollout had. Arms
are compared seed by seed at the endpoint of each task (`study/tasks.py`), with Student's 95 %
interval. Every run is a file, so a study that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

# A script finds its own folder only; behind what is installed, so that an installed ral_kernels
# stays the one in use.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.study import run as one
from benchmarks.study.arms import ARMS, BY_NAME, QUICK
from benchmarks.study.plot import draw, label_of
from benchmarks.study.statistics import estimate, paired
from benchmarks.study.tasks import TASKS
from benchmarks.sweeps import bench, machine


def _begin_worker() -> None:
    torch.set_num_threads(1)  # two threads on two busy cores are slower than one
    one.be_quiet()


def _work(plan: one.Plan, job: tuple[str, str, int]) -> dict[str, Any]:
    return one.run(plan, *job)


def _prepare(plan: one.Plan, kind: tuple[str, str]) -> str:
    task, what = TASKS[kind[0]], kind[1]
    folder = one.make_teacher(plan, task) if what == "teacher" else one.make_start(plan, task, what)
    return str(folder)


def _all(pool: Any, function: Any, plan: one.Plan, jobs: list[Any], what: str) -> list[Any]:
    """Results of all jobs, in order, with a progress bar."""
    from tqdm import tqdm

    futures = [pool.submit(function, plan, job) for job in jobs]
    for future in tqdm(
        concurrent.futures.as_completed(futures), total=len(jobs), desc=what, leave=False
    ):
        future.result()
    return [future.result() for future in futures]


def table(task_name: str, runs: list[dict[str, Any]]) -> str:
    """Accuracy at every size, and the difference at the endpoint from the arm to compare with."""
    task = TASKS[task_name]
    of: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        if run["task"] == task_name:
            of.setdefault(run["arm"], {})[run["seed"]] = run
    end = str(task.endpoint)
    unit = "frames" if task.axis == "frames" else "a side"
    head = ["arm", *(f"{size} {unit}" for size in task.evaluated)]
    head += [f"difference at {end}", "from", "target at the end"]
    lines = [head]
    for arm in ("start", *(a.name for a in ARMS)):
        if arm not in of:
            continue
        seeds = of[arm]
        cells = [label_of(arm)]
        for size in task.evaluated:
            cells.append(str(estimate([r["accuracy"][str(size)] for r in seeds.values()])))
        against = BY_NAME[arm].against if arm in BY_NAME else None
        difference = None
        if against in of:
            difference = paired(
                {seed: r["accuracy"][end] for seed, r in seeds.items()},
                {seed: r["accuracy"][end] for seed, r in of[against].items()},
            )
        cells += ["", ""] if difference is None else [f"{difference}", str(against)]
        cells.append(str(estimate([max(r["target"][end]) for r in seeds.values()])))
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    rows = [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines
    ]
    return "\n".join(row.rstrip() for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="some arms, two seeds, frames alone")
    parser.add_argument("--tasks", nargs="+", choices=TASKS)
    parser.add_argument("--arms", nargs="+", choices=BY_NAME)
    parser.add_argument("--seeds", type=int, help="runs of each arm (default: 5; --quick: 2)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--batches", type=int, help="rollout batches (default: 40; --quick: 15)")
    parser.add_argument("--test-rows", type=int, help="rows a size (default: 256; --quick: 128)")
    parser.add_argument("--workers", type=int, default=max(1, min(2, os.cpu_count() or 1)))
    parser.add_argument("--runs", type=Path, help="folder of starts and runs; default in the cache")
    bench.add_arguments(parser)
    options = parser.parse_args(arguments)
    quick = options.quick
    tasks = options.tasks or (["frames"] if quick else list(TASKS))
    arms = options.arms or (list(QUICK) if quick else [arm.name for arm in ARMS])
    settings = {
        "tasks": tasks, "arms": arms,
        "seeds": options.seeds or (2 if quick else 5), "first_seed": options.first_seed,
        "batches": options.batches or (15 if quick else 40),
        "test_rows": options.test_rows or (128 if quick else 256),
    }  # fmt: skip
    began = time.perf_counter()
    run = bench.begin("figure3-quick" if quick else "figure3", settings)
    commit = run["commit"]["hash"] or "none"
    default = Path(os.environ.get("RAL_CACHE_DIR", Path.home() / ".cache" / "ral_kernels"))
    name = f"{commit}-{settings['batches']}-{settings['test_rows']}"
    folder = options.runs or default / "figure3" / name
    plan = one.Plan(
        folder, settings["batches"], settings["test_rows"],
        teacher_batches=2 * settings["batches"],
    )  # fmt: skip
    kinds = sorted(
        {(task, BY_NAME[arm].style or TASKS[task].style) for task in tasks for arm in arms}
    )
    seeds = range(options.first_seed, options.first_seed + settings["seeds"])
    jobs = [(task, "start", 0) for task in tasks]
    jobs += [
        (task, arm, seed)
        for task in tasks
        for seed in seeds
        for arm in arms
        if BY_NAME[arm].style != TASKS[task].style  # RAL-zero where answers are direct anyway
    ]
    with concurrent.futures.ProcessPoolExecutor(
        options.workers, multiprocessing.get_context("spawn"), _begin_worker
    ) as pool:
        _all(pool, _prepare, plan, kinds, "starts")
        if any(BY_NAME[arm].teacher for arm in arms):
            _all(pool, _prepare, plan, [(task, "teacher") for task in tasks], "teachers")
        run["runs"] = _all(pool, _work, plan, jobs, "runs")
    run["seconds"] = time.perf_counter() - began
    for task in tasks:
        print(f"\n{task}: accuracy, %, mean ± 95 % interval over {settings['seeds']} seeds")
        print(table(task, run["runs"]))
    target = options.out or Path(__file__).parent / "results" / machine.slug(run["machine"])
    target.mkdir(parents=True, exist_ok=True)
    file = target / f"{run['benchmark']}-{commit}.json"
    file.write_text(json.dumps(run) + "\n")
    print(f"\n{run['seconds']:.0f} s; written to {file} and {draw(file).name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
