"""`RALConfig`: values that it refuses, and schedules under which the RAL term is zero."""

from __future__ import annotations

from typing import Any

import pytest
from accelerate.parallelism_config import ParallelismConfig

from ral import RALConfig
from ral.schedule import inner_step

BASE: dict[str, Any] = {
    "output_dir": "unused",
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "num_iterations": 2,
}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"attn_granularity": "pixel"}, "attn_granularity must be one of token, tile, frame"),
        ({"attn_scope": "all"}, "attn_scope must be one of context, visual; got 'all'"),
        (
            {"attn_divergence": "js"},
            "attn_divergence must be one of jsd, kl, reverse_kl, cross_entropy",
        ),
        ({"attn_reference": "new"}, "attn_reference must be one of old, ref, teacher"),
        ({"attn_rows": "next"}, "attn_rows must be one of predicting, token"),
        ({"attn_reduction": "sum"}, "attn_reduction must be one of token_mean, sequence_mean"),
        ({"attn_backend": "tpu"}, "attn_backend must be None or one of cuda, .*; got 'tpu'"),
        ({"attn_coef": -1.0}, "attn_coef must be finite and >= 0; got -1.0"),
        ({"attn_coef": float("nan")}, "attn_coef must be finite"),
        ({"distill_attn_coef": float("inf")}, "distill_attn_coef must be finite"),
        ({"vllm_min_ratio": -0.1}, r"vllm_min_ratio must lie in \[0, 1\]; got -0.1"),
        ({"distill_beta": 1.5}, r"distill_beta must lie in \[0, 1\]; got 1.5"),
        ({"attn_tile": [4]}, r"attn_tile must be \[rows, columns\]"),
        ({"attn_tile": [0, 2]}, r"attn_tile must be \[rows, columns\], both >= 1"),
        ({"attn_layers": "last"}, "attn_layers must be a number, a list of numbers, or 'all'"),
        ({"attn_metrics_every": -1}, "attn_metrics_every must be finite and >= 0"),
        ({"attn_reference": "ref"}, "attn_reference='ref' needs beta > 0"),
        ({"evidence_coef": -0.1}, "evidence_coef must be finite and >= 0; got -0.1"),
        ({"evidence_divergence": "ce"}, "evidence_divergence must be one of jsd, kl"),
        ({"evidence_on": "bad"}, "evidence_on must be one of good, all; got 'bad'"),
        ({"evidence_schedule": "step"}, "evidence_schedule must be one of constant, warmup, lin"),
        ({"evidence_steps": 0.0}, "evidence_steps must be finite and > 0; got 0.0"),
        ({"evidence_heads": [1, 1]}, r"evidence_heads must be different numbers >= 0; got \[1, 1"),
        ({"evidence_layers": "last"}, "evidence_layers must be a number, a list of numbers, or"),
        ({"evidence_divergence": "kl"}, "evidence_floor must be > 0 with 'kl'"),
        ({"evidence_floor": 1.0}, r"evidence_floor must lie in \[0, 1\); got 1.0"),
        ({"evidence_sigma": -1.0}, "evidence_sigma must be finite and >= 0; got -1.0"),
        (
            {"evidence_on": "all", "evidence_min_reward": 0.5},
            "evidence_min_reward needs evidence_on='good'; got 'all'",
        ),
        ({"attention_reward": -1.0}, "attention_reward must be finite and >= 0; got -1.0"),
        (
            {"attention_reward": 1.0, "num_iterations": 1, "attn_coef": 0.0},
            "attention_reward > 0 needs more than one optimizer step on a rollout batch",
        ),
        ({"credit": "all"}, "credit must be one of uniform, looking, evidence; got 'all'"),
        ({"credit_top_share": 0.0}, r"credit_top_share must lie in \(0, 1\]; got 0.0"),
        ({"credit_top_share": 0.5}, "credit_top_share needs credit='looking' or 'evidence'"),
        ({"credit_sinks": -1}, "credit_sinks must be finite and >= 0; got -1"),
        ({"attn_explore_sigma": 1.0}, "attn_explore_sigma needs attn_granularity"),
        (
            {"attn_explore_sigma": 1.0, "attn_granularity": "frame", "use_vllm": True},
            "attn_explore_sigma is not supported with use_vllm=True",
        ),
    ],
)
def test_refused_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="RALConfig: " + message):
        RALConfig(**{**BASE, **settings})


