import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ral.rewards import (
    PROBLEM_TYPES,
    REWARD_WEIGHTS,
    STYLES,
    accuracy_reward,
    bare_solution,
    combined_reward,
    completion_text,
    direct_format_reward,
    find_answer,
    format_reward,
    paper_reward,
    rouge,
    word_error_rate,
)
from tests.hypothesis_settings import REPRODUCIBLE

from .reward_table import accuracy

MEGABYTE = 1_000_000
EXAMPLES = settings(REPRODUCIBLE, max_examples=500)


# --- texts and tags


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("B", "B"),
        ([{"role": "assistant", "content": "B"}], "B"),
        ([{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}], "B"),
        ([{"role": "assistant", "content": [{"type": "text", "text": "B"}]}], "B"),
        (
            [{"role": "assistant", "content": [{"type": "image"}, {"text": "a"}, {"text": "b"}]}],
            "ab",
        ),
        ([{"role": "assistant", "content": [{"type": "text", "text": None}, None, 3]}], ""),
        ([{"role": "assistant", "content": None}], ""),
        ([{"role": "assistant", "tool_calls": []}], ""),
        ([], ""),
        (None, ""),
        (7, ""),
        (b"B", ""),
    ],
)
def test_completion_text(completion, text):
    assert completion_text(completion) == text


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>B</answer>", "B"),
        ("<think>x</think>\n<answer> \n B\t</answer> and more", "B"),
        ("<answer></answer>", ""),
        ("B", None),
        ("", None),
        ("<answer>B", None),
        ("B</answer>", None),
        ("</answer>B<answer>", None),
        ("<answer>A</answer><answer>B</answer>", None),
        ("<answer><answer>B</answer></answer>", None),
        ("<answer>A<answer>B</answer>", None),
        ("<think><answer>A</answer></think><answer>B</answer>", None),
    ],
)
def test_find_answer(text, answer):
    assert find_answer(text) == answer


def test_bare_solution():
    assert bare_solution(" <answer> B </answer>\n") == bare_solution(" B ") == "B"


THINK = "<think>it barks</think><answer>B</answer>"
DIRECT = "<answer>B</answer>"


@pytest.mark.parametrize(
    ("text", "think", "direct"),
    [
        (THINK, 1.0, 0.0),
        ("\n <think>\nit\nbarks\n</think>\n\n <answer>\nB\n</answer> \n", 1.0, 0.0),
        (DIRECT, 0.0, 1.0),
        (f"  {DIRECT}\n", 0.0, 1.0),
        (f"so {THINK}", 0.0, 0.0),
        (f"{THINK} done", 0.0, 0.0),
        ("<think>x</think> so <answer>B</answer>", 0.0, 0.0),
        (f"so {DIRECT}", 0.0, 0.0),
        (f"{DIRECT}.", 0.0, 0.0),
        ("<think></think><answer>B</answer>", 0.0, 0.0),
        ("<think>x</think><answer> </answer>", 0.0, 0.0),
        ("<answer>\n</answer>", 0.0, 0.0),
        (f"{THINK}{DIRECT}", 0.0, 0.0),
        (f"{DIRECT}{DIRECT}", 0.0, 0.0),
        ("<think><think>x</think><answer>B</answer>", 0.0, 0.0),
        ("<think>x<answer>B</answer></think>", 0.0, 0.0),
        ("<answer>B</answer><think>x</think>", 0.0, 0.0),
        ("<answer><think>x</think>B</answer>", 0.0, 0.0),
        ("<answer><think>B</answer>", 0.0, 0.0),
        ("</think>x<think><answer>B</answer>", 0.0, 0.0),
        ("</answer>B<answer>", 0.0, 0.0),
        ("<Think>x</Think><Answer>B</Answer>", 0.0, 0.0),
        ("", 0.0, 0.0),
        ("B", 0.0, 0.0),
    ],
)
def test_format(text, think, direct):
    assert format_reward([text], style="think") == format_reward([text]) == [think]
    assert format_reward([[{"role": "assistant", "content": text}]], style="direct") == [direct]
    assert direct_format_reward([text], solution=["B"], trainer_state=None) == [direct]


def test_a_think_tag_at_the_end_of_the_prompt_counts():
    rest = THINK.removeprefix("<think>")
    said = [{"role": "user", "content": "What barks?"}]
    begun = [*said, {"role": "assistant", "content": "<think>\n"}]
    ended = [*said, {"role": "assistant", "content": "<think></think>"}]
    for prompts in (["What barks?\n<think>\n"] * 2, [begun] * 2):
        assert format_reward([rest, THINK], prompts=prompts) == [1.0, 0.0]
    others: list = [["What is <think>?"] * 2, [said] * 2, [ended] * 2, None]
    for prompts in others:
        assert format_reward([rest, THINK], prompts=prompts) == [0.0, 1.0]
    assert format_reward([rest, THINK], prompts=[said] * 2, prompt_end=["<think>", ""]) == [1.0] * 2
    assert direct_format_reward([DIRECT], prompts=[begun], prompt_end=["<think>"]) == [1.0]
    columns = {"solution": ["B"], "problem_type": ["multiple choice"], "prompts": [begun]}
    assert paper_reward([rest], **columns) == [1.0]


