"""Words of an answer, from the tokens that a tokenizer cut it into."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

# A character that a byte-level tokenizer split, as `token_texts` writes its parts.
_SPLIT = re.compile(r"^( ?)(.) (\d)/(\d)$", re.DOTALL)
_SPECIAL = re.compile(r"^ ?<\|?[^<>\s]+\|?>$")
_BESIDE = "'’-_"  # signs inside words


@dataclass(frozen=True)
class Word:
    """A word of the answer: its text, with the space before it, and the numbers of its tokens."""

    text: str
    tokens: tuple[int, ...]


def words_of(tokens: Sequence[str]) -> tuple[Word, ...]:
    """Join word pieces to words; every token is in one word, in order.

    A word begins at white space, at a sign that stands for a word by itself (Chinese, Japanese), at
    punctuation and after it, and at a special token. A character that was split over tokens is one.

    Args:
        tokens: as `AttentionMap.tokens` has them, with their spaces.
    """
    found: list[tuple[str, list[int]]] = []
    closed = True  # the next token begins a word
    for number, token in enumerate(tokens):
        split = _SPLIT.match(token)
        text = token
        if split is not None:
            text = split[1] + split[2] if split[3] == "1" else ""
        if split is not None and split[3] != "1" and found:
            found[-1][1].append(number)
            continue
        alone = bool(_SPECIAL.match(text)) or _is_alone(text)
        if closed or alone or not text or text[0].isspace():
            found.append((text, [number]))
        else:
            found[-1] = (found[-1][0] + text, [*found[-1][1], number])
        closed = alone or not text or text[-1].isspace()
    return tuple(Word(text, tuple(numbers)) for text, numbers in found)


def _is_alone(text: str) -> bool:
    """Whether a token is punctuation, or written without spaces between words."""
    signs = text.strip()
    return bool(signs) and (
        all(unicodedata.category(sign)[0] in "PS" and sign not in _BESIDE for sign in signs)
        or any(_is_ideograph(sign) for sign in signs)
    )


def _is_ideograph(sign: str) -> bool:
    return (
        sign > "\u2e7f" and unicodedata.category(sign) == "Lo" and not "\uac00" <= sign <= "\ud7a3"
    )
