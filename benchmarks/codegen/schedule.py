"""What share of a perfect split the order of CTAs reaches, as benchmarks/results/schedule_cuda.md.

    python -m benchmarks.codegen.schedule                    # the table
    python -m benchmarks.codegen.schedule --shape 4096,28,4  # T, H, Hk: one shape, printed

A model, no measurement: CTAs go in their order to the first of 132 multiprocessors that is free.
The unit is a round, 64 by 64 scores of each consumer of a kernel for Hopper. A CTA costs three
rounds more, and 1.2 where it writes partial sums. These are joined at 2.7 TB/s, after 3 us.
Calls are causal, with T = N, batch size 1 and head dim 128. L2 hits are not in the model.
"""

from __future__ import annotations

import argparse
import heapq
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

from ral_kernels.ops.attention.cuda import key_splits

RESULT = Path(__file__).resolve().parents[1] / "results" / "schedule_cuda.md"
MULTIPROCESSORS, HEAD_DIM, BLOCK, TILE = 132, 128, 128, 64
FIXED, WRITE_PARTS = 3.0, 1.2  # rounds of a CTA
ROUND_US, LAUNCH_US, BYTES_PER_US = 0.97, 3.0, 2.7e6
SHAPES = [
    (seqlen, *heads)
    for heads in ((28, 4), (16, 2), (32, 8), (16, 16))
    for seqlen in (1024, 2048, 4096, 8192, 16384)
]


def makespan(costs: Iterable[float]) -> float:
    """When the last CTA ends."""
    free = [0.0] * MULTIPROCESSORS
    end = 0.0
    for cost in costs:
        end = max(end, free[0] + cost)
        heapq.heapreplace(free, free[0] + cost)
    return end


def perfect(seqlen: int, num_heads: int) -> float:
    """Rounds of each multiprocessor if nothing were lost."""
    return seqlen * (seqlen + 1) / 2 / (BLOCK * TILE) * num_heads / MULTIPROCESSORS


def queries(seqlen: int, num_heads: int, longest_first: bool) -> float:
    """The share that the forward, or dq, reaches; else the CTAs of a head follow one another."""
    blocks = range(math.ceil(seqlen / BLOCK) - 1, -1, -1)
    costs = [math.ceil(min((b + 1) * BLOCK, seqlen) / TILE) + FIXED for b in blocks]
    order = [c for c in costs for _ in range(num_heads)] if longest_first else costs * num_heads
    return perfect(seqlen, num_heads) / makespan(order)


def keys(seqlen: int, num_heads: int, num_kv_heads: int, splits: tuple[int, int] | None) -> float:
    """The share that dk and dv reach; without `splits`, kv head by kv head."""
    group = num_heads // num_kv_heads
    heads, ranges = splits or (1, 1)
    tiles = math.ceil(seqlen / TILE)
    parts = heads * ranges
    fixed = FIXED + (WRITE_PARTS if parts > 1 else 0.0)
    of_heads = [-(-(p + 1) * group // heads) - -(-p * group // heads) for p in range(heads)]
    cuts = [(r * tiles // ranges, (r + 1) * tiles // ranges) for r in range(ranges)]
    blocks = [
        [
            max(0, stop - max(start, first // TILE)) * n + fixed
            for n in of_heads
            for start, stop in cuts
        ]
        for first in range(0, seqlen, BLOCK)
    ]
    if splits is None:
        order = [c for block in blocks for c in block] * num_kv_heads
    else:
        order = [c for block in blocks for c in block * num_kv_heads]
    rounds = makespan(order)
    if parts > 1:
        numbers = seqlen * num_kv_heads * 2 * HEAD_DIM
        rounds += (LAUNCH_US + numbers * (4 * parts + 2) / BYTES_PER_US) / ROUND_US
    return perfect(seqlen, num_heads) / rounds


def row(seqlen: int, num_heads: int, num_kv_heads: int) -> str:
    args = SimpleNamespace(
        batch_size=1, num_heads=num_heads, num_kv_heads=num_kv_heads, seqlen_q=seqlen,
        seqlen_k=seqlen, cu_seqlens_q=None, window_left=-1, window_right=0,
    )  # fmt: skip
    splits = key_splits(args, MULTIPROCESSORS)  # type: ignore[arg-type]
    parts = math.prod(splits)
    mib = parts * seqlen * num_kv_heads * 2 * HEAD_DIM * 4 / 2**20 if parts > 1 else 0.0
    shares = (
        queries(seqlen, num_heads, False), queries(seqlen, num_heads, True),
        keys(seqlen, num_heads, num_kv_heads, None), keys(seqlen, num_heads, num_kv_heads, (1, 1)),
        keys(seqlen, num_heads, num_kv_heads, splits),
    )  # fmt: skip
    cells = [str(seqlen), f"{num_heads}:{num_kv_heads}", *(f"{share:.3f}" for share in shares)]
    return f"| {' | '.join([*cells, f'{splits[0]} x {splits[1]}', f'{mib:.0f}'])} |"


HEAD = [
    "| T | heads | forward, head by head | longest first | dk and dv, head by head | longest first "
    "| in parts | parts | their MiB |",
    f"|{' --- |' * 9}",
]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shape", help="T,H,Hk: print this one, and write nothing")
    parser.add_argument("--out", type=Path, default=RESULT, help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.shape is not None:
        print("\n".join([*HEAD, row(*map(int, options.shape.split(",")))]))
        return 0
    model = " ".join((__doc__ or "").split("\n\n")[2].split())
    title = "# The order of CTAs: shares of a perfect split\n\nWritten by "
    title += f"`python -m benchmarks.codegen.schedule`. {model}\n\n"
    options.out.write_text(title + "\n".join([*HEAD, *(row(*shape) for shape in SHAPES)]) + "\n")
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