def test_thinking_that_trl_parsed_out_of_the_text_counts():
    message = {"role": "assistant", "reasoning_content": "it barks", "content": DIRECT}
    assert format_reward([[message]]) == [1.0]
    assert format_reward([[message | {"reasoning_content": ""}]]) == [0.0]
    assert format_reward([[message | {"content": [{"type": "text", "text": DIRECT}]}]]) == [1.0]
    assert direct_format_reward([[message]]) == [0.0]


def test_format_refuses_an_unknown_style():
    with pytest.raises(
        ValueError, match="format_reward: style must be one of think, direct; got 'x'"
    ):
        format_reward([THINK], style="x")


# --- texts


@pytest.mark.parametrize(
    ("reference", "hypothesis", "rate"),
    [  # by jiwer 4.0.0
        ("STOP sign ahead", "STOP sign ahead", 0.0),
        ("STOP sign ahead", "stop sign", 2 / 3),
        ("a b c d", "a x c", 0.5),
        ("one two", "zero one two three four", 1.5),
        # jiwer refuses an empty reference
        ("", "", 0.0),
        ("", "x", 1.0),
        ("x", "", 1.0),
        ("cafe\u0301", "caf\u00e9", 0.0),
    ],
)
def test_word_error_rate(reference, hypothesis, rate):
    assert word_error_rate(reference, hypothesis) == pytest.approx(rate, abs=1e-12)
    if reference:
        assert accuracy(hypothesis, reference, "OCR") == pytest.approx(max(0.0, 1.0 - rate))


FOX = "the quick brown fox jumps over the lazy dog near the river bank"


@pytest.mark.parametrize(
    ("reference", "hypothesis", "score"),
    [  # by rouge-score 0.1.2, mean F1 of rouge1, rouge2, rougeL, without a stemmer
        (FOX, FOX, 1.0),
        (FOX, "a quick brown dog jumps over the lazy fox", 0.5575757575757576),
        (FOX, "The dog is near the river.", 0.42930856553147567),
        (FOX, "dog", 0.09523809523809525),
        (FOX, "quick fox jumps", 0.2976190476190476),
        (FOX, "", 0.0),
        # here rouge-score has 2/3 for want of two words, and nothing for other scripts
        ("dog", "Dog!", 1.0),
        ("dog", "cat", 0.0),
        ("一只狗在跑", "一只狗在跑", 1.0),
        ("一只狗在跑", "一只猫在跑", (0.8 + 0.5 + 0.8) / 3),
        ("Straße", "STRASSE", 1.0),
        ("?!", "?!", 1.0),
        ("?!", "?", 0.0),
    ],
)
def test_rouge(reference, hypothesis, score):
    assert rouge(reference, hypothesis) == pytest.approx(score, abs=1e-12)
    assert accuracy(hypothesis, reference, "free-form") == pytest.approx(score, abs=1e-12)


def test_a_text_that_is_far_too_long_is_worth_nothing():
    assert rouge(FOX, FOX + " x" * 40_000) > 0.0
    assert rouge(FOX, FOX + " x" * 60_000) == 0.0


# --- whatever a model writes

RIGHT = {
    "multiple choice": "B",
    "numerical": "42",
    "OCR": "STOP",
    "free-form": FOX,
    "regression": "7",
}
TAGGED = st.lists(
    st.one_of(
        st.sampled_from(
            ["<think>", "</think>", "<answer>", "</answer>", "B", "42", "A or B", ", "]
        ),
        st.text(st.characters(), max_size=12),
    ),
    max_size=8,
).map("".join)


@EXAMPLES
@given(TAGGED, st.text(st.characters(), max_size=30), st.sampled_from(PROBLEM_TYPES))
@example("<answer>\ud800</answer>", "\ud800", "free-form")
@example("<answer>\ud800</answer>", "\ud800", "OCR")
def test_no_text_raises_and_rewards_are_between_0_and_1(text, answer, problem_type):
    completions = [text, f"<answer>{answer}</answer>", [{"role": "assistant", "content": text}]]
    for solution in (RIGHT[problem_type], answer):
        columns = {"solution": [solution] * 3, "problem_type": [problem_type] * 3}
        rewards = accuracy_reward(completions, **columns)
        rewards += [r for style in STYLES for r in combined_reward(style)(completions, **columns)]
        assert all(isinstance(r, float) and 0.0 <= r <= 1.0 for r in rewards)


@EXAMPLES
@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
        lambda text: text.strip() and "<" not in text
    )
)
def test_the_right_text_in_tags_is_worth_1(text):
    assert accuracy(text, text, "OCR") == 1.0
    assert accuracy(text, f"<answer>{text}</answer>", "free-form") == pytest.approx(1.0)


@EXAMPLES
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_the_right_number_in_tags_is_worth_1(value):
    assert accuracy(str(value), str(value), "numerical") == 1.0
    assert accuracy(repr(value), f"<answer>{value}</answer>", "regression") == 1.0


