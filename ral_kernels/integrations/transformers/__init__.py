"""`ral_kernels` in transformers: attn_implementation="ral", capture, steering, spans and maps."""

from .processors import images_only, load_processor
from .registration import register

__all__ = ["images_only", "load_processor", "register"]
