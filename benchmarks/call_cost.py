"""What one call costs the host, apart from its arithmetic: every op over 16 keys on the CPU.

    python -m benchmarks.call_cost               # 20 seconds
    python -m benchmarks.call_cost --out FILE    # and a JSON file with machine and commit

One query, 16 keys, a head of 64, float32, one thread: the products take a microsecond. What is left
is the call itself: checks, dispatch, allocation and the call of the library. Rounds alternate
between the calls, so that a slow moment of the machine falls on all of them. The command prints the
least and the median of each call, in microseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import ral_kernels as rk
from benchmarks.harness import machine

ROUNDS, CALLS = 40, 50  # a round times so many calls of each kind together


def calls() -> dict[str, Callable[[], object]]:
    """Name -> a call without arguments."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, seqlen, 64) for seqlen in (1, 16, 16))
    grad_q, grad_k, grad_v = (x.clone().requires_grad_() for x in (q, k, v))
    spans = rk.Spans.from_lengths([8, 8])
    snapshot = rk.AttentionSnapshot(q, k)
    p = rk.attention_policy(q, k)
    advantages = torch.ones(1, 1)

    def backward() -> None:
        rk.attention(grad_q, grad_k, grad_v).out.sum().backward()

    def torch_backward() -> None:
        F.scaled_dot_product_attention(grad_q, grad_k, grad_v).sum().backward()

    return {
        "torch SDPA": lambda: F.scaled_dot_product_attention(q, k, v),
        "torch SDPA, forward and backward": torch_backward,
        "scaled_dot_product_attention": lambda: rk.scaled_dot_product_attention(q, k, v),
        "attention": lambda: rk.attention(q, k, v),
        "attention, 2 spans": lambda: rk.attention(q, k, v, spans),
        "attention, forward and backward": backward,
        "attention_policy": lambda: rk.attention_policy(q, k),
        "divergence": lambda: rk.divergence(p, p),
        "attention_divergence": lambda: rk.attention_divergence(q, k, snapshot),
        "ral_loss": lambda: rk.ral_loss(q, k, snapshot, advantages),
    }


def measure() -> dict[str, dict[str, float]]:
    """Name -> least and median microseconds."""
    table = calls()
    for call in table.values():
        for _ in range(20):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in table}
    for _ in range(ROUNDS):
        for name, call in table.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            seconds[name].append((time.perf_counter() - start) / CALLS)
    return {
        name: {"least_us": 1e6 * min(times), "median_us": 1e6 * statistics.median(times)}
        for name, times in seconds.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    found = measure()
    print(f"{'microseconds a call':36} {'least':>7} {'median':>7}")
    for name, row in found.items():
        print(f"{name:36} {row['least_us']:7.1f} {row['median_us']:7.1f}")
    if out is not None:
        facts = {"machine": machine.describe(torch.device("cpu")), "commit": machine.commit()}
        out.write_text(json.dumps({**facts, "torch": torch.__version__, "calls": found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
