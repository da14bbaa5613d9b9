"""`benchmarks compare`: every kind of result, its intervals, and what it says of the rest."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
from scipy import stats

from benchmarks import compare
from benchmarks.harness.measure import quantiles

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
# A figure that each kind of committed file has: (file, point, figure, number of repeats)
KINDS = {
    "attention_bench": ("bfloat16  seqlen=1024  forward", "ms ral", 0),
    "call_cost-before": ("", "calls attention least_us", 1),
    "decode_bench": ("bfloat16  batch_size=1  heads=16:2  seqlen_k=1024", "ratio", 0),
    "figure3-fresh-749": ("frames  grpo", "accuracy 16", 8),
    "frames_sweep-attention-bfloat16-641": (
        "frames=64  seqlen=4032  num_spans=64  layouts  layout=64  ral_64  forward", "ms", 3
    ),
    "output_hashes-before": ("", "calls divergence (3, 1) jsd", 0),
    "policy_divergence_accuracy": ("near  bfloat16  jsd  snapshot  distance=1e-03", "dq", 1),
    "policy_divergence_bench-d7c": (
        "bfloat16  seqlen=8192  rows=256  forward+backward", "records eager peak_bytes", 1
    ),
    "resolution_sweep": (
        "tokens_per_image=4096  images=1  seqlen=4162  num_spans=64  eager  forward", "ms", 5
    ),
    "train_overhead": ("frames=4", "grpo update", 0),
    "transformers_memory": ("ral  padded=True", "peak_bytes", 1),
}  # fmt: skip


def run_of(seconds: dict[str, list[float]], **head: Any) -> dict[str, Any]:
    """A file with these repeats by contestant."""
    rows = [
        {"contestant": name, "mode": "forward", "status": "ok", "ms": quantiles(values)}
        for name, values in seconds.items()
    ]
    facts = {"cpu": "a CPU", "cpu_id": "intel-6-207-8", "cores": 2}
    whole = {"benchmark": "frames_sweep", "objective": "attention", "machine": facts}
    whole |= {"settings": {"dtype": "float32", "repeats": 5}, "load": {"before": 0.1}}
    return {**whole, "sizes": [{"name": "4 frames", "frames": 4, "results": rows}], **head}


def said(capsys: pytest.CaptureFixture[str], folder: Path, *runs: Any) -> tuple[int, str]:
    files = []
    for name, run in zip(("a", "b"), runs, strict=True):
        files.append(folder / f"{name}.json")
        files[-1].write_text(json.dumps(run))
    return compare.main([str(file) for file in files]), capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_result(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = next(iter(sorted(RESULTS.rglob(f"{kind}*.json"))))
    run = json.loads(file.read_text())
    row, name, repeats = KINDS[kind]
    found = compare.points_of(run).rows
    figure = found[tuple(row.split("  ")) if row else ()][name]
    assert len(figure.repeats) == repeats
    assert (figure.median is None) == (repeats > 0 or figure.text is not None)
    assert compare.main([str(file), str(file)]) == 0
    printed = capsys.readouterr().out
    count = sum(map(len, found.values()))
    assert "only in" not in printed and "differs" not in printed
    assert f"{count} of {count} figures are equal" in printed


def test_the_interval_is_welch_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = [10.0, 11.0, 10.5, 10.2, 10.1], [12.0, 13.0, 12.4]
    status, printed = said(capsys, tmp_path, run_of({"ral": a}), run_of({"ral": b}))
    found = stats.ttest_ind(numpy.log(b), numpy.log(a), equal_var=False).confidence_interval()
    low, high = math.exp(found.low), math.exp(found.high)
    middle = stats.gmean(b) / stats.gmean(a)
    assert low < middle < high and low > 1
    line = next(line for line in printed.splitlines() if line.startswith("    ms"))
    assert f"{middle:.3f}  {low:.3f} to {high:.3f}, n=5 and 3 *" in line
    assert status == 0 and "Welch's t" in printed
    # scatter that hides the difference is not marked, and one repeat has no interval
    for other in ([9.0, 20.0], [12.0]):
        _, printed = said(capsys, tmp_path, run_of({"ral": a}), run_of({"ral": other}))
        line = next(line for line in printed.splitlines() if line.startswith("    ms"))
        assert "*" not in line and ("to" in line) == (len(other) > 1)


def test_points_of_one_file_are_named_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = run_of({"ral": [1.0, 1.1], "eager": [5.0, 5.5]})
    b = run_of({"ral": [1.0, 1.2], "chunked": [4.0, 4.5]})
    skipped = {"contestant": "eager", "mode": "forward", "status": "skipped", "reason": "9 GiB"}
    b["sizes"][0]["results"].append(skipped)
    status, printed = said(capsys, tmp_path, a, b)
    only_a, only_b = printed.split("only in A:")[1].split("only in B:")
    assert "frames=4  eager  forward  (other file: skipped: 9 GiB)" in only_a
    assert only_b.split() == ["frames=4", "chunked", "forward"]
    assert status == 0


def test_what_else_differs_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = run_of({"ral": [1.0, 1.1]})
    b = copy.deepcopy(a)
    b["machine"]["cpu_id"] = "intel-6-167-1"
    b["load"]["before"] = 5.5
    b["settings"]["repeats"] = 9
    b["commit"] = {"hash": "1234567890", "dirty": True}
    status, printed = said(capsys, tmp_path, a, b)
    assert "model of the processor -intel-6-207-8- / -intel-6-167-1-" in printed
    assert "B began at a load average of 5.5 on 2 cores" in printed
    assert "repeats: 5 / 9" in printed and "B is of no commit" in printed
    assert status == 0
    old = {**b, "machine": {"cpu": "a CPU", "cpu_family_model": ["6", "207"], "cores": 2}}
    assert "model of" not in said(capsys, tmp_path, a, old)[1]
    b["settings"]["dtype"] = "bfloat16"
    status, printed = said(capsys, tmp_path, a, b)
    assert status == 1 and "dtype: float32 / bfloat16" in printed and "ms" not in printed
    with pytest.raises(SystemExit):
        said(capsys, tmp_path, a, {**b, "benchmark": "decode_bench"})
    assert "'frames_sweep attention' and 'decode_bench attention'" in capsys.readouterr().err


def test_hashes_that_differ_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = {"benchmark": "output_hashes", "calls": {"one": "00ff", "two": "11aa"}}
    b = {"benchmark": "output_hashes", "calls": {"one": "00ff", "two": "11ab"}}
    status, printed = said(capsys, tmp_path, a, b)
    assert status == 1 and "calls two  differs" in printed and "calls one" not in printed
