"""Errors that the user can fix become a sentence, without a traceback."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FAILED = 2  # exit status of what a person can mend, as argparse's own
_WAIT = 20.0  # seconds


class Refused(Exception):
    """An error that the user can fix; its text says how."""


@contextmanager
def refusing(what: str = "") -> Iterator[None]:
    """Turn errors with a message for users into `Refused`; any other is a bug and passes.

    Args:
        what: what was tried; it comes before the error's first line.
    """
    import torch

    try:
        yield
    except (
        ImportError, OSError, ValueError, NotImplementedError, torch.OutOfMemoryError,
    ) as error:  # fmt: skip
        raise Refused(f"{what}: {message(error)}" if what else message(error)) from error


@contextmanager
def failing_on_data(folder: Path) -> Iterator[None]:
    """Turn errors of data, memory and disk in training, which are no bugs, into `Refused`.

    Args:
        folder: output_dir.
    """
    import torch

    from ..checkpoints import CheckpointError, DiskFull, is_full
    from ..data import DataError
    from ..rollouts import RolloutError

    try:
        yield
    except (
        DataError, CheckpointError, DiskFull, RolloutError, torch.OutOfMemoryError
    ) as error:  # fmt: skip
        raise Refused(message(error)) from error
    except Exception as error:  # safetensors' errors are no OSError
        if not is_full(error, folder):
            raise
        raise Refused(f"the disk of {folder} is full: {message(error)}") from error


def message(error: BaseException) -> str:
    """An error's text: all lines of a `DataError`, which lists bad rows, else the first."""
    from ..data import DataError

    if isinstance(error, DataError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "trust_remote_code" in str(error):
        return " ".join(lines)  # the last one says how
    return lines[0] if lines else type(error).__name__


def complain(error: Refused) -> None:
    """Write why the command failed to stderr: once, if all processes say the same.

    The launcher kills the other processes as soon as one has ended. So this process waits for the
    first, which has read the same settings and files. If that one continues, only this one failed.
    """
    if is_first_process():
        print(f"ral: {error}", file=sys.stderr, flush=True)
        return
    time.sleep(_WAIT)
    print(f"ral (process {os.environ['RANK']}): {error}", file=sys.stderr, flush=True)


def is_first_process() -> bool:
    """Whether this process writes to the terminal, of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"
