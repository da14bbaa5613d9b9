"""Answers with one letter or one number: what is read, and what is not."""

from __future__ import annotations

import math
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ral.rewards import parse_choice, parse_number
from tests.hypothesis_settings import REPRODUCIBLE

from . import reward_table
from .reward_table import accuracy

EXAMPLES = settings(REPRODUCIBLE, max_examples=500)


# --- multiple choice


RIGHT_CHOICES = [
    *("B", "b", "(B)", "(b)", "[B]", "B.", "B)", "B:", "B,", " B \n", "**B**", "`B`", '"B"', "$B$"),
    *(r"\boxed{B}", r"$\boxed{\text{B}}$", "B. the dog", "B.the dog", "B) the dog", "(B) the dog"),
    *("B: the dog", "B - the dog", "**B.** the dog", "B. A dog", "B. a dog", "B. I think it is"),
    *("Option B", "option (B)", "The answer is B", "The correct answer is: (B).", "Answer: B"),
    *(
        "Ｂ",
        "Ⓑ",
        "𝐁",
        "B\u200b",
        "\ufeffB",
        "B\x00",
        "B. it's the dog's",
        "The final answer is **B**",
    ),
    *(
        r"\(B\)",
        r"\textbf{B}",
        r"$\boxed{\textbf{(B)}}$",
        r"\textbf{(B)}\ 5 cm",
        "B。",
        "B、the dog",
    ),
    *("答案是B", "正确答案为：B", "故选B。", "选项B", "B选项", "【B】", "「B」", "**B**: the dog"),
    *("B\nthe dog", "B\n\nbecause dogs bark", "B:\nthe dog", "B (the dog)", "B is correct"),
    *("The most likely answer is B", "I'd go with option B", "Answer: Option B", "B — the dog"),
    *("So the answer is B.", "I choose B", "It's B", "#### B", "**Answer:** B", "Ans: B"),
]
NO_CHOICES = [
    *("A B C D", "A or B", "B or A", "A, B", "A,B", "A/B", "AB", "BB", "A and B", "A B", "(A)(B)"),
    *(
        "A. B. C. D.",
        "A.B.C.D",
        "A) B) C)",
        "A. the cat B. the dog",
        "(B) dog (A) cat",
        "B: A, C, D",
    ),
    *("B. or A", "B. or a", "B. or a or c", "B. the dog or C", "B. not A.", "A dog", "A-frame"),
    *("B. A or", "B. A or ...", "B. a AND"),
    *("", " ", ".", "()", "dog", "the dog", "1", "В", "é", "B the dog", "B dog or C cat", "all"),
    *(
        "none",
        "Option A or option B",
        "The answer is A or B",
        "B" * 100,
        "B " * 6000,
        "A\nB",
        "B\nor C",
        "B是错的",
        "不是B",
        "选AB",
        "B: wrong",
        "B is wrong",
        "B. not the right answer",
        "B. " + "dog " * 3000,
        "nan",
    ),
]


@pytest.mark.parametrize("answer", RIGHT_CHOICES)
def test_one_letter_is_a_choice(answer):
    assert parse_choice(answer) == "B"
    assert accuracy(answer, "B", "multiple choice") == 1.0
    assert accuracy(answer, "<answer>B</answer>", "multiple choice") == 1.0
    assert accuracy(answer, "A", "multiple choice") == 0.0


@pytest.mark.parametrize("answer", NO_CHOICES)
@pytest.mark.parametrize("solution", "ABCD")
def test_what_is_not_one_letter_is_no_choice(answer, solution):
    assert parse_choice(answer) is None
    assert accuracy(answer, solution, "multiple choice") == 0.0


