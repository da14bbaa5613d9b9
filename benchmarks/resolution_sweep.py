"""What attention policies cost as resolution grows, against what a user would do instead.

A picture of the scikit-image wheel at growing resolution goes through the real Qwen2-VL image
processor and a randomly initialised Qwen2.5-VL, which gives q, k, v of its last layer. Each tile of
the picture is a span. Its keys are scattered, a few in each row of tokens, which is the hard case
for kernels. With several pictures a prompt, `--spans image` makes each one a contiguous span. On
the same q, k, v the sweep also measures the cost of marginals in four layouts of contiguous spans
(harness/layouts.py). With `--objective ral` it measures the token-level RAL loss of the last rows
instead, which has no spans.

    python -m benchmarks.resolution_sweep
    python -m benchmarks.resolution_sweep --objective ral
    python -m benchmarks.resolution_sweep --tokens 256 1024 --images 2 --spans image
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Sequence

from benchmarks.harness.inputs import TOKEN_PIXELS, LayerInputs, ModelInputs, random_layer
from benchmarks.harness.runner import DTYPES, Size, add_arguments, heads_of, parse, run_sweep

TOKENS = (256, 512, 1024, 2048, 4096)
FULL_TOKENS = (*TOKENS, 8192, 16384)
QUICK_TOKENS = (256, 1024)


def grid_of(tokens: int) -> tuple[int, int]:
    """Rows and columns of the grid nearest to `tokens`, its width one to two times its height."""
    grids = [
        (rows, round(tokens / rows))
        for rows in range(max(math.isqrt(tokens // 2), 1), math.isqrt(tokens) + 1)
    ]
    return min(grids, key=lambda grid: (abs(grid[0] * grid[1] - tokens), grid[1] - grid[0]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add(
        "--tokens",
        type=int,
        nargs="+",
        help=f"visual tokens an image (default: {TOKENS}; --full: {FULL_TOKENS}; "
        f"--quick: {QUICK_TOKENS})",
    )
    add("--images", type=int, default=1, help="pictures in the prompt (default: %(default)s)")
    add(
        "--spans",
        choices=("tile", "image"),
        default="tile",
        help="what a span is (default: %(default)s)",
    )
    add(
        "--tile",
        type=int,
        nargs=2,
        default=(8, 8),
        help="tokens of a tile, rows and columns (default: 8 8)",
    )
    add_arguments(parser)
    options = parse(parser, arguments)
    default = QUICK_TOKENS if options.quick else FULL_TOKENS if options.full else TOKENS
    tokens = options.tokens or default
    heads, dtype = heads_of(options), DTYPES[options.dtype]
    model = ModelInputs(heads, dtype, options.device) if options.input == "model" else None
    tile = tuple(options.tile) if options.spans == "tile" else None

    def make(count: int) -> LayerInputs:
        rows, columns = grid_of(count)
        if model is None:  # contiguous spans of a tile's size, or of an image's
            length = rows * columns if tile is None else min(tile[0] * tile[1], rows * columns)
            full, rest = divmod(rows * columns * options.images, length)
            lengths = [length] * full + ([rest] if rest else [])
            return random_layer(lengths, heads, dtype, options.device)
        from benchmarks.harness.photographs import STILLS, still

        height, width = rows * TOKEN_PIXELS, columns * TOKEN_PIXELS
        names = [STILLS[index % len(STILLS)] for index in range(options.images)]
        return model.layer([still(name, height, width) for name in names], options.spans, tile)

    sizes = []
    for count in tokens:
        rows, columns = grid_of(count)
        visual = rows * columns * options.images
        name = f"{columns * TOKEN_PIXELS} x {rows * TOKEN_PIXELS} pixels"
        axis = {"tokens_per_image": rows * columns, "images": options.images}
        sizes.append(Size(name, axis, visual, functools.partial(make, count)))
    extra = {"spans": options.spans, "tile": list(tile) if tile else None}
    return run_sweep("resolution_sweep", options, sizes, extra)


if __name__ == "__main__":
    sys.exit(main())
