"""What a user's own mypy --strict says of code that uses the package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import ral_kernels as rk

from .test_documents import blocks

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


# Errors inside an installed package are not shown; here it is found by its path. A user may not
# have transformers, which takes minutes to read.
SETTINGS = """
[mypy]
strict = True
follow_imports = silent
[mypy-transformers.*]
follow_imports = skip
ignore_missing_imports = True
"""


def mypy(folder: Path, *files: str) -> str:
    """What `mypy --strict` prints, with none of this project's settings."""
    (folder / "mypy.ini").write_text(SETTINGS)
    cache = f"--cache-dir={ROOT / '.mypy_cache' / 'users'}"
    result = subprocess.run(
        [sys.executable, "-m", "mypy", cache, *files],
        cwd=folder, capture_output=True, text=True, env={**os.environ, "MYPYPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode in (0, 1), result.stderr
    return result.stdout


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.get_overloads needs Python 3.11")
def test_public_functions_say_what_they_return() -> None:
    for name in set(rk.__all__) - set(rk._LAZY):
        function = getattr(rk, name)
        if isinstance(function, type):
            continue
        forms = typing.get_overloads(function) or [function]
        returned = [form.__annotations__["return"] for form in forms]
        # One form of flash-attn's is for a flag that is known at run time alone.
        assert returned.count("Any") <= int(len(returned) == 5), name
        plain = name in ("available_backends", "sharded_bytes")
        assert len(returned) > 1 or "Tensor" in returned[0] or plain, name


@pytest.mark.slow(stands_in="test_public_functions_say_what_they_return")
def test_uses_are_clean_and_mistakes_are_found(tmp_path: Path) -> None:
    (readme,) = [x for x in blocks("README.md") if x.language == "python" and x.not_run is None]
    (tmp_path / "readme.py").write_text(readme.text)
    for name in ("typed_uses.py", "typed_mistakes.py"):
        (tmp_path / name).write_text((HERE / name).read_text())
    printed = mypy(tmp_path, "readme.py", "typed_uses.py", "typed_mistakes.py")
    found = re.findall(r"^(\w+\.py):(\d+): error: .*$", printed, re.MULTILINE)
    lines = (HERE / "typed_mistakes.py").read_text().splitlines()
    wanted = [str(number) for number, line in enumerate(lines, 1) if "# E: " in line]
    assert {name for name, _ in found} == {"typed_mistakes.py"}, printed
    assert sorted({int(line) for _, line in found}) == [int(line) for line in wanted], printed
