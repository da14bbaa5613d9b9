"""The evidence of rows: checked by line, numbered by the source, kept on the way to a batch."""

from __future__ import annotations

import io
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import ral_kernels as rk
from ral.data import DataError, decode_batch, load_rows
from tests.integrations import films, tiny_processors

from . import tiny
from .data_case import CHOICE, GREEN, NUMBER, RED, load, write

BOX = [1, 2, 5, 6]
WHERE: list[dict[str, Any]] = [{"image": 0, "box": BOX}]


def mask_file(folder: Path, name: str = "mask.png", size: tuple[int, int] = (8, 6)) -> np.ndarray:
    inside = np.zeros(size[::-1], bool)
    inside[1, 2:4] = True
    Image.fromarray(inside.astype(np.uint8)).save(folder / name)
    return inside


def test_rows_with_evidence_beside_rows_without(folder: Path) -> None:
    inside = mask_file(folder)
    rows = [
        CHOICE | {"evidence": WHERE},
        CHOICE,
        NUMBER,
        CHOICE | {
            "path": ["red.png", "green.png"],
            "problem": "Is <image> or <image> red?",
            "evidence": [{"image": 1, "mask": "mask.png"}, {"frames": [0, 1]}, *WHERE],
        },
        CHOICE | {"evidence": None},
        {k: v for k, v in CHOICE.items() if k != "path"} | {"data_type": "text", "evidence": []},
    ]  # fmt: skip
    dataset = load(folder, *rows)

    def check(dataset: Any) -> None:
        found = [row["evidence"] for row in dataset]
        assert found[0] == [{"image": 0, "box": [1.0, 2.0, 5.0, 6.0]}]
        assert found[1] == found[2] == found[4] == found[5] == []
        [masked, first, second, box] = found[3]
        assert masked["image"] == 1 and np.array_equal(masked["mask"], inside)
        assert (first, second) == ({"image": 0}, {"image": 1})
        assert box == {"image": 0, "box": [1.0, 2.0, 5.0, 6.0]}

    check(dataset)
    dataset.with_format(None).save_to_disk(folder / "saved")
    check(datasets.load_from_disk(folder / "saved").with_transform(decode_batch))
    check(pickle.loads(pickle.dumps(dataset)))  # to the workers of a loader
    check(load(folder, *rows, on_error="skip"))
    check(load(folder, *rows, streaming=True))
    older = dataset.select([0]).with_format(None).remove_columns("evidence")
    joined = datasets.concatenate_datasets([dataset.select([0]).with_format(None), older])
    assert [row["evidence"] for row in joined.with_transform(decode_batch)] == [
        [{"image": 0, "box": [1.0, 2.0, 5.0, 6.0]}], [],
    ]  # fmt: skip
    shuffled = dataset.shuffle(seed=3).select(range(6))
    assert sum(len(row["evidence"]) for row in shuffled) == 5
    streamed = list(load(folder, *rows, streaming=True).shuffle(seed=3, buffer_size=4))
    assert sorted(len(row["evidence"]) for row in streamed) == [0, 0, 0, 0, 1, 4]


@pytest.mark.parametrize("source", ["clip", "clip.gif", "film.mp4", "list"])
def test_frames_are_numbers_of_the_source(folder: Path, source: str) -> None:
    """Of 12 or 5 frames 4 or 3 are taken; an entry becomes one for each of them in it."""
    total, most, taken = 12, 4, [0, 4, 7, 11]
    path: Any = source
    if source == "clip.gif":
        total, most, taken = 5, 3, [0, 2, 4]
    if source == "film.mp4":
        pytest.importorskip("av")
        films.write(folder / source, films.steps(12), g="4")
    if source == "list":
        path = [f"clip/frame{i}.png" for i in range(12)]
    width, height = (4, 4)
    if source == "film.mp4":
        width, height = films.steps(12)[0].size
    box = [0, 1, width, height]
    some, one = ([1, 3], [2, 2]) if source == "clip.gif" else ([3, 5], [4, 4])
    evidence: list[Any] = [{"frames": some}, {"video": 0, "frames": one, "box": box}, {"video": 0}]
    [row] = load(folder, NUMBER | {"path": path, "evidence": evidence}, max_frames=most)
    assert len(row["images"]) == len(taken)
    assert row["evidence"] == [
        {"image": 1}, {"image": 1, "box": box}, *({"image": i} for i in range(len(taken)))
    ]  # fmt: skip
    wrong = NUMBER | {"path": path, "evidence": [{"frames": [0, total]}]}
    with pytest.raises(DataError, match=rf"evidence\[0\]\.frames must be .* last < {total}, the f"):
        load(folder, wrong, max_frames=most)


