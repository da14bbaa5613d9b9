"""Which tests of the benchmarks run where there is no TRL, which needs Python 3.11."""

from __future__ import annotations

import sys

# By version, and not by what is installed: where TRL should be and is not, these tests fail.
collect_ignore = ["test_figure3.py", "test_train_overhead.py"] if sys.version_info < (3, 11) else []
