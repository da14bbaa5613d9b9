"""The commands from end to end, on a tiny model for a few steps, and how they fail."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from ral.cli.main import COMMANDS, main
from ral.cli.parsing import parse
from ral.cli.progress import read_metrics
from ral.cli.settings import DataSettings, RewardSettings
from ral.cli.sources import reward_functions, training_rows
from ral.lock import LOCK
from tests.integrations import films

from . import cli_case
from .cli_case import words
from .test_resuming import warnings_of

RL = (
    "num_generations=4", "max_completion_length=6", "learning_rate=1e-2", "temperature=1",
    "steps_per_generation=2", "gradient_accumulation_steps=1", "max_steps=4", "attn_coef=2",
    "attn_metrics_every=1",
)  # fmt: skip
# A reward that an untrained model gets: letters, whatever they say.
REWARD = """
def letters(completions, **columns):
    return [float(len(c[0]["content"]) % 5) for c in completions]
"""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = cli_case.make(tmp_path_factory.mktemp("case"))
    (made / "rewards.py").write_text(REWARD)
    return made


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed(before: Path, after: Path) -> set[str]:
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


def test_train(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    reward = f"rewards={folder / 'rewards.py'}:letters"
    assert main(["train", *words(folder, out, *RL, reward)]) == 0
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    # RAL is on: at the first of the inner steps the divergence is exactly 0, then it is not.
    divergences = [row["attn/divergence"] for row in rows]
    assert divergences[0] == 0 < min(divergences[1:])
    assert "attn/grad_share/inner_3" in rows[3]
    assert "rewards/letters/mean" in rows[0] and rows[0]["reward_std"] > 0
    tuned = changed(folder / "qwen2_5_vl", out)
    assert tuned and not any("visual" in name for name in tuned)
    shown = capsys.readouterr()
    assert "train 4/4  reward " in shown.err and "divergence" in shown.err
    assert "{'loss'" not in shown.out + shown.err
    assert (out / "curves.png").stat().st_size > 5000
    settings = yaml.safe_load((out / "config.yaml").read_text())
    assert settings["attn_coef"] == 2.0 and settings["command"] == "train"


def test_rewards_with_weights_and_logged_completions(folder: Path, tmp_path: Path) -> None:
    """TRL logs each reward by its name, and trains on their weighted sum.

    Completions are in one parquet file for each log, in `completions` of output_dir.
    """
    out = tmp_path / "run"
    names = ("accuracy_reward", "format_reward", "letters")
    given = f"rewards=accuracy:2,format:0.5,{folder / 'rewards.py'}:letters:0.25"
    more = ("max_steps=2", "log_completions=true")
    assert main(["train", *words(folder, out, *RL, given, *more)]) == 0
    [train] = [command for command in COMMANDS if command.name == "train"]
    kept = parse(train, ["--config", str(out / "config.yaml")]).values  # of a run that goes on
    assert kept["rewards"] == given.removeprefix("rewards=").split(",")
    assert "reward_weights" not in kept  # which would be given twice
    row = read_metrics(out / "metrics.jsonl")[0]
    parts = [row[f"rewards/{name}/mean"] for name in names]
    assert row["reward"] == pytest.approx(2 * parts[0] + parts[1] / 2 + parts[2] / 4)
    assert parts[2] > 0
    files = sorted((out / "completions").iterdir())
    assert [file.name for file in files] == [f"completions_0000{step}.parquet" for step in (1, 2)]
    written = pq.read_table(files[0]).to_pylist()
    assert len(written) == 8 and {rollout["step"] for rollout in written} == {1}
    for rollout in written:
        [message] = rollout["completion"]
        assert rollout["letters"] == len(message["content"]) % 5
        assert rollout["prompt"][0]["content"][-1]["text"].startswith("What is in picture")
    for name in names:
        mean = sum(rollout[name] for rollout in written) / len(written)
        assert mean == pytest.approx(row[f"rewards/{name}/mean"])
    assert sum(rollout["advantage"] for rollout in written) == pytest.approx(0, abs=1e-4)


def test_functions_by_a_dotted_path_and_without_weights() -> None:
    settings = RewardSettings(
        rewards=["format", "ral.rewards.accuracy_reward", "ral.rewards:rouge:3"]
    )
    functions, weights = reward_functions(settings, "direct")
    assert [function.__name__ for function in functions] == [
        "direct_format_reward", "accuracy_reward", "rouge"
    ]  # fmt: skip
    assert weights == [1, 1, 3]
    assert reward_functions(RewardSettings(rewards=["accuracy"]), "think")[1] is None


def test_the_former_name_of_rewards(folder: Path, tmp_path: Path) -> None:
    """`reward`, which config.yaml of older runs holds."""
    file = tmp_path / "old.yaml"
    for written, wanted in (("null", None), ("f.py:letters", ["f.py:letters"])):
        file.write_text(f"command: train\nreward: {written}\n")
        [train] = [command for command in COMMANDS if command.name == "train"]
        assert parse(train, ["--config", str(file)]).values["rewards"] == wanted


def test_the_written_config_repeats_the_run(folder: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["train", *words(folder, one, *RL, "max_steps=2")]) == 0
    again = ["train", "--config", str(one / "config.yaml"), f"output_dir={two}"]
    assert main(again) == 0
    assert not changed(one, two)
    assert changed(folder / "qwen2_5_vl", one) == changed(folder / "qwen2_5_vl", two)


def test_vision_is_trained_when_asked(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    reward = f"rewards={folder / 'rewards.py'}:letters"
    given = words(folder, out, *RL, reward, "freeze_vision=false", "max_steps=1")
    assert main(["train", *given]) == 0
    assert any("visual" in name for name in changed(folder / "qwen2_5_vl", out))


def test_lora(folder: Path, tmp_path: Path) -> None:
    """Adapters sit on the language model alone, although its layers' names occur in vision too."""
    out = tmp_path / "run"
    reward = f"rewards={folder / 'rewards.py'}:letters"
    given = words(folder, out, *RL, reward, "lora_rank=2", "max_steps=2", "beta=0.04")
    assert main(["train", *given]) == 0
    adapters = load_file(out / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in adapters} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert not any("visual" in name for name in adapters)
    assert any(value.abs().max() > 0 for name, value in adapters.items() if "lora_B" in name)
    # eval finds the base model of a folder of adapters.
    data = f"data={folder / 'rows.jsonl'}"
    assert main(["eval", f"model={out}", data, "max_new_tokens=4", "rows=2"]) == 0


