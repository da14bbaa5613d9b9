"""Checks of the processes that a launcher started: do they train together?"""

from __future__ import annotations

import os
from typing import Any

_SIZES = ("cp_size", "sp_size", "tp_size", "dp_replicate_size", "dp_shard_size")


def check_world_size(config: Any) -> None:
    """Refuse processes that would each train alone, all in one output folder.

    Args:
        config: `TrainingArguments`, which has asked accelerate.

    Raises:
        ValueError: a launcher started another number of processes than accelerate counts.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != config.world_size:
        raise ValueError(
            f"{type(config).__name__}: WORLD_SIZE must be accelerate's number of processes; got "
            f"WORLD_SIZE={started} and num_processes={config.world_size}: each process would train "
            "alone, in one output_dir. On CPUs give use_cpu=true to the trainer, too"
        )


def check_parallelism(config: Any) -> None:
    """Refuse parallelism other than of data.

    Args:
        config: `TrainingArguments`; accelerate's YAML speaks through the environment.

    Raises:
        NotImplementedError: a size of parallelism_config is above 1.
    """
    given = config.parallelism_config
    sizes = {name: getattr(given, name) or 1 for name in _SIZES} if given is not None else {}
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() in ("true", "1"):
        for name in _SIZES:
            from_yaml = int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1"))
            sizes[name] = max(sizes.get(name, 1), from_yaml)
    above = [f"{name}={size}" for name, size in sizes.items() if size > 1]
    if above:
        raise NotImplementedError(
            f"{type(config).__name__}: parallelism_config is not supported (DDP, FSDP and "
            f"DeepSpeed are); got {', '.join(above)}"
        )
