"""A pytest plugin for `make sanitize`: kernels come from the library in RAL_SANITIZED.

LD_PRELOAD=... RAL_SANITIZED=build/sanitized pytest -p tests.native.sanitized ...
"""

from __future__ import annotations

import os
from pathlib import Path

from ral_kernels.runtime import native

native.LIBRARY_DIR = Path(os.environ["RAL_SANITIZED"]).resolve()
native.load.cache_clear()
native.load("ral_cpu")  # it must be there, or every test would be skipped
