"""vLLM's own server on the CPU, and weights for it as a file.

The client, its requests and the server are TRL's and vLLM's. Two methods of the client, which join
a group of NCCL and send weights by it, are replaced: `without_nccl`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file


@contextmanager
def serving(model: Path, log: Path) -> Iterator[str]:
    """The URL of a server of `model`, started as `trl vllm-serve` starts it, but for NCCL."""
    from trl.scripts.vllm_serve import ScriptArguments, build_command

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = build_command(
        ScriptArguments(
            model=str(model), host="127.0.0.1", port=port, max_model_len=512,
            gpu_memory_utilization=0.1,
        ),
        ["--max-num-seqs", "16"],
    )  # fmt: skip
    nccl = json.dumps({"backend": "nccl"})
    command[command.index(nccl)] = json.dumps({"backend": "file"})
    environment = {
        **os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }  # fmt: skip
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(url, server)
        yield url
    except BaseException:
        print(log.read_text(errors="replace")[-8000:], file=sys.stderr)
        raise
    finally:
        server.terminate()
        server.wait(60)


def _wait_for(url: str, server: subprocess.Popen) -> None:
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health").close()
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the server of vLLM ended with {server.returncode}")


def without_nccl(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let TRL's client send weights by files in `folder`."""
    from trl.generation.vllm_client import VLLMClient

    def init_communicator(self: Any, device: Any = 0) -> None:
        assert self.get_server_info()["weight_transfer_config"]["backend"] == "file"
        self._post(f"{self.base_url}/init_weight_transfer_engine", json={"init_info": {}})

    def update_named_params(self: Any, metadata: Any, named_params: Any) -> None:
        path = folder / "weights.safetensors"
        weights = {name: value.contiguous() for name, value in named_params}
        assert list(weights) == [name for name, _, _ in metadata]
        save_file(weights, path)
        self._start_weight_update()
        self._post(f"{self.base_url}/update_weights", json={"update_info": {"path": str(path)}})
        self._finish_weight_update()

    monkeypatch.setattr(VLLMClient, "init_communicator", init_communicator)
    monkeypatch.setattr(VLLMClient, "update_named_params", update_named_params)
