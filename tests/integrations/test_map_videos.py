"""`attention_map` of videos: through the model's own video path, from every form of a video."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
from PIL import Image

from benchmarks.harness.photographs import load, pan
from ral_kernels import viz
from ral_kernels.integrations.transformers.attention_map import AttentionMap, attention_map
from ral_kernels.integrations.transformers.processors import images_only, load_processor
from ral_kernels.integrations.transformers.video_processor import FrameProcessor

from . import films, tiny_checkpoint, tiny_processors

ANSWER = "A cup of coffee."
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText

    folder = tiny_checkpoint.save(tmp_path_factory.mktemp("tiny-vl") / "Tiny-VL")
    return AutoModelForImageTextToText.from_pretrained(folder), load_processor(folder)


def frames(count: int, height: int = 56, width: int = 84) -> list[Image.Image]:
    return [frame.convert("RGB") for frame in pan(count, height, width)]


def stacked(pictures: list[Image.Image]) -> Any:
    return np.stack([np.asarray(picture) for picture in pictures])


def test_patches_of_a_step_are_those_of_its_frames() -> None:
    """Slot t of each patch is frame t's, as its image alone has it; the last frame is repeated."""
    pixels = tiny_checkpoint.image_processor()
    given = frames(3)
    made = FrameProcessor(pixels, {})(
        [stacked(given)], video_metadata=[{"total_num_frames": 3, "fps": 2.0}]
    )
    assert made["video_grid_thw"].tolist() == [[2, 4, 6]]
    assert made["video_metadata"][0].fps == 2.0
    alone = pixels(images=given, return_tensors="pt")["pixel_values"].view(3, 24, 3, 2, 14 * 14)
    steps = made["pixel_values_videos"].view(2, 24, 3, 2, 14 * 14)
    for step, pair in enumerate([(0, 1), (2, 2)]):
        for slot, frame in enumerate(pair):
            assert torch.equal(steps[step, :, :, slot], alone[frame, :, :, slot])
    assert not torch.equal(steps[0, :, :, 0], steps[0, :, :, 1])


@pytest.mark.parametrize(
    "together, count, grid",
    [(False, 2, [1, 20, 30]), (True, 2, [1, 14, 20]), (True, 8, [4, 6, 10])],
)
def test_pixels_are_limited(together: bool, count: int, grid: list[int]) -> None:
    """`size` is that of a frame, or, as in Qwen3-VL, of all together."""
    settings = {"size": {"shortest_edge": 784, "longest_edge": 784 * 160}}
    processor = FrameProcessor(tiny_checkpoint.image_processor(), settings, all_frames=together)
    video = stacked([load("coffee.png").resize((600, 400))] * count)
    assert processor([video])["video_grid_thw"].tolist() == [grid]
    smaller = processor([video], size={"longest_edge": 784 * 16})["video_grid_thw"][0].prod()
    assert smaller <= 4 * 16 * count


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("count", [2, 5, 8])
def test_few_grey_levels_from_torchvisions(count: int, together: bool) -> None:
    """The same grids as transformers' own video processors, and pixels of their rounding."""
    from transformers.utils.import_utils import is_torchvision_available

    if not is_torchvision_available():
        pytest.skip("torchvision is not installed")
    from transformers import Qwen2VLVideoProcessor, Qwen3VLVideoProcessor

    side, own = (32, Qwen3VLVideoProcessor) if together else (28, Qwen2VLVideoProcessor)
    size = {"shortest_edge": 4 * side**2, "longest_edge": 160 * side**2}
    pixels = tiny_checkpoint.image_processor()
    pixels.patch_size = side // 2
    for height, width in ((200, 300), (400, 150), (61, 500)):
        video = stacked(frames(count, height, width))
        wanted = own(size=size, image_mean=pixels.image_mean, image_std=pixels.image_std)(
            [video], return_tensors="pt", do_sample_frames=False
        )
        got = FrameProcessor(pixels, {"size": size}, all_frames=together)([video])
        assert got["video_grid_thw"].tolist() == wanted["video_grid_thw"].tolist()
        off = (got["pixel_values_videos"] - wanted["pixel_values_videos"]).abs()
        levels = 255 * max(pixels.image_std) * off
        assert float(levels.max()) < 6 and float(levels.mean()) < 0.3


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_equal_to_eager(family: str) -> None:
    """Grids are eager's attention at the placeholders of each step of time."""
    processor = tiny_processors.build(family)
    model = tiny_processors.model_for(family, processor, "eager")
    given = stacked(frames(6))
    seen: dict[str, Any] = {}
    hook = model.register_forward_pre_hook(
        lambda module, args, options: seen.update(options), with_kwargs=True
    )
    prompt = f"{VIDEO if family == 'qwen2_5_vl' else '<|video_pad|>'} What is in the picture?"
    made = attention_map(
        model, processor, videos=given, fps=4, prompt=prompt, response=ANSWER, layers=[0, 1]
    )
    hook.remove()
    if family == "qwen2_5_vl":  # a step of two frames, four frames a second
        assert seen["second_per_grid_ts"].tolist() == [0.5]
    else:
        text = processor.tokenizer.decode(seen["input_ids"][0])
        assert all(f"<{time} seconds>" in text for time in ("0.1", "0.6", "1.1"))
    with torch.no_grad():
        attentions = model(**{**seen, "output_attentions": True}).attentions
    heads = torch.stack([attention[0].double().mean(0) for attention in attentions])
    ids = seen["input_ids"][0]
    keys = (ids == model.config.video_token_id).nonzero().flatten().view(3, -1)
    rows = range(len(ids) - len(made.tokens), len(ids))
    for number, row in enumerate(rows):
        policies = heads[:, row].clone()
        policies[:, row] = 0
        policy = (policies / policies.sum(-1, keepdim=True)).mean(0)
        for step in range(3):
            wanted = policy[keys[step]].view(made.grids[step].shape[1:])
            assert torch.allclose(made.grids[step][number].double(), wanted, atol=1e-5)
            share = float(made.image_shares[number, step])
            assert share == pytest.approx(float(wanted.sum()), abs=1e-5)
    assert made.kinds == ("frame",) * 3 and made.times == (0.0, 0.5, 1.0)
    assert made.images[1].size == (84, 56)
    assert np.array_equal(np.asarray(made.images[1]), given[2])


