"""`ral_kernels` in transformers: attn_implementation="ral", capture, steering, spans and maps."""

from .registration import register

__all__ = ["register"]
