"""Accuracy of a decoder, and its attention on the asked cell or frame, on held-out digits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

import ral_kernels as rk

from .decoder import Decoder
from .prompts import Reader
from .tasks import StudyTask

TEST_SEED = 7_000_003  # rows of the evaluation; no training uses it
_TOKENS = 1 << 14  # in a batch: more do not fit into the caches


@contextmanager
def sharpened(model: Decoder, factor: float) -> Iterator[None]:
    """Multiply the attention scores of all layers."""
    layers: list[Any] = [layer.self_attn for layer in model.layers]
    before = [layer.scaling for layer in layers]
    for layer in layers:
        layer.scaling *= factor
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling = scaling


class HeldOut:
    """Rows of one extent on held-out digits, the same for every model, ready to be answered.

    Args:
        reader: of the models' prompts.
        task, style: what the rows are.
        extent: frames, or cells on a side.
        rows: how many.
    """

    def __init__(self, reader: Reader, task: StudyTask, style: str, extent: int, rows: int) -> None:
        from trl.data_utils import prepare_multimodal_messages

        self._reader = reader
        self._style: Any = style
        held_out = list(task.rows(rows, extent, "test", TEST_SEED, style=style))
        self._wanted = [row["completion"][0]["content"] for row in held_out]
        self._solutions = [row["solution"] for row in held_out]
        messages = [prepare_multimodal_messages(r["prompt"], images=r["images"]) for r in held_out]
        self.prompts = reader.encode(messages, add_generation_prompt=True)

    def __call__(self, model: Decoder) -> Any:
        """`ral.digits.evaluate.Accuracy` of greedy responses."""
        from ral.digits.evaluate import judge

        said = self._reader.tokenizer.batch_decode(self.answers(model), skip_special_tokens=True)
        return judge(said, self._wanted, self._solutions, self._style)

    @torch.inference_mode()
    def answers(self, model: Decoder) -> torch.Tensor:
        """Tokens of greedy responses, int64 [rows, C]."""
        from ral.digits.evaluate import LONGEST

        prompts, tokenizer = self.prompts, self._reader.tokenizer
        allowed = torch.zeros(model.lm_head.out_features)
        allowed[self._reader.suppressed] = float("-inf")
        found = [
            model.generate(
                prompts.tokens(model, index), torch.arange(len(index)), prompts.start[index],
                lambda logits: (logits + allowed).argmax(-1), longest=LONGEST,
                end=tokenizer.eos_token_id, pad=tokenizer.pad_token_id,
            )
            for index in torch.arange(len(prompts)).split(
                max(1, _TOKENS // prompts.ids.shape[1])
            )
        ]  # fmt: skip
        longest = max(part.shape[1] for part in found)
        return torch.cat(
            [
                functional.pad(part, (0, longest - part.shape[1]), value=tokenizer.pad_token_id)
                for part in found
            ]
        )


def accuracies(
    model: Decoder, test: Callable[[int], HeldOut], extents: Sequence[int]
) -> dict[str, Any]:
    """`ral.digits.evaluate.Accuracy` at some extents, by their names in JSON."""
    return {str(extent): test(extent)(model) for extent in extents}


class TargetAttention:
    """Share of attention on the asked frame or cell, as the right answer is written.

    It is the attention of the query that predicts the digit in the demonstration, renormalised over
    visual tokens: the share on the asked frame, or on the asked cell of a picture.

    Args:
        reader: of the models' prompts.
        task, style: what the rows are.
        extent: frames, or cells on a side.
        rows: how many.
    """

    def __init__(self, reader: Reader, task: StudyTask, style: str, extent: int, rows: int) -> None:
        from trl.data_utils import prepare_multimodal_messages

        from ral.digits.puzzles import make_puzzle

        name: Any = task.name
        held_out = task.rows(rows, extent, "test", TEST_SEED + 1, style=style)
        messages = [
            prepare_multimodal_messages(row["prompt"] + row["completion"], images=row["images"])
            for row in held_out
        ]
        self.prompts = reader.encode(messages)
        puzzles = [make_puzzle(name, extent, "test", TEST_SEED + 1, i) for i in range(rows)]
        self.targets = torch.tensor([p.frame if p.times is not None else p.cell for p in puzzles])
        opening = reader.tokenizer.convert_tokens_to_ids("<answer>")
        positions = (self.prompts.ids == opening).long().argmax(-1)
        # A direct answer about frames says the time first: its digit is predicted a token later.
        positions += int(style == "direct" and puzzles[0].times is not None)
        if positions.unique().numel() != 1:
            raise ValueError("TargetAttention: responses must be of one length")
        self.row = int(positions[0])
        inputs = {"input_ids": self.prompts.ids, "attention_mask": self.prompts.mask.long()}
        inputs["image_grid_thw"] = self.prompts.fields["image_grid_thw"]
        granularity: Any = "token" if puzzles[0].times is None else "frame"
        found = rk.spans_for(reader.config, inputs, granularity).spans
        self._spans = rk.Spans(found.ids[:, : self.row + 1], found.num_spans)

    @torch.no_grad()
    def __call__(self, model: Decoder) -> list[float]:
        """The mean share in each decoder layer."""
        rows = torch.arange(len(self.prompts))
        tokens = self.prompts.tokens(model, rows, self.prompts.ids.shape[1])
        past = model.prefix(tokens.columns(None, self.row))
        row = tokens.columns(self.row, self.row + 1)
        with rk.capture(model, "all", rows=(0, 1), spans=self._spans) as captured:
            model(**row._asdict(), past=past)
        shares = [captured.policy(layer=layer)[:, 0] for layer in captured.layers]
        return [float(share.gather(1, self.targets[:, None]).mean()) for share in shares]
