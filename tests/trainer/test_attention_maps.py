"""`attn_map_every`: what it shows, and that training is the same without it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations.integration_utils import WandbCallback

from ral import RALConfig
from ral.attention_maps import TOKENS
from tests.trainer import tiny
from tests.trainer.test_config import BASE
from tests.trainer.test_resuming import SAVING, after, same_weights

PICTURES: dict[str, Any] = {"attn_map_every": 2, "report_to": ["tensorboard"]}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("model"))


def pictures(folder: Path) -> dict[str, list[int]]:
    """Steps of the pictures in tensorboard's files, by name."""
    found: dict[str, list[int]] = {}
    for run in sorted({file.parent for file in folder.rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(run), size_guidance={"images": 0}).Reload()
        for name in events.Tags()["images"]:
            images = events.Images(name)
            assert all(image.width > 700 and image.height > 300 for image in images)
            found.setdefault(name, []).extend(image.step for image in images)
    return found


def test_training_is_the_same_with_pictures(path: Path, tmp_path: Path) -> None:
    """Rows of the evaluation set, at the beginning and every second step."""
    plain = tiny.trainer(path, tmp_path / "plain", max_steps=3)
    plain.train()
    drawn = tiny.trainer(
        path, tmp_path / "drawn", max_steps=3, **PICTURES, eval_dataset=tiny.dataset(3, images=2)
    )
    drawn.train()
    assert after(drawn, 0) == after(plain, 0)
    assert same_weights(drawn, plain)
    assert drawn.model.training
    steps = [0, 2]
    assert pictures(tmp_path / "drawn") == {"attn_map/row_0": steps, "attn_map/row_1": steps}


@pytest.mark.slow(stands_in="test_training_is_the_same_with_pictures")
def test_a_resumed_run_has_each_picture_once(path: Path, tmp_path: Path) -> None:
    config = {**SAVING, **PICTURES, "attn_map_rows": 1, "max_steps": 6}
    straight = tiny.trainer(path, tmp_path, **config)
    straight.train()
    other = tiny.trainer(path, tmp_path, output_dir=str(tmp_path / "resumed"), **config)
    other.train(resume_from_checkpoint=tmp_path / "out" / "checkpoint-4")
    assert after(other, 4) == after(straight, 4)
    assert same_weights(straight, other)
    assert pictures(tmp_path / "out") == {"attn_map/row_0": [0, 2, 4, 6]}
    assert pictures(tmp_path / "resumed") == {"attn_map/row_0": [6]}


def test_wandb_gets_the_pictures(path: Path, tmp_path: Path) -> None:
    logged: list[dict[str, Any]] = []
    wandb = SimpleNamespace(Image=lambda pixels: pixels, log=logged.append)

    class Stub(WandbCallback):
        """As transformers' own with wandb, whose run is a list."""

        def __init__(self) -> None:
            self._wandb = wandb

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None: ...
        def on_train_end(self, *args: Any, **kwargs: Any) -> None: ...
        def on_log(self, *args: Any, **kwargs: Any) -> None: ...

    trainer = tiny.trainer(path, tmp_path, max_steps=2, **PICTURES, callbacks=[Stub()])
    trainer.train()
    assert [
        (set(entry) - {"train/global_step"}, entry["train/global_step"]) for entry in logged
    ] == [({f"attn_map/row_{row}"}, step) for step in (0, 2) for row in (0, 1)]
    first, last = (logged[place]["attn_map/row_0"] for place in (0, 2))
    assert first.dtype == np.uint8 and first.shape[2] == 3
    assert first.shape != last.shape or (first != last).any()  # the policy has moved


def test_the_map_is_that_of_the_term(path: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Its layers, rows and exclusion; no longer than a response, and without a placeholder."""
    seen: list[dict[str, Any]] = []

    def attention_map(model: Any, processor: Any, images: Any, prompt: Any, **options: Any) -> Any:
        seen.append(options)
        return original(model, processor, images, prompt, **options)

    import ral_kernels as rk

    original = rk.attention_map
    monkeypatch.setattr(rk, "attention_map", attention_map, raising=False)
    trainer = tiny.trainer(
        path, tmp_path, max_steps=1, **PICTURES, attn_layers="all", attn_rows="token",
        attn_exclude_self=False, max_completion_length=5, attn_map_rows=1,
    )  # fmt: skip
    trainer.train()
    (options,) = seen
    assert (options["layers"], options["rows"], options["exclude_self"]) == (
        [0, 1],
        "reading",
        False,
    )
    assert options["max_new_tokens"] == 5 < TOKENS
    suppressed = options["generate_options"]["suppress_tokens"]
    assert trainer.model.config.image_token_id in suppressed


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"attn_map_every": 1}, "attn_map_every needs report_to with tensorboard or wandb"),
        ({"attn_map_every": -1}, "attn_map_every must be finite and >= 0; got -1"),
        ({"attn_map_rows": 0}, "attn_map_rows must be >= 1; got 0"),
    ],
)
def test_refused_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="RALConfig: " + message):
        RALConfig(**{**BASE, **settings})


def test_rows_without_images_are_refused(path: Path, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "What is it?"}]}] * 4)
    with pytest.raises(ValueError, match="attn_map_every needs images in the first rows"):
        tiny.trainer(path, tmp_path, **PICTURES, train_dataset=rows)


def test_zero3_is_refused(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ral.attention_maps.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(NotImplementedError, match="is not supported under DeepSpeed ZeRO-3"):
        tiny.trainer(path, tmp_path, **PICTURES)
