"""Weights that a vLLM server reads from a file, where NCCL, which needs GPUs, would bring them.

`tests/engines/vllm/server.py` writes the file, and tells the server its path.
"""

from __future__ import annotations

from dataclasses import dataclass

from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)


@dataclass
class FileInit(WeightTransferInitInfo):
    """Nothing is agreed on."""


@dataclass
class FileUpdate(WeightTransferUpdateInfo):
    """A safetensors file with every weight, by its name in the trainer."""

    path: str


class FileWeights(WeightTransferEngine[FileInit, FileUpdate]):
    init_info_cls = FileInit
    update_info_cls = FileUpdate

    def init_transfer_engine(self, init_info: FileInit) -> None:
        pass

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: dict[str, str]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: FileUpdate) -> None:
        self.model.load_weights(load_file(update_info.path).items())  # type: ignore[operator]

    def finish_weight_update(self) -> None:
        pass

    def shutdown(self) -> None:
        pass
