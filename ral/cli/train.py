"""`train` and `distill`: RALTrainer, and `sft`: SFTTrainer."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from ..interrupts import interruptible
from ..models import default_dtype, load_model
from .bundled import bundled_model
from .curves import CURVES, draw_curves
from .errors import Refused, failing_on_data, refusing
from .hub import check_model_name
from .parsing import Settings
from .progress import METRICS, show_progress
from .run import CONFIG, load, open_folder, say, trainer_config
from .settings import (
    DIGITS,
    DataSettings,
    ModelSettings,
    RewardSettings,
    RunSettings,
    TeacherSettings,
)
from .sources import evaluation_rows, reward_functions, training_rows


def train(settings: Settings) -> int:
    """GRPO with the terms of eq. (3), or with a teacher those of eq. (4)."""
    from ..config import RALConfig
    from ..trainer import RALTrainer

    model_of, data, rewards, run, teacher = (
        settings.build(config)
        for config in (ModelSettings, DataSettings, RewardSettings, RunSettings, TeacherSettings)
    )
    _check_named(model_of, data)
    functions, weights = reward_functions(rewards, data.style)
    if weights is not None and settings.values.get("reward_weights") is not None:
        raise Refused("rewards has weights, and so has reward_weights: give one of them")
    _evaluate_often(settings, data)
    if data.eval_data is not None:  # as `eval` does
        settings.values = {"num_generations_eval": 1, "eval_temperature": 0.0, **settings.values}
    with open_folder(settings, run) as folder:
        config = trainer_config(settings, RALConfig)
        if weights is not None:
            config.reward_weights = weights
        if config.needs_teacher and teacher.teacher_model is None:
            raise Refused(
                "teacher_model must be given for distill_logit_coef, distill_attn_coef or "
                "attn_reference=teacher"
            )
        if teacher.teacher_model not in (None, DIGITS):
            check_model_name(teacher.teacher_model)
        rows, eval_rows = training_rows(data, config.seed), evaluation_rows(data)
        model, processor, peft_config = load(
            model_of, _path(model_of.model, "start", data, folder), config.trust_remote_code
        )
        teacher_model: Any = teacher.teacher_model
        if teacher_model is not None:
            path = _path(teacher_model, "teacher", data, folder)
            with refusing(f"cannot load {path}"):
                # Frozen: it loses nothing in the dtype that it was published in.
                teacher_model = load_model(
                    path,
                    dtype=default_dtype(),
                    attn_implementation=model_of.attn_implementation,
                    trust_remote_code=config.trust_remote_code,
                )
        with refusing():
            trainer = RALTrainer(
                model,
                functions,
                config,
                train_dataset=rows,
                eval_dataset=eval_rows,
                processing_class=processor,
                peft_config=peft_config,
                teacher_model=teacher_model,
            )
        return _go(trainer, settings, run, folder)


def sft(settings: Settings) -> int:
    """Supervised fine-tuning on worked answers."""
    from trl import SFTConfig

    from ..sft import sft_trainer

    model_of, data, run = (
        settings.build(config) for config in (ModelSettings, DataSettings, RunSettings)
    )
    _check_named(model_of, data)
    _evaluate_often(settings, data)
    with open_folder(settings, run) as folder:
        config = trainer_config(settings, SFTConfig)
        rows = training_rows(data, config.seed, demonstrations=True)
        eval_rows = evaluation_rows(data, demonstrations=True)
        model, processor, peft_config = load(
            model_of, _path(model_of.model, "start", data, folder), config.trust_remote_code
        )
        with refusing():
            trainer = sft_trainer(
                model, processor, rows, config, peft_config=peft_config, eval_rows=eval_rows
            )
        return _go(trainer, settings, run, folder)


def _evaluate_often(settings: Settings, data: DataSettings) -> None:
    """Evaluate as often as checkpoints are saved, if eval_data is given and nothing else is said.

    Raises:
        Refused: there is nothing to evaluate in.
    """
    strategy = settings.values.get("eval_strategy", "no")
    if data.eval_data is None:
        if strategy != "no":
            raise Refused(f"eval_strategy={strategy} needs eval_data; got none")
        return
    steps = settings.values.get("save_steps", 500)  # transformers' default
    settings.values = {"eval_strategy": "steps", "eval_steps": steps, **settings.values}


def _check_named(model: ModelSettings, data: DataSettings) -> None:
    if model.model is None:
        raise Refused("model must be given: a folder, a name on the Hub, or 'digits'")
    if model.model != DIGITS:
        check_model_name(model.model)
    if model.model == DIGITS and (data.data is None or not data.data.startswith(f"{DIGITS}:")):
        raise Refused(f"model=digits needs data=digits:...; got {data.data!r}")


def _path(name: str, role: str, data: DataSettings, folder: Path) -> str:
    """The place of a model that a setting names; a bundled one is made."""
    return bundled_model(role, str(data.data), data.style, folder) if name == DIGITS else name


def _go(trainer: Any, settings: Settings, run: RunSettings, folder: Path) -> int:
    checkpoint = _checkpoint(run, folder)
    show_progress(trainer, settings.command.name, run.verbose)
    title = f"{settings.command.name}: {folder.name}"
    launcher = "python" if trainer.accelerator.num_processes == 1 else "accelerate launch ..."
    again = shlex.quote(str(folder / CONFIG))
    resume = f"{launcher} -m ral {settings.command.name} --config {again} resume=true"
    drawn = None
    with interruptible(trainer, resume), failing_on_data(folder):
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            if trainer.is_world_process_zero():
                drawn = draw_curves(folder, title)
    with failing_on_data(folder):
        trainer.save_model(str(folder))
        trainer.save_state()
    names = ["model", METRICS, *([CURVES] if drawn else [])]
    say(f"{folder}: {', '.join(names)}")
    return 0


def _checkpoint(run: RunSettings, folder: Path) -> str | bool:
    """The checkpoint to go on from; True for the last one that is complete and undamaged."""
    from ..checkpoints import last_checkpoint, why_incomplete

    if not run.resume:
        return False
    if run.resume is not True:
        reason = why_incomplete(run.resume, contents=False)
        if reason is not None:
            raise Refused(f"resume must be a complete checkpoint; got {run.resume}: {reason}")
        return run.resume
    if last_checkpoint(folder, contents=False) is None:
        say(f"{folder} has no complete checkpoint: training starts from the beginning")
        return False
    return True
