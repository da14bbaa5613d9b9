"""`attention_divergence` and `ral_loss` at the reference, exactly zero, and close to it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ral_kernels.ops.divergence.arguments import KINDS
from ral_kernels.ops.policy import attention_divergence, ral_loss
from ral_kernels.snapshot import AttentionSnapshot
from tests.ops.attention_cases import AttentionCase
from tests.ops.policy_cases import BY_NAME, FEW, PolicyCase, PolicyInputs, snapshot_inputs
from tests.ops.policy_eager import eager_divergence, eager_policy
from tests.ops.test_policy import gradients, random_like
from tests.ops.test_policy_divergence import DTYPES, relative_error, snapshot_of

ZERO_CASES = ("whole_sequence", "off_blocks", "gqa_7", "layout_bthd", "layout_strided",
    "rows_middle", "scope_batch", "padding_left", "padding_everything", "window_causal", "softcap",
    "with_self", "large_scores", "peaked_on_self", "together")  # fmt: skip


def assert_exactly_zero(value: Tensor, inputs: PolicyInputs, kind: str = "jsd") -> None:
    """The gradient, and the value of a kind that is a distance."""
    distance = torch.zeros_like(value) if kind == "cross_entropy" else value
    assert torch.equal(distance, torch.zeros_like(value)), f"largest {float(value.abs().max())}"
    for gradient in gradients(value, inputs, random_like(value, 1)).values():
        assert not gradient.any(), f"largest gradient {float(gradient.abs().max())}"


def check_unchanged(case: PolicyCase, kind: str, dtype: torch.dtype, backend: str) -> None:
    inputs = case.inputs(dtype).requires_grad_()
    snapshot = snapshot_of(inputs)
    value = attention_divergence(
        inputs.q, inputs.k, snapshot, kind, backend=backend, **inputs.options
    )
    assert_exactly_zero(value, inputs, kind)
    loss = ral_loss(
        inputs.q,
        inputs.k,
        snapshot,
        random_like(value, 2),
        kind=kind,
        backend=backend,
        **inputs.options,
    )
    assert_exactly_zero(loss, inputs, kind)


@pytest.mark.parametrize("name", ZERO_CASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.in_interpreter(
    when=lambda name, kind, dtype: (kind == "jsd" and dtype == torch.float32) or name in FEW[1:3]
)
def test_unchanged_policy_is_exactly_zero(
    name: str, kind: str, dtype: torch.dtype, backend: str
) -> None:
    check_unchanged(BY_NAME[name], kind, dtype, backend)


@pytest.mark.parametrize("name", ["spans_equal", "spans_unsorted", "spans_gaps", "spans_batch",
    "span_bias_full", "spans_wider_scope", "spans_padding"])  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.in_interpreter(when=lambda name, kind: kind == "jsd" or name in FEW)
def test_unchanged_policy_over_spans_is_exactly_zero(
    name: str, kind: str, dtype: torch.dtype, backend: str
) -> None:
    inputs = BY_NAME[name].inputs(dtype).requires_grad_()
    bias = inputs.options.get("span_bias")
    snapshot = snapshot_of(inputs, span_bias=bias)
    value = attention_divergence(
        inputs.q, inputs.k, snapshot, kind, backend=backend, **inputs.options
    )
    assert_exactly_zero(value, inputs, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", [1, 40, 61])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.in_interpreter(when=lambda kind, prefix: kind == "jsd" or prefix == 40)
def test_shared_prefix_is_exactly_zero(
    kind: str, prefix: int, dtype: torch.dtype, backend: str
) -> None:
    """Also after the batch was shuffled, split and joined, from other storage."""
    inputs = BY_NAME["padding_left"].inputs(dtype)
    order = torch.tensor([1, 0, 0, 2, 2, 1])
    q = random_like(torch.empty(6, 2, 61, 32), 5).to(dtype).requires_grad_()
    k = inputs.k.repeat_interleave(2, dim=0)
    k[:, :, prefix:] = random_like(k[:, :, prefix:], 6).to(dtype)
    k.requires_grad_()
    snapshot = AttentionSnapshot(q, k, group_size=2, shared_prefix=prefix)
    value = attention_divergence(q, k, snapshot, kind, backend=backend)
    assert_exactly_zero(value, PolicyInputs(q, k, {}), kind)
    pieces = AttentionSnapshot.cat([snapshot[order[:4]], snapshot[order[4:]]])
    taken = PolicyInputs(q.detach()[order].requires_grad_(), k.detach()[order].requires_grad_(), {})
    value = attention_divergence(taken.q, taken.k, pieces, kind, backend=backend)
    assert_exactly_zero(value, taken, kind)


def test_shared_prefix_gives_the_same_bits(backend: str) -> None:
    inputs = BY_NAME["whole_sequence"].inputs(torch.float32).requires_grad_()
    other = snapshot_inputs(BY_NAME["whole_sequence"], inputs, False)
    k = other.k.clone()
    k[1, :, :30] = k[0, :, :30]
    plain = AttentionSnapshot(other.q, k)
    shared = AttentionSnapshot(other.q, k, group_size=2, shared_prefix=30)
    assert shared.nbytes < plain.nbytes
    values = [attention_divergence(inputs.q, inputs.k, s, backend=backend) for s in (plain, shared)]
    assert torch.equal(*values)
    grads = [torch.autograd.grad(v.sum(), (inputs.q, inputs.k)) for v in values]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.in_interpreter(when=lambda: False)  # bfloat16
def test_autocast(backend: str) -> None:
    """Exact zeros also under autocast, which turns q and k into its dtype on both sides."""
    q, k = torch.randn(1, 2, 40, 16, requires_grad=True), torch.randn(1, 1, 40, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        snapshot = AttentionSnapshot(q, k)
        value = attention_divergence(q, k, snapshot, backend=backend)
    assert snapshot.dtype == torch.bfloat16
    assert_exactly_zero(value, PolicyInputs(q, k.requires_grad_(), {}))


# -- near the reference ----------------------------------------------------------------------------


def nearby(dtype: torch.dtype, distance: float = 1e-3) -> tuple[PolicyInputs, PolicyInputs]:
    """A policy, and a reference whose probabilities differ from it by about `distance`.

    In half precision the inputs are not rounded again after the step: a few of their elements move
    by an ulp or two, such that p moves by `distance` in the root mean square.
    """
    case = PolicyCase(AttentionCase("", 64, 300, num_heads=8, num_kv_heads=2, head_dim=64))
    now = case.inputs(dtype)
    generator = torch.Generator().manual_seed(11)
    if dtype == torch.float32:
        step = distance * torch.randn(now.q.shape, generator=generator)
        return now, PolicyInputs(now.q + step, now.k, now.options)
    ulps = torch.where(torch.rand(now.q.shape, generator=generator) < 0.02, 1.0, 0.0)
    q = now.q * (1 + torch.finfo(dtype).eps * ulps).to(dtype)
    return now, PolicyInputs(q, now.k, now.options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
def test_near_the_reference(kind: str, dtype: torch.dtype, backend: str) -> None:
    check_near(kind, dtype, backend, backend)


def check_near(kind: str, dtype: torch.dtype, backend: str, dense_backend: str) -> None:
    """1e-3 apart: the snapshot's gradient is right where one against bfloat16 rows is noise."""
    now, old = nearby(dtype)
    now.requires_grad_()
    value = attention_divergence(now.q, now.k, snapshot_of(old), kind, backend=backend)
    exact = now.to(torch.float64).requires_grad_()
    r, _ = eager_policy(old.to(torch.float64))
    truth = eager_divergence(eager_policy(exact)[0], r, kind)
    ratio = (eager_policy(exact)[0].detach() / r).nan_to_num(1.0) - 1
    assert 2e-4 < float(ratio.square().mean().sqrt()) < 5e-3, "the test's own premise"
    assert relative_error(value.detach(), truth.detach()) < 2e-3

    dvalue = random_like(value, 1)
    grads = gradients(value, now, dvalue)
    true_grads = gradients(truth, exact, dvalue.double())
    dense = attention_divergence(now.q, now.k, r.bfloat16(), kind, backend=dense_backend)
    dense_grads = gradients(dense, now, dvalue)
    bound = 2e-3 if dtype == torch.float32 else 5e-3  # gradients are rounded to bfloat16: 2e-3
    for name, grad in grads.items():
        error = relative_error(grad, true_grads[name])
        assert error < bound, f"d{name}: relative error {error:.1e}"
        noise = relative_error(dense_grads[name], true_grads[name])
        assert noise > 20 * error, f"d{name}: {noise:.1e} against bfloat16 rows, {error:.1e}"
