"""What runs the ops' tests on a GPU, tested without one: layouts are kept, results come back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import ral_kernels as rk
from ral_kernels.ops.attention.arguments import AttentionArgs
from ral_kernels.runtime import backends
from tests.gpu.on_gpu import copy_to, kernels_on
from tests.ops.attention_cases import BY_NAME

META = torch.device("meta")
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: x.transpose(1, 2),
        lambda x: x[:, 1:, ::2, 3:],
        lambda x: x[:1].expand(4, -1, -1, -1),
        lambda x: x[:, :0],
        lambda x: x[0, 0, 0, 5],
        lambda x: x.long(),
        lambda x: x > 0,
    ],
)
def test_copies_keep_layout_and_values(make: Any) -> None:
    tensor = make(torch.randn(4, 3, 5, 7))
    copy = copy_to(tensor, CPU)
    assert torch.equal(copy, tensor) and copy.dtype == tensor.dtype
    assert copy.stride() == tensor.stride()
    assert copy.storage_offset() == tensor.storage_offset() % 64
    if tensor.numel():
        assert copy.data_ptr() != tensor.data_ptr()


def test_gaps_hold_nan() -> None:
    inputs = BY_NAME["layout_strided"].inputs(torch.float32)
    copy = copy_to(inputs.q, CPU)
    memory = torch.as_strided(copy, (copy.untyped_storage().nbytes() // 4,), (1,), 0)
    assert int((~memory.isnan()).sum()) == inputs.q.numel()


def test_kernels_get_tensors_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in and beside the arguments; what was written there is copied back."""
    seen: list[torch.device] = []

    def fwd(args: AttentionArgs, out: Tensor, scale: float, missing: Tensor | None) -> None:
        seen.extend([args.q.device, args.k.device, out.device])
        assert missing is None

    module = SimpleNamespace(
        fwd=fwd,
        can_run=lambda args: str(args.q.device),
        available=lambda: None,
        only_on_request=lambda: None,
    )
    monkeypatch.setitem(backends._tables, "a test", {"triton": module})
    inputs = BY_NAME["mha"].inputs(torch.float32)
    args = AttentionArgs(
        inputs.q, inputs.k, inputs.k, None, None, None, None, None, None, 0, 1.0, -1, -1, False,
        0.0, 0, 61,
    )  # fmt: skip
    with kernels_on(META, "triton"):
        assert module.can_run(args) == "meta"
        with pytest.raises(NotImplementedError):  # nothing comes back from meta tensors
            module.fwd(args, torch.zeros(3), 1.0, None)
    assert seen == [META] * 3
    assert module.can_run(args) == "cpu"

    def fill(args: AttentionArgs, out: Tensor, expanded: Tensor) -> None:
        assert out.data_ptr() != target.data_ptr()
        out.fill_(7)

    module.fwd = fill
    target, expanded = torch.zeros(5, 3).t(), torch.zeros(1).expand(4)
    device = torch.device("cpu", 0)  # another name of the CPU: tensors are copied to it
    with kernels_on(device, "triton"):
        module.fwd(args, target, expanded)
    assert torch.equal(target, torch.full((3, 5), 7.0)) and not expanded.any()


@pytest.mark.parametrize("name", ["unsorted_spans", "layout_mixed", "rows_middle"])
def test_a_backend_gives_the_same_through_copies(name: str) -> None:
    def run() -> list[Tensor]:
        inputs = BY_NAME[name].inputs(torch.float32).requires_grad_()
        result = rk.attention(
            inputs.q, inputs.k, inputs.v, inputs.spans, backend="reference", **inputs.options
        )
        loss = result.out.square().sum() + result.lse.sum()
        return [result.out, *torch.autograd.grad(loss, [inputs.q, inputs.k, inputs.v])]

    here = run()
    with kernels_on(torch.device("cpu", 0), "reference"):
        there = run()
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