def test_processes_that_do_not_train_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a launcher starts two on CPUs, and the trainer takes itself for the only one."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="got WORLD_SIZE=2 and num_processes=1"):
        RALConfig(**{**BASE, "use_cpu": False})
    monkeypatch.setenv("WORLD_SIZE", "1")
    RALConfig(**BASE)


@pytest.mark.parametrize("name", ["cp", "sp", "tp", "dp_replicate", "dp_shard"])
def test_parallelism_of_accelerate_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", "1")
    RALConfig(**BASE)
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", "2")
    with pytest.raises(NotImplementedError, match=f"is not supported .*; got {name}_size=2"):
        RALConfig(**BASE)


def test_parallelism_config_is_refused() -> None:
    RALConfig(**BASE, parallelism_config=ParallelismConfig())
    with pytest.raises(NotImplementedError, match=r"_config is not supported .*tp_size=2"):
        RALConfig(**BASE, parallelism_config=ParallelismConfig(tp_size=2))


@pytest.mark.parametrize(
    "layers, wanted", [("-1", -1), ("0,3,-1", [0, 3, -1]), ("all", "all"), ([1, 2], [1, 2])]
)
def test_layers_from_a_command_line(layers: Any, wanted: Any) -> None:
    assert RALConfig(**BASE, attn_layers=layers).attn_layers == wanted


# (num_iterations, steps_per_generation, gradient_accumulation_steps) -> optimizer steps a batch
SCHEDULES = [
    ((1, 1, 1), 1), ((1, 4, 4), 1), ((1, 2, 4), 0.5), ((2, 1, 2), 1), ((2, 2, 4), 1),
    ((2, 1, 1), 2), ((1, 4, 2), 2), ((1, 4, 1), 4), ((4, 4, 4), 4), ((2, 2, 1), 4),
    ((3, 1, 2), 1.5),
]  # fmt: skip


@pytest.mark.parametrize("schedule, steps", SCHEDULES)
def test_one_step_a_rollout_batch_is_refused(schedule: tuple[int, int, int], steps: float) -> None:
    names = ("num_iterations", "steps_per_generation", "gradient_accumulation_steps")
    settings = {**BASE, **dict(zip(names, schedule, strict=True))}
    if steps <= 1:
        with pytest.raises(ValueError, match="Set num_iterations >= 2, or steps_per_generation"):
            RALConfig(**settings)
        for harmless in (
            {"attn_coef": 0.0},
            {"attn_reference": "ref", "beta": 0.04},
            {"attn_reference": "teacher"},
        ):
            RALConfig(**settings, **harmless)
    else:
        assert RALConfig(**settings).optimizer_steps_per_generation == steps


def test_one_token_answers_are_refused() -> None:
    """The query that predicts the first token is the same in all rollouts of a group."""
    with pytest.raises(ValueError, match="max_completion_length > 1"):
        RALConfig(**BASE, max_completion_length=1)
    RALConfig(**BASE, max_completion_length=1, attn_rows="token")


def test_inner_steps() -> None:
    config = RALConfig(
        **{**BASE, "steps_per_generation": 4, "gradient_accumulation_steps": 2, "num_iterations": 2}
    )
    assert [inner_step(config, micro) for micro in range(10)] == [0, 0, 1, 1, 2, 2, 3, 3, 0, 0]
    assert config.optimizer_steps_per_generation == 4


def test_dropout_is_off_by_default() -> None:
    assert RALConfig(**BASE).disable_dropout


def test_what_needs_a_teacher() -> None:
    assert not RALConfig(**BASE).needs_teacher
    for settings in (
        {"distill_logit_coef": 1.0}, {"distill_attn_coef": 0.1}, {"attn_reference": "teacher"},
    ):  # fmt: skip
        assert RALConfig(**BASE, **settings).needs_teacher
    assert not RALConfig(**BASE, attn_reference="teacher", attn_coef=0.0).needs_teacher
