"""The kinds of points: each function measures one and returns its record.

A record has a `status` (ok, wrong, failed) with a `reason`, and the measurements. An error of a
kernel raises here; worker.py turns the exception into a record.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock as unittest_mock

import torch
from torch import Tensor

from benchmarks.harness import examine, machine
from benchmarks.harness.gate import TOLERANCE, relative_errors
from benchmarks.harness.inputs import Heads
from benchmarks.harness.measure import MODES, quantiles
from benchmarks.harness.objective import Objective, Problem
from benchmarks.problems import OBJECTIVES
from ral_kernels.runtime import cuda_library

from . import mock, small
from .small import Small

REPEATS, FEWEST = 7, 3
SECONDS = 4.0  # for the timed repeats of one point
SLOW = 0.05  # seconds of a call whose host time is no matter
STEP = 0.05  # of the reference policy from the policy, as in the sweeps' ral objective


def check(
    device: torch.device, backend: str, call: str, dtype: str, head_dim: int, seqlen: int
) -> dict[str, Any]:
    """One call of small.py, forward and every gradient, against the reference in float64."""
    kind = getattr(torch, dtype)
    run = small.calls(backend)[call]
    inputs = Small(device, kind, seqlen, backend, head_dim)
    with kernels_of(backend):
        got = small.run(run, inputs)
    if not computes():
        return {"status": "ok"}
    exact = Small(device, torch.float64, seqlen, "reference", head_dim, rounded=kind)
    wanted = small.run(run, exact)
    # A row that sees no key has an lse of -inf on both sides.
    finite = {name: x.nan_to_num(neginf=0.0) for name, x in got.items()}
    errors = relative_errors(finite, {n: x.nan_to_num(neginf=0.0) for n, x in wanted.items()})
    bounds = TOLERANCE[kind]
    bad = [
        f"{name} error {error:.1e}"
        for name, error in errors.items()
        if not error <= bounds["gradient" if name.startswith("d") else "forward"]
    ]
    return {
        "status": "wrong" if bad else "ok",
        "reason": ", ".join(bad) or None,
        "errors": errors,
    }


def computes() -> bool:
    """Whether results mean something: not where kernels are compiled for the kit."""
    return mock.device is None or mock.device.computes


@contextmanager
def kernels_of(backend: str) -> Iterator[None]:
    """The kernels for Hopper leave nothing to those for sm_80: a call that they refuse raises.

    Raises:
        RuntimeError: they are asked for and not there.
    """
    if backend != "hopper":
        yield
        return
    reason = cuda_library.hopper()
    if reason is not None:
        raise RuntimeError(f"no kernels for Hopper: {reason}")
    with unittest_mock.patch.object(cuda_library, "NOT_TAKEN", None):
        yield


def time(
    device: torch.device,
    objective: str,
    contestant: str,
    peer: str | None,
    heads: list[int],
    seqlen: int,
    layout: str,
    mode: str,
    rows: int = 0,
) -> dict[str, Any]:
    """A contestant of the sweeps at one size: gate, memory, time interleaved with a peer's."""
    which, backward = OBJECTIVES[objective], MODES[mode]
    size = (device, objective, Heads(*heads), seqlen, layout, rows)
    problem = _problem(*size)
    backend = "hopper" if os.environ.get("RAL_CUDA_HOPPER") == "1" else ""
    with kernels_of(backend):
        run = _runner(which, contestant, problem, backward)
        if not computes():
            run()
            return {"status": "ok"}
        competitor = which.registry[_here(contestant, device)]
        record = examine.examine(
            which, competitor, problem, backward, functools.partial(_exact, *size)
        )
        if record["status"] != "ok":
            return record
        runs = {"": run}
        if peer is not None:
            runs |= _peer(which, peer, problem, backward, record)
        seconds = _interleaved(runs, device)
        slow = seconds[""][0] > SLOW
        record["host_ms"] = 1e3 * machine.host_seconds(run, device, 1 if slow else REPEATS)
    record.pop("seconds")
    milliseconds = [1e3 * s for s in seconds[""]]
    flops = which.flops_per_pair[mode] * problem.heads.head_dim * problem.pairs
    record["ms"] = quantiles(milliseconds)
    record["tflops"] = flops / record["ms"]["median"] / 1e9
    if "peer" in seconds:
        record["peer_ms"] = quantiles([1e3 * s for s in seconds["peer"]])
        ratios = [a / b for a, b in zip(seconds[""], seconds["peer"], strict=True)]
        record["ratio"] = quantiles(ratios)
    return record


def _peer(
    which: Objective, name: str, problem: Problem, backward: bool, record: dict[str, Any]
) -> dict[str, Callable[[], Any]]:
    """The peer, once it has run; a peer that cannot run costs the ratio alone."""
    try:
        run = _runner(which, name, problem, backward)
        run()  # cuDNN makes its plan in the first call
    except Exception as error:
        record["peer_error"] = examine.failure(error)["reason"]
        return {}
    return {"peer": run}


