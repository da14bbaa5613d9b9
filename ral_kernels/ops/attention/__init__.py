"""The `attention` op: attention with differentiable span marginals (equations: README.md)."""

from .drop_in import flash_attn_func, flash_attn_varlen_func, scaled_dot_product_attention
from .interface import AttentionOutput, attention

__all__ = [
    "AttentionOutput",
    "attention",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "scaled_dot_product_attention",
]
