"""The number of a numerical answer, and how far it is from the solution."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import NamedTuple

from .answers import MAX_ANSWER, clean_answer
from .formulas import read_formula

# Right within 0.005, about what Video-R1's rounding to 2 decimals lets pass, and within 2 %, so
# that 0.004 is not right for 0.001. Float noise, as of "256.4 trillion", stays below the third.
ABSOLUTE_TOLERANCE = 0.005
RELATIVE_TOLERANCE = 0.02
_FLOAT_NOISE = 1e-9

_LONGEST = 400  # letters of a number with lead-in and unit; each lead-in is another look at them
_CHARACTERS = str.maketrans("−–‐‑﹣－＋．，％／’⁄（）＝：٫٬٪", "------+.,%/'/()=:.,%")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_POWER = re.compile(r"(?<=[0-9)}])[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")

_TIMES = re.compile(r"(?<=[0-9]) ?[xX] ?(?=10 ?(?:\^|\*\*))")  # 6.02 x 10^23
_SCALES = {
    "dozen": 12.0,
    **dict.fromkeys(("hundred", "百"), 1e2),
    **dict.fromkeys(("thousand", "千"), 1e3),
    **dict.fromkeys(("万", "萬"), 1e4),
    **dict.fromkeys(("lakh", "lakhs"), 1e5),
    **dict.fromkeys(("million", "mil", "mill", "mn", "mln", "mio", "百万"), 1e6),
    **dict.fromkeys(("crore", "crores", "千万"), 1e7),
    **dict.fromkeys(("亿", "億"), 1e8),
    **dict.fromkeys(("billion", "bn", "bln", "mrd"), 1e9),
    **dict.fromkeys(("trillion", "tn", "trn", "万亿"), 1e12),
}
# With the space before them: "5 K" is a temperature, "5 m" a length.
_LETTERS = {"k": 1e3, " k": 1e3, "K": 1e3, "M": 1e6, " M": 1e6, "B": 1e9, " B": 1e9, "T": 1e12}
_LETTERS_OF_MONEY = {"m": 1e6, " m": 1e6, "b": 1e9, " b": 1e9, "t": 1e12}
_MONEY = re.compile(r"[^0-9$]*(?:[€£¥₹]|\$[^$]*$)")  # and not $5m$
_HAN_SCALES = re.compile(r"[百千万萬亿億]+")
# Words that take a number back, or leave it open.
_DENIALS = set(
    """
    not no never none neither nor but except unless if wrong incorrect false untrue mistake mistaken
    isn aren wasn weren don doesn didn cannot unknown nicht falsch kein
    maybe perhaps possibly probably likely unlikely presumably unsure uncertain guess think believe
    either otherwise alternatively instead could would might may should least most
    """.split()  # noqa: SIM905
)
# Words after which a number is two numbers, another one, or the subject of a sentence.
_NOT_UNITS = _DENIALS | set(
    """
    or and to vs versus plus minus over oder und bis ou et half halves point squared cubed factorial
    is are was were be been ish
    one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety
    thirds fifths sixths sevenths eighths ninths tenths hundredths thousandths
    """.split()  # noqa: SIM905
)
_NOT_UNITS_HAN = re.compile(r"[或和与到至不没非错误半点又几多]|以[上下]|左右")
_DENIALS_HAN = re.compile(r"[或不没非未错误]|可能|也许")
# "5i", "2\pi r"; but "5x" is 5 times.
_VARIABLE = re.compile(r" ?([abeijnopqruvwxyz])(?![^\W\d_]|['’])")

_LEAD_INS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?:so|thus|hence|therefore|ergo),? |[∴⇒→] ?",
        r"(?:(?:my|the) )?(?:(?:final|correct|right) )?(?:answer|ans\b) ?:? ?",
        r"(?:(?:正确|最终)?的?(?:答案|结果)|总共|一共|共|总数) ?(?:[是为有]|等于)? ?:? ?",
        r"(?:there (?:are|is)|equals|i (?:count|see|counted)) ",
        r"(?:exactly|approximately|approx\.?|about|around|roughly|circa|ca\.|约|大约) ?",
        r"[=≈~:] ?",
    )
]
# What the number is of: "x =", "The length of AB is", "Total:".
_LABEL = r"[^0-9+*/^<>≠≤≥!~|\\=≈:-]{1,60}?"
_LABELLED = re.compile(rf"({_LABEL})(?:(?:'s| is| are| equals| 是|是)(?: ?: ?| )?| ?: ?)(?=[^ ])")
_CURRENCY = r"(?:US|CA|AU|HK|NZ|[ACR])?[$€£¥₹₩₽]|(?:USD|EUR|GBP|JPY|CNY|RMB|INR|Rs\.?)(?= ?[0-9])"
_SIGN = re.compile(rf"(?:([+-]) ?)?(?:{_CURRENCY})? ?(?:([+-]) ?)?")
_DIGITS = r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+"
_FRACTION = re.compile(r"(?:([0-9]+) )?([0-9]+) ?/ ?([0-9]+)(?![0-9.,/])")
_NUMERAL = re.compile(
    r"(?:"
    r"(?P<grouped>[0-9]{1,3}(?:(?:,[0-9]{2,3})*,[0-9]{3}|(?:[ '][0-9]{3})+)(?:\.[0-9]*)?)"
    r"(?![0-9,'])"
    # Points, spaces or apostrophes for thousands, then a decimal comma; or several points.
    r"|(?P<european>[0-9]{1,3}(?:(?:(?:\.[0-9]{3})+|(?:[ '][0-9]{3})+),[0-9]+|(?:\.[0-9]{3}){2,}))"
    r"(?![0-9,.'])"
    # A comma before one, two, or four and more digits cannot separate thousands.
    r"|(?P<comma>[0-9]+,(?:[0-9]{1,2}|[0-9]{4,}))(?![0-9,.'])"
    rf"|(?P<plain>{_DIGITS})(?![0-9,'])"
    r")"
    r"(?:[eE](?P<e>[+-]?[0-9]+))?"
)
_PERCENT = re.compile(r" ?(?:%|per ?cent\b|pct\b|％)", re.IGNORECASE)
_UNIT = re.compile(
    r"(?:\b(?:[cdkmµ]?[mgLJNW]|K|mol|ft|in|s|yd|mi|h|units?)(?:\^?\{?-?[1-3]\}?|\^?[²³])"
    r"|(?<=[^\W\d_])\*(?=[^\W\d_])|[^\W\d_]|[°′″'\"$€£¥₹¢./·() -])*"
)
_WORD = re.compile(r"[^\W\d_]+")


class Number(NamedTuple):
    """A value, and whether a percent sign followed it: 50 % is `Number(50.0, True)`."""

    value: float
    percent: bool


def parse_number(text: str) -> Number | None:
    r"""The single number of an answer.

    It reads LaTeX (`\boxed{\frac{1}{2}}`, `1\frac{1}{2}`, `2\pi`, `60^\circ`, `12\,\text{cm}`), by
    math-verify where that is a formula. It reads digits of any script: "1,234.5", "1 234",
    "1.234,5", "12,5", "−3", "1e3", "1.2 × 10^3", "3/4", "1 1/2", "½". A comma that cannot separate
    thousands is a decimal one. Money, percent and scales count: "$5", "50%", "1.5 million", "5M",
    "5 bn". A lead-in ("about", "x =", "答案是") may come before the number, and the words or signs
    of a unit after it; units are not compared. Sides of an equation must agree: "1/2 = 0.5". Two
    numbers, ranges, "5 is wrong", "nan", "inf" and values beyond the range of floats give None.

    Args:
        text: the answer, without tags.

    Returns:
        A finite number, or None. Never raises.
    """
    if len(text) > MAX_ANSWER:
        return None
    money = _MONEY.match(text) is not None
    text = clean_answer("".join(map(_plain_sign, text)).translate(_CHARACTERS))
    if len(text) > _LONGEST:
        return None
    text = _POWER.sub(lambda power: f"^{{{power[0].translate(_SUPERSCRIPTS)}}}", text)
    text = _TIMES.sub("×", _without_lead_in(_bare(text)))
    sides = re.split(r" ?[=≈]+ ?", text)
    if len(sides) > 1 and re.fullmatch(_LABEL, sides[0]) and not _denies(sides[0]):
        del sides[0]
    if len(sides) > 4:
        return None
    *others, last = sides
    number = _one_number(last, money=money)
    if number is None or not all(_agrees(_one_number(side, sums=True), number) for side in others):
        return None
    return number


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


def _plain_sign(sign: str) -> str:
    """Digits of any script as 0 to 9, ½ as 1/2, ℃ as °C."""
    if sign.isdecimal():
        return str(unicodedata.decimal(sign))
    if unicodedata.decomposition(sign).startswith("<fraction>"):
        return " " + unicodedata.normalize("NFKC", sign)
    return unicodedata.normalize("NFKC", sign) if unicodedata.category(sign) == "So" else sign


def _bare(text: str) -> str:
    """The text without brackets around all of it and without the point of its sentence."""
    while True:
        text = text.strip().rstrip(".。;；")
        inner = text[1:-1]
        brackets = text[:1] + text[-1:]
        if brackets not in ("()", "[]", "{}", "【】") or set(brackets) & set(inner):
            return text
        text = inner


def _without_lead_in(text: str) -> str:
    while True:
        before = text
        for lead_in in (_LABELLED, *_LEAD_INS):
            found = lead_in.match(text)
            if found and not _denies(found[0]):
                text = _bare(clean_answer(text[found.end() :]))
        if text == before:
            return text


def _denies(text: str) -> bool:
    words = {word.casefold() for word in _WORD.findall(text)}
    return not words.isdisjoint(_DENIALS) or _DENIALS_HAN.search(text) is not None


def _one_number(text: str, *, sums: bool = False, money: bool = False) -> Number | None:
    """The number of a text without lead-in, with its unit; `sums` also reads "2+3"."""
    text = _bare(text)
    signs = _SIGN.match(text)
    assert signs is not None  # every part of it is optional
    if signs[1] and signs[2]:
        return None
    sign = signs[1] or signs[2] or ""
    text = text[signs.end() :]
    formula = read_formula(sign + text, sums=sums)
    if formula:
        value, rest = formula
    else:
        fraction = _FRACTION.match(text)
        numeral = fraction or _NUMERAL.match(text)
        if not numeral:
            return None
        read = _fraction(numeral) if fraction else _numeral(numeral)
        if read is None:
            return None
        value = -read if sign == "-" else read
        rest = text[numeral.end() :]
    variable = _VARIABLE.match(rest)
    if variable and (formula or variable[1] != "x") and not (money and variable[1] == "b"):
        return None
    percent = _PERCENT.match(rest)
    scale = _suffix_scale(rest[percent.end() :] if percent else rest, money)
    if scale is None or not math.isfinite(value * scale):
        return None
    return Number(value * scale, percent is not None)


def _fraction(match: re.Match[str]) -> float | None:
    whole, above, below = match.groups()
    return float(whole or 0) + float(above) / float(below) if float(below) else None


def _numeral(match: re.Match[str]) -> float:
    if match["comma"]:
        digits = match["comma"].replace(",", ".")
    elif match["european"]:
        digits = re.sub("[. ']", "", match["european"]).replace(",", ".")
    else:
        digits = re.sub("[, ']", "", match["grouped"] or match["plain"])
    # The exponent stays in the text, where a huge one gives inf and no OverflowError.
    return float(f"{digits}e{match['e'] or 0}")


def _suffix_scale(rest: str, money: bool) -> float | None:
    """The factor that the text after a number stands for; None if that is not a unit."""
    # "10²" and "5¼" were rewritten; other such signs are other numbers.
    if (
        not _UNIT.fullmatch(rest)
        or rest.endswith(("-", "/"))
        or unicodedata.category(rest.lstrip()[:1] or " ") == "No"
    ):
        return None
    words = _WORD.findall(rest)
    if not words:
        return 1.0
    scale = 1.0
    letters = rest[: rest.index(words[0]) + len(words[0])]
    letter = _LETTERS.get(letters) or (_LETTERS_OF_MONEY.get(letters) if money else None)
    if letter is not None:
        scale = letter
        del words[0]
    elif han := _HAN_SCALES.match(words[0]):
        scale = _SCALES.get(han[0], math.nan)
        words[0] = words[0][han.end() :]
    words = [word.casefold() for word in words]
    while words and words[0] in _SCALES:
        scale *= _SCALES[words.pop(0)]
    if words[-1:] == ["times"]:  # "5 times", but not "5 times six"
        words.pop()
    refused = _NOT_UNITS | _SCALES.keys() | {"times"}
    if len(words) > 8 or not refused.isdisjoint(words) or any(map(_NOT_UNITS_HAN.search, words)):
        return None
    return None if math.isnan(scale) else scale


def _agrees(side: Number | None, number: Number) -> bool:
    """Whether a side of an equation says the same as the last one, which may be rounded."""
    return side is not None and any(
        abs(a - b) <= max(0.01 * abs(b), 0.005 if abs(b) < 1 else 0.0)
        for a, b in _readings(side, number)
    )


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
