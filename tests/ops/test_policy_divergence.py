"""`attention_divergence` and `ral_loss`: values, gradients, references, reductions, masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ral_kernels as rk
from ral_kernels.ops.divergence import divergence
from ral_kernels.ops.divergence.arguments import KINDS
from ral_kernels.ops.policy import attention_divergence, attention_policy, ral_loss
from ral_kernels.ops.policy import divergence as divergence_module
from ral_kernels.snapshot import AttentionSnapshot
from tests.ops.accuracy import assert_accurate, assert_gradient_accurate, floor_of
from tests.ops.attention_cases import AttentionCase
from tests.ops.policy_cases import (
    BY_NAME,
    FEW,
    TOKEN_CASES,
    PolicyCase,
    PolicyInputs,
    snapshot_inputs,
)
from tests.ops.policy_eager import eager_divergence, eager_policy
from tests.ops.test_policy import (
    compact_floor,
    condition_of,
    gradients,
    magnitude_of,
    random_like,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SNAPSHOT_OPTIONS = (  # a snapshot's own
    "rows", "is_causal", "scale", "window", "softcap", "head_weights",
)  # fmt: skip


def snapshot_of(inputs: PolicyInputs, **more: Any) -> AttentionSnapshot:
    options = {name: x for name, x in inputs.options.items() if name in SNAPSHOT_OPTIONS}
    return AttentionSnapshot(inputs.q, inputs.k, **{**options, **more})


def relative_error(x: Tensor, truth: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.double() - truth) / torch.linalg.vector_norm(truth))


def check_case(
    case: PolicyCase,
    dtype: torch.dtype,
    backend: str,
    kind: str,
    other_model: bool,
    other_head_dim: int = 20,
) -> None:
    inputs = case.inputs(dtype).requires_grad_()
    other = snapshot_inputs(case, inputs, other_model, other_head_dim)
    value = attention_divergence(
        inputs.q, inputs.k, snapshot_of(other), kind, backend=backend, **inputs.options
    )
    assert value.dtype == torch.float32

    exact = inputs.to(torch.float64).requires_grad_()
    p, lse = eager_policy(exact)
    r, reference_lse = eager_policy(other.to(torch.float64))
    truth = eager_divergence(p, r, kind)
    upcast_r, _ = eager_policy(other.to(torch.float32))
    upcast = eager_divergence(eager_policy(inputs.to(torch.float32))[0], upcast_r, kind)
    baseline_inputs = inputs.to(dtype).requires_grad_()
    baseline_r, _ = eager_policy(other.to(dtype))
    baseline = eager_divergence(eager_policy(baseline_inputs)[0], baseline_r, kind)

    condition = max(condition_of(lse), condition_of(reference_lse))
    assert_accurate("value", value, truth, upcast, max(compact_floor(dtype), condition))
    dvalue = random_like(value, 1)
    grads = gradients(value, inputs, dvalue)
    true_grads = gradients(truth, exact, dvalue)
    baseline_grads = gradients(baseline, baseline_inputs, dvalue)
    magnitude = magnitude_of(inputs, condition)
    for name, grad in grads.items():
        assert_gradient_accurate(
            f"d{name}", grad, true_grads[name], baseline_grads[name], magnitude, condition
        )


@pytest.mark.parametrize("separately", [False, True], ids=["loss", "divergence"])
@pytest.mark.parametrize("kind", KINDS)
def test_long_sums(kind: str, separately: bool, isa: str) -> None:
    """What sums over many keys lose, in the value and in the gradients."""
    case = PolicyCase(AttentionCase("", 4, 32768, head_dim=16))
    inputs = case.inputs(torch.float32)
    inputs.k.add_(1)
    old = inputs.to(torch.float32)
    for tensor, seed in ((old.q, 5), (old.k, 6)):
        tensor.add_(random_like(tensor, seed), alpha=0.5)
    found: list[Any] = []
    for dtype in (torch.float32, torch.float64, torch.float32):
        x, y = inputs.to(dtype).requires_grad_(), old.to(dtype)
        if found:
            value = eager_divergence(eager_policy(x)[0], eager_policy(y)[0], kind)
        else:
            call = (x.q, x.k, snapshot_of(y))
            value = attention_divergence(*call, kind, backend="cpu")
        sums = value.sum()
        if not found and not separately:
            ones = torch.ones(1)
            sums = ral_loss(*call, ones, kind=kind, reduction="sum", backend="cpu")
        found.append({"value": value, **gradients(sums, x, torch.tensor(1.0))})
    for name, got in found[0].items():
        floor = floor_of(torch.float32) / 4
        assert_accurate(name, got, found[1][name], found[2][name], floor, 0.0)


@pytest.mark.parametrize("case", TOKEN_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.in_interpreter(when=lambda case, dtype: dtype == torch.float32 or case.name in FEW[:4])
def test_against_snapshot(case: PolicyCase, dtype: torch.dtype, backend: str) -> None:
    check_case(case, dtype, backend, "jsd", other_model=False)


SOME = ("length_2", "off_blocks", "gqa_7", "rows_middle", "scope_batch", "padding_left", "together")


@pytest.mark.parametrize("name", [*SOME, "with_self", "not_causal", "window_causal", "decode"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.in_interpreter(
    when=lambda name, kind: name != "together" and (kind == "jsd" or name in ("decode", "gqa_7"))
)
def test_against_snapshot_of_another_model(
    name: str, kind: str, dtype: torch.dtype, backend: str
) -> None:
    check_case(BY_NAME[name], dtype, backend, kind, other_model=True)


# fmt: off
SMALL = (
    PolicyCase(AttentionCase("causal", 4, 6, batch_size=2, num_kv_heads=1, head_dim=3)),
    PolicyCase(AttentionCase("gqa_rows", 6, 6, num_heads=4, num_kv_heads=2, head_dim=3,
        options={"rows": (2, 5)}), scope="first_half"),
    PolicyCase(AttentionCase("softcap", 3, 12, head_dim=3, batch_size=2, key_padding="left",
        options={"softcap": 0.7, "window": (4, 1), "is_causal": False, "exclude_self": False})),
)
# fmt: on


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_gradcheck(case: PolicyCase, kind: str) -> None:
    inputs = case.inputs(torch.float64).requires_grad_()
    snapshot = snapshot_of(snapshot_inputs(case, inputs, other_model=True))
    assert torch.autograd.gradcheck(
        lambda q, k: attention_divergence(q, k, snapshot, kind, **inputs.options),
        (inputs.q, inputs.k),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_composed(kind: str) -> None:
    """Dense rows, span marginals and a snapshot over spans; a reference tensor has a gradient.

    Every key is valid: a row of the reference with weight elsewhere is infinitely far.
    """
    case = PolicyCase(AttentionCase("", 4, 6, head_dim=3, spans="gaps", num_spans=3,
        span_bias="full", options={"is_causal": False, "exclude_self": False}))  # fmt: skip
    inputs = case.inputs(torch.float64).requires_grad_()
    bias, spans = inputs.options["span_bias"], inputs.options["spans"]
    every_key = {"is_causal": False, "exclude_self": False}
    other = snapshot_inputs(case, inputs, other_model=True)
    snapshot = snapshot_of(other, span_bias=torch.randn(3, dtype=torch.float64))
    r_keys = torch.softmax(torch.randn(1, 4, 6, dtype=torch.float64), -1).requires_grad_()
    r_spans = torch.softmax(torch.randn(1, 4, 3, dtype=torch.float64), -1).requires_grad_()

    def over_spans(q: Tensor, k: Tensor, bias: Tensor, r: Any) -> Tensor:
        return attention_divergence(q, k, r, kind, spans=spans, span_bias=bias, **every_key)

    assert torch.autograd.gradcheck(over_spans, (inputs.q, inputs.k, bias, r_spans))
    assert torch.autograd.gradcheck(
        lambda q, k, bias: over_spans(q, k, bias, snapshot), (inputs.q, inputs.k, bias)
    )
    assert torch.autograd.gradcheck(
        lambda q, k, r: attention_divergence(q, k, r, kind, **every_key),
        (inputs.q, inputs.k, r_keys),
    )


# -- the loss as one finds it elsewhere ------------------------------------------------------------


class ReinforcedAttentionLoss(nn.Module):
    """Eq. (1) and (2) of arXiv 2602.04884 on full attention maps, as an eager trainer writes it."""

    def policy(self, maps: Tensor) -> Tensor:
        """[B, H, L, L] -> [B, L, L]: mean over heads, without the diagonal, renormalised."""
        alpha = maps.mean(1)
        length = alpha.shape[-1]
        alpha = alpha.masked_fill(torch.eye(length, dtype=torch.bool), 0.0)
        return alpha / alpha.sum(-1, keepdim=True).clamp(min=1e-12)

    def forward(
        self, maps: Tensor, old_maps: Tensor, advantages: Tensor, completion_mask: Tensor
    ) -> Tensor:
        p, r = self.policy(maps), self.policy(old_maps).detach()
        m = (p + r) / 2
        tiny = 1e-20
        jsd = 0.5 * (
            (p * ((p + tiny).log() - (m + tiny).log())).sum(-1)
            + (r * ((r + tiny).log() - (m + tiny).log())).sum(-1)
        )
        weight = advantages[:, None] * completion_mask
        return (weight * jsd).sum() / completion_mask.sum()


def attention_maps(q: Tensor, k: Tensor) -> Tensor:
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    length = q.shape[2]
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    return torch.softmax((q @ k.mT / q.shape[3] ** 0.5).masked_fill(hidden, float("-inf")), -1)


@pytest.mark.parametrize("form", ["snapshot", "dense"])
def test_agrees_with_the_public_class(form: str, backend: str) -> None:
    """Prompts of 20 tokens and completions of at most 21, on float32."""
    generator = torch.Generator().manual_seed(0)
    q, q_old = (torch.randn(4, 6, 41, 16, generator=generator) for _ in range(2))
    k, k_old = (torch.randn(4, 2, 41, 16, generator=generator) for _ in range(2))
    q.requires_grad_()
    k.requires_grad_()
    advantages = torch.tensor([1.5, -0.5, 0.25, -1.25])
    mask = torch.arange(21) < torch.tensor([[21], [3], [0], [17]])

    full_mask = torch.cat([torch.zeros(4, 20, dtype=torch.bool), mask], dim=1)
    wanted = ReinforcedAttentionLoss()(
        attention_maps(q, k), attention_maps(q_old, k_old), advantages, full_mask
    )
    rows = slice(20, None)
    reference: Any = AttentionSnapshot(q_old, k_old, rows=rows)
    if form == "dense":
        reference = attention_policy(q_old, k_old, rows=rows, backend=backend)
    loss = ral_loss(q, k, reference, advantages, mask, rows=rows, backend=backend)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-7)
    for a, b in zip(
        torch.autograd.grad(loss, (q, k)), torch.autograd.grad(wanted, (q, k)), strict=True
    ):
        assert relative_error(a, b.double()) < 1e-5


# -- references, reductions, masks -----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SOME)
@pytest.mark.in_interpreter(when=lambda name, kind: kind == "kl" and name != "together")
def test_dense_and_snapshot_references_agree(name: str, kind: str, backend: str) -> None:
    inputs = BY_NAME[name].inputs(torch.float32).requires_grad_()
    other = snapshot_inputs(BY_NAME[name], inputs, other_model=True)
    r = attention_policy(other.q, other.k, backend=backend, **inputs.options)
    values = [
        attention_divergence(inputs.q, inputs.k, x, kind, backend=backend, **inputs.options)
        for x in (r, snapshot_of(other))
    ]
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-6)
    grads = [gradients(value, inputs, torch.ones_like(value)) for value in values]
    for tensor in ("q", "k"):
        torch.testing.assert_close(grads[0][tensor], grads[1][tensor], rtol=1e-3, atol=1e-6)
    p = attention_policy(inputs.q, inputs.k, backend=backend, **inputs.options)
    torch.testing.assert_close(values[0], divergence(p, r, kind), rtol=1e-4, atol=1e-6)


def test_snapshot_over_spans_uses_its_own_bias(backend: str) -> None:
    """A rollout that was steered by noise on its spans, compared with the clean policy."""
    inputs = BY_NAME["spans_equal"].inputs(torch.float32)
    spans = inputs.options["spans"]
    noise = random_like(torch.empty(2, 1, 1, 7), 3)
    snapshot = AttentionSnapshot(inputs.q, inputs.k, span_bias=noise)
    got = attention_divergence(inputs.q, inputs.k, snapshot, spans=spans, backend=backend)
    r = attention_policy(inputs.q, inputs.k, spans=spans, span_bias=noise, backend=backend)
    p = attention_policy(inputs.q, inputs.k, spans=spans, backend=backend)
    torch.testing.assert_close(got, divergence(p, r))
    assert got[:, 20:].min() > 0


def loss_inputs() -> tuple[PolicyInputs, AttentionSnapshot, Tensor, Tensor]:
    inputs = BY_NAME["padding_left"].inputs(torch.float32).requires_grad_()
    snapshot = snapshot_of(snapshot_inputs(BY_NAME["padding_left"], inputs, True))
    advantages = torch.tensor([1.0, -2.0, 0.5])
    mask = torch.arange(61) >= torch.tensor([[20], [50], [61]])  # the last sample has no token
    return inputs, snapshot, advantages, mask


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum"])
@pytest.mark.in_interpreter(when=lambda masked, per_token: masked != per_token)
def test_reductions(reduction: str, masked: bool, per_token: bool, backend: str) -> None:
    inputs, snapshot, advantages, mask = loss_inputs()
    if per_token:
        advantages = random_like(torch.empty(3, 61), 9)
    given = mask if masked else None
    loss = ral_loss(inputs.q, inputs.k, snapshot, advantages, given, reduction=reduction,
        backend=backend, **inputs.options)  # fmt: skip
    value = attention_divergence(inputs.q, inputs.k, snapshot, backend=backend, **inputs.options)
    weight = (mask if masked else torch.ones(3, 61)).float()
    terms = value * (advantages if per_token else advantages[:, None]) * weight
    if reduction == "sum":
        wanted = terms.sum()
    elif reduction == "token_mean":
        wanted = terms.sum() / weight.sum()
    else:
        used = weight.sum(1) > 0
        wanted = (terms.sum(1)[used] / weight.sum(1)[used]).mean()
    assert loss.shape == () and loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted)
    for a, b in zip(
        torch.autograd.grad(loss, (inputs.q, inputs.k), retain_graph=True),
        torch.autograd.grad(wanted, (inputs.q, inputs.k)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.in_interpreter(when=lambda reduction: reduction == "sequence_mean")
def test_fully_masked_batch(reduction: str, kind: str, backend: str) -> None:
    inputs, snapshot, advantages, mask = loss_inputs()
    loss = ral_loss(inputs.q, inputs.k, snapshot, advantages, torch.zeros_like(mask), kind=kind,
        reduction=reduction, backend=backend, **inputs.options)  # fmt: skip
    assert float(loss.detach()) == 0.0
    for gradient in torch.autograd.grad(loss, (inputs.q, inputs.k)):
        assert not gradient.any()


def test_infinite_rows(backend: str) -> None:
    """kl against a reference with a 0: infinite, without a gradient, and maskable."""
    inputs = BY_NAME["mha"].inputs(torch.float32).requires_grad_()
    r = attention_policy(inputs.q.detach() * 0.5, inputs.k, backend=backend).detach()
    r[:, 5] = 0.0
    r[:, 5, 0] = 1.0
    value = attention_divergence(inputs.q, inputs.k, r, "kl", backend=backend)
    assert value[0, 5] == float("inf") and value.isinf().sum() == 1
    grads = torch.autograd.grad(value.sum(), (inputs.q, inputs.k))
    assert all(gradient.isfinite().all() for gradient in grads)
    assert not grads[0][:, :, 5].any() and grads[0].any()
    mask = torch.ones(1, 61, dtype=torch.bool)
    mask[:, 5] = False
    for advantages, given in ((torch.ones(1), mask), (mask.float(), None)):
        loss = ral_loss(inputs.q, inputs.k, r, advantages, given, kind="kl", backend=backend)
        assert loss.isfinite()
        for gradient in torch.autograd.grad(loss, (inputs.q, inputs.k)):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_policy_are_zero(kind: str, backend: str) -> None:
    """Nothing valid on one side: no divergence and no gradient, however the reference is given."""
    inputs = BY_NAME["mha"].inputs(torch.float32).requires_grad_()
    other = snapshot_inputs(BY_NAME["mha"], inputs, False)
    r = attention_policy(other.q, other.k, backend=backend)
    empty = torch.arange(61) < 7
    for case in ("policy", "reference"):
        q, old, dense = inputs.q.detach(), other.q, r
        if case == "policy":  # all weight on the own key: Z underflows
            q = torch.where(empty[:, None], inputs.k[:, :, -61:].detach() * 1e3, q)
        else:
            old = torch.where(empty[:, None], other.k[:, :, -61:] * 1e3, old)
            dense = r.masked_fill(empty[:, None], 0.0)
        q.requires_grad_()
        for reference in (AttentionSnapshot(old, other.k), dense):
            value = attention_divergence(q, inputs.k, reference, kind, backend=backend)
            assert not value[:, empty].any() and (value[:, ~empty] > 0).all()
            (dq,) = torch.autograd.grad(value.sum(), q)
            assert dq.isfinite().all() and not dq[:, :, empty].any() and dq.any()


def test_infinite_streamed_rows(backend: str) -> None:
    """A reference whose window leaves out keys that the policy sees."""
    inputs = BY_NAME["mha"].inputs(torch.float32).requires_grad_()
    snapshot = AttentionSnapshot(inputs.q.detach() * 0.5, inputs.k, window=80)
    value = attention_divergence(inputs.q, inputs.k, snapshot, "kl", backend=backend)
    # Rows stand at keys 66 to 126: those beyond key 80 lose the first keys.
    assert torch.equal(value[0].isinf(), torch.arange(66, 127) > 80)
    dvalue = torch.where(value.isinf(), float("nan"), 1.0)
    grads = torch.autograd.grad(value, (inputs.q, inputs.k), dvalue)
    assert all(gradient.isfinite().all() for gradient in grads)
    assert not grads[0][:, :, value[0].isinf()].any() and grads[0].any()


def test_padded_rows_may_hold_anything(backend: str) -> None:
    """Masked tokens add nothing to the loss, whatever advantage they carry."""
    inputs, snapshot, _, mask = loss_inputs()
    clean = random_like(torch.empty(3, 61), 9)
    dirty = clean.masked_fill(~mask, float("nan"))
    losses = [
        ral_loss(inputs.q, inputs.k, snapshot, a, mask, backend=backend, **inputs.options)
        for a in (clean, dirty)
    ]
    assert torch.equal(*losses)


# -- torch.library, torch.compile, repeatability ---------------------------------------------------


def op_inputs(monkeypatch: pytest.MonkeyPatch, backend: str, prefix: int) -> tuple[Any, ...]:
    case = BY_NAME["together" if prefix == 0 else "whole_sequence"]
    inputs = case.inputs(torch.float32).requires_grad_()
    other = snapshot_inputs(case, inputs, other_model=True)
    if prefix:
        other.k[1, :, :prefix] = other.k[0, :, :prefix]
        snapshot = snapshot_of(other, group_size=2, shared_prefix=prefix)
    else:
        snapshot = snapshot_of(other)
    handed: list[tuple[Any, ...]] = []
    op = divergence_module.policy_divergence_fwd

    def record(*args: Any) -> Any:
        handed.append(divergence_module.SIGNATURE.flatten(*args))
        return op(*args)

    monkeypatch.setattr(divergence_module, "policy_divergence_fwd", record)
    attention_divergence(inputs.q, inputs.k, snapshot, backend=backend, **inputs.options)
    monkeypatch.setattr(divergence_module, "policy_divergence_fwd", op)
    return tuple(
        x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for x in handed[0]
    )


@pytest.mark.slow_in_interpreter(stands_in="test_against_snapshot")
@pytest.mark.parametrize("prefix", [0, 20])
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.in_interpreter(when=lambda prefix: prefix > 0)
def test_opcheck(prefix: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = op_inputs(monkeypatch, backend, prefix)
    torch.library.opcheck(torch.ops.ral.policy_divergence_fwd.default, args)
    with torch.no_grad():
        value, *kept = torch.ops.ral.policy_divergence_fwd(*args)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in args]
    torch.library.opcheck(
        torch.ops.ral.policy_divergence_bwd.default,
        (*detached, *kept, random_like(value, 1), False),
    )


@pytest.mark.parametrize("form", ["snapshot", "spans", "dense"])
def test_compile_without_graph_break(form: str, backend: str) -> None:
    inputs, snapshot, advantages, mask = loss_inputs()
    spans = rk.Spans.from_lengths([20, 41]) if form == "spans" else None
    options = {**inputs.options, "backend": backend, "spans": spans}
    reference: Any = snapshot
    if form == "dense":
        reference = attention_policy(inputs.q, inputs.k, **options).detach().bfloat16()

    def f(q: Tensor, k: Tensor) -> Tensor:
        return ral_loss(q * 2, k, reference, advantages, mask, **options)

    torch._dynamo.reset()
    compiled: Callable[..., Tensor] = torch.compile(f, fullgraph=True, backend="aot_eager")
    tensors = (inputs.q, inputs.k)
    torch.testing.assert_close(compiled(*tensors), f(*tensors))
    for a, b in zip(
        torch.autograd.grad(compiled(*tensors), tensors),
        torch.autograd.grad(f(*tensors), tensors),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ["off_blocks", "gqa_7", "together"])
@pytest.mark.in_interpreter(when=lambda name, threads: threads == 1 and name == "gqa_7")
def test_repeats_bit_for_bit(name: str, dtype: torch.dtype, backend: str, threads: int) -> None:
    def run() -> list[Tensor]:
        inputs = BY_NAME[name].inputs(dtype).requires_grad_()
        snapshot = snapshot_of(snapshot_inputs(BY_NAME[name], inputs, True))
        value = attention_divergence(
            inputs.q, inputs.k, snapshot, backend=backend, **inputs.options
        )
        return [value, *gradients(value, inputs, random_like(value, 1)).values()]

    first = run()
    for _ in range(1 if backend == "triton" else 2):
        for once, again in zip(first, run(), strict=True):
            assert torch.equal(once, again)
