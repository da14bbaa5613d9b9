"""What a call costs the host: Triton's launches with a driver that launches nothing.

    python -m benchmarks.gpu.host_cost        # needs no GPU; 20 s with a cold cache

A call at short lengths takes as long as Python needs to issue it. Median of 200, microseconds.
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


def median_us(call: Callable[[], object], repeats: int = 200) -> float:
    for _ in range(5):
        call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1e6 * statistics.median(seconds)


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

    print(f"{'attention, no spans':32} {median_us(lambda: attention(None)):6.0f} us")
    print(f"{'attention, 8 spans':32} {median_us(lambda: attention(spans)):6.0f} us")
    for x in (q, k, v):
        x.requires_grad_()
    print(f"{'attention, 8 spans, and backward':32} {median_us(backward, 60):6.0f} us")
    few = few.detach().requires_grad_()
    loss = median_us(
        lambda: rk.ral_loss(few, k, snapshot, advantages, backend="triton").backward(), 60
    )
    print(f"{'ral_loss and backward':32} {loss:6.0f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
