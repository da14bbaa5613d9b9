"""One run in an output folder at a time: `locked` keeps out other processes."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)

LOCK = "ral.lock"
_held: dict[Path, int] = {}  # folders of this process, and how often it has asked for each


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold a training run's folder, against other processes; one process may hold it repeatedly.

    The lock ends with the process, however that ends.

    Args:
        folder: output_dir of the run; it is made.

    Raises:
        BlockingIOError: another process holds it.
    """
    folder = Path(folder).resolve()
    if folder in _held:
        _held[folder] += 1
        try:
            yield
        finally:
            _held[folder] -= 1
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise BlockingIOError(
                f"train: output_dir must not be in use by another run; got {folder}, which is in "
                f"use by {holder}"
            ) from None
        except OSError as error:
            logger.warning("train: %s cannot be locked against other runs: %s", folder, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        _held[folder] = 1
        try:
            yield
        finally:
            del _held[folder]
