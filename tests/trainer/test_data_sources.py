"""Rows from a JSON array, a parquet file, a saved dataset and a name on the Hub, as from lines."""

import io
import json
import pickle
import shutil
from typing import Any

import datasets
import pytest
from PIL import Image

from ral.data import DataError, decode_batch, load_rows, sources, to_sft

from .data_case import CHOICE, GREEN, NUMBER, RED, greys, load

# What Arrow can hold in one column: ids are texts.
ROWS: list[dict[str, Any]] = [
    CHOICE | {"problem_id": "a", "process": None},
    NUMBER | {"problem_id": "7"},
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Where `datasets` puts what it makes of parquet."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def write_array(folder, text):
    path = folder / "data.json"
    path.write_text(text)
    return path


def as_array(folder, rows):
    return write_array(folder, json.dumps(rows, indent=1))


def as_parquet(folder, rows):
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "data.parquet"))
    return folder / "data.parquet"


def as_saved(folder, rows):
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return folder / "saved"


def as_saved_splits(folder, rows):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(folder / "saved")
    return folder / "saved"


def as_clone(folder, rows):
    """A clone of a repository of the Hub."""
    (folder / "clone" / "data").mkdir(parents=True)
    as_parquet(folder, rows).rename(folder / "clone" / "data" / "train-00000-of-00001.parquet")
    return folder / "clone"


SOURCES = (as_array, as_parquet, as_saved, as_saved_splits, as_clone)


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()


def held(*rows):
    """A dataset whose column `images` holds pictures."""
    return datasets.Dataset.from_list(list(rows)).cast_column(
        "images", datasets.List(datasets.Image())
    )


HELD = {name: CHOICE[name] for name in ("problem", "options", "solution", "problem_type")}
HELD["process"] = "A cat does not bark."


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_the_same_rows_as_of_lines(folder, source, streaming):
    wanted = list(load(folder, *ROWS))
    path = source(folder, ROWS)
    got = list(load_rows(path, image_root=folder, streaming=streaming))
    for row, of_lines in zip(got, wanted, strict=True):
        pictures = [[image.tobytes() for image in each.pop("images")] for each in (row, of_lines)]
        assert pictures[0] == pictures[1]
        assert row == of_lines


@pytest.mark.parametrize("source", SOURCES)
def test_a_wrong_row_is_named(folder, source):
    """In JSON by its line, in tables by its number; and all errors are collected."""
    rows = [*ROWS, *[ROWS[0] | {"problem_type": "essay"}] * 2]
    path = source(folder, rows)
    with pytest.raises(DataError) as error:
        load_rows(path, image_root=folder)
    head, *lines = str(error.value).splitlines()
    assert head.endswith("got 2 errors")
    numbers = [3, 4]
    if source is as_array:
        text = path.read_text().splitlines()
        numbers = [i for i, line in enumerate(text, start=1) if line == " {"][2:]
    assert [line.split(": problem_type must be one of")[0] for line in lines] == [
        f"  {path.name}:{number}" for number in numbers
    ]
    kept = load_rows(path, image_root=folder, on_error="skip")
    assert [row["problem_id"] for row in kept] == ["a", "7"]


@pytest.mark.parametrize("source", SOURCES)
def test_a_resumed_run_sees_that_rows_have_changed(folder, source, tmp_path_factory):
    def checksums(rows, place):
        return list(
            load_rows(source(place, rows), image_root=folder).info.download_checksums.values()
        )

    before = checksums(ROWS, folder)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    same = checksums(ROWS, elsewhere)
    assert (same[1:], len(same)) == (before[1:], 2)
    if source is not as_clone:  # whose tables `datasets` writes into its cache
        assert same == before
    other = checksums([ROWS[0] | {"problem": "What meows?"}, ROWS[1]], tmp_path_factory.mktemp("b"))
    assert other[0] != before[0]


def test_a_file_that_was_written_again_is_read_again(folder, cache):
    for problem in ("What barks?", "What meows?"):
        path = as_parquet(folder, [ROWS[0] | {"problem": problem}])
        [row] = load_rows(path)
        assert row["prompt"][0]["content"][-1]["text"].startswith(problem)
    assert any(cache.iterdir())


# --- JSON arrays


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "rows must be one or more; got none"),
        (
            "[\n{}\n{}]",
            r"data\.json:3: the array must go on with , or \] after row 1; got '\{\}\]'",
        ),
        ("[\n{},\n{", r"data\.json:3: row 2 of the array must be a JSON object .*; got '\{'"),
        ("[\n{},\n]", r"data\.json:3: row 2 of the array must be a JSON object .*; got '\]'"),
        ("[\n{}", r"data\.json:2: the array must go on with , or \] after row 1; got ''"),
        ("[\n{}]\n[]", r"data\.json:3: nothing must follow the array; got '\[\]'"),
        ("[" * 100_000, r"data\.json:1: row 1 of the array must be a JSON object"),
    ],
)
def test_broken_arrays(folder, text, message):
    """What follows is lost: it is no row that could be skipped."""
    for on_error in ("raise", "skip"):
        with pytest.raises(DataError, match=message) as error:
            load_rows(write_array(folder, text), on_error=on_error)
        assert str(error.value).startswith("load_rows: ")