def test_frames_that_are_not_taken_are_counted(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [NUMBER, NUMBER | {"evidence": [{"frames": [1, 3]}]}]
    with caplog.at_level(logging.WARNING, logger="ral.data"):
        dataset = load(folder, *rows, max_frames=4)
    assert [row["evidence"] for row in dataset] == [[], []]
    assert "evidence of 1 rows" in caplog.text and "first: data.jsonl:2" in caplog.text
    assert "max_frames=4" in caplog.text
    caplog.clear()
    assert load(folder, *rows)[1]["evidence"] == [{"image": i} for i in (1, 2, 3)]
    assert caplog.text == ""


def test_boxes_are_in_pixels_of_the_upright_picture(folder: Path) -> None:
    """A phone's picture: stored 8 wide and 6 high, shown 6 wide and 8 high."""
    turned = Image.Exif()
    turned[0x0112] = 6
    for name in ("phone.jpg", "phone.png", "phone.tiff"):
        Image.new("RGB", (8, 6), RED).save(folder / name, exif=turned)
        tall = CHOICE | {"path": name, "evidence": [{"image": 0, "box": [0, 0, 6, 8]}]}
        [row] = load(folder, tall)
        assert row["images"][0].size == (6, 8)
        tall["evidence"] = [{"image": 0, "box": [0, 0, 8, 6]}]
        with pytest.raises(DataError, match="which is 6 wide and 8 high; got"):
            load(folder, tall)


def test_evidence_of_tables(folder: Path) -> None:
    """Parquet gives every part every field; and pictures may lie in the table."""

    def png(colour: Any) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
        return buffer.getvalue()

    mask_file(folder)
    fields = {name: CHOICE[name] for name in ("problem", "options", "solution", "problem_type")}
    rows = [
        {**fields, "images": [png(RED), png(GREEN)], "evidence": [
            {"image": 1, "box": [1.0, 2.0, 5.0, 6.0]}, {"image": 0, "mask": "mask.png"}
        ]},
        {**fields, "images": [png(RED)], "evidence": None},
    ]  # fmt: skip
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "data.parquet"))
    first, second = load_rows(folder / "data.parquet")
    assert first["evidence"][0] == {"image": 1, "box": [1.0, 2.0, 5.0, 6.0]}
    assert first["evidence"][1]["mask"].sum() == 2 and second["evidence"] == []
    rows[1]["evidence"] = [{"image": 0, "box": [0.0, 0.0, 9.0, 6.0]}]
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "wrong.parquet"))
    with pytest.raises(DataError, match=r"wrong\.parquet:2: evidence\[0\]\.box .* 8 wide and 6 h"):
        load_rows(folder / "wrong.parquet")


