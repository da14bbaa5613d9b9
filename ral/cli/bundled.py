"""The bundled digits models: made by their own supervised fine-tuning once, and then kept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from .errors import refusing
from .run import say
from .sources import digits_task

# Of a start's demonstrations, or of a chain's looks, which GRPO can unlearn. A teacher has none.
WRONG_SHARE = {"cell": 0.5, "timestamp": 0.5, "chain": 0.15, "chain_cells": 0.1}
SEED = 0  # of weights and demonstrations, whatever the run's: from some seeds nothing is learnt
_DONE = "start.json"  # written last


def bundled_model(role: str, data: str, style: str, folder: Path) -> str:
    """The folder of a bundled model: a copy of the one in the user's cache, where it is made first.

    With several processes, the first makes it and the others wait.

    Args:
        role: "start", some of whose demonstrations looked at the wrong place, or "teacher".
        data: digits:TASK, the task that it learns.
        style: form of its responses.
        folder: of the run; the model goes into a folder of the role's name.

    Returns:
        A path for `from_pretrained`.
    """
    from accelerate import PartialState

    task = digits_task(data)
    made_of: dict[str, Any] = {
        "task": task, "style": style, "seed": SEED,
        "wrong_share": WRONG_SHARE[task] if role == "start" else 0.0,
    }  # fmt: skip
    path = folder / role
    with PartialState().main_process_first():
        if _made_of(path) != made_of:
            kept = _kept(made_of)
            if _made_of(kept) == made_of:
                say(f"{path}: the bundled {role} of {kept}")
            else:
                kept = _make(kept, role, made_of, path)
            if kept != path:
                shutil.copytree(kept, path, dirs_exist_ok=True)
    return str(path)


def _made_of(path: Path) -> Any:
    try:
        return json.loads((path / _DONE).read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _kept(made_of: dict[str, Any]) -> Path:
    """The place in the cache of a model with these settings, made by this code."""
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode())
    for source in sorted(files("ral.digits").iterdir(), key=lambda file: file.name):
        if source.name.endswith(".py"):
            digest.update(source.read_bytes())
    cache = Path(os.environ.get("RAL_CACHE_DIR") or Path.home() / ".cache" / "ral_kernels")
    return cache / "digits" / digest.hexdigest()[:16]


def _make(kept: Path, role: str, made_of: dict[str, Any], path: Path) -> Path:
    """Make a model in the cache, or where that cannot be written in `path`; where it is."""
    from ..digits.start import train_start

    say(f"{path}: making the bundled {role} by supervised fine-tuning, a minute or two")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{role}-", dir=kept.parent))
    except OSError as error:
        say(f"it is not kept for other runs: {error}")
        made = kept = path
    try:
        with refusing(f"cannot make the bundled {role}"):
            train_start(made, **made_of, log=say)
            (made / _DONE).write_text(json.dumps(made_of) + "\n", "utf-8")
            if made != kept and _made_of(kept) != made_of:  # another run may have been faster
                shutil.rmtree(kept, ignore_errors=True)
                made.rename(kept)
    finally:
        if made != kept:
            shutil.rmtree(made, ignore_errors=True)
    return kept
