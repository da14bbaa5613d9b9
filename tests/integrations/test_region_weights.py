"""`region_weights` against the pixels that real processors made: which tokens see a bright box."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ral_kernels as rk

pytest.importorskip("transformers")
from PIL import Image

from ral_kernels import viz
from ral_kernels.media.masks import read_mask

from . import tiny_processors

FAMILIES = tuple(tiny_processors.PLACEHOLDER)
Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels

pytestmark = pytest.mark.usefixtures("one_thread")


def picture(size: tuple[int, int], *boxes: Box) -> Image.Image:
    """Black, with white boxes; size is (height, width)."""
    made = Image.new("RGB", (size[1], size[0]))
    for box in boxes:
        made.paste((255, 255, 255), box)
    return made


def processed(family: str, pictures: list[list[Image.Image]], **options: Any) -> tuple[Any, Any]:
    """One prompt a list of pictures."""
    processor = tiny_processors.build(family, **options)
    processor.tokenizer.padding_side = "left"
    mark = tiny_processors.PLACEHOLDER[family]
    texts = [f"The {mark * len(row)} cat" + " cat" * i for i, row in enumerate(pictures)]
    inputs = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    return processor, inputs


# What a token sees is the mean of its pixels: from `pixel_values`, by the family's own code.


def _bright(family: str, processor: Any, pixels: Tensor) -> Tensor:
    """[..., C, H, W] as shares of white."""
    settings = processor.image_processor
    mean, std = (torch.tensor(x)[:, None, None] for x in (settings.image_mean, settings.image_std))
    return (pixels * std + mean).mean(-3)


def seen_by_qwen(family: str, processor: Any, inputs: Any) -> list[Tensor]:
    patch = processor.image_processor.patch_size
    patches = inputs["pixel_values"].unflatten(-1, (3, 2, patch, patch)).mean(2)
    tokens = _bright(family, processor, patches).mean((-1, -2)).view(-1, 4).mean(-1)
    return list(tokens.split((inputs["image_grid_thw"].prod(-1) // 4).tolist()))


def seen_by_squares(family: str, processor: Any, inputs: Any) -> list[Tensor]:
    """Gemma 3 and InternVL: every picture, crop, tile and thumbnail is a square of 2 x 2 tokens."""
    bright = _bright(family, processor, inputs["pixel_values"])
    return [tile.unflatten(0, (2, -1)).unflatten(2, (2, -1)).mean((1, 3)) for tile in bright]


def seen_by_onevision(family: str, processor: Any, inputs: Any) -> list[Tensor]:
    """Through the model's own unpadding, interpolation and newlines."""
    model = tiny_processors.model_for(family, processor).model
    side = math.isqrt(processor.num_image_tokens)
    bright = _bright(family, processor, inputs["pixel_values"])
    tokens = bright.unflatten(-1, (side, -1)).unflatten(-3, (side, -1)).mean((-1, -3)).flatten(-2)
    from transformers.image_processing_utils import select_best_resolution

    settings = processor.image_processor
    alone = [n == 1 for n in inputs["batch_num_images"].tolist() for _ in range(n)]
    pieces = []
    for size, each, single in zip(inputs["image_sizes"].tolist(), tokens, alone, strict=True):
        best = select_best_resolution(size, settings.image_grid_pinpoints)
        tiles = math.prod(edge // tiny_processors.SIDE for edge in best)
        pieces.append(each[: 1 + tiles if single else 1, :, None])
    packed, _ = model.pack_image_features(
        pieces, inputs["image_sizes"], torch.zeros(1), processor.vision_aspect_ratio
    )
    return [each[:, 0] for each in packed]


def seen_by_tiles(family: str, processor: Any, inputs: Any) -> list[Tensor]:
    """Idefics 3 and SmolVLM: squares again, of which a sample with fewer has none at its end."""
    there = inputs["pixel_attention_mask"].flatten(0, 1).flatten(1).any(-1)
    tiles = inputs["pixel_values"].flatten(0, 1)[there]
    return seen_by_squares(family, processor, {"pixel_values": tiles})


def seen_by_next(family: str, processor: Any, inputs: Any) -> list[Tensor]:
    """Through the model's own unpadding and newlines."""
    model = tiny_processors.model_for(family, processor).model
    side = tiny_processors.SIDE // processor.patch_size
    bright = _bright(family, processor, inputs["pixel_values"])
    tokens = bright.unflatten(-1, (side, -1)).unflatten(-3, (side, -1)).mean((-1, -3)).flatten(-2)
    from transformers.image_processing_utils import select_best_resolution

    pieces = []
    for size, each in zip(inputs["image_sizes"].tolist(), tokens, strict=True):
        best = select_best_resolution(size, processor.image_processor.image_grid_pinpoints)
        tiles = math.prod(edge // tiny_processors.SIDE for edge in best)
        pieces.append(each[: 1 + tiles, :, None])
    packed, _ = model.pack_image_features(pieces, inputs["image_sizes"], "default", torch.zeros(1))
    return [each[:, 0] for each in packed]


SEEN: dict[str, Callable[[str, Any, Any], list[Tensor]]] = {
    "qwen2_vl": seen_by_qwen,
    "qwen2_5_vl": seen_by_qwen,
    "qwen3_vl": seen_by_qwen,
    "gemma3": seen_by_squares,
    "internvl": seen_by_squares,
    "llava_onevision": seen_by_onevision,
    "idefics3": seen_by_tiles,
    "smolvlm": seen_by_tiles,
    "llava_next": seen_by_next,
}
SIZES = [(240, 280), (260, 168), (168, 196), (91, 300)]  # height, width
BOXES: list[Box] = [(31, 90, 162, 201), (60, 12, 117, 85), (0, 0, 105, 60), (200, 20, 300, 71)]


def brightness(family: str, processor: Any, inputs: Any) -> Tensor:
    """[B, N]: the mean of what each token of the prompt sees, 1 for white."""
    found = torch.zeros(inputs["input_ids"].shape)
    visual = rk.spans_for(processor, inputs, "image").spans.ids >= 0
    seen = SEEN[family](family, processor, inputs)
    found[visual] = torch.cat([tokens.flatten() for tokens in seen]).float()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_what_the_tokens_see(family: str) -> None:
    """Alone, so that a family that tiles does; and two pictures in one prompt."""
    pictures = [picture(size, box) for size, box in zip(SIZES, BOXES, strict=True)]
    batch = [pictures[:1], pictures[1:2], pictures[2:]]
    processor, inputs = processed(family, batch)
    regions: list[Any] = [
        [{"image": 0, "box": BOXES[0]}],
        [{"image": 0, "box": BOXES[1]}],
        [[{"image": 0, "box": BOXES[2]}, {"image": 1, "box": BOXES[3]}], {"image": 1}],
    ]
    found = rk.region_weights(processor, inputs, regions, image_sizes=SIZES)
    black = processed(family, [[picture(p.size[::-1]) for p in row] for row in batch])[1]
    seen = brightness(family, processor, inputs) - brightness(family, processor, black)
    dense = found.dense(inputs["input_ids"].shape[1])
    # Resampling moves an edge by parts of a pixel of what the model is given.
    assert (dense[:, 0] - seen).abs().max() < 0.03
    assert dense[:, 0].max() > 0.7 and (dense[:2, 1] == 0).all()
    for grid in found.grids:  # the whole of a picture: all of its tokens, but for padding
        if (grid.sample, grid.item) == (2, 1):
            top, left, bottom, right = grid.box
            inside = (min(bottom, 1) - max(top, 0)) / (bottom - top)
            inside *= (min(right, 1) - max(left, 0)) / (right - left)
            assert found.on_grid(grid, 1).mean() == pytest.approx(inside)
    for sample in range(3):  # ready for a target: ascending, and nothing where there is none
        ids, values = found.ids[sample, 0], found.values[sample, 0]
        assert ((ids >= 0) == (values > 0)).all() and (ids[ids >= 0].diff() > 0).all()


@pytest.mark.parametrize(
    "size, box", [((100, 304), (110, 20, 216, 85)), ((211, 60), (10, 60, 49, 207))]
)
def test_crops_of_gemma3(size: tuple[int, int], box: Box) -> None:
    """Pan and scan: the small picture and its crops both see the box. The last crop is smaller."""
    processor = tiny_processors.build("gemma3")
    options = {
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 20,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }
    inputs = processor(
        images=[[picture(size, box)]], text=["<boi> cat"], return_tensors="pt", **options
    )
    inputs["num_crops"] = torch.tensor([len(inputs["pixel_values"]) - 1])
    found = rk.region_weights(processor, inputs, [[{"image": 0, "box": box}]], image_sizes=[size])
    assert [grid.view for grid in found.grids] == [0, 1]
    assert max(found.grids[1].keys.shape) >= 6
    dense = found.dense(inputs["input_ids"].shape[1])[:, 0]
    assert (dense - brightness("gemma3", processor, inputs)).abs().max() < 0.01


def a_video(family: str, frames: list[Image.Image]) -> tuple[Any, Any]:
    processor = tiny_processors.build(family)
    mark = tiny_processors.PLACEHOLDER[family].replace("image", "video")
    if family == "qwen3_vl":  # which writes them around each frame
        mark = "<|video_pad|>"
    inputs = processor(
        text=[f"The {mark} cat"],
        videos=[np.stack([np.asarray(frame) for frame in frames])],
        video_metadata=[{"total_num_frames": 5, "fps": 2.0, "frames_indices": list(range(5))}],
        do_sample_frames=False,
        return_tensors="pt",
    )
    return processor, inputs


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_frames_of_a_video_are_those_that_the_processor_was_given(family: str) -> None:
    """Two frames are a step of time. Of a step with one frame of the region, half is covered."""
    size, box = (120, 168), (31, 22, 90, 71)
    shown = [picture(size, box) if frame in (1, 2, 3) else picture(size) for frame in range(5)]
    processor, inputs = a_video(family, shown)
    region = {"video": 0, "frames": [1, 3], "box": box}
    found = rk.region_weights(processor, inputs, [[region, {"frames": [4, 4]}, {"video": 0}]],
                              image_sizes=[(5, *size)])  # fmt: skip
    patch = processor.image_processor.patch_size
    patches = inputs["pixel_values_videos"].unflatten(-1, (3, 2, patch, patch))
    bright = _bright(family, processor, patches.transpose(1, 2)).mean((-1, -2, -3))
    seen = torch.zeros(inputs["input_ids"].shape[1])
    tokens = torch.cat([grid.keys.flatten() for grid in found.grids])
    seen[tokens] = bright.view(-1, 4).mean(-1)
    dense = found.dense(len(seen))[0]
    assert (dense[0] - seen).abs().max() < 0.03
    of_step = [found.on_grid(grid).max() for grid in found.grids]
    assert of_step == [0.5, 1.0, 0.0]  # frames 0 and 1, 2 and 3, and 4 twice
    assert [found.on_grid(grid, 1).mean() for grid in found.grids] == [0.0, 0.0, 1.0]
    assert (dense[2] > 0).sum() == len(tokens)
    still = rk.region_weights(processor, inputs, [[region]], image_sizes=[(5, *size)], sigma=1.0)
    assert still.on_grid(found.grids[2]).sum() == 0  # never across frames
    moved = rk.region_weights(
        processor, inputs, [[region]], image_sizes=[(5, *size)], frame_sigma=1.0
    )  # unless asked
    assert moved.on_grid(found.grids[2]).sum() > 0
    assert moved.values.sum() == pytest.approx(float(found.values[:, 0].sum()), rel=1e-5)


def test_frames_of_llava_onevision_are_pooled_as_the_model_pools_them() -> None:
    """Weights of the vision tower's tokens, pooled by the model, are those of the prompt's."""
    processor = tiny_processors.build("llava_onevision")
    side = math.isqrt(processor.num_image_tokens) + 1  # 5 pools to 3, unlike 4 to 2, in fractions
    processor.num_image_tokens = side**2
    pooled = math.ceil(side / 2)
    video = processor.tokenizer.convert_tokens_to_ids("<video>")
    ids = torch.tensor([20, *[video] * (2 * pooled**2 + 1), 21])
    inputs = {"input_ids": ids[None], "pixel_values_videos": torch.zeros(1, 2, 3, 28, 28)}
    box = (7, 12, 44, 50)
    found = rk.region_weights(
        processor, inputs, [[{"frames": [1, 1], "box": box}]], image_sizes=[(2, 60, 50)]
    )
    inside = torch.zeros(60, 50)
    inside[box[1] : box[3], box[0] : box[2]] = 1
    tower = torch.nn.functional.adaptive_avg_pool2d(inside[None, None], side).flatten()[
        None, :, None
    ]
    model = tiny_processors.model_for("llava_onevision", tiny_processors.build("llava_onevision"))
    model.model.config.vision_config.patch_size = 1
    model.model.config.vision_config.image_size = side
    wanted = model.model.apply_pooling(tower).view(pooled, pooled)
    assert [tuple(grid.keys.shape) for grid in found.grids] == [(pooled, pooled)] * 2
    assert found.on_grid(found.grids[0]).sum() == 0
    assert torch.allclose(found.on_grid(found.grids[1]), wanted, atol=1e-6)


def test_images_are_the_frames_where_there_is_no_video() -> None:
    sizes = [(112, 112)] * 3
    processor, inputs = processed("qwen2_5_vl", [[picture(size) for size in sizes]])
    box = [0, 0, 56, 112]
    found = rk.region_weights(
        processor, inputs, [[{"frames": [1, 2], "box": box}]], image_sizes=sizes
    )
    totals = [float(found.on_grid(grid).sum()) for grid in found.grids]
    assert totals == [0.0, 8.0, 8.0]


def test_a_mask_and_what_overlaps_counts_once(tmp_path: Path) -> None:
    size = (112, 112)
    processor, inputs = processed("qwen2_5_vl", [[picture(size)]])
    wedge = np.tri(112, dtype=np.uint8)  # 0 and 1, as segmentation tools write it
    Image.fromarray(wedge).save(tmp_path / "mask.png")
    box = (28, 0, 70, 56)
    both = wedge.astype(bool)
    both[0:56, 28:70] = True
    mask, given = {"image": 0, "mask": wedge}, {"image": 0, "box": box}
    regions: list[Any] = [
        mask,
        {"image": 0, "mask": tmp_path / "mask.png"},
        [mask, given],
        [given, given],
    ]
    found = rk.region_weights(processor, inputs, [regions], image_sizes=[size])
    [grid] = found.grids
    cells = torch.tensor(wedge.reshape(4, 28, 4, 28)).double().mean((1, 3)).float()
    assert torch.equal(found.on_grid(grid, 0), cells)
    assert torch.equal(found.on_grid(grid, 1), cells)
    united = torch.tensor(both.reshape(4, 28, 4, 28)).double().mean((1, 3)).float()
    assert torch.allclose(found.on_grid(grid, 2), united, atol=1e-6)
    alone = torch.tensor([[0, 1, 0.5, 0]] * 2 + [[0.0] * 4] * 2)
    assert torch.allclose(found.on_grid(grid, 3), alone, atol=1e-6)


def test_a_mask_is_turned_as_its_picture_is(tmp_path: Path) -> None:
    """EXIF, palettes and transparency: what is not black and not transparent is inside."""
    inside = np.zeros((4, 6), bool)
    inside[0, 1] = inside[3, 5] = True
    grey = Image.fromarray(inside.astype(np.uint8) * 255)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned clockwise
    grey.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=turned)
    palette = Image.fromarray(inside.astype(np.uint8)).convert("P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    palette.save(tmp_path / "palette.png")
    clear = Image.new("RGBA", (6, 4), (255, 255, 255, 0))
    clear.paste((9, 9, 9, 255), mask=grey)
    clear.save(tmp_path / "clear.png")
    grey.convert("1").save(tmp_path / "bits.tiff")
    for name in ("turned.png", "palette.png", "clear.png", "bits.tiff"):
        assert np.array_equal(read_mask(tmp_path / name), inside), name


def test_smoothing_keeps_the_sum_and_stays_within_its_picture() -> None:
    sizes = [(196, 280), (196, 280)]
    processor, inputs = processed("qwen2_5_vl", [[picture(size) for size in sizes]])
    region = {"image": 0, "box": (28, 0, 84, 56)}  # 2 x 2 of 7 x 10 tokens, at an edge
    sharp, soft, even = (
        rk.region_weights(processor, inputs, [[each]], image_sizes=sizes, sigma=sigma)
        for each, sigma in ((region, 0), (region, 1.5), ({"image": 0}, 1.5))
    )
    first, second = sharp.grids
    # By hand: each cell spreads over a Gaussian, mirrored at the edges.
    shape = first.keys.shape
    wanted = torch.zeros(shape, dtype=torch.float64)
    offsets = range(-6, 7)
    kernel = {i: math.exp(-(i**2) / (2 * 1.5**2)) for i in offsets}
    total = sum(kernel.values())
    for row, column in ((0, 1), (0, 2), (1, 1), (1, 2)):
        for down in offsets:
            for across in offsets:
                at = [row + down, column + across]
                for axis, size in enumerate(shape):
                    if at[axis] < 0:
                        at[axis] = -1 - at[axis]
                    if at[axis] >= size:
                        at[axis] = 2 * size - 1 - at[axis]
                wanted[at[0], at[1]] += kernel[down] * kernel[across] / total**2
    assert torch.allclose(soft.on_grid(first).double(), wanted, atol=1e-6)
    assert float(wanted.sum()) == pytest.approx(float(sharp.values.sum()))
    assert soft.on_grid(second).sum() == 0
    assert torch.allclose(even.on_grid(first), torch.ones(shape), atol=1e-6)


def test_attention_on_regions_that_overlap_is_marginals_times_a_matrix() -> None:
    """Against the matrix of attention, with the gradient in q; and the spans are few."""
    sizes = [(196, 280), (112, 112)]
    processor, inputs = processed("llava_onevision", [[picture(sizes[0])], [picture(sizes[1])]])
    regions: list[Any] = [
        [{"image": 0, "box": (10, 30, 200, 150)}, {"image": 0, "box": (100, 0, 280, 90)}],
        [{"image": 0, "box": (0, 0, 50, 112)}],
    ]
    found = rk.region_weights(processor, inputs, regions, image_sizes=sizes)
    n = inputs["input_ids"].shape[1]
    spans, matrix = found.partition(n)
    assert matrix.shape == (2, spans.num_spans, 2) and spans.ids.shape == (2, n)
    covered = (found.dense(n) > 0).any(1)
    assert torch.equal(spans.ids >= 0, covered) and spans.num_spans < int(covered[0].sum())
    assert torch.allclose(
        torch.nn.functional.one_hot(spans.ids.long() + 1)[..., 1:].float() @ matrix,
        found.dense(n).transpose(1, 2), atol=1e-6,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 16, generator=generator) for _ in range(3))
    q.requires_grad_()
    marginals = rk.attention(q, k, v, spans, is_causal=True).marginals
    shares = marginals @ matrix[:, None]
    scores = (q @ k.mT / 4).masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
    wanted = scores.softmax(-1) @ found.dense(n).transpose(1, 2)[:, None]
    assert torch.allclose(shares, wanted, atol=1e-5)
    upstream = torch.randn(shares.shape, generator=generator)
    [got], [want] = (torch.autograd.grad((x * upstream).sum(), q) for x in (shares, wanted))
    assert torch.allclose(got, want, atol=1e-5)
    with pytest.raises(ValueError, match=r"seqlen_k must be at least \d+, .*; got 3"):
        found.partition(3)


def test_a_box_has_nine_spans_at_most() -> None:
    processor, inputs = processed("qwen2_5_vl", [[picture((560, 560))]])
    found = rk.region_weights(
        processor, inputs, [[{"image": 0, "box": (33.5, 41, 401, 333)}]], image_sizes=[(560, 560)]
    )
    spans, matrix = found.partition(inputs["input_ids"].shape[1])
    assert spans.num_spans == 9 and matrix.max() == 1


def test_one_prompt_and_prompts_without_pictures() -> None:
    size = (112, 112)
    processor, inputs = processed("qwen2_5_vl", [[picture(size)]])
    flat = {"input_ids": inputs["input_ids"][0], "image_grid_thw": inputs["image_grid_thw"]}
    found = rk.region_weights(processor, flat, [[{"image": 0}]], image_sizes=[size])
    assert found.ids.shape == found.values.shape == (1, 1, 16)
    nothing = rk.region_weights(processor, inputs, [[]], image_sizes=[size])
    assert nothing.ids.tolist() == [[[-1]]] and nothing.partition(40)[0].num_spans == 0
    text = {"input_ids": torch.tensor([[20, 21], [20, 22]])}
    found = rk.region_weights(processor, text, [[], [[]]], image_sizes=[])
    assert found.ids.tolist() == [[[-1]]] * 2 and found.values.tolist() == [[[0.0]]] * 2


BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ([[], []], {}, ValueError, "regions must hold a list for each of the 1 samples; got 2"),
    ([[3]], {}, TypeError, r"regions\[0\]\[0\] must be a mapping; got int"),
    ([[[{"image": 0}, 3]]], {}, TypeError, r"regions\[0\]\[0\]\[1\] must be a mapping; got int"),
    ([[{"image": 0, "bbox": [0, 0, 1, 1]}]], {}, ValueError, "image, .*, mask; got bbox"),
    ([[{"box": [0, 0, 1, 1]}]], {}, ValueError, "must have image, video or frames; got none"),
    ([[{"image": 2}]], {}, ValueError, r"image of .* in \[0, 2\), the images .*; got 2"),
    ([[{"image": True}]], {}, ValueError, "got True"),
    ([[{"video": 0}]], {}, ValueError, r"video of .* in \[0, 0\), the videos .*; got 0"),
    ([[{"image": 0, "frames": [0, 0]}]], {}, ValueError, "image, or video and frames; got both"),
    ([[{"frames": [1, 0]}]], {}, ValueError, r"0 <= first <= last < 2, .* got \[1, 0\]"),
    ([[{"frames": [0, 2]}]], {}, ValueError, r"frames of .* got \[0, 2\]"),
    ([[{"frames": 1}]], {}, ValueError, "got 1"),
    ([[{"image": 0, "box": [0, 0, 113, 9]}]], {}, ValueError, "112 wide and 56 high; got .0, 0, 1"),
    ([[{"image": 0, "box": [5, 0, 5, 9]}]], {}, ValueError, "box of .* within the picture"),
    ([[{"image": 0, "box": [0, 0, 1]}]], {}, ValueError, r"got \[0, 0, 1\]"),
    ([[{"image": 0, "box": [0, 0, math.nan, 1]}]], {}, ValueError, "box of .* within the picture"),
    (
        [[{"image": 0, "box": [0, 0, 1, 1], "mask": "a.png"}]],
        {}, ValueError, "a box or a mask; got both",
    ),
    (
        [[{"image": 0, "mask": np.ones((112, 56))}]],
        {}, ValueError, r"mask of .* must be \[56, 112\] as its picture; got \[112, 56\]",
    ),
    ([[]], {"sigma": -1}, ValueError, "sigma must be a number >= 0; got -1"),
    ([[]], {"frame_sigma": math.inf}, ValueError, "frame_sigma must be a number >= 0; got inf"),
    ([[]], {"image_sizes": [(56, 112)]}, ValueError, "which are image, image; got image"),
    (
        [[]],
        {"image_sizes": [(56, 112), (2, 56, 112)]},
        ValueError, "which are image, image; got image, video",
    ),
    ([[]], {"image_sizes": [(56, 112), (0, 1)]}, ValueError, r"image_sizes must hold .*; got \(0"),
]  # fmt: skip


