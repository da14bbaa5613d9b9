"""Attention kernels that also return each span's share of the attention, with its gradient."""

from typing import TYPE_CHECKING, Any

from .integrations import _autoregister
from .ops.attention import (
    AttentionOutput,
    attention,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    scaled_dot_product_attention,
)
from .ops.divergence import divergence
from .ops.policy import attention_divergence, attention_policy, policy_loss, ral_loss
from .runtime.backends import available_backends
from .sharded import ShardedPolicy, ShardedSnapshot, sharded_bytes
from .snapshot import AttentionSnapshot
from .spans import Spans
from .targets import AttentionTarget

if TYPE_CHECKING:
    from .integrations.transformers.attention_map import AttentionMap, attention_map
    from .integrations.transformers.capture import capture
    from .integrations.transformers.regions import RegionWeights, region_weights
    from .integrations.transformers.router import capture_router
    from .integrations.transformers.spans import spans_for
    from .integrations.transformers.steer import steer
    from .integrations.transformers.tap import record_attention

__version__ = "0.1.0"

# Public names that need transformers, which is imported when one of them is first asked for.
_LAZY = {
    "AttentionMap": "attention_map",
    "RegionWeights": "regions",
    "attention_map": "attention_map",
    "capture": "capture",
    "capture_router": "router",
    "record_attention": "tap",
    "region_weights": "regions",
    "spans_for": "spans",
    "steer": "steer",
}

__all__ = [
    "AttentionMap",
    "AttentionOutput",
    "AttentionSnapshot",
    "AttentionTarget",
    "RegionWeights",
    "ShardedPolicy",
    "ShardedSnapshot",
    "Spans",
    "attention",
    "attention_divergence",
    "attention_map",
    "attention_policy",
    "available_backends",
    "capture",
    "capture_router",
    "divergence",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "policy_loss",
    "ral_loss",
    "record_attention",
    "region_weights",
    "scaled_dot_product_attention",
    "sharded_bytes",
    "spans_for",
    "steer",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    try:
        module = importlib.import_module(f".integrations.transformers.{_LAZY[name]}", __name__)
    except ImportError:
        from .integrations.transformers.registration import check_transformers

        check_transformers(name)  # says what to install
        raise
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if __name__ == "ral_kernels":  # a copy under another name leaves transformers' table alone
    _autoregister.install()  # attn_implementation="ral", as soon as transformers is there
