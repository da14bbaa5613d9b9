"""RAL_AUTOTUNE=1 on the calls that matter most: which tile wins, and all the times.

The result belongs into the tables of tile sizes (triton_tiles.py of each op).
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ral_kernels as rk
from ral_kernels import triton_runtime
from ral_kernels.triton_runtime import Tile

SHAPES = ((128, torch.bfloat16), (64, torch.bfloat16), (128, torch.float32), (256, torch.bfloat16),
    (128, torch.float16), (64, torch.float32))  # fmt: skip
HEADS, KV_HEADS, SEQLEN, ROWS, SPANS = 16, 2, 8192, 1024, 64
SMALL_HEADS, SMALL_SEQLEN = 4, 64  # in a rehearsal


class Record(logging.Handler):
    """What `triton_runtime.tuned` chose and how long each candidate took."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.tried: list[dict[str, Any]] = []
        self.chosen: list[dict[str, Any]] = []
        self._milliseconds = triton_runtime._milliseconds

    def time(self, run: Callable[[Tile], None], tile: Tile) -> float:
        milliseconds = self._milliseconds(run, tile)
        self.tried.append({"tile": repr(tile), "ms": milliseconds})
        return milliseconds

    def emit(self, record: logging.LogRecord) -> None:
        if not isinstance(record.args, tuple) or len(record.args) != 4:
            return
        name, key, tile, milliseconds = record.args
        choice = {"kernel": str(name), "key": repr(key), "tile": repr(tile), "ms": milliseconds}
        self.chosen.append({**choice, "candidates": self.tried})
        self.tried = []
        print(f"{name} {key}: {tile} {milliseconds:.3f} ms", flush=True)


def calls(device: torch.device, head_dim: int, dtype: torch.dtype) -> Iterator[Callable[[], None]]:
    """Forward and backward of every op at one head dim."""
    heads, seqlen = (HEADS, SEQLEN) if device.type == "cuda" else (SMALL_HEADS, SMALL_SEQLEN)
    rows = min(ROWS, seqlen // 2)
    spans = rk.Spans.from_lengths([seqlen // SPANS] * SPANS).to(device)

    def tensor(count: int) -> Tensor:
        x = torch.randn(1, seqlen, count, head_dim, device=device).to(dtype)
        return x.transpose(1, 2).requires_grad_()

    q, k, v = tensor(heads), tensor(KV_HEADS), tensor(KV_HEADS)
    few = q.detach()[:, :, -rows:].requires_grad_()

    def attention(with_spans: bool) -> None:
        result = rk.attention(
            q, k, v, spans if with_spans else None, is_causal=True, backend="triton"
        )
        loss = result.out.float().sum()
        if result.marginals is not None:
            loss = loss + result.marginals.square().sum()
        loss.backward()

    def policy() -> None:
        rk.attention_policy(few, k, backend="triton").square().sum().backward()

    def loss() -> None:
        snapshot = rk.AttentionSnapshot(0.9 * few.detach(), k)
        advantages = torch.ones(1, rows, device=device)
        rk.ral_loss(few, k, snapshot, advantages, backend="triton").backward()

    def decode() -> None:
        with torch.no_grad():
            rk.attention(q[:, :, -1:], k, v, spans, is_causal=True, backend="triton")

    yield lambda: attention(True)
    yield loss
    yield lambda: attention(False)
    yield policy
    yield decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, required=True, help="start no call beyond")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    device, began = torch.device(options.device), time.perf_counter()
    record = Record()
    triton_runtime.logger.addHandler(record)
    triton_runtime.logger.setLevel(logging.INFO)
    triton_runtime._milliseconds = record.time
    failures, left_out = [], 0
    for head_dim, dtype in SHAPES if device.type == "cuda" else ((32, torch.float32),):
        for call in calls(device, head_dim, dtype):
            if time.perf_counter() - began > options.seconds:
                left_out += 1
                continue
            try:
                call()
            except Exception as error:  # one call that fails must not hide what others found
                failures.append(f"{head_dim} {dtype}: {type(error).__name__}: {error}")
                print(f"FAILED: {failures[-1]}", flush=True)
            found = {"chosen": record.chosen, "failures": failures}
            options.json.write_text(json.dumps(found, indent=1))
    found = {"chosen": record.chosen, "failures": failures, "calls_left_out": left_out}
    options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
