"""Attention policies as kernels: attention whose share of each span of keys has a gradient."""

from .attention import (
    AttentionOutput,
    attention,
    flash_attn_func,
    flash_attn_varlen_func,
    scaled_dot_product_attention,
)
from .backends import available_backends
from .divergence import divergence
from .policy import attention_policy
from .policy_divergence import attention_divergence, ral_loss
from .snapshot import AttentionSnapshot
from .spans import Spans

__version__ = "0.1.0"

__all__ = [
    "AttentionOutput",
    "AttentionSnapshot",
    "Spans",
    "attention",
    "attention_divergence",
    "attention_policy",
    "available_backends",
    "divergence",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "ral_loss",
    "scaled_dot_product_attention",
]
