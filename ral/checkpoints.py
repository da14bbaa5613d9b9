"""Checkpoints on disk: which one is complete, and what `RALTrainer` adds to them.

transformers writes a checkpoint in place, file by file: weights, tokenizer, optimizer, scheduler,
each process's random state, and trainer_state.json last. A killed process leaves a folder with a
checkpoint's name. That folder does not load, or it loads and training continues with another
optimizer.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import struct
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

SEAL = "ral_state.json"
_BLOCK = 1 << 26  # bytes of a file that one thread hashes at a time
_THREADS = min(4, os.cpu_count() or 1)  # of all cores, since training goes on beside them
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NAME = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "pytorch_model_fsdp.bin")
_INDEX = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """There is no checkpoint that training can resume from."""


class DiskFull(OSError):
    """There is no room for a checkpoint on the disk of output_dir."""


def last_checkpoint(folder: str | Path, *, contents: bool = True) -> Path | None:
    """The newest complete checkpoint of a training run, as `train(resume_from_checkpoint=...)`.

    A warning names those of higher steps that are not complete (`why_incomplete`).

    Args:
        folder: output_dir of the run; it need not exist.
        contents: as in `why_incomplete`.

    Returns:
        The complete `checkpoint-<step>` of the highest step, or None.
    """
    for path in reversed(_by_step(Path(folder))):
        reason = why_incomplete(path, contents=contents)
        if reason is None:
            return path
        logger.warning("last_checkpoint: %s is not complete: %s", path, reason)
    return None


def why_incomplete(checkpoint: str | Path, *, contents: bool = True) -> str | None:
    """Why training cannot resume from a checkpoint, or None if nothing is missing or damaged.

    A checkpoint of `RALTrainer` is sealed: its last file lists every file with its size and its
    checksum, and this function compares them. For another trainer's checkpoint it checks these:

    - trainer_state.json, which is written last, is whole, and of the step in the folder's name;
    - weights: of each safetensors file the size is what its header says, and every shard of an
      index is there; or the shards of FSDP with their .metadata, or what DeepSpeed calls `latest`;
    - optimizer and scheduler are there;
    - there are random states of all processes from 0 to the highest, and
    - every .pt, .pth and .bin file has its archive's directory, which is its end.

    It does not read the tensors of another trainer's checkpoint.

    Args:
        checkpoint: a folder that `Trainer` wrote.
        contents: whether to read all files of a sealed checkpoint, and compare their checksums.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        return "it is not a folder"
    if (checkpoint / SEAL).exists():
        return (
            _why_unsealed(checkpoint)
            or _why_no_optimizer(checkpoint)
            or (_why_damaged(checkpoint) if contents else None)
        )
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

    The checkpoint is complete then, also on the disk, and older ones may go.

    Args:
        checkpoint: a folder that every process has finished writing.
        state: what `read_state` returns; anything that JSON can hold.
    """
    paths = sorted(checkpoint.rglob("*"))
    for path in paths:
        _sync(path)
    sizes = {
        path.relative_to(checkpoint).as_posix(): path.stat().st_size
        for path in paths
        if path.is_file()
    }
    sizes.pop(SEAL, None)
    _write_seal(checkpoint, {**state, "files": sizes})
    _sync(checkpoint.parent)


def add_checksums(checkpoint: Path) -> None:
    """Add checksums of all files to the seal of a checkpoint.

    `RALTrainer` calls it in a thread, while training goes on.
    """
    state = read_state(checkpoint)
    assert state is not None
    _write_seal(checkpoint, {**state, "sha256": _checksums(checkpoint, state["files"])})


def _write_seal(checkpoint: Path, content: dict[str, Any]) -> None:
    unfinished = checkpoint / f"{SEAL}.part"
    with open(unfinished, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, checkpoint / SEAL)
    _sync(checkpoint)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no fsync of folders.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _checksums(checkpoint: Path, sizes: Mapping[str, int]) -> dict[str, str]:
    """SHA-256 of the SHA-256 of a file's blocks, by file; threads share the blocks."""
    blocks = [(name, start) for name, size in sizes.items() for start in range(0, size, _BLOCK)]
    whole = {name: hashlib.sha256() for name in sizes}
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(lambda block: _block_digest(checkpoint / block[0], block[1]), blocks)
        for (name, _), digest in zip(blocks, digests, strict=True):
            whole[name].update(digest)
    return {name: each.hexdigest() for name, each in whole.items()}


def _block_digest(path: Path, start: int) -> bytes:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        left = _BLOCK
        while left and (count := file.readinto(buffer[:left])):
            digest.update(buffer[:count])  # without Python's lock
            left -= count
    return digest.digest()


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


def is_full(error: BaseException, folder: Path) -> bool:
    """Whether a write into `folder` failed because its disk, or the user's quota, is full.

    torch and safetensors raise errors of their own, without the number of the system's.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    try:
        return shutil.disk_usage(folder).free < 1 << 20 or "No space left" in str(error)
    except OSError:
        return False


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


def _why_damaged(checkpoint: Path) -> str | None:
    state = read_state(checkpoint) or {}
    written = state.get("sha256")
    if written is None:  # killed before `add_checksums`, or of an earlier version
        return None
    found = _checksums(checkpoint, state["files"])
    damaged = [name for name, checksum in found.items() if written.get(name) != checksum]
    return f"{damaged[0]} is damaged: its checksum is not that of the save" if damaged else None


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
