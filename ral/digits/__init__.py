"""The bundled tasks on real handwritten digits, and the tiny model that learns them."""
