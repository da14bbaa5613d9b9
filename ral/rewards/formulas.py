r"""The value of a formula such as \frac{\sqrt{3}}{2}, by math-verify."""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import re
import threading

if importlib.util.find_spec("math_verify") is None:  # not in the middle of a run
    raise ImportError("ral.rewards needs math-verify: `pip install 'math-verify>=0.9,<0.10'`")

_LONGEST = 200
_GROUP = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
_NUMBER = r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+"
_TOKEN = re.compile(
    rf" *(?:(?P<n>{_NUMBER})|(?P<f>\\[dtc]?frac *(?:{_GROUP}|[0-9]) *(?:{_GROUP}|[0-9]))"
    rf"|(?P<s>\\sqrt *(?:\[[0-9]\])? *(?:{_GROUP}|[0-9])|√ *(?:{_GROUP}|\([^()]*\)|[0-9]+))"
    rf"|(?P<p>\\pi(?![A-Za-z])|π)|(?P<e>\^ *(?:{_GROUP}|[+-]?[0-9]+|\([^()]*\)))"
    r"|(?P<x>\*\*?|[×·÷/])|(?P<a>[+-]))"
)
# Of a formula the kinds of its tokens: one value, and not several next to each other.
_FACTOR = "(?:[sp]e?)"
_TERM = f"(?:nf|f|ne|nxne|(?:[nf]x?)?{_FACTOR}(?:x?{_FACTOR})*)(?:xn)?"  # 1½, 2^3, 3·10^4, 2π/3
_ONE_VALUE = re.compile(f"a?{_TERM}")
_SURD = re.compile(f"(?=.*[sp])a?(?:n|{_TERM})(?:a(?:n|{_TERM}))+")  # 1+√2
_SUM = re.compile(r"a?(?:n|ne|f|fe|[sp]e?)(?:[xa](?:n|ne|f|fe|[sp]e?))+")
# math-verify is asked about nothing else, so that no formula takes it long.
_WITHIN = re.compile(
    r"(?:[0-9.+*/×·÷^ {}()π√-]|\\sqrt *\[[0-9]\]|\\(?:[dtc]?frac|sqrt|pi)(?![A-Za-z]))*"
)
_POWER = (
    r"[+-]?(?:[0-9]{1,3}(?:\.[0-9]{1,3})?(?: */ *[0-9]{1,2})?"
    r"|\\[dtc]?frac *\{?[0-9]\}? *\{?[0-9]\}?)"
)
_EXPONENT = re.compile(rf"\^ *(?:\{{ *{_POWER} *\}}|\( *{_POWER} *\)|{_POWER})(?![0-9.]| *\^)")
_lock = threading.Lock()  # sympy's and antlr's caches are shared by threads


def read_formula(text: str, *, sums: bool = False) -> tuple[float, str] | None:
    r"""The value of the formula that a text begins with, and the text after it.

    A formula has fractions, roots, powers or π: `1\frac{1}{2}`, `2\pi`, `\frac{1+\sqrt{5}}{2}`,
    `3×10^{-2}`. It stands for one value: sums and products of plain numbers are left alone, because
    "5-6" is a range.

    Args:
        text: of `clean_answer`.
        sums: also evaluate "2+3" and "3×4".

    Returns:
        (value, rest); None where the text begins with no formula, or the value is not finite.
    """
    tokens: list[tuple[str, int]] = []
    end = 0
    while token := _TOKEN.match(text, end):
        tokens.append((token.lastgroup or "", token.end()))
        end = token.end()
        if end > _LONGEST:
            return None
    while tokens:  # a unit may begin with what could be an operator
        kinds = "".join(kind for kind, _ in tokens)
        end = tokens[-1][1]
        patterns = (_ONE_VALUE, _SURD, _SUM) if sums else (_ONE_VALUE, _SURD)
        if any(pattern.fullmatch(kinds) for pattern in patterns):
            formula = re.sub(r"(?<=[0-9]),(?=[0-9]{3})", "", text[:end])
            powers, brackets = formula.count("^"), formula.count("(")
            if not _WITHIN.fullmatch(formula) or powers > 4 or brackets > 8:
                return None
            if len(_EXPONENT.findall(formula)) != powers:  # 9^{9^9}
                return None
            value = _value(formula)
            return None if value is None else (value, text[end:])
        if tokens.pop()[0] not in "xa":
            return None
    return None


@functools.lru_cache(maxsize=4096)
def _value(formula: str) -> float | None:
    from math_verify import parser

    # Its clock is an alarm signal, which would break off the main thread's work, and works in no
    # other thread. The formulas are bounded instead. It warns of that in every process.
    logging.getLogger(parser.__name__).addFilter(_is_not_about_the_clock)
    formula = re.sub(r"\^ *\(([^()]*)\)", r"^{\1}", formula.replace("**", "^"))
    formula = re.sub(r"\^ *([+-]?[0-9]+)", r"^{\1}", formula)
    formula = re.sub(r"√ *(?:\(([^()]*)\)|([0-9]+))", r"\\sqrt{\1\2}", formula)
    for sign, command in (
        ("×", r"\times "),
        ("·", r"\cdot "),
        ("÷", "/"),
        ("π", r"\pi "),
        ("√", r"\sqrt"),
    ):
        formula = formula.replace(sign, command)
    with _lock:
        found = parser.parse(
            f"${formula}$",
            [parser.LatexExtractionConfig()],
            fallback_mode="no_fallback",
            parsing_timeout=None,
        )
        try:
            value = float(found[0])
        except (IndexError, TypeError, ValueError, OverflowError, ArithmeticError):
            return None  # no formula, a complex value, 1/0 or beyond the range of floats
    return value if math.isfinite(value) else None


def _is_not_about_the_clock(record: logging.LogRecord) -> bool:
    return "Timeout is disabled" not in record.getMessage()
