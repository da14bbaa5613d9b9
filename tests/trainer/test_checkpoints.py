"""Which checkpoint is complete, after processes that were killed in each part of a save."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from ral import RALTrainer, checkpoints
from ral.checkpoints import (
    SEAL,
    CheckpointError,
    DiskFull,
    add_checksums,
    last_checkpoint,
    read_state,
    rotate,
    seal,
    why_incomplete,
)
from ral.lock import LOCK
from tests.asked import asked
from tests.trainer import killed_processes as dying
from tests.trainer import tiny
from tests.trainer.test_resuming import after, same_weights, warnings_of


def run_dying(model: Path, folder: Path, names: Any) -> Path:
    """The processes of `tests.trainer.killed_processes`, one after the other."""
    command = [
        sys.executable,
        "-m",
        "tests.trainer.killed_processes",
        str(model),
        str(folder),
        *names,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def straight(model: Path, folder: Path) -> Any:
    """The run that neither died nor stopped."""
    trainer = tiny.trainer(model, folder, **dying.SETTINGS)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def killed(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    names = dict.fromkeys(parameters["name"] for parameters in asked(request))
    return run_dying(model, tmp_path_factory.mktemp("killed"), names)


@pytest.fixture(scope="module")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return straight(model, tmp_path_factory.mktemp("straight"))


slow = pytest.mark.slow(stands_in="test_training_resumes_before_a_damaged_checkpoint")


@slow
@pytest.mark.xdist_group("killed")
@pytest.mark.parametrize("name", dying.KILLS)
def test_last_checkpoint_of_a_killed_save_is_complete(name: str, killed: Path) -> None:
    run = killed / name
    assert (run / "status").read_text() == "-9", (run / "stderr").read_text()
    step = dying.KILLS[name][1]
    assert last_checkpoint(run / "out") == run / "out" / f"checkpoint-{step}"
    if step == dying.FIRST:  # save_total_limit=1, and yet it is there; the other one is not whole
        assert why_incomplete(run / "out" / f"checkpoint-{dying.SECOND}") is not None


@slow
@pytest.mark.xdist_group("killed")
@pytest.mark.parametrize("name", ["weights", "in the seal", "in the rotation"])
def test_training_resumes_after_a_killed_save(
    name: str, model: Path, killed: Path, reference: Any, tmp_path: Path
) -> None:
    out = shutil.copytree(killed / name / "out", tmp_path / "out")
    trainer = tiny.trainer(model, tmp_path, **dying.SETTINGS)
    trainer.train(resume_from_checkpoint=True)
    step = dying.KILLS[name][1]
    assert after(trainer, step) == after(reference, step)
    assert same_weights(trainer, reference)
    # save_total_limit=1 again, whatever the killed process left
    assert [folder.name for folder in out.glob("checkpoint-*")] == ["checkpoint-10"]
    assert why_incomplete(out / "checkpoint-10") is None


# -- what a checkpoint of another trainer is judged by --------------------------------------------


@pytest.fixture
def plain(reference: Any, tmp_path: Path) -> Path:
    """A complete checkpoint without the seal, as TRL's own trainers write it."""
    last = last_checkpoint(reference.args.output_dir)
    assert last is not None
    copy = shutil.copytree(last, tmp_path / last.name)
    (copy / SEAL).unlink()
    assert why_incomplete(copy) is None
    return copy


PARTS = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("left", [0, 5, 0.5, 0.999])
def test_truncated_file_is_named(part: str, left: float, plain: Path) -> None:
    size = (plain / part).stat().st_size
    os.truncate(plain / part, left if isinstance(left, int) else int(size * left))
    reason = why_incomplete(plain)
    assert reason is not None and part in reason


@pytest.mark.parametrize("part", PARTS)
def test_missing_file_is_named(part: str, plain: Path) -> None:
    (plain / part).unlink()
    reason = why_incomplete(plain)
    assert reason is not None
    assert "missing" in reason and part.split(".")[0].replace("model", "weights") in reason


def test_state_of_another_step_is_not_complete(plain: Path) -> None:
    moved = plain.rename(plain.parent / "checkpoint-7")
    assert why_incomplete(moved) == "trainer_state.json is of step 10"


def test_random_states_have_no_gap(plain: Path) -> None:
    state = (plain / "rng_state.pth").rename(plain / "rng_state_0.pth")
    shutil.copy(state, plain / "rng_state_2.pth")
    assert why_incomplete(plain) == "rng_state_1.pth is missing"
    shutil.copy(state, plain / "rng_state_1.pth")
    assert why_incomplete(plain) is None


