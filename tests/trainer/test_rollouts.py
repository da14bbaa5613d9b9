"""Rollouts without media tokens, and vLLM's from the prompts that the trainer trains on."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import torch
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from ral import RALTrainer
from ral.models import limit_pixels
from ral.rollouts import RolloutError, UnexpandedPrompts, agreement, forget_images, media_tokens
from tests.integrations import tiny_checkpoint, tiny_processors
from tests.trainer import fake_vllm, tiny


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("model"))


QWEN = {"<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"}
# Placeholders of an image or a video, and what a family has around them.
MEDIA = {
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    "gemma3": {"<image_soft_token>", "<boi>", "<eoi>"},
    "internvl": {"<ctx>", "<img>", "</img>"},
    "llava_onevision": {"<image>", "<video>"},
}


@pytest.mark.parametrize("family", MEDIA)
def test_media_tokens_of_a_family(family: str) -> None:
    processor = tiny_processors.build(family)
    config = tiny_processors.model_for(family, processor).config
    if family == "gemma3":
        ids = processor.tokenizer.convert_tokens_to_ids
        config.boi_token_index, config.eoi_token_index = ids("<boi>"), ids("<eoi>")
    elif family.startswith("qwen"):
        config.vision_end_token_id = processor.tokenizer.convert_tokens_to_ids("<|vision_end|>")
    found = {
        processor.tokenizer.convert_ids_to_tokens(token)
        for token in media_tokens(config, processor)
    }
    assert found == MEDIA[family]


@pytest.mark.slow(stands_in="test_media_tokens_of_a_family")
def test_media_tokens_of_every_family() -> None:
    """That transformers has: its placeholders are found, and no token that text needs."""
    families = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    checked = 0
    for family in families:
        try:
            config = AutoConfig.for_model(family)
        except ImportError:  # a backbone of timm
            continue
        found = media_tokens(config, object())
        for name in ("image_token_id", "video_token_id", "audio_token_id"):
            placeholder = getattr(config, name, None)
            if isinstance(placeholder, int):
                checked += 1
                assert placeholder in found, (family, name)
        text = config.get_text_config()
        ends = {getattr(text, name, None) for name in ("eos_token_id", "pad_token_id")}
        assert not found & {end for end in ends if isinstance(end, int)}, family
    assert checked > 80


def boost(model: Any, tokens: set[int]) -> None:
    """Let a model want nothing but these tokens, as it generates."""

    def add(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        bias = torch.zeros(logits.shape[-1])
        bias[list(tokens)] = 50.0
        return logits + bias

    model.lm_head.register_forward_hook(add)


@pytest.mark.parametrize("use_vllm", [False, True])
def test_no_response_holds_a_media_token(
    use_vllm: bool, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose forward would fail: Image features and image tokens do not match."""
    written: list[torch.Tensor] = []

    class Look(RALTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            written.append(output["completion_ids"])
            return output

    fake_vllm.install(monkeypatch)
    # As a user's own settings: they add to what is kept out.
    own = {"logit_bias": {100: -100.0}} if use_vllm else {"suppress_tokens": [100]}
    trainer = tiny.trainer(
        path, tmp_path, trainer_class=Look, max_steps=1, use_vllm=use_vllm,
        vllm_mode="colocate", generation_kwargs=own, vllm_min_ratio=0.0,
    )  # fmt: skip
    ids = trainer._tokenizer.convert_tokens_to_ids
    tokens = {ids(token) for token in QWEN}
    boost(trainer.vllm_generation.llm.model if use_vllm else trainer.model, {*tokens, 100})
    trainer.train()
    assert trainer.state.global_step == 1
    assert not torch.isin(written[0], torch.tensor([*tokens, 100])).any()


def test_vllm_reads_the_prompts_that_are_trained_on(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_vllm.install(monkeypatch)
    prompts = []

    class Look(RALTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            prompts.extend(output["prompt_mask"].sum(1).tolist())
            return output

    trainer = tiny.trainer(
        path, tmp_path, trainer_class=Look, train_dataset=tiny.dataset(images=2),
        use_vllm=True, vllm_mode="colocate", max_steps=5,
    )  # fmt: skip
    trainer.train()
    engine = trainer.vllm_generation.llm
    assert engine.lengths == prompts and len(prompts) == 16
    # What the last vision tower made of the images goes with its weights.
    assert engine.events == ["weights", "images forgotten", "prompts"] * 2
    # The second batch with the weights of the fourth step. The rest is the mass of media tokens.
    differences = tiny.logged(trainer, "sampling/sampling_logp_difference/mean")
    assert len(differences) == 2 and max(differences) < 0.015


def test_training_stops_where_vllm_reads_images_in_another_size(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads the processor of the model's folder, which may have other limits."""
    fake_vllm.install(monkeypatch)
    trainer = tiny.trainer(path, tmp_path, use_vllm=True, vllm_mode="colocate", max_steps=1)
    limit_pixels(trainer.processing_class, max_pixels=2 * 28 * 28)
    with pytest.raises(RolloutError, match="got 6 image tokens from vLLM and 1 from the trainer's"):
        trainer.train()


def test_training_stops_where_vllm_samples_from_another_distribution(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has other weights here, and the weights of the trainer do not reach it."""
    fake_vllm.install(monkeypatch)
    trainer = tiny.trainer(path, tmp_path, use_vllm=True, vllm_mode="colocate", max_steps=1)
    engine = trainer.vllm_generation.llm
    monkeypatch.setattr(engine, "load_weights", lambda weights: None)
    with torch.no_grad():
        engine.model.lm_head.weight.copy_(engine.model.lm_head.weight.flip(0))
    with pytest.raises(
        RolloutError, match=r"mean importance ratio of 0\.\d+, below vllm_min_ratio"
    ):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.slow(stands_in="test_training_stops_where_vllm_reads_images_in_another_size")
def test_trl_alone_has_vllm_expand_placeholders_again(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_vllm.install(monkeypatch)
    trainer = tiny.trainer(path, tmp_path, use_vllm=True, vllm_mode="colocate", max_steps=1)
    given: list[int] = []

    def of(ids: list[int]) -> list[int]:
        given.append(len(ids))
        return ids

    monkeypatch.setattr(trainer._unexpanded, "of", of)
    with pytest.raises(RolloutError, match="got 11 image tokens from vLLM and 6 from the trainer"):
        trainer.train()
    # A picture of 2 x 3 tokens has 5 placeholders more.
    assert trainer.vllm_generation.llm.lengths == [length + 5 for length in given]


@pytest.mark.parametrize("family", ["gemma3", "internvl", "llava_onevision", "qwen2_5_vl"])
def test_unexpanded_prompts_of_a_family(family: str) -> None:
    """Gemma 3 and InternVL put more around an image than its placeholders."""
    processor = tiny_processors.build(family)
    mark = tiny_processors.PLACEHOLDER[family]
    template = tiny_checkpoint.CHAT_TEMPLATE.replace(
        "<|vision_start|><|image_pad|><|vision_end|>", mark
    )
    processor.chat_template = processor.tokenizer.chat_template = template
    picture = tiny.dataset(1)[0]["images"][0]
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "one cat"}]
    prompts = [[{"role": "user", "content": [*parts, *parts]}]]
    trainer = SimpleNamespace(
        processing_class=processor, _tokenizer=processor.tokenizer, tools=None, chat_template=None,
        chat_template_kwargs={}, environment_factories=None,
    )  # fmt: skip
    expanded = processor.apply_chat_template(
        prompts, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"][0]
    unexpanded = UnexpandedPrompts(trainer)
    unexpanded.remember(prompts, [expanded])
    # A turn with a tool adds a picture of three tokens.
    added = [40, *[processor.image_token_id] * 3, 41]
    found = unexpanded.of(expanded + added)
    text = f"<|im_start|>user\n{mark}one cat{mark}one cat<|im_end|>\n<|im_start|>assistant\n"
    assert found == [*processor.tokenizer(text)["input_ids"], 40, processor.image_token_id, 41]
    assert len(expanded) > len(found)


def test_agreement_is_one_minus_the_total_variation() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(2, 50).softmax(1)
    drawn = torch.multinomial(q, 1 << 16, replacement=True)
    ours, theirs = p.log()[drawn][None], q.log()[drawn][None]
    theirs[0, 0] = float("nan")
    value = agreement(ours, theirs, torch.ones_like(drawn)[None])
    assert value == pytest.approx(1 - (p - q).abs().sum().item() / 2, abs=0.01)


def test_a_server_forgets_images_after_new_weights() -> None:
    """TRL's client speaks to a server that only notes what it is asked for."""
    asked: list[str] = []

    class Notes(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "0")  # as vLLM answers this request
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Notes) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = SimpleNamespace(
            session=requests.Session(), base_url=f"http://127.0.0.1:{server.server_port}"
        )
        engine = SimpleNamespace(
            mode="server", vllm_client=client, sync_weights=lambda: asked.append("weights")
        )
        trainers = [
            SimpleNamespace(
                vllm_generation=SimpleNamespace(**vars(engine)),
                accelerator=SimpleNamespace(is_main_process=main),
            )
            for main in (True, False)
        ]
        for trainer in trainers:
            forget_images(trainer)
            trainer.vllm_generation.sync_weights()
        server.shutdown()
    # One process of them asks.
    assert asked == ["weights", "/reset_encoder_cache", "weights"]