def test_known_options_settle_what_a_text_means():
    options = ["4 g", "5 g", "vitamin A"]
    assert accuracy("B. 5 g", "B", "multiple choice") == 0.0  # "g" may be another choice
    assert accuracy("B. 5 g.", "B", "multiple choice", options=options) == 1.0
    assert accuracy("C: Vitamin A", "C", "multiple choice", options=options) == 1.0
    # The text of another option contradicts the letter.
    assert accuracy("B. 4 g", "B", "multiple choice", options=options) == 0.0
    assert accuracy("B. 4 g", "A", "multiple choice", options=options) == 0.0
    assert accuracy("B. 5 g C. vitamin A", "B", "multiple choice", options=options) == 0.0
    assert accuracy("B\n4 g", "B", "multiple choice", options=options) == 0.0
    assert accuracy("B (4 g)", "B", "multiple choice", options=options) == 0.0
    # An option's text stands for its letter.
    assert accuracy("B, 5 g", "B", "multiple choice", options=options) == 1.0
    assert accuracy("B 5 g", "B", "multiple choice", options=options) == 1.0
    assert accuracy("5 g", "B", "multiple choice", options=options) == 1.0
    assert accuracy("The answer is vitamin A.", "C", "multiple choice", options=options) == 1.0
    assert accuracy("5 g or 4 g", "B", "multiple choice", options=options) == 0.0
    assert accuracy("5 g", "B", "multiple choice", options=["5 g", "5 g"]) == 0.0
    assert accuracy("B. .5", "B", "multiple choice", options=["5", ".5"]) == 1.0
    assert accuracy("B", "B", "multiple choice", options=None) == 1.0
    assert accuracy("B", "B", "multiple choice", options=[]) == 1.0


@EXAMPLES
@given(st.lists(st.sampled_from("ABCDEFGH"), min_size=2, max_size=8, unique=True), st.data())
def test_no_list_of_letters_is_a_choice(letters, data):
    separator = st.sampled_from([" ", ", ", "/", " or ", " and ", ". ", ") ", "; ", "\n", ": "])
    text = "".join(letter + data.draw(separator) for letter in letters)
    for solution in letters:
        assert accuracy(text, solution, "multiple choice") == 0.0


