"""Attention policies as kernels: attention whose share of each span of keys has a gradient."""

from .attention import (
    AttentionOutput,
    attention,
    flash_attn_func,
    flash_attn_varlen_func,
    scaled_dot_product_attention,
)
from .backends import available_backends
from .spans import Spans

__version__ = "0.1.0"

__all__ = [
    "AttentionOutput",
    "Spans",
    "attention",
    "available_backends",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "scaled_dot_product_attention",
]
