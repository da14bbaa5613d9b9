"""The benches of single ops run, and say what is wrong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ral_kernels as rk
from benchmarks import decode_bench, packed_bench, policy_divergence_bench, target_bench

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


@pytest.mark.slow(stands_in="test_decode_bench")
def test_target_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--quick", "--seqlen", "256", "--rows", "32", "--out", str(tmp_path)]
    assert target_bench.main(options) == 0
    run = results_of(tmp_path)
    assert [row["dtype"] for row in run["speed"]] == ["bfloat16", "float32"]
    for row in run["speed"]:
        assert set(row["ms"]) == set(target_bench.NAMES) == {"target", *row["ratio"]}
    assert [point["rows"] for point in run["growth"]] == [32, 32, 64]
    assert "target / it" in capsys.readouterr().out


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


@pytest.mark.slow(stands_in="test_decode_bench")
def test_packed_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_bench, "SKEWED", (512, 256, 64, 64))
    monkeypatch.setattr(packed_bench, "MANY", (256, 64, 64))
    assert packed_bench.main(["--quick", "--out", str(tmp_path)]) == 0
    rows = results_of(tmp_path)["rows"]
    assert [(row["dtype"], row["sequences"]) for row in rows] == [
        (dtype, name) for dtype in ("bfloat16", "float32") for name in ("skewed", "many")
    ]
    # of 4 x 16 x 64 pairs: 16 * 64 + 8 * 32 + 2 * 2 * 8
    assert rows[0]["pairs"] == (1024 + 256 + 32) / 4096
    for row in rows:
        assert set(row["ms"]) == {"packed", "padded", "loop"}
        assert row["scratch"]["packed"] == row["scratch"]["loop"] > 0  # one thread
        assert all(row["ratio"][name]["median"] > 0 for name in ("padded", "loop"))
    right = packed_bench.Problem.forms

    def wrong(problem: packed_bench.Problem) -> dict[str, Any]:
        forms = right(problem)
        return {**forms, "packed": lambda: tuple(1.1 * x for x in forms["packed"]())}

    monkeypatch.setattr(packed_bench.Problem, "forms", wrong)
    row = packed_bench.measure("few", (64, 32), "float32", 1)
    assert row["wrong"].startswith("packed: loss error") and "ms" not in row
