"""A loss against a target that rows share, on the CPU, beside chunked PyTorch in one run.

    python -m benchmarks.target_bench            # T=256, N=8192
    python -m benchmarks.target_bench --quick    # N=1024

Forward and backward of `ral_loss(..., kind="cross_entropy")` to q and k, 16:2 heads of 128, in
bfloat16 and float32. One key in 16 has weight. Ours get the target as its marked keys, as weights
of all keys, and as a row [N] for each of the T. The peers are chunked PyTorch with checkpointing,
interleaved with ours. Peak memory is that of a fresh process; ours at twice the rows and keys shows
how it grows. Each contestant passes the float64 gate first: a wrong result is not timed, and the
exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.harness import cpu_bench, results
from benchmarks.harness.cpu_bench import DTYPES
from benchmarks.harness.inputs import Heads
from benchmarks.harness.measure import quantiles
from benchmarks.policy_divergence_bench import Examiner
from benchmarks.problems.ral.problem import DEFAULT_ROWS
from benchmarks.problems.target import TARGET
from benchmarks.problems.target.problem import TargetProblem, random_problem

STREAMED = ("target", "target_dense")
OURS = (*STREAMED, "target_rows")
NAMES = (*OURS, *TARGET.peers)


def problem_of(seqlen: int, rows: int, dtype: torch.dtype) -> TargetProblem:
    return random_problem([seqlen], rows, Heads(), dtype, "cpu")


def measure(dtype: str, seqlen: int, rows: int, repeats: int, examiner: Examiner) -> dict[str, Any]:
    """One dtype: records of all, times of the right ones, ratios of `target` to the others."""
    problem = problem_of(seqlen, rows, DTYPES[dtype])
    records = examiner.examine(NAMES, problem)
    row: dict[str, Any] = {"dtype": dtype, "seqlen": seqlen, "rows": rows, "records": records}
    timed = [name for name in NAMES if records[name]["status"] == "ok"]
    if "target" not in timed:
        return row
    runs = {name: cpu_bench.runner(TARGET, name, problem, True) for name in timed}
    seconds = cpu_bench.interleave(runs, repeats)
    row["repeats"] = repeats
    row["ms"] = {name: quantiles([1e3 * s for s in times]) for name, times in seconds.items()}
    row["ratio"] = {
        name: quantiles([a / b for a, b in zip(seconds["target"], times, strict=True)])
        for name, times in seconds.items()
        if name != "target"
    }
    return row


def measure_growth(seqlen: int, rows: int, examiner: Examiner) -> list[dict[str, Any]]:
    """Peak memory of the streamed forms, bfloat16, at twice the keys and twice the rows."""
    points = []
    for count, keys in ((rows, seqlen), (rows, 2 * seqlen), (2 * rows, seqlen)):
        records = examiner.examine(STREAMED, problem_of(keys, count, torch.bfloat16))
        points.append({"rows": count, "seqlen": keys, "records": records})
    return points


def print_record(name: str, record: dict[str, Any], more: str = "") -> None:
    line = f"  {TARGET.registry[name].label:30} "
    if record["status"] != "ok":
        print(f"{line}{record['status']}: {record['reason']}", flush=True)
        return
    errors = "  ".join(f"{key} {error:.0e}" for key, error in record["errors"].items())
    print(f"{line}{record['peak_bytes'] / 2**20:8.1f} MiB  {errors}{more}", flush=True)


def print_row(row: dict[str, Any]) -> None:
    print(f"{row['dtype']}, T={row['rows']}, N={row['seqlen']}")
    for name, record in row["records"].items():
        more = ""
        if name in row.get("ms", {}):
            more += f"  {row['ms'][name]['median']:8.1f} ms"
        if name in row.get("ratio", {}):
            ratio = row["ratio"][name]
            more += f"  target / it {ratio['median']:.3f} (p20 {ratio['p20']:.3f}, "
            more += f"p80 {ratio['p80']:.3f})"
        print_record(name, record, more)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seqlen", type=int, help="N; default 8192")
    parser.add_argument("--rows", type=int, default=DEFAULT_ROWS, help="T; default %(default)s")
    cpu_bench.add_arguments(parser, quick="N=1024 and fewer repeats")
    cpu_bench.add_keep_memory(parser)
    options = cpu_bench.parse(parser, arguments)
    seqlen = options.seqlen or (1024 if options.quick else 8192)
    settings = {"heads": "16:2 of 128", "causal": True, "quick": options.quick}
    settings["keep_memory"] = options.keep_memory
    run = results.begin("target_bench", options, settings)
    print(
        "cross-entropy with a target that rows share, forward and backward to q and k, 16:2 of 128"
    )
    print("(MiB: peak beyond the inputs)\n")
    examiner = Examiner(TARGET)
    try:
        run["speed"] = []
        for dtype in DTYPES:
            row = measure(dtype, seqlen, options.rows, 5 if options.quick else 9, examiner)
            run["speed"].append(row)
            print_row(row)
        print("\npeak memory as rows and keys grow, bfloat16")
        run["growth"] = measure_growth(seqlen, options.rows, examiner)
        for point in run["growth"]:
            print(f" T={point['rows']} N={point['seqlen']}")
            for name, record in point["records"].items():
                print_record(name, record)
    finally:
        examiner.close()
    results.finish(run, options)
    return int(any(_failed(x["records"]) for x in (*run["speed"], *run["growth"])))


def _failed(records: dict[str, dict[str, Any]]) -> bool:
    """A wrong answer of any contestant, or one of ours that did not run."""
    return any(
        record["status"] == "wrong" or (name in OURS and record["status"] != "ok")
        for name, record in records.items()
    )


if __name__ == "__main__":
    sys.exit(main())
