"""The memory benchmark runs end to end, and shows what it is there to show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import transformers_memory


@pytest.mark.slow(
    stands_in="tests/integrations/test_transformers_masks.py::test_ordinary_masks_are_not_dense"
)
@pytest.mark.long
def test_padding_takes_no_dense_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seqlen, batch = 8192, 2  # a mask of 128 MiB: the peaks of fresh processes vary by a few
    arguments = ["--seqlen", str(seqlen), "--heads", "2", "--head-dim", "16", "--threads", "1"]
    assert transformers_memory.main([*arguments, "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.json")
    peaks = {
        (row["implementation"], row["padded"]): row["peak_bytes"]
        for row in json.loads(file.read_text())["rows"]
    }
    mask = batch * seqlen**2
    assert peaks["sdpa", True] - peaks["sdpa", False] > 0.9 * mask
    assert peaks["ral", True] - peaks["ral", False] < 0.1 * mask
    assert "left-padded" in capsys.readouterr().out