def test_every_form_of_a_video(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = tiny
    given = frames(4)
    given[0].save(
        tmp_path / "a.webp", save_all=True, append_images=given[1:], duration=500, lossless=True
    )
    array = stacked(given)
    question = {"type": "text", "text": "What?"}
    in_chat: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "video", "video": array}, question]}
    ]
    by_path = [
        {"role": "user", "content": [{"type": "video", "path": tmp_path / "a.webp"}, question]}
    ]
    in_url = [
        {
            "role": "user",
            "content": [{"type": "video", "url": f"file://{tmp_path}/a.webp", "fps": 2}, question],
        }
    ]
    forms: list[dict[str, Any]] = [
        {"videos": array, "prompt": "What?"},
        {"videos": [torch.from_numpy(array)], "prompt": "What?"},
        {"videos": given, "prompt": "What?"},
        {"videos": tmp_path / "a.webp", "prompt": "What?"},
        {"videos": [str(tmp_path / "a.webp")], "prompt": "What?"},
        {"videos": viz.read_video(tmp_path / "a.webp"), "prompt": "What?"},
        {"prompt": in_chat},
        {"prompt": by_path},
        {"prompt": in_url},
    ]  # fmt: skip
    maps = [attention_map(model, processor, response="A", **form) for form in forms]
    for made in maps:
        assert made.times == (0.0, 1.0) and made.prompt == "What?"
        assert all(torch.equal(a, b) for a, b in zip(made.grids, maps[0].grids, strict=True))
    spread = attention_map(
        model, processor, videos=array, fps=4, num_frames=2, prompt="What?", response="A"
    )
    assert spread.times == (0.0,) and np.array_equal(np.asarray(spread.images[0]), array[0])
    assert in_chat[0]["content"][0]["video"] is array  # the caller's messages are left alone


