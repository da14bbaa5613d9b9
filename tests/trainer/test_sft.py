"""Supervised fine-tuning with images: what has a loss, what is frozen, what can be resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import SFTConfig

from ral.data import load_jsonl, to_sft
from ral.models import freeze_vision, load_model, load_processor
from ral.sft import sft_trainer

from . import cli_case


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli_case.make(tmp_path_factory.mktemp("case"))


def config(out: Path, **options: Any) -> SFTConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(out), "max_length": None, "per_device_train_batch_size": 4,
        "max_steps": 2, "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True,
        "logging_steps": 1,
    }  # fmt: skip
    return SFTConfig(**{**defaults, **options})


def rows(folder: Path, name: str = "rows.jsonl", **options: Any) -> Any:
    return to_sft(load_jsonl(folder / name, **options))


def parts(folder: Path) -> tuple[Any, Any]:
    return load_model(folder / "qwen2_5_vl"), load_processor(folder / "qwen2_5_vl")


@pytest.mark.parametrize("name", ["rows.jsonl", "films.jsonl"])
def test_loss_is_on_the_completion_alone(name: str, folder: Path, tmp_path: Path) -> None:
    model, processor = parts(folder)
    trainer = sft_trainer(model, processor, rows(folder, name), config(tmp_path))
    batch = next(iter(trainer.get_train_dataloader()))
    images = 1 if name == "rows.jsonl" else 4
    assert batch["image_grid_thw"].shape[0] == 4 * images
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        learnt = processor.tokenizer.decode(ids[labels != -100])
        assert learnt.startswith("<think>I look at it.</think>\n<answer>")
        # It learns to stop, and the prompt ends where a response begins.
        assert "</answer>" in learnt and learnt.rstrip().endswith("<|im_end|>")
        before = processor.tokenizer.decode(ids[: int((labels != -100).int().argmax())])
        assert before.endswith("assistant\n")
        assert (ids == model.config.image_token_id).sum() > 0
        assert (labels == model.config.image_token_id).sum() == 0


def test_it_learns_with_vision_frozen(folder: Path, tmp_path: Path) -> None:
    model, processor = parts(folder)
    frozen = freeze_vision(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = sft_trainer(model, processor, rows(folder), config(tmp_path, max_steps=8))
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.6 * losses[0]
    changed = {name for name, value in model.state_dict().items() if (value != before[name]).any()}
    assert changed and not any("visual" in name for name in changed)
    assert frozen == sum(value.numel() for name, value in before.items() if "visual" in name)


def test_streaming(folder: Path, tmp_path: Path) -> None:
    model, processor = parts(folder)
    streamed = rows(folder, streaming=True)
    trainer = sft_trainer(model, processor, streamed, config(tmp_path, max_steps=1))
    assert trainer.train().global_step == 1


def test_a_checkpoint_of_qwen_is_loaded_when_resumed(folder: Path, tmp_path: Path) -> None:
    """transformers 5.23's own Trainer finds no weight in it, by name, and starts over."""
    model, processor = parts(folder)
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    sft_trainer(model, processor, rows(folder), config(tmp_path, **options)).train()
    tuned = {name: value.clone() for name, value in model.state_dict().items()}
    fresh, processor = parts(folder)
    trainer = sft_trainer(fresh, processor, rows(folder), config(tmp_path, **options))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, tuned[name]), name


@pytest.mark.parametrize(
    "options, columns, said",
    [
        ({"max_length": 64}, None, "max_length must be None"),
        ({"completion_only_loss": False}, None, "completion_only_loss must be true"),
        ({}, ["prompt", "images"], "rows must have prompt and completion; got rows without comple"),
    ],
)
def test_refused(
    options: dict[str, Any], columns: Any, said: str, folder: Path, tmp_path: Path
) -> None:
    model, processor = parts(folder)
    given = rows(folder)
    if columns is not None:
        given = given.select_columns(columns)
    with pytest.raises(ValueError, match=f"sft_trainer: {said}"):
        sft_trainer(model, processor, given, config(tmp_path, **options))
