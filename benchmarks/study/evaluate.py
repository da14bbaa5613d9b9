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

TEST_SEED = 7_000_003  # rows of the evaluation, unless a plan says otherwise; no training uses it
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
        seed: of the rows.
    """

    def __init__(
        self,
        reader: Reader,
        task: StudyTask,
        style: str,
        extent: int,
        rows: int,
        seed: int = TEST_SEED,
    ) -> None:
        self._reader = reader
        self._style: Any = style
        self._longest = task.longest
        held_out = list(task.rows(rows, extent, "test", seed, style=style))
        self._wanted = [row["completion"][0]["content"] for row in held_out]
        self._solutions = [row["solution"] for row in held_out]
        self.prompts = reader.encode(held_out)

    def __call__(self, model: Decoder) -> Any:
        """`ral.digits.evaluate.Accuracy` of greedy responses."""
        from ral.digits.evaluate import judge

        said = self._reader.tokenizer.batch_decode(self.answers(model), skip_special_tokens=True)
        return judge(said, self._wanted, self._solutions, self._style)

    @torch.inference_mode()
    def answers(self, model: Decoder) -> torch.Tensor:
        """Tokens of greedy responses, int64 [rows, C]."""
        prompts, tokenizer = self.prompts, self._reader.tokenizer
        allowed = torch.zeros(model.lm_head.out_features)
        allowed[self._reader.suppressed] = float("-inf")
        found = []
        for index in torch.arange(len(prompts)).split(max(1, _TOKENS // prompts.ids.shape[1])):
            answers = model.generate(
                *prompts.begun(model, index), prompts.start[index],
                lambda logits: (logits + allowed).argmax(-1),
                longest=self._longest, end=tokenizer.eos_token_id, pad=tokenizer.pad_token_id,
            )  # fmt: skip
            found.append(answers)
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

    It is the attention of the queries that predict what is seen in the demonstration, renormalised
    over visual tokens: the share on the asked frame, or on the asked cell of a picture. A chain has
    two queries a look, for tens and units; the others have one.

    Args:
        reader: of the model's prompts.
        task, style: what the rows are.
        extent: frames, or cells on a side.
        rows: how many, others than those of `HeldOut`.
        seed: of the evaluation's rows.
    """

    def __init__(
        self,
        reader: Reader,
        task: StudyTask,
        style: str,
        extent: int,
        rows: int,
        seed: int = TEST_SEED,
    ) -> None:
        from ral.digits.tasks import looks_of, puzzle_of

        name: Any = task.name
        chosen: Any = style
        held_out = task.rows(rows, extent, "test", seed + 1, style=style)
        self.prompts = reader.encode(held_out, completions=True)
        puzzles = [puzzle_of(name, extent, "test", seed + 1, i) for i in range(rows)]
        looks = torch.tensor([looks_of(puzzle, chosen) for puzzle in puzzles])
        self.targets = looks[..., 1]  # [rows, queries]
        opening = reader.tokenizer.convert_tokens_to_ids(
            "<think>" if style == "think" else "<answer>"
        )
        positions = (self.prompts.ids == opening).long().argmax(-1)[:, None] + looks[..., 0]
        if (positions != positions[0]).any():
            raise ValueError("TargetAttention: responses must be of one length")
        self.rows = positions[0]
        inputs = {"input_ids": self.prompts.ids, "attention_mask": self.prompts.mask.long()}
        inputs["image_grid_thw"] = self.prompts.fields["image_grid_thw"]
        granularity: Any = "token" if puzzles[0].times is None else "frame"
        found = rk.spans_for(reader.config, inputs, granularity).spans
        self._spans = rk.Spans(found.ids[:, : int(self.rows[-1]) + 1], found.num_spans)

    def __call__(self, model: Decoder) -> list[float]:
        """The mean share in each decoder layer."""
        return self.of_queries(model).mean(-1).tolist()

    @torch.no_grad()
    def of_queries(self, model: Decoder) -> torch.Tensor:
        """The mean share in each decoder layer and query, float32 [layers, queries]."""
        first, end = int(self.rows[0]), int(self.rows[-1]) + 1
        tokens = self.prompts.tokens(
            model, torch.arange(len(self.prompts)), self.prompts.ids.shape[1]
        )
        past = model.prefix(tokens.columns(None, first))
        rows = tokens.columns(first, end)
        with rk.capture(model, "all", rows=(0, end - first), spans=self._spans) as captured:
            model(**rows._asdict(), past=past)
        shares = [
            captured.policy(layer=layer)[:, self.rows - first].gather(2, self.targets[..., None])
            for layer in captured.layers
        ]
        return torch.stack(shares)[..., 0].mean(1)