VIDEO: dict[str, Any] = {"data_type": "video", "path": "clip"}
WRONG: list[tuple[Any, str, dict[str, Any]]] = [
    ("a", " must be a list of mappings; got 'a'", {}),
    ([3], "[0] must be a mapping of image, video, frames, box, mask; got 3", {}),
    ([{"image": 0, "bbox": BOX}], "[0] must be a mapping of image, video, frames, box, mask", {}),
    ([*WHERE, {"box": BOX}], "[1] must have image, video or frames; got {'box': [1, 2, 5, 6]}", {}),
    ([{"image": 1}], "[0].image must be in [0, 1), the row's images; got 1", {}),
    ([{"image": True}], "[0].image must be in [0, 1), the row's images; got True", {}),
    ([{"image": 0, "frames": [0, 0]}], "[0] must have image or frames; got {'image': 0", {}),
    ([{"frames": [0, 1]}], "[0].frames must be [first, last] with 0 <= first <= last < 1", {}),
    ([{"video": 0}], "[0] must name images, since the row has no video; got {'video': 0}", {}),
    ([{"image": 0, "box": [1, 2, 5]}], "[0].box must be [x0, y0, x1, y1] in pixels, x0 < x1", {}),
    ([{"image": 0, "box": [5, 2, 5, 6]}], "[0].box must be [x0, y0, x1, y1] in pixels", {}),
    ([{"image": 0, "box": [0, 0, "8", 6]}], "[0].box must be [x0, y0, x1, y1] in pixels", {}),
    ([{"image": 0, "box": [-1, 0, 8, 6]}], "[0].box must be [x0, y0, x1, y1] in pixels", {}),
    (
        [{"image": 0, "box": [0, 0, 8, 6.5]}],
        "[0].box must be [x0, y0, x1, y1] in pixels, x0 < x1 and y0 < y1, within the picture, "
        "which is 8 wide and 6 high; got [0, 0, 8, 6.5]",
        {},
    ),
    ([{"image": 0, "box": BOX, "mask": "m.png"}], "[0] must have a box or a mask; got {'im", {}),
    ([{"image": 0, "mask": "none.png"}], "[0].mask must be an existing file; got 'none.png'", {}),
    ([{"image": 0, "mask": 3}], "[0].mask must be an existing file; got 3", {}),
    ([{"image": 0, "mask": "data.jsonl"}], "[0].mask must be of a picture that can be read", {}),
    (
        [{"image": 0, "mask": "wide.png"}],
        "[0].mask must be 8 wide and 6 high as its picture; got 9 by 6 in ",
        {},
    ),
    (WHERE, "[0] must be of a picture that can be read; got ", {"path": "data.jsonl"}),
    ([{"image": 0}], "[0] must name the frames of a video by video and frames; got {", VIDEO),
    ([{"video": 1}], "[0].video must be 0, the row's only video; got 1", VIDEO),
    (
        [{"frames": [2, 2], "box": BOX}],
        "[0].box must be [x0, y0, x1, y1] in pixels, x0 < x1 and y0 < y1, within the picture, "
        "which is 4 wide and 4 high; got [1, 2, 5, 6]",
        VIDEO,
    ),
    (
        WHERE,
        " must be left out of a row with data_type 'text'; got [{",
        {"data_type": "text", "path": None},
    ),
]


@pytest.mark.parametrize(("evidence", "message", "change"), WRONG)
def test_wrong_evidence_is_named_by_line(
    folder: Path, evidence: Any, message: str, change: dict[str, Any]
) -> None:
    mask_file(folder, "wide.png", (9, 6))
    wrong = CHOICE | change | {"evidence": evidence}
    with pytest.raises(DataError) as error:
        load(folder, CHOICE, wrong)
    _, *lines = str(error.value).splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"  data.jsonl:2: evidence{message}")
    kept = load(folder, CHOICE, wrong, on_error="skip")
    assert len(kept) == 1


