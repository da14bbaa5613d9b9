"""`attention_map` against eager's attentions, and against attention that was planted."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")

from benchmarks.harness.photographs import load
from ral_kernels import viz
from ral_kernels.integrations.transformers.attention_map import (
    AttentionMap,
    _spread,
    attention_map,
)
from ral_kernels.integrations.transformers.map_inputs import gather, model_inputs
from ral_kernels.integrations.transformers.processors import load_processor, token_texts

from . import planted, tiny_checkpoint, tiny_processors

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "gemma3", "internvl", "llava_onevision")
ANSWER = "A cup of coffee."


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.save(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def tiny(checkpoint: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(checkpoint, attn_implementation="eager")
    return model, load_processor(checkpoint)


def question(family: str, images: int) -> str:
    return " ".join([tiny_processors.PLACEHOLDER[family]] * images) + " What is in the picture?"


def eager_policy(attention: torch.Tensor, row: int) -> torch.Tensor:
    """Equation (1) for one row of a head-averaged attention matrix: its own key left out."""
    policy = attention[row].clone()
    policy[row] = 0
    return policy / policy.sum()


@pytest.mark.parametrize("rows", ["writing", "reading"])
@pytest.mark.parametrize("family", (*FAMILIES, "idefics3", "smolvlm", "llava_next"))
def test_equal_to_eager(family: str, rows: str) -> None:
    """Grids and shares are eager's attention, read at the keys where placeholders stand."""
    processor = tiny_processors.build(family)
    model = tiny_processors.model_for(family, processor, "eager")
    images = [load("coffee.png"), load("astronaut.png")]
    prompt = question(family, 2)
    made = attention_map(
        model, processor, images, prompt, response=ANSWER, layers=[0, 1], rows=rows
    )
    inputs = dict(processor(images=[images], text=[prompt], return_tensors="pt"))
    length = inputs["input_ids"].shape[1]
    ids = processor.tokenizer(ANSWER, return_tensors="pt")["input_ids"]
    for name, value in list(inputs.items()):
        if isinstance(value, torch.Tensor) and value.shape == (1, length):
            added = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}.get(
                name, torch.zeros_like(ids)
            )
            inputs[name] = torch.cat([value, added], dim=1)
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    heads = [attention[0].double().mean(0) for attention in attentions]
    image = inputs["input_ids"][0] == model.config.image_token_id
    count = ids.shape[1]
    assert made.layers == (0, 1) and len(made.tokens) == count
    for number in range(count):
        row = length + number - (rows == "writing")
        wanted = torch.stack([eager_policy(attention, row) for attention in heads]).mean(0)
        assert made.text_shares[number] == pytest.approx(float(wanted[~image].sum()), abs=1e-5)
        assert made.image_shares[number].sum() == pytest.approx(
            float(wanted[image].sum()), abs=1e-5
        )
        if family.startswith("qwen") or family == "gemma3":  # every placeholder is in one grid
            cells = torch.cat([grid[number].flatten() for grid in made.grids])
            assert torch.allclose(cells.double(), wanted[image], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_add_up(family: str) -> None:
    processor = tiny_processors.build(family)
    model = tiny_processors.model_for(family, processor)
    images = [load("coffee.png"), load("astronaut.png"), load("rocket.jpg")]
    for pictures in (images, images[:1]):
        made = attention_map(
            model, processor, pictures, question(family, len(pictures)), max_new_tokens=3,
            generate_options={"suppress_tokens": [model.config.image_token_id]},
        )  # fmt: skip
        count = len(made.tokens)
        assert count == 3 and len(made.grids) == len(made.boxes) == len(pictures)
        total = made.image_shares.sum(-1) + made.text_shares
        assert torch.allclose(total, torch.ones(count), atol=1e-5)
        for image, grid in enumerate(made.grids):
            assert grid.dtype == torch.float32 and grid.shape[0] == count and (grid >= 0).all()
            inside = grid.sum((1, 2))
            assert (inside <= made.image_shares[:, image] + 1e-6).all()
            if family != "llava_onevision":  # whose newlines are in no grid
                assert torch.allclose(inside, made.image_shares[:, image], atol=1e-6)
    if family == "internvl":
        assert made.grids[0].shape[1:] == (4, 6)  # the tiles' grid, not the thumbnail's 2 x 2


def test_generation_is_that_of_generate(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    image = load("coffee.png")
    called: list[int] = []
    made = attention_map(
        model, processor, image, "What is it?", max_new_tokens=5,
        on_token=lambda: called.append(1),
    )  # fmt: skip
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=[image], text=[text], return_tensors="pt")
    wanted = model.generate(
        **inputs, max_new_tokens=5, do_sample=False, output_attentions=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    length = inputs["input_ids"].shape[1]
    assert torch.equal(made.token_ids, wanted.sequences[0, length:])
    assert len(called) == len(made.tokens) == 5
    visual = inputs["input_ids"][0] == model.config.image_token_id
    # Step t of generate is the query that writes token t.
    for number, step in enumerate(wanted.attentions):
        attention = step[-1][0, :, -1].double().mean(0)
        own = length + number - 1
        policy = attention / (attention.sum() - attention[own])
        cells = made.grids[0][number].flatten().double()
        assert torch.allclose(cells, policy[:length][visual], atol=1e-5)
    # The same tokens given as a response have the same maps.
    again = attention_map(model, processor, image, "What is it?", response=ANSWER)
    assert again.text == ANSWER and again.tokens[:2] == ("A", " cup")


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("at", [(0, 0), (2, 11), (9, 14), (7, 3)])
def test_planted_attention_is_where_it_was_planted(
    at: tuple[int, int], attn_implementation: str, tmp_path: Path
) -> None:
    model, processor = planted.model_and_processor(attn_implementation)
    images = [planted.picture(4, 6, None), planted.picture(10, 15, at)]
    made = attention_map(model, processor, images, "Where?", response="The cat")
    assert [tuple(grid.shape[1:]) for grid in made.grids] == [(4, 6), (10, 15)]
    peak = at[0] * 15 + at[1]
    assert made.grids[1].flatten(1).argmax(1).tolist() == [peak] * len(made.tokens)
    cells = made.grids[1].flatten(1)
    assert (cells[:, peak] > 50 * cells.median(1).values).all()

    # On black pictures: what is bright there is the map, not the white square.
    black = planted.picture(10, 15, None)
    made = replace(made, images=(black, black))
    inside = lambda y, x, height, width: (  # noqa: E731
        at[0] <= y / height * 10 < at[0] + 1 and at[1] <= x / width * 15 < at[1] + 1
    )
    shown = viz.blend(black, made.grids[1][0], float(cells.max()))
    assert shown.shape == (280, 420, 3)
    brightest = shown.astype(int).sum(-1).argmax()
    assert inside(*np.unravel_index(brightest, shown.shape[:2]), 280, 420)

    # And in the figure, read back from its pixels.
    figure = viz.overlay(made, 1, 0, path=tmp_path / "map.png")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    box = figure.axes[0].get_window_extent()
    height = round(box.y1 - box.y0)
    top = drawn.shape[0] - round(box.y1)
    panel = drawn[top : top + height, round(box.x0) : round(box.x1)]
    panel = panel[2:-2, 2:-2]  # the panel's edge is mixed with the white around it
    y, x = np.unravel_index(panel.sum(-1).argmax(), panel.shape[:2])
    assert inside(y + 2, x + 2, height, panel.shape[1] + 4)
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_planted_frame_has_the_largest_share() -> None:
    model, processor = planted.model_and_processor()
    frames = [planted.picture(4, 6, (1, 4) if frame == 2 else None) for frame in range(5)]
    made = attention_map(model, processor, frames, "When?", response="The cat")
    assert made.image_shares.argmax(1).tolist() == [2] * len(made.tokens)
    figure = viz.film_strip(made, 0)
    heights = [
        bar.get_height() for axes in figure.axes for group in axes.containers for bar in group
    ]
    assert max(range(5), key=lambda frame: heights[frame]) == 2
    heat: Any = viz.token_frame(made).axes[0].images[0].get_array()
    assert heat.shape == (len(made.tokens), 5) and heat.argmax(1).tolist() == [2] * len(heat)


def test_spread_keeps_sums() -> None:
    assert torch.equal(_spread(3, 3), torch.eye(3))
    for coarse, fine in ((2, 6), (4, 6), (3, 5), (16, 10)):
        spread = _spread(coarse, fine)
        assert torch.allclose(spread.sum(0), torch.ones(coarse), atol=1e-5)
        assert (spread >= 0).all() and bool((spread[0, 1:].sum() == 0) or fine < coarse)
    assert torch.allclose(_spread(2, 4) @ torch.tensor([2.0, 6.0]), torch.tensor([1.0, 1, 3, 3]))


def test_tokens_can_be_read() -> None:
    tokenizer = tiny_checkpoint.tokenizer()
    ids = tokenizer("The cup né\n漢 $x$<|im_end|>")["input_ids"]
    assert token_texts(tokenizer, ids) == [
        "The", " cup", " ", "n", "é 1/2", "é 2/2", "\n", "漢 1/3", "漢 2/3", "漢 3/3", " ",
        "$", "x", "$", "<|im_end|>",
    ]  # fmt: skip
    lone = tokenizer.convert_tokens_to_ids("Ã")  # the first byte of é, and no second
    assert token_texts(tokenizer, [lone, ids[0]]) == ["<0xC3>", "The"]
    assert token_texts(tokenizer, []) == []
    with pytest.raises(TypeError, match="must hold ints"):
        token_texts(tokenizer, ["The"])  # type: ignore[list-item]


def test_load_processor(checkpoint: Path, tmp_path: Path) -> None:
    """Torchvision or not, images and chat work; and what the processor writes, it reads again."""
    processor = load_processor(checkpoint)
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    assert processor.chat_template == tiny_checkpoint.CHAT_TEMPLATE
    inputs = processor(images=[load("coffee.png")], text=["<|image_pad|>"], return_tensors="pt")
    assert inputs["pixel_values"].shape[0] == 4 * inputs["input_ids"].shape[1]
    with pytest.raises((OSError, ValueError)):
        load_processor(tmp_path)
    copy = tmp_path / "copy"
    processor.save_pretrained(copy)
    shutil.copy(checkpoint / "config.json", copy)
    again = load_processor(copy)
    assert again.chat_template == processor.chat_template
    for name, value in again(
        images=[load("coffee.png")], text=["<|image_pad|>"], return_tensors="pt"
    ).items():
        assert torch.equal(value, inputs[name])


def test_load_processor_hides_no_other_import_error(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoProcessor

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("no sentencepiece")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", broken)
    with pytest.raises(ImportError, match="sentencepiece"):
        load_processor(checkpoint)


def test_select(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    made = attention_map(model, processor, load("coffee.png"), "What?", response=ANSWER)
    part = made.select([3, 1])
    assert part.tokens == (made.tokens[3], made.tokens[1])
    assert torch.equal(part.grids[0], made.grids[0][[3, 1]])
    for bad in ([], [99]):
        with pytest.raises(IndexError, match="tokens must lie in"):
            made.select(bad)


def test_images_prompts_and_defaults(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = tiny
    picture = load("chelsea.png")
    picture.save(tmp_path / "cat.png")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    raw = "<|vision_start|><|image_pad|><|vision_end|>"
    chat = f"<|im_start|>user\n{raw}What?<|im_end|>\n<|im_start|>assistant\n"
    maps: list[AttentionMap] = [
        attention_map(model, processor, images, prompt, response=ANSWER)
        for images, prompt in (
            (picture, "What?"),
            ([str(tmp_path / "cat.png")], messages),
            (np.asarray(picture), chat),
            (torch.from_numpy(np.array(picture)), "What?"),
        )
    ]
    assert all(torch.equal(made.grids[0], maps[0].grids[0]) for made in maps)
    with_self = attention_map(
        model, processor, picture, "What?", response=ANSWER, exclude_self=False
    )
    assert (with_self.image_shares < maps[0].image_shares).all()


def test_a_map_lies_as_the_picture_is_seen(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    """A phone stores pictures on their side, and says so in EXIF."""
    model, processor = tiny
    scene = load("coffee.png").resize((112, 56))
    exif = Image.Exif()
    exif[0x0112] = 6
    scene.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    with Image.open(tmp_path / "phone.png") as opened:
        maps = [
            attention_map(model, processor, picture, "What?", response=ANSWER)
            for picture in (scene, tmp_path / "phone.png", opened)
        ]
    rows, columns = maps[0].grids[0].shape[1:]
    assert columns == 2 * rows
    for made in maps:
        assert made.images[0].size == (112, 56)
        assert made.grids[0].equal(maps[0].grids[0])


def test_the_model_is_left_as_it_was(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    hooks = [len(module._forward_hooks) for module in model.modules()]
    config = model.config.to_dict()
    made = attention_map(model, processor, load("coffee.png"), "What?", response=ANSWER)
    assert not made.grids[0].requires_grad
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert model.config.to_dict() == config
    for layer in model.model.language_model.layers:
        assert layer.self_attn.config._attn_implementation == "eager"


def test_only_the_formats_that_are_named_are_opened(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    """Pillow hands an EPS, whatever it is called, to Ghostscript."""
    eps = tmp_path / "a.png"
    eps.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n")
    with pytest.raises(viz.PictureError, match="cannot identify image file"):
        attention_map(*tiny, eps, "What?", response=ANSWER)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"images": []}, ValueError, "images must hold at least one picture; got none"),
    ({"images": 3}, TypeError, "images must be Pillow images, files or uint8 arrays; got int"),
    ({"images": np.zeros((4, 4))}, ValueError, "must be uint8"),
    ({"prompt": 3}, TypeError, "prompt must be text or messages; got int"),
    ({"response": 3}, TypeError, "response must be None or a str; got int"),
    ({"response": ""}, ValueError, "at least one token"),
    ({"response": "A <|image_pad|>"}, ValueError, "must not hold the placeholder of images; token"),
    ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be an int >= 1; got 0"),
    ({"rows": "both"}, ValueError, "rows must be one of writing, reading; got 'both'"),
    ({"layers": 9}, ValueError, "layers"),
]


@pytest.mark.parametrize("change, error, message", BAD)
def test_bad_input(
    tiny: tuple[Any, Any], change: dict[str, Any], error: type[Exception], message: str
) -> None:
    model, processor = tiny
    given = {"images": load("coffee.png"), "prompt": "What?", "response": "A", **change}
    with pytest.raises(error, match=message):
        attention_map(model, processor, given.pop("images"), given.pop("prompt"), **given)


def test_bad_layers_are_refused_before_generating(
    tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny
    monkeypatch.setattr(model, "generate", lambda **_: pytest.fail("it generated"))
    with pytest.raises(ValueError, match="layers"):
        attention_map(model, processor, load("coffee.png"), "What?", layers=7)


@pytest.mark.parametrize("text, wanted", [("<s><ctx>What?", False), ("<ctx>What?", None)])
def test_a_template_that_begins_the_text_does_it_alone(text: str, wanted: bool | None) -> None:
    """Gemma 3's writes <bos>, and the tokenizer would write another."""
    processor = tiny_processors.build("internvl")
    processor.tokenizer.bos_token = "<s>"
    seen: list[Any] = []
    original = type(processor).__call__

    class Watched(type(processor)):  # type: ignore[misc]
        def __call__(self, *args: Any, **options: Any) -> Any:
            seen.append(options.get("add_special_tokens"))
            return original(self, *args, **options)

    processor.__class__ = Watched
    model = tiny_processors.model_for("internvl", processor)
    media, _ = gather([load("coffee.png")], None, text, None, None)
    model_inputs(model, processor, media, text, {})
    assert seen == [wanted]


def test_a_processor_without_a_chat_template_is_refused() -> None:
    processor = tiny_processors.build("internvl")
    model = tiny_processors.model_for("internvl", processor)
    with pytest.raises(ValueError, match=r"chat template, or prompt hold '<ctx>'"):
        attention_map(model, processor, load("coffee.png"), "What?", response="A")


def test_pan_and_scan_is_refused() -> None:
    processor = tiny_processors.build("gemma3")
    model = tiny_processors.model_for("gemma3", processor)
    options = {
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 20,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }
    with pytest.raises(ValueError, match="pan and scan: turn it off"):
        attention_map(
            model, processor, load("coffee.png"), "<boi>What?", response="A",
            processor_options=options,
        )  # fmt: skip
