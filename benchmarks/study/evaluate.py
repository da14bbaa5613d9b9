"""Accuracy of a model, and its attention on the asked cell or frame, on held-out digits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

import ral_kernels as rk

from .tasks import StudyTask

TEST_SEED = 7_000_003  # rows of the evaluation; no training uses it
_TOKENS = 1 << 16  # in a batch


@contextmanager
def sharpened(model: Any, factor: float) -> Iterator[None]:
    """Multiply the attention scores of all decoder layers."""
    layers = [m for name, m in model.named_modules() if name.endswith("self_attn")]
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
        processor: of the models.
        task, style: what the rows are.
        extent: frames, or cells on a side.
        rows: how many.
    """

    def __init__(self, processor: Any, task: StudyTask, style: str, extent: int, rows: int) -> None:
        from trl.data_utils import prepare_multimodal_messages

        self._tokenizer = processor.tokenizer
        self._style: Any = style
        held_out = list(task.rows(rows, extent, "test", TEST_SEED, style=style))
        self._wanted = [row["completion"][0]["content"] for row in held_out]
        self._solutions = [row["solution"] for row in held_out]
        messages = [prepare_multimodal_messages(r["prompt"], images=r["images"]) for r in held_out]
        tokens = 8 * task.visual_tokens(extent) // 4 + 20  # of a prompt, about
        at_once = max(1, _TOKENS // tokens)
        self._batches = [
            processor.apply_chat_template(
                messages[first : first + at_once],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True, "padding_side": "left"},
            )
            for first in range(0, rows, at_once)
        ]

    @torch.inference_mode()
    def __call__(self, model: Any) -> Any:
        """`ral.digits.evaluate.Accuracy` of greedy responses."""
        from transformers import GenerationConfig

        from ral.digits.evaluate import LONGEST, judge

        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=LONGEST,
            eos_token_id=model.generation_config.eos_token_id,
            pad_token_id=model.generation_config.pad_token_id,
        )
        training = model.training
        model.eval()
        said: list[str] = []
        for inputs in self._batches:
            whole = model.generate(**inputs, generation_config=settings)
            answers = whole[:, inputs["input_ids"].shape[1] :]
            said += self._tokenizer.batch_decode(answers, skip_special_tokens=True)
        model.train(training)
        return judge(said, self._wanted, self._solutions, self._style)


def accuracies(model: Any, tests: dict[int, HeldOut], extents: Sequence[int]) -> dict[str, Any]:
    """`ral.digits.evaluate.Accuracy` at some extents, by their names in JSON."""
    return {str(extent): tests[extent](model) for extent in extents}


class TargetAttention:
    """Share of attention on the asked frame or cell, as the right answer is written.

    It is the attention of the query that predicts the digit in the demonstration, renormalised over
    visual tokens: the share on the asked frame, or on the asked cell of a picture.

    Args:
        processor: of the model.
        task, style: what the rows are.
        extent: frames, or cells on a side.
        rows: how many.
    """

    def __init__(self, processor: Any, task: StudyTask, style: str, extent: int, rows: int) -> None:
        from trl.data_utils import prepare_multimodal_messages

        from ral.digits.puzzles import make_puzzle

        name: Any = task.name
        held_out = task.rows(rows, extent, "test", TEST_SEED + 1, style=style)
        messages = [
            prepare_multimodal_messages(row["prompt"] + row["completion"], images=row["images"])
            for row in held_out
        ]
        self.inputs = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )  # fmt: skip
        puzzles = [make_puzzle(name, extent, "test", TEST_SEED + 1, i) for i in range(rows)]
        self.targets = torch.tensor([p.frame if p.times is not None else p.cell for p in puzzles])
        self.granularity: Literal["token", "frame"] = (
            "token" if puzzles[0].times is None else "frame"
        )
        opening = processor.tokenizer.convert_tokens_to_ids("<answer>")
        positions = (self.inputs["input_ids"] == opening).long().argmax(-1)
        # A direct answer about frames says the time first: its digit is predicted a token later.
        positions += int(style == "direct" and puzzles[0].times is not None)
        if positions.unique().numel() != 1:
            raise ValueError("TargetAttention: responses must be of one length")
        self.row = int(positions[0])

    @torch.no_grad()
    def __call__(self, model: Any) -> list[float]:
        """The mean share in each decoder layer."""
        training = model.training
        model.eval()
        spans = rk.spans_for(model.config, self.inputs, self.granularity).spans
        with rk.capture(model, "all", rows=(self.row, self.row + 1), spans=spans) as captured:
            model(**self.inputs, use_cache=False, logits_to_keep=1)
        shares = [captured.policy(layer=layer)[:, 0] for layer in captured.layers]
        model.train(training)
        return [float(share.gather(1, self.targets[:, None]).mean()) for share in shares]
