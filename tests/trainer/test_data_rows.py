"""What a row of a data file becomes: prompt, images, solution, options."""

import numpy as np
from PIL import Image

from .data_case import BLUE, CHOICE, GREEN, NUMBER, RED, greys, load, text_of


def test_a_row_has_what_trl_wants(folder):
    row = load(folder, CHOICE)[0]
    assert set(row) == {
        *("prompt", "images", "solution", "problem_type", "problem_id", "options", "process"),
        "evidence",
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
    assert row["evidence"] == []


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
