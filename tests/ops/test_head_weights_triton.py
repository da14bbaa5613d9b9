"""`head_weights` in the Triton kernels: test_head_weights.py has the other backends.

Each check takes seconds in the interpreter, so these are few.
"""

from __future__ import annotations

import pytest
import torch

import ral_kernels as rk
from ral_kernels.ops.policy import attention_divergence, ral_loss
from ral_kernels.ops.policy.triton import tiles as triton_tiles
from ral_kernels.snapshot import AttentionSnapshot
from tests.conftest import skip_or_fail
from tests.ops import test_head_weights as checks
from tests.ops.packed_cases import WEIGHTED as PACKED
from tests.ops.policy_cases import BY_NAME, WEIGHTED_CASES, WEIGHTED_SPAN_CASES
from tests.ops.test_policy import check_case
from tests.ops.test_policy_divergence import check_case as check_divergence
from tests.ops.test_policy_packed import check_policy as check_packed_policy

NAMES = [case.name for case in WEIGHTED_CASES + WEIGHTED_SPAN_CASES]
SLOW = pytest.mark.slow(stands_in="test_policy")
FLOAT32 = torch.float32


@pytest.fixture(autouse=True)
def triton_here() -> None:
    reason = rk.available_backends()["triton"]
    if reason != "yes":
        skip_or_fail("triton", reason)


@pytest.mark.parametrize(
    "name",
    [name if name == "weights_span_bias" else pytest.param(name, marks=SLOW) for name in NAMES],
)
def test_policy(name: str) -> None:
    """p and every gradient against float64."""
    check_case(BY_NAME[name], FLOAT32, "triton")


@pytest.mark.slow(stands_in="test_loss_of_samples_and_sequences")
def test_divergence() -> None:
    """From a snapshot of another model, with weights of its own; heads of weight 0."""
    check_divergence(BY_NAME["weights_zeros"], FLOAT32, "triton", "jsd", other_model=True)


@pytest.mark.slow(stands_in="test_loss_of_samples_and_sequences")
@pytest.mark.parametrize("index", [1, 3])
def test_packed(index: int) -> None:
    check_packed_policy(PACKED[index], FLOAT32, "triton")


@pytest.mark.slow(stands_in="test_policy")
def test_against_a_target() -> None:
    checks.test_against_a_target("sparse", "triton")


OTHERS = pytest.mark.slow(stands_in="test_loss_of_samples_and_sequences")


@pytest.mark.parametrize(
    ("packed", "limit"),
    [
        (True, 2**20),
        *(pytest.param(*x, marks=OTHERS) for x in ((True, 1), (False, 3000), (False, 1))),
    ],
)
def test_loss_of_samples_and_sequences(
    packed: bool, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples with weights of their own, padded and packed, however rows are cut into chunks.

    Rows are more than a chunk, and keys more than a block.
    """
    monkeypatch.setattr(triton_tiles, "scratch_elements", lambda architecture: limit)
    generator = torch.Generator().manual_seed(3)

    def drawn(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(2, heads, tokens, 16, generator=generator)

    q, k, other = drawn(2, 70), drawn(1, 140), drawn(3, 70)
    weights = torch.tensor([[0.0, 2.0], [1.0, 3.0]])
    own = torch.tensor([[1.0, 0.0, 2.0], [3.0, 1.0, 1.0]])
    advantages = torch.tensor([1.0, -2.0])
    offsets = {
        "cu_seqlens_q": torch.tensor([0, 70, 140], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 140, 280], dtype=torch.int32),
    }

    def run(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        tensors = [x.to(dtype) for x in (q, k, other)]
        if packed:
            tensors = [x.transpose(0, 1).flatten(1, 2)[None] for x in tensors]
        leaves = [x.clone().requires_grad_() for x in (*tensors[:2], weights.to(dtype))]
        options = offsets if packed else {}
        snapshot = AttentionSnapshot(
            tensors[2], tensors[1] * 0.5, head_weights=own.to(dtype), **options
        )
        loss = ral_loss(
            *leaves[:2], snapshot, advantages, head_weights=leaves[2], backend=backend, **options
        )
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    found = run("triton", FLOAT32)
    for i, (x, y) in enumerate(zip(found, run("reference", torch.float64), strict=True)):
        error, size = float((x - y).abs().max()), float(y.abs().max())
        assert size > 0 and error <= 1e-5 * size, f"result {i}: {error} of {size}"


def test_unchanged_policy_is_exactly_zero() -> None:
    """With learned weights, by the divergence's own backward and by the loss."""
    inputs = BY_NAME["weights_wide"].inputs(FLOAT32).requires_grad_()
    snapshot = AttentionSnapshot(inputs.q, inputs.k)
    call = (inputs.q, inputs.k, snapshot)
    options = {**inputs.options, "backend": "triton"}
    value = attention_divergence(*call, "kl", **options)
    loss = ral_loss(*call, torch.ones(1), **options)
    assert not value.any() and not loss.any()
    tensors = list(inputs.differentiable().values())
    for x in (*torch.autograd.grad(value.sum(), tensors), *torch.autograd.grad(loss, tensors)):
        assert not x.any()


@pytest.mark.slow(stands_in="test_policy")
def test_a_head_of_weight_0_has_a_gradient() -> None:
    checks.test_a_head_of_weight_0_has_a_gradient("triton")


@pytest.mark.slow(stands_in="test_policy")
def test_a_single_head() -> None:
    checks.test_a_single_head("triton")
