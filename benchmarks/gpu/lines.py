"""Files of JSON objects, one a line, that several processes append to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

STICKY = 70  # the exit status of a worker whose CUDA context is lost


def append(file: Path, line: dict[str, Any]) -> None:
    """One write of a whole line, which the lines of other processes do not cut in two."""
    data = (json.dumps(line) + "\n").encode()
    handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(handle, data)
    finally:
        os.close(handle)


def parsed(text: str) -> list[dict[str, Any]]:
    """The objects of a file; a last line that a killed process has cut off is left out."""
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
