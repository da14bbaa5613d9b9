"""A box on a photograph and the tokens that see it, for each family of models.

    python -m tests.integrations.region_pictures docs/pictures

Processors have the families' own sizes of tiles and tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import ral_kernels as rk
from benchmarks.harness.photographs import load, pan
from ral_kernels import viz

from . import tiny_processors

BOX = (165, 14, 430, 318)  # the cup
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {},
    "qwen3_vl": {},
    "gemma3": {"side": 896, "tokens": 256},
    "internvl": {"side": 448, "tokens": 256},
    "llava_next": {"side": 336, "tokens": 576},
    "llava_onevision": {"side": 384, "tokens": 729},
    "idefics3": {"side": 364, "tokens": 169, "size": {"longest_edge": 4 * 364}},
}


def of_image(family: str, folder: Path) -> Path:
    processor = tiny_processors.build(family, **FAMILIES[family])
    picture = load("coffee.png").convert("RGB")
    size = (picture.height, picture.width)
    inputs = processor(
        images=[[picture]],
        text=[f"{tiny_processors.PLACEHOLDER[family]} Where is the cup?"],
        return_tensors="pt",
    )
    found = rk.region_weights(processor, inputs, [[{"image": 0, "box": BOX}]], image_sizes=[size])
    return saved(found, [picture], folder / f"regions-{family}.png")


def of_video(folder: Path) -> Path:
    """Frames 2 to 4 of five: of the first step, of frames 1 and 2, half is covered."""
    processor = tiny_processors.build("qwen2_5_vl")
    frames = [frame.convert("RGB") for frame in pan(5, 168, 252)]
    inputs = processor(
        videos=[np.stack([np.asarray(frame) for frame in frames])],
        video_metadata=[{"total_num_frames": 5, "fps": 2.0}],
        do_sample_frames=False,
        text=["<|vision_start|><|video_pad|><|vision_end|>"],
        return_tensors="pt",
    )
    region = {"video": 0, "frames": [1, 3], "box": (112, 10, 206, 120)}
    found = rk.region_weights(processor, inputs, [[region]], image_sizes=[(5, 168, 252)], sigma=0.7)
    return saved(found, [frames], folder / "regions-video.png")


def saved(found: rk.RegionWeights, pictures: list[Any], path: Path) -> Path:
    viz.region_grid(found, pictures, path=path)
    with Image.open(path) as image:  # few colours, a third of the bytes
        image.convert("RGB").quantize(48).save(path, optimize=True)
    return path


def main() -> None:
    folder = Path(sys.argv[1])
    for path in (*(of_image(family, folder) for family in FAMILIES), of_video(folder)):
        print(f"{path}: {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