# --- numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("42", 42), ("42.", 42), ("4.20", 4.2), (".5", 0.5), ("+5", 5), ("-5", -5), ("- 5", -5)),
        *(("1,234", 1234), ("1,234,567.5", 1234567.5), ("1 234", 1234), ("1\u202f234", 1234)),
        *(
            ("1'234", 1234),
            ("1’234", 1234),
            ("1,23,456", 123456),
            ("12,5", 12.5),
            ("0,1234", 0.1234),
        ),
        *(("−3", -3), ("–3", -3), ("－3", -3), ("٤٢", 42), ("４２", 42), ("४२", 42)),
        *(("1e3", 1000), ("1.5E-3", 0.0015), ("1.2 × 10^3", 1200), (r"1.2\times10^{-3}", 0.0012)),
        *(("3/4", 0.75), ("-3/4", -0.75), ("1 1/2", 1.5), (r"\frac{3}{4}", 0.75)),
        *(("$5", 5), ("$5$", 5), ("-$5", -5), ("€ 5", 5), ("5 €", 5), ("US$5", 5)),
        *(
            ("12.5 cm", 12.5),
            ("12.5cm", 12.5),
            ("5 m^2", 5),
            ("5 m²", 5),
            ("5 km/h", 5),
            ("90°", 90),
        ),
        *(("5 apples", 5), ("1.5 million", 1.5e6), ("2 dozen", 24), (r"5 \text{cm}", 5)),
        *(("about 5", 5), ("≈ 5", 5), ("x = 5", 5), ("The answer is 5.", 5), (r"\boxed{5}", 5)),
        *(("**5**", 5), ("5\x00", 5), ("\u200b5", 5)),
        *(("10²", 100), ("½", 0.5), ("5½", 5.5), ("-½", -0.5), ("10⁻³", 0.001)),
        *(
            (r"\sqrt{2}/2", 0.5**0.5),
            (r"\frac{1+\sqrt{5}}{2}", 1.618033988749895),
            ("2π", 2 * math.pi),
        ),
        *((r"\sqrt[3]{8}", 2), ("6.02 x 10^2", 602), (r"2\pi\text{cm}", 2 * math.pi)),
        *(("1.234,5", 1234.5), ("1 234,5", 1234.5), ("1.234.567", 1234567), ("A$5", 5)),
        *(("5M", 5e6), ("$5.2B", 5.2e9), ("5 bn", 5e9), ("5k", 5e3), ("300 K", 300), ("5 m", 5)),
        *(("$5m", 5e6), ("£5m", 5e6), ("-€ 1.5b", -1.5e9), ("$5m$", 5), (r"\$5\text{m}", 5e6)),
        *(("5 hundred thousand", 5e5), ("5万", 5e4), ("1.2亿个", 1.2e8), ("12 o'clock", 12)),
        *(
            ("The length of AB is 5 cm.", 5),
            ("Number of dogs: 5", 5),
            ("It's 5", 5),
            ("一共有5个", 5),
        ),
        *((r"1.5\times 10^{-4}\ \mathrm{mol\,L^{-1}}", 1.5e-4), ("5 ℃", 5), ("٥٫٥", 5.5)),
        *((r"\therefore x = 5", 5), ("**Final Answer**\n\n\\[\n\\boxed{5}\n\\]", 5)),
        *(("There are **5** red apples on the table in the room", 5), (r"(\frac{1}{2})", 0.5)),
        *(("22/7 ≈ 3.14", 3.14), ("x = 10 ÷ 2 = 5", 5), (r"72^\circ\text{F}", 72)),
    ],
)
def test_numbers(text, value):
    number = parse_number(text)
    assert number is not None and not number.percent
    assert number.value == pytest.approx(value, rel=1e-12)
    assert accuracy(text, str(value), "numerical") == 1.0
    assert accuracy(str(value), f"<answer>{text}</answer>", "numerical") == 1.0
    assert accuracy(text, str(value + max(1, abs(value))), "numerical") == 0.0


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "nan",
            "NaN",
            "inf",
            "-inf",
            "Infinity",
            "1e999",
            "-1e999",
            "1e999999999999",
            "five",
        ),
        *("9" * 400, "9" * 9999, "1" * 20000, "1/0", "0/0", "1 1/0", "9" * 400 + "/" + "9" * 400),
        *(
            "5 or 6",
            "5 and 6",
            "5 to six",
            "5 or six",
            "5-6",
            "5 - 6",
            "5–6",
            "1, 2, 3",
            "1,2,3",
            "1 2",
        ),
        *("1,234,5", "1.2.3", "1/2/3", "12:30", "1 in 4", "5%-10%", "5x6", "5 × 6", "--5", "-$-5"),
        *(
            "²",
            "0x10",
            "1_000",
            "5 6 7 8",
            "≤ 5 or ≥ 6",
            "B",
            "\x00",
            "0 1 2 3 4",
        ),
        "5 a b c d e f",
        *("5 a", "5y", r"2\pi r", "5-", "5 and a half", "5 point two", r"\frac{1}{2} \frac{1}{3}"),
        *(r"2 \pi 3", r"\frac{3}{4}-6", "3×10^3 - 4×10^3", r"\sqrt{-1}", r"\frac{1}{0}", "9^{999}"),
        *("5 = 6", "a = 5, b = 6", "5 =", "x ≠ 5", "|x| = 5", "-x = 5", "1 = 1 = 1 = 1 = 1 = 1"),
        *("不是5", "可能是5", "The wrong answer is 5", "isn't 5", "5 millions or six"),
    ],
)
def test_what_is_not_one_number(text):
    assert parse_number(text) is None
    for solution in ("5", "1", "10", "0", "2"):
        assert accuracy(text, solution, "numerical") == 0.0
        assert accuracy(text, solution, "regression") == 0.0


