"""What attention policies cost as video frames grow, against what a user would do instead.

A camera pans over the pictures of the scikit-image wheel. Each frame is an image of a prompt, as
trainers like TRL's pass videos. The real Qwen2-VL image processor and a randomly initialised
Qwen2.5-VL turn the prompt into q, k, v of its last layer. Each frame is a span. On the same q, k, v
the sweep also measures the cost of marginals in four span layouts (harness/layouts.py). With
`--objective ral` it measures the token-level RAL loss of the last rows instead.

    python -m benchmarks.frames_sweep
    python -m benchmarks.frames_sweep --objective ral
    python -m benchmarks.frames_sweep --frames 4 8 16 --input random --dtype float32
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence

from benchmarks.harness.inputs import TOKEN_PIXELS, LayerInputs, ModelInputs, random_layer
from benchmarks.harness.runner import DTYPES, Size, add_arguments, heads_of, parse, run_sweep

FRAMES = (4, 8, 16, 32, 64)
FULL_FRAMES = (*FRAMES, 128, 256)
QUICK_FRAMES = (4, 16)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--frames",
        type=int,
        nargs="+",
        help=f"numbers of frames (default: {FRAMES}; --full: {FULL_FRAMES}; "
        f"--quick: {QUICK_FRAMES})",
    )
    parser.add_argument(
        "--grid",
        type=int,
        nargs=2,
        default=(6, 10),
        help="visual tokens of a frame, rows and columns (default: 6 10)",
    )
    add_arguments(parser)
    options = parse(parser, arguments)
    rows, columns = options.grid
    default = QUICK_FRAMES if options.quick else FULL_FRAMES if options.full else FRAMES
    frames = options.frames or default
    heads, dtype = heads_of(options), DTYPES[options.dtype]
    model = ModelInputs(heads, dtype, options.device) if options.input == "model" else None

    def make(count: int) -> LayerInputs:
        if model is None:
            return random_layer([rows * columns] * count, heads, dtype, options.device)
        from benchmarks.harness.photographs import pan

        pictures = list(pan(count, rows * TOKEN_PIXELS, columns * TOKEN_PIXELS))
        return model.layer(pictures, "frame", None)

    sizes = [
        Size(
            f"{count} frames",
            {"frames": count},
            count * rows * columns,
            functools.partial(make, count),
        )
        for count in frames
    ]
    return run_sweep("frames_sweep", options, sizes, {"frame_grid": [rows, columns]})


if __name__ == "__main__":
    sys.exit(main())
