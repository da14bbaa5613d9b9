"""The examples and notebooks run as they stand, offline."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from nbclient import NotebookClient
from PIL import Image

from ral.cli.main import COMMANDS
from ral.cli.parsing import parse
from ral.config import RALConfig
from tests.trainer import tiny

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted(path.name for path in (EXAMPLES / "notebooks").glob("*.ipynb"))
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}
slow = pytest.mark.slow(stands_in="test_every_example_is_tested")


def run(*words: str, **options: Any) -> str:
    done = subprocess.run(
        [*words], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=300,
        check=False, **options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested() -> None:
    """A new one needs a test below. Notebooks are stored without outputs, and compile.

    tests/engines/verl runs verl_qwen2_5_vl_7b_8_gpus.sh.
    """
    here = Path(__file__).read_text()
    names = [path.name for path in EXAMPLES.iterdir() if path.is_file()]
    assert len(names) == 7 and all(name in here for name in names)
    assert len(NOTEBOOKS) == 3
    for name in NOTEBOOKS:
        notebook = nbformat.read(EXAMPLES / "notebooks" / name, as_version=4)
        nbformat.validate(notebook)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                assert cell.outputs == [] and cell.execution_count is None, name
                compile(cell.source, name, "exec")


@slow
def test_ral_loss_in_your_loop() -> None:
    printed = run(sys.executable, str(EXAMPLES / "ral_loss_in_your_loop.py"))
    lines = [re.split(r"[ ,:]+", line) for line in printed.splitlines()]
    divergences = [float(words[-1]) for words in lines]
    rewards = [float(words[words.index("reward") + 1]) for words in lines]
    assert len(divergences) == 6 and all(0.3 < reward < 1.0 for reward in rewards)
    for batch in (divergences[:3], divergences[3:]):
        # Nothing at the policy that wrote the answers, exactly; then a little more at every step
        assert 0.0 == batch[0] < batch[1] < batch[2] < 0.1


@slow
def test_own_attention_term() -> None:
    printed = run(sys.executable, str(EXAMPLES / "own_attention_term.py"))
    lines = [line for line in printed.splitlines() if line.startswith("step ")]
    shares, terms, ral = (
        [float(value) for value in column]
        for column in zip(
            *(re.findall(r"frames ([\d.]+), term (\S+), RAL (\S+)", line)[0] for line in lines),
            strict=True,
        )
    )
    assert len(lines) == 4 and all(0.3 < share < 1.0 for share in shares)
    # Unlike RAL, whose reference is the policy itself, the term acts from the first step.
    assert terms[0] != 0.0 == ral[0] and terms[1] != terms[0] and ral[1] != 0.0


@slow
def test_retrieval_by_policy_loss() -> None:
    printed = run(sys.executable, str(EXAMPLES / "retrieval_by_policy_loss.py"))
    lines = re.findall(r"reward ([\d.]+), JSD by step (\S+), (\S+), (\S+)", printed)
    rewards, *steps = ([float(value) for value in column] for column in zip(*lines, strict=True))
    assert len(lines) == 30 and rewards[0] < 0.2 and min(rewards[-5:]) > 0.9
    # Nothing in the first step on the answers, exactly; then more in each
    assert all(
        0.0 == first < second < third < 0.1 for first, second, third in zip(*steps, strict=True)
    )


@slow
def test_swap_sdpa_or_flash_attn() -> None:
    lines = run(sys.executable, str(EXAMPLES / "swap_sdpa_or_flash_attn.py")).splitlines()
    shares = json.loads(lines[0].partition(": ")[2])
    assert len(shares) == 4 and sum(shares) == pytest.approx(1.0, abs=1e-5)
    assert float(lines[1].rpartition(" ")[2]) > 0.01
    assert all(float(line.rpartition(" ")[2]) < 1e-5 for line in lines[2:4])


@slow
def test_attention_maps_of_a_video(tmp_path: Path) -> None:
    script = str(EXAMPLES / "attention_maps_of_a_video.py")
    printed = run(sys.executable, script, "--out", str(tmp_path / "digits"))
    (answer,) = re.findall(r"answer: +<think>\d+s</think><answer>(\d)</answer>", printed)
    (share,) = re.findall(rf"'{answer}': +(\d+)% of its attention on frame 16, ", printed)
    assert int(share) > 90
    _check_pictures(tmp_path / "digits")


@slow
def test_attention_maps_of_a_video_file(tmp_path: Path) -> None:
    """A random model, whose own path of videos reads two frames as one."""
    frames = [Image.new("RGB", (84, 56), (30 * number, 90, 200)) for number in range(8)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:], duration=500)
    words = ["--model", str(tiny.checkpoint(tmp_path)), "--question", "What moves?"]
    words += ["--frames", "8", "--out", str(tmp_path / "film")]
    script = str(EXAMPLES / "attention_maps_of_a_video.py")
    printed = run(sys.executable, script, str(tmp_path / "film.gif"), *words)
    assert "question: What moves?" in printed
    shown = set(re.findall(r"attention on frame (\d)", printed))
    assert shown and shown <= {"1", "2", "3", "4"}
    _check_pictures(tmp_path / "film")


def _check_pictures(folder: Path) -> None:
    for name in ("mean", "film-strip", "token-frame"):
        assert Image.open(folder / f"{name}.png").width > 400
    assert (folder / "map.npz").stat().st_size > 1000


def test_the_commands_for_8_gpus(tmp_path: Path) -> None:
    """The script calls programs that only note their words, and the words are settings."""
    note = f"#!{sys.executable}\nimport json, sys\n"
    note += f"print(json.dumps(sys.argv), file=open({str(tmp_path / 'called')!r}, 'a'))\n"
    python = f'#!/bin/sh\nif [ $1 = -c ]; then exec {sys.executable} "$@"; fi\n'
    python += f'exec {tmp_path}/bin/accelerate "$@"\n'
    for name, text in (("accelerate", note), ("python", python)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    files = [str(tmp_path / f"{name}.jsonl") for name in ("cot", "rl", "test")]
    script = str(EXAMPLES / "qwen2_5_vl_7b_8_gpus.sh")
    run("env", f"PATH={tmp_path / 'bin'}:{os.environ['PATH']}", script, *files, str(tmp_path))
    called = [json.loads(line)[1:] for line in (tmp_path / "called").read_text().splitlines()]
    names = []
    for words in called:
        place = words.index("-m") + 2
        assert words[place - 1] == "ral"
        command = next(each for each in COMMANDS if each.name == words[place])
        settings = parse(command, words[place + 1 :])
        names.append(command.name)
        assert settings.values["data"] in files
        if command.name == "eval":
            continue
        assert words[:2] == ["launch", "--config_file"] and words[3:5] == ["--num_processes", "8"]
        assert yaml.safe_load(Path(words[2]).read_text())["distributed_type"] == "FSDP"
        if command.name == "train":
            values = {**settings.of(RALConfig), "bf16": False, "use_cpu": True}
            coefficients = RALConfig(**values).attn_coef, "attn_coef=0" in words
            assert coefficients in ((1.0, False), (0.0, True))
    assert names == ["sft", "train", "train", "eval", "eval", "eval"]


@slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS", "PYTHONPATH"):
        monkeypatch.setenv(variable, ENVIRONMENT[variable])
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(EXAMPLES / "notebooks" / name, as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # raises at an error in a cell, also of its asserts
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert pictures, "a notebook shows something"
