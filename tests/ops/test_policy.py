"""`attention_policy` over backend x dtype x case: p and every gradient against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import ral_kernels as rk
from ral_kernels.ops.policy import attention_divergence, attention_policy, interface
from ral_kernels.snapshot import AttentionSnapshot
from tests.ops.accuracy import (
    FLOAT32_EPS,
    assert_accurate,
    assert_gradient_accurate,
    floor_of,
)
from tests.ops.attention_cases import AttentionCase
from tests.ops.policy_cases import BY_NAME, CASES, FEW, PolicyCase, PolicyInputs
from tests.ops.policy_eager import eager_policy, own_keys, valid_keys

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOW_BIASES = (-1e9, -2.985e9, -3.034e9, -3.815e9, -6.039e9, -1e10, -1e38,
    torch.finfo(torch.float32).min)  # fmt: skip


def random_like(tensor: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator)


def gradients(output: Tensor, inputs: PolicyInputs, doutput: Tensor) -> dict[str, Tensor]:
    tensors = inputs.differentiable()
    found = torch.autograd.grad(
        output, list(tensors.values()), doutput.to(output.dtype), allow_unused=True
    )
    return {
        name: torch.zeros_like(tensors[name]) if gradient is None else gradient
        for name, gradient in zip(tensors, found, strict=True)
    }


def compact_floor(dtype: torch.dtype) -> float:
    """What a float32 result of inputs in `dtype` may err (see accuracy.py)."""
    return floor_of(dtype) if dtype == torch.float32 else torch.finfo(dtype).eps / 16


def condition_of(lse: Tensor) -> float:
    """The relative error of weights that are recomputed from a float32 lse."""
    lse = lse.detach()[lse > float("-inf")]
    return 2 * FLOAT32_EPS * float(lse.abs().max()) if lse.numel() else 0.0


def magnitude_of(inputs: PolicyInputs, condition: float) -> float:
    """What the rounding of a gradient that cancels is relative to (see accuracy.py).

    Where a row looks at one key alone, G - δ = G (1 - P) vanishes up to `condition`, the error of
    P, before it is multiplied by k and the scale.
    """
    tensors = [x.detach().float() for x in (inputs.q, inputs.k) if x.numel()]
    if not tensors:
        return 1.0
    largest = max(float(x.abs().max()) for x in tensors)
    rms = max(float(x.square().mean().sqrt()) for x in tensors)
    scale = inputs.options.get("scale", inputs.q.shape[3] ** -0.5)
    return max(1.0, largest, condition / (4 * FLOAT32_EPS) * rms * scale)


def check_case(case: PolicyCase, dtype: torch.dtype, backend: str) -> None:
    inputs = case.inputs(dtype).requires_grad_()
    p = attention_policy(inputs.q, inputs.k, backend=backend, **inputs.options)
    exact = inputs.to(torch.float64).requires_grad_()
    truth, lse = eager_policy(exact)
    upcast, _ = eager_policy(inputs.to(torch.float32))
    baseline_inputs = inputs.to(dtype).requires_grad_()
    baseline, _ = eager_policy(baseline_inputs)

    assert p.dtype == torch.float32 and p.is_contiguous()
    condition = condition_of(lse)
    assert_accurate("p", p, truth, upcast, max(compact_floor(dtype), condition))
    if "spans" not in inputs.options:
        assert not p[~valid_keys(inputs)].any(), "p must be exactly 0 on keys that are not valid"

    dp = random_like(p, 1)
    grads = gradients(p, inputs, dp)
    true_grads = gradients(truth, exact, dp)
    baseline_grads = gradients(baseline, baseline_inputs, dp)
    magnitude = magnitude_of(inputs, condition)
    for name, grad in grads.items():
        assert grad.dtype == inputs.differentiable()[name].dtype
        assert_gradient_accurate(
            f"d{name}", grad, true_grads[name], baseline_grads[name], magnitude, condition
        )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.in_interpreter(when=lambda case, dtype: dtype == torch.float32 or case.name in FEW)
def test_policy(case: PolicyCase, dtype: torch.dtype, backend: str) -> None:
    check_case(case, dtype, backend)


@pytest.mark.parametrize("num_spans", [0, 1, 32])
def test_long_sums(num_spans: int, isa: str) -> None:
    """Gradients that do not average out show what sums over many keys lose."""
    spans = "equal" if num_spans else "none"
    case = AttentionCase("", 4, 32768, head_dim=16, spans=spans, num_spans=num_spans)
    inputs = PolicyCase(case, "first_half").inputs(torch.float32)
    inputs.k.add_(1)
    found: list[Any] = []
    for dtype in (torch.float32, torch.float64, torch.float32):
        x = inputs.to(dtype).requires_grad_()
        if not found:
            p = attention_policy(x.q, x.k, backend="cpu", **x.options)
        else:
            p, _ = eager_policy(x)
        found.append({"p": p, **gradients(p, x, random_like(p, 1) + 1)})
    for name, got in found[0].items():
        if name == "p" or num_spans != 1:  # the gradient of a constant is rounding alone
            floor = floor_of(torch.float32) / 4
            assert_accurate(name, got, found[1][name], found[2][name], floor, 0.0)


# Small enough for finite differences (every input element costs two forwards).
# fmt: off
SMALL = (
    PolicyCase(AttentionCase("causal", 4, 5, batch_size=2, num_kv_heads=1, head_dim=3)),
    PolicyCase(AttentionCase("gqa_rows", 6, 6, num_heads=4, num_kv_heads=2, head_dim=3,
        options={"rows": (1, 4)}), scope="first_half"),
    PolicyCase(AttentionCase("softcap", 3, 5, num_kv_heads=2, head_dim=4, spans="unsorted",
        num_spans=3, span_bias="per_row", options={"softcap": 0.7, "scale": 0.9})),
    PolicyCase(AttentionCase("window", 5, 6, head_dim=3, spans="gaps", num_spans=2,
        span_bias="full", options={"window": (2, 1), "is_causal": False}), scope="everything"),
    PolicyCase(AttentionCase("padding", 4, 12, head_dim=3, batch_size=2, key_padding="left",
        options={"exclude_self": False})),
)
# fmt: on


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_gradcheck(case: PolicyCase) -> None:
    inputs = case.inputs(torch.float64).requires_grad_()
    names = list(inputs.differentiable())

    def f(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        q, k = given.pop("q"), given.pop("k")
        return attention_policy(q, k, **{**inputs.options, **given})

    assert torch.autograd.gradcheck(f, tuple(inputs.differentiable().values()))


def test_is_equation_1_of_the_paper(backend: str) -> None:
    """p_t(i) = α_{t,i} / Σ_{j<t} α_{t,j} for i < t, with α the head average; 0 from t on."""
    inputs = BY_NAME["whole_sequence"].inputs(torch.float32)
    p = attention_policy(inputs.q, inputs.k, backend=backend)
    k = inputs.k.repeat_interleave(2, dim=1)
    scores = inputs.q @ k.mT / 32**0.5 + torch.full((61, 61), float("-inf")).triu(1)
    alpha = torch.softmax(scores, -1).mean(1)
    for t in range(1, 61):
        torch.testing.assert_close(p[:, t, :t], alpha[:, t, :t] / alpha[:, t, :t].sum(-1)[:, None])
        assert not p[:, t, t:].any()
    assert not p[:, 0].any(), "the first position has no keys before it"


def test_own_key_is_excluded(backend: str) -> None:
    inputs = BY_NAME["chunked_prefill"].inputs(torch.float32)
    p = attention_policy(inputs.q, inputs.k, backend=backend)
    assert not p[:, own_keys(inputs)].any()
    p = attention_policy(inputs.q, inputs.k, exclude_self=False, backend=backend)
    assert p[:, own_keys(inputs)].all()


def test_rows_are_rows_of_the_whole(backend: str) -> None:
    inputs = BY_NAME["chunked_prefill"].inputs(torch.float32)
    whole = attention_policy(inputs.q, inputs.k, backend=backend)
    for rows in (slice(3, 67), slice(-5, None), slice(None, 1), (64, 70), (-70, -1), slice(None)):
        part = attention_policy(inputs.q, inputs.k, rows=rows, backend=backend)
        wanted = whole[:, rows if isinstance(rows, slice) else slice(*rows)]
        torch.testing.assert_close(part, wanted)


def test_gradient_of_rows_is_zero_elsewhere(backend: str) -> None:
    inputs = BY_NAME["rows_middle"].inputs(torch.float32).requires_grad_()
    attention_policy(
        inputs.q, inputs.k, backend=backend, **inputs.options
    ).square().sum().backward()
    assert inputs.q.grad is not None and inputs.q.grad.shape == inputs.q.shape
    assert inputs.q.grad[:, :, 61:68].any()
    assert not inputs.q.grad[:, :, :61].any() and not inputs.q.grad[:, :, 68:].any()


def test_spans_are_sums_over_keys(backend: str) -> None:
    for name in ("spans_unsorted", "spans_gaps", "spans_batch", "spans_narrower_scope"):
        inputs = BY_NAME[name].inputs(torch.float32)
        options = dict(inputs.options)
        spans = options.pop("spans")
        over_spans = attention_policy(inputs.q, inputs.k, spans=spans, backend=backend, **options)
        options.setdefault("scope", spans)
        over_keys = attention_policy(inputs.q, inputs.k, backend=backend, **options)
        ids = spans.ids if spans.ids.dim() == 2 else spans.ids[None]
        wanted = over_keys @ (ids[..., None] == torch.arange(spans.num_spans)).float()
        torch.testing.assert_close(over_spans, wanted)


def test_padding_keys_are_never_read(backend: str) -> None:
    """Whatever a padded key holds (here NaN) reaches neither outputs nor gradients."""
    inputs = BY_NAME["padding_right"].inputs(torch.float32)
    hidden = ~inputs.options["key_padding_mask"][:, None, :, None]

    def run(k: Tensor) -> list[Tensor]:
        q, k = inputs.q.clone().requires_grad_(), k.requires_grad_()
        p = attention_policy(q, k, backend=backend, softcap=2.0, **inputs.options)
        return [p, *torch.autograd.grad(p, (q, k), random_like(p, 1))]

    clean = run(inputs.k.clone())
    for wanted, got in zip(clean, run(inputs.k.masked_fill(hidden, float("nan"))), strict=True):
        assert torch.equal(wanted, got)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_gradients_of_zeros_go_nowhere(poison: float, backend: str) -> None:
    """What a loss of log p sends to keys that are not valid and to empty rows is left out."""
    inputs = BY_NAME["padding_everything"].inputs(torch.float32).requires_grad_()
    p = attention_policy(inputs.q, inputs.k, backend=backend, **inputs.options)
    assert (p == 0).all(-1).any() and (p > 0).any()
    clean = random_like(p, 1).masked_fill(p == 0, 0.0)
    wanted = torch.autograd.grad(p, (inputs.q, inputs.k), clean, retain_graph=True)
    got = torch.autograd.grad(p, (inputs.q, inputs.k), clean.masked_fill(p == 0, poison))
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


def test_underflowing_rows_are_zero(backend: str) -> None:
    """A row whose weight is all on its own key (Z underflows) gives zeros, never NaN."""
    inputs = BY_NAME["peaked_on_self"].inputs(torch.float32)
    q = (inputs.q * 100).requires_grad_()
    p = attention_policy(q, inputs.k, backend=backend)
    assert p.isfinite().all() and (p == 0).all(-1).any()
    (dq,) = torch.autograd.grad(p.square().sum(), q)
    assert dq.isfinite().all()


@pytest.mark.parametrize("bias", LOW_BIASES)
def test_very_low_biases_hide(bias: float, backend: str) -> None:
    check_low_bias(bias, backend)


def check_low_bias(bias: float, backend: str) -> None:
    """Scores whose ulp is more than any exponent: the keys get no weight, or all share it."""
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(1, 4, 40, 32, generator=generator)
    k = torch.randn(1, 2, 200, 32, generator=generator)
    spans = rk.Spans.from_lengths([140, 60])
    options = {"is_causal": False, "exclude_self": False, "backend": backend}
    for span in (torch.tensor([bias, 0.0]), torch.tensor([bias, bias])):
        p = attention_policy(q, k, spans=spans, span_bias=span, **options)
        assert p.isfinite().all()
        assert torch.allclose(p.sum(-1), torch.ones(()), atol=1e-5)
        if span[1] == 0:
            assert (p[..., 0] == 0).all()


@pytest.mark.parametrize("name", ["off_blocks", "gqa_7", "together", "spans_unsorted"])
@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.in_interpreter(when=lambda name, threads: threads == 1 and name != "together")
def test_repeats_bit_for_bit(name: str, dtype: torch.dtype, backend: str, threads: int) -> None:
    def run() -> list[Tensor]:
        inputs = BY_NAME[name].inputs(dtype).requires_grad_()
        p = attention_policy(inputs.q, inputs.k, backend=backend, **inputs.options)
        return [p, *gradients(p, inputs, random_like(p, 1)).values()]

    first = run()
    for _ in range(1 if backend == "triton" else 2):
        for once, again in zip(first, run(), strict=True):
            assert torch.equal(once, again)


def test_layout_of_gradients(backend: str) -> None:
    """Token-major queries and keys, as models have them, get token-major gradients."""
    inputs = BY_NAME["layout_bthd"].inputs(torch.float32).requires_grad_()
    attention_policy(inputs.q, inputs.k, backend=backend).square().sum().backward()
    for tensor in (inputs.q, inputs.k):
        assert tensor.grad is not None and tensor.grad.stride() == tensor.stride()


@pytest.mark.in_interpreter(when=lambda: False)  # bfloat16
def test_autocast(backend: str) -> None:
    q, k = torch.randn(1, 2, 9, 16), torch.randn(1, 1, 9, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        p = attention_policy(q, k, backend=backend)
    assert torch.equal(p, attention_policy(q.bfloat16(), k, backend=backend))


def test_no_span_at_all(backend: str) -> None:
    inputs = BY_NAME["mha"].inputs(torch.float32)
    spans = rk.Spans(torch.full((127,), -1), 0)
    assert attention_policy(inputs.q, inputs.k, spans=spans, backend=backend).shape == (1, 61, 0)


def _far_apart(shape: tuple[int, ...], seed: int) -> Tensor:
    """A [2, H, T, D] tensor whose second sample lies more than 2**31 elements behind the first.

    Only the pages that are written become memory: gigabytes of address space and little else.
    """
    _, h, t, d = shape
    distance = 2**31 + 64
    buffer = torch.empty(distance + h * t * d, dtype=torch.bfloat16)
    view = buffer.as_strided(shape, (distance, t * d, d, 1))
    return view.copy_(random_like(view, seed))


@pytest.mark.large
@pytest.mark.in_interpreter(when=lambda: False)  # bfloat16
def test_offsets_beyond_2_31(backend: str) -> None:
    def run(q: Tensor, k: Tensor) -> list[Tensor]:
        leaves = (q.detach().requires_grad_(), k.detach().requires_grad_())
        p = attention_policy(*leaves, backend=backend)
        snapshot = AttentionSnapshot(q * 0.5, k)
        value = attention_divergence(*leaves, snapshot, backend=backend)
        loss = p.square().sum() + value.sum()
        return [p, value, *torch.autograd.grad(loss, leaves)]

    q, k = _far_apart((2, 2, 33, 64), 0), _far_apart((2, 1, 127, 64), 1)
    for a, b in zip(run(q, k), run(q.contiguous(), k.contiguous()), strict=True):
        assert torch.equal(a, b)


# -- torch.library, torch.compile, fake tensors ----------------------------------------------------

OP_CASES = ("length_1", "together", "span_bias_full", "spans_wider_scope", "no_keys")


def op_inputs(name: str, monkeypatch: pytest.MonkeyPatch, backend: str) -> tuple[Any, ...]:
    return op_inputs_of(BY_NAME[name].inputs(torch.float32), monkeypatch, backend)


def op_inputs_of(
    inputs: PolicyInputs, monkeypatch: pytest.MonkeyPatch, backend: str
) -> tuple[Any, ...]:
    """What the public function hands to `ral::policy_fwd`, as leaves."""
    inputs.requires_grad_()
    handed: list[tuple[Any, ...]] = []
    op = interface.policy_fwd

    def record(*args: Any) -> Any:
        handed.append(interface._SIGNATURE.flatten(*args))
        return op(*args)

    monkeypatch.setattr(interface, "policy_fwd", record)
    attention_policy(inputs.q, inputs.k, backend=backend, **inputs.options)
    monkeypatch.setattr(interface, "policy_fwd", op)
    return tuple(
        x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for x in handed[0]
    )


@pytest.mark.slow_in_interpreter(stands_in="test_policy")
@pytest.mark.parametrize("name", OP_CASES)
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.in_interpreter(when=lambda name: name != "together")
def test_opcheck(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = op_inputs(name, monkeypatch, backend)
    torch.library.opcheck(torch.ops.ral.policy_fwd.default, args)
    with torch.no_grad():
        outputs = torch.ops.ral.policy_fwd(*args)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in args]
    dp = random_like(outputs[0], 1)
    torch.library.opcheck(
        torch.ops.ral.policy_bwd.default, (*detached, *outputs, dp, args[3] is not None, False)
    )


def value_and_gradients(f: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    loss = f(*tensors)
    return [loss.detach(), *torch.autograd.grad(loss, tensors)]


def test_compile_without_graph_break(backend: str) -> None:
    inputs = BY_NAME["span_bias_per_row"].inputs(torch.float32).requires_grad_()
    options = {k: v for k, v in inputs.options.items() if k != "span_bias"}

    def f(q: Tensor, k: Tensor, span_bias: Tensor) -> Tensor:
        p = attention_policy(q * 2, k, span_bias=span_bias, backend=backend, **options)
        return p.square().sum() + attention_policy(q, k, scope=spans, backend=backend).sqrt().sum()

    spans = inputs.options["spans"]
    f_small = lambda *tensors: f(*tensors) * 0.5  # noqa: E731
    tensors = tuple(inputs.differentiable().values())
    # sqrt has an infinite derivative at the zeros of p, which must not matter
    wanted = value_and_gradients(f_small, tensors)
    assert all(x.isfinite().all() for x in wanted)
    torch._dynamo.reset()
    compiled = torch.compile(f_small, fullgraph=True, backend="aot_eager")
    for a, b in zip(value_and_gradients(compiled, tensors), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_compile_dynamic_shapes(backend: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def f(q: Tensor, k: Tensor) -> Tensor:
        return attention_policy(q, k, rows=slice(-3, None), backend=backend).square().sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    for seqlen in (17, 33):
        inputs = AttentionCase("", seqlen, seqlen + 10, head_dim=16).inputs(torch.float32)
        tensors = (inputs.q.requires_grad_(), inputs.k.requires_grad_())
        wanted, got = value_and_gradients(f, tensors), value_and_gradients(compiled, tensors)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_fake_tensors() -> None:
    for name in ("together", "spans_batch"):
        real = BY_NAME[name].inputs(torch.bfloat16)
        wanted = attention_policy(real.q, real.k, **real.options)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            q, k = mode.from_tensor(real.q), mode.from_tensor(real.k)
            fake = attention_policy(q, k, **real.options)
        assert (fake.shape, fake.dtype, fake.stride()) == (
            wanted.shape, wanted.dtype, wanted.stride()
        )  # fmt: skip
