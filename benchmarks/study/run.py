"""One run: an arm, a task and a seed, from the start to the trained model's accuracy."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch

from ral import RALConfig

from . import evaluate
from .arms import BUDGET, BY_NAME, ROLLOUTS, SHARPENING, Arm
from .decoder import Decoder
from .engine import Engine, suppressed_tokens
from .prompts import Prompts, Reader
from .tasks import TASKS, StudyTask

FIXED = ("start", "teacher")  # evaluated as they are
FINE = tuple(n / 10 for n in range(1, 11))  # the same, for rollouts to reach an accuracy
CURVE = (0.2, 0.4, 0.7)  # of a run's rollout batches; the endpoint's accuracy is taken there too
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
        start_steps: how many it trains for; None for the task's own number. 0: the bundled model,
            where it does the task in that style; elsewhere a short training.
        wrong_share: of its last demonstrations, those that are wrong; None for the task's.
        test_seed: of the rows of the evaluation.
        keep_weights: whether a run leaves its trained weights beside its result.
        device: where everything is trained; other than "cpu" only after `be_on` in this process.
        shape: layers and hidden size of the language model; None for the tiny one.
    """

    folder: Path
    batches: int | None
    test_rows: int
    start_seed: int = 0
    start_steps: int | None = None
    wrong_share: float | None = None
    test_seed: int = evaluate.TEST_SEED
    keep_weights: bool = False
    device: str = "cpu"
    shape: tuple[int, int] | None = None

    @property
    def model_options(self) -> dict[str, Any]:
        """Of `ral.digits.model.make_model`."""
        if self.shape is None:
            return {}
        return {"num_layers": self.shape[0], "hidden_size": self.shape[1]}

    def batches_of(self, task: StudyTask) -> int:
        return task.batches if self.batches is None else self.batches

    def start(self, task: StudyTask, style: str) -> Path:
        return self.folder / "starts" / f"{task.named}-{style}-{self.start_seed}"

    def teacher(self, task: StudyTask) -> Path:
        return self.folder / "starts" / f"{task.named}-teacher-{self.start_seed}"

    def result(self, task: str, arm: str, seed: int) -> Path:
        return self.folder / "runs" / f"{task}-{arm}-{seed}.json"

    def weights(self, task: str, arm: str, seed: int) -> Path:
        """By their names in transformers; without those of the vision tower, the start's."""
        return self.result(task, arm, seed).with_suffix(".safetensors")


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
            steps=SHORT_STEPS if plan.start_steps == 0 else plan.start_steps,
            **plan.model_options,
        )  # fmt: skip
    return folder


def make_teacher(plan: Plan, task: StudyTask) -> Path:
    """The teacher: the start after a GRPO run of twice the length."""
    folder = plan.teacher(task)
    if not (folder / "config.json").exists():
        from ral.digits.model import save_start
        from ral.models import load_model, load_processor

        arm = Arm("teacher", "teacher", {"temperature": 1.2})
        bench = Bench.of(plan, task, task.style)
        engine = bench.engine(arm, seed=10_000, batches=2 * plan.batches_of(task))
        engine.train()
        model = load_model(bench.start, dtype="float32")
        model.load_state_dict(engine.policy.weights(), strict=False)
        save_start(folder, model, load_processor(bench.start))
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
        model = load_model(self.start, dtype="float32").to(plan.device)
        self.reader = Reader(model, load_processor(self.start))

    @cache  # noqa: B019 - benches live as long as their process
    def test(self, extent: int) -> evaluate.HeldOut:
        """The rows of one extent."""
        plan = self.plan
        return evaluate.HeldOut(
            self.reader, self.task, self.style, extent, plan.test_rows, plan.test_seed
        )

    @cache  # noqa: B019
    def target(self, extent: int) -> evaluate.TargetAttention:
        """Where attention should be in rows of one extent, above 1."""
        return evaluate.TargetAttention(
            self.reader, self.task, self.style, extent, _TARGET_ROWS, self.plan.test_seed
        )

    @classmethod
    def of(cls, plan: Plan, task: StudyTask, style: str) -> Bench:
        """The one of this process."""
        key = (plan, task.named, style)
        if key not in cls._made:
            cls._made[key] = cls(plan, task, style)
        return cls._made[key]

    def model(self, folder: str | Path) -> Decoder:
        """A descendant of the start, whose vision tower is the start's."""
        from ral.models import load_model

        made: Any = Decoder.of(load_model(str(folder), dtype="float32"))
        return made.to(self.plan.device)

    @lru_cache(maxsize=2)  # noqa: B019
    def prompts(self, seed: int, count: int) -> tuple[Prompts, list[dict[str, Any]]]:
        """The prompts that the runs of a seed train on, and their rows."""
        found = self.task.rows(count, self.task.trained, "train", 1_000 + seed, style=self.style)
        rows = [found[number] for number in range(count)]
        return self.reader.encode(rows), rows

    def config(self, arm: Arm, seed: int, batches: int) -> RALConfig:
        """The settings of a run of so many rollout batches."""
        settings = settings_of(arm, self.task)
        steps = settings["num_iterations"] * settings["steps_per_generation"]
        return RALConfig(
            output_dir=str(self.plan.folder / "out"), max_steps=batches * steps, seed=seed,
            gradient_checkpointing=False, save_strategy="no", report_to=[], use_cpu=True,
            bf16=False, disable_tqdm=True, **settings,
        )  # fmt: skip

    def engine(self, arm: Arm, seed: int, batches: int) -> Engine:
        """What trains an arm, from the start."""
        from ral.rewards import combined_reward

        config = self.config(arm, seed, batches)
        prompts, rows = self.prompts(seed, batches * ROLLOUTS // config.num_generations)
        if arm.control == "wrong":
            rows = [_with_wrong_evidence(row) for row in rows]
        policy = self.model(self.start)
        return Engine(
            policy, config, prompts, rows, self.reader.tokenizer, combined_reward(self.style),
            suppressed=suppressed_tokens(policy.config, self.reader.processor),
            teacher=self.model(make_teacher(self.plan, self.task)) if arm.teacher else None,
            control=arm.control,
        )  # fmt: skip

    def endpoint(self, model: Decoder) -> float:
        """Mean greedy accuracy at the endpoint's extents."""
        found = evaluate.accuracies(model, self.test, self.task.endpoint)
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
        engine = bench.engine(arm, seed, batches)
        curves, watch = _watch(engine, bench, batches, arm)
        engine.train(watch)
        result |= curves
        result["reward_curve"] = engine.log["reward"]
        for name in ("attn/divergence", "attn/grad_share", "attn/differing_prefixes", "kl"):
            result[name] = engine.log.get(name, [])
        model = engine.policy
        if plan.keep_weights:
            keep(model, plan.weights(task_name, arm_name, seed))
    scores = evaluate.accuracies(model, bench.test, task.evaluated)
    for name in ("right", "thought", "grounded"):
        result[{"right": "accuracy"}.get(name, name)] = {
            extent: getattr(score, name) for extent, score in scores.items()
        }
    result["target"] = {
        str(extent): bench.target(extent)(model) for extent in task.evaluated if extent > 1
    }
    if scores[str(task.evaluated[0])].looks:
        result["looks"] = {extent: score.looks for extent, score in scores.items()}
        result["target_queries"] = {
            str(extent): bench.target(extent).of_queries(model).tolist()
            for extent in task.evaluated
        }
    with evaluate.sharpened(model, SHARPENING):
        scores = evaluate.accuracies(model, bench.test, task.endpoint)
    result["sharpened"] = {extent: score.right for extent, score in scores.items()}
    result["seconds"] = time.perf_counter() - started
    result["cpu_seconds"] = time.process_time() - began
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".part")
    partial.write_text(json.dumps(result) + "\n")
    partial.replace(file)
    loaded: dict[str, Any] = json.loads(file.read_text())
    return loaded


