"""The Triton kernels against an `AttentionTarget`: test_targets.py has the other backends.

Each case takes a second in the interpreter, so these are few and meet every kind, form and option.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import ral_kernels as rk
from ral_kernels.ops.divergence.arguments import KINDS
from ral_kernels.ops.policy import attention_divergence, attention_policy, ral_loss
from ral_kernels.ops.policy.triton import tiles as triton_tiles
from ral_kernels.runtime import triton_runtime
from tests.conftest import skip_or_fail
from tests.ops.packed_cases import PackedCase
from tests.ops.policy_cases import BY_NAME
from tests.ops.target_cases import dense, target_of
from tests.ops.test_policy import gradients, random_like
from tests.ops.test_policy_triton import LargestTensor
from tests.ops.test_targets import assert_equal, check_case, results

# No rows, one of each, blocks in both directions, no keys, more rows than keys; and a tail.
RAGGED = PackedCase(
    "ragged", ((0, 4), (1, 1), (66, 130), (3, 0), (9, 4)), tail=(3, 2), num_heads=2, num_kv_heads=1,
    head_dim=16,
)  # fmt: skip
PACKED = {
    "plain": RAGGED,
    "masks": replace(
        RAGGED, scope=True, rows=((0, 0), (0, 1), (3, 66), (2, 2), slice(-4, None)),
        options={"window": 40, "softcap": 2.0, "exclude_self": False},
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def triton_here() -> None:
    reason = rk.available_backends()["triton"]
    if reason != "yes":
        skip_or_fail("triton", reason)


FLOAT32, FLOAT16 = torch.float32, torch.float16
QUICK = (
    ("window_both", "sparse", "jsd", FLOAT32),
    ("rows_middle", "shared", "cross_entropy", FLOAT32),
)
SLOW = (
    ("length_2", "shared", "kl", FLOAT32),
    ("decode", "sparse", "cross_entropy", FLOAT32),
    ("gqa_7", "indexed", "reverse_kl", FLOAT32),
    ("layout_mixed", "scaled", "cross_entropy", FLOAT32),
    ("scope_batch", "scaled", "jsd", FLOAT32),
    ("padding_left", "indexed", "kl", FLOAT32),
    ("padding_right", "sparse", "reverse_kl", FLOAT16),
    ("softcap", "shared", "reverse_kl", FLOAT32),
    ("with_self", "indexed", "jsd", FLOAT32),
    ("not_causal", "scaled", "reverse_kl", FLOAT32),
    ("scope_nothing", "shared", "jsd", FLOAT32),
)


def slow(cases: Any, stands_in: str) -> list[Any]:
    mark = pytest.mark.slow(stands_in=stands_in)
    return [pytest.param(*case, marks=mark) for case in cases]


@pytest.mark.parametrize(
    ("case", "form", "kind", "dtype"), [*QUICK, *slow(SLOW, "test_against_a_target")]
)
def test_against_a_target(case: str, form: str, kind: str, dtype: torch.dtype) -> None:
    """Value and gradients against float64."""
    check_case(BY_NAME[case].inputs(dtype), form, kind, "triton")


@pytest.mark.slow(stands_in="test_against_a_target")
@pytest.mark.parametrize(
    ("case", "form", "kind"), [("together", "indexed", "kl"), ("window_both", "sparse", "jsd")]
)
def test_loss(case: str, form: str, kind: str) -> None:
    """Loss and gradients in one go."""
    check_case(BY_NAME[case].inputs(FLOAT32), form, kind, "triton", through_loss=True)


@pytest.mark.slow(stands_in="test_packed_targets_of_sequences")
@pytest.mark.parametrize("through_loss", [False, True], ids=["divergence", "loss"])
@pytest.mark.parametrize(
    ("case", "form", "kind"), [("plain", "sparse", "cross_entropy"), ("masks", "indexed", "jsd")]
)
def test_packed(case: str, form: str, kind: str, through_loss: bool) -> None:
    check_case(PACKED[case].inputs(FLOAT32), form, kind, "triton", through_loss)


@pytest.mark.parametrize(
    "sparse",
    [
        pytest.param(
            False, marks=pytest.mark.slow(stands_in="test_packed_targets_of_sequences"), id="dense"
        ),
        pytest.param(True, id="sparse"),
    ],
)
def test_packed_targets_of_sequences(sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default index where G = S, however sequences are grouped: equal bits."""
    inputs = RAGGED.inputs(FLOAT32)
    values = torch.rand(1, 5, inputs.k.shape[2], generator=torch.Generator().manual_seed(1)) + 0.1
    ids = torch.arange(values.shape[2]).expand(values.shape) if sparse else None
    target = rk.AttentionTarget(values, ids)
    call = (inputs.q, inputs.k, target, "jsd")
    wanted = attention_divergence(*call, backend="reference", **inputs.options)
    found = []
    for limit in (2**20, 3000):  # all sequences together, and groups of them
        monkeypatch.setattr(triton_tiles, "scratch_elements", lambda architecture, n=limit: n)
        found.append(attention_divergence(*call, backend="triton", **inputs.options))
    torch.testing.assert_close(found[0], wanted, rtol=1e-5, atol=1e-6)
    assert found[0].any() and all(torch.equal(x, found[0]) for x in found)


