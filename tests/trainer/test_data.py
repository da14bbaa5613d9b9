import io
import json
import logging
import pickle
import re
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from ral.data import (
    DataError,
    completion,
    conversation,
    decode_batch,
    load_jsonl,
    natural_key,
    question_text,
    read_images,
    to_sft,
    uniform_indices,
)
from ral.data.prompts import escaped
from ral.rewards import PROBLEM_TYPES, STYLES, format_reward, paper_reward
from tests.integrations import films

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
CHOICE = {
    "problem": "What barks?",
    "options": ["the cat", "the dog"],
    "solution": "<answer>B</answer>",
    "problem_type": "multiple choice",
    "data_type": "image",
    "path": "red.png",
}
NUMBER = {
    "problem": "How many?",
    "options": [],
    "solution": "<answer>1,234</answer>",
    "problem_type": "numerical",
    "data_type": "video",
    "path": "clip",
    "problem_id": 7,
    "process": "<think>I count them.</think>",
}


@pytest.fixture
def folder(tmp_path):
    """A red and a green image, 12 frames whose grey is their number, a GIF of 5 such frames."""
    Image.new("RGB", (8, 6), RED).save(tmp_path / "red.png")
    Image.new("RGB", (8, 6), GREEN).save(tmp_path / "green.png")
    clip = tmp_path / "clip"
    clip.mkdir()
    for i in range(12):
        grey(i).save(clip / f"frame{i}.png")
    (clip / "._frame3.png").write_bytes(b"left by a file manager")
    (clip / "times.json").write_text("[]")
    frames = [grey(i) for i in range(5)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "clip.webp", save_all=True, append_images=frames[1:], lossless=True)
    return tmp_path


def grey(i):
    return Image.new("RGB", (4, 4), (10 * i,) * 3)


def greys(images):
    return [image.getpixel((0, 0))[0] // 10 for image in images]


def write(folder, *rows):
    path = folder / "data.jsonl"
    path.write_text(
        "".join((json.dumps(row) if isinstance(row, dict) else row) + "\n" for row in rows)
    )
    return path


def load(folder, *rows, **options):
    return load_jsonl(write(folder, *rows), **options)


def text_of(row):
    return row["prompt"][-1]["content"][-1]["text"]


# --- checksums


def test_checksums_of_the_file_and_of_the_sizes_of_its_images(folder, tmp_path_factory):
    """Another folder changes nothing, an image of another size does."""
    before = load(folder, CHOICE, NUMBER).info.download_checksums
    path = str(folder / "data.jsonl")
    assert list(before) == [path, f"{path}: sizes of images"]
    copy = tmp_path_factory.mktemp("copy") / "data"
    shutil.copytree(folder, copy)
    moved = load_jsonl(copy / "data.jsonl").info.download_checksums
    assert list(moved.values()) == list(before.values())
    (copy / "clip" / "frame3.png").write_bytes((folder / "red.png").read_bytes() + b"more")
    changed = load_jsonl(copy / "data.jsonl").info.download_checksums
    same = [x == y for x, y in zip(changed.values(), before.values(), strict=True)]
    assert same == [True, False]
    streamed = load_jsonl(folder / "data.jsonl", streaming=True).info.download_checksums
    assert streamed == {path: before[path]}


# --- rows


def test_a_row_has_what_trl_wants(folder):
    row = load(folder, CHOICE)[0]
    assert set(row) == {
        *("prompt", "images", "solution", "problem_type", "problem_id", "options", "process")
    }
    [message] = row["prompt"]
    assert message["role"] == "user"
    # Without keys that Arrow adds: templates of Qwen ask `'image' in part`, `'text' in part`.
    assert message["content"][0] == {"type": "image"}
    assert set(message["content"][1]) == {"type", "text"}
    [image] = row["images"]
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (8, 6), RED)
    assert row["solution"] == "B"
    assert row["problem_type"] == "multiple choice"
    assert row["problem_id"] == "data:1"
    assert row["options"] == ["the cat", "the dog"]
    assert row["process"] is None


def test_a_row_of_a_video_and_the_ids(folder):
    row = load(folder, "", NUMBER, CHOICE)[0]
    assert greys(row["images"]) == list(range(12))
    assert [part["type"] for part in row["prompt"][0]["content"]] == ["image"] * 12 + ["text"]
    assert row["solution"] == "1,234"
    assert row["problem_id"] == "7"
    assert row["process"] == "I count them."
    assert (
        load(folder, "", NUMBER, CHOICE)["problem_id"][1] == "data:3"
    )  # the line, blank ones counted


