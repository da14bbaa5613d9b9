"""`spans_for` against what real processors write and what real models read at each token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import ral_kernels as rk
from benchmarks.harness.photographs import load

pytest.importorskip("transformers")
from PIL import Image

from ral_kernels.integrations.transformers.layouts import _canvas
from ral_kernels.integrations.transformers.spans import VisionSpans, spans_for

from . import tiny_processors

FAMILIES = tuple(tiny_processors.PLACEHOLDER)
SIZES = [(240, 280), (260, 168), (168, 196)]  # height, width


pytestmark = pytest.mark.usefixtures("one_thread")


def processed(family: str, pictures: list[Any], side: str = "left", **options: Any) -> Any:
    """A batch of two: one picture and text, two pictures that touch and less text."""
    processor = tiny_processors.build(family, **options)
    processor.tokenizer.padding_side = side
    mark = tiny_processors.PLACEHOLDER[family]
    inputs = processor(
        images=[pictures[:1], pictures[1:]],
        text=[f"Look at {mark} the cup of coffee on the table?", f"{mark}{mark}cat"],
        padding=True,
        return_tensors="pt",
    )
    return processor, inputs


def blank(size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", (size[1], size[0]), (90, 90, 90))


def embeddings(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """What the language model reads at each token of the prompt: [B, N, D]."""
    seen: list[torch.Tensor] = []
    text = getattr(model.model, "language_model", None) or model.model.text_model
    handle = text.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].detach().clone()),
        with_kwargs=True,
    )
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        handle.remove()
    return seen[0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen2_vl"])
def test_a_mark_in_a_picture_is_where_the_region_says(family: str, side: str) -> None:
    spots = [(0.18, 0.93), (0.93, 0.22), (0.46, 0.07)]  # of each picture, down and across
    pictures = [blank(size) for size in SIZES]
    processor, before = processed(family, pictures, side)
    found = spans_for(processor, before, "token", image_sizes=SIZES)
    for picture, size, spot in zip(pictures, SIZES, spots, strict=True):
        centre = [int(share * edge) for share, edge in zip(spot, size, strict=True)]
        half = 7
        picture.paste(
            (255, 255, 255),
            (centre[1] - half, centre[0] - half, centre[1] + half, centre[0] + half),
        )
    _, after = processed(family, pictures, side)
    model = tiny_processors.model_for(family, processor)
    change = (embeddings(model, after) - embeddings(model, before)).norm(dim=-1)

    keys = torch.zeros_like(change, dtype=torch.bool)
    assert len(found.regions) >= 3
    for region in found.regions:
        fraction = spots[region.item if region.sample == 0 else 1 + region.item]
        top, left, bottom, right = region.box
        rows, columns = region.keys.shape
        row = int((fraction[0] - top) / (bottom - top) * rows)
        column = int((fraction[1] - left) / (right - left) * columns)
        moved = change[region.sample, region.keys]
        assert moved.argmax() == row * columns + column, (family, region.item, region.view)
        keys[region.sample, region.keys] = True
        place = found.place(int(region.span_ids[row, column]), region.sample)
        assert place is not None
        assert (place.item, place.view, place.rows, place.columns) == (
            region.item, region.view, (row, row + 1), (column, column + 1)
        )  # fmt: skip
    assert not change[~keys].any()  # no token outside the regions shows a picture


@pytest.mark.parametrize("source", ["processor", "config", "model", "wrapped model"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen2_vl"])
def test_processor_config_and_model_agree(family: str, source: str) -> None:
    processor, inputs = processed(family, [blank(size) for size in SIZES])
    model = tiny_processors.model_for(family, processor)
    config = model.config
    wrapper = torch.nn.Module()
    wrapper.module = model
    asked = {"processor": processor, "config": config, "model": model, "wrapped model": wrapper}
    wanted = spans_for(processor, inputs, "tile", tile=(2, 3), image_sizes=SIZES)
    got = spans_for(asked[source], inputs, "tile", tile=(2, 3), image_sizes=SIZES)
    assert got.spans == wanted.spans
    assert all(
        torch.equal(a.keys, b.keys) for a, b in zip(got.regions, wanted.regions, strict=True)
    )


@pytest.mark.parametrize("granularity", ["frame", "image", "tile", "token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_granularity(family: str, granularity: str) -> None:
    tile = (2, 3) if granularity == "tile" else None
    processor, inputs = processed(family, [blank(size) for size in SIZES])
    found = spans_for(processor, inputs, granularity, tile=tile, text=True, image_sizes=SIZES)
    ids, mask = found.spans.ids, inputs["attention_mask"]
    assert found.text_span == found.spans.num_spans - 1
    assert (ids[mask == 0] == -1).all()
    assert found.num_items(0) == 1 and found.num_items(1) == 2
    image = spans_for(processor, inputs, "image").spans.ids
    assert torch.equal(ids == found.text_span, (image < 0) & (mask == 1))
    for region in found.regions:
        assert torch.equal(ids[region.sample, region.keys], region.span_ids)
        assert (image[region.sample, region.keys] == region.item).all()
        for span in region.span_ids.unique().tolist():
            place = found.place(span, region.sample)
            assert place is not None and place.item == region.item
            if granularity in ("tile", "token"):
                cells = region.span_ids[slice(*place.rows), slice(*place.columns)]
                assert (cells == span).all() and cells.numel() == (region.span_ids == span).sum()
                assert cells.numel() <= (6 if granularity == "tile" else 1)
    for sample in range(2):  # every span up to the sample's last is used
        used = ids[sample].unique().tolist()
        spans = [span for span in used if span not in (-1, found.text_span)]
        assert spans == list(range(len(spans)))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_equal_to_from_vision_grid(family: str) -> None:
    pictures = [load("coffee.png"), load("astronaut.png"), load("chelsea.png")]
    processor, inputs = processed(family, pictures)
    for granularity in ("frame", "token"):
        wanted = rk.Spans.from_vision_grid(
            inputs["input_ids"],
            inputs["image_grid_thw"],
            token_id=processor.image_token_id,
            granularity=granularity,
        )
        assert spans_for(processor, inputs, granularity).spans == wanted


def video_prompt(family: str, processor: Any, frames: int, rows: int, columns: int) -> str:
    """What the stock processor writes for a video, which without torchvision it cannot read."""
    grid = torch.tensor([[frames, 2 * rows, 2 * columns]])
    metadata = SimpleNamespace(fps=2.0, frames_indices=list(range(2 * frames)))
    inputs = {
        "video_grid_thw": grid,
        "video_metadata": [metadata],
        "pixel_values_videos": [torch.zeros(frames, 3, 28, 28)],
    }
    text = str(processor.replace_video_token(inputs, 0))
    if family == "qwen3_vl":
        assert text.count("seconds>") == frames
        return text
    return f"<|vision_start|>{text}<|vision_end|>" if family.startswith("qwen") else text


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_images_and_videos_in_one_prompt(family: str) -> None:
    processor = tiny_processors.build(family)
    mark = tiny_processors.PLACEHOLDER[family]
    picture = load("coffee.png").resize((160, 96))
    first = processor(images=[picture], text=[mark], return_tensors="pt")
    image_text = processor.decode(first["input_ids"][0])
    texts = [
        f"Where {video_prompt(family, processor, 3, 2, 4)} or {image_text}?",
        video_prompt(family, processor, 2, 3, 2),
    ]
    processor.tokenizer.padding_side = "left"
    inputs = dict(processor.tokenizer(texts, return_tensors="pt", padding=True))
    inputs["image_grid_thw"] = first["image_grid_thw"]
    inputs["video_grid_thw"] = torch.tensor([[3, 4, 8], [2, 6, 4]])

    found = spans_for(processor, inputs, "frame", text=True)
    assert [(r.sample, r.item, r.kind, r.frame) for r in found.regions] == [
        (0, 0, "video", 0), (0, 0, "video", 1), (0, 0, "video", 2), (0, 1, "image", 0),
        (1, 0, "video", 0), (1, 0, "video", 1),
    ]  # fmt: skip
    assert [tuple(r.keys.shape) for r in found.regions[:1]] == [(2, 4)]
    assert found.spans.num_spans == 4 + 1 and found.text_span == 4
    last = found.place(2)
    assert last is not None and (last.kind, last.frame, last.rows) == ("video", 2, (0, 2))
    assert spans_for(processor, inputs, "image").spans.num_spans == 2
    # With images first and videos behind, from_vision_grid names the same groups of keys.
    pieces = [
        rk.Spans.from_vision_grid(inputs["input_ids"], inputs[f"{kind}_grid_thw"], token_id=token)
        for kind, token in (
            ("video", processor.video_token_id),
            ("image", processor.image_token_id),
        )
    ]
    union = pieces[0].union(pieces[1]).ids
    assert torch.equal(union[0], spans_for(processor, inputs, "frame").spans.ids[0])


GLM_TOKENS = {
    "image_token": "<|image|>",
    "video_token": "<|video|>",
    "start": "<|begin_of_video|>",
    "end": "<|end_of_video|>",
}
ERNIE_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    **{
        f"{kind}_{edge}_token": f"<{kind}{edge}>"
        for kind in ("image", "video")
        for edge in ("start", "end")
    },
}
# model type -> (its processor, its special tokens, steps of the grid a frame of the prompt takes)
WITH_GRIDS: dict[str, tuple[str, dict[str, str], int]] = {
    "qwen3_5": ("Qwen3VLProcessor", {}, 1),
    "qwen3_vl_moe": ("Qwen3VLProcessor", {}, 1),
    "qwen2_5_omni": ("Qwen2_5_VLProcessor", {}, 1),
    "glm4v": ("Glm4vProcessor", GLM_TOKENS, 1),
    "glm46v": ("Glm46VProcessor", GLM_TOKENS, 1),
    "ernie4_5_vl_moe": ("Ernie4_5_VLMoeProcessor", ERNIE_TOKENS, 2),
    "video_llama_3": ("VideoLlama3Processor", {}, 1),
}


@pytest.mark.parametrize("model_type", WITH_GRIDS)
def test_models_whose_processors_return_grids(model_type: str) -> None:
    """A video of 3 frames of 2 x 4 tokens and pictures, as the processor itself writes them."""
    from transformers import AutoConfig

    processor_class, tokens, steps = WITH_GRIDS[model_type]
    processor = tiny_processors.with_grids(processor_class, **tokens)
    video: dict[str, Any] = {
        "video_grid_thw": torch.tensor([[3 * steps, 4, 8]]),
        "video_metadata": [
            SimpleNamespace(
                fps=2.0, frames_indices=list(range(6)), timestamps=[0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
            )
        ],
    }
    pictures: dict[str, Any] = {"image_grid_thw": torch.tensor([[1, 4, 6], [1, 2, 4]])}
    if model_type == "video_llama_3":
        video["video_metadata"][0].timestamps = [0.0, 0.5, 1.0]
        video["video_merge_sizes"] = torch.tensor([2])
        video["video_compression_mask"] = torch.ones(24, dtype=torch.bool)
        pictures["image_merge_sizes"] = torch.tensor([2, 2])
    written = processor.replace_video_token(video, 0)
    if "start" in tokens:
        written = f"{tokens['start']}{written}{tokens['end']}"
    if model_type == "qwen2_5_omni":  # with the sound of each second between
        third = len(written) // 3
        written = f"{written[:third]} a {written[third:]} b"
    first, second = (processor.replace_image_token(pictures, i) for i in range(2))
    texts = [f"Where {written} or {first}?", f"{second} cat"]
    inputs = dict(processor.tokenizer(texts, return_tensors="pt", padding=True))
    del video["video_metadata"]
    inputs.update(video, **pictures)

    found = spans_for(processor, inputs, "token")
    assert [(r.sample, r.item, r.kind, r.frame, tuple(r.keys.shape)) for r in found.regions] == [
        *((0, 0, "video", frame, (2, 4)) for frame in range(3)),
        (0, 1, "image", 0, (2, 3)),
        (1, 0, "image", 0, (1, 2)),
    ]
    shared = "start" in tokens
    for region in found.regions:
        of_kind = (
            processor.image_token_id if shared else getattr(processor, f"{region.kind}_token_id")
        )
        assert (inputs["input_ids"][region.sample, region.keys] == of_kind).all()
        assert (region.keys.flatten().diff() >= 1).all()
    assert len({int(key) for r in found.regions if r.sample == 0 for key in r.keys.flatten()}) == 30

    config = AutoConfig.for_model(model_type)
    part = config.thinker_config if model_type == "qwen2_5_omni" else config
    part.image_token_id, part.video_token_id = processor.image_token_id, processor.video_token_id
    if shared:
        part.video_start_token_id = processor.video_start_id
        part.video_end_token_id = processor.video_end_id
        types = processor.create_mm_token_type_ids(inputs["input_ids"].tolist())
        typed = {**inputs, "mm_token_type_ids": torch.tensor(types)}
        assert spans_for(processor, typed, "token").spans == found.spans
    assert spans_for(config, inputs, "token").spans == found.spans


def test_a_video_with_dropped_tokens_is_refused() -> None:
    processor = tiny_processors.with_grids("VideoLlama3Processor")
    inputs = dict(processor.tokenizer("<|video_pad|>" * 3, return_tensors="pt"))
    inputs["video_grid_thw"] = torch.tensor([[1, 4, 4]])
    inputs["video_compression_mask"] = torch.tensor([True, False, True, True])
    with pytest.raises(NotImplementedError, match=r"video_compression_mask .* keeps 3 of 4"):
        spans_for(processor, inputs)


def test_video_of_llava_onevision_smolvlm_and_internvl() -> None:
    processor = tiny_processors.build("llava_onevision")
    text = video_prompt("llava_onevision", processor, 3, 0, 0)
    inputs = dict(processor.tokenizer([f"The {text} cat"], return_tensors="pt"))
    inputs["pixel_values_videos"] = torch.zeros(1, 3, 3, 28, 28)
    found = spans_for(processor, inputs, "frame")
    assert [(r.kind, r.frame, tuple(r.keys.shape)) for r in found.regions] == [
        ("video", frame, (2, 2)) for frame in range(3)
    ]
    assert (found.spans.ids >= 0).sum() == 12  # the newline behind the last frame is of no frame
    assert (spans_for(processor, inputs, "image").spans.ids >= 0).sum() == 13

    processor = tiny_processors.build("smolvlm")
    metadata = SimpleNamespace(fps=2.0, duration=1, timestamps=[0.0, 0.5, 1.0])
    video = {"pixel_values": torch.zeros(1, 3, 3, 28, 28), "video_metadata": [metadata]}
    text = processor.replace_video_token(video, 0)
    found = spans_for(processor, dict(processor.tokenizer([text], return_tensors="pt")), "image")
    assert [(r.item, r.kind, tuple(r.keys.shape)) for r in found.regions] == [
        (frame, "image", (2, 2)) for frame in range(3)
    ]

    processor = tiny_processors.build("internvl")
    processor.start_image_token, processor.end_image_token = "<img>", "</img>"
    inputs = dict(
        processor.tokenizer([video_prompt("internvl", processor, 3, 0, 0)], return_tensors="pt")
    )
    found = spans_for(processor, inputs, "image")
    assert [(r.item, r.kind, tuple(r.keys.shape)) for r in found.regions] == [
        (frame, "image", (2, 2)) for frame in range(3)
    ]


@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_tiles_of_idefics3_are_read_from_the_prompt(family: str) -> None:
    """A column, a row and a square of tiles, one after another; and pictures that are not cut."""
    sizes = [(300, 60), (60, 300), (280, 280), (200, 300)]
    processor = tiny_processors.build(family)
    pictures = [blank(size) for size in sizes]
    text = ["<image><image>cat<image>", "a <image>"]
    inputs = processor(
        images=[pictures[:3], pictures[3:]], text=text, padding=True, return_tensors="pt"
    )
    found = spans_for(processor, inputs, "token")
    counts = [processor.image_processor.get_number_of_image_patches(*size) for size in sizes]
    tiles = [(rows, columns) for _, rows, columns in counts]
    assert tiles == [(3, 1), (1, 3), (3, 3), (2, 3)]
    assert [tuple(region.keys.shape) for region in found.regions] == [
        shape for rows, columns in tiles for shape in ((2, 2), (2 * rows, 2 * columns))
    ]
    last = found.of_item(0, sample=1)  # the whole picture comes after its tiles
    assert int(last[0].keys.min()) > int(last[1].keys.max())
    row = inputs["input_ids"][1]
    markers = [int(row[last[1].keys[2 * y, 2 * x] - 1]) for y in range(2) for x in range(3)]
    names = [f"<row_{y}_col_{x}>" for y in (1, 2) for x in (1, 2, 3)]
    assert processor.tokenizer.convert_ids_to_tokens(markers) == names

    whole = processor(images=[pictures[:2]], text=text[1] * 2, return_tensors="pt",
                      do_image_splitting=False)  # fmt: skip
    found = spans_for(processor, whole, "token")
    assert [tuple(region.keys.shape) for region in found.regions] == [(2, 2)] * 2

    at = int(last[1].keys[0, 2]) - 2  # the marker of the second tile
    broken = torch.cat([row[:at], torch.tensor([20]), row[at:]])[None]
    with pytest.raises(ValueError, match=r"rows of one length, .*; got 6 tiles with .* \[1, 3\]"):
        spans_for(processor, {"input_ids": broken})


def test_pictures_of_llava_next_video_are_those_of_llava_next() -> None:
    from transformers import AutoConfig

    processor, inputs = processed("llava_next", [blank(size) for size in SIZES])
    config = AutoConfig.for_model(
        "llava_next_video",
        vision_config=tiny_processors.model_for("llava_next", processor).config.vision_config,
        image_grid_pinpoints=processor.image_processor.image_grid_pinpoints,
        image_token_index=processor.image_token_id,
    )
    got, wanted = (spans_for(source, inputs, "token").spans for source in (config, processor))
    assert got == wanted


def test_pan_and_scan_of_gemma3() -> None:
    size = (100, 300)
    options = {
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 20,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }
    processor = tiny_processors.build("gemma3")
    inputs = processor(images=[[blank(size)]], text=["<boi> cat"], return_tensors="pt", **options)
    assert "num_crops" not in inputs and spans_for(processor, inputs, "image").num_items() == 4
    inputs["num_crops"] = torch.tensor([3])
    with pytest.raises(ValueError, match="image_sizes"):
        spans_for(processor, inputs, "token")
    assert spans_for(processor, inputs, "image").num_items() == 1
    found = spans_for(processor, inputs, "token", image_sizes=[size])
    assert [(r.view, tuple(r.keys.shape)) for r in found.regions] == [(0, (2, 2)), (1, (2, 6))]
    # The middle crop's first row stands in the middle of the detail's first row.
    overview, detail = found.regions
    first_run = int(overview.keys[0, 0])
    assert (detail.keys[0].diff() >= 1).all() and int(detail.keys[0, 0]) > first_run + 3
    assert spans_for(processor, {"input_ids": torch.tensor([[1, 2]])}).spans.num_spans == 0


def test_canvas_is_that_of_transformers() -> None:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
        get_optimal_tiled_canvas,
    )

    generator = np.random.default_rng(0)
    sizes = generator.integers(20, 900, (300, 2)).tolist()
    # 5 : 4 is as far from 1 : 2 as from 2 : 1; then the area decides.
    sizes += [(4 * k, 5 * k) for k in range(5, 200, 7)]
    for low, high in ((1, 12), (2, 2), (6, 6)):
        for size in sizes:
            columns, rows = get_optimal_tiled_canvas(tuple(size), (28, 28), low, high)
            assert _canvas(tuple(size), rows * columns, 28) == (rows, columns), size


def test_one_sample_without_a_batch_dimension_and_text_alone() -> None:
    processor, inputs = processed("qwen2_5_vl", [blank(size) for size in SIZES])
    flat = {"input_ids": inputs["input_ids"][0], "image_grid_thw": inputs["image_grid_thw"][:1]}
    found = spans_for(processor, flat)
    assert found.spans.ids.dim() == 1 and found.spans.num_spans == 1
    found = spans_for(processor, {"input_ids": torch.tensor([[20, 21]])}, text=True)
    assert found.spans.ids.tolist() == [[0, 0]] and found.place(0) is None
    with pytest.raises(IndexError, match="no span 7"):
        found.place(7)


@pytest.mark.parametrize("family", FAMILIES)
def test_placeholders_that_do_not_match(family: str) -> None:
    processor, inputs = processed(family, [blank(size) for size in SIZES])
    cut = dict(inputs)
    cut["input_ids"] = inputs["input_ids"][:, :-3].clone()
    keys = spans_for(processor, inputs, "image").regions[-1].keys
    cut["input_ids"][1, keys.flatten()[-1]] = 20  # one placeholder less
    cut["attention_mask"] = inputs["attention_mask"][:, :-3]
    with pytest.raises(ValueError, match="spans_for: "):
        spans_for(processor, cut)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"granularity": "pixel"}, ValueError, "granularity must be one of"),
    ({"tile": (2, 2)}, ValueError, "tile needs granularity='tile'"),
    ({"granularity": "tile"}, ValueError, "tile must be"),
    ({"text": 1}, TypeError, "text must be a bool; got int"),
    ({"image_sizes": [(3, 4, 5)]}, ValueError, "image_sizes must hold"),
    ({"inputs": [1, 2]}, TypeError, "inputs must be what the processor returned; got list"),
    ({"inputs": {"input_ids": [[1]]}}, TypeError, "as a tensor"),
    ({"inputs": {"input_ids": torch.zeros(1, 2)}}, TypeError, "must be integers; got float32"),
    ({"inputs": {"input_ids": torch.zeros(1, 1, 2).long()}}, ValueError, "must be .B, N. or .N."),
    (
        {"inputs": {"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.ones(1, 3)}},
        ValueError,
        r"attention_mask must be \(1, 2\)",
    ),
]


@pytest.mark.parametrize("change, error, message", BAD)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    processor, inputs = processed("qwen2_5_vl", [blank(size) for size in SIZES])
    with pytest.raises(error, match=message):
        spans_for(processor, **{"inputs": inputs, **change})


def test_what_is_missing_is_named() -> None:
    from transformers import AutoConfig, LlamaConfig

    processor, inputs = processed("qwen2_5_vl", [blank(size) for size in SIZES])
    with pytest.raises(ValueError, match="image_grid_thw"):
        spans_for(processor, {"input_ids": inputs["input_ids"]})
    with pytest.raises(NotImplementedError, match=r"'idefics2'.*from_vision_grid"):
        spans_for(AutoConfig.for_model("idefics2"), inputs)
    video = AutoConfig.for_model("llava_next_video")
    with pytest.raises(
        NotImplementedError, match=r"LLaVA-NeXT-Video .* give the frames as several"
    ):
        spans_for(video, {"input_ids": torch.tensor([[1, video.video_token_id]])})
    with pytest.raises(NotImplementedError, match="'llama'"):
        spans_for(LlamaConfig(), inputs)
    with pytest.raises(NotImplementedError, match="'SimpleNamespace'"):
        spans_for(SimpleNamespace(tokenizer=None), inputs)
    with pytest.raises(TypeError, match="must be a processor, a model or its configuration"):
        spans_for("Qwen/Qwen2.5-VL", inputs)
    processor, inputs = processed("llava_onevision", [blank(size) for size in SIZES])
    with pytest.raises(ValueError, match="image_sizes"):
        spans_for(processor, {"input_ids": inputs["input_ids"]})
    processor, inputs = processed("internvl", [blank(size) for size in SIZES])
    with pytest.raises(ValueError, match="image_sizes must be given"):
        spans_for(processor, inputs, "token")
    with pytest.raises(ValueError, match="for each of the 3 images"):
        spans_for(processor, inputs, "token", image_sizes=SIZES[:2])
    assert isinstance(spans_for(processor, inputs, "image"), VisionSpans)
