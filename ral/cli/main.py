"""Commands, and how each ends."""

from __future__ import annotations

import difflib
import pkgutil
import runpy
import sys
from collections.abc import Sequence

from .errors import FAILED, Refused, complain
from .help import help_text, overview
from .parsing import Command, parse
from .settings import (
    DataSettings,
    DemoSettings,
    EvalSettings,
    ModelSettings,
    RewardSettings,
    RunSettings,
    TeacherSettings,
    TermSettings,
)

ATTENTION_MAP = "attention-map"
_OTHERS = {ATTENTION_MAP: "draw where a model looks as it answers"}
_RL = (
    ModelSettings, TeacherSettings, TermSettings, DataSettings, RewardSettings, RunSettings,
)  # fmt: skip
_SCHEDULE = (
    "output_dir", "learning_rate", "lr_scheduler_type", "max_grad_norm", "max_steps",
    "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
    "gradient_checkpointing", "bf16", "seed", "save_steps", "save_total_limit", "logging_steps",
    "report_to", "eval_strategy", "eval_steps", "load_best_model_at_end", "metric_for_best_model",
)  # fmt: skip
_ROLLOUTS = (
    "num_generations", "num_iterations", "steps_per_generation", "max_completion_length",
    "temperature", "beta", "epsilon", "loss_type", "use_vllm", "vllm_mode",
)  # fmt: skip


COMMANDS = (
    Command(
        "demo",
        "a first picture of attention, in seconds",
        "Ask the bundled model which digit is in a tile of some frames, and draw where it looks "
        "as it answers. It needs no network and no GPU.",
        (DemoSettings,),
        "ral.cli.demo:demo",
    ),
    Command(
        "sft",
        "supervised fine-tuning on worked answers",
        "Supervised fine-tuning on worked think-and-answer responses, the stage before RL: loss on "
        "responses alone.",
        (ModelSettings, DataSettings, RunSettings),
        "ral.cli.train:sft",
        "ral.sft:SFTConfig",
        {"logging_steps": 1.0, "max_length": None},
        _SCHEDULE,
    ),
    Command(
        "train",
        "GRPO with Reinforced Attention Learning",
        "GRPO + attn_coef · RAL, eq. (3) of arXiv 2602.04884. A schedule under which the attention "
        "term is identically zero is refused.",
        _RL,
        "ral.cli.train:train",
        "ral.config:RALConfig",
        {"logging_steps": 1.0, "num_iterations": 2},
        (*_ROLLOUTS, *_SCHEDULE),
    ),
    Command(
        "distill",
        "On-Policy Attention Distillation from a teacher",
        "GRPO + distill_logit_coef · GKD + distill_attn_coef · attention divergence from a "
        "teacher, on the student's own rollouts: eq. (4) of arXiv 2602.04884.",
        _RL,
        "ral.cli.train:train",
        "ral.config:RALConfig",
        {
            "logging_steps": 1.0, "attn_coef": 0.0, "distill_logit_coef": 1.0,
            "distill_attn_coef": 0.5, "attn_warn_divergence": 1.0,
        },
        (*_ROLLOUTS, *_SCHEDULE),
    ),
    Command(
        "eval",
        "accuracy over frames and resolution",
        "Accuracy of greedy answers over numbers of frames and resolutions, as a table, as JSON, "
        "and as a picture.",
        (EvalSettings,),
        "ral.cli.evaluate:evaluate",
    ),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: of the command line, default `sys.argv[1:]`.

    Returns:
        The exit status: 0; 2 with a sentence on stderr for an error that the user can fix;
        130 for a run that Ctrl-C or SIGTERM has ended, whose checkpoint it names.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview(COMMANDS, _OTHERS))
        return 0 if words else FAILED
    if words[0] == ATTENTION_MAP:
        return _ral_kernels(words)
    try:
        return _run(words[0], words[1:])
    except Refused as error:
        if "verbose=true" in words or "--verbose" in words:
            raise
        complain(error)
        return FAILED


def _ral_kernels(words: list[str]) -> int:
    """Run `python -m ral_kernels` with these words in this process; its exit status."""
    before, sys.argv = sys.argv, ["ral_kernels", *words]
    try:
        runpy.run_module("ral_kernels", run_name="__main__")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.argv = before
    return 0


def _run(name: str, words: list[str]) -> int:
    command = next((command for command in COMMANDS if command.name == name), None)
    if command is None:
        known = [*(command.name for command in COMMANDS), ATTENTION_MAP]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise Refused(f"there is no command {name!r}; {hint}")
    try:
        settings = parse(command, words)
    except ImportError as error:
        raise Refused(str(error)) from error
    if settings.switches & {"help", "help_all"}:
        print(help_text(command, "help_all" in settings.switches))
        return 0
    if "print_config" in settings.switches:
        print(settings.as_yaml(), end="")
        return 0
    if not settings.values.get("verbose", False):
        _be_quiet()
    threads = settings.values.get("threads")
    if threads is not None and threads >= 1:  # the command refuses others
        import torch

        torch.set_num_threads(threads)
    return int(pkgutil.resolve_name(command.function)(settings))


def _be_quiet() -> None:
    """Without bars of files being written, and without notes to TRL's and transformers' authors."""
    import warnings

    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    for module in ("transformers", "trl", "torch"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
