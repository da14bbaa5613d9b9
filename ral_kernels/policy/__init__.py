"""The `policy` op: head-averaged, renormalised attention rows (equations: README.md)."""

from .interface import attention_policy

__all__ = ["attention_policy"]
