"""One engine at a time, kept for the next trainer of its model."""

from __future__ import annotations

import gc
from typing import Any

from vllm import LLM
from vllm.distributed import cleanup_dist_env_and_memory

_kept: dict[str, Any] = {}


def shared(model: str, **options: Any) -> LLM:
    """In the place of vLLM's class, as TRL calls it."""
    if model not in _kept:
        if _kept:
            _kept.clear()
            gc.collect()
            cleanup_dist_env_and_memory()
        _kept[model] = LLM(model=model, **options)
    return _kept[model]