@EXAMPLES
@given(st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
def test_the_right_letter_in_tags_is_worth_1(letter):
    assert accuracy(letter, letter, "multiple choice") == 1.0
    assert accuracy(letter.lower(), f"<answer>{letter}</answer>", "multiple choice") == 1.0


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
@pytest.mark.parametrize(
    "unit",
    [
        *(
            "a",
            " ",
            "<answer>",
            "<think>",
            "B. ",
            "1",
            "1,",
            "(",
            "a ",
            "\\boxed{",
            "{}",
            "word fox ",
        ),
        *("狗", "\ufdfa", "\x00", "\n", "-", "x=", "1 ", "٤"),
        *("`", "*a ", "a:", "a is ", "≈", "~", "答案是", "\\frac{", "\\text{a}", "{,}"),
    ],
)
def test_a_megabyte_of_anything_is_no_right_answer(unit, problem_type):
    # A regular expression that backtracks, or a quadratic step, would not come back from these.
    text = unit * (MEGABYTE // len(unit))
    shorter = text[:9_900]  # which is read
    completions = [text, f"<think>x</think><answer>{text}</answer>", f"<think>{text}"]
    completions.append(f"<answer>{shorter}</answer>")
    solution = RIGHT[problem_type]
    rewards = accuracy_reward(completions, [solution] * 4, [problem_type] * 4)
    assert all(0.0 <= reward < 0.01 for reward in rewards)
    assert max(format_reward(completions)) in (0.0, 1.0)


def test_answers_without_tags_are_worth_nothing():
    for problem_type, solution in RIGHT.items():
        assert accuracy_reward([solution], [solution], [problem_type]) == [0.0]
        several = f"<answer>{solution}</answer><answer>{solution}</answer>"
        assert accuracy_reward([several], [solution], [problem_type]) == [0.0]
        behind = f"<answer>{solution}</answer> I am sure."
        assert accuracy_reward([behind], [solution], [problem_type]) == [pytest.approx(1.0)]


# --- errors of the data, and the two rewards in one


def test_errors_of_the_data_are_named():
    with pytest.raises(
        ValueError, match="problem_type must be one of 'multiple choice', 'numerical'"
    ):
        accuracy_reward([DIRECT], ["B"], ["essay"])
    nothing: list = [None]
    with pytest.raises(ValueError, match=r"problem_type must be one of .*; got None"):
        accuracy_reward([DIRECT], ["B"], nothing)
    with pytest.raises(ValueError, match="solution must be a string; got 42"):
        bare: list = [42]
        accuracy_reward([DIRECT], bare, ["numerical"])
    with pytest.raises(ValueError, match="solution must be a list of 2, as the completions; got 1"):
        accuracy_reward([DIRECT] * 2, ["B"], ["numerical"] * 2)
    with pytest.raises(ValueError, match=r"problem_type must be a list of 1, .*; got a string"):
        accuracy_reward([DIRECT], ["B"], "OCR")
    with pytest.raises(ValueError, match=r"options must be a list of 1, .*; got 2"):
        accuracy_reward([DIRECT], ["B"], ["OCR"], options=[[], []])


def test_paper_reward_is_nine_tenths_of_accuracy_and_one_of_format():
    completions = [THINK, THINK.replace("B", "A"), DIRECT, "B"]
    columns = {
        "solution": ["B"] * 4,
        "problem_type": ["multiple choice"] * 4,
        "problem_id": ["1"] * 4,
    }
    assert paper_reward(completions, **columns) == pytest.approx([1.0, 0.1, 0.9, 0.0])
    assert combined_reward("direct")(completions, **columns) == pytest.approx([0.9, 0.0, 1.0, 0.0])
    by_trl = [
        sum(w * r for w, r in zip(REWARD_WEIGHTS, rewards, strict=True))
        for rewards in zip(
            accuracy_reward(completions, **columns), format_reward(completions), strict=True
        )
    ]
    assert paper_reward(completions, **columns) == pytest.approx(by_trl)
    assert paper_reward([], [], []) == []


def test_combined_reward_has_a_name_weights_and_logs_its_parts():
    reward = combined_reward(accuracy_weight=2.0, format_weight=0.5, name="mine")
    assert reward.__name__ == "mine"
    assert paper_reward.__name__ == "paper_reward"
    logged: dict[str, float] = {}
    rewards = reward(
        [THINK, DIRECT], ["B", "A"], ["multiple choice"] * 2, log_metric=logged.__setitem__
    )
    assert rewards == [2.5, 0.0]
    assert logged == {"accuracy": 0.5, "format": 0.5}
    assert reward([THINK], ["B"], ["multiple choice"], options=[["a", "b"]], prompts=[""]) == [2.5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"style": "long"}, "combined_reward: style must be one of think, direct; got 'long'"),
        ({"accuracy_weight": math.nan}, "accuracy_weight must be finite and ≥ 0; got nan"),
        ({"accuracy_weight": math.inf}, "accuracy_weight must be finite and ≥ 0; got inf"),
        ({"format_weight": -0.1}, "format_weight must be finite and ≥ 0; got -0.1"),
    ],
)
def test_combined_reward_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        combined_reward(**arguments)
