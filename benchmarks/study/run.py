"""One run: an arm, a task and a seed, from the start to the trained model's accuracy."""

from __future__ import annotations

import gc
import json
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from . import evaluate
from .arms import BUDGET, BY_NAME, ROLLOUTS, SHARPENING, Arm
from .picture_cache import Pictures
from .tasks import TASKS, StudyTask

FIXED = ("start", "teacher")  # evaluated as they are
FINE = tuple(n / 10 for n in range(1, 11))  # the same, for rollouts to reach an accuracy
CURVE = (0.2, 0.4, 0.7)  # of a run's rollout batches; the endpoint's accuracy is taken there too
START_STEPS = 900
SHORT_STEPS = 150
TARGET_EVERY = 2  # rollout batches between two points of the attention's curve
_TARGET_ROWS = 64


@dataclass(frozen=True)
class Plan:
    """The settings that all runs of a study share.

    Attributes:
        folder: where starts, teachers and results are.
        batches: rollout batches of a run; None for the task's own number.
        test_rows: rows at each extent of the evaluation.
        start_seed: seed of the supervised start, the same for all runs.
        start_steps: how many it trains for. 0: the bundled model, where it does the task in that
            style; elsewhere a short training.
        wrong_share: of its last demonstrations, those that are wrong; None for the task's.
    """

    folder: Path
    batches: int | None
    test_rows: int
    start_seed: int = 0
    start_steps: int = START_STEPS
    wrong_share: float | None = None

    def batches_of(self, task: StudyTask) -> int:
        return task.batches if self.batches is None else self.batches

    def start(self, task: StudyTask, style: str) -> Path:
        return self.folder / "starts" / f"{task.name}-{style}-{self.start_seed}"

    def teacher(self, task: StudyTask) -> Path:
        return self.folder / "starts" / f"{task.name}-teacher-{self.start_seed}"

    def result(self, task: str, arm: str, seed: int) -> Path:
        return self.folder / "runs" / f"{task}-{arm}-{seed}.json"


def make_start(plan: Plan, task: StudyTask, style: str) -> Path:
    """The supervised start, made once."""
    folder = plan.start(task, style)
    if not (folder / "config.json").exists():
        from ral.digits.model import save_start
        from ral.digits.pretrained import load_pretrained
        from ral.digits.start import train_start

        is_bundled = (task.name, style, plan.wrong_share) == ("timestamp", "think", None)
        if plan.start_steps == 0 and is_bundled:
            return save_start(folder, *load_pretrained())
        name: Any = task.name
        chosen: Any = style
        train_start(
            folder, task=name, style=chosen, seed=plan.start_seed, extents=task.seen,
            wrong_share=task.wrong_share if plan.wrong_share is None else plan.wrong_share,
            steps=plan.start_steps or SHORT_STEPS,
        )  # fmt: skip
    return folder


def make_teacher(plan: Plan, task: StudyTask) -> Path:
    """The teacher: the start after a GRPO run of twice the length."""
    folder = plan.teacher(task)
    if not (folder / "config.json").exists():
        arm = Arm("teacher", "teacher", {"temperature": 1.2})
        bench = Bench.of(plan, task, task.style)
        trainer = _trainer(bench, arm, seed=10_000, batches=2 * plan.batches_of(task))
        trainer.train()
        with bench.pictures.left_out(trainer.model):
            trainer.save_model(str(folder))
    return folder