def _here(contestant: str, device: torch.device) -> str:
    """A backend of SDPA that only GPUs have is SDPA in a rehearsal."""
    return "sdpa" if contestant.startswith("sdpa") and device.type != "cuda" else contestant


def _runner(which: Objective, name: str, problem: Problem, backward: bool) -> Callable[[], Any]:
    call = which.registry[_here(name, problem.q.device)].prepare(problem)
    inputs = examine.leaves(problem, backward)
    gradients = problem.output_gradients(gated=False)
    return lambda: examine.run_once(which, call, inputs, gradients, backward)


def _interleaved(runs: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, Any]:
    """Seconds of each, turn about, as many times as fit."""
    first = {name: machine.clock(run, device) for name, run in runs.items()}
    fit = int(SECONDS / max(sum(first.values()), 1e-6))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(min(max(fit, FEWEST), REPEATS)):
        for name in sorted(runs, reverse=repeat % 2 == 1):
            seconds[name].append(machine.clock(runs[name], device))
    return seconds


@functools.lru_cache(5)  # the layouts of a size; both modes ask for each
def _problem(
    device: torch.device,
    objective: str,
    heads: Heads,
    seqlen: int,
    layout: str,
    rows: int,
) -> Problem:
    """Drawn on the device: 64k tokens take the CPU's generator seconds."""
    from benchmarks.harness.layouts import spans_of
    from benchmarks.problems.attention.problem import AttentionProblem, rows_of_gate
    from benchmarks.problems.ral.problem import RalProblem

    generator = torch.Generator(device).manual_seed(10)

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        if not computes():
            return torch.empty(shape, dtype=dtype)  # pages that are never touched
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def projected(num_heads: int, length: int = seqlen) -> Tensor:
        return draw(1, length, num_heads, heads.head_dim).transpose(1, 2)

    spans = spans_of("aligned" if layout == "none" else layout, seqlen)
    ids, num_spans = spans.ids.to(device), spans.num_spans
    k = projected(heads.num_kv_heads)
    if objective == "ral":
        q, reference_k = projected(heads.num_heads, rows), k + STEP * projected(heads.num_kv_heads)
        none = projected(heads.num_heads, 0)
        return RalProblem(
            q=q, k=k, reference_q=q + STEP * projected(heads.num_heads, rows),
            reference_k=reference_k, prompt_q=none, reference_prompt_q=none,
            advantages=draw(1, rows, dtype=torch.float32) + 0.5,
            span_ids=ids, num_spans=num_spans,
        )  # fmt: skip
    return AttentionProblem(
        q=projected(heads.num_heads), k=k, v=projected(heads.num_kv_heads),
        span_ids=ids, num_spans=num_spans, dout=projected(heads.num_heads),
        dmarginals=draw(1, heads.num_heads, seqlen, num_spans, dtype=torch.float32),
        gate_rows=rows_of_gate(seqlen, torch.Generator().manual_seed(20)).to(device),
    )  # fmt: skip


@functools.lru_cache(5)  # the layouts of a size; both modes ask for each
def _exact(device: torch.device, objective: str, *rest: Any) -> dict[str, Tensor]:
    """An answer, on the device, for both modes: `rest` is the problem's size and its name."""
    *size, answer = rest
    problem = _problem(device, objective, *size)
    return OBJECTIVES[objective].exact(problem, {answer})[answer]


def tile(
    device: torch.device,
    kernel: str,
    tile: list[int],
    heads: list[int],
    seqlen: int,
    layout: str,
) -> dict[str, Any]:
    """One kernel of Triton's attention with one tile: the whole call's time, gated."""
    from ral_kernels.ops.attention.triton import tiles
    from ral_kernels.runtime.triton_runtime import Tile

    choose, (block_q, block_k, num_warps, num_stages) = tiles.tile, tile
    wanted = Tile(block_q, block_k, num_warps, num_stages)

    def chosen(name: str, *rest: Any) -> Tile:
        return wanted if name == kernel else choose(name, *rest)

    contestant = "ral_plain" if layout == "none" else "ral"
    mode = "forward" if kernel == "fwd" else "forward+backward"
    with unittest_mock.patch.object(tiles, "tile", chosen):
        return time(device, "attention", contestant, None, heads, seqlen, layout, mode)


def profile(device: torch.device, **settings: Any) -> dict[str, Any]:
    """A call of `time` once, unmeasured: for Nsight Compute, which replays its kernels."""
    which = OBJECTIVES[settings["objective"]]
    size = (Heads(*settings["heads"]), settings["seqlen"], settings["layout"])
    problem = _problem(device, settings["objective"], *size, 0)
    _runner(which, settings["contestant"], problem, MODES[settings["mode"]])()
    return {"status": "ok"}


def test(device: torch.device, test: str) -> dict[str, Any]:
    """One test of the suite, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "benchmarks.gpu.log", test]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()[-4:]
    if done.returncode == 0:
        return {"status": "ok"}
    return {"status": "wrong", "reason": " / ".join(lines)[-400:]}


KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    "check": check,
    "time": time,
    "tile": tile,
    "profile": profile,
    "test": test,
}