def test_right_answers_are_right_and_wrong_ones_and_hedges_earn_nothing():
    found = list(reward_table.rows())
    rewards = {
        name: [reward for table, *_, reward, _ in found if table == name]
        for name in ("right", "wrong", "hedge")
    }
    assert len(rewards["right"]) == 91 and sum(rewards["right"]) >= 0.95 * 91
    assert len(rewards["wrong"]) == 39 and sum(rewards["wrong"]) == 0.0
    assert sum(rewards["hedge"]) == 0.0


@pytest.mark.parametrize(
    "formula",
    [
        *(
            "9^{9^{9^{9}}}",
            "9^999^999",
            "(9^{999})^{9999}",
            r"\sqrt{" * 40,
            r"\frac{1}" * 60,
            "((" * 90,
        ),
        *(r"\frac{" + "(" * 9 + "1" + ")" * 9 + "}{2}", r"\frac{1}{2^{1}}" * 9, r"\pi" * 300),
    ],
)
def test_formulas_that_take_long_are_not_evaluated(formula, monkeypatch):
    monkeypatch.setattr("ral.rewards.formulas._value", lambda text: pytest.fail(text))
    assert parse_number(formula) is None


def test_formulas_are_read_in_any_thread_and_leave_the_alarm_clock_alone(caplog):
    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(True))
    try:
        signal.setitimer(signal.ITIMER_REAL, 60)
        texts = [rf"\frac{{\sqrt{{{i}}}}}{{7}}" for i in range(1, 9)]
        with ThreadPoolExecutor(4) as pool:
            numbers = list(pool.map(parse_number, texts * 2))
        assert [parse_number(text) for text in texts] * 2 == numbers
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0.0  # still set
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    wanted = [math.sqrt(i) / 7 for i in range(1, 9)] * 2
    assert [number and number.value for number in numbers] == pytest.approx(wanted, rel=1e-12)
    assert not rang and caplog.text == ""


@pytest.mark.parametrize(
    ("answer", "solution", "right"),
    [
        # within 0.005 …
        *(("3.14159", "3.14", 1), ("3.1", "3.14", 0), ("42.004", "42", 1), ("42.006", "42", 0)),
        *(("-42", "42", 0), ("42.0", "42", 1), ("0.333", "1/3", 1), ("0.33", "0.333333", 1)),
        # … and within 2 %
        *(("0.004", "0.001", 0), ("0.00101", "0.001", 1), ("0.00103", "0.001", 0)),
        *(("0", "0", 1), ("-0", "0", 1), ("0.001", "0", 0), ("0", "0.001", 0)),
        # large numbers are exact but for float noise
        *(("1000001", "1000000", 0), ("1.1 million", "1100000", 1), ("1e20", "1" + "0" * 20, 1)),
        ("256.4 trillion", "256400000000000", 1),
        # percent
        *(("50%", "50", 1), ("50", "50%", 1), ("50 percent", "50 %", 1), ("50%", "0.5", 1)),
        *(
            ("0.5", "50%", 1),
            ("0.5%", "50%", 0),
            ("50.4%", "50%", 0),
            ("5000%", "50%", 0),
            ("5%", "50", 0),
        ),
        *(("50%", "5000", 0), ("5000", "50%", 0), ("50% of all", "50", 1), ("50% or 60%", "50", 0)),
    ],
)
def test_numerical_tolerance(answer, solution, right):
    assert accuracy(answer, solution, "numerical") == right


@pytest.mark.parametrize(
    ("answer", "solution", "reward"),
    [
        *(("100", "100", 1.0), ("90", "100", 0.9), ("125", "100", 0.75), ("300", "100", 0.0)),
        *(("-90", "-100", 0.9), ("90", "-100", 0.0), ("0", "0", 1.0), ("1e-9", "0", 0.0)),
        *(("1e308", "-1e308", 0.0), ("1e308", "1e-308", 0.0), ("45%", "0.5", 0.9), ("x", "1", 0.0)),
    ],
)
def test_regression(answer, solution, reward):
    assert accuracy(answer, solution, "regression") == pytest.approx(reward, abs=1e-12)
