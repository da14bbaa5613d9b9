"""Packed sequences in the CUDA kernels of `policy_divergence`, run by the harness."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ral_kernels.ops.policy import attention_divergence, cuda, ral_loss
from tests.cuda_host.backend import DIVERGENCE, Kernels, host_library, on_host
from tests.cuda_host.build import Patch
from tests.cuda_host.test_seeded_bugs import FEWER
from tests.ops.test_policy_packed_kernels import (
    CHOSEN,
    NUM_KEYS,
    Packed,
    Run,
    assert_alike,
    comparison_and_gradients,
    loss_and_gradients,
    random_like,
)

SCOPE = torch.arange(NUM_KEYS) % 3 != 0
CASES: dict[str, Packed] = {
    "causal": Packed(dtype=torch.bfloat16),
    "not_causal": Packed(options={"is_causal": False, "exclude_self": False}),
    "window_128": Packed(head_dim=128, options={"window": 20}),
    "scope_rows": Packed(dtype=torch.bfloat16, options={"scope": SCOPE, "rows": CHOSEN}),
    "in_pieces": Packed((5, 3, 0), (1100, 40, 7)),  # of 512 keys
}


def of_kernels(case: Packed) -> Packed:
    """Head dims and dtypes that have kernels."""
    return replace(
        case,
        head_dim=max(64, case.head_dim),
        dtype=torch.float16 if case.dtype == torch.float32 else case.dtype,
    )


@pytest.mark.parametrize("case", [of_kernels(case) for case in CASES.values()], ids=CASES)
@pytest.mark.parametrize(
    "run", [comparison_and_gradients, loss_and_gradients], ids=["divergence", "loss"]
)
def test_packed(case: Packed, run: Run, cuda_on_host: Kernels) -> None:
    found, wanted = run(case, "cuda", case.dtype), run(case, "reference", torch.float64)
    assert_alike(found, wanted, 1e-3)
    assert_alike(found[:1], wanted[:1], 1e-5)
    assert sum(cuda_on_host.calls.values()) > 0


@pytest.mark.parametrize("limit", [cuda.CHUNK, 3000, 1])
def test_unchanged_policy_is_exactly_zero(
    limit: int, cuda_on_host: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "CHUNK", limit)
    case = of_kernels(Packed())
    q, k = (x.requires_grad_() for x in case.draw(1))
    snapshot = case.snapshot(q.detach(), k.detach())
    value = attention_divergence(q, k, snapshot, "kl", backend="cuda", **case.all_options)
    advantages = random_like(torch.empty(len(case.lengths_q)))
    loss = ral_loss(q, k, snapshot, advantages, backend="cuda", **case.all_options)
    assert not value.any() and not loss.any()
    for x in torch.autograd.grad(value.sum() + loss, (q, k)):
        assert not x.any()


def test_parts_and_orders_of_threads(
    cuda_on_host: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences all together, in groups, and each by itself in chunks of its rows."""
    case = of_kernels(Packed(dtype=torch.bfloat16))
    found: list[list[Tensor]] = []
    for order, limit in enumerate((cuda.CHUNK, 3000, 1)):
        cuda_on_host.set_order(order)
        monkeypatch.setattr(cuda, "CHUNK", limit)
        found.append(
            [
                *comparison_and_gradients(case, "cuda", case.dtype),
                *loss_and_gradients(case, "cuda", case.dtype),
            ]
        )
    for other in found[1:]:
        for i, (x, y) in enumerate(zip(found[0], other, strict=True)):
            if i in (2, 5):  # dk: a sequence of several chunks of rows is summed in their order
                torch.testing.assert_close(x, y, rtol=2e-2, atol=1e-6)
            else:
                assert torch.equal(x, y)


BUGS: dict[str, Patch] = {
    "rows_of_the_next_sequence": (
        "policy/side.h", "load_global(common.cu_seqlens_q + n + 1)", "int32_t(common.num_rows)",
    ),
    "keys_from_the_first": ("policy/side.h", "kv_head, sample.first_key)", "kv_head, 0)"),
}  # fmt: skip


@pytest.mark.slow(stands_in="test_packed")
@pytest.mark.parametrize("patch", BUGS.values(), ids=BUGS)
def test_seeded_bug_is_found(patch: Patch, build_folder: Path) -> None:
    case = of_kernels(Packed())  # of the one kernel that FEWER leaves
    library = host_library(build_folder, (patch, *FEWER), DIVERGENCE)
    wanted = comparison_and_gradients(case, "reference", torch.float64)
    with on_host(library), pytest.raises(AssertionError):
        assert_alike(comparison_and_gradients(case, "cuda", case.dtype), wanted, 1e-3)
