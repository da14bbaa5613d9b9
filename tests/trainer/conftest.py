"""Which tests of the trainer run where there is no TRL, which needs Python 3.11."""

from __future__ import annotations

import sys
from pathlib import Path

WITHOUT_TRL = ("test_data.py", "test_rewards.py")

# By version, and not by what is installed: where TRL should be and is not, these tests fail.
collect_ignore = [
    path.name
    for path in Path(__file__).parent.glob("test_*.py")
    if sys.version_info < (3, 11) and path.name not in WITHOUT_TRL
]
