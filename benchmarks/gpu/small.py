"""Every kernel once on small shapes, forward and backward: what compute-sanitizer watches.

Lengths lie off the block sizes, tensors have gaps, and there are keys that nobody may read.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import ral_kernels as rk
from ral_kernels import cuda_library, triton_runtime
from ral_kernels.divergence.arguments import KINDS

BATCH, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 64


class Small:
    """Tensors on one device, in one dtype, for the kernels of one backend."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, seqlen: int, backend: str = "triton"
    ) -> None:
        self.device, self.dtype, self.seqlen, self.backend = device, dtype, seqlen, backend

    def tensor(self, heads: int, length: int, head_dim: int = HEAD_DIM) -> Tensor:
        memory = torch.randn(BATCH, length, heads, head_dim, device=self.device).to(self.dtype)
        return memory.transpose(1, 2).requires_grad_()

    def qkv(self, seqlen_q: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        length = self.seqlen if seqlen_q is None else seqlen_q
        k, v = (self.tensor(KV_HEADS, self.seqlen) for _ in range(2))
        return self.tensor(HEADS, length), k, v

    def spans(self, kind: str = "contiguous") -> rk.Spans:
        ids = torch.arange(self.seqlen, device=self.device) * 5 // self.seqlen
        if kind == "scattered":
            ids = torch.arange(self.seqlen, device=self.device) % 6 - 1
        return rk.Spans(ids, 5)

    def mask(self) -> Tensor:
        return (torch.arange(self.seqlen, device=self.device) > 3).expand(BATCH, -1)


def _backward(*outputs: Tensor | None) -> None:
    given = [output for output in outputs if output is not None]
    torch.autograd.backward(given, [torch.rand_like(output) for output in given])


def _attention(small: Small, variant: str) -> None:
    q, k, v = small.qkv(1 if variant == "decoding" else None)
    spans: rk.Spans | None = small.spans("scattered" if variant == "scattered" else "contiguous")
    options: dict[str, Any] = {"is_causal": True}
    if variant == "no spans":
        spans = None
    if variant == "span bias":
        options["span_bias"] = torch.randn(5, device=small.device, requires_grad=True)
    if variant == "masks":
        options.update(window=30, key_padding_mask=small.mask())
        if small.backend == "triton":
            options["softcap"] = 5.0
    result = rk.attention(q, k, v, spans, backend=small.backend, **options)
    _backward(result.out, result.marginals, result.lse)


def _packed(small: Small) -> None:
    q, k, v = (x.detach()[0].transpose(0, 1).requires_grad_() for x in small.qkv())
    bounds = torch.tensor([0, 7, 7, small.seqlen], dtype=torch.int32, device=small.device)
    # The drop-in has no backend to ask for: the CUDA kernels come first once they are measured.
    with mock.patch.object(cuda_library, "MEASURED", small.backend == "cuda"):
        out, marginals = rk.flash_attn_varlen_func(
            q, k, v, bounds, bounds, small.seqlen, small.seqlen, causal=True, spans=small.spans()
        )
        _backward(out, marginals)


def _policy(small: Small, spans: bool) -> None:
    q, k, _ = small.qkv()
    options: dict[str, Any] = {"key_padding_mask": small.mask()}
    if spans:
        bias = torch.randn(5, device=small.device, requires_grad=True)
        options.update(spans=small.spans(), span_bias=bias)
    _backward(rk.attention_policy(q, k, backend="triton", **options))


def _divergence(small: Small, kind: str) -> None:
    p, r = (torch.rand(3, small.seqlen, device=small.device).softmax(-1) for _ in range(2))
    _backward(rk.divergence(p.requires_grad_(), r, kind, backend="triton"))


def _objective(small: Small, kind: str, loss: bool) -> None:
    q, k, _ = small.qkv()
    head_dim = 32 if small.backend == "triton" else 128
    teacher = rk.AttentionSnapshot(
        small.tensor(6, small.seqlen, head_dim), small.tensor(3, small.seqlen, head_dim)
    )
    if not loss:
        _backward(rk.attention_divergence(q, k, teacher, kind, backend=small.backend))
        return
    advantages = torch.randn(BATCH, small.seqlen, device=small.device)
    _backward(rk.ral_loss(q, k, teacher, advantages, kind=kind, backend=small.backend))


def calls(small: Small) -> dict[str, Callable[[], None]]:
    """Name -> call, all ops that the backend has."""
    on_gpu, triton = small.device.type == "cuda", small.backend == "triton"
    found: dict[str, Callable[[], None]] = {}
    for variant in ("spans", "scattered", "no spans", "masks", "decoding"):
        found[f"attention {variant}"] = partial(_attention, small, variant)
    if on_gpu:
        found["attention packed"] = partial(_packed, small)
    if triton:
        found["attention span bias"] = partial(_attention, small, "span bias")
        found["policy over keys"] = partial(_policy, small, False)
        found["policy over spans"] = partial(_policy, small, True)
        for kind in KINDS:
            found[f"divergence {kind}"] = partial(_divergence, small, kind)
    for kind in KINDS if on_gpu else KINDS[:1]:
        found[f"policy_divergence {kind}"] = partial(_objective, small, kind, False)
        found[f"loss {kind}"] = partial(_objective, small, kind, True)
    return found


def run_share(device: torch.device, share: tuple[int, int], file: Path) -> None:
    """Every n-th call, starting with call i, for share (i, n); `file` tells which ended."""
    torch.manual_seed(0)
    half = torch.float16 if triton_runtime.interpreted() else torch.bfloat16
    dtypes = (half,) if device.type == "cpu" else (half, torch.float32)
    seqlen = 33 if device.type == "cpu" else 200
    small = [Small(device, dtype, seqlen) for dtype in dtypes]
    if device.type == "cuda" and rk.available_backends()["cuda"] == "yes":
        small.append(Small(device, half, seqlen, "cuda"))
    every = [
        (f"{x.backend} {name} {str(x.dtype)[6:]}", call)
        for x in small
        for name, call in calls(x).items()
    ]
    ended: dict[str, float] = {}
    for name, call in every[share[0] :: share[1]]:
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        ended[name] = round(time.perf_counter() - start, 2)
        file.write_text(json.dumps({"ran": ended}))


def run_watched(tool: Sequence[str], device: str, processes: int, file: Path) -> int:
    """All calls under `tool`, shared out: compiling, a process at a time, would take minutes."""
    folder = file.parent
    running = []
    for index in range(processes):
        command = [*tool, sys.executable, "-m", "benchmarks.gpu.small"]
        command += ["--device", device, "--share", str(index), str(processes)]
        output = (folder / f"small-{index}.txt").open("w")
        command += ["--json", str(folder / f"small-{index}.json")]
        running.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT))
    found: dict[str, Any] = {"tool": list(tool), "ran": {}, "failed": []}
    for index, process in enumerate(running):
        code = process.wait()
        try:
            record = json.loads((folder / f"small-{index}.json").read_text())
            found["ran"].update(record["ran"])
        except (OSError, ValueError):
            pass  # it ended before its first call did
        if code != 0:
            text = (folder / f"small-{index}.txt").read_text(errors="replace")
            lines = [line for line in text.splitlines() if line.strip(" =")]
            found["failed"].append({"share": index, "exit": code, "output": lines[-40:]})
            print(f"share {index} ended with {code}:\n{text}", flush=True)
        file.write_text(json.dumps(found, indent=1))
    print(f"{len(found['ran'])} calls ran, {len(found['failed'])} of {processes} shares failed")
    return int(bool(found["failed"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), metavar=("I", "N"))
    parser.add_argument("--processes", type=int, help="this many, each with a share, under TOOL")
    parser.add_argument("tool", nargs="*", help="a command to run them under")
    options = parser.parse_args()
    if options.processes is not None:
        return run_watched(options.tool, options.device, options.processes, options.json)
    run_share(torch.device(options.device), tuple(options.share), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
