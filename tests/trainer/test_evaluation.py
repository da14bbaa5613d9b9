"""Greedy accuracy: of models whose answers are known, in batches and alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ral import evaluation
from ral.data import load_jsonl
from ral.evaluation import Cell, Score, answers_of, as_json, as_table, plot, score
from ral.models import limit_pixels, load_model, load_processor, vision_modules

from . import cli_case, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli_case.make(tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def parts(folder: Path) -> tuple[Any, Any]:
    return load_model(folder / "qwen2_5_vl").eval(), load_processor(folder / "qwen2_5_vl")


def test_answers_are_greedy_and_do_not_depend_on_the_batch(
    folder: Path, parts: tuple[Any, Any]
) -> None:
    """Prompts of one and of four images side by side: padding stands on the left."""
    model, processor = parts
    rows = [load_jsonl(folder / "films.jsonl", max_frames=n)[n] for n in (1, 4, 2)]
    together, tokens = answers_of(model, processor, rows, max_new_tokens=5)
    alone = [answers_of(model, processor, [row], max_new_tokens=5)[0][0] for row in rows]
    assert together == alone and tokens == 4 * (1 + 4 + 2)
    # The likeliest token each time, by a forward over all that was written.
    text = together[0]
    inputs = processor.apply_chat_template(
        [tiny_messages(rows[0])], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    for _ in range(5):
        with torch.no_grad():
            likeliest = model(**inputs).logits[:, -1:].argmax(-1)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], likeliest], 1)
        for name in ("attention_mask", "mm_token_type_ids"):
            if name in inputs:
                more = torch.full_like(likeliest, int(name == "attention_mask"))
                inputs[name] = torch.cat([inputs[name], more], 1)
    written = processor.tokenizer.decode(inputs["input_ids"][0, -5:], skip_special_tokens=True)
    assert text == written


def tiny_messages(row: dict[str, Any]) -> Any:
    from trl.data_utils import prepare_multimodal_messages

    return prepare_multimodal_messages(row["prompt"], images=row["images"])


def test_sampling_settings_of_a_checkpoint_do_not_count(
    folder: Path, parts: tuple[Any, Any]
) -> None:
    model, processor = parts
    rows = [load_jsonl(folder / "rows.jsonl")[0]]
    before = answers_of(model, processor, rows, max_new_tokens=6)
    kept = model.generation_config
    try:
        model.generation_config = type(kept)(
            **{**kept.to_diff_dict(), "do_sample": True, "repetition_penalty": 5.0}
        )
        assert answers_of(model, processor, rows, max_new_tokens=6) == before
    finally:
        model.generation_config = kept


def test_score(folder: Path, parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Solutions are A B A B A: who always says B in the right form has 2 of 5."""
    model, processor = parts
    sizes: list[int] = []

    def answers(model: Any, processor: Any, rows: Any, *, max_new_tokens: int) -> Any:
        assert not model.training
        sizes.append(len(rows))
        texts = ["<think>B</think><answer>B</answer>"] * len(rows)
        return [*texts[:-1], "<answer>B</answer>"], 3 * len(rows)

    monkeypatch.setattr(evaluation, "answers_of", answers)
    rows = load_jsonl(folder / "rows.jsonl").select(range(5))
    model.train()
    seen: list[int] = []
    found = score(model, processor, rows, batch_size=2, on_batch=seen.append)
    assert model.training
    model.eval()
    assert sizes == seen == [2, 2, 1]
    assert found.rows == 5 and found.accuracy == pytest.approx(0.4)
    assert found.error == pytest.approx((0.4 * 0.6 / 5) ** 0.5)
    assert found.format == pytest.approx(0.4) and found.visual_tokens == 3
    with pytest.raises(ValueError, match="rows must not be empty"):
        score(model, processor, [])
    # A template that writes the <think> leaves the rest to the response.
    monkeypatch.setattr(processor, "chat_template", "{{ messages[0]['role'] }}<think>\n")
    assert score(model, processor, rows).format == 0.0
    begun = "B</think><answer>B</answer>"
    monkeypatch.setattr(evaluation, "answers_of", lambda *_, **__: ([begun] * 5, 0))
    assert score(model, processor, rows).format == 1.0


CELLS = [
    Cell(frames, None, pixels, Score(200, 0.5 + frames / 100, 0.03, 1.0, 4.0 * frames, 1.5))
    for pixels in (784, 3136)
    for frames in (4, 16)
]


def test_table_and_json(tmp_path: Path) -> None:
    lines = as_table(CELLS).splitlines()
    assert lines[0].split() == [
        "frames", "max", "pixels", "visual", "tokens", "accuracy", "%", "±", "format", "%",
        "rows", "seconds",
    ]  # fmt: skip
    assert lines[2].split() == ["16", "784", "64", "66.0", "3.0", "100.0", "200", "1.5"]
    assert len({len(line) for line in lines}) == 1
    assert json.loads(json.dumps(as_json(CELLS)))[1]["accuracy"] == CELLS[1].score.accuracy
    plot(CELLS, tmp_path / "a.png")
    plot(CELLS[:1], tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size > (tmp_path / "b.png").stat().st_size > 3000


def test_limit_pixels(folder: Path) -> None:
    processor = load_processor(folder / "qwen2_5_vl", max_pixels=784)
    image = tiny.dataset(1)[0]["images"][0]  # 84 × 56 pixels: six visual tokens

    def visual_tokens() -> int:
        text = "<|image_pad|>"
        return processor(images=[image], text=[text], return_tensors="pt")["input_ids"].shape[1]

    assert visual_tokens() == 1
    limit_pixels(processor, max_pixels=100_000)
    assert visual_tokens() == 6
    limit_pixels(processor, min_pixels=4 * 6 * 784)
    assert visual_tokens() == 24
    with pytest.raises(ValueError, match="min_pixels must be <= max_pixels"):
        limit_pixels(processor, min_pixels=200_000)
    with pytest.raises(ValueError, match="within a range of pixels"):
        limit_pixels(
            SimpleNamespace(image_processor=SimpleNamespace(size={"height": 3})), max_pixels=9
        )


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_vision_modules(family: str, tmp_path: Path) -> None:
    model = load_model(tiny.checkpoint(tmp_path, family))
    names = vision_modules(model)
    assert len(names) == 1
    inside = {id(p) for p in model.get_submodule(names[0]).parameters()}
    text = {id(p) for p in model.model.language_model.parameters()} | {id(model.lm_head.weight)}
    assert inside | text == {id(p) for p in model.parameters()} and not inside & text
