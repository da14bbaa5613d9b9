"""The `policy_divergence` op: a policy against a snapshot, streamed (equations: README.md)."""

from .interface import attention_divergence
from .loss import ral_loss

__all__ = ["attention_divergence", "ral_loss"]
