"""Ctrl-C and SIGTERM, sent to processes that train."""

from __future__ import annotations

import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from ral.checkpoints import last_checkpoint
from ral.interrupts import interruptible
from tests.asked import asked
from tests.trainer import killed_processes as dying
from tests.trainer import tiny
from tests.trainer.test_checkpoints import run_dying, straight
from tests.trainer.test_resuming import after, same_weights

# Exit status, step of the last checkpoint, what the last line says.
ENDS: dict[str, tuple[int, int | None, str]] = {
    "once": (130, 8, "Stopped by Ctrl-C at step 8 of 10. The last complete checkpoint is {path}"),
    "twice": (130, 6, "Stopped by Ctrl-C at step 6 of 10. The last complete checkpoint is {path}"),
    "three times": (130, 4, "Stopped by Ctrl-C at step 5 of 10. The last complete checkpoint is "
                            "{path}"),
    "first batch": (143, 4, "Stopped by SIGTERM at step 4 of 10. The last complete checkpoint is "
                            "{path}"),
    "last batch": (130, 10, "Stopped by Ctrl-C at step 10 of 10: training is complete."),
    "unsaved": (130, None, "Stopped by Ctrl-C at step 8 of 10; there is no checkpoint to resume "
                           'from (save_strategy="no").'),
    "by epochs": (130, 8, "Stopped by Ctrl-C at step 8 of 10. The last complete checkpoint is "
                          "{path}"),
}  # fmt: skip


slow = pytest.mark.slow(stands_in="test_a_signal_ends_training_with_a_checkpoint")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def interrupted(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    names = dict.fromkeys(parameters.get("name", "once") for parameters in asked(request))
    return run_dying(model, tmp_path_factory.mktemp("interrupted"), names)


@pytest.mark.xdist_group("interrupted")  # one worker interrupts them all
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "once" else slow) for name in dying.INTERRUPTIONS],
)
def test_a_signal_ends_training_with_a_checkpoint(name: str, interrupted: Path) -> None:
    run = interrupted / name
    status, step, sentence = ENDS[name]
    written = (run / "stderr").read_text()
    assert (run / "status").read_text() == str(status), written
    path = None if step is None else run / "out" / f"checkpoint-{step}"
    assert last_checkpoint(run / "out") == path
    last = written.strip().splitlines()[-1]
    assert last.startswith(sentence.format(path=path))
    if "{path}" in sentence:
        assert last.endswith("; resume with: python -m ral train resume=true")
    assert "Traceback" not in written
    assert "eval_loss" not in written  # there may be no time for it
    name = "SIGTERM" if status == 143 else "Ctrl-C"
    assert f"{name}: training stops after this rollout batch, and saves. {name} again" in written


@pytest.mark.xdist_group("interrupted")
def test_an_interrupted_run_resumes_exactly(model: Path, interrupted: Path, tmp_path: Path) -> None:
    reference = straight(model, tmp_path)
    out = shutil.copytree(interrupted / "once" / "out", tmp_path / "resumed")
    trainer = tiny.trainer(model, tmp_path, **dying.SETTINGS, output_dir=str(out))
    trainer.train(resume_from_checkpoint=True)
    assert after(trainer, 8) == after(reference, 8)
    assert same_weights(trainer, reference)


def test_handlers_and_callbacks_are_given_back(model: Path, tmp_path: Path) -> None:
    trainer = tiny.trainer(model, tmp_path, max_steps=1)
    before: Any = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    callbacks = list(trainer.callback_handler.callbacks)
    with interruptible(trainer) as interruption:
        assert signal.getsignal(signal.SIGINT) != before[0]
        trainer.train()
    assert interruption.signal is None
    with pytest.raises(ValueError, match="of the body"), interruptible(trainer):
        raise ValueError("of the body")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert trainer.callback_handler.callbacks == callbacks


def test_main_thread_only(model: Path, tmp_path: Path) -> None:
    trainer = tiny.trainer(model, tmp_path, max_steps=1)
    caught = []

    def enter() -> None:
        try:
            with interruptible(trainer):
                pass
        except RuntimeError as error:
            caught.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert caught == ["interruptible: must be entered in the main thread, which gets signals"]
