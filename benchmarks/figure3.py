r"""What reinforcing attention does to accuracy as frames and resolution grow: the paper's Figure 3.

    python -m benchmarks.figure3 --quick               # two arms, two seeds, short runs
    python -m benchmarks.figure3 --seeds 5 --workers 2 # the whole study
    python -m benchmarks.figure3 --arms grpo ral --seeds 8 --first-seed 100 --tag fresh
    python -m benchmarks.figure3 --study objectives --seeds 10 --wrong-share 0.95 --reach 0.25

A tiny Qwen2.5-VL learns to look things up in pictures of real handwritten digits (`ral.digits`): in
frames of a video, and in a grid of cells. Each arm trains from the same supervised start, on the
same number of rollouts. It is evaluated on held-out digits, up to sizes that no rollout had. Arms
are compared seed by seed at the endpoint of each task (`study/tasks.py`), with Student's 95 %
interval. Every run is a file, so a stopped study resumes.

`--device cuda` trains on a GPU, where there is room for a larger model:

    python -m benchmarks.figure3 --device cuda --shape 4 512 --tasks chain_long --workers 1 \
        --arms grpo ral_1_last ral_10_all --minutes 6         # resumes where it stopped

`--study objectives` runs the arms of docs/objectives.md, on frames unless `--tasks` says
otherwise. It also prints how many rollouts each takes to reach an accuracy.

docs/figure3.md has the result. `python -m benchmarks.study.report FILE` prints its tables, and
`python -m benchmarks.study.plot FILE` draws its pictures again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import results
from benchmarks.study import run as one
from benchmarks.study.arms import ARMS, BY_NAME, QUICK
from benchmarks.study.evaluate import TEST_SEED
from benchmarks.study.plot import draw
from benchmarks.study.report import comparisons, curves, plain, reached, table
from benchmarks.study.tasks import TASKS


def _begin_worker(device: str) -> None:
    one.be_on(device)
    one.be_quiet()


def _work(plan: one.Plan, job: tuple[str, str, int], until: float) -> dict[str, Any] | None:
    """The run; None if it is not there and it is too late to begin."""
    if time.time() > until and not plan.result(*job).exists():
        return None
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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS)
    parser.add_argument("--arms", nargs="+", choices=BY_NAME)
    parser.add_argument("--study", choices=("figure3", "objectives"), default="figure3",
                        help="which arms run by default")  # fmt: skip
    parser.add_argument("--wrong-share", type=float,
                        help="wrong demonstrations of the start (default: the task's)")  # fmt: skip
    parser.add_argument("--reach", type=float, default=0.5,
                        help="accuracy to which rollouts are counted (default: 0.5)")  # fmt: skip
    parser.add_argument("--seeds", type=int, help="runs of each arm (default: 5; --quick: 2)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--start-seed", type=int, default=0, help="of the supervised start")
    parser.add_argument(
        "--batches", type=int, help="rollout batches (default: the task's; --quick: 3)"
    )
    parser.add_argument("--test-rows", type=int, help="rows a size (default: 256; --quick: 32)")
    parser.add_argument("--test-seed", type=int, default=TEST_SEED,
                        help="of the rows of the evaluation (default: %(default)s)")  # fmt: skip
    parser.add_argument("--workers", type=int, default=max(1, min(2, os.cpu_count() or 1)))
    parser.add_argument("--runs", type=Path, help="folder of starts and runs; default in the cache")
    parser.add_argument("--device", default="cpu", help="where to train (default: %(default)s)")
    parser.add_argument("--shape", type=int, nargs=2, metavar=("LAYERS", "HIDDEN"),
                        help="of the language model, with heads of 16 (default: 2 64)")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=math.inf,
                        help="begin no run later; the same call goes on")  # fmt: skip
    parser.add_argument("--keep-weights", action="store_true",
                        help="leave each run's weights beside its result")  # fmt: skip
    parser.add_argument("--tag", help="first in the name of the file: figure3-TAG-...")
    results.add_arguments(parser, quick="two arms, two seeds, short runs, frames alone")
    options = results.parse(parser, arguments, always=("tag",))
    quick = options.quick
    objectives = options.study == "objectives"
    tasks = options.tasks or (["frames"] if quick or objectives else ["frames", "resolution"])
    of_study = [arm.name for arm in ARMS if arm.study == options.study]
    arms = options.arms or (list(QUICK) if quick and not objectives else of_study)
    settings = {
        "tasks": tasks, "arms": arms,
        "seeds": options.seeds or (2 if quick else 5), "first_seed": options.first_seed,
        "start_seed": options.start_seed,
        "batches": options.batches or (3 if quick else None),
        "test_rows": options.test_rows or (32 if quick else 256),
        "start_steps": 0 if quick else None,
        "tag": options.tag, "study": options.study, "wrong_share": options.wrong_share,
        "reach": options.reach, "test_seed": options.test_seed,
        "device": options.device, "shape": options.shape,
    }  # fmt: skip
    run = results.begin("figure3", options, settings)
    commit = run["commit"]["hash"] or "none"
    default = Path(os.environ.get("RAL_CACHE_DIR", Path.home() / ".cache" / "ral_kernels"))
    length = settings["batches"] or "full"
    name = f"{commit}-{length}-{settings['test_rows']}-{options.start_seed}"
    name += "-quick" if quick else ""
    name += "" if options.wrong_share is None else f"-wrong{options.wrong_share:g}"
    name += "" if options.device == "cpu" else f"-{options.device.replace(':', '')}"
    name += f"-{options.shape[0]}x{options.shape[1]}" if options.shape else ""
    name += "" if options.test_seed == TEST_SEED else f"-rows{options.test_seed}"
    plan = one.Plan(
        options.runs or default / "figure3" / name,
        settings["batches"],
        settings["test_rows"],
        start_seed=options.start_seed,
        start_steps=settings["start_steps"],
        wrong_share=options.wrong_share,
        test_seed=options.test_seed,
        keep_weights=options.keep_weights,
        device=options.device,
        shape=tuple(options.shape) if options.shape else None,
    )
    chosen = [(task, arm) for task in tasks for arm in arms if task in BY_NAME[arm].tasks]
    kinds = sorted({(task, BY_NAME[arm].style or TASKS[task].style) for task, arm in chosen})
    taught = sorted({task for task, arm in chosen if BY_NAME[arm].teacher})
    seeds = range(options.first_seed, options.first_seed + settings["seeds"])
    jobs = [(task, "start", 0) for task in tasks] + [(task, "teacher", 0) for task in taught]
    # Seed by seed, so that a study that is stopped has all arms of some seeds.
    jobs += [(task, arm, seed) for seed in seeds for task, arm in chosen]
    until = time.time() + 60 * options.minutes
    with concurrent.futures.ProcessPoolExecutor(
        options.workers,
        multiprocessing.get_context("spawn"),
        _begin_worker,
        (options.device,),
    ) as pool:
        _all(pool, _prepare, plan, kinds, "starts")
        _all(pool, _prepare, plan, [(task, "teacher") for task in taught], "teachers")
        work = partial(_work, until=until)
        run["runs"] = [made for made in _all(pool, work, plan, jobs, "runs") if made is not None]
    if len(run["runs"]) < len(jobs):
        print(f"{len(run['runs'])} of {len(jobs)} runs in {options.minutes:g} minutes")
    for task in tasks:
        print(f"\n{task}: right answers, %, mean ± 95 % over {settings['seeds']} seeds")
        print(f"endpoint: {TASKS[task].endpoint_label}\n")
        reach = partial(reached, level=options.reach)
        for make in (table, comparisons, curves, reach):
            if lines := make(task, run["runs"]):
                print(plain(lines) + "\n")
    pictures = draw(results.finish(run, options))
    print(f"drew {' and '.join(picture.name for picture in pictures)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
