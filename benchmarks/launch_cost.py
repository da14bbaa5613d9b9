"""What a call of the Triton backend costs the host, under a driver that launches nothing.

    python -m benchmarks.launch_cost
    python -m benchmarks.launch_cost --profile "attention, 8 spans"

No GPU is needed: benchmarks/gpu/mock.py stands for one. Launches take Triton's real path through
specialisation and the lookup of the compiled kernel, and stop at the driver. Tensors lie on the
CPU, so the cost of an allocation differs from that on a GPU. The first run compiles the kernels.

Of each call the command prints its launches and its microseconds, between other calls and repeated
at once. Other calls displace its code and data from the caches. "Triton" is what the same launches
take alone, between others. `--profile` prints the functions in which one call spends its time; the
profiler itself takes most of what it shows.
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import os
import pstats
import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch

import ral_kernels as rk
from benchmarks.call_cost import measure
from benchmarks.gpu import mock as gpu
from benchmarks.harness import results
from ral_kernels.runtime import triton_runtime

ROUNDS, QUICK_ROUNDS = 400, 100
REPEATED = 20  # calls at once
HEADS, KV_HEADS, SEQLEN, HEAD_DIM, ROWS = 4, 2, 64, 128, 16


def calls() -> dict[str, Callable[[], object]]:
    """Name -> a call without arguments, so small that what torch computes on the CPU is little."""

    def normal(heads: int, seqlen: int) -> torch.Tensor:
        return torch.zeros(1, heads, seqlen, HEAD_DIM, dtype=torch.bfloat16)

    q, k, v = normal(HEADS, SEQLEN), normal(KV_HEADS, SEQLEN), normal(KV_HEADS, SEQLEN)
    token, rows = normal(HEADS, 1), normal(HEADS, ROWS)
    trained_q, trained_k, trained_v = (x.clone().requires_grad_() for x in (q, k, v))
    trained_rows = rows.clone().requires_grad_()
    spans = rk.Spans.from_lengths([SEQLEN // 8] * 8)
    snapshot, advantages = rk.AttentionSnapshot(rows, k), torch.ones(1, ROWS)
    options: dict[str, Any] = {"is_causal": True, "backend": "triton"}

    def attention_and_backward() -> None:
        result = rk.attention(trained_q, trained_k, trained_v, spans, **options)
        outputs = [result.out, result.marginals]
        torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])

    def policy_and_backward() -> None:
        p = rk.attention_policy(trained_rows, k, backend="triton")
        p.backward(torch.empty_like(p))

    def loss_and_backward() -> None:
        rk.ral_loss(trained_rows, k, snapshot, advantages, backend="triton").backward()

    return {
        "attention": lambda: rk.attention(q, k, v, **options),
        "attention, 8 spans": lambda: rk.attention(q, k, v, spans, **options),
        "attention, 8 spans, forward and backward": attention_and_backward,
        "attention, a step of decoding": lambda: rk.attention(token, k, v, spans, **options),
        "attention_policy, forward and backward": policy_and_backward,
        "attention_divergence": lambda: rk.attention_divergence(
            rows, k, snapshot, backend="triton"
        ),
        "ral_loss, forward and backward": loss_and_backward,
    }


def launches_of(call: Callable[[], object]) -> list[Callable[[], None]]:
    """The launches of a call, which runs, to be repeated with arguments that exist already."""
    found: list[Callable[[], None]] = []
    original = triton_runtime.launch

    def record(*arguments: Any, **options: Any) -> None:
        found.append(functools.partial(original, *arguments, **options))
        original(*arguments, **options)

    with mock.patch.object(triton_runtime, "launch", record):
        call()
    return found


def costs(rounds: int) -> dict[str, dict[str, Any]]:
    """Call -> its launches, and microseconds: least, median, repeated, and those of Triton."""
    table = calls()
    launches = {name: launches_of(call) for name, call in table.items()}
    alone = {f"{name}: launches": functools.partial(_run, launches[name]) for name in table}
    found = measure({**table, **alone}, rounds, calls=1)
    repeated = measure(table, max(rounds // REPEATED, 1), calls=REPEATED)
    return {
        name: {
            "launches": len(launches[name]),
            **found[name],
            "repeated_least_us": repeated[name]["least_us"],
            "triton_least_us": found[f"{name}: launches"]["least_us"],
        }
        for name in table
    }


def _run(launches: Sequence[Callable[[], None]]) -> None:
    for launch in launches:
        launch()


def profile(call: Callable[[], object], number: int = 200) -> pstats.Stats:
    """Where a call spends its time, by function; the first run is not counted."""
    call()
    profiler = cProfile.Profile()
    with profiler:
        for _ in range(number):
            call()
    return pstats.Stats(profiler)


def begin() -> None:
    """Take the CPU for a GPU that computes nothing."""
    os.environ[gpu.VARIABLE] = '{"computes": false}'
    gpu.begin()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    results.add_arguments(parser, quick="fewer rounds")
    parser.add_argument("--profile", metavar="CALL", help="the functions of one call")
    options = results.parse(parser, arguments)
    if not triton_runtime._installed():
        parser.error("triton is not installed (pip install triton)")
    torch.set_num_threads(1)
    begin()
    if options.profile is not None:
        if options.profile not in calls():
            parser.error(f"--profile: {options.profile!r} is unknown; there are {list(calls())}")
        profile(calls()[options.profile]).sort_stats("tottime").print_stats(40)
        return 0
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    run = results.begin("launch_cost", options, {"rounds": rounds})
    run["calls"] = costs(rounds)
    head = f"{'least':>7} {'median':>7} {'repeated':>8} {'Triton':>7}"
    print(f"{'microseconds a call':42} {'launches':>8} {head}")
    for name, row in run["calls"].items():
        print(
            f"{name:42} {row['launches']:8} {row['least_us']:7.1f} {row['us']['median']:7.1f} "
            f"{row['repeated_least_us']:8.1f} {row['triton_least_us']:7.1f}"
        )
    results.finish(run, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
