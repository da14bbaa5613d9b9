"""The text of prompts: forms, marks of images, special tokens."""

import re
import sys
from pathlib import Path

import pytest

from ral.data import DataError, question_text, to_sft
from ral.data.prompts import escaped
from ral.rewards import PROBLEM_TYPES, STYLES

from .data_case import CHOICE, load, parts_of


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
