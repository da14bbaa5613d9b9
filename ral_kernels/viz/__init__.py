"""Pictures of attention maps: over an image, token by token, along the frames of a video.

Every function takes an `AttentionMap` of `rk.attention_map`, returns a matplotlib figure and writes
it to a file if `path` is given. matplotlib and Pillow are needed here only: `ral-kernels[viz]`.

Colours are inferno's, which rise evenly in lightness, over the picture in grey. Where a few visual
tokens draw far more attention than the rest (attention sinks), the scale ends at a percentile and
the colour bar says so.
"""

from .figures import film_strip, overlay, token_frame, token_grid
from .parts import blend, colour_limit

__all__ = ["blend", "colour_limit", "film_strip", "overlay", "token_frame", "token_grid"]
