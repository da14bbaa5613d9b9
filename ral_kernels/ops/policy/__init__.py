"""Attention policies and how far they are from another (equations: README.md, divergence.md)."""

from .categorical import policy_loss
from .divergence import attention_divergence
from .interface import attention_policy
from .loss import ral_loss

__all__ = ["attention_divergence", "attention_policy", "policy_loss", "ral_loss"]