def test_options_lose_their_letters_and_the_prompt_gives_them(folder):
    options = ["A. the cat", "(B) the dog", "C) it: a fox"]
    row = load(folder, CHOICE | {"options": options})[0]
    assert row["options"] == ["the cat", "the dog", "it: a fox"]
    assert text_of(row).splitlines()[:4] == [
        *("What barks?", "A. the cat", "B. the dog", "C. it: a fox")
    ]
    for options in (
        *(
            ["A、the cat", "B、the dog"],
            ["A．the cat", "B． the dog"],
            ["a) the cat", "b) the dog"],
        ),
        *(
            ["（A）the cat", "（B）the dog"],
            ["A：the cat", "B：the dog"],
            ["Ａ.the cat", "Ｂ.the dog"],
        ),
        *(["[A] the cat", "[B] the dog"], ["(a). the cat", "(b). the dog"]),
    ):
        row = load(folder, CHOICE | {"options": options})[0]
        assert row["options"] == ["the cat", "the dog"]
    numbers = ["A. .5", "B. -.5"]
    assert load(folder, CHOICE | {"options": numbers})[0]["options"] == [".5", "-.5"]
    # Only all letters in order are letters of options.
    options = ["A. Turing", "E. Noether"]
    assert load(folder, CHOICE | {"options": options})[0]["options"] == options


def test_several_images_stand_in_their_order(folder):
    row = load(
        folder, CHOICE | {"path": ["green.png", "red.png", "clip/frame3.png"]}, max_frames=1
    )[0]
    assert [image.getpixel((0, 0)) for image in row["images"]] == [GREEN, RED, (30, 30, 30)]
    assert [part["type"] for part in row["prompt"][0]["content"]] == ["image"] * 3 + ["text"]


@pytest.mark.parametrize("path", ["clip.gif", "clip.webp"])
def test_animations_are_videos(folder, path):
    dataset = load(folder, NUMBER | {"path": path}, max_frames=3)
    assert greys(dataset[0]["images"]) == [0, 2, 4]
    # As an image an animation is its first frame.
    dataset = load(folder, CHOICE | {"path": path})
    assert greys(dataset[0]["images"]) == [0]


@pytest.mark.parametrize(
    ("max_frames", "frames"), [(1, [6]), (2, [0, 11]), (4, [0, 4, 7, 11]), (12, list(range(12)))]
)
def test_frames_are_sampled_evenly_in_natural_order(folder, max_frames, frames):
    assert greys(load(folder, NUMBER, max_frames=max_frames)[0]["images"]) == frames
    listed = NUMBER | {"path": [f"clip/frame{i}.png" for i in range(12)]}
    assert greys(load(folder, listed, max_frames=max_frames)[0]["images"]) == frames


def test_video_files(folder):
    """The frames of an .mp4 are chosen as those of a folder."""
    pytest.importorskip("av")
    films.write(folder / "film.mp4", films.steps(12), g="4")
    images = load(folder, NUMBER | {"path": "film.mp4"}, max_frames=4)[0]["images"]
    assert [films.number_of(image, 12) for image in images] == [0, 4, 7, 11]
    (folder / "broken.mp4").write_bytes(b"no film")
    with pytest.raises(DataError, match=r"image, animation or video; got '.*broken.mp4': Invalid"):
        load(folder, NUMBER | {"path": "broken.mp4"})


def test_without_pyav_a_video_is_to_be_extracted(folder, monkeypatch):
    (folder / "a").mkdir()
    (folder / "a" / "clip.MP4").write_bytes(b"a film")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError) as error:
        load(folder, NUMBER | {"path": "a/clip.MP4"})
    assert (
        "got 'a/clip.MP4', and PyAV is missing. Install it with `pip install av`; or extract "
        "frames into a folder, say two a second, with `mkdir -p 'a/clip' && ffmpeg -i "
        "'a/clip.MP4' -vf fps=2 'a/clip/frame%05d.jpg'`, and give 'a/clip'"
    ) in str(error.value)


