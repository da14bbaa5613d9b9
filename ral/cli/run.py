"""What sft, train and distill share: the folder of a run, its trainer, its end."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from ..lock import locked
from ..models import freeze_vision, has_bfloat16, load_model, load_processor, lora_config
from ..processes import check_world_size
from .errors import Refused, is_first_process, refusing
from .hub import check_model_name
from .parsing import Settings
from .settings import ModelSettings, RunSettings

CONFIG = "config.yaml"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


@contextmanager
def open_folder(settings: Settings, run: RunSettings) -> Iterator[Path]:
    """The folder of the run, with the settings in it, locked against other runs.

    Raises:
        Refused: another run is in it, or it cannot be written.
    """
    default = f"runs/{settings.preset or settings.command.name}"
    folder = Path(settings.values.get("output_dir") or default).expanduser()
    used = any((folder / name).exists() for name in _WEIGHTS) or any(folder.glob("checkpoint-*"))
    if used and not run.resume:
        raise Refused(
            f"output_dir {folder} holds a run: add resume=true to go on with it, or name another "
            "output_dir"
        )
    settings.values["output_dir"] = str(folder)
    with ExitStack() as stack:
        if is_first_process():
            with refusing(f"output_dir {folder}"):
                stack.enter_context(locked(folder))
                (folder / CONFIG).write_text(settings.as_yaml(), "utf-8")
        yield folder


def trainer_config(settings: Settings, config: type) -> Any:
    """TRL's configuration object, with what depends on the machine filled in.

    Raises:
        Refused: a value that it does not take, or that this machine does not have.
    """
    values = settings.of(config)
    if values.get("bf16") and not values.get("use_cpu") and not has_bfloat16():
        raise Refused("bf16 needs a GPU that has bfloat16; got none: set bf16=false")
    if values.get("fp16"):
        values.setdefault("bf16", False)
    values.setdefault("bf16", has_bfloat16() and not values.get("use_cpu", False))
    values.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    if "report_to" not in values:
        found = importlib.util.find_spec("tensorboard") is not None
        values["report_to"] = ["tensorboard"] if found else []
    _check_reports(values["report_to"])
    with refusing():
        try:
            made = config(**values)
        except TypeError as error:
            raise Refused(f"{settings.command.name}: {error}") from error
        check_world_size(made)
        return made


def _check_reports(names: Any) -> None:
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    known = get_available_reporting_integrations()
    for name in [names] if isinstance(names, str) else names or []:
        if name not in ("none", "all") and name not in known:
            raise Refused(
                f"report_to must name what is installed ({', '.join(known) or 'nothing'}); "
                f"got {name!r}"
            )


def load(settings: ModelSettings, name: str, trust_remote_code: bool) -> tuple[Any, Any, Any]:
    """Model, processor, and the configuration of LoRA if it is on.

    Args:
        settings: how.
        name: a folder, or a name on the Hub.
        trust_remote_code: whether Python code beside the weights may run.

    Raises:
        Refused: they cannot be had as they are asked for.
    """
    check_model_name(name)
    lora = settings.lora_rank > 0
    # Weights that are trained are float32: in bfloat16 an update of 1e-6 rounds to nothing. Those
    # below LoRA's adapters do not move.
    dtype = settings.dtype or ("bfloat16" if lora and has_bfloat16() else "float32")
    with refusing(f"cannot load {name}"):
        processor = load_processor(
            name,
            min_pixels=settings.min_pixels,
            max_pixels=settings.max_pixels,
            trust_remote_code=trust_remote_code,
        )
        model = load_model(
            name,
            dtype=dtype,
            attn_implementation=settings.attn_implementation,
            trust_remote_code=trust_remote_code,
        )
    peft_config = None
    if hasattr(model, "peft_config"):
        if lora:
            raise Refused(f"lora_rank must be 0 for {name}, which has adapters; got a rank")
        return model, processor, None
    with refusing():
        if lora:
            peft_config = lora_config(
                model,
                rank=settings.lora_rank,
                targets=settings.lora_targets,
                alpha=settings.lora_alpha,
                dropout=settings.lora_dropout,
                vision=not settings.freeze_vision,
            )
        elif settings.freeze_vision:
            freeze_vision(model)
    return model, processor, peft_config


def say(text: str) -> None:
    """A line for the person at the shell, from the first process."""
    if is_first_process():
        print(text, file=sys.stderr, flush=True)
