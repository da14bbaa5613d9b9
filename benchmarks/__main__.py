"""Lists the benchmarks, or runs one.

python -m benchmarks                        # what each answers, and how long it takes
python -m benchmarks compare A.json B.json
python -m benchmarks frames_sweep --quick   # the same as python -m benchmarks.frames_sweep
"""

from __future__ import annotations

import importlib.util
import runpy
import sys

from benchmarks.harness import commands


def main() -> int:
    if len(sys.argv) < 2:
        print(commands.listing())
        return 0
    name = sys.argv.pop(1)
    module = f"benchmarks.{name}"
    if not name.isidentifier() or importlib.util.find_spec(module) is None:
        print(f"benchmarks: no command {name!r}; `python -m benchmarks` lists them")
        return 2
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