def test_uniform_indices_and_natural_keys():
    for total in range(1, 40):
        for count in range(1, 45):
            indices = uniform_indices(total, count)
            assert len(indices) == len(set(indices)) == min(total, count)
            assert indices == sorted(indices)
            assert indices[0] >= 0 and indices[-1] < total
            if 1 < count <= total:
                assert (indices[0], indices[-1]) == (0, total - 1)
                steps = np.diff(indices)
                assert steps.max() - steps.min() <= 1
    names = ["frame10.png", "Frame2.png", "frame1.png", "2", "10", "a", "1b", "frame"]
    assert sorted(names, key=natural_key) == [
        *("1b", "2", "10", "a", "frame", "frame1.png", "Frame2.png", "frame10.png")
    ]


def test_image_root_and_absolute_paths(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("elsewhere")
    absolute = str(folder / "green.png")
    dataset = load(other, CHOICE, CHOICE | {"path": absolute}, image_root=folder)
    assert [row["images"][0].getpixel((0, 0)) for row in dataset] == [RED, GREEN]


def test_images_are_upright_and_rgb_on_white(folder):
    tall = Image.new("RGB", (4, 8), RED)
    tall.putpixel((0, 0), GREEN)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: the viewer turns it by 90° clockwise
    tall.save(folder / "turned.png", exif=exif)
    clear = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    clear.putpixel((1, 0), (*BLUE, 255))
    clear.save(folder / "clear.png")
    Image.fromarray(np.full((1, 1), 128 * 256, np.uint16)).save(folder / "deep.png")
    Image.new("CMYK", (1, 1)).save(folder / "cmyk.jpg")
    names = ["turned.png", "clear.png", "deep.png", "cmyk.jpg"]
    turned, clear, deep, cmyk = load(folder, CHOICE | {"path": names})[0]["images"]
    assert {image.mode for image in (turned, clear, deep, cmyk)} == {"RGB"}
    assert (turned.size, turned.getpixel((7, 0))) == ((8, 4), GREEN)
    assert [clear.getpixel((0, 0)), clear.getpixel((1, 0))] == [(255, 255, 255), BLUE]
    assert deep.getpixel((0, 0)) == (128, 128, 128)
    assert cmyk.getpixel((0, 0)) == (255, 255, 255)


# --- datasets


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
    monkeypatch.setattr("ral.data.jsonl._CHUNK", 2)
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


# --- what is wrong with lines


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{not json", "the line must be a JSON object; got b'{not json"),
        ("[" * 100_000, "the line must be a JSON object; got b'[[["),
        ('["B"]', "the line must be a JSON object; got ['B']"),
        ({"problem": None}, "problem must be a text that is not blank; got None"),
        ({"problem": " \n"}, "problem must be a text that is not blank; got ' \\n'"),
        ({"problem": "\ud800"}, "problem must be a text that is not blank; got '\\ud800'"),
        ({"problem_type": "essay"}, "problem_type must be one of 'multiple choice', 'numerical'"),
        ({"problem_type": ["OCR"]}, "problem_type must be one of"),
        ({"data_type": "audio"}, "data_type must be one of 'image', 'video', 'text'; got 'audio'"),
        ({"options": "A, B"}, "options must be a list of texts that are not blank; got 'A, B'"),
        ({"options": ["x", 2]}, "options must be a list of texts that are not blank; got ['x', 2]"),
        ({"options": []}, "options must be 2 to 26 texts for multiple choice; got []"),
        ({"options": ["x"] * 27}, "options must be 2 to 26 texts"),
        ({"solution": None}, "solution must be a text or a number; got None"),
        ({"solution": True}, "solution must be a text or a number; got True"),
        ({"solution": "<answer></answer>"}, "solution must be one answer, bare or between"),
        ({"solution": "<answer>A</answer><answer>B</answer>"}, "solution must be one answer"),
        ({"solution": "C"}, "solution must be the letter of an option, A to B; got 'C'"),
        ({"solution": "A or B"}, "solution must be the letter of an option, A to B"),
        ({"solution": "many", "problem_type": "numerical"}, "solution must be one finite number"),
        ({"solution": float("nan"), "problem_type": "regression"}, "solution must be one finite"),
        ({"process": 3}, "process must be a text, or nothing; got 3"),
        ({"process": "<think>a</think>b"}, "process must be one thinking text"),
        ({"process": "so <answer>B</answer>"}, "process must be one thinking text"),
        ({"problem_id": []}, "problem_id must be a text or a number; got []"),
        ({"path": ""}, "path must be the path of an image"),
        ({"path": []}, "path must be the path of an image"),
        ({"path": [3]}, "path must be the path of an image"),
        ({"path": "none.png"}, "path must be an existing file; got "),
        ({"path": "a\0b"}, "path must be an existing file; got "),
        ({"path": "x" * 5000}, "path must be an existing file; got "),
        ({"path": ["red.png", "none.png"]}, "path must be an existing file; got "),
        (
            {"path": "clip"},
            "path must be an image file, unless data_type is 'video'; got the folder",
        ),
        ({"path": "none", "data_type": "video"}, "path must be an existing file; got "),
        ({"path": "empty", "data_type": "video"}, "path must be a folder with images; got none in"),
        (
            {"path": "data.jsonl", "data_type": "video"},
            "path must be a readable image, animation or video",
        ),
        (
            {"path": "clip.MP4"},
            "path must be an image, a list of images, or one video with data_type 'video'; got the "
            "video 'clip.MP4'",
        ),
        (
            {"path": ["clip.MOV"], "data_type": "video"},
            "path must be an image, a list of images, or one video",
        ),
    ],
)
def test_a_wrong_line_is_named(folder, change, message):
    (folder / "empty").mkdir()
    line = CHOICE | change if isinstance(change, dict) else change
    with pytest.raises(DataError) as error:
        load(folder, CHOICE, line)
    head, *lines = str(error.value).splitlines()
    assert (
        head
        == f"load_jsonl: {folder / 'data.jsonl'} must hold rows that can be trained on; got 1 error"
    )
    assert len(lines) == 1
    assert lines[0].startswith(f"  data.jsonl:2: {message}")
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("field", ["problem", "solution", "problem_type", "data_type", "path"])
def test_a_missing_field_is_named(folder, field):
    line = {name: value for name, value in NUMBER.items() if name != field}
    with pytest.raises(DataError, match=rf"data\.jsonl:1: {field} must be .*; got nothing"):
        load(folder, line)


