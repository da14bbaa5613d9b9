"""What is wrong with the lines of a data file, and how it is said."""

import io
import json
import logging
import re

import pytest
from PIL import EpsImagePlugin, Image

from ral.data import DataError, load_rows, read_images

from .data_case import CHOICE, NUMBER, RED, load, text_of


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
        == f"load_rows: {folder / 'data.jsonl'} must hold rows that can be trained on; got 1 error"
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


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_no_rows_are_an_error(folder, content):
    path = folder / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="rows must be one or more; got none"):
        load_rows(path)


def test_utf8_with_a_mark_and_without(folder):
    path = folder / "data.jsonl"
    line = json.dumps(CHOICE | {"problem": "Was bellt, großer Hund?"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + line.encode())
    assert text_of(load_rows(path)[0]).startswith("Was bellt, großer Hund?\n")
    path.write_bytes(line.encode("latin-1"))
    with pytest.raises(DataError, match=r"data\.jsonl:1: the line must be a JSON object"):
        load_rows(path)


def test_lines_with_errors_can_be_left_out(folder, caplog):
    rows = (CHOICE | {"path": "none.png"}, NUMBER, "{", CHOICE)
    with caplog.at_level(logging.WARNING, logger="ral.data"):
        dataset = load(folder, *rows, on_error="skip")
    assert list(dataset["problem_type"]) == ["numerical", "multiple choice"]
    assert "left out 2 rows" in caplog.text
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
    assert "left out 6 rows" in caplog.text and "cut.png'" in caplog.text


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
        ({"style": "long"}, "load_rows: style must be one of think, direct; got 'long'"),
        ({"max_frames": 0}, "load_rows: max_frames must be an integer ≥ 1; got 0"),
        ({"max_frames": 2.0}, "load_rows: max_frames must be an integer ≥ 1; got 2.0"),
        ({"max_frames": True}, "load_rows: max_frames must be an integer ≥ 1; got True"),
        ({"fps": 0}, "load_rows: fps must be None or a number > 0; got 0"),
        ({"fps": True}, "load_rows: fps must be None or a number > 0; got True"),
        ({"fps": float("nan")}, "load_rows: fps must be None or a number > 0; got nan"),
        ({"on_error": "pass"}, "load_rows: on_error must be 'raise' or 'skip'; got 'pass'"),
    ],
)
def test_bad_arguments(folder, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(folder, CHOICE, **options)


def test_files_and_folders_that_are_not_there(folder):
    for name in ("none.jsonl", "none", "none/here"):
        with pytest.raises(
            FileNotFoundError, match="load_rows: path must be a file of JSON lines,"
        ):
            load_rows(folder / name)
    with pytest.raises(FileNotFoundError, match="load_rows: image_root must be a folder; got"):
        load(folder, CHOICE, image_root=folder / "none")
