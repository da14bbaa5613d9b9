"""Packed sequences in `attention_policy`, `attention_divergence` and `ral_loss`.

Each case meets float64 sequence by sequence, and the padded batch that it stands for.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ral_kernels.ops.divergence.arguments import KINDS
from ral_kernels.ops.policy import attention_divergence, attention_policy, ral_loss
from tests.ops.accuracy import assert_accurate, assert_gradient_accurate
from tests.ops.packed_cases import (
    BY_NAME,
    CASES,
    EMPTY,
    RAGGED,
    TOKEN_NAMES,
    PackedCase,
    PackedInputs,
)
from tests.ops.policy_eager import eager_divergence
from tests.ops.test_policy import (
    compact_floor,
    condition_of,
    gradients,
    magnitude_of,
    random_like,
)
from tests.ops.test_policy_divergence import snapshot_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_policy(case: PackedCase, dtype: torch.dtype, backend: str) -> None:
    inputs = case.inputs(dtype).requires_grad_()
    p = attention_policy(inputs.q, inputs.k, backend=backend, **inputs.options)
    exact, baseline = inputs.to(torch.float64), inputs.to(dtype)
    truth, lse = exact.requires_grad_().eager()
    upcast, _ = inputs.to(torch.float32).eager()
    assert p.dtype == torch.float32 and p.is_contiguous()
    condition = condition_of(lse)
    assert_accurate("p", p, truth, upcast, max(compact_floor(dtype), condition))
    assert not p[truth == 0].any(), "p must be exactly 0 on keys that are not valid"
    _check_gradients(p, inputs, truth, exact, baseline.requires_grad_().eager()[0], baseline,
        condition)  # fmt: skip


def _check_gradients(
    output: Tensor,
    inputs: PackedInputs,
    truth: Tensor,
    exact: PackedInputs,
    plain: Tensor,
    baseline: PackedInputs,
    condition: float,
) -> None:
    doutput = random_like(output, 1)
    true_grads = gradients(truth, exact, doutput)
    baseline_grads = gradients(plain, baseline, doutput)
    magnitude = magnitude_of(inputs, condition)
    for name, grad in gradients(output, inputs, doutput).items():
        assert grad.dtype == inputs.differentiable()[name].dtype
        assert_gradient_accurate(
            f"d{name}", grad, true_grads[name], baseline_grads[name], magnitude, condition
        )


def check_divergence(case: PackedCase, dtype: torch.dtype, backend: str, kind: str) -> None:
    inputs, other = case.inputs(dtype).requires_grad_(), case.snapshot_inputs(dtype)
    own = {k: v for k, v in inputs.options.items() if k in ("scope", "exclude_self", "spans")}
    other = PackedInputs(other.q, other.k, {**other.options, **own})
    snapshot = snapshot_of(other, **other.packing)
    value = attention_divergence(
        inputs.q, inputs.k, snapshot, kind, backend=backend, **inputs.options
    )
    found = []
    for kept in (torch.float64, torch.float32, dtype):
        x = inputs.to(kept).requires_grad_()
        p, lse = x.eager()
        r, reference_lse = other.to(kept).eager()
        found.append((eager_divergence(p, r, kind), x, lse, reference_lse))
    (truth, exact, lse, reference_lse), (upcast, *_), (plain, baseline, *_) = found
    condition = max(condition_of(lse), condition_of(reference_lse))
    assert_accurate("value", value, truth, upcast, max(compact_floor(dtype), condition))
    _check_gradients(value, inputs, truth, exact, plain, baseline, condition)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_policy(case: PackedCase, dtype: torch.dtype, packed_backend: str) -> None:
    check_policy(case, dtype, packed_backend)


@pytest.mark.parametrize("name", TOKEN_NAMES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
def test_divergence(name: str, kind: str, dtype: torch.dtype, packed_backend: str) -> None:
    check_divergence(BY_NAME[name], dtype, packed_backend, kind)


@pytest.mark.slow(stands_in="test_policy")
@pytest.mark.parametrize("threads", [3], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ["tail_with_rows", "many_short", "softcap", "span_bias"])
def test_cpu_variants(name: str, dtype: torch.dtype, isa: str, threads: int) -> None:
    check_policy(BY_NAME[name], dtype, "cpu")
    if name in TOKEN_NAMES:
        check_divergence(BY_NAME[name], dtype, "cpu", "jsd")


# -- the padded batch ------------------------------------------------------------------------------


def padded_batch(inputs: PackedInputs) -> tuple[Tensor, Tensor, Tensor, list[tuple[int, int]]]:
    """(q, k, key_padding_mask, [(sample, row) of each packed row]): all aligned to the end.

    Queries of a sample that has more of them than of keys come before its first key.
    """
    parts = inputs.sequences()
    longest_q = max(x.q.shape[2] for x in parts)
    longest_k = max(x.k.shape[2] for x in parts)

    def left(x: Tensor, length: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, 0, length - x.shape[2], 0))

    q = torch.cat([left(x.q, longest_q) for x in parts])
    k = torch.cat([left(x.k, longest_k) for x in parts])
    keys = torch.tensor([x.k.shape[2] for x in parts])
    mask = torch.arange(longest_k) >= longest_k - keys[:, None]
    rows = [
        (i, longest_q - x.q.shape[2] + row)
        for i, x in enumerate(parts)
        for row in range(x.q.shape[2])[x.rows]
    ]
    return q, k, mask, rows


@pytest.mark.parametrize("name", ["rows", "gqa_7", "window_both", "softcap"])
def test_same_as_the_padded_batch(name: str, packed_backend: str) -> None:
    """Values and gradients of the three functions, within 1e-6 in float32."""
    case = BY_NAME[name]
    inputs = case.inputs(torch.float32).requires_grad_()
    options = {**inputs.options, "backend": packed_backend}
    plain = {k: v for k, v in options.items() if k not in inputs.packing}
    q, k, mask, rows = padded_batch(inputs)
    sample, row = (torch.tensor(x) for x in zip(*rows, strict=True))
    other = case.snapshot_inputs(torch.float32)
    snapshot = snapshot_of(other, **other.packing)
    other_q, other_k, _, _ = padded_batch(other)
    padded_options = {k: v for k, v in other.options.items() if k not in other.packing}
    padded_snapshot = snapshot_of(PackedInputs(other_q, other_k, padded_options))
    advantages = random_like(torch.empty(len(case.lengths)), 3)
    plain["key_padding_mask"] = mask

    p = attention_policy(inputs.q, inputs.k, **options)
    padded_p = attention_policy(q, k, **plain)[sample, row]
    keys = mask.sum(-1)[sample]
    for t, n in enumerate(keys.tolist()):  # the last n columns, and 0 after the first n
        torch.testing.assert_close(p[0, t, :n], padded_p[t, p.shape[2] - n :], rtol=0, atol=1e-6)
        assert not p[0, t, n:].any()
    value = attention_divergence(inputs.q, inputs.k, snapshot, **options)
    padded_value = attention_divergence(q, k, padded_snapshot, **plain)[sample, row]
    torch.testing.assert_close(value[0], padded_value, rtol=0, atol=1e-6)
    chosen = torch.zeros(q.shape[0], q.shape[2], dtype=torch.bool)
    chosen[sample, row] = True
    for reduction in ("token_mean", "sequence_mean", "sum"):
        loss = ral_loss(inputs.q, inputs.k, snapshot, advantages, reduction=reduction, **options)
        padded_loss = ral_loss(q, k, padded_snapshot, advantages, chosen, reduction=reduction,
            **plain)  # fmt: skip
        torch.testing.assert_close(loss, padded_loss, rtol=1e-6, atol=1e-6)
        got, wanted = (
            torch.autograd.grad(x, (inputs.q, inputs.k), retain_graph=True)
            for x in (loss, padded_loss)
        )
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
            assert a.any()


# -- exact zeros -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tail_with_rows", "many_short", "gqa_7", "softcap", "scope"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
def test_unchanged_policy_is_exactly_zero(
    name: str, kind: str, dtype: torch.dtype, packed_backend: str
) -> None:
    inputs = BY_NAME[name].inputs(dtype).requires_grad_()
    snapshot = snapshot_of(inputs, **inputs.packing)
    options = {**inputs.options, "kind": kind, "backend": packed_backend}
    value = attention_divergence(inputs.q, inputs.k, snapshot, **options)
    loss = ral_loss(inputs.q, inputs.k, snapshot, random_like(value, 2), **options)
    for result, weight in ((value, random_like(value, 1)), (loss, torch.tensor(0.5))):
        assert kind == "cross_entropy" or not result.any()
        for gradient in torch.autograd.grad(result, (inputs.q, inputs.k), weight):
            assert not gradient.any()


def test_unchanged_policy_over_spans_is_exactly_zero(packed_backend: str) -> None:
    inputs = BY_NAME["span_bias"].inputs(torch.float32).requires_grad_()
    snapshot = snapshot_of(inputs, span_bias=inputs.options["span_bias"], **inputs.packing)
    call = (inputs.q, inputs.k, snapshot)
    value = attention_divergence(*call, backend=packed_backend, **inputs.options)
    assert not value.any()
    clean = {k: v for k, v in inputs.options.items() if k != "span_bias"}
    assert attention_divergence(*call, backend=packed_backend, **clean).max() > 0.01


def test_tokens_after_the_last_offset_are_never_read(packed_backend: str) -> None:
    """NaN there reaches neither results nor gradients, which are 0 at these tokens."""

    def run(poison: float) -> list[Tensor]:
        inputs = BY_NAME["tail"].inputs(torch.float32)
        inputs.q[:, :, -3:] = poison
        inputs.k[:, :, -7:] = poison
        inputs.requires_grad_()
        options = {**inputs.options, "backend": packed_backend}
        other = BY_NAME["tail"].snapshot_inputs(torch.float32)
        other.q[:, :, -3:] = poison
        other.k[:, :, -7:] = poison
        snapshot = snapshot_of(other, **other.packing)
        p = attention_policy(inputs.q, inputs.k, **options)
        value = attention_divergence(inputs.q, inputs.k, snapshot, **options)
        advantages = random_like(torch.empty(1, value.shape[1]), 4)
        advantages[:, -3:] = poison
        loss = ral_loss(inputs.q, inputs.k, snapshot, advantages, **options)
        both = (inputs.q, inputs.k)
        return [
            p, value, loss, *torch.autograd.grad(p, both, random_like(p, 1)),
            *torch.autograd.grad(value, both, random_like(value, 2)),
            *torch.autograd.grad(loss, both),
        ]  # fmt: skip

    clean = run(0.0)
    for wanted, got in zip(clean, run(float("nan")), strict=True):
        assert torch.equal(wanted, got)
    p, value, _, *grads = clean
    assert not p[:, -3:].any() and not value[:, -3:].any() and value.any()
    for dq, dk in zip(grads[::2], grads[1::2], strict=True):
        assert not dq[:, :, -3:].any() and dq.any()
        assert not dk[:, :, -7:].any() and dk.any()


@pytest.mark.parametrize("case", EMPTY, ids=lambda case: case.name)
def test_calls_without_work(case: PackedCase, packed_backend: str) -> None:
    """Zeros, and zero gradients, also of a loss."""
    inputs = case.inputs(torch.float32).requires_grad_()
    both, options = (inputs.q, inputs.k), {**inputs.options, "backend": packed_backend}
    p = attention_policy(*both, **options)
    assert p.shape == (1, inputs.q.shape[2], max([n for _, n in case.lengths], default=0))
    snapshot = snapshot_of(inputs, **inputs.packing)
    results = [p, attention_divergence(*both, snapshot, **options)]
    for reduction in ("token_mean", "sequence_mean", "sum"):
        advantages = torch.ones(len(case.lengths))
        results.append(ral_loss(*both, snapshot, advantages, reduction=reduction, **options))
    for result in results:
        assert not result.any()
        for gradient in torch.autograd.grad(result.sum(), both):
            assert not gradient.any() and gradient.isfinite().all()


# -- the loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["snapshot", "dense", "spans"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum"])
def test_loss(reduction: str, per_row: bool, masked: bool, form: str, packed_backend: str) -> None:
    """Formed by hand from the divergence: advantages and masks by sequence and by row."""
    case = BY_NAME["tail" if form != "spans" else "spans"]
    inputs = case.inputs(torch.float32).requires_grad_()
    options = {**inputs.options, "backend": packed_backend}
    other = case.snapshot_inputs(torch.float32)
    reference: Any = snapshot_of(other, **other.packing)
    if form == "dense":
        reference = attention_policy(other.q, other.k, backend=packed_backend, **other.options)
        assert reference.shape == (1, inputs.q.shape[2], 127)
    counts = [t for t, _ in case.lengths]
    rows = inputs.q.shape[2]
    by_sequence = random_like(torch.empty(len(counts)), 5)
    advantages = random_like(torch.empty(1, rows), 6) if per_row else by_sequence
    mask = torch.rand(1, rows, generator=torch.Generator().manual_seed(7)) < 0.5
    mask[:, :5] = False  # the first sequence has no token
    loss = ral_loss(inputs.q, inputs.k, reference, advantages, mask if masked else None,
        reduction=reduction, **options)  # fmt: skip

    value = attention_divergence(inputs.q, inputs.k, reference, **options)[0]
    sums, tokens, at = [], [], 0
    for count, a in zip(counts, by_sequence.tolist(), strict=True):
        own = slice(at, at + count)
        weight = advantages[0, own] if per_row else torch.full((count,), a)
        counted = mask[0, own] if masked else torch.ones(count, dtype=torch.bool)
        sums.append((value[own] * weight * counted).sum())
        tokens.append(int(counted.sum()))
        at += count
    if reduction == "sequence_mean":
        used = [s / n for s, n in zip(sums, tokens, strict=True) if n]
        wanted = torch.stack(used).mean()
    else:
        wanted = torch.stack(sums).sum() / (sum(tokens) if reduction == "token_mean" else 1)
    assert loss.shape == () and loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted)
    got, expected = (
        torch.autograd.grad(x, (inputs.q, inputs.k), retain_graph=True) for x in (loss, wanted)
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_snapshot_keeps_its_normalisers(packed_backend: str) -> None:
    """The second comparison gives the same bits, with the soft cap that makes the cpu read them."""
    inputs = BY_NAME["softcap"].inputs(torch.float32).requires_grad_()
    other = BY_NAME["softcap"].snapshot_inputs(torch.float32)
    kept = snapshot_of(other, **other.packing)
    advantages = random_like(torch.empty(len(RAGGED)), 3)
    found = []
    for reference in (kept, kept, kept.to(kept.device)):
        loss = ral_loss(inputs.q, inputs.k, reference, advantages, backend=packed_backend,
            **inputs.options)  # fmt: skip
        found.append((loss, *torch.autograd.grad(loss, (inputs.q, inputs.k))))
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))
