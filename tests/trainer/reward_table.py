r"""Answers as people write them, and their rewards: `python -m tests.trainer.reward_table`.

`RIGHT` are 91 right answers, `WRONG` 39 that look right, `HEDGES` those that commit to nothing.
Each kind of answer has one solution. `test_rewards_answers.py` asserts what the table shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ral.rewards import accuracy_reward

OPTIONS = ("the cat", "the dog", "a fox")


@dataclass(frozen=True)
class Kind:
    """Answers to compare with one solution: a letter of `OPTIONS`, or a number."""

    solution: str
    answers: Sequence[str]

    @property
    def is_choice(self) -> bool:
        return self.solution.isalpha()

    def rewards(self) -> list[float]:
        count = len(self.answers)
        return accuracy_reward(
            [f"<think>so</think><answer>{answer}</answer>" for answer in self.answers],
            [self.solution] * count,
            ["multiple choice" if self.is_choice else "numerical"] * count,
            [list(OPTIONS) if self.is_choice else None] * count,
        )

    def math_verify_alone(self) -> list[float]:
        """What math-verify alone says, as a reward function of TRL's examples calls it."""
        from math_verify import parse, verify

        gold = parse(f"${self.solution}$", parsing_timeout=None)
        return [
            float(verify(gold, parse(answer, parsing_timeout=None), timeout_seconds=None))
            for answer in self.answers
        ]


RIGHT: Mapping[str, Kind] = {
    "delimiters": Kind(
        "5",
        (
            *(r"\(5\)", r"\[5\]", "$5$", "$$5$$", r"\(\boxed{5}\)", r"$\boxed{5}$.", r"\boxed{5}"),
            *(r"\left(5\right)", r"\mathbf{5}", r"\text{5}", r"\boxed{\text{5}}", "#### 5"),
        ),
    ),
    "fractions": Kind(
        "1/2",
        (
            *(r"\frac{1}{2}", r"\boxed{\frac{1}{2}}", r"\frac12", r"\dfrac{1}{2}"),
            *(r"$\tfrac{1}{2}$", "½", "1/2", "0.5", "0,5", "50%", r"50\%"),
            *(r"\frac{1}{2} = 0.5", r"\frac{2}{4}"),
        ),
    ),
    "mixed numbers": Kind(
        "1.5",
        (r"1\frac{1}{2}", r"\(1 \frac12\)", "1½", "1 1/2", r"\frac{3}{2}", r"x = \frac{3}{2}"),
    ),
    "negative": Kind(
        "-0.5", (r"\frac{-1}{2}", r"-\frac{1}{2}", "−½", "-1/2", r"\(-0.5\)", "x = −0,5")
    ),
    "angles and units": Kind(
        "60",
        (
            *(r"60^\circ", r"60^{\circ}", r"60\degree", "60°", r"\angle ABC = 60^\circ"),
            *("60 degrees", r"60\,\text{cm}", r"60~\mathrm{cm}^2", r"60 \text{ km/h}", "60 m/s²"),
            r"60\ \mathrm{N·m}",
        ),
    ),
    "thousands": Kind(
        "1234",
        ("1{,}234", "1,234", r"1\,234", "1 234", "1'234", "1.234,0", r"$1{,}234\text{ people}$"),
    ),
    "money": Kind("5", (r"\$5", "$5", "$5.00", "5 €", "USD 5", "5 dollars")),
    "brackets and points": Kind("5", ("(5)", "[5]", "5。", "5.", "（5）", "５", "**5**", "`5`")),
    "sentences": Kind(
        "5",
        (
            *("The answer is 5.", r"The final answer is $\boxed{5}$.", "**Answer:** 5"),
            *("答案是5。", "There are 5 apples.", "Total: 5", "2 + 3 = 5", "5个"),
        ),
    ),
    "roots and powers": Kind("1000", ("10^3", "10³", r"10^{3}", r"1\times10^{3}", "1 × 10³")),
    "scales": Kind("5000000", ("5M", "5 million", r"\$5\text{M}")),
    "letters": Kind(
        "B", (r"\(B\)", r"\textbf{B}", "B。", "答案是B", "**B**: the dog", "B\nthe dog")
    ),
}  # fmt: skip

WRONG: Mapping[str, Kind] = {
    "scales": Kind(
        "5", ("5M", "5 M", "5 bn", "5B", "5k", "5 thousand", "5 dozen", "5万", "$5M", "5 tenths")
    ),
    "taken back": Kind(
        "5",
        (
            *("5 is wrong", "5 is not the answer", "not 5", "5 was incorrect"),
            *("The wrong answer is 5", "5不对", "5 (false)", r"5 \text{ is wrong}"),
        ),
    ),
    "another number": Kind(
        "5",
        (
            *("5!", "5²", "5½", r"5\frac{1}{2}", r"5\sqrt{2}", "-5", r"\frac{1}{5}", "5^2", "5i"),
            *("5.5", "50", r"5\pi", "5 squared", "5 = 6"),
        ),
    ),
    "letters": Kind(
        "B", ("A", "B. the cat", "not B", "B: wrong", "the cat", r"\boxed{C}", "(C) a fox")
    ),
}  # fmt: skip

HEDGES: Mapping[str, Kind] = {
    "numbers": Kind(
        "5",
        (
            *("5 or 6", "5 or six", "5-6", "5 to 7", r"5 \pm 1", r"\(5\) or \(6\)", "5, 6"),
            *("maybe 5", r"\frac{10}{2} or \frac{12}{2}", r"\boxed{5}\boxed{6}", "5 (or six)"),
            *("5 perhaps", "at least 5", "5/six", "between 5 and 6", "5~6", "5或6", "5?", "x > 5"),
            "5 = 5 or 6",
        ),
    ),
    "letters": Kind(
        "B",
        (
            *("A or B", "B or C", "A, B", "A B C", "A\nB\nC", "(A)(B)", r"\(A\) or \(B\)", "B/C"),
            *("B. the dog or C", "A. the cat B. the dog", r"\boxed{A}\boxed{B}", "B或C"),
        ),
    ),
}  # fmt: skip


def accuracy(answer: str, solution: str, problem_type: str, **columns: Any) -> float:
    """The reward of an answer in tags."""
    completion = f"<think>so</think><answer>{answer}</answer>"
    named = {name: [value] for name, value in columns.items()}
    return accuracy_reward([completion], [solution], [problem_type], **named)[0]


def rows() -> Iterator[tuple[str, str, str, str, float, float]]:
    """Of each answer: table, kind, solution, answer, reward, and what math-verify alone says."""
    for name, table in (("right", RIGHT), ("wrong", WRONG), ("hedge", HEDGES)):
        for label, kind in table.items():
            ours, theirs = kind.rewards(), kind.math_verify_alone()
            for answer, reward, other in zip(kind.answers, ours, theirs, strict=True):
                yield name, label, kind.solution, answer, reward, other


def main() -> None:
    """Print every answer, then the sums."""
    import logging

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    found = list(rows())
    print(f"{'table':6} {'kind':20} {'solution':9} {'reward':>6} {'math-verify':>11}  answer")
    for name, label, solution, answer, reward, other in found:
        print(f"{name:6} {label:20} {solution:9} {reward:6.0f} {other:11.0f}  {answer!r}")
    for name in ("right", "wrong", "hedge"):
        rewards = [(reward, other) for table, *_, reward, other in found if table == name]
        ours, theirs = (sum(column) for column in zip(*rewards, strict=True))
        print(f"{name}: {ours:.0f} of {len(rewards)} rewarded; math-verify alone {theirs:.0f}")


if __name__ == "__main__":
    main()