def test_optional_fields_may_be_absent_or_null(folder):
    line = {k: v for k, v in NUMBER.items() if k not in ("options", "problem_id", "process")}
    nulls = {"options": None, "problem_id": None, "process": "", "data_source": "x"}
    for row in load(folder, line, line | nulls):
        assert (row["options"], row["process"]) == ([], None)


def test_solutions_may_be_json_numbers(folder):
    lines = [NUMBER | {"solution": solution} for solution in (3, 2.5, -1e-3)]
    assert list(load(folder, *lines)["solution"]) == ["3", "2.5", "-0.001"]


def test_all_errors_are_collected_and_twenty_shown(folder):
    wrong = CHOICE | {"problem": "", "solution": "Z", "path": "none.png"}
    with pytest.raises(DataError) as error:
        load(folder, CHOICE, *[wrong] * 9)
    head, *lines = str(error.value).splitlines()
    assert head.endswith("got 27 errors")
    assert len(lines) == 21
    assert [line.split()[1] for line in lines[:4]] == ["problem", "solution", "path", "problem"]
    assert lines[19].startswith("  data.jsonl:8: solution")
    assert lines[20] == "  and 7 more"


def test_long_values_are_cut(folder):
    with pytest.raises(DataError) as error:
        load(folder, CHOICE | {"solution": "x" * 10_000})
    assert len(str(error.value)) < 500


def test_a_json_array_is_told_from_json_lines(folder):
    with pytest.raises(DataError, match=r"one JSON object a line; got a JSON array\. `jq -c"):
        load(folder, json.dumps([CHOICE] * 3, indent=1))


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_no_rows_are_an_error(folder, content):
    path = folder / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="rows must be one or more; got none"):
        load_jsonl(path)


