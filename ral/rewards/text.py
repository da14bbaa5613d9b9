"""The similarity of two texts: word error rate and ROUGE."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from rapidfuzz.distance import LCSseq, Levenshtein

# A word is a run of letters and digits; scripts written without spaces count by character.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_LONGEST = 100_000


def word_error_rate(solution: str, answer: str) -> float:
    """Edits (substituted, missing, inserted words) per word of the solution, as in jiwer's `wer`.

    Words are split at white space; case and punctuation count.

    Returns:
        0.0 or more; above 1.0 if there are more edits than words. An empty solution gives 0.0 for
        an empty answer and 1.0 otherwise.
    """
    wanted = _normal(solution).split()
    words = _normal(answer).split()
    if not wanted:
        return float(bool(words))
    return Levenshtein.distance(wanted, words) / len(wanted)


def rouge(solution: str, answer: str) -> float:
    """The mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L, as Video-R1 rewards free-form answers.

    Unlike there, words are not stemmed and may be of any script. If the solution has one word,
    ROUGE-2 is left out, so that every text has 1.0 against itself.

    Returns:
        A value in [0, 1]; 0.0 for an answer with more than 100,000 characters beyond twice the
        solution's, which bounds the time.
    """
    if len(answer) > _LONGEST + 2 * len(solution):
        return 0.0
    wanted, words = _tokens(solution), _tokens(answer)
    if not wanted:  # only punctuation: compare characters
        return float(_normal(solution).split() == _normal(answer).split())
    scores = [_rouge_n(wanted, words, 1)]
    if len(wanted) > 1:
        scores.append(_rouge_n(wanted, words, 2))
    scores.append(_f1(LCSseq.similarity(wanted, words), len(wanted), len(words)))
    return sum(scores) / len(scores)


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())


def _rouge_n(wanted: Sequence[str], words: Sequence[str], n: int) -> float:
    a, b = (Counter(zip(*(ws[i:] for i in range(n)), strict=False)) for ws in (wanted, words))
    return _f1((a & b).total(), a.total(), b.total())


def _f1(hits: int, wanted: int, given: int) -> float:
    return 2 * hits / (wanted + given) if hits else 0.0
