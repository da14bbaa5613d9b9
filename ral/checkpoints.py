"""Checkpoints on disk: which one is complete, and what `RALTrainer` adds to them.

transformers writes a checkpoint in place, file by file: weights, tokenizer, optimizer, scheduler,
each process's random state, and trainer_state.json last. A killed process leaves a folder with a
checkpoint's name. That folder does not load, or it loads and training continues with another
optimizer.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

SEAL = "ral_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "pytorch_model_fsdp.bin")
_INDEX = "model.safetensors.index.json"


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint of a training run, as `train(resume_from_checkpoint=...)`.

    A warning names those of higher steps that are not complete (`why_incomplete`).

    Args:
        folder: output_dir of the run; it need not exist.

    Returns:
        The complete `checkpoint-<step>` of the highest step, or None.
    """
    for path in reversed(_by_step(Path(folder))):
        reason = why_incomplete(path)
        if reason is None:
            return path
        logger.warning("last_checkpoint: %s is not complete: %s", path, reason)
    return None


def why_incomplete(checkpoint: str | Path) -> str | None:
    """Why training cannot resume from a checkpoint, or None if nothing is missing.

    A checkpoint of `RALTrainer` is sealed: its last file lists every file with its size, and this
    function compares the sizes. For another trainer's checkpoint it checks these:

    - trainer_state.json, which is written last, is whole, and of the step in the folder's name;
    - weights: of each safetensors file the size is what its header says, and every shard of an
      index is there; or the shards of FSDP with their .metadata, or what DeepSpeed calls `latest`;
    - optimizer and scheduler are there;
    - there are random states of all processes from 0 to the highest, and
    - every .pt, .pth and .bin file has its archive's directory, which is its end.

    The contents of tensors are not read.

    Args:
        checkpoint: a folder that `Trainer` wrote.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        return "it is not a folder"
    if (checkpoint / SEAL).exists():
        return _why_unsealed(checkpoint) or _why_no_optimizer(checkpoint)
    return (
        _why_no_state(checkpoint)
        or _why_no_weights(checkpoint)
        or _why_no_optimizer(checkpoint)
        or _why_no_random_state(checkpoint)
        or _why_truncated(checkpoint)
    )


# -- what RALTrainer adds -----------------------------------------------------------------------


def seal(checkpoint: Path, state: dict[str, Any]) -> None:
    """Write the list of a checkpoint's files, after they are on the disk, together with `state`.

    Args:
        checkpoint: a folder that every process has finished writing.
        state: what `read_state` returns; anything that JSON can hold.
    """
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    sizes.pop(SEAL, None)
    unfinished = checkpoint / f"{SEAL}.part"
    with open(unfinished, "w", encoding="utf-8") as file:
        json.dump({**state, "files": sizes}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, checkpoint / SEAL)


def read_state(checkpoint: str | Path) -> dict[str, Any] | None:
    """What `seal` wrote into a checkpoint, or None if that is another trainer's."""
    path = Path(checkpoint) / SEAL
    if not path.exists():
        return None
    state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return state


def rotate(folder: Path, limit: int | None, newest: Path, best: str | None) -> None:
    """Delete checkpoints, the oldest first, until `limit` are left.

    transformers deletes before every process has written its files, and may mistake a folder of a
    killed process for the newest.

    Args:
        folder: output_dir of the run.
        limit: save_total_limit; None or 0 deletes nothing.
        newest: the checkpoint just completed; it stays.
        best: the best one, which stays, too.
    """
    if limit is None or limit <= 0:
        return
    kept = {newest.resolve()} | ({Path(best).resolve()} if best is not None else set())
    others = [path for path in _by_step(folder) if path.resolve() not in kept]
    others.sort(key=lambda path: path.stat().st_mtime)
    excess = len(others) + len(kept) - max(limit, len(kept))
    for path in others[: max(excess, 0)]:
        logger.info("Deleting %s because of save_total_limit=%d", path, limit)
        shutil.rmtree(path, ignore_errors=True)


def _by_step(folder: Path) -> list[Path]:
    found = []
    for path in folder.glob("checkpoint-*"):
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


# -- what is looked at --------------------------------------------------------------------------


def _why_unsealed(checkpoint: Path) -> str | None:
    sizes = (_read_json(checkpoint / SEAL) or {}).get("files")
    if not isinstance(sizes, dict):
        return f"{SEAL} is not whole"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
    return None


def _why_no_state(checkpoint: Path) -> str | None:
    path = checkpoint / "trainer_state.json"
    if not path.exists():
        return "trainer_state.json is missing"
    step = (_read_json(path) or {}).get("global_step")
    if step is None:
        return "trainer_state.json is not whole"
    match = _NAME.fullmatch(checkpoint.name)
    if match and step != int(match[1]):
        return f"trainer_state.json is of step {step}"
    return None


def _why_no_weights(checkpoint: Path) -> str | None:
    for path in checkpoint.rglob("*.safetensors"):
        if not _safetensors_is_whole(path):
            return f"{path.relative_to(checkpoint)} is truncated"
    index = checkpoint / _INDEX
    if index.exists():
        names = (_read_json(index) or {}).get("weight_map")
        if not names:
            return f"{_INDEX} is not whole"
        missing = sorted(set(names.values()) - {path.name for path in checkpoint.iterdir()})
        return f"{missing[0]} is missing" if missing else None
    if any((checkpoint / name).exists() for name in _WEIGHTS):
        return None
    return _why_no_shards(checkpoint, "pytorch_model") or None


def _why_no_optimizer(checkpoint: Path) -> str | None:
    latest = checkpoint / "latest"
    if latest.exists():  # DeepSpeed keeps optimizer and scheduler with its weights
        return None
    if not (checkpoint / "scheduler.pt").exists():
        return "scheduler.pt is missing"
    if any((checkpoint / name).exists() for name in ("optimizer.pt", "optimizer.bin")):
        return None
    return _why_no_shards(checkpoint, "optimizer")


def _why_no_shards(checkpoint: Path, prefix: str) -> str | None:
    """FSDP's folders `<prefix>_<n>` end with .metadata; DeepSpeed's is named in `latest`."""
    latest = checkpoint / "latest"
    if latest.exists():
        tag = checkpoint / latest.read_text(encoding="utf-8").strip()
        return None if any(tag.glob("*.pt")) else f"{tag.name} holds nothing"
    shards = [path for path in checkpoint.glob(f"{prefix}_*") if path.is_dir()]
    if not shards:
        what = "weights" if prefix == "pytorch_model" else f"{prefix}.pt"
        return f"{what} missing"
    for path in shards:
        if not (path / ".metadata").exists():
            return f"{path.name}/.metadata is missing"
    return None


def _why_no_random_state(checkpoint: Path) -> str | None:
    if (checkpoint / "rng_state.pth").exists():
        return None
    names = {path.name for path in checkpoint.glob("rng_state_*.pth")}
    if not names:
        return "rng_state.pth is missing"
    for number in range(len(names)):
        if f"rng_state_{number}.pth" not in names:
            return f"rng_state_{number}.pth is missing"
    return None


def _why_truncated(checkpoint: Path) -> str | None:
    for path in checkpoint.rglob("*"):
        if path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
            return f"{path.relative_to(checkpoint)} is truncated"
    return None


def _safetensors_is_whole(path: Path) -> bool:
    """Whether the file is as long as its header says: 8 bytes, the header, the tensors."""
    size = path.stat().st_size
    if size < 8:
        return False
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if size < 8 + length:
            return False
        header = json.loads(file.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return bool(size == 8 + length + max(ends, default=0))


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
