"""What a RAL loss of a sequence that is spread over ranks moves, computed from shapes.

    python -m benchmarks.sharded_bytes                        # Qwen2.5-VL-7B: 28 heads, 4 of keys
    python -m benchmarks.sharded_bytes --ranks 16 --rows 256 --num-kv-heads 8

It is one loss and its backward of one layer in bfloat16; nothing is measured. The rows are the last
of the sequence, in chunks of one length a rank.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import ral_kernels as rk

LENGTHS = (8192, 32768, 131072, 524288, 1048576)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rows", type=int, default=1024, help="response rows")
    parser.add_argument("--num-heads", type=int, default=28)
    parser.add_argument("--num-kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--layout", choices=("contiguous", "head_tail"), default="contiguous")
    options = vars(parser.parse_args(arguments))
    ranks, rows = options.pop("ranks"), options.pop("rows")
    print("| sequence | keys: all ranks | the busiest | rows: all ranks | the busiest | chosen |")
    print("|---:|---:|---:|---:|---:|---|")
    for seqlen in LENGTHS:
        given = {"rows": (seqlen - rows, seqlen), **options}
        keys = rk.sharded_bytes(seqlen, ranks, moves="keys", **given)
        moved = rk.sharded_bytes(seqlen, ranks, moves="rows", **given)
        chosen = "keys" if rk.sharded_bytes(seqlen, ranks, **given) == keys else "rows"
        cells = (
            _mib(x) for each in (keys, moved) for x in (each.forward + each.backward, each.busiest)
        )
        print(f"| {seqlen:,} | {' | '.join(cells)} | {chosen} |")
    return 0


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


if __name__ == "__main__":
    raise SystemExit(main())