@pytest.mark.slow(stands_in="test_against_a_target")
def test_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and dq are the same in bits; dk is summed in another order."""
    inputs = BY_NAME["off_blocks"].inputs(FLOAT32).requires_grad_()
    target = target_of("indexed", inputs)
    found: list[list[Tensor]] = []
    for limit in (2**20, 1):
        monkeypatch.setattr(triton_tiles, "scratch_elements", lambda architecture, n=limit: n)
        found.append(results(inputs, target, "jsd", "triton"))
    (value, dq, dk, *_), (other_value, other_dq, other_dk, *_) = found
    assert torch.equal(value, other_value) and torch.equal(dq, other_dq)
    torch.testing.assert_close(dk, other_dk, rtol=1e-5, atol=1e-6)


@pytest.mark.slow(stands_in="test_against_a_target")
@pytest.mark.parametrize("kind", ["jsd", "reverse_kl"])
def test_sparse_and_dense_give_the_same_bits(kind: str) -> None:
    inputs = BY_NAME["window_both"].inputs(FLOAT32).requires_grad_()
    sparse = target_of("sparse", inputs)
    same = rk.AttentionTarget(dense(sparse, inputs.k.shape[2]), index=sparse.index)
    first = results(inputs, sparse, kind, "triton")
    assert first[0].any() and first[1].any()
    assert_equal(first, results(inputs, same, kind, "triton"))


@pytest.mark.parametrize(
    "kind", ["kl", *(pytest.param(kind, marks=pytest.mark.slow(
        stands_in="test_a_policy_that_equals_its_target_has_no_gradient")) for kind in KINDS
        if kind != "kl")],
)  # fmt: skip
def test_a_policy_that_equals_its_target_has_no_gradient(kind: str) -> None:
    inputs = BY_NAME["rows_middle"].inputs(FLOAT32).requires_grad_()
    call: dict[str, Any] = {**inputs.options, "backend": "triton"}
    p = attention_policy(inputs.q, inputs.k, **call).detach()
    target = rk.AttentionTarget(p, index=torch.arange(p.shape[1]).expand(p.shape[:2]))
    value = attention_divergence(inputs.q, inputs.k, target, kind, **call)
    assert bool(value.any()) == (kind == "cross_entropy")
    for gradient in gradients(value, inputs, random_like(value, 1)).values():
        assert not gradient.any()


@pytest.mark.slow(stands_in="test_against_a_target")
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_rows_without_a_target(sparse: bool) -> None:
    """An index of -1, no weight on valid keys, or next to none: 0 and no gradient, even of NaN."""
    inputs = BY_NAME["rows_middle"].inputs(FLOAT32).requires_grad_()  # rows at keys 58 to 64
    values = torch.rand(1, 3, 127, generator=torch.Generator().manual_seed(1)) + 0.1
    values[0, 1, :61] = 0.0
    values[0, 2] *= 1e-38
    ids = torch.arange(127).expand(1, 3, -1) if sparse else None
    index = torch.tensor([[0, 1, -1, 2, 1, 1, 0]])
    target = rk.AttentionTarget(values, ids, index=index)
    without = torch.tensor([[False, True, True, True, False, False, False]])
    call: dict[str, Any] = {**inputs.options, "backend": "triton"}
    value = attention_divergence(inputs.q, inputs.k, target, **call)
    assert torch.equal(value == 0, without)
    dvalue = torch.where(without, float("nan"), 1.0)
    dq, dk = torch.autograd.grad(value, (inputs.q, inputs.k), dvalue)
    assert dq.isfinite().all() and dk.isfinite().all()
    assert torch.equal(dq[:, :, 61:68].any(-1).any(1), ~without)


@pytest.mark.slow(stands_in="test_against_a_target")
@pytest.mark.parametrize("kind", ["kl", "cross_entropy"])
def test_infinite_rows(kind: str) -> None:
    """kl where the target lacks a key; cross_entropy where the policy puts no weight on one."""
    inputs = BY_NAME["rows_middle"].inputs(FLOAT32)
    call: dict[str, Any] = {**inputs.options, "backend": "triton"}
    values = torch.ones(1, 2, 127)
    if kind == "kl":
        values[:, 1, 3] = 0.0
    else:
        inputs.q.mul_(40)  # weights underflow
        values[:, 1] = attention_policy(inputs.q, inputs.k, **call)[:, 0] > 0
    inputs.requires_grad_()
    target = rk.AttentionTarget(values, index=torch.tensor([[1, 0, 0, 0, 0, 0, 0]]))
    value = attention_divergence(inputs.q, inputs.k, target, kind, **call)
    infinite = torch.tensor([kind == "kl"] + [kind != "kl"] * 6)
    assert torch.equal(value[0].isinf(), infinite)
    dvalue = torch.where(infinite, float("nan"), 1.0)[None]
    dq, dk = torch.autograd.grad(value, (inputs.q, inputs.k), dvalue)
    assert dq.isfinite().all() and dk.isfinite().all()
    assert torch.equal(dq[0, :, 61:68].any(-1).any(0), ~infinite)


# -- launches, which are counted and not run -------------------------------------------------------


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels of the launches on an H200."""
    found: list[str] = []
    monkeypatch.setattr(
        triton_runtime, "launch", lambda kernel, *args, **options: found.append(kernel.__name__)
    )
    monkeypatch.setattr(triton_runtime, "architecture", lambda device: "sm_90")
    return found


