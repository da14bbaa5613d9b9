"""`eval_data` of the commands: when they evaluate, in which rows, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, DatasetDict

from ral.cli.main import main
from ral.cli.progress import read_metrics
from ral.cli.settings import DataSettings
from ral.cli.sources import evaluation_rows, training_rows

from . import cli_case
from .cli_case import words

pytestmark = pytest.mark.usefixtures("one_thread")
slow = pytest.mark.slow(stands_in="test_refusals")
RL = (
    "num_generations=4", "max_completion_length=6", "steps_per_generation=2", "max_steps=4",
    "gradient_accumulation_steps=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli_case.make(tmp_path_factory.mktemp("case"))


@pytest.mark.parametrize(
    "given, said",
    [
        (["eval_data=/no/such.jsonl"], "eval_data: there is no data file /no/such.jsonl"),
        (["eval_data=digits:cells"], "eval_data: data must be a file"),
        (["eval_strategy=steps"], "eval_strategy=steps needs eval_data; got none"),
        (["eval_temperature=-1"], "eval_temperature must be None, or finite and >= 0; got -1"),
        (["eval_rows=-1"], "eval_rows must be >= 0; got -1"),
    ],
)
def test_refusals(
    given: list[str], said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *words(folder, tmp_path / "run", *RL, *given)]) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_rows(folder: Path) -> None:
    file = str(folder / "rows.jsonl")
    assert evaluation_rows(DataSettings(data=file)) is None
    given = DataSettings(data=file, eval_data=file, streaming=True)
    assert len(evaluation_rows(given)) == 8
    assert len(evaluation_rows(DataSettings(eval_data=file, eval_rows=3))) == 3
    assert "completion" in evaluation_rows(given, demonstrations=True).column_names
    digits = evaluation_rows(
        DataSettings(eval_data="digits:cell", digits_rows=9, digits_extent=[2])
    )
    assert len(digits) == 500


def test_rows_of_another_split(tmp_path: Path) -> None:
    row = {"problem": "1 + 1?", "problem_type": "numerical", "data_type": "text", "solution": "2"}
    parts = {"train": Dataset.from_list([row] * 3), "test": Dataset.from_list([row] * 2)}
    DatasetDict(parts).save_to_disk(tmp_path / "both")
    given = DataSettings(data=str(tmp_path / "both"), eval_data=str(tmp_path / "both"))
    assert len(training_rows(given, 0)) == 3
    assert len(evaluation_rows(given)) == 2
    assert len(evaluation_rows(replace(given, eval_split="train"))) == 3


@slow
def test_train(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    evaluating = (f"eval_data={folder / 'rows.jsonl'}", "eval_rows=3", "save_steps=2")
    best = ("save_strategy=steps", "load_best_model_at_end=true", "metric_for_best_model=accuracy")
    assert main(["train", *words(folder, out, *RL, *evaluating, *best)]) == 0
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "eval_accuracy" in row]
    assert [row["step"] for row in rows] == [2, 4]
    assert "eval_reward/multiple_choice" in rows[0]
    for step in (2, 4):
        text = (out / f"evaluations/step-{step:06d}.jsonl").read_text("utf-8")
        assert [json.loads(line)["expected"] for line in text.splitlines()] == ["A", "B", "A"]
    assert "eval accuracy 0.000" in capsys.readouterr().err
    settings = yaml.safe_load((out / "config.yaml").read_text())
    chosen = ("eval_steps", "num_generations_eval", "eval_temperature")
    assert [settings[name] for name in chosen] == [2, 1, 0.0]
    # Said otherwise, it is otherwise.
    more = ("eval_steps=3", "num_generations_eval=2", "eval_temperature=1")
    assert main(["train", *words(folder, tmp_path / "2", *RL, *evaluating, *more)]) == 0
    files = sorted((tmp_path / "2/evaluations").iterdir())
    assert [file.name for file in files] == ["step-000003.jsonl", "step-000004.jsonl"]  # the end
    assert len(files[0].read_text("utf-8").splitlines()) == 6


@slow
def test_sft(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    evaluating = (f"eval_data={folder / 'rows.jsonl'}", "eval_steps=1", "max_steps=2")
    assert main(["sft", *words(folder, out, *evaluating)]) == 0
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "eval_loss" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert 0 <= rows[0]["eval_mean_token_accuracy"] <= 1
