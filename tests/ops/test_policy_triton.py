"""What only the Triton backend of `policy` and `policy_divergence` has: bounded scratch, tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ral_kernels as rk
from ral_kernels.ops.policy import attention_divergence, attention_policy, ral_loss
from ral_kernels.ops.policy.triton import tiles as triton_tiles
from ral_kernels.runtime import triton_runtime
from ral_kernels.snapshot import AttentionSnapshot
from tests.conftest import skip_or_fail
from tests.ops.policy_cases import BY_NAME


@pytest.fixture(autouse=True)
def triton_here() -> None:
    reason = rk.available_backends()["triton"]
    if reason != "yes":
        skip_or_fail("triton", reason)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that an operator made."""

    numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and "view" not in func.name() and "expand" not in func.name():
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("objective", ["divergence", "loss", "spans"])
def test_no_tensor_of_rows_times_keys(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches on an H200 are counted, and not run."""
    monkeypatch.setattr(triton_runtime, "launch", lambda *args, **kwargs: None)
    monkeypatch.setattr(triton_runtime, "architecture", lambda device: "sm_90")
    num_rows, seqlen_k, heads = 2048, 16384, 4
    q = torch.empty(2, heads, num_rows, 16, requires_grad=True)
    k = torch.empty(2, 2, seqlen_k, 16, requires_grad=True)
    with LargestTensor() as largest:
        if objective == "spans":
            spans = rk.Spans.from_lengths([128] * (seqlen_k // 128))
            attention_policy(q, k, spans=spans, backend="triton").sum().backward()
        elif objective == "loss":
            ral_loss(q, k, AttentionSnapshot(q, k), torch.ones(2), backend="triton").backward()
        else:
            snapshot = AttentionSnapshot(q, k)
            attention_divergence(q, k, snapshot, backend="triton").sum().backward()
    bound = max(triton_tiles.scratch_elements("sm_90"), 64 * seqlen_k)
    assert largest.numel <= bound < num_rows * seqlen_k / 3


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -1e30])
def test_padding_keys_may_hold_anything(poison: float) -> None:
    inputs = BY_NAME["padding_right"].inputs(torch.float32)
    hidden = ~inputs.options["key_padding_mask"][:, None, :, None]

    def run(k: Tensor) -> list[Tensor]:
        leaves = (inputs.q.detach().requires_grad_(), k.requires_grad_())
        snapshot = AttentionSnapshot(inputs.q * 0.5, k)
        p = attention_policy(*leaves, backend="triton", **inputs.options)
        value = attention_divergence(*leaves, snapshot, backend="triton", **inputs.options)
        return [p, value, *torch.autograd.grad(p.square().sum() + value.sum(), leaves)]

    for a, b in zip(run(inputs.k.clone()), run(inputs.k.masked_fill(hidden, poison)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("architecture", triton_runtime.ARCHITECTURES)
@pytest.mark.parametrize("dtype", triton_runtime.DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("heavy", [False, True])
def test_every_kernel_has_a_tile(architecture: str, dtype: torch.dtype, heavy: bool) -> None:
    for kernel in triton_tiles.KERNELS:
        if kernel == "bias" and not heavy:
            continue  # its gradient comes with a bias
        for head_dim in (16, 32, 64, 128, 256):
            tile = triton_tiles.tile(kernel, architecture, dtype, head_dim, heavy)
            # wgmma and tcgen05 multiply 64 rows at least, mma.sync of sm_80 16
            least = 16 if architecture == "sm_80" else 64
            assert (tile.block_k if kernel == "dk" else tile.block_q) >= least
