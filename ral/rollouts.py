"""Rollouts: tokens that no response may hold, and prompts as vLLM wants them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Fields of configurations and processors that name tokens of images, videos and audio: what stands
# for them in a prompt, and what stands around that.
_MEDIA = re.compile(
    r"(image|img|video|vision|visual|frame|audio)\w*(token|patch|col)_(id|index)s?$"
    r"|bo[ia]_token|eo[ia]_token"
)
_NEVER = -100.0  # vLLM's lowest bias


class RolloutError(RuntimeError):
    """The engine that wrote the rollouts disagrees with the trainer's model."""


@contextmanager
def randomness_kept(device: torch.device) -> Iterator[None]:
    """Leave all random states as they were: datasets, rewards and attention may use any."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def media_tokens(model_config: Any, processor: Any) -> set[int]:
    """Ids of the tokens that mark images, videos and audio in a prompt.

    A response that holds one breaks the next forward: the model looks for an image that belongs to
    it, or for the image that a start announces.

    Args:
        model_config: of transformers, with its parts.
        processor: a processor or a tokenizer.
    """
    found: set[int] = set()
    given = (getattr(processor, "__dict__", {}), _properties(processor))
    for fields in (*_configs(model_config.to_dict()), *given):
        for name, value in fields.items():
            if _MEDIA.search(str(name)):
                ids = value if isinstance(value, list | tuple | set) else [value]
                found.update(each for each in ids if isinstance(each, int) and each >= 0)
    return found


def _configs(fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield fields
    for value in fields.values():
        if isinstance(value, dict):
            yield from _configs(value)


def _properties(processor: Any) -> dict[str, Any]:
    names = ("image_token_ids", "video_token_ids", "audio_token_ids")
    return {name: getattr(processor, name, None) for name in names}


def kept_out(trainer: Any) -> set[int]:
    """The media tokens that a GRPO trainer's model could write.

    Args:
        trainer: TRL's, made.
    """
    config = trainer.accelerator.unwrap_model(trainer.model).config
    tokens = media_tokens(config, trainer.processing_class) - set(trainer.eos_token_ids)
    return {token for token in tokens if token < config.get_text_config().vocab_size}


def keep_media_out(trainer: Any) -> None:
    """Keep media tokens out of what a GRPO trainer's generation, or its vLLM, samples.

    Args:
        trainer: TRL's, made.
    """
    tokens = kept_out(trainer)
    if not tokens:
        return
    if trainer.use_vllm:
        given = trainer.vllm_generation.generation_kwargs
        bias = {**(given.get("logit_bias") or {}), **dict.fromkeys(sorted(tokens), _NEVER)}
        trainer.vllm_generation.generation_kwargs = {**given, "logit_bias": bias}
    else:
        suppressed = sorted(tokens.union(trainer.generation_config.suppress_tokens or ()))
        trainer.generation_config.suppress_tokens = suppressed
        trainer.generation_kwargs["suppress_tokens"] = suppressed


def forget_images(trainer: Any) -> None:
    """Let vLLM encode images anew after each change of its weights.

    It keeps what its vision tower made of an image for the next prompt that has the image. TRL has
    it forget keys and values of prompts, and not that (trl#7198).

    Args:
        trainer: TRL's, made, with use_vllm.
    """
    engine = trainer.vllm_generation
    sync_weights = engine.sync_weights

    def sync_and_forget() -> None:
        sync_weights()
        if engine.mode == "colocate":
            engine.llm.llm_engine.reset_encoder_cache()
        elif trainer.accelerator.is_main_process:
            client = engine.vllm_client
            # The answer has no body, which the client's own `_post` would read.
            client.session.post(f"{client.base_url}/reset_encoder_cache").raise_for_status()

    engine.sync_weights = sync_and_forget


class UnexpandedPrompts:
    """Prompts with one placeholder an image, for an engine that expands placeholders itself.

    TRL gives vLLM in the trainer's process the token ids of the processor, in which an image has as
    many placeholders as tokens. vLLM expands the first one again, and the rest stay (trl#6294).
    This class finds, for each prompt of the processor, what the chat template says without it.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._image_token = getattr(trainer.processing_class, "image_token_id", None)
        self._unexpanded: dict[tuple[int, ...], list[int]] = {}

    def remember(self, prompts: Sequence[Any], expanded: Sequence[list[int]]) -> None:
        """Keep the prompts of a rollout batch.

        Args:
            prompts: conversations with images.
            expanded: their token ids from the processor.
        """
        self._unexpanded = {}
        for index, (prompt, ids) in enumerate(zip(prompts, expanded, strict=True)):
            if tuple(ids) not in self._unexpanded:
                self._unexpanded[tuple(ids)] = self._tokenize(prompt, index)

    def _tokenize(self, prompt: Any, index: int) -> list[int]:
        from trl.data_utils import prepare_multimodal_messages

        trainer = self._trainer
        tools = trainer.tools
        if trainer.environment_factories is not None:
            tools = trainer._env_tools[trainer._batch_environments[index]]
        text = trainer.processing_class.apply_chat_template(
            prepare_multimodal_messages(prompt),
            tools=tools or None,
            chat_template=trainer.chat_template,
            add_generation_prompt=True,
            tokenize=False,
            **trainer.chat_template_kwargs,
        )
        tokenizer = trainer._tokenizer
        begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        ids: list[int] = tokenizer(text, add_special_tokens=not begins)["input_ids"]
        return ids

    def around(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """The engine's `generate` for prompts of the processor.

        Raises:
            RolloutError: when called; the engine makes another number of tokens of an image.
        """

        def generate_unexpanded(
            prompts: list[list[int]], images: Any, *args: Any, **kwargs: Any
        ) -> Any:
            if images is None:
                return generate(prompts, images, *args, **kwargs)
            output = generate([self.of(ids) for ids in prompts], images, *args, **kwargs)
            for ids, read in zip(prompts, output[0], strict=True):
                _check_image_tokens(*(list(each).count(self._image_token) for each in (ids, read)))
            return output

        return generate_unexpanded

    def of(self, ids: list[int]) -> list[int]:
        """A prompt for the engine, from the processor's ids and what turns with tools added."""
        for length in sorted({len(prompt) for prompt in self._unexpanded}, reverse=True):
            found = self._unexpanded.get(tuple(ids[:length]))
            if found is not None:
                return found + self._collapse(ids[length:])
        return self._collapse(ids)

    def _collapse(self, ids: list[int]) -> list[int]:
        """One placeholder in place of each run of them."""
        return [
            token
            for index, token in enumerate(ids)
            if token != self._image_token or index == 0 or ids[index - 1] != token
        ]


def check_server_images(trainer: Any) -> None:
    """Stop rollouts of a vLLM server that makes another number of tokens of an image.

    TRL sends it the trainer's ids, which are expanded, and the server's own features of the images,
    which it places at the trainer's placeholders however many these are. Elsewhere than in models
    with a grid, a placeholder of vLLM has other tokens around: there the ratio alone tells.

    Args:
        trainer: TRL's, made, with vllm_mode="server".
    """
    if "image_grid_thw" not in getattr(trainer.processing_class, "model_input_names", ()):
        return
    engine = trainer.vllm_generation
    place = engine._place_features

    def place_and_check(features: Any, prompt_ids: list[int]) -> Any:
        placed = place(features, prompt_ids)
        if placed is not None:
            ranges = (each["mm_placeholders"]["image"] for each in (placed, features))
            _check_image_tokens(*(sum(one["length"] for one in all_of) for all_of in ranges))
        return placed

    engine._place_features = place_and_check


def _check_image_tokens(ours: int, theirs: int) -> None:
    if ours != theirs:
        raise RolloutError(
            "train: vLLM must read the images of a prompt as the trainer does; got "
            f"{theirs} image tokens from vLLM and {ours} from the trainer's processor: "
            "save the processor, with its min_pixels and max_pixels, into the folder "
            "of the model"
        )


def agreement(
    ours: Tensor, theirs: Tensor, mask: Tensor, gather: Any = lambda tensor: tensor
) -> float:
    """E[min(1, p/q)] over tokens that q sampled: 1 minus the total variation distance of p and q.

    Unlike the mean of p/q it lies in [0, 1], and no rare token decides it. Unlike the ratio of
    whole responses it does not fall with their length.

    Args:
        ours: log p of the sampled tokens, [B, T].
        theirs: log q, NaN where the engine has none.
        mask: 1 where a token was sampled, [B, T].
        gather: of the processes; adds nothing to one.
    """
    known = mask.bool() & ~torch.isnan(theirs)
    ratios = torch.where(known, (ours - theirs).float().exp().clamp(max=1), 0.0)
    total, count = gather(torch.stack([ratios.sum(), known.sum()])[None]).sum(0).tolist()
    return float(total / count) if count else 1.0


def check_agreement(value: float, bound: float) -> None:
    """Refuse rollouts of an engine that sampled from other prompts or weights than the trainer's.

    Raises:
        RolloutError: value < bound.
    """
    if value < bound:
        raise RolloutError(
            f"train: vLLM's probabilities of the first rollouts must agree with the model's; got a "
            f"mean importance ratio of {value:.3f}, below vllm_min_ratio={bound:g}: vLLM reads "
            "other prompts or weights, as with a version that TRL does not support"
        )


def samples_the_whole_distribution(trainer: Any) -> bool:
    """Whether the engine's probabilities are the model's, but for temperature and top_p."""
    given: Iterable[Any] = (
        trainer.top_k in (0, -1, None),
        trainer.min_p in (0, None),
        trainer.repetition_penalty == 1,
    )
    return all(given)
