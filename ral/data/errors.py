"""Errors of a data set, line by line."""

from __future__ import annotations

from collections.abc import Sequence

MOST_SHOWN = 20


class DataError(ValueError):
    """Lines of a data file that cannot be used, each with its file, line and field."""


def collected(function: str, path: str, errors: Sequence[str], count: int) -> DataError:
    """One error for many: the first 20, each on a line, and the number of the others.

    Args:
        function: the name that the message begins with.
        path: the file.
        errors: the first errors, "file:line: field must be …; got …".
        count: how many errors there are.
    """
    head = f"{function}: {path} must hold rows that can be trained on; got {count} error"
    lines = [head + ("s" if count != 1 else ""), *(f"  {error}" for error in errors[:MOST_SHOWN])]
    more = count - len(lines) + 1
    if more > 0:
        lines.append(f"  and {more} more")
    return DataError("\n".join(lines))


def shown(value: object) -> str:
    """The value as an error message shows it, cut at 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def shown_path(path: str) -> str:
    """A path as an error message shows it; of a long one, such as a data: URI, both ends."""
    text = repr(path)
    return text if len(text) <= 400 else f"{text[:60]}...{text[-60:]} ({len(path)} characters)"
