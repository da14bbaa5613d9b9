"""Rows with completions, for supervised fine-tuning."""

import pytest

from ral.data import DataError, completion, to_sft
from ral.rewards import format_reward, paper_reward

from .data_case import CHOICE, NUMBER, load


def test_sft_rows_are_in_the_form_that_is_rewarded(folder):
    choice = CHOICE | {"process": "A cat does not bark."}
    rows = to_sft(load(folder, choice, NUMBER))
    assert rows.column_names == [
        *("prompt", "images", "solution", "problem_type", "problem_id", "options", "evidence"),
        "completion",
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