def keep(model: Decoder, file: Path) -> None:
    """Write a decoder's weights."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".part")
    save_file({name: weight.contiguous() for name, weight in model.weights().items()}, partial)
    partial.replace(file)


def settings_of(arm: Arm, task: StudyTask) -> dict[str, Any]:
    """Of `RALConfig`."""
    spans = task.spans if "attn_explore_sigma" in arm.settings else {}
    return {
        **BUDGET, "max_completion_length": task.longest, "learning_rate": task.learning_rate,
        **spans, **arm.settings,
    }  # fmt: skip


def _with_wrong_evidence(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose evidence is the frame after each right one, or the cell in reading order."""
    from ral.digits.scans import CELL

    def after(region: dict[str, Any]) -> dict[str, Any]:
        images, number = row["images"], region["image"]
        if "box" not in region:
            return {**region, "image": (number + 1) % len(images)}
        side = images[number].width // CELL
        column, line = (x // CELL for x in region["box"][:2])
        line, column = divmod((line * side + column + 1) % side**2, side)
        return {**region, "box": [CELL * n for n in (column, line, column + 1, line + 1)]}

    return {**row, "evidence": [after(region) for region in row["evidence"]]}


def _watch(
    engine: Engine, bench: Bench, batches: int, arm: Arm
) -> tuple[dict[str, list[Any]], Callable[[int], None]]:
    """Curves over training, and what fills them as the engine runs.

    The curves are:
        target_curve: [rollout batches, share of attention on the target in each layer], at the
            longest extent that is trained on.
        curve: [rollout batches, accuracy at the endpoint], at `CURVE` of the run, or at its begin
            and at `FINE` in the study of objectives; empty if the arm has no curve.
    """
    target = bench.target(max(bench.task.trained))
    policy = engine.policy
    curves: dict[str, list[Any]] = {"target_curve": [[0, target(policy)]], "curve": []}
    fine = arm.study == "objectives"
    marks = {max(1, round(share * batches)) for share in (FINE if fine else CURVE)}
    if fine:
        curves["curve"].append([0, bench.endpoint(policy)])

    def watch(done: int) -> None:
        if done % TARGET_EVERY == 0 or done == batches:
            curves["target_curve"].append([done, target(policy)])
        if arm.curve and done in marks:
            curves["curve"].append([done, bench.endpoint(policy)])

    return curves, watch


def be_on(device: str) -> None:
    """Let this process make its tensors on a device. On the CPU it has one thread."""
    if device == "cpu":
        torch.set_num_threads(1)  # two threads on two busy cores are slower than one
    else:
        torch.set_default_device(device)


def be_quiet() -> None:
    """Silence this process: a worker's results are in its file."""
    import warnings

    import transformers

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