def test_a_row_of_another_kind_can_be_skipped(folder):
    path = write_array(folder, f"[3,\n{json.dumps(ROWS[0])}]")
    with pytest.raises(DataError, match=r"data\.json:1: the line must be a JSON object; got"):
        load_rows(path)
    assert len(load_rows(path, on_error="skip")) == 1


def test_an_array_may_have_a_mark_and_any_name(folder):
    path = folder / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf  " + json.dumps(ROWS).encode())
    assert [row["problem_id"] for row in load_rows(path)] == ["a", "7"]
    path.write_bytes(b"[\n" + "\u00fc".encode("latin-1") + b"]")
    with pytest.raises(DataError, match=r"data\.jsonl:2: the file must be text in UTF-8"):
        load_rows(path)
    rows = [{k: v for k, v in row.items() if k != "problem_id"} for row in ROWS]
    assert [row["problem_id"] for row in load_rows(as_array(folder, rows))] == ["data:1", "data:2"]


# --- images in tables


@pytest.mark.parametrize("source", ["parquet", "saved"])
@pytest.mark.parametrize("streaming", [False, True])
def test_images_that_a_table_holds(folder, source, streaming):
    table = held(
        {**HELD, "images": [png(RED)], "data_type": "image"},
        {**HELD, "images": [png(GREEN), png(RED)], "data_type": None},
        {**HELD, "images": [png((10 * i,) * 3) for i in range(12)], "data_type": "video"},
    )
    if source == "parquet":
        table.to_parquet(str(folder / "data.parquet"))
    else:
        table.save_to_disk(folder / "data.parquet")
    dataset = load_rows(folder / "data.parquet", streaming=streaming, max_frames=4)
    rows = list(dataset)
    colours = [[image.getpixel((0, 0)) for image in row["images"]] for row in rows[:2]]
    assert colours == [[RED], [GREEN, RED]]
    assert greys(rows[2]["images"]) == [0, 4, 7, 11]
    assert [part["type"] for part in rows[1]["prompt"][0]["content"]] == ["image"] * 2 + ["text"]
    if streaming:
        return
    dataset.with_format(None).save_to_disk(folder / "rows")
    kept = datasets.load_from_disk(folder / "rows").with_transform(decode_batch)
    sources.opened.cache_clear()  # as in another process
    for same in (kept, pickle.loads(pickle.dumps(dataset)), to_sft(dataset)):
        assert [len(row["images"]) for row in same] == [1, 2, 4]
        assert same[1]["images"][0].getpixel((0, 0)) == GREEN


def test_one_image_of_bytes_alone_and_of_a_path(folder):
    """As pandas writes a picture, in `image`; and as `datasets` names one that it does not hold."""
    rows = [{**HELD, "image": png(GREEN)}]
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "data.parquet"))
    [row] = load_rows(folder / "data.parquet")
    assert row["images"][0].getpixel((0, 0)) == GREEN
    rows = [{**HELD, "image": {"bytes": None, "path": "red.png"}}]
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "data.parquet"))
    [row] = load_rows(folder / "data.parquet")
    assert row["images"][0].getpixel((0, 0)) == RED


def test_a_broken_image_in_a_table_is_named_or_skipped(folder):
    table = held({**HELD, "images": [png(RED)]}, {**HELD, "images": [png(RED)[:-30]]})
    table.to_parquet(str(folder / "data.parquet"))
    dataset = load_rows(folder / "data.parquet")
    with pytest.raises(
        DataError, match=r"data\.parquet:2: images must be an image .*got row 2 of "
    ):
        dataset[1]
    assert len(load_rows(folder / "data.parquet", on_error="skip")) == 1


# --- what `datasets` says


def test_what_is_no_table(folder):
    (folder / "data.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"load_rows: '.*data\.parquet' must be a dataset that"):
        load_rows(folder / "data.parquet")
    path = as_saved_splits(folder, ROWS)
    with pytest.raises(DataError, match="split must be one of train; got 'test'"):
        load_rows(path, split="test")


def test_a_name_on_the_hub_goes_to_load_dataset(folder, monkeypatch):
    asked = []

    def load_dataset(*words, **options):
        asked.append((words, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    monkeypatch.chdir(folder)  # where paths in the rows begin
    rows = load_rows("owner/name", config="small", split="test[:2]")
    assert asked == [(("owner/name", "small"), {"split": "test[:2]"})]
    assert [row["problem_id"] for row in rows] == ["a", "7"]
    (folder / "owner").mkdir()  # now it is a path that is not there
    with pytest.raises(FileNotFoundError, match=r"or a name on the Hub; got 'owner/name'"):
        load_rows("owner/name")


def test_a_moved_clone_keeps_its_images(folder, tmp_path_factory):
    clone = as_clone(folder, ROWS)
    shutil.copy(folder / "red.png", clone)
    shutil.copytree(folder / "clip", clone / "clip")
    moved = tmp_path_factory.mktemp("moved") / "clone"
    shutil.move(clone, moved)
    assert [len(row["images"]) for row in load_rows(moved)] == [1, 12]
