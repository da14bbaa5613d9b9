"""An engine in vLLM's place, for TRL's colocated generation on a machine without vLLM.

    fake_vllm.install(monkeypatch)
    trainer = tiny.trainer(path, tmp_path, use_vllm=True, vllm_mode="colocate")
    engine = trainer.vllm_generation.llm

It does to prompts what vLLM 0.31 does: in a prompt of token ids it replaces the first placeholder
of each image by as many as the image has tokens, and leaves what else is there. It samples with
`logit_bias` and temperature, and returns the probabilities that it sampled from.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, GenerationConfig
from trl.generation import vllm_generation

from ral_kernels.integrations.transformers import load_processor


class LLM:
    """vLLM's class, as far as TRL uses it, for Qwen-VL.

    Attributes:
        lengths: of the prompts as the model read them, in order.
        events: "weights", "images forgotten" and "prompts", without repetitions.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self.model: Any = AutoModelForImageTextToText.from_pretrained(model).eval()
        self.model.generation_config.suppress_tokens = None  # vLLM does not read it
        self._processor = load_processor(Path(model))
        self._pad = self.model.config.image_token_id
        self.lengths: list[int] = []
        self.events: list[str] = []
        # From here TRL reaches for the weights and the longest prompt.
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=self))
        self.llm_engine = SimpleNamespace(
            model_executor=SimpleNamespace(driver_worker=runner),
            model_config=SimpleNamespace(max_model_len=4096),
            reset_encoder_cache=lambda: self._note("images forgotten"),
        )

    def _note(self, event: str) -> None:
        if self.events[-1:] != [event]:
            self.events.append(event)

    def load_weights(self, weights: Any) -> None:
        self._note("weights")
        with torch.no_grad():
            for name, value in weights:
                self.model.get_parameter(name).copy_(value)

    def reset_prefix_cache(self) -> None:
        pass

    def generate(self, prompts: list[Any], sampling_params: Any, use_tqdm: bool) -> list[Any]:
        self._note("prompts")
        return [self._answer(prompt, sampling_params) for prompt in prompts]

    def _answer(self, prompt: dict[str, Any], sampling: Any) -> Any:
        ids, fields, counts = list(prompt["prompt_token_ids"]), {}, []
        if "multi_modal_data" in prompt:
            images = prompt["multi_modal_data"]["image"]
            images = images if isinstance(images, list) else [images]
            fields = dict(self._processor.image_processor(images, return_tensors="pt"))
            counts = (fields["image_grid_thw"].prod(1) // 4).tolist()
            ids = self._expand(ids, counts)
        self.lengths.append(len(ids))
        given = torch.tensor([self._words(ids, sum(counts))])
        fields["mm_token_type_ids"] = (given == self._pad).int()
        made = self.model.generate(
            given, **fields, return_dict_in_generate=True, output_scores=True,
            generation_config=GenerationConfig(
                do_sample=True, temperature=sampling.temperature, top_k=0,
                max_new_tokens=sampling.max_tokens,
                eos_token_id=self.model.generation_config.eos_token_id, pad_token_id=0,
                sequence_bias={
                    (int(token),): bias for token, bias in (sampling.logit_bias or {}).items()
                } or None,
            ),
        )  # fmt: skip
        written = made.sequences[0, given.shape[1] :].tolist()
        logprobs = [
            {token: SimpleNamespace(rank=1, logprob=scores[0].log_softmax(0)[token].item())}
            for token, scores in zip(written, made.scores, strict=True)
        ]
        output = SimpleNamespace(token_ids=written, logprobs=logprobs)
        return SimpleNamespace(prompt_token_ids=ids, outputs=[output])

    def _expand(self, ids: list[int], counts: list[int]) -> list[int]:
        start = 0
        for count in counts:
            start = ids.index(self._pad, start)
            ids[start : start + 1] = [self._pad] * count
            start += count
        return ids

    def _words(self, ids: list[int], images: int) -> list[int]:
        """Placeholders after those of the images as words: our model would look for an image."""
        word = self._processor.tokenizer.convert_tokens_to_ids("?")
        first = [index for index, token in enumerate(ids) if token == self._pad][:images]
        return [
            word if token == self._pad and index not in first else token
            for index, token in enumerate(ids)
        ]


class SamplingParams(SimpleNamespace):
    logit_bias: Any = None


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let TRL find this engine; it sets a launcher's variables, which are restored."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
        monkeypatch.delenv(name)
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "LLM", LLM, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SamplingParams, raising=False)
