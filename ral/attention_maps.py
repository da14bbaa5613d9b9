"""`attn_map_every`: pictures of where the policy looks in fixed rows, as it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.integration_utils import TensorBoardCallback, WandbCallback

import ral_kernels as rk
from ral_kernels.viz import attention_over_frames

from . import rollouts

TOKENS = 32  # of an answer, at most
NAME = "attn_map/row_{}"


class LogsAttentionMaps(TrainerCallback):
    """Gives tensorboard and wandb a picture of each of `attn_map_rows` rows, now and then.

    At the beginning, and every `attn_map_every` optimizer steps, the policy answers the first rows
    of the evaluation set, or else of the training set: greedily, in at most 32 tokens. A picture
    shows the question, the answer, and the mean attention of its tokens (`rk.attention_map` of
    `attn_layers`). Training is the same bit for bit with and without: no random state moves.

    The main process does it alone while the others wait for its next step. Under FSDP2, where a
    forward gathers weights from all processes, all of them do the same forwards.

    Args:
        trainer: a `RALTrainer`, made.

    Raises:
        NotImplementedError: DeepSpeed's ZeRO-3 or the first version of FSDP shards the weights.
        ValueError: the processor takes no images, or the first rows have none.
    """

    def __init__(self, trainer: Any) -> None:
        plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
        self._together = plugin is not None
        if is_deepspeed_zero3_enabled() or (plugin is not None and plugin.fsdp_version != 2):
            raise NotImplementedError(
                "RALTrainer: attn_map_every is not supported under DeepSpeed ZeRO-3 and FSDP1 "
                "(DDP, ZeRO-1, ZeRO-2 and FSDP2 are): generating alone, a process would wait for "
                "weights of the others"
            )
        self._trainer = trainer
        with rollouts.randomness_kept(trainer.accelerator.device):
            self._rows = list(_first_rows(trainer))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:  # and not in a resumed run, which has this picture
            self._log(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self._trainer.args.attn_map_every == 0:
            self._log(state)

    def _log(self, state: TrainerState) -> None:
        if not (state.is_world_process_zero or self._together):
            return
        model = self._trainer.model
        was_training = model.training
        model.eval()
        try:
            with rollouts.randomness_kept(self._trainer.accelerator.device):
                maps = [self._map(*row) for row in self._rows]
        finally:
            model.train(was_training)
        if state.is_world_process_zero:
            tokenizer = self._trainer._tokenizer
            for number, ((_, prompt), seen) in enumerate(zip(self._rows, maps, strict=True)):
                answer = tokenizer.decode(seen.token_ids, skip_special_tokens=True)
                figure = attention_over_frames(seen, question=_question(prompt), answer=answer)
                self._show(NAME.format(number), _pixels(figure), state.global_step)

    def _map(self, images: list[Any], prompt: Any) -> Any:
        trainer = self._trainer
        return rk.attention_map(
            trainer.accelerator.unwrap_model(trainer.model),
            trainer.processing_class,
            images,
            prompt,
            max_new_tokens=min(TOKENS, trainer.args.max_completion_length or TOKENS),
            layers=trainer._layers,
            rows="writing" if trainer.args.attn_rows == "predicting" else "reading",
            exclude_self=trainer.args.attn_exclude_self,
            generate_options={
                "eos_token_id": trainer.eos_token_ids,
                "pad_token_id": trainer._tokenizer.pad_token_id,
                "repetition_penalty": trainer.args.repetition_penalty,
                "suppress_tokens": sorted(rollouts.kept_out(trainer)) or None,
                # All forwards of all processes, even if one is at the end of its answer.
                "synced_gpus": self._together,
            },
        )

    def _show(self, name: str, pixels: np.ndarray, step: int) -> None:
        for callback in self._trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_image(name, pixels, step, dataformats="HWC")
            elif isinstance(callback, WandbCallback) and callback._wandb is not None:
                wandb = callback._wandb
                wandb.log({name: wandb.Image(pixels), "train/global_step": step})


def _first_rows(trainer: Any) -> Iterator[tuple[list[Any], Any]]:
    """Images and prompt of the rows to look at, as `rk.attention_map` takes them."""
    from trl.data_utils import prepare_multimodal_messages

    rows = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
    if isinstance(rows, Mapping):  # evaluation sets by name
        rows = next(iter(rows.values()))
    for row in islice(rows, trainer.args.attn_map_rows):
        images = row.get("images") or ([row["image"]] if row.get("image") is not None else [])
        if not images:
            raise ValueError(
                "RALTrainer: attn_map_every needs images in the first rows; got a row without"
            )
        prompt = row["prompt"]
        if not isinstance(prompt, str):
            prompt = [
                _without_images(m) for m in prepare_multimodal_messages(prompt, images=images)
            ]
        yield images, prompt


def _without_images(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose images are places for those that come beside it."""
    content = message["content"]
    if isinstance(content, list):
        content = [{"type": "image"} if part["type"] == "image" else part for part in content]
    return {**message, "content": content}


def _question(prompt: Any) -> str:
    """The last text of the last message."""
    if isinstance(prompt, str):
        return prompt
    content = prompt[-1]["content"]
    texts = [content] if isinstance(content, str) else [p.get("text") or "" for p in content]
    return next((text for text in reversed(texts) if text.strip()), "")


def _pixels(figure: Any) -> np.ndarray:
    """The figure as uint8 [H, W, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])
