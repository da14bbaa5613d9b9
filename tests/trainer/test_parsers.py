"""`RALConfig` from transformers' `HfArgumentParser` and TRL's `TrlParser`, as scripts take it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser
from trl import TrlParser

from ral import RALConfig

WORDS = [
    "--output_dir", "unused", "--use_cpu", "true", "--bf16", "false", "--report_to", "none",
    "--per_device_train_batch_size", "8", "--num_generations", "4", "--num_iterations", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def parsers() -> dict[str, Any]:
    return {"transformers": HfArgumentParser(RALConfig), "trl": TrlParser(RALConfig)}


def parse(parsers: dict[str, Any], name: str, *words: str) -> RALConfig:
    (config,) = parsers[name].parse_args_into_dataclasses([*WORDS, *words])
    assert isinstance(config, RALConfig)
    return config


@pytest.mark.parametrize("name", ["transformers", "trl"])
def test_a_command_line(parsers: dict[str, Any], name: str) -> None:
    config = parse(
        parsers, name, "--attn_coef", "5", "--attn_layers", "3,-1", "--attn_granularity", "tile",
        "--attn_tile", "2", "3", "--attn_backend", "reference", "--no_disable_dropout",
        "--attn_exclude_self", "false", "--distill_teacher_layers=-2", "--attn_map_every", "7",
        "--report_to", "tensorboard",
    )  # fmt: skip
    assert (config.attn_coef, config.attn_layers) == (5.0, [3, -1])
    assert (config.attn_granularity, config.attn_tile) == ("tile", [2, 3])
    assert (config.attn_backend, config.distill_teacher_layers) == ("reference", -2)
    assert (config.disable_dropout, config.attn_exclude_self) == (False, False)
    assert config.attn_map_every == 7
    defaults = parse(parsers, name)
    assert (defaults.attn_layers, defaults.distill_teacher_layers) == (-1, None)


def test_objectives_in_a_line_each(parsers: dict[str, Any]) -> None:
    config = parse(
        parsers, "trl", "--evidence_coef=0.1", "--evidence_layers=0,-1", "--evidence_heads", "0",
        "2", "--evidence_on", "all", "--attention_reward=0.2", "--credit=looking",
    )  # fmt: skip
    assert (config.evidence_coef, config.evidence_layers) == (0.1, [0, -1])
    assert (config.evidence_heads, config.evidence_on) == ([0, 2], "all")
    assert (config.attention_reward, config.credit) == (0.2, "looking")
    config = parse(parsers, "trl", "--evidence_min_reward=0.9", "--evidence_layers=none")
    assert (config.evidence_min_reward, config.evidence_layers) == (0.9, None)
    assert config.evidence_heads == []


@pytest.mark.parametrize("layers, wanted", [("-1", -1), ("0,-1", [0, -1]), ("all", "all")])
def test_layers_are_words(parsers: dict[str, Any], layers: str, wanted: Any) -> None:
    assert parse(parsers, "trl", f"--attn_layers={layers}").attn_layers == wanted


def test_unknown_choices_are_refused(
    parsers: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(parsers, "trl", "--attn_scope", "all")
    assert "invalid choice: 'all' (choose from" in capsys.readouterr().err
    with pytest.raises(ValueError, match="distill_teacher_layers must be a number, a list of"):
        parse(parsers, "trl", "--distill_teacher_layers", "all")


def test_a_yaml_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "attn_layers: [0, -1]\ndistill_teacher_layers: 2\nattn_reference: ref\nbeta: 0.04\n"
        "attn_tile: [1, 2]\nattn_coef: 0.5\nevidence_coef: 0.1\ncredit: looking\n"
    )
    parser = TrlParser(RALConfig)  # the file changes its defaults
    (config,) = parser.parse_args_and_config([*WORDS, "--config", str(path), "--attn_coef", "5"])
    assert (config.attn_layers, config.distill_teacher_layers) == ([0, -1], 2)
    assert (config.attn_reference, config.beta, config.attn_tile) == ("ref", 0.04, [1, 2])
    assert config.attn_coef == 5.0
    assert (config.evidence_coef, config.credit) == (0.1, "looking")