def test_every_shard_of_an_index_is_there(plain: Path) -> None:
    weights = plain / "model.safetensors"
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (plain / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(weights, plain / "model-1-of-2.safetensors")
    weights.unlink()
    assert why_incomplete(plain) == "model-2-of-2.safetensors is missing"
    shutil.copy(plain / "model-1-of-2.safetensors", plain / "model-2-of-2.safetensors")
    assert why_incomplete(plain) is None
    (plain / "model.safetensors.index.json").write_text('{"weight_map"')
    assert why_incomplete(plain) == "model.safetensors.index.json is not whole"


def test_shards_of_fsdp_end_with_their_metadata(plain: Path) -> None:
    for name in ("model.safetensors", "optimizer.pt"):
        (plain / name).unlink()
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        (plain / name).mkdir()
        (plain / name / "__0_0.distcp").write_bytes(b"x")
    assert why_incomplete(plain) == "pytorch_model_fsdp_0/.metadata is missing"
    (plain / "pytorch_model_fsdp_0" / ".metadata").write_bytes(b"x")
    assert why_incomplete(plain) == "optimizer_0/.metadata is missing"
    (plain / "optimizer_0" / ".metadata").write_bytes(b"x")
    assert why_incomplete(plain) is None


def test_deepspeed_names_its_folder_last(plain: Path) -> None:
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        (plain / name).unlink()
    assert why_incomplete(plain) == "weights missing"
    (plain / "latest").write_text("global_step10")
    assert why_incomplete(plain) == "global_step10 holds nothing"
    (plain / "global_step10").mkdir()
    states = plain / "global_step10" / "mp_rank_00_model_states.pt"
    torch.save({"step": 10}, states)
    assert why_incomplete(plain) is None
    os.truncate(states, 100)
    assert why_incomplete(plain) == "global_step10/mp_rank_00_model_states.pt is truncated"


# -- the seal -----------------------------------------------------------------------------------


def test_seal_sees_every_file(plain: Path) -> None:
    seal(plain, {"micro_step": 8})
    state = read_state(plain)
    assert state is not None and state["micro_step"] == 8
    assert why_incomplete(plain) is None
    tokenizer = plain / "tokenizer.json"
    os.truncate(tokenizer, 10)
    assert why_incomplete(plain) == (
        f"tokenizer.json has 10 bytes of {state['files']['tokenizer.json']}"
    )
    tokenizer.unlink()
    assert why_incomplete(plain) == "tokenizer.json is missing"
    (plain / SEAL).write_text("{")
    assert why_incomplete(plain) == f"{SEAL} is not whole"


@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("part", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_flipped_bit_is_named(
    part: str, where: float, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_BLOCK", 1 << 14)  # several in a file
    seal(plain, {})
    add_checksums(plain)
    assert why_incomplete(plain) is None
    content = bytearray((plain / part).read_bytes())
    content[int(where * (len(content) - 1))] ^= 1
    (plain / part).write_bytes(content)
    assert why_incomplete(plain) == f"{part} is damaged: its checksum is not that of the save"
    assert why_incomplete(plain, contents=False) is None


def test_training_resumes_before_a_damaged_checkpoint(model: Path, tmp_path: Path) -> None:
    """And a sentence names the damaged one."""
    settings = {**dying.SETTINGS, "max_steps": 8, "save_total_limit": None}
    tiny.trainer(model, tmp_path, **settings).train()
    weights = tmp_path / "out" / "checkpoint-8" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    trainer = tiny.trainer(model, tmp_path, **settings)
    with pytest.raises(CheckpointError, match=r"checkpoint-8: model\.safetensors is damaged"):
        trainer.train(resume_from_checkpoint=weights.parent)
    with warnings_of("ral.checkpoints") as said:
        trainer.train(resume_from_checkpoint=True)
    assert trainer._resumed_from == tmp_path / "out" / "checkpoint-4"
    assert [line for line in said if "damaged" in line] == [
        f"last_checkpoint: {weights.parent} is not complete: model.safetensors is damaged: its "
        "checksum is not that of the save"
    ]
    assert why_incomplete(weights.parent) is None  # it was written again


def test_weights_alone_are_sealed_but_do_not_resume(plain: Path) -> None:
    (plain / "optimizer.pt").unlink()
    seal(plain, {})
    assert why_incomplete(plain) == "optimizer.pt missing"


def test_last_checkpoint_goes_by_number(plain: Path) -> None:
    run = plain.parent
    for step in (9, 100):
        copy = shutil.copytree(plain, run / f"checkpoint-{step}")
        state = json.loads((copy / "trainer_state.json").read_text())
        (copy / "trainer_state.json").write_text(json.dumps({**state, "global_step": step}))
    (run / "checkpoint-old").mkdir()
    (run / "checkpoint-1000").write_text("a file")
    assert last_checkpoint(run) == run / "checkpoint-100"
    assert last_checkpoint(run / "nowhere") is None
    assert last_checkpoint(run / "checkpoint-old") is None


def test_rotate_keeps_the_new_and_the_best(tmp_path: Path) -> None:
    for number, step in enumerate([4, 8, 12, 6]):  # 12 was left by a killed run, 6 is new
        (tmp_path / f"checkpoint-{step}").mkdir()
        os.utime(tmp_path / f"checkpoint-{step}", (number, number))

    def left() -> set[str]:
        return {path.name.split("-")[1] for path in tmp_path.iterdir()}

    new, best = tmp_path / "checkpoint-6", str(tmp_path / "checkpoint-4")
    for limit in (None, 0, 4):
        rotate(tmp_path, limit, new, best)
        assert left() == {"4", "6", "8", "12"}
    rotate(tmp_path, 3, new, best)
    assert left() == {"4", "6", "12"}
    rotate(tmp_path, 1, new, best)
    assert left() == {"4", "6"}
    rotate(tmp_path, 1, new, None)
    assert left() == {"6"}


def test_nothing_of_a_former_save_is_left(model: Path, tmp_path: Path) -> None:
    """Killed while it overwrites a checkpoint, a process would leave a mixture under the seal."""
    folder = tmp_path / "out" / "checkpoint-1"
    folder.mkdir(parents=True)
    (folder / SEAL).write_text('{"files": {}}')
    (folder / "rng_state_7.pth").write_text("of eight processes")
    present = []

    class Look(RALTrainer):
        def save_model(self, *args: Any, **kwargs: Any) -> None:
            present.append(folder.exists())
            super().save_model(*args, **kwargs)

    settings = {**dying.SETTINGS, "max_steps": 1}
    tiny.trainer(model, tmp_path, trainer_class=Look, **settings).train()
    assert present == [False]
    state = read_state(folder)
    assert state is not None and "rng_state_7.pth" not in state["files"]


def test_rotation_comes_after_the_seal(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And after the checksums, which training does not wait for."""
    seen = []
    original, fsync = checkpoints.rotate, os.fsync
    synced = set()

    def sync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def look(folder: Path, limit: int | None, newest: Path, best: str | None) -> None:
        whole = "sha256" in (read_state(newest) or {})
        seen.append((limit, newest.name, whole, len(list(folder.glob("c*")))))
        # Also the folders: without their names files are lost.
        wanted = {path.stat().st_ino for path in (folder, newest, *newest.rglob("*"))}
        assert wanted <= synced
        original(folder, limit, newest, best)

    later = threading.Event()
    add = checkpoints.add_checksums

    def wait_for_training(folder: Path) -> None:
        assert later.wait(60)
        add(folder)

    class Later(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step > dying.FIRST:
                later.set()

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(checkpoints, "rotate", look)
    monkeypatch.setattr(checkpoints, "add_checksums", wait_for_training)
    settings = {**dying.SETTINGS, "max_steps": 8}
    trainer = tiny.trainer(model, tmp_path, callbacks=[Later()], **settings)
    trainer.train()
    assert seen == [(1, "checkpoint-4", True, 1), (1, "checkpoint-8", True, 2)]
    assert trainer.args.save_total_limit == 1


# -- the folder and its disk ----------------------------------------------------------------------


def test_one_run_in_a_folder(model: Path, tmp_path: Path) -> None:
    settings = {**dying.SETTINGS, "max_steps": 1}
    out = tmp_path / "out"
    out.mkdir()
    with open(out / LOCK, "w") as held:  # as another process does
        held.write("process 7 on there")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        trainer = tiny.trainer(model, tmp_path, **settings)
        with pytest.raises(BlockingIOError, match="out, which is in use by process 7 on there"):
            trainer.train()
        assert trainer.state.global_step == 0 and not list(out.glob("checkpoint-*"))
    trainer.train()
    assert trainer.state.global_step == 1
    with open(out / LOCK, "r+") as free:
        fcntl.flock(free, fcntl.LOCK_EX | fcntl.LOCK_NB)


# What a writer raises, the bytes that are free, whether the disk is full.
FULL: dict[str, tuple[Exception, int, bool]] = {
    "the system": (OSError(errno.ENOSPC, "No space left on device"), 1 << 40, True),
    "a quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), 1 << 40, True),
    "safetensors": (
        RuntimeError("I/O error: No space left on device (os error 28)"),
        1 << 40,
        True,
    ),
    "torch": (RuntimeError("unexpected pos 704 vs 598"), 4096, True),
    "torch, for another reason": (RuntimeError("unexpected pos 704 vs 598"), 1 << 40, False),
    "no permission": (PermissionError(errno.EACCES, "Permission denied"), 0, False),
}


@pytest.mark.parametrize("name", FULL)
def test_full_disks_are_recognised(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, free, full = FULL[name]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert checkpoints.is_full(error, Path()) is full


@pytest.mark.parametrize(
    "name",
    [
        "torch",
        pytest.param(
            "torch, for another reason",
            marks=pytest.mark.slow(stands_in="test_full_disks_are_recognised"),
        ),
    ],
)
def test_a_full_disk_is_called_so(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, free, full = FULL[name]

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(RALTrainer, "_save_optimizer_and_scheduler", fail)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    trainer = tiny.trainer(model, tmp_path, **{**dying.SETTINGS, "max_steps": 1})
    wanted = "checkpoint-1 does not fit on its disk, which is full" if full else "unexpected pos"
    with pytest.raises(DiskFull if full else RuntimeError, match=wanted):
        trainer.train()
