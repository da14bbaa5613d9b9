"""How fast the study's engine is, beside `ral.RALTrainer` and transformers on the same work.

    python -m benchmarks.study_speed --quick
    python -m benchmarks.study_speed --commit-results

Both train arms of figure3 from the bundled start, in turn, on one thread: rollout batches of 128
rollouts with their optimizer steps. Both answer the same held-out rows. RALTrainer has what the
study gave it before the engine: features of pictures computed once, and positions remembered.
Seconds are CPU time of the process, because other work on a machine stretches wall time. In both,
prompts are made before: a run also has to read, draw and encode them, which is `encoding`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import results
from benchmarks.harness.measure import quantiles
from benchmarks.study import run as one
from benchmarks.study.arms import BY_NAME, ROLLOUTS, Arm
from benchmarks.study.tasks import TASKS

ARMS = ("grpo", "ral", "explore", "opad", "sum")
EXTENTS = (8, 64)
Work = Callable[[], object]


def trainer_of(bench: one.Bench, arm: Arm, batches: int) -> Any:
    """What trained an arm before the engine: `RALTrainer` on transformers' model."""
    from ral import RALTrainer
    from ral.models import load_model
    from ral.rewards import combined_reward

    def model() -> Any:
        made = load_model(bench.start, dtype="float32")
        made.model.visual = bench.reader.pictures
        _remember_positions(made.model)
        return made

    config = bench.config(arm, 0, batches)
    prompts = batches * ROLLOUTS // config.num_generations
    rows = bench.task.rows(prompts, bench.task.trained, "train", 1_000, style=bench.style)
    trainer = RALTrainer(
        model(), combined_reward(bench.style), config, train_dataset=rows,
        processing_class=bench.reader.processor, teacher_model=model() if arm.teacher else None,
    )  # fmt: skip
    trainer.create_optimizer_and_scheduler(config.max_steps)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def _remember_positions(model: Any) -> None:
    stock = model.get_rope_index
    known: dict[Any, Any] = {}

    def remembered(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        key = tuple(None if x is None else x.numpy().tobytes() for x in (input_ids, mask))
        if key not in known:
            if len(known) > 8:
                known.clear()
            known[key] = stock(input_ids, *args, **kwargs)
        return known[key]

    model.get_rope_index = remembered


def training(bench: one.Bench, arm: Arm, batches: int) -> dict[str, Work]:
    """One rollout batch with its optimizer steps, of each contestant."""
    engine = bench.engine(arm, 0, batches)
    trainer = trainer_of(bench, arm, batches)
    steps = trainer.args.steps_per_generation * trainer.args.num_iterations
    parameters = list(trainer.model.parameters())

    def forever() -> Iterator[Any]:
        while True:
            yield from trainer.get_train_dataloader()

    rows = forever()

    def step_by_step() -> None:
        for _ in range(steps):
            trainer.training_step(trainer.model, next(rows))
            torch.nn.utils.clip_grad_norm_(parameters, trainer.args.max_grad_norm)
            trainer.optimizer.step()
            trainer.model.zero_grad()
            trainer.state.global_step += 1

    return {"engine": engine.one_batch, "RALTrainer": step_by_step}


def evaluation(bench: one.Bench, extent: int) -> dict[str, Work]:
    """Greedy answers to the rows of one extent."""
    from ral.models import load_model

    held_out, policy = bench.test(extent), bench.model(bench.start)
    model = load_model(bench.start, dtype="float32").eval()
    model.model.visual = bench.reader.pictures
    fields, longest = held_out.prompts.fields, bench.task.longest

    @torch.inference_mode()
    def generate() -> torch.Tensor:
        written: torch.Tensor = model.generate(**fields, do_sample=False, max_new_tokens=longest)
        return written[:, fields["input_ids"].shape[1] :]

    theirs, mine = generate(), held_out.answers(policy)
    if not torch.equal(theirs, mine):  # a wrong answer is not timed
        raise SystemExit(f"study_speed: answers at extent {extent} differ from transformers'")
    return {"engine": lambda: held_out.answers(policy), "transformers": generate}


def in_turn(works: dict[str, Work], rounds: int) -> dict[str, Any]:
    """CPU seconds of each, and how much more each takes than the first."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            began = time.process_time()
            work()
            if turn > 0:  # the first one warms up
                seconds[name].append(time.process_time() - began)
    first, other = seconds.values()
    ratio = quantiles([b / a for a, b in zip(first, other, strict=True)])
    return {**{name: quantiles(values) for name, values in seconds.items()}, "ratio": ratio}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--arms", nargs="+", choices=BY_NAME, default=list(ARMS))
    parser.add_argument("--extents", nargs="*", type=int, default=list(EXTENTS))
    parser.add_argument("--rounds", type=int, help="of each (default: 9; --quick: 2)")
    parser.add_argument("--test-rows", type=int, default=64)
    results.add_arguments(parser, quick="two rounds of two arms, 8 frames")
    options = results.parse(parser, arguments)
    quick = options.quick
    rounds = options.rounds or (2 if quick else 9)
    arms = options.arms[:2] if quick else options.arms
    extents = [extent for extent in options.extents if extent <= 8] if quick else options.extents
    settings = {"arms": arms, "extents": extents, "rounds": rounds, "test_rows": options.test_rows}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one.be_quiet()
    run = results.begin("study_speed", options, settings)
    task = TASKS["frames"]
    with tempfile.TemporaryDirectory() as folder:
        plan = one.Plan(Path(folder), rounds + 1, options.test_rows, start_steps=0)
        bench = one.Bench(plan, task, task.style)
        began = time.process_time()
        bench.prompts(0, ROLLOUTS // 8 * (rounds + 1))
        spent = 20 * (time.process_time() - began) / (rounds + 1)
        run["encoding"] = {"seconds": spent, "pictures": len(bench.reader.pictures)}
        run["points"] = []
        print(f"{'':24} {'engine':>14} {'before':>14} {'ratio':>8}")
        for arm in arms:
            found = in_turn(training(bench, BY_NAME[arm], rounds + 1), rounds)
            steps = 8 if "inner" in arm else 4
            _report(run, found, mode="train", arm=arm, per_minute=60 * steps)
        for extent in extents:
            found = in_turn(evaluation(bench, extent), rounds)
            _report(run, found, mode="evaluate", frames=extent, per_minute=0)
        print(f"\na run's 320 prompts: {spent:.1f} s to read, draw and encode, once a seed")
    torch.set_num_threads(threads)
    results.finish(run, options)
    return 0


def _report(run: dict[str, Any], found: dict[str, Any], per_minute: int, **what: Any) -> None:
    values = [found[name]["median"] for name in found if name != "ratio"]
    said = [f"{1000 * value:.0f} ms" for value in values]
    if per_minute:
        found["updates_per_minute"] = [round(per_minute / value) for value in values]
        said = [f"{number} / min" for number in found["updates_per_minute"]]
    run["points"].append({**what, **found})
    label = " ".join(map(str, what.values()))
    print(f"{label:24} {said[0]:>14} {said[1]:>14} {found['ratio']['median']:>7.1f}x", flush=True)


if __name__ == "__main__":
    sys.exit(main())