def test_rows_read_a_target_in_place(launches: list[str]) -> None:
    """No launch forms r, and none reads p and r back."""
    q, k = torch.empty(1, 4, 64, 16), torch.empty(1, 2, 512, 16)
    attention_divergence(q, k, rk.AttentionTarget(torch.ones(1, 1, 512)), backend="triton")
    assert launches == [
        "policy_statistics_kernel",
        "policy_normaliser_kernel",
        "policy_target_kernel",
        "policy_fwd_kernel",
        "policy_bwd_sums_kernel",
        "policy_bwd_rows_kernel",
    ]


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("through_loss", [False, True], ids=["divergence", "loss"])
def test_no_tensor_of_rows_times_keys(
    through_loss: bool, sparse: bool, launches: list[str]
) -> None:
    """With ids, every row may have a target of its own: no tensor of targets times keys either."""
    num_rows, seqlen_k = 2048, 16384
    q = torch.empty(2, 4, num_rows, 16, requires_grad=True)
    k = torch.empty(2, 2, seqlen_k, 16, requires_grad=True)
    values = torch.ones(2, num_rows, 4) if sparse else torch.ones(2, 3, seqlen_k)
    ids = torch.arange(4).expand(values.shape) if sparse else None
    index = torch.arange(num_rows).expand(2, -1) % values.shape[1]
    target = rk.AttentionTarget(values, ids, index=index)
    with LargestTensor() as largest:
        if through_loss:
            ral_loss(q, k, target, torch.ones(2), backend="triton").backward()
        else:
            attention_divergence(q, k, target, backend="triton").sum().backward()
    bound = max(triton_tiles.scratch_elements("sm_90"), 64 * seqlen_k)
    assert largest.numel <= bound < num_rows * seqlen_k / 3
    assert "divergence_fwd_kernel" not in launches
