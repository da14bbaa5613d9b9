"""Packed sequences in the CUDA kernels of `policy_divergence`, run by the harness."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ral_kernels.ops.policy import cuda
from tests.cuda_host.backend import POLICY, Kernels, host_library, on_host
from tests.cuda_host.build import Patch
from tests.cuda_host.test_seeded_bugs import FEWER
from tests.ops.packed_cases import PackedCase
from tests.ops.test_policy_packed_kernels import (
    CHOSEN,
    RAGGED,
    RUNS,
    assert_alike,
    check_unchanged,
    run_divergence,
    run_loss,
)

CASE = replace(RAGGED, head_dim=64)
CASES: dict[str, tuple[PackedCase, torch.dtype]] = {
    "causal": (CASE, torch.bfloat16),
    "not_causal": (
        replace(CASE, options={"is_causal": False, "exclude_self": False}), torch.float16,
    ),
    "window": (replace(CASE, head_dim=128, options={"window": 20}), torch.float16),
    "scope_rows": (replace(CASE, head_dim=128, scope=True, rows=CHOSEN), torch.bfloat16),
    "in_pieces": (replace(CASE, lengths=((5, 1100), (3, 40), (0, 7))), torch.float16),  # of 512
}  # fmt: skip


SLOW = pytest.mark.slow(stands_in="test_packed")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(*each, id=name, marks=() if name in ("causal", "scope_rows") else SLOW)
        for name, each in CASES.items()
    ],
)
@pytest.mark.parametrize("run", ["divergence", "loss"])
def test_packed(run: str, case: PackedCase, dtype: torch.dtype, cuda_on_host: Kernels) -> None:
    """Value and gradients against the reference in float64."""
    found, wanted = (RUNS[run](case, dtype, backend) for backend in ("cuda", "reference"))
    assert_alike(found, wanted)
    assert sum(cuda_on_host.calls.values()) > 0


@pytest.mark.parametrize(
    "limit", [pytest.param(cuda.CHUNK, marks=SLOW), pytest.param(3000, marks=SLOW), 1]
)
def test_unchanged_policy_is_exactly_zero(
    limit: int, cuda_on_host: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "CHUNK", limit)
    check_unchanged(CASE, torch.float16, "cuda")


@SLOW
def test_parts_and_orders_of_threads(
    cuda_on_host: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences all together, in groups, and each by itself in chunks of its rows."""
    found: list[list[Tensor]] = []
    for order, limit in enumerate((cuda.CHUNK, 3000, 1)):
        cuda_on_host.set_order(order)
        monkeypatch.setattr(cuda, "CHUNK", limit)
        found.append(
            [x for run in (run_divergence, run_loss) for x in run(CASE, torch.bfloat16, "cuda")]
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
    "keys_from_the_first": ("policy/side.h", "b, kv_head, first_token)", "b, kv_head, 0)"),
}  # fmt: skip


@pytest.mark.slow(stands_in="test_packed")
@pytest.mark.parametrize("patch", BUGS.values(), ids=BUGS)
def test_seeded_bug_is_found(patch: Patch, build_folder: Path) -> None:
    # float16 and head dim 64 are what FEWER leaves
    library = host_library(build_folder, (patch, *FEWER), POLICY)
    wanted = run_divergence(CASE, torch.float16, "reference")
    with on_host(library), pytest.raises(AssertionError):
        assert_alike(run_divergence(CASE, torch.float16, "cuda"), wanted)