def test_utf8_with_a_mark_and_without(folder):
    path = folder / "data.jsonl"
    line = json.dumps(CHOICE | {"problem": "Was bellt, großer Hund?"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + line.encode())
    assert text_of(load_jsonl(path)[0]).startswith("Was bellt, großer Hund?\n")
    path.write_bytes(line.encode("latin-1"))
    with pytest.raises(DataError, match=r"data\.jsonl:1: the line must be a JSON object"):
        load_jsonl(path)


def test_lines_with_errors_can_be_left_out(folder, caplog):
    rows = (CHOICE | {"path": "none.png"}, NUMBER, "{", CHOICE)
    with caplog.at_level(logging.WARNING, logger="ral.data"):
        dataset = load(folder, *rows, on_error="skip")
    assert list(dataset["problem_type"]) == ["numerical", "multiple choice"]
    assert "left out 2 lines" in caplog.text
    assert "data.jsonl:1: path must be" in caplog.text
    streamed = load(folder, *rows, on_error="skip", streaming=True)
    assert [row["problem_type"] for row in streamed] == ["numerical", "multiple choice"]
    with pytest.raises(DataError, match="got none"):
        load(folder, "{", on_error="skip")


@pytest.mark.parametrize("streaming", [False, True])
def test_an_image_that_is_broken_names_line_and_path(folder, streaming):
    whole = (folder / "red.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no image")
    for name in ("cut.png", "text.png"):
        dataset = load(folder, CHOICE, CHOICE | {"path": name}, streaming=streaming)
        rows = iter(dataset)
        next(rows)
        with pytest.raises(DataError, match=rf"data\.jsonl:2: path must be an image.*{name}"):
            next(rows)
    with pytest.raises(DataError, match="here: path must be an image that can be decoded"):
        read_images([{"path": str(folder / "clip.gif"), "frame": 9, "source": "here"}])


@pytest.mark.parametrize("streaming", [False, True])
def test_broken_images_are_skipped(folder, streaming, caplog):
    whole = (folder / "red.png").read_bytes()
    broken = {
        "cut.png": whole[: len(whole) // 2],
        "empty.png": b"",
        "page.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
        "cut.gif": (folder / "clip.gif").read_bytes()[:-40],
    }
    for name, content in broken.items():
        (folder / name).write_bytes(content)
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), RED).save(buffer, "JPEG")
    (folder / "cut.jpg").write_bytes(buffer.getvalue()[:-40])
    rows = [CHOICE | {"path": name} for name in (*broken, "cut.jpg")]
    rows += [CHOICE | {"path": ["red.png", "empty.png"]}]  # one of a row's is enough
    rows[3]["data_type"] = "video"
    with caplog.at_level(logging.WARNING, logger="ral.data"):
        dataset = load(folder, CHOICE, *rows, NUMBER, on_error="skip", streaming=streaming)
        assert [row["problem_type"] for row in dataset] == ["multiple choice", "numerical"]
    if streaming:
        return  # the generator's logger is another process's, or a later one's
    assert len(dataset) == 2
    assert "left out 6 lines" in caplog.text and "cut.png'" in caplog.text


