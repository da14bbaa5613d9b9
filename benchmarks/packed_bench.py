"""`ral_loss` of packed sequences on the CPU, beside the padded batch and a loop of calls.

    python -m benchmarks.packed_bench            # 8 sequences of 256 to 8,192 keys
    python -m benchmarks.packed_bench --quick    # of 32 to 1,024 keys

Forward and backward to q and k against a snapshot, 16:2 heads of 128. Each sequence has rows that
are a quarter of its keys. The padded batch holds them all at the length of the longest, aligned to
the end. The loop makes one call a sequence and adds the losses. "pairs" is the share of row-key
pairs of the padded batch that are of a sequence. The second row of each dtype has many short
sequences beside a long one. "scratch" is the sum of what the kernels allocate. Values and gradients
of all three agree before any is timed: else the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import ral_kernels as rk
from benchmarks.harness import cpu_bench, results
from benchmarks.harness.cpu_bench import DTYPES
from benchmarks.harness.measure import quantiles
from ral_kernels.runtime import cpu_library

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 16, 2, 128
SKEWED = (8192, 4096, 2048, 2048, 1024, 512, 256, 256)
MANY = (2048, *(128,) * 32)
KEYS_PER_ROW = 4
# Of losses and gradients, relative to their norm: rounding, and dS in bfloat16.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


class Problem:
    """The same sequences in three forms, with the snapshots to compare them with."""

    def __init__(self, keys: Sequence[int], dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(heads: int, tokens: int) -> Tensor:
            return torch.randn(1, heads, tokens, HEAD_DIM, generator=generator).to(dtype)

        self.keys = list(keys)
        self.rows = [n // KEYS_PER_ROW for n in keys]
        self.q = draw(NUM_HEADS, sum(self.rows)).requires_grad_()
        self.k = draw(NUM_KV_HEADS, sum(keys)).requires_grad_()
        self.old_q = self.q.detach() + 0.1 * draw(NUM_HEADS, sum(self.rows))
        self.advantages = torch.randn(len(keys), generator=generator)
        self.packing: dict[str, Any] = {
            "cu_seqlens_q": _offsets(self.rows),
            "cu_seqlens_k": _offsets(keys),
        }

        tokens = torch.arange(max(keys))
        self.mask = tokens >= max(keys) - torch.tensor(keys)[:, None]
        self.counted = tokens[-max(self.rows) :] >= max(keys) - torch.tensor(self.rows)[:, None]
        self.padded = [self._pad(x) for x in (self.q, self.k, self.old_q)]
        self.padded = [x.detach().requires_grad_(x.requires_grad) for x in self.padded]

        self.snapshot = rk.AttentionSnapshot(self.old_q, self.k, **self.packing)
        self.padded_snapshot = rk.AttentionSnapshot(self.padded[2], self.padded[1])
        self.snapshots = [
            rk.AttentionSnapshot(q, k)
            for q, k in zip(self._split(self.old_q), self._split(self.k), strict=True)
        ]

    @property
    def share_of_pairs(self) -> float:
        pairs = sum(t * n for t, n in zip(self.rows, self.keys, strict=True))
        return pairs / (len(self.keys) * max(self.rows) * max(self.keys))

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(self.rows if x.shape[2] == sum(self.rows) else self.keys, dim=2)

    def _pad(self, x: Tensor) -> Tensor:
        parts = self._split(x)
        longest = max(part.shape[2] for part in parts)
        pad = torch.nn.functional.pad
        return torch.cat([pad(part, (0, 0, longest - part.shape[2], 0)) for part in parts])

    def forms(self) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
        """(loss, dq, dk) of each, as calls."""

        def packed() -> tuple[Tensor, ...]:
            loss = rk.ral_loss(
                self.q, self.k, self.snapshot, self.advantages, reduction="sum", **self.packing
            )
            return loss.detach(), *torch.autograd.grad(loss, (self.q, self.k))

        def padded() -> tuple[Tensor, ...]:
            q, k, _ = self.padded
            loss = rk.ral_loss(
                q, k, self.padded_snapshot, self.advantages, self.counted, reduction="sum",
                key_padding_mask=self.mask,
            )  # fmt: skip
            return loss.detach(), *torch.autograd.grad(loss, (q, k))

        def loop() -> tuple[Tensor, ...]:
            calls = zip(self._split(self.q), self._split(self.k), self.snapshots, strict=True)
            losses = [
                rk.ral_loss(q, k, snapshot, self.advantages[i : i + 1], reduction="sum")
                for i, (q, k, snapshot) in enumerate(calls)
            ]
            loss = torch.stack(losses).sum()
            return loss.detach(), *torch.autograd.grad(loss, (self.q, self.k))

        return {"packed": packed, "padded": padded, "loop": loop}

    def why_wrong(self, tolerance: float) -> str | None:
        forms = self.forms()
        wanted = forms["loop"]()
        loss, dq, dk = forms["padded"]()
        keep_q = self.counted[:, None, :, None].expand_as(dq)
        keep_k = self.mask[:, None, :, None].expand_as(dk)
        kept = [
            torch.cat([x[i][:, m[i, 0, :, 0]] for i in range(len(self.keys))], dim=1)[None]
            for x, m in ((dq, keep_q), (dk, keep_k))
        ]
        for name, got in (("packed", forms["packed"]()), ("padded", (loss, *kept))):
            for what, a, b in zip(("loss", "dq", "dk"), got, wanted, strict=True):
                error = float((a.double() - b.double()).norm() / b.double().norm())
                if not error <= tolerance:
                    return f"{name}: {what} error {error:.1e} against the loop of calls"
        return None


def _offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def measure(name: str, keys: Sequence[int], dtype: str, repeats: int) -> dict[str, Any]:
    problem = Problem(keys, DTYPES[dtype])
    row: dict[str, Any] = {"sequences": name, "dtype": dtype, "keys": list(keys)}
    row["pairs"] = problem.share_of_pairs
    row["wrong"] = problem.why_wrong(TOLERANCE[dtype])
    if row["wrong"]:
        return row
    row["scratch"] = {}  # bytes of all allocations of the kernels
    for form, call in problem.forms().items():
        cpu_library.scratch(reset=True)
        call()
        row["scratch"][form] = cpu_library.scratch()[1]
    seconds = cpu_bench.interleave(problem.forms(), repeats)
    row["ms"] = {form: quantiles([1e3 * s for s in times]) for form, times in seconds.items()}
    row["ratio"] = {
        form: quantiles([a / b for a, b in zip(seconds["packed"], seconds[form], strict=True)])
        for form in ("padded", "loop")
    }
    return row


def show(row: dict[str, Any]) -> None:
    head = f"{row['dtype']:9} {row['sequences']:7} {len(row['keys']):3} sequences"
    if row["wrong"]:
        print(f"{head}  WRONG: {row['wrong']}")
        return
    print(
        f"{head}  "
        + "  ".join(f"{form} {times['median']:8.1f} ms" for form, times in row["ms"].items())
        + "  scratch "
        + ", ".join(f"{form} {x / 2**20:.0f}" for form, x in row["scratch"].items())
        + f" MiB  packed / padded {row['ratio']['padded']['median']:.2f} (pairs {row['pairs']:.2f})"
        f"  packed / loop {row['ratio']['loop']['median']:.2f}",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    cpu_bench.add_arguments(parser, quick="an eighth of the keys")
    cpu_bench.add_keep_memory(parser)
    options = cpu_bench.parse(parser, arguments)
    settings = {"heads": f"{NUM_HEADS}:{NUM_KV_HEADS} of {HEAD_DIM}", "quick": options.quick}
    settings["keep_memory"] = options.keep_memory
    run = results.begin("packed_bench", options, settings)
    print("ral_loss against a snapshot, forward and backward, rows a quarter of the keys")
    run["rows"] = []
    for dtype in DTYPES:
        for name, sizes in {"skewed": SKEWED, "many": MANY}.items():
            keys = [n // 8 for n in sizes] if options.quick else sizes
            run["rows"].append(measure(name, keys, dtype, 5))
            show(run["rows"][-1])
    results.finish(run, options)
    return int(any(row["wrong"] for row in run["rows"]))


if __name__ == "__main__":
    sys.exit(main())
