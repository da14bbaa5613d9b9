"""The rows as a dataset: checksums, decoding, what TRL and `datasets` do with it."""

import pickle
import shutil
import sys

import datasets
import pytest
from PIL import Image

from ral.data import DataError, conversation, decode_batch, load_rows, to_sft

from .data_case import CHOICE, NUMBER, RED, load


def test_checksums_of_the_file_and_of_the_sizes_of_its_images(folder, tmp_path_factory):
    """Another folder changes nothing, an image of another size does."""
    before = load(folder, CHOICE, NUMBER).info.download_checksums
    path = str(folder / "data.jsonl")
    assert list(before) == [path, f"{path}: sizes of images"]
    copy = tmp_path_factory.mktemp("copy") / "data"
    shutil.copytree(folder, copy)
    moved = load_rows(copy / "data.jsonl").info.download_checksums
    assert list(moved.values()) == list(before.values())
    (copy / "clip" / "frame3.png").write_bytes((folder / "red.png").read_bytes() + b"more")
    changed = load_rows(copy / "data.jsonl").info.download_checksums
    same = [x == y for x, y in zip(changed.values(), before.values(), strict=True)]
    assert same == [True, False]
    streamed = load_rows(folder / "data.jsonl", streaming=True).info.download_checksums
    assert streamed == {path: before[path]}


def test_columns_without_images_decode_nothing_and_a_batch_decodes_once(folder, monkeypatch):
    dataset = load(folder, CHOICE, NUMBER)
    opened = []
    real = Image.open

    def counted(file, **options):
        opened.append(file.name)
        return real(file, **options)

    monkeypatch.setattr(Image, "open", counted)
    assert list(dataset.select_columns("solution")) == [{"solution": "B"}, {"solution": "1,234"}]
    kept = dataset.filter(lambda kind: kind == "numerical", input_columns="problem_type")
    assert len(kept) == 1
    assert opened == []
    rows = dataset.__getitems__([0, 0, 1, 0])  # as torch's loader asks for GRPO's repeated rows
    assert opened == [str(folder / "red.png")] + [
        str(folder / "clip" / f"frame{i}.png") for i in range(12)
    ]
    assert [len(row["images"]) for row in rows] == [1, 1, 12, 1]


def test_rows_survive_what_is_done_to_datasets(folder):
    dataset = load(folder, CHOICE, NUMBER)
    stored = dataset.with_format(None)
    stored.save_to_disk(folder / "saved")
    for same in (
        dataset.select([1, 0]).select([1, 0]),
        dataset.map(lambda row: {"num_images": len(row["images"])}),
        dataset.filter(lambda row: row["images"]),
        stored.add_column("weight", [1.0, 2.0]).with_transform(decode_batch),
        datasets.load_from_disk(folder / "saved").with_transform(decode_batch),
        dataset.select([0, 1]),
        pickle.loads(pickle.dumps(dataset)),  # to the workers of a loader
        datasets.concatenate_datasets([dataset.select([0]), dataset.select([1])]),
        dataset.remove_columns(["process", "problem_id"]),
    ):
        assert [len(row["images"]) for row in same] == [1, 12]
        assert same[0]["prompt"][0]["content"][0] == {"type": "image"}
        assert same[0]["images"][0].getpixel((0, 0)) == RED


def test_chunks_of_a_file_become_one_dataset(folder, monkeypatch):
    monkeypatch.setattr("ral.data.loading._CHUNK", 2)
    assert [row["problem_id"] for row in load(folder, *[CHOICE] * 5)] == [
        f"data:{i}" for i in range(1, 6)
    ]
    with pytest.raises(DataError, match=r"got 2 errors\n  data\.jsonl:2: .*\n  data\.jsonl:5: "):
        load(folder, CHOICE, "{", CHOICE, CHOICE, "{", CHOICE)


def test_streaming_gives_the_same_rows(folder):
    rows = list(load(folder, CHOICE, NUMBER))
    stream = load(folder, CHOICE, NUMBER, streaming=True)
    assert isinstance(stream, datasets.IterableDataset)
    for streamed, row in zip(stream, rows, strict=True):
        images = streamed.pop("images")
        assert [image.tobytes() for image in images] == [
            image.tobytes() for image in row.pop("images")
        ]
        assert streamed == row
    assert len(list(stream)) == 2  # again from the start


def test_streaming_raises_at_the_line_that_is_wrong(folder):
    stream = iter(load(folder, CHOICE, "{", CHOICE, streaming=True))
    assert next(stream)["solution"] == "B"
    with pytest.raises(DataError, match=r"data\.jsonl:2: the line must be a JSON object"):
        next(stream)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TRL needs Python 3.11")
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_go_through_the_functions_that_trl_puts_them_through(folder, streaming):
    from trl import data_utils

    for row in to_sft(load(folder, NUMBER, streaming=streaming)):
        assert data_utils.is_conversational(row)
        prompt = data_utils.prepare_multimodal_messages(row["prompt"], images=row["images"])
        parts = prompt[0]["content"]
        assert [part.get("image") for part in parts] == [*row["images"], None]
        assert "image" not in parts[-1] and "text" not in parts[0]
        answer = data_utils.prepare_multimodal_messages(row["completion"])
        assert answer[0]["content"][0]["type"] == "text"


def test_conversation_has_a_part_for_each_image():
    [message] = conversation("Q?", 2)
    assert message == {
        "role": "user",
        "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Q?"}],
    }
