"""The number of a numerical answer, and how far it is from the solution."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import NamedTuple

from .choice import MAX_ANSWER, clean_answer

# Right within 0.005, about what Video-R1's rounding to 2 decimals lets pass, and within 2 %, so
# that 0.004 is not right for 0.001. Float noise, as of "256.4 trillion", stays below the third.
ABSOLUTE_TOLERANCE = 0.005
RELATIVE_TOLERANCE = 0.02
_FLOAT_NOISE = 1e-9

_CHARACTERS = str.maketrans("−–‐‑﹣－＋．，％／’", "------+.,%/'")
_SCALES = {
    "dozen": 12.0,
    "hundred": 1e2,
    "thousand": 1e3,
    "million": 1e6,
    "billion": 1e9,
    "trillion": 1e12,
}
# Words after which a number is two numbers, or another one.
_NOT_UNITS = {"or", "and", "to", "nor", "vs", "versus", "plus", "minus", "times", "over", "half"}

_PREFIX = re.compile(
    r"(?:(?:the )?(?:final )?answer(?: is)? ?:? ?)?"
    r"(?:[A-Za-z] ?= ?|[=≈~] ?|(?:approximately|approx\.?|about|around|roughly) )?",
    re.IGNORECASE,
)
_SIGN = re.compile(r"(?:([+-]) ?)?(?:US)?[$€£¥₹]? ?(?:([+-]) ?)?")
_DIGITS = r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+"
_FRACTION = re.compile(
    rf"(?:([0-9]+) )?([0-9]+) ?/ ?([0-9]+)|\\[dt]?frac ?\{{({_DIGITS})\}} ?\{{({_DIGITS})\}}"
)
_NUMERAL = re.compile(
    r"(?:"
    r"(?P<grouped>[0-9]{1,3}(?:(?:,[0-9]{2,3})*,[0-9]{3}|(?:[ '][0-9]{3})+)(?:\.[0-9]*)?)"
    r"(?![0-9,'])"
    # A comma before one, two, or four and more digits cannot separate thousands.
    r"|(?P<comma>[0-9]+,(?:[0-9]{1,2}|[0-9]{4,}))(?![0-9,.'])"
    rf"|(?P<plain>{_DIGITS})(?![0-9,'])"
    r")"
    r"(?:[eE](?P<e>[+-]?[0-9]+)|"
    r" ?(?:[x×*·]|\\times|\\cdot) ?10 ?(?:\^|\*\*) ?\{?(?P<power>[+-]?[0-9]+)\}?)?"
)
_PERCENT = re.compile(r" ?(?:\\?%|per ?cent\b)", re.IGNORECASE)
_UNIT = re.compile(
    r"(?:\b(?:[cdkmµ]?m|ft|in|s)(?:\^?\{?-?[1-3]\}?|\^?[²³])|[^\W\d_]|[°′″'\"$€£¥./·*() -])*"
)
_WORD = re.compile(r"[^\W\d_]+")


class Number(NamedTuple):
    """A value, and whether a percent sign followed it: 50 % is `Number(50.0, True)`."""

    value: float
    percent: bool


def parse_number(text: str) -> Number | None:
    r"""The single number of an answer.

    It reads "1,234.5", "1 234", "12,5" (a comma that cannot separate thousands is a decimal one),
    "−3", "1e3", "1.2 × 10^3", "3/4", "1 1/2", "\frac{3}{4}", "$5", "50%", "1.5 million" and digits
    of any script. A lead-in ("about", "x =") may come before the number, and the words or signs of
    a unit after it; units are not compared. Two numbers, ranges, "nan", "inf" and values beyond the
    range of floats give None.

    Args:
        text: the answer, without tags.

    Returns:
        A finite number, or None. Never raises.
    """
    if len(text) > MAX_ANSWER:
        return None
    digits = (str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    text = clean_answer("".join(digits).translate(_CHARACTERS)).rstrip(".")
    text = text[_match(_PREFIX, text).end() :]
    signs = _match(_SIGN, text)
    if signs[1] and signs[2]:
        return None
    text = text[signs.end() :]
    fraction = _FRACTION.match(text)
    numeral = fraction or _NUMERAL.match(text)
    if not numeral:
        return None
    value = _fraction(numeral) if fraction else _numeral(numeral)
    rest = text[numeral.end() :]
    percent = _PERCENT.match(rest)
    scale = _suffix_scale(rest[percent.end() :] if percent else rest)
    if value is None or scale is None:
        return None
    value *= scale * (-1.0 if "-" in (signs[1], signs[2]) else 1.0)
    return Number(value, percent is not None) if math.isfinite(value) else None


def same_number(answer: Number, solution: Number) -> bool:
    """Whether |answer − solution| ≤ min(0.005, 0.02·|solution|), or is float noise (1e-9 relative).

    Where one of the two is in percent and the other is not, "50%" is right for 50 and for 0.5.
    """
    return any(_close(a, s) for a, s in _readings(answer, solution))


def relative_closeness(answer: Number, solution: Number) -> float:
    """1 − |answer − solution| / |solution|, not below 0; for a solution of 0 it is 1 at 0 only.

    Where one of the two is in percent and the other is not, the closer reading counts.
    """
    return max(_closeness(a, s) for a, s in _readings(answer, solution))


def _match(pattern: re.Pattern[str], text: str) -> re.Match[str]:
    found = pattern.match(text)
    assert found is not None  # every part of the pattern is optional
    return found


def _fraction(match: re.Match[str]) -> float | None:
    whole, above, below, frac_above, frac_below = match.groups()
    denominator = float(below or frac_below)
    if denominator == 0.0:
        return None
    return float(whole or 0) + float(above or frac_above) / denominator


def _numeral(match: re.Match[str]) -> float:
    if match["comma"]:
        digits = match["comma"].replace(",", ".")
    else:
        digits = re.sub("[, ']", "", match["grouped"] or match["plain"])
    # The exponent stays in the text, where a huge one gives inf and no OverflowError.
    return float(f"{digits}e{match['e'] or match['power'] or 0}")


def _suffix_scale(rest: str) -> float | None:
    """The factor that the text after a number stands for; None if that is not a unit."""
    # "10²" and "5½" are other numbers than 10 and 5.
    if not _UNIT.fullmatch(rest) or unicodedata.category(rest.lstrip()[:1] or " ") == "No":
        return None
    words = [word.casefold() for word in _WORD.findall(rest)]
    if len(words) > 5 or not _NOT_UNITS.isdisjoint(words):
        return None
    return _SCALES.get(words[0], 1.0) if words else 1.0


def _readings(answer: Number, solution: Number) -> list[tuple[float, float]]:
    readings = [(answer.value, solution.value)]
    if answer.percent != solution.percent:
        a = answer.value / 100 if answer.percent else answer.value
        s = solution.value / 100 if solution.percent else solution.value
        readings.append((a, s))
    return readings


def _close(answer: float, solution: float) -> bool:
    tolerance = min(ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE * abs(solution))
    return abs(answer - solution) <= max(tolerance, _FLOAT_NOISE * abs(solution))


def _closeness(answer: float, solution: float) -> float:
    if solution == 0.0:
        return float(answer == 0.0)
    return max(0.0, 1.0 - abs(answer - solution) / abs(solution))
