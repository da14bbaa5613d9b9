"""A step of decoding on the CPU: `attention` with span marginals beside PyTorch's SDPA without.

    python -m benchmarks.decode_bench
    python -m benchmarks.decode_bench --quick    # fewer shapes and repeats

One query a sequence over cached keys, 32 spans. The peer is the faster of two calls of SDPA: with
`enable_gqa`, as models call it, and with the queries of a kv head as rows of one head, which reads
K and V once. "of reading" is the rate at which K and V are read, relative to a sum over as many
bytes. The rows of 16 keys show the fixed cost of a call. Each shape passes the float64 gate first:
a wrong result is not timed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

import ral_kernels as rk
from benchmarks.harness import cpu_bench, results
from benchmarks.harness.cpu_bench import DTYPES
from benchmarks.harness.gate import relative_errors, verdict
from benchmarks.harness.measure import quantiles
from tests.ops.attention_cases import AttentionCase, AttentionInputs
from tests.ops.attention_eager import eager_attention

PEERS = ("sdpa", "sdpa_rows")
HEADS = ((16, 2), (28, 4), (16, 16))  # query heads, kv heads; of 128
KEYS = (16, 1024, 8192, 32768)
BATCHED = (8, (16, 2), 8192)  # sequences, heads, keys
NUM_SPANS = 32


def cases(quick: bool) -> list[AttentionCase]:
    shapes = [(1, heads, keys) for heads in HEADS for keys in KEYS]
    shapes.append(BATCHED)
    if quick:
        shapes = [(1, heads, keys) for heads in HEADS[::2] for keys in KEYS[:2]]
    return [
        AttentionCase(
            f"{heads}:{kv_heads}", 1, keys, batch_size=batch_size, num_heads=heads,
            num_kv_heads=kv_heads, head_dim=128, spans="equal", num_spans=min(NUM_SPANS, keys),
            options={"is_causal": True},
        )
        for batch_size, (heads, kv_heads), keys in shapes
    ]  # fmt: skip


def contestants(inputs: AttentionInputs) -> dict[str, Callable[[], Any]]:
    q, k, v = inputs.q, inputs.k, inputs.v
    rows = q.view(q.shape[0], k.shape[1], -1, q.shape[3])  # one query a sequence
    as_many_bytes = torch.zeros((k.nbytes + v.nbytes) // 4)
    return {
        "ral": lambda: rk.attention(q, k, v, inputs.spans, **inputs.options),
        "ral_plain": lambda: rk.attention(q, k, v, **inputs.options),
        "sdpa": lambda: scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]),
        "sdpa_rows": lambda: scaled_dot_product_attention(rows, k, v).view_as(q),
        "read": as_many_bytes.sum,
    }


def why_wrong(runs: dict[str, Callable[[], Any]], inputs: AttentionInputs) -> str | None:
    """What of ours, and of the peers, is not what float64 gives; None if all is right."""
    out, marginals, _ = eager_attention(inputs.to(torch.float64))
    assert marginals is not None
    ours, dtype = runs["ral"](), inputs.q.dtype
    found = [("ral", {"out": ours.out, "marginals": ours.marginals})]
    found += [("ral_plain", {"out": runs["ral_plain"]().out})]
    found += [(name, {"out": runs[name]()}) for name in PEERS]
    for name, got in found:
        wanted = {key: {"out": out, "marginals": marginals}[key] for key in got}
        if reason := verdict(relative_errors(got, wanted), dtype):
            return f"{name}: {reason}"
    return None


def measure(case: AttentionCase, dtype: str, repeats: int) -> dict[str, Any]:
    inputs = case.inputs(DTYPES[dtype])
    shape = {"batch_size": case.batch_size, "heads": case.name, "seqlen_k": case.seqlen_k}
    row: dict[str, Any] = {"dtype": dtype, **shape}
    with torch.no_grad():
        runs = contestants(inputs)
        row["wrong"] = why_wrong(runs, inputs)
        if row["wrong"]:
            return row
        seconds = cpu_bench.interleave(runs, repeats)
    row["ms"] = {name: quantiles([1e3 * s for s in times]) for name, times in seconds.items()}
    row["peer"] = min(PEERS, key=lambda name: row["ms"][name]["median"])
    row["ratio"] = quantiles(
        [a / b for a, b in zip(seconds["ral"], seconds[row["peer"]], strict=True)]
    )
    row["gbytes"] = (inputs.k.nbytes + inputs.v.nbytes) / row["ms"]["ral"]["median"] / 1e6
    row["of_reading"] = row["ms"]["read"]["median"] / row["ms"]["ral"]["median"]
    return row


def show(row: dict[str, Any]) -> None:
    head = f"{row['dtype']:9} B={row['batch_size']} {row['heads']:>5} N={row['seqlen_k']:5}"
    if row["wrong"]:
        print(f"{head}  WRONG: {row['wrong']}")
        return
    ms, ratio = row["ms"], row["ratio"]
    print(
        f"{head}  SDPA {ms['sdpa']['median']:7.3f} ms, by rows {ms['sdpa_rows']['median']:7.3f}  "
        f"ours {ms['ral']['median']:7.3f}, no spans {ms['ral_plain']['median']:7.3f}  "
        f"ratio {ratio['median']:.2f} (p20 {ratio['p20']:.2f}, p80 {ratio['p80']:.2f})  "
        f"{row['gbytes']:5.1f} GB/s, {100 * row['of_reading']:.0f} % of reading",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    cpu_bench.add_arguments(parser, quick="fewer shapes and repeats")
    options = cpu_bench.parse(parser, arguments)
    settings = {"head_dim": 128, "num_spans": NUM_SPANS, "quick": options.quick}
    run = results.begin("decode_bench", options, settings)
    print("one query with span marginals / the faster of two calls of SDPA without")
    run["rows"] = []
    for dtype in DTYPES:
        for case in cases(options.quick):
            row = measure(case, dtype, 9 if options.quick else 41)
            run["rows"].append(row)
            show(row)
    results.finish(run, options)
    return int(any(row["wrong"] for row in run["rows"]))


if __name__ == "__main__":
    sys.exit(main())
