"""The `divergence` op: jsd, kl and reverse_kl of rows of probabilities (equations: README.md)."""

from .interface import divergence

__all__ = ["divergence"]
