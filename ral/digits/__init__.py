"""The bundled tasks on real handwritten digits, and the tiny model that learns them."""

from .pretrained import load_pretrained

__all__ = ["load_pretrained"]
