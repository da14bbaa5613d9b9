"""What a call costs the host: Triton's launches with a driver that launches nothing.

    python -m benchmarks.gpu.host_cost        # needs no GPU; 20 s with a cold cache

A call at short lengths takes as long as Python needs to issue it. Microseconds, the least of 200
calls (other work on the machine only adds) and their median.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch

import ral_kernels as rk

from . import mock, process


def show(name: str, call: Callable[[], object], repeats: int = 200) -> None:
    for _ in range(5):
        call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    print(f"{name:34} {1e6 * min(seconds):6.0f} {1e6 * statistics.median(seconds):6.0f} us")


def main() -> int:
    os.environ.setdefault(mock.VARIABLE, json.dumps({"computes": False}))
    process.begin()
    torch.set_num_threads(1)
    q, k, v = (torch.zeros(1, h, 1024, 128, dtype=torch.bfloat16) for h in (8, 2, 2))
    spans = rk.Spans.from_lengths([128] * 8)
    snapshot, few = rk.AttentionSnapshot(q[:, :, -256:], k), q[:, :, -256:]
    advantages = torch.ones(1, 256)

    def attention(given: rk.Spans | None) -> rk.AttentionOutput:
        return rk.attention(q, k, v, given, is_causal=True, backend="triton")

    def backward() -> None:
        result = attention(spans)
        assert result.marginals is not None
        torch.autograd.backward([result.out, result.marginals], [result.out, result.marginals])

    show("attention, no spans", lambda: attention(None))
    show("attention, 8 spans", lambda: attention(spans))
    for x in (q, k, v):
        x.requires_grad_()
    show("attention, 8 spans, and backward", backward, 60)
    few = few.detach().requires_grad_()

    def loss() -> None:
        rk.ral_loss(few, k, snapshot, advantages, backend="triton").backward()

    show("ral_loss and backward", loss, 60)
    return 0


if __name__ == "__main__":
    sys.exit(main())
