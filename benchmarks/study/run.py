"""One run: an arm, a task, a seed; from the start to what it became."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import evaluate
from .arms import BUDGET, BY_NAME, Arm
from .tasks import TASKS, StudyTask

ROLLOUTS = 128  # per rollout batch, as BUDGET makes them
_TARGET_ROWS = 64


@dataclass(frozen=True)
class Plan:
    """What all runs of a study have in common.

    Attributes:
        folder: where starts, teachers and results are.
        batches: rollout batches of a run.
        test_rows: rows at each extent of the evaluation.
        start_seed: seed of the supervised start, the same for all runs.
        teacher_batches: rollout batches that make the teacher out of the start.
    """

    folder: Path
    batches: int
    test_rows: int
    start_seed: int = 0
    teacher_batches: int = 100

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
        from ral.digits.start import train_start

        name: Any = task.name
        chosen: Any = style
        train_start(folder, task=name, style=chosen, seed=plan.start_seed)
    return folder


def make_teacher(plan: Plan, task: StudyTask) -> Path:
    """The start after a longer run of GRPO: a teacher of the student's own lineage."""
    folder = plan.teacher(task)
    if not (folder / "config.json").exists():
        arm = Arm("teacher", "teacher", {"temperature": 1.2})
        trainer = _trainer(plan, task, arm, seed=10_000, batches=plan.teacher_batches)
        trainer.train()
        trainer.save_model(str(folder))
    return folder


def run(plan: Plan, task_name: str, arm_name: str, seed: int) -> dict[str, Any]:
    """Train and evaluate; the result is also written to its file, and read if it is there."""
    file = plan.result(task_name, arm_name, seed)
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    task = TASKS[task_name]
    arm = Arm("start", "start") if arm_name == "start" else BY_NAME[arm_name]
    started = time.perf_counter()
    result: dict[str, Any] = {"task": task_name, "arm": arm_name, "seed": seed}
    if arm_name == "start":
        from ral.models import load_model, load_processor

        folder = make_start(plan, task, arm.style or task.style)
        model, processor = load_model(str(folder), dtype="float32"), load_processor(str(folder))
    else:
        trainer = _trainer(plan, task, arm, seed, plan.batches)
        watch = evaluate.TargetAttention(
            trainer.processing_class,
            task,
            arm.style or task.style,
            max(task.trained),
            _TARGET_ROWS,
        )
        result["target_curve"] = _watch(trainer, watch)
        trainer.train()
        result["reward_curve"] = [x["reward"] for x in trainer.state.log_history if "reward" in x]
        for name in ("attn/divergence", "attn/grad_share", "attn/differing_prefixes", "kl"):
            result[name] = [x[name] for x in trainer.state.log_history if name in x]
        model, processor = trainer.model, trainer.processing_class
    result["seconds_trained"] = time.perf_counter() - started
    with evaluate.sharpened(model, arm.sharpened):
        scores = evaluate.accuracies(
            model, processor, task, arm.style or task.style, plan.test_rows
        )
        result["accuracy"] = {extent: accuracy.right for extent, accuracy in scores.items()}
        result["grounded"] = {extent: accuracy.grounded for extent, accuracy in scores.items()}
        result["target"] = {
            extent: evaluate.TargetAttention(
                processor, task, arm.style or task.style, extent, _TARGET_ROWS
            )(model)
            for extent in task.evaluated
            if extent > 1
        }
    result["seconds"] = time.perf_counter() - started
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".part")
    partial.write_text(json.dumps(result) + "\n")
    partial.replace(file)
    loaded: dict[str, Any] = json.loads(file.read_text())
    return loaded


def _trainer(plan: Plan, task: StudyTask, arm: Arm, seed: int, batches: int) -> Any:
    from ral import RALConfig
    from ral.models import load_model, load_processor
    from ral.rewards import combined_reward

    style = arm.style or task.style
    start = str(make_start(plan, task, style))
    settings = {**BUDGET, **arm.settings}
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
    return _study_trainer()(
        load_model(start, dtype="float32"),
        combined_reward(style),
        config,
        train_dataset=task.rows(prompts, task.trained, "train", 1_000 + seed, style=style),
        processing_class=load_processor(start),
        teacher_model=str(make_teacher(plan, task)) if arm.teacher else None,
        control=arm.control,
    )


def _study_trainer() -> Any:
    from ral import RALTrainer

    class StudyTrainer(RALTrainer):
        """RALTrainer whose attention terms may see other advantages than the rollouts have."""

        def __init__(self, *args: Any, control: str | None = None, **kwargs: Any) -> None:
            self._control = control
            super().__init__(*args, **kwargs)

        def _terms(self, captured: Any, inputs: dict[str, Any], *rest: Any) -> Any:
            if self._control == "flipped":
                inputs = {**inputs, "advantages": -inputs["advantages"]}
            elif self._control == "shuffled":
                advantages = inputs["advantages"]
                order = torch.randperm(len(advantages), device=advantages.device)
                inputs = {**inputs, "advantages": advantages[order]}
            return super()._terms(captured, inputs, *rest)

    return StudyTrainer


def _watch(trainer: Any, attention: evaluate.TargetAttention, every: int = 20) -> list[Any]:
    """[optimizer step, share in each layer], filled as the trainer runs."""
    from transformers import TrainerCallback

    curve: list[Any] = [[0, attention(trainer.model)]]

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % every == 0:
                curve.append([state.global_step, attention(trainer.model)])

    trainer.add_callback(Watch())
    return curve


def be_quiet() -> None:
    """Print nothing in this process from here on: a worker's results are in its file."""
    import warnings

    import transformers
    from transformers import PrinterCallback

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    printer: Any = PrinterCallback
    printer.on_log = lambda *args, **kwargs: None
