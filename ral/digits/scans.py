"""The 1,797 real 8 × 8 scans of handwritten digits that come with scikit-learn."""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple

import numpy as np

Split = Literal["train", "test"]
CELL = 28  # pixels on a side: two patches of 14, merged into one visual token
MARGIN = 2
HELD_OUT = 360  # scans, a fifth
_SPLIT_SEED = 1797


class Scans(NamedTuple):
    """Scans of one split.

    Attributes:
        ids: [N] int64, numbers of the scans in scikit-learn's order.
        digits: [N] int64, 0 to 9.
        ink: [N, 28, 28] float32 in 0..1, the scan enlarged to a cell with a margin.
    """

    ids: np.ndarray
    digits: np.ndarray
    ink: np.ndarray


@cache
def load_scans(split: Split) -> Scans:
    """The scans of a split; no scan is in both.

    Args:
        split: "train" (1,437 scans) or "test" (360).

    Raises:
        ValueError: there is no such split.
        ImportError: scikit-learn is missing.
    """
    if split not in ("train", "test"):
        raise ValueError(f"load_scans: split must be 'train' or 'test'; got {split!r}")
    from PIL import Image
    from sklearn.datasets import load_digits

    bundle = load_digits()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(bundle.target))
    ids = np.sort(order[:HELD_OUT] if split == "test" else order[HELD_OUT:])
    side = CELL - 2 * MARGIN
    ink = np.zeros((len(ids), CELL, CELL), np.float32)
    for row, scan in enumerate(bundle.images[ids].astype(np.float32) / 16):
        enlarged = Image.fromarray(scan).resize((side, side), Image.Resampling.BICUBIC)
        ink[row, MARGIN:-MARGIN, MARGIN:-MARGIN] = np.clip(np.asarray(enlarged), 0, 1)
    return Scans(ids, bundle.target[ids].astype(np.int64), ink)
