"""The benches of single ops run, and say what is wrong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

import ral_kernels as rk
from benchmarks import decode_bench, policy_divergence_bench

from .test_sweeps import results_of


@pytest.mark.slow(stands_in="test_decode_bench")
@pytest.mark.long
def test_policy_divergence_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--quick", "--seqlen", "256", "--rows", "32", "--out", str(tmp_path)]
    assert policy_divergence_bench.main(options) == 0
    run = results_of(tmp_path)
    assert [row["dtype"] for row in run["speed"]] == ["bfloat16", "float32"]
    for row in run["speed"]:
        assert set(row["targets"]) == {row["peer"], "eager"}
        assert all(record["status"] == "ok" for record in row["records"].values())
    assert len(run["growth"]["points"]) == 4
    printed = capsys.readouterr().out
    assert "target 0.02" in printed
    assert "for each row-key pair" in printed


def test_decode_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode_bench.main(["--quick", "--out", str(tmp_path)]) == 0
    rows = results_of(tmp_path)["rows"]
    assert len(rows) == 8
    for row in rows:
        times = {name: milliseconds["median"] for name, milliseconds in row["ms"].items()}
        assert times[row["peer"]] == min(times["sdpa"], times["sdpa_rows"])
    case, dtype = decode_bench.cases(quick=True)[0], "float32"
    wrong = SimpleNamespace(attention=lambda *args, **options: rk.attention(*args, scale=1.0))
    monkeypatch.setattr(decode_bench, "rk", wrong)
    row = decode_bench.measure(case, dtype, 1)
    assert row["wrong"].startswith("ral: out error") and "ms" not in row
