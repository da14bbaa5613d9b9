"""`attention_policy`, and its divergence from a reference (equations: README.md, divergence.md)."""

from .divergence import attention_divergence
from .interface import attention_policy
from .loss import ral_loss

__all__ = ["attention_divergence", "attention_policy", "ral_loss"]
