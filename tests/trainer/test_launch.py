"""The accelerate configurations in ral/launch: every key is known, and comes to what it says."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
)
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

FOLDER = Path(str(files("ral") / "launch"))
CONFIGURATIONS = {
    "ddp": DistributedType.MULTI_GPU,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
    "deepspeed_zero3": DistributedType.DEEPSPEED,
    "fsdp2": DistributedType.FSDP,
    "fsdp2_two_nodes": DistributedType.FSDP,
}
# As DeepSpeed's documentation has them: what accelerate makes of a configuration holds no others.
DEEPSPEED_KEYS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "zero_optimization", "steps_per_print", "bf16", "fp16",
    "zero_allow_untested_optimizer",
}  # fmt: skip
ZERO_KEYS = {"stage", "offload_optimizer", "offload_param",
             "stage3_gather_16bit_weights_on_model_save"}  # fmt: skip


def resolved(name: str) -> tuple[Any, dict[str, str]]:
    """Arguments and environment of the processes that `accelerate launch` would start."""
    command = ["--config_file", str(FOLDER / f"{name}.yaml"), "-m", "ral", "train"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    if not args.use_deepspeed:
        return args, prepare_multi_gpu_env(args)
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return args, prepare_deepspeed_cmd_env(args)[1]


def enter(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        if os.environ.get(name) != value:
            monkeypatch.setenv(name, value)


def test_every_configuration_is_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(CONFIGURATIONS)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_accelerate_reads_it(name: str) -> None:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == CONFIGURATIONS[name]
    assert config.mixed_precision == "bf16"
    assert config.num_processes == 8 * config.num_machines


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_key_is_an_argument(name: str) -> None:
    """accelerate drops a key of these two sections that it does not know."""
    known = vars(launch_command_parser().parse_args(["script.py"]))
    content = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    for section in ("fsdp_config", "deepspeed_config"):
        assert set(content.get(section, {})) <= set(known)


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_two_nodes"])
def test_fsdp2(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args, environment = resolved(name)
    assert args.use_fsdp and environment["ACCELERATE_USE_FSDP"] == "true"
    enter(environment, monkeypatch)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
    assert "transformer_auto_wrap_policy" in str(plugin.auto_wrap_policy)
    assert plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing
    if name == "fsdp2_two_nodes":
        assert (args.num_machines, args.machine_rank) == (2, 0)
        assert args.main_process_ip and args.main_process_port


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as accelerate goes; DeepSpeed itself is not run in these tests."""
    args, environment = resolved(f"deepspeed_zero{stage}")
    assert args.use_deepspeed and environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    enter(environment, monkeypatch)
    plugin = DeepSpeedPlugin()
    made = plugin.deepspeed_config
    assert plugin.zero_stage == made["zero_optimization"]["stage"] == stage
    assert plugin.zero3_init_flag is (stage == 3)
    gathers = made["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    assert gathers is (stage == 3)
    assert set(made) <= DEEPSPEED_KEYS
    assert set(made["zero_optimization"]) <= ZERO_KEYS