def test_only_the_formats_that_are_named_are_opened(folder, monkeypatch):
    """Pillow hands an EPS, whatever it is called, to Ghostscript."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n"
    (folder / "a.png").write_bytes(eps)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: pytest.fail("was called"))
    dataset = load(folder, CHOICE | {"path": "a.png"})
    with pytest.raises(DataError, match="cannot identify image file"):
        dataset[0]
    with pytest.raises(DataError, match="path must be a readable image, animation or video"):
        load(folder, CHOICE | {"path": "a.png", "data_type": "video"})


@pytest.mark.parametrize("fields", [{}, {"data_type": "video"}])
def test_messages_show_the_ends_of_a_long_path(folder, fields):
    uri, video = "data:image/png;base64," + "A" * 10**6, "a" * 10**6 + ".mp4"
    for given in (uri, [uri], video, [video]):
        with pytest.raises(DataError, match=r"path must be .*\.\.\..*characters\)") as caught:
            load(folder, CHOICE | {"path": given} | fields)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "long"}, "load_jsonl: style must be one of think, direct; got 'long'"),
        ({"max_frames": 0}, "load_jsonl: max_frames must be an integer ≥ 1; got 0"),
        ({"max_frames": 2.0}, "load_jsonl: max_frames must be an integer ≥ 1; got 2.0"),
        ({"max_frames": True}, "load_jsonl: max_frames must be an integer ≥ 1; got True"),
        ({"on_error": "pass"}, "load_jsonl: on_error must be 'raise' or 'skip'; got 'pass'"),
    ],
)
def test_bad_arguments(folder, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(folder, CHOICE, **options)


def test_files_and_folders_that_are_not_there(folder):
    with pytest.raises(
        FileNotFoundError, match="load_jsonl: path must be a file of JSON lines; got"
    ):
        load_jsonl(folder / "none.jsonl")
    with pytest.raises(FileNotFoundError, match="load_jsonl: image_root must be a folder; got"):
        load(folder, CHOICE, image_root=folder / "none")


# --- prompts


def test_prompts_differ_by_style_type_and_kind_of_images():
    texts = {
        (style, kind, video): question_text("Q?", kind, style=style, video=video)
        for style in STYLES
        for kind in PROBLEM_TYPES
        for video in (False, True)
    }
    # Numerical and regression differ too.
    assert len(set(texts.values())) == len(texts) == 20
    for (style, _, video), text in texts.items():
        assert ("<think>" in text) == (style == "think")
        assert "<answer>" in text and "</answer>" in text
        assert text.splitlines()[int(video)] == "Q?"


def test_marks_of_other_formats_around_a_question_are_left_out():
    text = question_text("<image><image>\nWhat is in <image>? <video>", "OCR")
    assert text.startswith("What is in <image>?\n")


def parts_of(row):
    return [part.get("text", part["type"]) for part in row["prompt"][0]["content"]]


def test_images_stand_where_the_problem_marks_them(folder):
    two = {"path": ["red.png", "green.png"], "options": []} | {"problem_type": "OCR"}

    def parts(problem, **change):
        *first, last = parts_of(load(folder, CHOICE | two | {"problem": problem} | change)[0])
        return [*first, last.split("\nThe answer")[0]]

    images = ["image", "image"]
    middle = ["Is ", "image", " as red as ", "image", "?"]
    assert parts("Is <image> as red as <image>?") == middle
    assert parts("<image> or\n<image>") == ["image", " or\n", "image", ""]
    assert parts("Which? <image><image>") == ["Which? ", *images, ""]
    # Before the text, without marks or with all of them before it.
    assert parts("<image><image>\nWhich?") == parts("Which?") == [*images, "Which?"]
    assert parts("<image>\nWhich? <image><image>") == [*images, "Which?"]
    chosen = {"options": ["<image>", "<image>"], "problem_type": "multiple choice"}
    assert parts("Which barks?", **chosen) == ["Which barks?\nA. ", "image", "\nB. ", "image", ""]
    # The frames of a video stand where its mark does.
    video = {"path": "clip.gif", "data_type": "video"}
    *frames, last = parts("Is it <video> or not?", **video)
    assert frames[0].endswith("in the order of time.\nIs it ")
    assert frames[1:] == ["image"] * 5 and last == " or not?"
    assert parts("<video>\nIs it?", **video)[:5] == ["image"] * 5


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (
            {"problem": "Is <image> red?", "path": ["red.png", "red.png"]},
            "2 times.*got 1 <image> and 0",
        ),
        ({"problem": "Is <image> as red as <image>?"}, "1 times.*got 2 <image> and 0"),
        ({"options": ["<image>", "<image>"]}, "1 times.*got 2 <image> and 0"),
        ({"problem": "Is <video> red?"}, "1 times.*got 0 <image> and 1 <video>"),
        (
            {"problem": "Is <video> as <video>?", "path": "clip.gif", "data_type": "video"},
            "5 times.*got 0 <image> and 2 <video>",
        ),
    ],
)
def test_marks_in_the_middle_that_do_not_match_are_refused(folder, change, got):
    message = rf"data\.jsonl:1: problem must hold <image> once for each image, {got}"
    with pytest.raises(DataError, match=message):
        load(folder, CHOICE | change)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TRL needs Python 3.11")
def test_rows_with_images_in_the_middle_go_to_trl_and_sft(folder):
    from trl import data_utils

    line = {"problem": "Is <image> as red as <image>?", "path": ["red.png", "green.png"]}
    [row] = to_sft(load(folder, CHOICE | line | {"process": "So."}))
    [message] = data_utils.prepare_multimodal_messages(row["prompt"], images=row["images"])
    assert [part.get("image") for part in message["content"]] == [
        *(None, row["images"][0], None, row["images"][1], None)
    ]


def test_special_tokens_in_texts_are_taken_apart(folder):
    from tests.integrations import tiny_checkpoint

    tokens = [
        *("<|image_pad|>", "<ctx>", "<boi>", "<|im_end|>", "</s>", "[IMG]", "<IMG_CONTEXT>"),
        *("<start_of_image>", "<image_soft_token>", "<|image_1|>", "<row_1_col_2>", "<｜User｜>"),
        *("<fake_token_around_image>", "<end_of_turn>", "[/INST]", "<eos>", "<IMAGE>"),
    ]
    for token in tokens:
        line = {"problem": f"Read {token} <b>, a<b or [1].", "options": [token, "no"]}
        row = load(folder, CHOICE | line | {"process": f"It says {token}."})
        apart = f"{token[0]} {token[1:]}"
        [image, text] = parts_of(row[0])
        assert image == "image"
        assert text.startswith(f"Read {apart} <b>, a<b or [1].\nA. {apart}\nB. no\n")
        [message] = to_sft(row)[0]["completion"]
        assert message["content"] == f"<think>It says {apart}.</think>\n<answer>B</answer>"
    tokenizer = tiny_checkpoint.tokenizer()
    text = escaped("".join(tiny_checkpoint.SPECIAL))
    assert not {*tokenizer(text)["input_ids"]} & {*tokenizer.all_special_ids}


def test_placeholders_of_all_processors_are_taken_apart():
    import transformers

    sources = Path(transformers.__file__).parent.glob("models/*/processing_*.py")
    named = (
        r'(?:image|img|video|audio|sound|vision|patch|[be]oi)\w*_token\b[^\n]*?"([<\[]\S+?[>\]])"'
    )
    found = {token for source in sources for token in re.findall(named, source.read_text())}
    assert {"<|image_pad|>", "<image>", "[IMG]", "<|patch|>"} < found and len(found) > 25
    assert [token for token in sorted(found) if escaped(token) == token] == []


def test_prompts_refuse_unknown_styles_and_types():
    with pytest.raises(ValueError, match="question_text: style must be one of think, direct"):
        question_text("Q?", "OCR", style="x")
    with pytest.raises(ValueError, match=r"question_text: problem_type must be one of .*; got 'x'"):
        question_text("Q?", "x")


# --- SFT


def test_sft_rows_are_in_the_form_that_is_rewarded(folder):
    choice = CHOICE | {"process": "A cat does not bark."}
    rows = to_sft(load(folder, choice, NUMBER))
    assert rows.column_names == [
        *("prompt", "images", "solution", "problem_type", "problem_id", "options", "completion")
    ]
    assert rows[0]["completion"] == [
        {
            "role": "assistant",
            "content": "<think>A cat does not bark.</think>\n<answer>B</answer>",
        }
    ]
    assert [len(row["images"]) for row in rows] == [1, 12]
    assert rows[0]["prompt"][0]["content"][0] == {"type": "image"}
    for row in rows:
        columns = {"solution": [row["solution"]], "problem_type": [row["problem_type"]]}
        assert paper_reward([row["completion"]], **columns) == [1.0]


def test_direct_sft_needs_no_thinking(folder):
    rows = to_sft(load(folder, CHOICE, NUMBER, style="direct"), style="direct")
    assert [row["completion"][0]["content"] for row in rows] == [
        "<answer>B</answer>",
        "<answer>1,234</answer>",
    ]
    assert format_reward([row["completion"] for row in rows], style="direct") == [1.0, 1.0]


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_thinking_are_refused_or_skipped(folder, streaming):
    dataset = load(folder, NUMBER, CHOICE, streaming=streaming)
    with pytest.raises(DataError, match=r"process must be a thinking text.*got (1 of 2|nothing)"):
        list(to_sft(dataset))
    [row] = to_sft(dataset, missing="skip")
    assert row["completion"][0]["content"].startswith("<think>I count them.</think>")
    assert len(row["images"]) == 12
    assert "process" not in row


def test_sft_refuses(folder):
    dataset = load(folder, NUMBER)
    with pytest.raises(DataError, match="style must be that of the prompts; got 'direct'"):
        to_sft(dataset, style="direct")
    with pytest.raises(ValueError, match="missing must be 'refuse' or 'skip'; got 'drop'"):
        to_sft(dataset, missing="drop")
    with pytest.raises(DataError, match="got 1 of 1 rows without"):
        to_sft(load(folder, CHOICE), missing="skip")
    with pytest.raises(DataError, match="got nothing in problem 'x'"):
        completion({"solution": "B", "process": "", "problem_id": "x"})


def test_sft_decodes_no_image(folder):
    (folder / "text.png").write_text("no image")
    rows = to_sft(load(folder, NUMBER | {"path": "text.png", "data_type": "image"}))
    assert rows.select_columns("completion")[0]["completion"][0]["role"] == "assistant"
    with pytest.raises(DataError, match="decoded"):
        rows[0]


# --- TRL


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