class Bench:
    """What the runs of a task and style share: start, pictures seen, held-out rows.

    Args:
        plan: of the study.
        task, style: of the runs.
    """

    _made: ClassVar[dict[tuple[Plan, str, str], Bench]] = {}

    def __init__(self, plan: Plan, task: StudyTask, style: str) -> None:
        from ral.models import load_model, load_processor

        self.plan, self.task, self.style = plan, task, style
        self.start = str(make_start(plan, task, style))
        self.pictures = Pictures(load_model(self.start, dtype="float32").model.visual)
        self.processor = self.pictures.processor_of(load_processor(self.start))
        self.tests = {
            extent: evaluate.HeldOut(self.processor, task, style, extent, plan.test_rows)
            for extent in task.evaluated
        }
        self.targets = {
            extent: evaluate.TargetAttention(self.processor, task, style, extent, _TARGET_ROWS)
            for extent in task.evaluated
            if extent > 1
        }

    @classmethod
    def of(cls, plan: Plan, task: StudyTask, style: str) -> Bench:
        """The one of this process."""
        key = (plan, task.name, style)
        if key not in cls._made:
            cls._made[key] = cls(plan, task, style)
        return cls._made[key]

    def model(self, folder: str | Path) -> Any:
        """A descendant of the start, whose vision tower is the start's."""
        from ral.models import load_model

        model = load_model(str(folder), dtype="float32")
        model.model.visual = self.pictures
        _remember_positions(model.model)
        return model

    def endpoint(self, model: Any) -> float:
        """Mean greedy accuracy at the endpoint's extents."""
        found = evaluate.accuracies(model, self.tests, self.task.endpoint)
        return self.task.at_endpoint({extent: score.right for extent, score in found.items()})


def run(plan: Plan, task_name: str, arm_name: str, seed: int) -> dict[str, Any]:
    """Train and evaluate; the result is also written to its file, and read if it is there."""
    file = plan.result(task_name, arm_name, seed)
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    task = TASKS[task_name]
    arm = Arm(arm_name, arm_name) if arm_name in FIXED else BY_NAME[arm_name]
    bench = Bench.of(plan, task, arm.style or task.style)
    started = time.perf_counter()
    began = time.process_time()
    result: dict[str, Any] = {"task": task_name, "arm": arm_name, "seed": seed}
    if arm_name in FIXED:
        folder = make_teacher(plan, task) if arm_name == "teacher" else bench.start
        model = bench.model(folder)
    else:
        batches = plan.batches_of(task)
        trainer = _trainer(bench, arm, seed, batches)
        result |= _watch(trainer, bench, batches, arm)
        trainer.train()
        result["reward_curve"] = [x["reward"] for x in trainer.state.log_history if "reward" in x]
        for name in ("attn/divergence", "attn/grad_share", "attn/differing_prefixes", "kl"):
            result[name] = [x[name] for x in trainer.state.log_history if name in x]
        model = trainer.model
    scores = evaluate.accuracies(model, bench.tests, task.evaluated)
    for name in ("right", "thought", "grounded"):
        result[{"right": "accuracy"}.get(name, name)] = {
            extent: getattr(score, name) for extent, score in scores.items()
        }
    result["target"] = {str(extent): target(model) for extent, target in bench.targets.items()}
    with evaluate.sharpened(model, SHARPENING):
        scores = evaluate.accuracies(model, bench.tests, task.endpoint)
    result["sharpened"] = {extent: score.right for extent, score in scores.items()}
    result["seconds"] = time.perf_counter() - started
    result["cpu_seconds"] = time.process_time() - began
    del model
    gc.collect()  # a trainer's cycles hold the model and its optimizer
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".part")
    partial.write_text(json.dumps(result) + "\n")
    partial.replace(file)
    loaded: dict[str, Any] = json.loads(file.read_text())
    return loaded


def settings_of(arm: Arm, task: StudyTask) -> dict[str, Any]:
    """Of `RALConfig`."""
    spans = task.spans if "attn_explore_sigma" in arm.settings else {}
    return {**BUDGET, "learning_rate": task.learning_rate, **spans, **arm.settings}


