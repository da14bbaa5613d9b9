"""The configuration of the RAL term in verl's own YAML, and what is refused."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.engines.verl import rollouts

if importlib.util.find_spec("verl") is None:
    pytest.skip("verl is in an environment of its own: make test-verl", allow_module_level=True)

ROOT = Path(__file__).parents[3]
FILE = ("hydra.searchpath=[pkg://ral]", "+engines=verl")
MICRO = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2"


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in rollouts.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def _composed(*overrides: str) -> Any:
    """verl's configuration with these settings of a command line."""
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=list(overrides))


def _actor(*overrides: str) -> Any:
    from verl.utils.config import omega_conf_to_dataclass

    return omega_conf_to_dataclass(_composed(*overrides, MICRO).actor_rollout_ref.actor)


def test_the_yaml_file_makes_the_actor_one_with_the_term() -> None:
    from ral.engines.verl import RALActorConfig, RALTermConfig

    actor = _actor(
        *FILE, "actor_rollout_ref.actor.ral.coef=0.5", "actor_rollout_ref.actor.ral.layers=[0,-1]"
    )
    assert isinstance(actor, RALActorConfig) and actor.strategy == "fsdp2"
    assert actor.ral == actor.engine.ral == RALTermConfig(coef=0.5, layers=[0, -1])
    assert actor.engine.strategy == "ral_fsdp2"
    assert _composed(*FILE).actor_rollout_ref.model.external_lib == "ral.engines.verl"


def test_the_settings_of_the_yaml_file_are_all_and_have_the_defaults() -> None:
    from ral.engines.verl import RALTermConfig

    written = dict(_composed(*FILE).actor_rollout_ref.actor.ral)
    defaults = dict(RALTermConfig())
    assert written == {name: x for name, x in defaults.items() if not name.startswith("_")}


def test_without_the_yaml_file_the_settings_are_given_one_by_one() -> None:
    actor = _actor(
        "actor_rollout_ref.actor._target_=ral.engines.verl.RALActorConfig",
        "actor_rollout_ref.actor.strategy=fsdp2",
        "+actor_rollout_ref.actor.ral.divergence=kl",
    )
    assert actor.engine.ral.divergence == "kl" and actor.engine.ral.coef == 1.0


def test_a_coefficient_of_zero_leaves_the_engine_of_verl() -> None:
    actor = _actor(*FILE, "actor_rollout_ref.actor.ral.coef=0")
    assert actor.engine.strategy == "fsdp2" and not hasattr(actor.engine, "ral")
    actor.validate(n_gpus=8, train_batch_size=256)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("ral.coef=-1", "coef must be finite and >= 0; got -1"),
        ("ral.divergence=tv", "divergence must be one of jsd, kl, reverse_kl; got 'tv'"),
        ("ral.reduction=sum", "reduction must be one of token_mean, sequence_mean; got 'sum'"),
        ("ral.backend=metal", "backend must be one of None, .*; got 'metal'"),
        ("+ral.coeff=1", "Key 'coeff' not in 'RALTermConfig'"),
        ("strategy=fsdp", "strategy must be 'fsdp2'; got 'fsdp'"),
        ("use_prefix_grouper=true", "use_prefix_grouper is not supported"),
    ],
)
def test_a_wrong_setting_is_named(setting: str, message: str) -> None:
    plus, name = ("+", setting[1:]) if setting.startswith("+") else ("", setting)
    with pytest.raises(Exception, match=message):  # hydra's own, around ours
        _actor(*FILE, f"{plus}actor_rollout_ref.actor.{name}")


@pytest.mark.parametrize(
    ("epochs", "mini_batch", "runs"), [(1, 64, True), (2, 256, True), (1, 256, False)]
)
def test_a_schedule_under_which_the_term_is_zero_is_refused(
    epochs: int, mini_batch: int, runs: bool
) -> None:
    actor = _actor(
        *FILE,
        f"actor_rollout_ref.actor.ppo_epochs={epochs}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={mini_batch}",
    )
    if runs:
        actor.validate(n_gpus=8, train_batch_size=256)
        return
    with pytest.raises(ValueError, match="a batch must have two or more optimizer steps"):
        actor.validate(n_gpus=8, train_batch_size=256)


def test_the_example_is_a_configuration_that_verl_takes(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    example = ROOT / "examples" / "verl_qwen2_5_vl_7b_8_gpus.sh"
    done = subprocess.run(
        [example, "a.parquet", "b.parquet", "trainer.nnodes=2"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    said = done.stdout.splitlines()
    assert said[:2] == ["-m", "verl.trainer.main_ppo"]
    composed = _composed(*said[2:])
    assert composed.data.train_files == "a.parquet" and composed.trainer.nnodes == 2

    from verl.utils.config import omega_conf_to_dataclass

    actor = omega_conf_to_dataclass(composed.actor_rollout_ref.actor)
    assert actor.engine.strategy == "ral_fsdp2"
    actor.validate(n_gpus=8, train_batch_size=composed.data.train_batch_size)


def test_trl_in_the_environment_of_verl_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from ral.engines import verl

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name == "trl" else found(name)
    )
    trl = types.ModuleType("trl")
    monkeypatch.setitem(sys.modules, "trl", trl)
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "1.16.0" if name == "trl" else version(name)
    )
    with pytest.raises(
        ImportError, match=r"TRL must not be in verl's environment.*got trl 1\.16\.0"
    ):
        verl._check_verl()
    monkeypatch.setattr(trl, "AutoModelForCausalLMWithValueHead", object, raising=False)
    verl._check_verl()


def test_another_version_of_verl_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from ral.engines import verl

    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.10.1")
    with pytest.raises(ImportError, match=r"verl must be 'verl>=0\.9,<0\.10'; got 0\.10\.1"):
        verl._check_verl()
