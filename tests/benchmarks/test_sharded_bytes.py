"""The table of what sharded sequences move: what is chosen, and how it grows."""

from __future__ import annotations

import pytest

from benchmarks import sharded_bytes


def test_keys_grow_and_rows_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert sharded_bytes.main(["--ranks", "4", "--rows", "512"]) == 0
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[0] for line in lines] == [f"{n:,}" for n in sharded_bytes.LENGTHS]
    # Three quarters of the keys of 4 heads of 128 in bfloat16, there and back.
    assert [line[1] for line in lines[:2]] == ["12.0 MiB", "48.0 MiB"]
    assert len({tuple(line[3:5]) for line in lines}) == 1
    assert [line[-1] for line in lines] == ["keys", "keys", "keys", "rows", "rows"]
