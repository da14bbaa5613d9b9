"""The bundled digits models: made by their own supervised fine-tuning, on first use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import refusing
from .run import say
from .sources import digits_task

WRONG_SHARE = {"start": 0.5, "teacher": 0.0}  # of the demonstrations, which GRPO can unlearn
SEED = 0  # of weights and demonstrations, whatever the run's: from some seeds nothing is learnt
_DONE = "start.json"  # written last


def bundled_model(role: str, data: str, style: str, folder: Path) -> str:
    """The folder of a bundled model, which is made if it is not there.

    With several processes, the first makes it and the others wait.

    Args:
        role: "start", half of whose demonstrations looked at the wrong place, or "teacher".
        data: digits:TASK, the task that it learns.
        style: form of its responses.
        folder: of the run; the model goes into a folder of the role's name.

    Returns:
        A path for `from_pretrained`.
    """
    from accelerate import PartialState

    made_of: dict[str, Any] = {
        "task": digits_task(data), "style": style, "seed": SEED, "wrong_share": WRONG_SHARE[role],
    }  # fmt: skip
    path = folder / role
    with PartialState().main_process_first():
        if _made_of(path) != made_of:
            _make(path, role, made_of)
    return str(path)


def _made_of(path: Path) -> Any:
    try:
        return json.loads((path / _DONE).read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _make(path: Path, role: str, made_of: dict[str, Any]) -> None:
    from ..digits.start import train_start

    say(f"{path}: making the bundled {role} by supervised fine-tuning, a minute or two")
    with refusing(f"cannot make the bundled {role}"):
        train_start(path, **made_of, log=say)
    (path / _DONE).write_text(json.dumps(made_of) + "\n", "utf-8")
