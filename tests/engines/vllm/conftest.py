"""Real vLLM on the CPU: `make test-vllm`. Where vLLM is missing, nothing here is collected.

vLLM's variables and the shim of its processes are set here, before anything imports it.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SHIM = Path(__file__).with_name("shim")
VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in the process of the trainer
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_CI_ENV": "1",  # compiles nothing, which takes minutes
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

collect_ignore_glob = []
if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ.update(VARIABLES)
    found = os.environ.get("PYTHONPATH", "")
    if str(SHIM) not in found.split(os.pathsep):  # of the processes that tests start
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(SHIM), found)))
        sys.path.insert(0, str(SHIM))
        sys.modules.pop("sitecustomize", None)
        importlib.import_module("sitecustomize")


@pytest.fixture(autouse=True)
def launcher_variables() -> Iterator[None]:
    """TRL sets a launcher's variables for vLLM; a later test must not take itself for a rank."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    with socket.socket() as free:  # TRL tries four ports, which others may have
        free.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture
def one_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers of the same model share an engine, which takes 10 s to start.

    It gets the trainer's weights before the first rollout, as every engine does.
    """
    from trl.generation import vllm_generation

    from tests.engines.vllm import engines

    monkeypatch.setattr(vllm_generation, "LLM", engines.shared)