def _trainer(bench: Bench, arm: Arm, seed: int, batches: int) -> Any:
    from ral import RALConfig
    from ral.rewards import combined_reward

    plan, task, style = bench.plan, bench.task, bench.style
    settings = settings_of(arm, task)
    steps = settings["num_iterations"] * settings["steps_per_generation"]
    config = RALConfig(
        output_dir=str(plan.folder / "out" / f"{task.name}-{arm.name}-{seed}"),
        max_steps=batches * steps,
        seed=seed,
        data_seed=seed,
        logging_steps=1,
        attn_metrics_every=10,
        attn_warn_divergence=float("inf"),
        attn_warn_grad_share=float("inf"),
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        **settings,
    )
    prompts = batches * ROLLOUTS // settings["num_generations"]
    trainer = _study_trainer()(
        bench.model(bench.start),
        combined_reward(style),
        config,
        train_dataset=task.rows(prompts, task.trained, "train", 1_000 + seed, style=style),
        processing_class=bench.processor,
        teacher_model=bench.model(make_teacher(plan, task)) if arm.teacher else None,
        control=arm.control,
    )
    if trainer.ref_model is not None:
        trainer.ref_model.model.visual = bench.pictures
    return trainer


def _remember_positions(model: Any) -> None:
    """Compute the position ids of a batch once: they come from a loop in Python over its rows."""
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


def _study_trainer() -> Any:
    from ral import RALTrainer
    from ral.terms import Batch

    class StudyTrainer(RALTrainer):
        """RALTrainer whose attention terms may see other advantages than the rollouts have."""

        def __init__(self, *args: Any, control: str | None = None, **kwargs: Any) -> None:
            self._control = control
            super().__init__(*args, **kwargs)

        def _batch(self, *args: Any) -> Batch:
            batch = super()._batch(*args)
            advantages = batch.advantages
            if self._control == "flipped":
                advantages = -advantages
            elif self._control == "shuffled":
                advantages = advantages[torch.randperm(len(advantages), device=advantages.device)]
            return replace(batch, advantages=advantages)

        def _forget_rollouts(self, rows: list[dict[str, Any]]) -> None:
            if self._control == "wrong":
                for row in rows:
                    (region,) = row["evidence"]
                    frame = (region["image"] + 1) % len(row["images"])
                    row["evidence"] = [{**region, "image": frame}]
            super()._forget_rollouts(rows)

        def _place_evidence(
            self, output: dict[str, Any], ids: torch.Tensor, mask: torch.Tensor
        ) -> None:
            given = output["advantages"]
            if self._control == "shuffled" and self._needs_evidence:
                output["advantages"] = given[torch.randperm(len(given), device=given.device)]
            super()._place_evidence(output, ids, mask)
            output["advantages"] = given

    return StudyTrainer


def _watch(trainer: Any, bench: Bench, batches: int, arm: Arm) -> dict[str, list[Any]]:
    """Curves over training, filled as the trainer runs.

    Returns:
        target_curve: [rollout batches, share of attention on the target in each layer], at the
            longest extent that is trained on.
        curve: [rollout batches, accuracy at the endpoint], at `CURVE` of the run, or at its begin
            and at `FINE` in the study of objectives; empty if the arm has no curve.
    """
    from transformers import TrainerCallback

    target = bench.targets[max(bench.task.trained)]
    curves: dict[str, list[Any]] = {"target_curve": [[0, target(trainer.model)]], "curve": []}
    steps = trainer.args.max_steps // batches
    fine, with_accuracy = arm.study == "objectives", arm.curve
    marks = sorted({max(1, round(share * batches)) for share in (FINE if fine else CURVE)})
    if fine:
        curves["curve"].append([0, bench.endpoint(trainer.model)])

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            done, rest = divmod(state.global_step, steps)
            if rest:
                return
            if done % TARGET_EVERY == 0 or done == batches:
                curves["target_curve"].append([done, target(trainer.model)])
            if with_accuracy and done in marks:
                curves["curve"].append([done, bench.endpoint(trainer.model)])

    trainer.add_callback(Watch())
    return curves


def be_quiet() -> None:
    """Silence this process: a worker's results are in its file."""
    import warnings

    import transformers
    from transformers import PrinterCallback

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    printer: Any = PrinterCallback
    printer.on_log = lambda *args, **kwargs: None
