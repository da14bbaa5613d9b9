"""Accuracy of greedy answers, over numbers of frames and resolutions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .rewards import accuracy_reward, format_reward
from .rewards.tags import rendered_end


@dataclass(frozen=True)
class Score:
    """The accuracy of a model in some rows.

    Attributes:
        rows: how many.
        accuracy: mean of `accuracy_reward`, 0 to 1.
        error: standard error of that mean.
        format: share of responses in the form that was asked for.
        visual_tokens: mean number in a prompt.
        seconds: for all rows, with reading and processing of images.
    """

    rows: int
    accuracy: float
    error: float
    format: float
    visual_tokens: float
    seconds: float


@dataclass(frozen=True)
class Cell:
    """One entry of a sweep; a size that was not varied is None."""

    frames: int | None
    grid: int | None
    max_pixels: int | None
    score: Score


def answers_of(
    model: Any,
    processor: Any,
    rows: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
) -> tuple[list[str], int]:
    """The responses of a model to some prompts.

    The checkpoint's own sampling settings and penalties are not used.

    Args:
        model, processor: of transformers, the model in evaluation mode.
        rows: with prompt and images, as `ral.data` returns them.
        max_new_tokens: length of an answer at most.
        temperature: of a sample; 0 is greedy.

    Returns:
        The texts, and the number of visual tokens in all prompts.
    """
    from transformers import GenerationConfig
    from trl.data_utils import prepare_multimodal_messages

    messages = [
        prepare_multimodal_messages(row["prompt"], images=row.get("images") or []) for row in rows
    ]
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    ).to(model.device)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    tokenizer = getattr(processor, "tokenizer", processor)
    ends = model.generation_config.eos_token_id
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
    settings = GenerationConfig(
        **(sampling if temperature > 0 else {"do_sample": False}),
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id if ends is None else ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.inference_mode():
        written = model.generate(**inputs, generation_config=settings)
    answers = written[:, inputs["input_ids"].shape[1] :]
    image_token = getattr(model.config, "image_token_id", None)
    visual = 0 if image_token is None else int((inputs["input_ids"] == image_token).sum())
    return tokenizer.batch_decode(answers, skip_special_tokens=True), visual


def score(
    model: Any,
    processor: Any,
    rows: Iterable[dict[str, Any]],
    *,
    style: str = "think",
    batch_size: int = 16,
    max_new_tokens: int = 768,
    on_batch: Callable[[int], object] | None = None,
) -> Score:
    """Accuracy of greedy answers to some rows.

    Args:
        model, processor: of transformers; the model's mode is restored afterwards.
        rows: with prompt, images, solution and problem_type, as `ral.data` returns them.
        style: form of the responses, "think" or "direct".
        batch_size: rows in a batch.
        max_new_tokens: length of an answer at most.
        on_batch: called after each batch with its number of rows.

    Raises:
        ValueError: there are no rows.
    """
    started = time.perf_counter()
    accuracies: list[float] = []
    forms: list[float] = []
    visual = 0
    training = model.training
    model.eval()
    try:
        for batch in _batches(rows, batch_size):
            texts, tokens = answers_of(model, processor, batch, max_new_tokens=max_new_tokens)
            columns = {name: [row[name] for row in batch] for name in batch[0]}
            accuracies += accuracy_reward(
                texts, columns["solution"], columns["problem_type"], columns.get("options")
            )
            end = rendered_end(processor, batch[0]["prompt"])
            forms += format_reward(texts, style, prompt_end=[end] * len(texts))
            visual += tokens
            if on_batch is not None:
                on_batch(len(batch))
    finally:
        model.train(training)
    if not accuracies:
        raise ValueError("score: rows must not be empty")
    values = torch.tensor(accuracies, dtype=torch.float64)
    count = len(accuracies)
    return Score(
        rows=count,
        accuracy=values.mean().item(),
        error=(values.std(unbiased=False) / count**0.5).item(),
        format=sum(forms) / count,
        visual_tokens=visual / count,
        seconds=time.perf_counter() - started,
    )


def as_table(cells: Sequence[Cell]) -> str:
    """A sweep as text: a line for each cell, with the sizes that vary."""
    sizes = [
        name
        for name in ("frames", "grid", "max_pixels")
        if any(getattr(cell, name) is not None for cell in cells)
    ]
    head = [name.replace("_", " ") for name in sizes]
    head += ["visual tokens", "accuracy %", "±", "format %", "rows", "seconds"]
    lines = [head]
    for cell in cells:
        of = cell.score
        lines.append(
            [str(getattr(cell, name) or "") for name in sizes]
            + [f"{of.visual_tokens:.0f}", f"{100 * of.accuracy:.1f}", f"{100 * of.error:.1f}"]
            + [f"{100 * of.format:.1f}", str(of.rows), f"{of.seconds:.1f}"]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True))
        for line in lines
    )


def as_json(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A sweep for a JSON file: sizes and score of each cell side by side."""
    return [
        {
            "frames": cell.frames, "grid": cell.grid, "max_pixels": cell.max_pixels,
            **asdict(cell.score),
        }
        for cell in cells
    ]  # fmt: skip


def plot(cells: Sequence[Cell], path: Path, title: str = "") -> None:
    """Draw a sweep: accuracy over frames, or grid sides, or pixels, with its standard error.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator

    def varies(name: str) -> bool:
        return len({getattr(cell, name) for cell in cells}) > 1

    across = next((name for name in ("frames", "grid", "max_pixels") if varies(name)), "frames")
    lines: dict[int | None, list[Cell]] = {}
    for cell in cells:
        lines.setdefault(cell.max_pixels if across != "max_pixels" else None, []).append(cell)
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for pixels, of in lines.items():
        x = [getattr(cell, across) or 0 for cell in of]
        y = [100 * cell.score.accuracy for cell in of]
        bars = [100 * cell.score.error for cell in of]
        label = None if pixels is None else f"{pixels:,} pixels"
        axes.errorbar(x, y, yerr=bars, marker="o", capsize=3, label=label)
    ticks = sorted({getattr(cell, across) or 0 for cell in cells})
    if len(ticks) > 1:
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    names = {"frames": "frames", "grid": "cells on a side", "max_pixels": "pixels of an image"}
    axes.set(xlabel=names[across], ylabel="accuracy, %", title=title)
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _batches(rows: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
