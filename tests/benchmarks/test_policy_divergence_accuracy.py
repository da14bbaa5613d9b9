"""The accuracy table of the RAL objective runs end to end and sees what it is there to show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import policy_divergence_accuracy
from ral_kernels.runtime import triton_runtime

SMALL = ["--batch", "1", "--rows", "9", "--seqlen", "80", "--heads", "4", "--kv-heads", "2",
    "--head-dim", "16"]  # fmt: skip


@pytest.mark.slow_in_interpreter(stands_in="tests/ops/test_ral_loss.py::test_accuracy")
def test_table(backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dtypes = ["bfloat16", "float32"]
    if backend == "triton" and triton_runtime.interpreted():
        dtypes = ["float32"]  # the interpreter multiplies bfloat16 wrongly
    options = [*SMALL, "--dtypes", *dtypes, "--backend", backend, "--out", str(tmp_path)]
    assert policy_divergence_accuracy.main(options) == 0
    (file,) = tmp_path.glob("*.json")
    record = json.loads(file.read_text())
    assert len(record["near"]) == len(record["unchanged"]) == len(dtypes) * 3 * 3
    for row in record["near"]:
        assert 5e-4 < row["distance"] < 2e-3
        if row["form"] == "snapshot":
            assert row["dq"] < 1e-2 and row["dk"] < 1e-2 and row["cosine"] > 0.9999
        elif row["form"] == "rows bfloat16":
            assert row["dq"] > 0.1
    printed = capsys.readouterr().out
    assert "rows bfloat16" in printed and str(file) in printed


def test_a_loss_that_is_not_zero_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = policy_divergence_accuracy.run
    monkeypatch.setattr(
        policy_divergence_accuracy, "run", lambda *args: (run(*args)[0] + 1e-9, *run(*args)[1:])
    )
    options = [*SMALL, "--dtypes", "float32", "--out", str(tmp_path)]
    assert policy_divergence_accuracy.main(options) == 1
    assert "WRONG" in capsys.readouterr().out
