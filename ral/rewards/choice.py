"""The letter of a multiple-choice answer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from .answers import MAX_ANSWER, clean_answer

_LEAD_IN = re.compile(
    r"(?:(?:so|thus|hence|therefore),? )?"
    r"(?:"
    r"(?:(?:my|the) )?(?:(?:most )?(?:correct|final|best|right|likely|appropriate) )?"
    r"(?:answer|option|choice|letter|ans\b)(?: is)? ?[:：\-–—]? ?"
    r"(?:(?:the )?(?:option|choice|letter) )?"
    r"|(?:i(?:'d| would)? (?:choose|pick|select|go with)|it(?:'s| is)) "
    r"(?:(?:option|choice|letter) )?"
    r"|(?:(?:正确|最终)?的?(?:答案|选项) ?(?:应?该?[是为选])?|(?:故|应该?)?选(?:择|项)?) ?[:：]? ?"
    r")",
    re.IGNORECASE,
)
_BARE = re.compile(r"[(\[【]? ?([A-Za-z]) ?[)\]】]?[.:,;!、。]?(?: ?选项)?。?")
_AFFIRMED = re.compile(
    r" is (?:the )?(?:(?:correct|right|best)(?: (?:answer|option|choice))?|answer)\.?$"
    r"|是?(?:正确的?|对的)(?:答案|选项)?。?$",
    re.IGNORECASE,
)
# A marked letter, "(B) …", "B. …", "B) …", "B: …", "B - …", "B (…)", and the text after it.
_LABELLED = re.compile(
    r"(?:[(\[【] ?([A-Za-z]) ?[)\]】][.:]?|([A-Za-z]) ?[.):、。]|([A-Za-z]) [-–—](?= )"
    r"|([A-Za-z])(?= ?\([^()]+\)$)) ?(.+)"
)
# A letter before what may be the text of its option.
_BEFORE_OPTION = re.compile(r"[(\[【]?([A-Za-z])(?: [-–—] |[)\]】.:,;、。]{0,2} ?)(.+)")
# A letter that is a word. "it's" and "I'm" have none.
_SINGLE = re.compile(r"(?<![^\W_])(?<!['’])([A-Za-z])(?![^\W_]|['’])")
_ARTICLE = re.compile(r" (?!(?:or|and)\b)[^\W\d_]{2,}", re.IGNORECASE)
_DENIAL = re.compile(
    r"(?:(?:is|was|are) )?(?:not|wrong|incorrect|ruled out|eliminated)\b[^\w]*"
    r"(?:(?:the )?(?:correct|right)(?: (?:answer|option|choice))?|it|this)?[^\w]*",
    re.IGNORECASE,
)


def parse_choice(text: str, options: Sequence[str] | None = None) -> str | None:
    r"""The one letter that an answer commits itself to, in upper case.

    "B", "b", "(B)", "B.", "B。", "**B**", "\(B\)", "\textbf{B}", "B. the dog", "**B**: the dog",
    "Option B", "The answer is B" and "答案是B" are B, and so is "B" on a line before a text.
    "A B C D", "A or B", "A. the dog B. the cat" and "A dog" are None, as is any doubtful
    text: after a letter, a text with another single-letter word is None, except for the articles
    "A" and "a" and for "I". Where the options are known, a text that repeats the letter's option
    counts with any words, one that repeats another option is None, and the text of just one option
    stands for its letter.

    Args:
        text: the answer, without tags.
        options: the texts of the options A, B, …, without their letters.

    Returns:
        A letter "A" to "Z", or None. Never raises.
    """
    if len(text) > MAX_ANSWER:
        return None
    options = options or ()
    said = _letters_of(text, options)
    # NFKC turns full-width, circled and mathematical letters into plain ones.
    text = unicodedata.normalize("NFKC", text)
    first, _, others = text.strip().partition("\n")
    if others.strip() and _BARE.fullmatch(clean_answer(first)):
        first = clean_answer(first)
        text = f"{first}{'' if first[-1] in '.:)、。' else '.'} {others}"
    text = clean_answer(text)
    lead_in = _LEAD_IN.match(text)
    if lead_in:
        text = clean_answer(text[lead_in.end() :])
    text = _AFFIRMED.sub("", text)
    bare = _BARE.fullmatch(text)
    if bare:
        return bare[1].upper()
    said = said or _letters_of(text, options)
    if len(said) == 1:
        return said[0]
    for pattern in (_BEFORE_OPTION, _LABELLED):
        labelled = pattern.fullmatch(text)
        if not labelled:
            continue
        *letters, rest = labelled.groups()
        letter = next(filter(None, letters)).upper()
        said = _letters_of(rest, options)
        if said:
            return letter if letter in said else None
    if not labelled or _names_another(rest) or _DENIAL.fullmatch(rest):
        return None
    return letter


def _letters_of(text: str, options: Sequence[str]) -> list[str]:
    """The letters of the options that a text repeats."""
    text = _plain(text)
    return [chr(ord("A") + i) for i, option in enumerate(options) if _plain(option) == text]


def _plain(text: str) -> str:
    text = clean_answer(unicodedata.normalize("NFKC", text)).casefold().rstrip(".。")
    inner = text[1:-1]
    return inner if text[:1] == "(" and text[-1:] == ")" and not {*"()"} & {*inner} else text


def _names_another(text: str) -> bool:
    """Whether a single letter in the text may mean another choice."""
    for match in _SINGLE.finditer(text):
        if match[1] in "Aa" and _ARTICLE.match(text, match.end()):
            continue
        if match[1] == "I" and not text.startswith((".", ")", ":"), match.end()):
            continue
        return True
    return False
