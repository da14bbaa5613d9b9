"""Pictures of attention maps: over an image, token by token, along the frames of a video.

Every figure takes an `AttentionMap` of `rk.attention_map` and returns a matplotlib figure. If
`path` is given, it also writes the figure to that file. `write_html` writes one page to explore a
map in a browser. Only this package needs matplotlib, Pillow and, for video files, PyAV.

Colours are inferno's, whose lightness rises evenly, over the picture in grey. Where a few visual
tokens draw far more attention than the rest (attention sinks), the scale ends at a percentile. The
colour bar then says so.

`read_pictures` and `read_video` read files for `attention_map`, the command line and `ral.data`.
"""

from ..media.errors import PictureError
from ..media.masks import read_mask
from ..media.pictures import (
    PICTURE_SUFFIXES,
    as_rgb,
    count_frames,
    frame_times,
    picture_size,
    read_pictures,
)
from ..media.video_file import VIDEO_SUFFIXES
from ..media.videos import Video, read_video
from .figures import film_strip, overlay, token_frame, token_grid
from .frames import attention_over_frames
from .html import write_html
from .layers import layer_head_grid
from .maps import AttentionMap, Parts
from .parts import blend, colour_limit
from .regions import region_grid
from .words import Word

__all__ = [
    "PICTURE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "AttentionMap",
    "Parts",
    "PictureError",
    "Video",
    "Word",
    "as_rgb",
    "attention_over_frames",
    "blend",
    "colour_limit",
    "count_frames",
    "film_strip",
    "frame_times",
    "layer_head_grid",
    "overlay",
    "picture_size",
    "read_mask",
    "read_pictures",
    "read_video",
    "region_grid",
    "token_frame",
    "token_grid",
    "write_html",
]
