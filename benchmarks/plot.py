"""Draw the picture of a sweep again, from its JSON: `python benchmarks/plot.py results.json`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# A script finds its own folder only; behind what is installed, so that an installed ral_kernels
# stays the one in use.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.harness.measure import MODES
from benchmarks.harness.plot import draw


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of the sweeps")
    parser.add_argument("--mode", choices=MODES, help="default: forward+backward where it is there")
    options = parser.parse_args(arguments)
    for path in options.results:
        print(f"wrote {draw(path, options.mode)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
