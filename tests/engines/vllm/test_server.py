"""Rollouts of vLLM's own server, by TRL's client; only NCCL is missing (`server.without_nccl`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ral.models import limit_pixels
from ral.rollouts import RolloutError
from tests.engines.vllm import models, runs, server

# Four prompts in batches of two: the pictures come again in the second epoch.
PICTURES = [1, 2, 0, 3]
MEDIA = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(tmp_path_factory.mktemp("models"), "qwen2_5_vl")


@pytest.fixture(scope="module")
def url(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server.serving(path, tmp_path_factory.mktemp("server") / "log.txt") as found:
        yield found


@pytest.fixture
def settings(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    server.without_nccl(monkeypatch, tmp_path)
    return {
        "vllm_mode": "server", "vllm_server_base_url": url,
        "train_dataset": models.dataset(PICTURES), "max_steps": 2,
    }  # fmt: skip


def test_rollouts_come_from_the_trained_weights(
    path: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    trainer = runs.trainer(path, tmp_path, **{**settings, "max_steps": 8})
    first = trainer.weights()
    trainer.train()
    assert len(trainer.batches) == 4
    assert min(trainer.agreement_of(batch) for batch in range(4)) > 0.97
    assert max(trainer.agreement_with(batch, first) for batch in (1, 2, 3)) < 0.9
    # One request a prompt, four answers each.
    for batch in trainer.batches:
        assert len(batch["completion_ids"].unique(dim=0)) == 8
        assert len(batch["prompt_ids"].unique(dim=0)) == 2


def test_no_response_holds_a_media_token(
    path: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    vocabulary = runs.trainer(path, tmp_path, **settings)._tokenizer
    tokens = vocabulary.convert_tokens_to_ids(list(MEDIA))
    trainer = runs.trainer(
        path, tmp_path, **settings, vllm_min_ratio=0.0,
        generation_kwargs={"logit_bias": dict.fromkeys([*tokens, 100], 100.0)},
    )  # fmt: skip
    trainer.train()
    [batch] = trainer.batches
    assert (batch["completion_ids"] == 100).all()


def test_training_stops_where_the_server_reads_images_in_another_size(
    path: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    trainer = runs.trainer(path, tmp_path, **{**settings, "train_dataset": models.dataset([1] * 4)})
    limit_pixels(trainer.processing_class, max_pixels=2 * 28 * 28)
    with pytest.raises(
        RolloutError, match=r"got (6|16) image tokens from vLLM and 1 from the trainer's"
    ):
        trainer.train()
    assert trainer.state.global_step == 0