@pytest.mark.parametrize("regions, change, error, message", BAD)
def test_bad_input(
    regions: Any, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    sizes = [(56, 112)] * 2
    processor, inputs = processed("qwen2_5_vl", [[picture(size) for size in sizes]])
    with pytest.raises(error, match=f"region_weights: .*{message}"):
        rk.region_weights(processor, inputs, regions, **{"image_sizes": sizes, **change})


def test_other_families_are_refused_by_name() -> None:
    from transformers import AutoConfig

    inputs = {"input_ids": torch.tensor([[1, 2]])}
    with pytest.raises(NotImplementedError, match=r"'idefics2' is not supported"):
        rk.region_weights(AutoConfig.for_model("idefics2"), inputs, [[]], image_sizes=[])


def test_a_picture_of_a_region(tmp_path: Path) -> None:
    """A panel for each grid that has weight, with the grid's lines and each box in its place."""
    from matplotlib.patches import Rectangle

    sizes = [(240, 280), (168, 196)]
    pictures = [picture(size) for size in sizes]
    processor, inputs = processed("llava_onevision", [pictures[:1]])
    box = (31, 90, 162, 201)
    mask = np.zeros(sizes[0], bool)
    mask[20:60, 200:260] = True
    region = [{"image": 0, "box": box}, {"image": 0, "mask": mask}]
    found = rk.region_weights(processor, inputs, [[region]], image_sizes=sizes[:1])
    figure = viz.region_grid(found, pictures[:1], path=tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    titles = ["image 1: 4 x 4 tokens", "image 1, in detail: 7 x 8 tokens"]
    assert [[text.get_text() for text in axes.texts] for axes in figure.axes] == [
        [title] for title in titles
    ]
    for axes, grid in zip(figure.axes, found.grids, strict=True):
        [outline] = axes.patches
        assert isinstance(outline, Rectangle)
        assert list(map(float, outline.get_bbox().extents)) == list(box)
        _, cells = axes.images
        opaque = torch.from_numpy(np.asarray(cells.get_array())[..., 3])
        assert torch.equal(opaque > 0, found.on_grid(grid) > 0)
        left, right, bottom, top = cells.get_extent()
        shown = [top / 240, left / 280, bottom / 240, right / 280]
        assert shown == pytest.approx(list(grid.box))
    frames = [picture((56, 84)) for _ in range(5)]
    processor, inputs = a_video("qwen2_5_vl", frames)
    found = rk.region_weights(
        processor, inputs, [[{"frames": [1, 2], "box": (0, 0, 9, 9)}, {"frames": [4, 4]}]],
        image_sizes=[(5, 56, 84)],
    )  # fmt: skip
    drawn = [viz.region_grid(found, [frames], region=number) for number in (0, 1)]
    assert [[axes.texts[0].get_text().split(":")[0] for axes in each.axes] for each in drawn] == [
        ["video 1, frames 1-2", "video 1, frames 3-4"], ["video 1, frame 5"],
    ]  # fmt: skip
    empty = rk.region_weights(processor, inputs, [[]], image_sizes=[(5, 56, 84)])
    with pytest.raises(ValueError, match="got region 0 of sample 0, which covers none"):
        viz.region_grid(empty, [frames])