def test_distill(folder: Path, tmp_path: Path) -> None:
    from tests.trainer import tiny

    teacher = tiny.checkpoint(tmp_path, num_hidden_layers=3)
    out = tmp_path / "run"
    given = words(folder, out, *RL[:5], "max_steps=2", f"teacher_model={teacher}")
    assert main(["distill", *given]) == 0
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
    assert all(row["distill/attention"] > 0 and row["distill/logits"] > 0 for row in rows)
    assert "attn/loss" not in rows[0]


@pytest.mark.slow(stands_in="test_train")
def test_sft_then_resume(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that goes on from its checkpoint ends with the weights of one that never stopped."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    common = (
        "learning_rate=1e-2",
        "save_strategy=steps",
        "save_steps=2",
        "lr_scheduler_type=constant",
    )
    assert main(["sft", *words(folder, straight, *common, "max_steps=4")]) == 0
    assert main(["sft", *words(folder, broken, *common, "max_steps=2")]) == 0
    given = words(folder, broken, *common, "max_steps=4")
    assert main(["sft", *given]) == 2  # it holds a run
    assert main(["sft", *given, "resume=true"]) == 0
    assert not changed(straight, broken)
    rows = [row for row in read_metrics(broken / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[3]["loss"] < rows[0]["loss"] - 0.5
    # It is complete: it stays as it is.
    with warnings_of("ral.sealing") as said:
        assert main(["sft", *given, "resume=true"]) == 0
    assert [line.partition(" is at ")[2] for line in said] == ["step 4 of 4: training is complete"]
    assert not changed(straight, broken)
    assert {path.name for path in broken.glob("c*-*")} == {"checkpoint-2", "checkpoint-4"}
    # With no checkpoint that is whole, it does not begin anew.
    for path in broken.glob("checkpoint-*"):
        (path / "optimizer.pt").write_bytes(bytes((path / "optimizer.pt").stat().st_size))
    capsys.readouterr()
    assert main(["sft", *given, "resume=true"]) == 2
    assert "none in " in capsys.readouterr().err.strip().splitlines()[-1]


def test_eval(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "table.json", tmp_path / "table.png"
    given = [
        f"model={folder / 'qwen2_5_vl'}", f"data={folder / 'films.jsonl'}", "frames=1,4",
        "max_pixels=784,3136", "max_new_tokens=4", "rows=3", f"out={out}", f"plot={picture}",
    ]  # fmt: skip
    assert main(["eval", *given]) == 0
    table = capsys.readouterr().out
    found = json.loads(out.read_text())["results"]
    assert [(cell["frames"], cell["max_pixels"]) for cell in found] == [
        (1, 784), (1, 3136), (4, 784), (4, 3136)
    ]  # fmt: skip
    # 28 × 28 pixels are one visual token; a frame of 56 × 56 is four.
    assert [cell["visual_tokens"] for cell in found] == [1, 4, 4, 16]
    assert all(cell["rows"] == 3 for cell in found)
    assert len(table.splitlines()) == 5 + 2 and "accuracy %" in table
    assert picture.stat().st_size > 5000


@pytest.fixture(scope="module")
def film_rows(folder: Path) -> Path:
    """Two rows of a video of 1.2 seconds, 12 frames, in parquet."""
    pytest.importorskip("av")
    films.write(folder / "film.mp4", films.steps(12, (56, 56)), g="4")
    row = json.loads((folder / "films.jsonl").read_text().splitlines()[0])
    path = folder / "film_rows.parquet"
    pq.write_table(pa.Table.from_pylist([{**row, "path": "film.mp4"}] * 2), path)
    return path


@pytest.mark.parametrize("demonstrations", [False, True])
def test_frames_a_second_in_training(
    film_rows: Path, demonstrations: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    for limits, frames in (({"fps": 2.5}, 3), ({"fps": 2.5, "max_frames": 2}, 2), ({}, 12)):
        settings = DataSettings(data=str(film_rows), **limits)
        rows = training_rows(settings, 0, demonstrations=demonstrations)
        assert [len(row["images"]) for row in rows] == [frames] * 2
        assert all(("completion" in row) is demonstrations for row in rows)


def test_frames_a_second_in_eval(
    folder: Path, film_rows: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    out = tmp_path / "table.json"
    given = [f"model={folder / 'qwen2_5_vl'}", f"data={film_rows}", "max_new_tokens=1"]
    assert main(["eval", *given, "fps=2.5", "frames=2,16", f"out={out}"]) == 0
    found = json.loads(out.read_text())["results"]
    # A frame of 56 × 56 is four visual tokens: 2 frames, and 3 at 2.5 a second.
    assert [(cell["frames"], cell["visual_tokens"]) for cell in found] == [(2, 8), (16, 12)]


@pytest.mark.slow(stands_in="test_train")
@pytest.mark.long
def test_from_the_shell(folder: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ral", "sft", *words(folder, tmp_path / "run", "max_steps=1")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "sft 1/1  loss " in done.stderr and "Warning" not in done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "ral", "sfd"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "ral: there is no command 'sfd'; did you mean sft?\n"


@pytest.mark.slow(stands_in="tests/trainer/test_two_processes.py::test_two_processes_train_as_one")
@pytest.mark.long
def test_two_processes(folder: Path, tmp_path: Path) -> None:
    """Both end well, and one of them speaks; an error of both is said once."""
    reward = f"rewards={folder / 'rewards.py'}:letters"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "ral"]
    given = words(folder, tmp_path / "run", *RL, reward, "max_steps=2")
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 300}
    options["env"] = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, "train", *given], **options)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("train 2/2  reward ") == 1
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 2]
    assert changed(folder / "qwen2_5_vl", tmp_path / "run")
    done = subprocess.run([*launch, "sfd"], **options)
    assert done.returncode != 0 and done.stderr.count("there is no command 'sfd'") == 1


@pytest.mark.slow(
    stands_in="tests/trainer/test_interrupts.py::test_a_signal_ends_training_with_a_checkpoint"
)
@pytest.mark.long
def test_ctrl_c_and_the_command_that_it_names(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a run"  # the space is quoted
    given = words(folder, out, *RL, f"rewards={folder / 'rewards.py'}:letters", "max_steps=5000")
    given += ["save_strategy=steps", "save_steps=5000"]
    running = subprocess.Popen(
        [sys.executable, "-m", "ral", "train", *given], stderr=subprocess.PIPE, text=True
    )
    metrics, waited = out / "metrics.jsonl", 0.0
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert running.poll() is None and waited < 120
        time.sleep(0.1)
        waited += 0.1
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=300)
    assert running.returncode == 130 and "Traceback" not in said
    command = shlex.split(said.strip().splitlines()[-1].partition("resume with: ")[2])
    assert command[:4] == ["python", "-m", "ral", "train"]
    stopped = read_metrics(metrics)[-1]["step"]
    assert stopped % 4 == 0  # after the inner steps of a rollout batch
    assert main([*command[3:], f"max_steps={stopped + 4}"]) == 0
    steps = [row["step"] for row in read_metrics(metrics) if "loss" in row]
    assert steps == list(range(1, stopped + 5))


# command, settings instead of the good ones, what is said
FAILING: dict[str, tuple[str, tuple[str, ...], str]] = {
    "no model": ("train", ("model=null",), "model must be given"),
    "no model folder": ("train", ("model=/no/such",), "there is no model folder /no/such"),
    "a folder without a model": ("train", ("model={folder}/images",), "cannot load "),
    "no data": ("sft", ("data=null",), "data must be given"),
    "no data file": ("train", ("data=/no/such.jsonl",), "there is no data file /no/such.jsonl"),
    "no such digits": (
        "train",
        ("data=digits:sum",),
        "digits:cell, digits:timestamp, digits:chain or digits:chain_cells",
    ),
    "bad rows": ("train", ("data={folder}/bad.jsonl",), "bad.jsonl:1"),
    "an attention": ("train", ("attn_implementation=abacus",), "cannot load "),
    "bf16 on a CPU": ("train", ("bf16=true", "use_cpu=false"), "bf16 needs a GPU"),
    "a report": ("train", ("report_to=comet",), "report_to must name what is installed"),
    "a schedule": ("train", ("num_iterations=1",), "attn_coef > 0 needs more than one"),
    "a granularity": ("train", ("attn_granularity=pixel",), "attn_granularity must be one of"),
    "a batch": ("train", ("num_generations=3",), "num_generations"),
    "a layer": ("train", ("attn_layers=7",), "layers"),
    "a style": ("train", ("style=poem",), "style must be one of think, direct; got 'poem'"),
    "a dtype": ("train", ("dtype=int8",), "dtype must be one of"),
    "a rank": ("train", ("lora_rank=-1",), "lora_rank must be >= 0"),
    "LoRA targets": ("train", ("lora_rank=2", "lora_targets=nothing"), "targets must name linear"),
    "a reward file": ("train", ("rewards=/no/such.py:f",), "there is no file /no/such.py"),
    "a reward": ("train", ("rewards=math:nothing",), "has no function 'nothing'"),
    "a reward's form": ("train", ("rewards=math",), "rewards must be accuracy, format, file.py:"),
    "a reward's file alone": ("train", ("rewards=f.py:2",), "file.py:name or package.module:name"),
    "rewards of one name": ("train", ("rewards=accuracy,accuracy:2",), "different names; got acc"),
    "a reward's weight": (
        "train",
        ("rewards=accuracy:inf",),
        "weight of accuracy must be finite",
    ),
    "two sorts of weights": (
        "train",
        ("rewards=accuracy:2", "reward_weights=1"),
        "give one of them",
    ),
    "weights of other rewards": (
        "train",
        ("rewards=accuracy,format", "reward_weights=1"),
        "Number of reward weights (1)",
    ),
    "a model's path": ("train", ("model={folder}/typo",), "there is no model folder {folder}/typo"),
    "a data set": ("sft", ("data={folder}/typo",), "there is no data file {folder}/typo"),
    "a file of code": (
        "sft",
        ("data={folder}/rewards.py",),
        "rewards.py:2: the line must be a JSON",
    ),
    "frames a second": ("sft", ("fps=0",), "fps must be > 0; got 0"),
    "a teacher for nothing": ("train", ("teacher_model={folder}/qwen2_5_vl",), "nothing compares"),
    "no teacher": ("distill", (), "teacher_model must be given"),
    "a length": ("sft", ("max_length=4",), "max_length must be None"),
    "a setting": ("sft", ("num_generations=4",), "there is no setting 'num_generations'"),
    "a checkpoint": ("sft", ("resume={folder}/images",), "resume must be a complete checkpoint"),
    "a pixel range": ("sft", ("min_pixels=9000", "max_pixels=800"), "min_pixels must be <="),
    "digits' model alone": ("train", ("model=digits",), "model=digits needs data=digits:"),
}


@pytest.mark.parametrize("name", FAILING)
def test_errors_are_one_sentence(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, wrong, said = FAILING[name]
    (folder / "bad.jsonl").write_text('{"problem": "?"}\n')
    given = words(folder, tmp_path / "run", "max_steps=2", *(RL[:4] if command != "sft" else ()))
    assert main([command, *given, *(word.format(folder=folder) for word in wrong)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    text = "\n".join(lines[[line.startswith("ral: ") for line in lines].index(True) :])
    assert said.format(folder=folder) in text
    assert name in ("bad rows", "a file of code") or "\n" not in text


def test_one_run_in_a_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a second run, nor one of two processes that each take themselves for the only one."""
    given = words(folder, tmp_path, "max_steps=1")
    with open(tmp_path / LOCK, "w") as held:  # as another process does
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main(["sft", *given]) == 2
    assert "must not be in use by another run" in capsys.readouterr().err
    assert not (tmp_path / "config.yaml").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert main(["sft", *given, "use_cpu=false"]) == 2
    assert "got WORLD_SIZE=2 and num_processes=1" in capsys.readouterr().err
    assert not (tmp_path / "metrics.jsonl").exists()


# Of a model whose folder holds code: command, words.
REMOTE: dict[str, list[str]] = {
    "train": ["data={folder}/rows.jsonl", "output_dir={out}", "use_cpu=true", *RL[:5]],
    "eval": ["data={folder}/rows.jsonl"],
    "attention-map": ["{folder}/images/0.png", "--prompt", "?", "--out", "{out}.png"],
}


@pytest.mark.parametrize("command", REMOTE)
def test_code_of_a_model_runs_only_when_asked_by_name(
    command: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, ran = tmp_path / "model", tmp_path / "ran"
    model.mkdir()
    (model / "code.py").write_text(f"open({str(ran)!r}, 'w')\nraise ImportError('ran')\n")
    of = {"AutoConfig": "code.Config", "AutoProcessor": "code.Processor"}
    for name in ("config.json", "processor_config.json"):
        (model / name).write_text(json.dumps({"model_type": "odd", "auto_map": of}))
    monkeypatch.setattr("builtins.input", lambda *text: pytest.fail("asked at the terminal"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    given = [word.format(folder=folder, out=tmp_path / "run") for word in REMOTE[command]]
    dashes = command == "attention-map"
    given += ["--model", str(model)] if dashes else [f"model={model}"]
    assert main([command, *given]) == 2
    assert "trust_remote_code=True" in capsys.readouterr().err and not ran.exists()
    assert (
        main([command, *given, "--trust-remote-code" if dashes else "trust_remote_code=true"]) == 2
    )
    assert ran.exists()


@pytest.mark.parametrize(
    "wrong, said",
    [
        (("model=null",), "model must be given"),
        (("data=null",), "data must be given"),
        (("data=/no/such.jsonl",), "there is no data file"),
        (("grids=3",), "grids needs data=digits:cell"),
        (("data=digits:cell", "frames=3"), "takes grids only"),
        (("data=digits:cell", "max_pixels=3"), "max_pixels needs other data"),
        (("device=abacus",), "device abacus"),
        (("frames=0",), "frames must be a list of numbers >= 1"),
        (("out=/no/such/table.json",), "out: there is no folder"),
    ],
)
def test_errors_of_eval(
    wrong: tuple[str, ...], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"model={folder / 'qwen2_5_vl'}", f"data={folder / 'rows.jsonl'}", "max_new_tokens=2"]
    assert main(["eval", *given, *wrong]) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_verbose_shows_the_trace_and_everything(folder: Path, tmp_path: Path, capfd: Any) -> None:
    from ral.cli.errors import Refused

    given = words(folder, tmp_path / "run", "max_steps=1", "verbose=true")
    with pytest.raises(Refused):
        main(["sft", *given, "model=/no/such"])
    assert main(["sft", *given]) == 0
    shown = capfd.readouterr()
    assert "'mean_token_accuracy'" in shown.out + shown.err
