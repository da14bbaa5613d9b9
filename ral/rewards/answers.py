r"""The text of an answer without its markup: LaTeX wrappers and spaces, Markdown, signs.

`parse_choice` and `parse_number` read what is left.
"""

from __future__ import annotations

import re
import unicodedata

# Longer answers are neither a letter nor a number; the bound limits the work on them.
MAX_ANSWER = 10_000

# Commands that only say how their argument looks.
_WRAPPERS = (
    r"boxed|fbox|mbox|hbox|text(?:bf|it|rm|sf|tt|normal|up)?|math(?:rm|bf|it|sf|tt|normal)|"
    r"boldsymbol|bm|operatorname|underline|emph|ensuremath"
)
_BRACES = re.compile(rf"(?P<wrapper>\\(?:{_WRAPPERS}) ?\{{)|\\[{{}}]|[{{}}]")
_COMMAND = re.compile(r"\\[A-Za-z]+$")
_REPLACED = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\\(|\\\)|\\\[|\\\]", ""),  # delimiters of a formula
        (r"\\(?:left|right|displaystyle|textstyle|limits|[bB]igg?[lr]?)(?![A-Za-z])", ""),
        (r"\\!", ""),
        (r"(?<=[0-9])\{([,.])\}", r"\1"),  # 1{,}234
        (r"\\(?:[,;: >]|(?:thinspace|enspace|quad|qquad)(?![A-Za-z]))|(?<=[\w})])~", " "),
        (r"\^ ?\{ ?\\circ ?\}|\^ ?\\circ(?![A-Za-z])", "°"),
        *(
            (rf"\\{command}(?![A-Za-z])", sign)
            for command, sign in (
                *(("times", "×"), ("cdot", "·"), ("div", "÷"), ("angle", "∠"), ("degree", "°")),
                *(("mu", "µ"), ("Omega", "Ω"), ("euro", "€"), ("texteuro", "€"), ("pounds", "£")),
                *(("therefore", "∴"), ("implies", "⇒"), ("Rightarrow", "⇒"), ("rightarrow", "→")),
            )
        ),
        (r"\\(?:approx|simeq|sim)(?![A-Za-z])", "≈"),
        (r"\\([%$#&_])", r"\1"),
    )
]
_EMPHASIS = re.compile(
    r"(?<![\w*`])(\*{1,3}|_{1,3}|`{1,3})(?=[^\s*_`])(.{1,300}?)(?<=\S)\1(?![\w*])"
)
_HEADING = re.compile(r"#+ ")


def clean_answer(text: str) -> str:
    """An answer on one line, without markup, control and format characters around or in it."""
    text = "".join(c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf"))
    if "\\" in text or "{" in text:
        for pattern, replacement in _REPLACED:
            text = pattern.sub(replacement, text)
        text = _unwrapped(text)
    text = " ".join(text.split())
    text = _HEADING.sub("", text, count=1) if text.startswith("#") else text
    text = _EMPHASIS.sub(r"\2", text)
    return text.strip("*_`$\"'“”‘’「」『』 ")


def _unwrapped(text: str) -> str:
    r"""The text with the arguments of wrappers in place of the wrappers.

    Braces of other commands stay. A text whose braces do not match stays as it is.
    """
    parts: list[str] = []
    wrappers: list[bool] = []  # of each open brace, whether it is a wrapper's
    end = 0
    for match in _BRACES.finditer(text):
        parts.append(text[end : match.start()])
        end = match.end()
        kept = match["wrapper"] is None
        if match[0] == "}":
            if not wrappers:
                return text
            kept = not wrappers.pop()
        elif match[0] == "{" or not kept:
            wrappers.append(not kept)
        if kept:
            parts.append(match[0])
        elif _COMMAND.search(parts[-1]):  # \pi\text{cm}
            parts.append(" ")
    return text if wrappers else "".join(parts) + text[end:]
