"""What one call costs the host, apart from its arithmetic: every op over 16 keys on the CPU.

    python -m benchmarks.call_cost
    python -m benchmarks.call_cost --parts       # what `attention` spends it on

One query, 16 keys, a head of 64, float32, one thread: the products take a microsecond. What is left
is the call itself: checks, dispatch, allocation and the call of the library. Rounds alternate
between the calls, so that a slow moment of the machine falls on all of them. The command prints the
least and the median of each call, in microseconds.

`--parts` replaces one part of `attention` at a time by its recorded result. What the call then
saves is the price of the part, in the call's own order and with its own cold caches.
"""

from __future__ import annotations

import argparse
import pkgutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

import ral_kernels as rk
from benchmarks.harness import results
from benchmarks.harness.measure import quantiles

ROUNDS, CALLS = 40, 50  # a round times so many calls of each kind
QUICK_ROUNDS = 10


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


PARTS = {  # part of `attention` on the cpu backend -> where it is looked up
    "checks of q, k and v": "ral_kernels.ops.qkv.check_qkv",
    "three new tensors": "ral_kernels.ops.attention.interface._allocate_outputs",
    "choice of a backend": "ral_kernels.runtime.backends.choose",
    "packed inputs, with the variant": "ral_kernels.ops.attention.cpu._params",
    "of these, the variant": "ral_kernels.runtime.cpu_library.chosen_isa",
    "packed outputs": "ral_kernels.ops.attention.c_structs.outputs",
    "whether the dispatcher is needed": "ral_kernels.ops.schema._are_plain",
    "whether autograd records": "ral_kernels.ops.schema._is_recorded",
    "backend: pack, call, status": "ral_kernels.ops.attention.cpu.CpuAttention.fwd",
}


def parts(rounds: int) -> dict[str, dict[str, Any]]:
    """Part of `attention` -> microseconds that the call saves without it, by the least."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, seqlen, 64) for seqlen in (1, 16, 16))

    def whole() -> object:
        return rk.attention(q, k, v)

    def without(path: str) -> Callable[[], object]:
        owner, _, attribute = path.rpartition(".")
        target, results = pkgutil.resolve_name(owner), []
        original = getattr(target, attribute)

        def record(*args: Any) -> Any:
            results.append(original(*args))
            return results[-1]

        with mock.patch.object(target, attribute, record):
            whole()

        def constant(*args: Any) -> Any:
            return results[0]

        def calls() -> None:
            setattr(target, attribute, constant)
            for _ in range(CALLS):
                whole()
            setattr(target, attribute, original)

        return calls

    def calls() -> None:
        for _ in range(CALLS):
            whole()

    table = {"attention": calls, **{name: without(path) for name, path in PARTS.items()}}
    found = measure(table, rounds, calls=1)
    least = {name: row["least_us"] / CALLS for name, row in found.items()}
    total = least.pop("attention")
    saved = {"attention": total, **{name: total - us for name, us in least.items()}}
    return {name: {"least_us": us} for name, us in saved.items()}


def measure(
    table: dict[str, Callable[[], object]], rounds: int, calls: int = CALLS
) -> dict[str, dict[str, Any]]:
    """Name -> least microseconds, and those of each round with their median."""
    for call in table.values():
        for _ in range(20):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in table}
    for _ in range(rounds):
        for name, call in table.items():
            start = time.perf_counter()
            for _ in range(calls):
                call()
            seconds[name].append(1e6 * (time.perf_counter() - start) / calls)
    return {
        name: {"least_us": min(times), "us": quantiles(times)} for name, times in seconds.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    results.add_arguments(parser, quick="fewer rounds")
    parser.add_argument("--parts", action="store_true", help="what `attention` spends its time on")
    options = results.parse(parser, arguments)
    torch.set_num_threads(1)
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    run = results.begin("call_cost", options, {"rounds": rounds, "parts": options.parts})
    run["calls"] = parts(rounds) if options.parts else measure(calls(), rounds)
    print(f"{'microseconds a call':36} {'least':>7} {'median':>7}")
    for name, row in run["calls"].items():
        median = f"{row['us']['median']:7.1f}" if "us" in row else f"{'-':>7}"
        print(f"{name:36} {row['least_us']:7.1f} {median}")
    results.finish(run, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
