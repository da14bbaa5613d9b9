"""Hashes of what the CPU backend computes, to show that a change leaves every bit in place.

    python -m benchmarks.output_hashes                      # before it, and after it
    python -m benchmarks compare BEFORE.json AFTER.json     # names the calls that differ

The calls are the tests' tables of cases in float32, bfloat16 and float16, forward and every
gradient. Bits depend on the instruction set (RAL_CPU_ISA chooses one), so compare on one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import ral_kernels as rk
from benchmarks.harness import results
from ral_kernels.ops.divergence.arguments import KINDS
from tests.ops import attention_cases, policy_cases

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def digest(tensors: list[Tensor | None]) -> str:
    """SHA-256 over shapes, dtypes and bytes."""
    found = hashlib.sha256()
    for x in tensors:
        if x is None:
            found.update(b"none")
            continue
        found.update(f"{tuple(x.shape)} {x.dtype}".encode())
        found.update(x.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def with_gradients(outputs: list[Tensor], inputs: list[Tensor]) -> str:
    """The digest of outputs and of the gradients that fixed output gradients give."""
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs]
    gradients = torch.autograd.grad(outputs, inputs, given, allow_unused=True)
    return digest([*outputs, *gradients])


def hashes() -> Iterator[tuple[str, str]]:
    """(name of a call, digest of its outputs and gradients)."""
    for name, dtype in DTYPES.items():
        for case in attention_cases.CASES:
            x = case.inputs(dtype).requires_grad_()
            result = rk.attention(x.q, x.k, x.v, x.spans, **x.options, backend="cpu")
            outputs = [y for y in result if y is not None]
            yield (
                f"attention {case.name} {name}",
                with_gradients(outputs, list(x.differentiable().values())),
            )
        for policy in policy_cases.CASES:
            y = policy.inputs(dtype).requires_grad_()
            p = rk.attention_policy(y.q, y.k, **y.options, backend="cpu")
            yield (
                f"attention_policy {policy.name} {name}",
                with_gradients([p], list(y.differentiable().values())),
            )
        for policy in policy_cases.TOKEN_CASES:
            for kind in KINDS:
                y = policy.inputs(dtype).requires_grad_()
                old = policy.inputs(dtype, seed=1)
                shared = {"is_causal", "scale", "window", "softcap", "rows"}
                options = {key: value for key, value in old.options.items() if key in shared}
                snapshot = rk.AttentionSnapshot(old.q, old.k, **options)
                value = rk.attention_divergence(
                    y.q, y.k, snapshot, kind, **y.options, backend="cpu"
                )
                yield (
                    f"attention_divergence {policy.name} {kind} {name}",
                    with_gradients([value], [y.q, y.k]),
                )
                z = y.to(dtype).requires_grad_()
                advantages = torch.linspace(-1, 1, value.numel()).view(value.shape)
                loss = rk.ral_loss(
                    z.q, z.k, snapshot, advantages, kind=kind, **z.options, backend="cpu"
                )
                yield f"ral_loss {policy.name} {kind} {name}", with_gradients([loss], [z.q, z.k])
    for kind in KINDS:
        for shape in ((3, 1), (5, 37), (2, 4, 1000)):
            generator = torch.Generator().manual_seed(0)
            p, r = (
                torch.softmax(3 * torch.randn(shape, generator=generator), -1).requires_grad_()
                for _ in range(2)
            )
            yield (
                f"divergence {shape} {kind}",
                with_gradients([rk.divergence(p, r, kind, backend="cpu")], [p, r]),
            )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    results.add_arguments(parser, quick="nothing, because it takes seconds")
    options = results.parse(parser, arguments)
    run = results.begin("output_hashes", options, {})
    run["calls"] = dict(hashes())
    whole = hashlib.sha256(json.dumps(run["calls"], sort_keys=True).encode()).hexdigest()[:16]
    print(f"{len(run['calls'])} calls, all together {whole}")
    results.finish(run, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
