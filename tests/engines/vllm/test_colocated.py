"""Rollouts of real vLLM in the trainer's process: the prompts, the weights and what is sampled.

A rollout batch agrees with a model to the share 1 - TV, the total variation distance between what
vLLM sampled from and the model. vLLM computes in bfloat16 here and the trainer in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ral.rollouts import RolloutError
from tests.engines.vllm import models, runs
from tests.trainer import tiny

pytestmark = pytest.mark.usefixtures("one_engine")

# Several pictures a prompt, of several sizes, and prompts without any beside them.
PICTURES = [1, 2, 0, 3, 1, 0, 2, 1]
MEDIA = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("family", models.FAMILIES)
def test_rollouts_come_from_the_trained_weights(family: str, folder: Path, tmp_path: Path) -> None:
    path = models.save(folder, family)
    data = models.text_dataset(8) if family == "qwen2" else models.dataset(PICTURES)
    trainer = runs.trainer(path, tmp_path, train_dataset=data, max_steps=8)
    first = trainer.weights()
    trainer.train()
    assert trainer.state.global_step == 8 and len(trainer.batches) == 4
    of_its_own = [trainer.agreement_of(batch) for batch in range(4)]
    with_the_first = [trainer.agreement_with(batch, first) for batch in range(4)]
    assert min(of_its_own) > 0.97
    assert with_the_first[0] == of_its_own[0] and max(with_the_first[1:]) < 0.9
    assert min(tiny.logged(trainer, "sampling/importance_sampling_ratio/mean")) > 0.97
    # Four rollouts a prompt: each is its own sample.
    for batch in trainer.batches:
        assert len(batch["completion_ids"].unique(dim=0)) == 8
        assert len(batch["prompt_ids"].unique(dim=0)) == 2


def test_vllm_reads_the_prompts_that_are_trained_on(folder: Path, tmp_path: Path) -> None:
    """And it is given one placeholder a picture, however large the picture is."""
    path = models.save(folder, "qwen2_5_vl")
    trainer = runs.trainer(
        path, tmp_path, train_dataset=models.dataset(PICTURES), max_steps=2,
        per_device_train_batch_size=32,
    )  # fmt: skip
    generate = trainer.vllm_generation.llm.generate
    given: list[list[int]] = []
    read: list[list[int]] = []

    def look(prompts: Any, **options: Any) -> Any:
        outputs = generate(prompts, **options)
        given.extend(prompt["prompt_token_ids"] for prompt in prompts)
        read.extend(output.prompt_token_ids for output in outputs)
        return outputs

    trainer.vllm_generation.llm.generate = look
    try:
        trainer.train()
    finally:
        trainer.vllm_generation.llm.generate = generate
    processor: Any = trainer.processing_class
    pad = processor.image_token_id
    [batch] = trainer.batches
    trained = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    ]
    assert read == trained
    assert sorted(ids.count(pad) for ids in given) == sorted(PICTURES * 4)
    assert {ids.count(pad) for ids in read} == {0, 6, 22, 28}


def test_training_stops_where_vllm_expands_placeholders_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once by the number of image tokens, and once, without that check, by the probabilities."""
    path = models.save(folder, "qwen2_5_vl")
    trainer = runs.trainer(path, tmp_path, train_dataset=models.dataset([1] * 8), max_steps=2)
    monkeypatch.setattr(trainer._unexpanded, "of", lambda ids: ids)
    with pytest.raises(
        RolloutError, match=r"got \d+ image tokens from vLLM and \d+ from the trainer's processor"
    ):
        trainer.train()
    assert trainer.state.global_step == 0
    trainer = runs.trainer(path, tmp_path, train_dataset=models.dataset([1] * 8), max_steps=2)
    monkeypatch.delattr(trainer.vllm_generation, "generate")  # TRL's own is the class's
    with pytest.raises(
        RolloutError, match=r"mean importance ratio of 0\.\d+, below vllm_min_ratio=0\.9"
    ):
        trainer.train()
    assert trainer.state.global_step == 0


def test_vllm_encodes_images_anew_with_new_weights(folder: Path, tmp_path: Path) -> None:
    """The vision tower is trained, and the same two pictures come in every batch."""
    path = models.save(folder, "qwen2_5_vl")
    trainer = runs.trainer(path, tmp_path, train_dataset=models.dataset([1, 1]), max_steps=8)
    trainer.train()
    assert len({*map(tuple, trainer.batches[0]["prompt_ids"].tolist())}) == 2
    assert min(trainer.agreement_of(batch) for batch in range(4)) > 0.97


def test_no_response_holds_a_media_token(folder: Path, tmp_path: Path) -> None:
    """Not even where a user's own bias asks for nothing else."""
    path = models.save(folder, "qwen2_5_vl")
    vocabulary = runs.trainer(path, tmp_path, max_steps=2)._tokenizer
    tokens = vocabulary.convert_tokens_to_ids(list(MEDIA))
    trainer = runs.trainer(
        path, tmp_path, train_dataset=models.dataset([1] * 8), max_steps=2,
        generation_kwargs={"logit_bias": dict.fromkeys([*tokens, 100], 100.0)},
        vllm_min_ratio=0.0,
    )  # fmt: skip
    trainer.train()
    [batch] = trainer.batches
    assert (batch["completion_ids"] == 100).all()


def test_resumed_rollouts_come_from_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    path = models.save(folder, "qwen2_5_vl")
    settings: dict[str, Any] = {
        "train_dataset": models.dataset(PICTURES), "save_strategy": "steps", "save_steps": 4,
    }  # fmt: skip
    first = runs.trainer(path, tmp_path, max_steps=4, **settings)
    start = first.weights()
    first.train()
    resumed = runs.trainer(path, tmp_path, max_steps=8, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8 and len(resumed.batches) == 2
    assert resumed.agreement_with(0, first.weights()) > 0.97
    assert resumed.agreement_with(0, start) < 0.9


def test_rollouts_come_from_merged_adapters(folder: Path, tmp_path: Path) -> None:
    path = models.save(folder, "qwen2_5_vl")
    trainer = runs.trainer(
        path, tmp_path, train_dataset=models.dataset(PICTURES), max_steps=8,
        peft_config=tiny.lora(), learning_rate=5e-2,
    )  # fmt: skip
    first = trainer.weights()
    trainer.train()
    assert min(trainer.agreement_of(batch) for batch in range(4)) > 0.97
    assert trainer.agreement_with(3, first) < 0.9
    assert torch.isfinite(torch.tensor(tiny.logged(trainer, "attn/divergence"))).all()
