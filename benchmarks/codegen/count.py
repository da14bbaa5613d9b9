"""How long policies take at least on Hopper, by what their Triton kernels issue: no measurement.

    python -m benchmarks.codegen.count

Each kernel with a matrix product visits every tile of rows, keys and heads once. For a tile a warp
issues the instructions of the loop without masks, read from the machine code. 132 multiprocessors
issue 4 instructions a clock at 1.755 GHz. Waits and the other kernels are not in it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor

import ral_kernels as rk
from ral_kernels.runtime.triton_runtime import record_launches

from .compiler import compile_launches

HEADS, KV_HEADS, HEAD_DIM = 16, 2, 128
PER_MS = 132 * 4 * 1.755e6  # instructions of warps


def _rows(tokens: int, heads: int) -> Tensor:
    """Token by token, as a model's projections give them."""
    x = torch.empty(1, tokens, heads, HEAD_DIM, dtype=torch.bfloat16)
    return x.transpose(1, 2).requires_grad_()


def _policy(rows: int, keys: int) -> None:
    p = rk.attention_policy(_rows(rows, HEADS), _rows(keys, KV_HEADS), backend="triton")
    p.backward(p.new_zeros(1).expand_as(p))


def _loss(rows: int, keys: int) -> None:
    q, k = _rows(rows, HEADS), _rows(keys, KV_HEADS)
    reference = rk.AttentionSnapshot(q, k)
    rk.ral_loss(q, k, reference, torch.ones(1, rows), backend="triton").backward()


OPS: dict[str, Callable[[int, int], None]] = {"attention_policy": _policy, "ral_loss": _loss}


def table(run: Callable[[int, int], None], rows: int, keys: int) -> list[str]:
    """The kernels of a call, forward and backward, in Markdown."""
    with record_launches("sm_90") as launches:
        run(rows, keys)
    lines = [
        "| kernel | tile, rows x keys | launches | tiles | instructions of a tile | at least, ms |",
        "|---|---|---|---|---|---|",
    ]
    total = 0.0
    # Launches of a kernel differ in how their arguments divide. One form stands for them.
    forms = {x.kernel: x for x in reversed(compile_launches(launches, "sm_90", with_loops=True))}
    for name, facts in reversed(forms.items()):
        if facts.error:
            raise RuntimeError(f"{name}: {facts.error}")
        if not facts.loops:
            continue
        block_q, block_k = (facts.constants[size] for size in ("BLOCK_Q", "BLOCK_K"))
        of_kernel = [x.arguments["num_rows"] for x in launches if x.name == name]
        row_blocks = sum(math.ceil(n / block_q) for n in of_kernel)
        tiles = HEADS * row_blocks * math.ceil(keys / block_k)
        outer = [loop for loop in facts.loops if "." not in loop.name]
        issued = facts.num_warps * min(loop.least.instructions for loop in outer)
        least = tiles * issued / PER_MS
        total += least
        lines.append(
            f"| `{name}` | {block_q} x {block_k} | {len(of_kernel)} | {tiles:,} | {issued:,} "
            f"| {least:.1f} |"
        )
    return [*lines, f"| all | | | | | {total:.1f} |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--keys", type=int, default=131072)
    options = parser.parse_args()
    for name, run in OPS.items():
        print(f"\n{name}, {options.rows:,} rows, {options.keys:,} keys, bfloat16, "
              f"{HEADS}:{KV_HEADS} heads of {HEAD_DIM}\n")  # fmt: skip
        print("\n".join(table(run, options.rows, options.keys)))


if __name__ == "__main__":
    main()