def test_a_mask_that_is_broken_names_its_line_or_is_skipped(folder: Path) -> None:
    """Its size can be read, and its pixels cannot."""
    Image.fromarray(np.tri(256, dtype=np.uint8) * 255).save(folder / "big.png")
    Image.new("RGB", (256, 256)).save(folder / "square.png")
    whole = (folder / "big.png").read_bytes()
    (folder / "big.png").write_bytes(whole[: len(whole) // 2])
    row = CHOICE | {"path": "square.png", "evidence": [{"image": 0, "mask": "big.png"}]}
    dataset = load(folder, CHOICE, row)
    with pytest.raises(
        DataError, match=r"data\.jsonl:2: mask must be .* decoded; got '.*big\.png'"
    ):
        dataset[1]
    assert dataset.select_columns("solution")[1] == {"solution": "B"}
    assert len(load(folder, CHOICE, row, on_error="skip")) == 1


def test_a_resumed_run_sees_that_masks_have_changed(folder: Path) -> None:
    mask_file(folder)
    row = CHOICE | {"evidence": [{"image": 0, "mask": "mask.png"}]}
    before = list(load(folder, row).info.download_checksums.values())
    (folder / "mask.png").write_bytes((folder / "mask.png").read_bytes() + b"more")
    after = list(load(folder, row).info.download_checksums.values())
    assert [x == y for x, y in zip(before, after, strict=True)] == [True, False]


def test_rows_reach_the_keys_of_a_padded_batch(folder: Path) -> None:
    """Through a processor, padded on the left, beside rows of text and rows without evidence."""
    Image.new("RGB", (168, 112), RED).save(folder / "wide.png")
    Image.new("RGB", (112, 112), RED).save(folder / "square.png")
    text = {k: v for k, v in CHOICE.items() if k != "path"} | {"data_type": "text"}
    rows = load(
        folder,
        CHOICE | {"path": "wide.png", "evidence": [{"image": 0, "box": [28, 0, 84, 112]}]},
        CHOICE | {"path": "square.png"},
        text,
        CHOICE | {"path": ["square.png", "wide.png"], "evidence": [{"image": 1}]},
    )
    processor = tiny_processors.build("qwen2_5_vl")
    processor.tokenizer.padding_side = "left"
    mark = tiny_processors.PLACEHOLDER["qwen2_5_vl"]
    texts = [f"{mark * len(row['images'])} {'cat ' * i}" for i, row in enumerate(rows)]
    fields = processor(
        images=[image for row in rows for image in row["images"]],
        text=texts, padding=True, return_tensors="pt",
    )  # fmt: skip
    response = torch.full((4, 5), 20)
    ids = torch.cat([fields["input_ids"], response], 1)
    mask = torch.cat([fields["attention_mask"], torch.ones_like(response)], 1)
    inputs = {**fields, "input_ids": ids, "attention_mask": mask}

    def located(sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
        sizes = [(image.height, image.width) for row in rows for image in row["images"]]
        found = rk.region_weights(
            processor, inputs, [[row["evidence"]] for row in rows], image_sizes=sizes, sigma=sigma
        )
        return found.ids[:, 0], found.values[:, 0]

    keys, weights = located(0.0)
    assert keys.shape == weights.shape == (4, 24) and weights.dtype == torch.float32
    visual = ids == processor.image_token_id
    grid = visual[0].nonzero().flatten().view(4, 6)
    assert sorted(keys[0][keys[0] >= 0].tolist()) == sorted(grid[:, 1:3].flatten().tolist())
    assert (weights[0] > 0).sum() == 8 and weights[0].max() == 1
    assert (keys[1:3] == -1).all() and (weights[1:3] == 0).all()
    assert keys[3].tolist() == visual[3].nonzero().flatten()[16:].tolist()
    _, soft = located(1.0)
    assert (soft[0] > 0).sum() > 8 and float(soft[0].sum()) == pytest.approx(8, rel=1e-5)


def test_lines_say_where(folder: Path) -> None:
    """All errors of a row are collected with the row's others."""
    row = CHOICE | {"solution": "Z", "evidence": [{"image": 4}, {"image": 0, "box": [9, 9, 9, 9]}]}
    write(folder, json.dumps(row))
    with pytest.raises(DataError) as error:
        load_rows(folder / "data.jsonl")
    assert [line.split(" must")[0] for line in str(error.value).splitlines()[1:]] == [
        f"  data.jsonl:1: {name}" for name in ("solution", "evidence[0].image", "evidence[1].box")
    ]


slow = pytest.mark.slow(stands_in="test_a_step_of_training_takes_rows_with_evidence")


@pytest.mark.parametrize("streaming", [False, pytest.param(True, marks=slow)])
def test_a_step_of_training_takes_rows_with_evidence(folder: Path, streaming: bool) -> None:
    """Reward functions see each row's evidence beside its own solution, boxes and masks."""
    Image.new("RGB", (84, 56), RED).save(folder / "wide.png")
    inside = mask_file(folder, "wide-mask.png", (84, 56))
    shown = CHOICE | {"path": "wide.png"}
    rows = load(
        folder,
        shown | {"evidence": [{"image": 0, "box": [0, 0, 28, 56]}]},
        shown | {"solution": "A", "evidence": [{"image": 0, "mask": "wide-mask.png"}]},
        streaming=streaming,
    )
    seen: dict[str, Any] = {}

    def reward(completions: Any, solution: Any, evidence: Any, **columns: Any) -> list[float]:
        seen.update(zip(solution, evidence, strict=True))
        return tiny.reward(completions)

    path = tiny.checkpoint(folder / "checkpoints")
    trainer = tiny.trainer(
        path, folder, reward_funcs=reward, train_dataset=rows, max_steps=1,
        per_device_train_batch_size=8, steps_per_generation=1, num_iterations=1, attn_coef=0.0,
    )  # fmt: skip
    trainer.train()
    assert seen["B"] == [{"image": 0, "box": [0.0, 0.0, 28.0, 56.0]}]
    [part] = seen["A"]
    assert part["image"] == 0 and np.array_equal(part["mask"], inside)
