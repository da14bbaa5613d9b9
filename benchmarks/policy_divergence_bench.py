"""The CPU targets of the token-level RAL loss, each measured against its peers in one run.

    python -m benchmarks.policy_divergence_bench            # T=256, N=8192
    python -m benchmarks.policy_divergence_bench --quick    # N=1024
    python -m benchmarks.policy_divergence_bench --keep-memory    # no page faults on the clock

Forward and backward of `ral_loss` to q and k against a snapshot, 16:2 heads of 128, in bfloat16 and
float32. One peer is chunked PyTorch with checkpointing at three chunk sizes, interleaved with ours.
The other is eager, which holds the full maps of the layer; it runs once in its own process. Both
policies are computed on the clock, except in "known snapshot", a later step against the same
snapshot. Peak memory is that of a fresh process; ours at twice the rows and keys shows how it
grows. Each contestant passes the float64 gate first: a wrong result is not timed, and the exit
status is 1. A missed target is printed and does not change the exit status, because machines
differ.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import cpu_bench, machine, results
from benchmarks.harness.cpu_bench import CPU, DTYPES
from benchmarks.harness.examine import FreshProcesses
from benchmarks.harness.inputs import Heads
from benchmarks.harness.measure import MEMORY_SHARE, quantiles
from benchmarks.harness.objective import Objective, Problem
from benchmarks.problems.ral import RAL
from benchmarks.problems.ral.problem import DEFAULT_ROWS, RalProblem, random_problem

OURS = ("ral", "ral_again", "ral_dense")
CHUNKED = ("chunked_16", "chunked_64", "chunked_256")
CHUNKED_TARGET = 0.2  # the project's aim: ours / the fastest chunked
EAGER_TARGET = 0.02  # ours / eager
# bytes of peak memory for each (row, key) pair: a float32 [T, N] has 4, bfloat16 [H, T, N] maps 32
BYTES_PER_PAIR_TARGET = 1.0
MODE = "forward+backward"


class Examiner:
    """Gate, peak memory and a first duration of contestants, each in a fresh process."""

    def __init__(self, objective: Objective = RAL) -> None:
        self._objective = objective
        self._processes = FreshProcesses(torch.get_num_threads())

    def examine(self, names: Sequence[str], problem: Problem) -> dict[str, dict[str, Any]]:
        """name -> record; one that would not fit into memory is skipped with the reason."""
        with tempfile.TemporaryDirectory(prefix="ral-bench-") as folder:
            files = [str(Path(folder) / name) for name in ("problem.pt", "exact.pt")]
            torch.save(problem.tensors(), files[0])
            torch.save(self._objective.exact(problem, {"all"}), files[1])
            return {name: self._record(name, problem, files) for name in names}

    def close(self) -> None:
        self._processes.close()

    def _record(self, name: str, problem: Problem, files: Sequence[str]) -> dict[str, Any]:
        needed = self._objective.registry[name].bytes_needed(problem, True)
        available = machine.available_bytes(CPU)
        if available is not None and needed > MEMORY_SHARE * available:
            reason = f"would need {needed / 2**30:.1f} GiB of {available / 2**30:.1f} available"
            return {"status": "skipped", "reason": reason}
        objective = self._objective.name
        return self._processes.examine(objective, name, files[0], True, files[1], timeout=600.0)


def problem_of(seqlen: int, rows: int, dtype: torch.dtype) -> RalProblem:
    return random_problem([seqlen], rows, Heads(), dtype, "cpu")


def measure(dtype: str, seqlen: int, rows: int, repeats: int, examiner: Examiner) -> dict[str, Any]:
    """One dtype: records of all, times of ours and the chunked ones, ratios to every peer."""
    problem = problem_of(seqlen, rows, DTYPES[dtype])
    records = examiner.examine([*OURS, *CHUNKED, "eager"], problem)
    row: dict[str, Any] = {"dtype": dtype, "mode": MODE, "seqlen": seqlen, "rows": rows}
    row["records"] = records
    timed = [n for n in (*OURS, *CHUNKED) if records[n]["status"] == "ok"]
    if "ral" not in timed:
        return row
    runs = {name: cpu_bench.runner(RAL, name, problem, True) for name in timed}
    gemm = machine.gemm_gflops(DTYPES[dtype], CPU)
    seconds = cpu_bench.interleave(runs, repeats)
    gemm = max(gemm, machine.gemm_gflops(DTYPES[dtype], CPU))
    row["repeats"] = repeats
    row["ms"] = {name: quantiles([1e3 * s for s in times]) for name, times in seconds.items()}
    row["ratio"] = {
        name: quantiles([a / b for a, b in zip(seconds["ral"], times, strict=True)])
        for name, times in seconds.items()
        if name != "ral"
    }
    if records["eager"]["status"] == "ok":
        once = 1e3 * records["eager"]["seconds"]
        row["ms"]["eager"] = quantiles([once])
        row["ratio"]["eager"] = quantiles([1e3 * s / once for s in seconds["ral"]])
    chunked = [name for name in CHUNKED if name in row["ms"]]
    row["peer"] = min(chunked, key=lambda name: row["ms"][name]["median"], default=None)
    row["targets"] = {row["peer"]: CHUNKED_TARGET, "eager": EAGER_TARGET}
    flops = RAL.flops_per_pair[MODE] * problem.heads.head_dim * problem.pairs
    row["gflops"] = flops / row["ms"]["ral"]["median"] / 1e6
    row["gemm_share"] = row["gflops"] / gemm
    return row


def measure_growth(seqlen: int, rows: int, examiner: Examiner) -> dict[str, Any]:
    """Peak memory of ours beyond inputs and outputs, at twice the keys and twice the rows."""
    sizes = [(rows, seqlen), (rows, 2 * seqlen), (2 * rows, seqlen), (2 * rows, 2 * seqlen)]
    points = []
    for count, keys in sizes:
        problem = problem_of(keys, count, torch.bfloat16)
        record = examiner.examine(["ral"], problem)["ral"]
        if record["status"] != "ok":
            return {"wrong": record["reason"]}
        outputs = sum(x.numel() * x.element_size() for x in problem.inputs())  # dq and dk
        points.append({"rows": count, "seqlen": keys, "scratch": record["peak_bytes"] - outputs})
    base, keys_twice, rows_twice, both = (point["scratch"] for point in points)
    # what grows with rows alone or with keys alone drops out
    mixed = both - keys_twice - rows_twice + base
    return {"points": points, "bytes_per_pair": mixed / (rows * seqlen)}


def print_row(row: dict[str, Any]) -> None:
    print(f"{row['dtype']}, T={row['rows']}, N={row['seqlen']}")
    names = sorted(row["records"], key=lambda n: row.get("ms", {}).get(n, {}).get("median", 1e9))
    for name in names:
        record, label = row["records"][name], RAL.registry[name].label
        if record["status"] != "ok":
            print(f"  {label:33} {record['status']}: {record['reason']}")
            continue
        errors = "  ".join(f"{key} {error:.0e}" for key, error in record["errors"].items())
        line = f"  {label:33} "
        if name in row.get("ms", {}):
            times = row["ms"][name]
            line += (
                f"{times['median']:9.1f} ms, {len(times['all'])} run{'s' * (len(times['all']) > 1)}"
            )
        line += f"  {record['peak_bytes'] / 2**20:9.1f} MiB  {errors}"
        if name in row.get("ratio", {}):
            ratio = row["ratio"][name]
            line += f"  ours / it {ratio['median']:.3f} (p20 {ratio['p20']:.3f}, "
            line += f"p80 {ratio['p80']:.3f})"
            if name in row["targets"]:
                met = "met" if ratio["median"] <= row["targets"][name] else "MISSED"
                line += f"  target {row['targets'][name]} {met}"
        elif name == "ral" and "gflops" in row:
            line += f"  {row['gflops']:.0f} GFLOP/s, {100 * row['gemm_share']:.0f} % of GEMM"
        print(line, flush=True)


def print_growth(growth: dict[str, Any], num_heads: int) -> None:
    print("\npeak memory of ours beyond inputs, dq and dk, bfloat16, fresh process")
    if "wrong" in growth:
        print(f"  WRONG: {growth['wrong']}")
        return
    for point in growth["points"]:
        maps = 2 * num_heads * point["rows"] * point["seqlen"] / 2**20
        print(
            f"  T={point['rows']:4} N={point['seqlen']:5}  {point['scratch'] / 2**20:6.1f} MiB  "
            f"(one [H, T, N] in bfloat16: {maps:.0f} MiB)"
        )
    met = "met" if growth["bytes_per_pair"] <= BYTES_PER_PAIR_TARGET else "MISSED"
    print(
        f"  {growth['bytes_per_pair']:.2f} bytes for each row-key pair beyond what rows and keys "
        f"take by themselves  target {BYTES_PER_PAIR_TARGET:.0f} {met}"
    )


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
    run = results.begin("policy_divergence_bench", options, settings)
    print("token-level RAL loss against a snapshot, forward and backward to q and k, 16:2 of 128")
    print("(MiB: peak beyond the inputs; eager runs once, cold, in the process of its memory)\n")
    examiner = Examiner()
    try:
        run["speed"] = []
        for dtype in DTYPES:
            row = measure(dtype, seqlen, options.rows, 5 if options.quick else 9, examiner)
            run["speed"].append(row)
            print_row(row)
        run["growth"] = measure_growth(seqlen, options.rows, examiner)
        print_growth(run["growth"], Heads().num_heads)
    finally:
        examiner.close()
    results.finish(run, options)
    return int(any(_failed(row) for row in run["speed"]) or "wrong" in run["growth"])


def _failed(row: dict[str, Any]) -> bool:
    """A wrong answer of any contestant, or one of ours that did not run."""
    records = row["records"]
    wrong = any(record["status"] == "wrong" for record in records.values())
    return wrong or any(records[name]["status"] != "ok" for name in OURS)


if __name__ == "__main__":
    sys.exit(main())
