"""The error of `ral_loss`'s gradient near its reference policy, by the form that policy is kept in.

    python -m benchmarks.policy_divergence_accuracy                 # 1e-3 apart, a few seconds
    python -m benchmarks.policy_divergence_accuracy --distances 1e-1 1e-2 1e-3 1e-4

A few optimiser steps after the rollouts, policy and reference policy differ by about 1e-3. The
forms are an `AttentionSnapshot` in the dtype of q and k, and rows of probabilities [B, T, N] in
float32 or bfloat16. Errors are relative to float64 on the same inputs, in the norm. `cosine` is
that of the gradient of q with the true one. In the last table the policy is unchanged: against a
snapshot, loss and gradient must be exactly 0.0, or the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import cpu_bench, results
from ral_kernels.ops.divergence.arguments import KINDS, Kind
from ral_kernels.ops.policy import attention_policy, ral_loss
from ral_kernels.runtime.backends import BackendName
from ral_kernels.snapshot import AttentionSnapshot

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DISTANCES = tuple(kind for kind in KINDS if kind != "cross_entropy")  # 0 where nothing changed
FORMS = ("snapshot", "rows float32", "rows bfloat16")
Result = tuple[Tensor, Tensor, Tensor]  # loss, dq, dk


@dataclass(frozen=True)
class Problem:
    """q and k of a policy and of its reference, the response rows and their advantages."""

    q: Tensor
    k: Tensor
    q_old: Tensor
    k_old: Tensor
    rows: slice
    advantages: Tensor
    distance: float  # measured: Σ r (p/r - 1)², square root of the mean over rows

    def to(self, dtype: torch.dtype) -> Problem:
        q, k, q_old, k_old = (x.to(dtype) for x in (self.q, self.k, self.q_old, self.k_old))
        return Problem(q, k, q_old, k_old, self.rows, self.advantages, self.distance)


def distance_of(q: Tensor, k: Tensor, q_old: Tensor, k_old: Tensor, rows: slice) -> float:
    p, r = (
        attention_policy(a.double(), b.double(), rows=rows) for a, b in ((q, k), (q_old, k_old))
    )
    square = torch.where(r > 0, r * (p / r - 1).square(), 0.0).sum(-1)
    return float(square.mean().sqrt())


def make_problem(sizes: argparse.Namespace, dtype: torch.dtype, distance: float) -> Problem:
    """A reference, and a policy whose measured distance from it is as asked, in `dtype`.

    Rounding to bfloat16 adds to a small step: the step is corrected a few times for what comes out.
    """
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, dim = sizes.heads, sizes.kv_heads, sizes.head_dim

    def normal(num_heads: int) -> Tensor:
        return torch.randn(sizes.batch, num_heads, sizes.seqlen, dim, generator=generator)

    q_old, k_old, step_q, step_k = normal(heads), normal(kv_heads), normal(heads), normal(kv_heads)
    q_old, k_old = q_old.to(dtype), k_old.to(dtype)
    rows = slice(sizes.seqlen - sizes.rows, None)
    size = distance
    for _ in range(6):
        q = (q_old.float() + size * step_q).to(dtype)
        k = (k_old.float() + size * step_k).to(dtype)
        measured = distance_of(q, k, q_old, k_old, rows)
        if distance == 0 or abs(measured / distance - 1) < 0.05:
            break
        size *= distance / max(measured, 1e-3 * distance)
    advantages = torch.randn(sizes.batch, generator=generator)
    return Problem(q, k, q_old, k_old, rows, advantages, measured)


def run(problem: Problem, form: str, kind: Kind, backend: BackendName | None) -> Result:
    """Loss and gradients with the reference kept in `form`."""
    q, k = (x.detach().requires_grad_() for x in (problem.q, problem.k))
    reference: AttentionSnapshot | Tensor
    if form == "snapshot":
        reference = AttentionSnapshot(problem.q_old, problem.k_old, rows=problem.rows)
    else:
        r = attention_policy(problem.q_old, problem.k_old, rows=problem.rows, backend=backend)
        reference = r.to(DTYPES[form.removeprefix("rows ")])
    loss = ral_loss(
        q, k, reference, problem.advantages, kind=kind, rows=problem.rows, backend=backend
    )
    dq, dk = torch.autograd.grad(loss, (q, k))
    return loss.detach(), dq, dk


def relative_error(x: Tensor, truth: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.double() - truth) / torch.linalg.vector_norm(truth))


def measure(
    sizes: argparse.Namespace, dtype: str, distance: float, backend: BackendName | None
) -> list[dict[str, Any]]:
    problem = make_problem(sizes, DTYPES[dtype], distance)
    rows = []
    for kind in DISTANCES:
        truth = run(problem.to(torch.float64), "snapshot", kind, "reference")
        for form in FORMS:
            got = run(problem, form, kind, backend)
            dq, true_dq = got[1].double().flatten(), truth[1].flatten()
            rows.append(
                {
                    "dtype": dtype,
                    "kind": kind,
                    "form": form,
                    "distance": problem.distance,
                    "loss": relative_error(got[0], truth[0]),
                    "dq": relative_error(got[1], truth[1]),
                    "dk": relative_error(got[2], truth[2]),
                    "cosine": float(torch.nn.functional.cosine_similarity(dq, true_dq, dim=0)),
                }
            )
    return rows


def measure_unchanged(
    sizes: argparse.Namespace, dtype: str, backend: BackendName | None
) -> list[dict[str, Any]]:
    problem = make_problem(sizes, DTYPES[dtype], 0.0)
    rows = []
    for kind in DISTANCES:
        for form in FORMS:
            loss, *gradients = run(problem, form, kind, backend)
            largest = max(float(gradient.abs().max()) for gradient in gradients)
            row = {"dtype": dtype, "kind": kind, "form": form, "loss": float(loss)}
            rows.append({**row, "largest_gradient": largest})
    return rows


def wrong(row: dict[str, Any]) -> bool:
    """Whether an unchanged policy differs from its snapshot."""
    return row["form"] == "snapshot" and (row["loss"] != 0.0 or row["largest_gradient"] != 0.0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--distances", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rows", type=int, default=64, help="response rows T")
    parser.add_argument("--seqlen", type=int, default=1024, help="keys N")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--backend", help="default: the automatic choice")
    cpu_bench.add_arguments(parser, quick="nothing, because it takes seconds")
    options = cpu_bench.parse(parser, arguments)
    names = ("batch", "rows", "seqlen", "heads", "kv_heads", "head_dim", "backend")
    settings = {name: getattr(options, name) for name in names}
    record = results.begin("policy_divergence_accuracy", options, settings)
    record |= {"near": [], "unchanged": []}
    print(
        f"problem   T={options.rows} rows, N={options.seqlen} keys, {options.heads}:"
        f"{options.kv_heads} heads of {options.head_dim}, batch {options.batch}\n"
    )
    print("error of ral_loss and its gradients relative to float64, by the form of the reference")
    print(
        f"{'inputs':9} {'distance':>8}  {'kind':11} {'reference':14} {'loss':>8} {'dq':>8} "
        f"{'dk':>8}  {'1 - cosine':>10}"
    )
    for distance in options.distances:
        for dtype in options.dtypes:
            for row in measure(options, dtype, distance, options.backend):
                record["near"].append(row)
                print(
                    f"{row['dtype']:9} {row['distance']:8.1e}  {row['kind']:11} {row['form']:14} "
                    f"{row['loss']:8.1e} {row['dq']:8.1e} {row['dk']:8.1e}  "
                    f"{1 - row['cosine']:10.1e}",
                    flush=True,
                )
    print("\npolicy unchanged: the loss and its largest gradient, which should be 0")
    print(f"{'inputs':9} {'kind':11} {'reference':14} {'loss':>9} {'gradient':>9}")
    for dtype in options.dtypes:
        for row in measure_unchanged(options, dtype, options.backend):
            record["unchanged"].append({**row, "wrong": wrong(row)})
            print(
                f"{row['dtype']:9} {row['kind']:11} {row['form']:14} {row['loss']:9.1e} "
                f"{row['largest_gradient']:9.1e}{'  WRONG' if wrong(row) else ''}",
                flush=True,
            )
    results.finish(record, options)
    return int(any(row["wrong"] for row in record["unchanged"]))


if __name__ == "__main__":
    sys.exit(main())