def test_an_mp4(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    pytest.importorskip("av")
    film = films.write(tmp_path / "film.mp4", films.steps(30, (84, 56)))
    made = attention_map(*tiny, videos=film, prompt="What?", response="A", num_frames=4)
    assert made.times == pytest.approx((0.0, 1.9))
    assert [films.number_of(image, 30) for image in made.images] == [0, 19]
    every = attention_map(*tiny, videos=film, prompt="What?", response="A", fps=4)
    assert len(every.grids) == 6
    as_images = attention_map(
        *tiny, viz.read_video(film, num_frames=4), prompt="What?", response="A"
    )
    assert as_images.kinds == ("frame",) * 4 and as_images.times[1] == pytest.approx(1.0)
    assert as_images.name(1) == "frame 2, 1.0 s"
    one = attention_map(*tiny, film, prompt="What?", response="A")
    assert one.kinds == ("image",) and films.number_of(one.images[0], 30) == 0


def test_images_and_videos_in_any_order(tiny: tuple[Any, Any]) -> None:
    """Each map lies at the place of its own media."""
    model, processor = tiny
    picture, film = load("coffee.png").resize((112, 56)), stacked(frames(4))
    first = attention_map(
        model, processor, [picture], f"{IMAGE} and {VIDEO} What?", videos=film, response="A"
    )
    last = attention_map(
        model, processor, [picture], f"{VIDEO} and {IMAGE} What?", videos=film, response="A"
    )
    assert first.kinds == ("image", "frame", "frame")
    assert last.kinds == ("frame", "frame", "image")
    assert [tuple(grid.shape[1:]) for grid in first.grids] == [(2, 4), (2, 3), (2, 3)]
    assert [tuple(grid.shape[1:]) for grid in last.grids] == [(2, 3), (2, 3), (2, 4)]
    assert [image.size for image in last.images] == [(84, 56), (84, 56), (112, 56)]
    in_chat = attention_map(
        model,
        processor,
        prompt=[
            {"role": "system", "content": "Be short."},
            {
                "role": "user",
                "content": [
                    {"type": "video", "video": film},
                    {"type": "image", "image": picture},
                    {"type": "text", "text": "What?"},
                ],
            },
        ],
        response="A",
    )
    assert in_chat.kinds == last.kinds
    total = in_chat.image_shares.sum(-1) + in_chat.text_shares
    assert torch.allclose(total, torch.ones(1), atol=1e-5)


def chat(*parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"prompt": "What?"}, ValueError, "images must hold at least one picture; got none"),
    ({"videos": 3, "prompt": "What?"}, TypeError, "videos must be files, .* got int"),
    ({"videos": np.zeros((2, 8, 8, 3)), "prompt": "What?"}, ValueError, r"uint8 \[T, H, W, 3\]"),
    ({"videos": np.zeros((0, 8, 8, 3), np.uint8), "prompt": "What?"}, ValueError, "one frame"),
    (
        {"videos": [Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))], "prompt": "What?"},
        ValueError,
        "frames of a video must have one size",
    ),
    (
        {"videos": "https://a.invalid/b.mp4", "prompt": "What?"},
        ValueError,
        "media must be local files; download 'https://a.invalid/b.mp4' first",
    ),
    (
        {"prompt": chat({"type": "image", "image": Image.new("RGB", (28, 28))}, {"type": "image"})},
        ValueError,
        "each image and video part of prompt must hold its media, or none may; got 1 that do and 1",
    ),
    (
        {
            "images": Image.new("RGB", (28, 28)),
            "prompt": chat({"type": "image", "image": Image.new("RGB", (28, 28))}),
        },
        ValueError,
        "images and videos must be None where the messages hold them; got both",
    ),
    ({"videos": "a.mp4", "fps": 0, "prompt": "What?"}, ValueError, "fps must be positive"),
    ({"images": Image.new("RGB", (28, 28))}, TypeError, "prompt must be text or messages"),
]


@pytest.mark.parametrize("given, error, message", REFUSED)
def test_what_is_refused(
    tiny: tuple[Any, Any], given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"attention_map: .*{message}"):
        attention_map(*tiny, response="A", **given)


def test_a_family_without_videos_says_what_to_do() -> None:
    processor = tiny_processors.build("gemma3")
    model = tiny_processors.model_for("gemma3", processor)
    with pytest.raises(NotImplementedError, match=r"Gemma3Processor.*viz.read_video\(file\)"):
        attention_map(
            model, processor, prompt="<boi>What?", videos=stacked(frames(2)), response="A"
        )


def test_the_checkpoints_video_settings_are_read(tmp_path: Path) -> None:
    folder = tiny_checkpoint.save(tmp_path)
    assert load_processor(folder).video_processor.size["longest_edge"] == 784 * 160
    (folder / "video_preprocessor_config.json").write_text(
        '{"size": {"shortest_edge": 784, "longest_edge": 7840}}'
    )
    assert load_processor(folder).video_processor.size == {
        "shortest_edge": 784, "longest_edge": 7840,
    }  # fmt: skip


def test_processors_of_other_families_have_none() -> None:
    from transformers import InternVLProcessor

    made = images_only(
        InternVLProcessor,
        tiny_checkpoint.image_processor(),
        tiny_checkpoint.tokenizer(
            start_image_token="<img>", end_image_token="</img>", context_image_token="<ctx>",
            video_token="<video>",
        ),
    )  # fmt: skip
    assert made.video_processor is None


def test_the_name_of_the_model(tiny: tuple[Any, Any]) -> None:
    made: AttentionMap = attention_map(*tiny, load("coffee.png"), "What?", response=ANSWER)
    assert made.model == "Tiny-VL" and made.source == "layer 1 of Tiny-VL"
    assert repr(made).startswith(
        f"AttentionMap({len(made.tokens)} tokens 'A cup of coffee.', 1 image, layer 1 of Tiny-VL, "
    )
    assert "\n" not in repr(made)
