"""`head_weights` in the CUDA kernels of `policy_divergence`, run by the harness."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ral_kernels.ops.divergence.arguments import KINDS
from ral_kernels.ops.policy import attention_divergence, cuda, ral_loss
from tests.cuda_host.backend import Kernels
from tests.cuda_host.test_policy_divergence import has_kernel, of_dim
from tests.ops.policy_cases import (
    BY_NAME,
    WEIGHTED_CASES,
    PolicyCase,
    PolicyInputs,
    snapshot_inputs,
)
from tests.ops.target_cases import target_of
from tests.ops.test_policy import gradients, random_like
from tests.ops.test_policy_divergence import check_case, snapshot_of
from tests.ops.test_policy_divergence_at_reference import assert_exactly_zero
from tests.ops.test_policy_packed_kernels import RAGGED, RUNS, assert_alike

HALF = (torch.bfloat16, torch.float16)
PACKED = replace(RAGGED, num_heads=4, num_kv_heads=2, head_dim=64, head_weights="samples")


CASES = [of_dim(case, 64) for case in WEIGHTED_CASES if has_kernel(case)]


@pytest.mark.parametrize(
    ("case", "kind", "dtype"),
    [pytest.param(x, KINDS[i % 4], HALF[i % 2], id=x.name) for i, x in enumerate(CASES)],
)
def test_value_and_gradients(
    case: PolicyCase, kind: str, dtype: torch.dtype, cuda_on_host: Kernels
) -> None:
    """From a snapshot of another model, with weights of its own."""
    check_case(case, dtype, "cuda", kind, other_model=True, other_head_dim=128)


def weighted(name: str, dtype: torch.dtype) -> PolicyInputs:
    return of_dim(BY_NAME[name], 64).inputs(dtype).requires_grad_()


@pytest.mark.parametrize(
    ("run", "limit"), [("divergence", cuda.CHUNK), ("loss", 3000), ("divergence", 1)]
)
def test_packed(
    run: str, limit: int, cuda_on_host: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sequence has its own weights: all together, in groups, and by itself in chunks."""
    monkeypatch.setattr(cuda, "CHUNK", limit)
    found, wanted = (RUNS[run](PACKED, torch.float16, x) for x in ("cuda", "reference"))
    assert found[3].shape == (len(PACKED.lengths), PACKED.num_heads) and wanted[3].any()
    assert_alike(found, wanted)
    assert sum(cuda_on_host.calls.values()) > 0


@pytest.mark.parametrize("form", ["shared", "sparse"])
def test_against_a_target(form: str, cuda_on_host: Kernels) -> None:
    found = []
    for dtype, backend in ((torch.float16, "cuda"), (torch.float64, "reference")):
        inputs = of_dim(BY_NAME["weights_samples"], 64).inputs(torch.float16).to(dtype)
        inputs.requires_grad_()
        value = attention_divergence(
            inputs.q, inputs.k, target_of(form, inputs), "cross_entropy", backend=backend,
            **inputs.options,
        )  # fmt: skip
        dvalue = random_like(value, 1).masked_fill(value.isinf(), 0.0)
        found.append([value.nan_to_num(posinf=0), *gradients(value, inputs, dvalue).values()])
    assert_alike(*found)


@pytest.mark.parametrize(("name", "dtype"), [("weights_zeros", HALF[0]), ("weights_one", HALF[1])])
def test_unchanged_policy_is_exactly_zero(
    name: str, dtype: torch.dtype, cuda_on_host: Kernels
) -> None:
    """Learned weights, which the snapshot takes from the call: all gradients are 0, theirs too."""
    inputs = weighted(name, dtype)
    options = {x: y for x, y in inputs.options.items() if x != "head_weights"}
    snapshot = snapshot_of(PolicyInputs(inputs.q, inputs.k, options))
    value = attention_divergence(inputs.q, inputs.k, snapshot, backend="cuda", **inputs.options)
    assert_exactly_zero(value, inputs)
    for _ in range(2):  # the second comparison reads the snapshot's normalisers
        loss = ral_loss(
            inputs.q, inputs.k, snapshot, random_like(value, 2), backend="cuda", **inputs.options
        )
        assert_exactly_zero(loss, inputs)
    # the gradient of float16 is formed after the forward
    assert cuda_on_host.calls == (
        {"fwd": 1, "bwd": 1, "loss": 2} if dtype == torch.bfloat16 else {"fwd": 3, "bwd": 3}
    )


def run_all(inputs: PolicyInputs, reference: PolicyInputs) -> list[Tensor]:
    options = {**inputs.options, "backend": "cuda"}
    value = attention_divergence(inputs.q, inputs.k, snapshot_of(reference), **options)
    loss = ral_loss(inputs.q, inputs.k, snapshot_of(reference), random_like(value, 2), **options)
    found = [value, loss]
    for x in (value, loss):
        of_x = gradients(x, inputs, random_like(x, 1))
        found += [of_x[name] for name in ("q", "head_weights") if name in of_x]
    return found


def test_chunks_and_orders_of_threads(
    cuda_on_host: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = weighted("weights_samples", torch.bfloat16)
    other = snapshot_inputs(of_dim(BY_NAME["weights_samples"], 64), inputs, other_model=False)
    found = []
    for order, limit in ((0, cuda.CHUNK), (1, 1)):
        cuda_on_host.set_order(order)
        monkeypatch.setattr(cuda, "CHUNK", limit)
        found.append(run_all(inputs, other))
    assert len(found[0]) == 6
    for once, again in zip(*found, strict=True):
        assert once.any() and torch.equal(once, again)


def test_equal_weights_change_no_bit(cuda_on_host: Kernels) -> None:
    case = of_dim(BY_NAME["gqa_7"], 64)
    inputs = case.inputs(torch.float16).requires_grad_()
    other = snapshot_inputs(case, inputs, other_model=False)
    plain = run_all(inputs, other)
    inputs.options["head_weights"] = torch.full((inputs.q.shape[1],), 0.3).requires_grad_()
    value, loss, dq, _, dq_of_loss, _ = run_all(inputs, other)
    for got, wanted in zip((value, loss, dq, dq_of_loss), plain, strict=True):
        assert wanted.any() and torch.equal(got, wanted)
