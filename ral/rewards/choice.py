"""The letter of a multiple-choice answer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

# Longer answers are neither a letter nor a number; the bound limits the work on them.
MAX_ANSWER = 10_000

_LEAD_IN = re.compile(
    r"(?:(?:my|the) )?(?:(?:correct|final|best) )?"
    r"(?:answer|option|choice)(?: is)? ?:? ?(?:option )?",
    re.IGNORECASE,
)
_BARE = re.compile(r"[(\[]? ?([A-Za-z]) ?[)\]]?[.:,;!]?")
# A marked letter, "(B) …", "B. …", "B) …", "B: …", "B - …", and the text after it.
_LABELLED = re.compile(
    r"(?:[(\[] ?([A-Za-z]) ?[)\]][.:]?|([A-Za-z]) ?[.):]|([A-Za-z]) [-–—](?= )) ?(.+)"
)
# A letter that is a word. "it's" and "I'm" have none.
_SINGLE = re.compile(r"(?<![^\W_])(?<!['’])([A-Za-z])(?![^\W_]|['’])")
_ARTICLE = re.compile(r" (?!(?:or|and)\b)[^\W\d_]{2,}", re.IGNORECASE)
_LATEX = re.compile(r"\\(?:boxed|text|mathrm|mathbf) ?\{([^{}]*)\}")


def clean_answer(text: str) -> str:
    """An answer on one line, without markup, control and format characters around or in it."""
    text = "".join(c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf"))
    text = _LATEX.sub(r"\1", _LATEX.sub(r"\1", text))  # twice, for \boxed{\text{B}}
    return " ".join(text.strip("*_`$\"' \t\r\n").split())


def parse_choice(text: str, options: Sequence[str] | None = None) -> str | None:
    """The one letter that an answer commits itself to, in upper case.

    "B", "b", "(B)", "B.", "**B**", "B. the dog", "B: the dog", "Option B" and "The answer is B" are
    B. "A B C D", "A or B", "A. the dog B. the cat" and "A dog" are None, as is any doubtful text:
    after a letter, a text with another single-letter word is None, except for the articles "A" and
    "a" and for "I". Where the options are known, a text that repeats the letter's option counts
    with any words, and one that repeats another option is None.

    Args:
        text: the answer, without tags.
        options: the texts of the options A, B, …, without their letters.

    Returns:
        A letter "A" to "Z", or None. Never raises.
    """
    if len(text) > MAX_ANSWER:
        return None
    # NFKC turns full-width, circled and mathematical letters into plain ones.
    text = clean_answer(unicodedata.normalize("NFKC", text))
    lead_in = _LEAD_IN.match(text)
    if lead_in:
        text = clean_answer(text[lead_in.end() :])
    bare = _BARE.fullmatch(text)
    if bare:
        return bare[1].upper()
    labelled = _LABELLED.fullmatch(text)
    if not labelled:
        return None
    letter = (labelled[1] or labelled[2] or labelled[3]).upper()
    rest = labelled[4]
    said = [i for i, option in enumerate(options or ()) if _same_text(rest, option)]
    if said:
        return letter if ord(letter) - ord("A") in said else None
    return None if _names_another(rest) else letter


def _same_text(a: str, b: str) -> bool:
    a, b = (
        clean_answer(unicodedata.normalize("NFKC", text)).casefold().rstrip(".") for text in (a, b)
    )
    return a == b


def _names_another(text: str) -> bool:
    """Whether a single letter in the text may mean another choice."""
    for match in _SINGLE.finditer(text):
        if match[1] in "Aa" and _ARTICLE.match(text, match.end()):
            continue
        if match[1] == "I" and not text.startswith((".", ")", ":"), match.end()):
            continue
        return True
    return False
