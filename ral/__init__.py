"""`ral`: GRPO with Reinforced Attention Learning, and On-Policy Attention Distillation, on TRL."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import RALConfig
    from .terms import Term
    from .trainer import RALTrainer

__all__ = ["RALConfig", "RALTrainer", "Term"]

# Imported on first use, because rewards and data do not need TRL.
_LAZY = {"RALConfig": "config", "RALTrainer": "trainer", "Term": "terms"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
