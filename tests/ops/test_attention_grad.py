"""Gradients of `attention`: finite differences, and what the mathematics promises."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import ral_kernels as rk
from ral_kernels.ops.attention import interface
from tests.ops.attention_cases import BY_NAME, AttentionCase, AttentionInputs

# Small enough for finite differences (every input element costs two forwards).
# fmt: off
SMALL = (
    AttentionCase("plain", 4, 5, batch_size=2, num_heads=2, num_kv_heads=1, head_dim=3,
        spans="equal", num_spans=2),
    AttentionCase("causal", 4, 6, num_heads=4, num_kv_heads=2, head_dim=3, head_dim_v=2,
        spans="gaps", num_spans=2, span_bias="full", options={"is_causal": True}),
    AttentionCase("softcap", 3, 5, num_heads=2, num_kv_heads=2, head_dim=4, spans="unsorted",
        num_spans=3, span_bias="per_row", options={"softcap": 0.7, "scale": 0.9}),
    AttentionCase("window", 5, 6, num_heads=2, head_dim=3, spans="equal", num_spans=3,
        span_bias="per_span", options={"window": (2, 1), "rows": (1, 3)}),
    AttentionCase("empty_rows", 6, 3, num_heads=2, head_dim=3, spans="everything", num_spans=1,
        span_bias="full", options={"is_causal": True}),
    AttentionCase("masked", 4, 5, num_heads=2, head_dim=3, attn_mask="float", spans="equal",
        num_spans=2, span_bias="full", key_padding="everything", batch_size=2),
)
# fmt: on
OUTPUTS = ("out", "marginals", "lse")


def outputs_of(
    inputs: AttentionInputs, wanted: tuple[str, ...], **tensors: Tensor
) -> tuple[Tensor, ...]:
    options = {**inputs.options, **{n: t for n, t in tensors.items() if n == "span_bias"}}
    q, k, v = (tensors.get(name, getattr(inputs, name)) for name in "qkv")
    result = rk.attention(q, k, v, inputs.spans, **options)
    # -inf of empty rows is a constant that finite differences cannot subtract.
    result = result._replace(lse=result.lse.masked_fill(result.lse == float("-inf"), 0.0))
    return tuple(getattr(result, name) for name in wanted)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_gradcheck_together(case: AttentionCase) -> None:
    inputs = case.inputs(torch.float64).requires_grad_()
    names = list(inputs.differentiable())
    assert torch.autograd.gradcheck(
        lambda *tensors: outputs_of(inputs, OUTPUTS, **dict(zip(names, tensors, strict=True))),
        tuple(inputs.differentiable().values()),
    )


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("name", ["q", "k", "v", "span_bias"])
@pytest.mark.parametrize("case", SMALL[1:3], ids=lambda case: case.name)
def test_gradcheck_one_at_a_time(case: AttentionCase, name: str, output: str) -> None:
    inputs = case.inputs(torch.float64)
    tensor = inputs.differentiable()[name].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: outputs_of(inputs, (output,), **{name: x}), (tensor,))


def test_gradcheck_packed() -> None:
    cu_seqlens_q = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    cu_seqlens_k = torch.tensor([0, 3, 5, 7], dtype=torch.int32)
    q, k, v = (
        torch.randn(n, h, 3, dtype=torch.float64, requires_grad=True)
        for n, h in ((5, 4), (7, 2), (7, 2))
    )
    spans = rk.Spans.from_lengths([2, 3, 2])

    def packed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out, lse, _, marginals = rk.flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, 3, 3,
            causal=True, return_attn_probs=True, spans=spans,
        )  # fmt: skip
        return out, lse.masked_fill(lse == float("-inf"), 0.0), marginals

    assert torch.autograd.gradcheck(packed, (q, k, v))


def leaves(
    case: AttentionCase, dtype: torch.dtype, backend: str
) -> tuple[AttentionInputs, rk.AttentionOutput]:
    inputs = case.inputs(dtype).requires_grad_()
    result = rk.attention(
        inputs.q, inputs.k, inputs.v, inputs.spans, backend=backend, **inputs.options
    )
    return inputs, result


BIASED = [
    "span_bias_full",
    "span_bias_per_row",
    "span_bias_per_span",
    "fully_masked_rows",
    "span_bias_softcap",
]


@pytest.mark.parametrize("name", ["off_blocks", *BIASED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.in_interpreter(when=lambda name: name not in ("off_blocks", "span_bias_per_span"))
def test_marginal_only_loss_has_no_dv(name: str, dtype: torch.dtype, backend: str) -> None:
    inputs, result = leaves(BY_NAME[name], dtype, backend)
    assert result.marginals is not None
    result.marginals.square().sum().backward()
    assert inputs.v.grad is not None and inputs.q.grad is not None and inputs.k.grad is not None
    assert not inputs.v.grad.any()
    assert inputs.q.grad.any() and inputs.k.grad.any()
    assert all(
        tensor.grad is not None and tensor.grad.isfinite().all()
        for tensor in inputs.differentiable().values()
    )


@pytest.mark.parametrize("name", BIASED)
def test_derivative_of_lse_by_span_bias_is_the_marginals(name: str, backend: str) -> None:
    inputs, result = leaves(BY_NAME[name], torch.float32, backend)
    visible = result.lse > float("-inf")
    weight = torch.randn(result.lse.shape) * visible
    (dspan_bias,) = torch.autograd.grad(result.lse, inputs.options["span_bias"], weight)
    assert result.marginals is not None
    wanted = (result.marginals * weight[..., None]).sum_to_size(dspan_bias.shape)
    torch.testing.assert_close(dspan_bias, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unused", OUTPUTS)
def test_unused_outputs_reach_the_backward_as_none(
    unused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None, not zeros: the backend then skips their work."""
    seen: dict[str, Tensor | None] = {}
    backend = interface.BACKENDS["reference"]
    reference_bwd = backend.bwd

    def bwd(args: Any, outputs: Any, gradients: Any) -> None:
        seen.update(out=gradients.dout, marginals=gradients.dmarginals, lse=gradients.dlse)
        reference_bwd(args, outputs, gradients)

    monkeypatch.setattr(backend, "bwd", bwd)
    _, result = leaves(BY_NAME["off_blocks"], torch.float32, "reference")
    used = [getattr(result, name).sum() for name in OUTPUTS if name != unused]
    sum(used).backward()
    assert seen[unused] is None
    assert all(seen[name] is not None for name in OUTPUTS if name != unused)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gradients_of_empty_rows_go_nowhere(
    output: str, poison: float, dtype: torch.dtype, backend: str
) -> None:
    """Loss terms of a fully masked row send inf and NaN back: the row is a constant."""
    inputs, result = leaves(BY_NAME["fully_masked_rows"], dtype, backend)
    tensor = getattr(result, output)
    empty = result.lse == float("-inf")
    assert empty.any() and not empty.all()
    dirty, clean = torch.zeros_like(tensor), torch.zeros_like(tensor)
    dirty[empty] = poison
    clean[~empty] = 1.0
    dirty[~empty] = 1.0
    names, tensors = zip(*inputs.differentiable().items(), strict=True)
    wanted = torch.autograd.grad(tensor, tensors, clean, retain_graph=True)
    got = torch.autograd.grad(tensor, tensors, dirty)
    for name, a, b in zip(names, got, wanted, strict=True):
        assert torch.equal(a, b), f"d{name}"


def test_expanded_gradients(backend: str) -> None:
    """`out.sum()` sends back one number with strides of zero."""
    inputs, result = leaves(BY_NAME["mha"], torch.float32, backend)
    assert result.marginals is not None
    tensors = tuple(inputs.differentiable().values())
    outputs = (result.out, result.marginals, result.lse)
    expanded = [torch.ones(()).expand(x.shape) for x in outputs]
    lazy = torch.autograd.grad(outputs, tensors, expanded, retain_graph=True)
    dense = torch.autograd.grad(outputs, tensors, [torch.ones_like(x) for x in outputs])
    for a, b in zip(lazy, dense, strict=True):
        assert torch.equal(a, b)


def test_half_precision_span_bias_gets_its_gradient(backend: str) -> None:
    dtype = torch.float16 if backend == "triton" else torch.bfloat16  # the interpreter has no other
    inputs = BY_NAME["mha"].inputs(dtype)
    span_bias = torch.randn(3, 1, 4, dtype=dtype, requires_grad=True)
    result = rk.attention(
        inputs.q, inputs.k, inputs.v, inputs.spans, span_bias=span_bias, backend=backend
    )
    result.lse.sum().backward()
    assert span_bias.grad is not None and span_bias.grad.dtype == dtype
    assert span_bias.grad.shape == span_bias.shape


@pytest.mark.parametrize("shape", [(), (64,), (1, 999, 1)], ids=str)
def test_gradient_of_a_span_bias_does_not_depend_on_threads(shape: tuple[int, ...]) -> None:
    """PyTorch forms a sum to one number in as many parts as it has threads."""
    case = AttentionCase("", 999, 70, head_dim=8, spans="equal", num_spans=64)
    inputs = case.inputs(torch.float32)
    found = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        span_bias = torch.zeros(shape, requires_grad=True)
        marginals = rk.attention(
            inputs.q, inputs.k, inputs.v, inputs.spans, span_bias=span_bias, backend="cpu"
        ).marginals
        assert marginals is not None
        weights = torch.randn(marginals.shape, generator=torch.Generator().manual_seed(1))
        found.append(torch.autograd.grad(marginals, span_bias, weights)[0])
    assert found[0].shape == shape
    for gradient in found[1:]:
        assert torch.equal(gradient, found[0])


@pytest.mark.parametrize(
    "frozen", [set(x) for n in (1, 2) for x in itertools.combinations("qkv", n)], ids=sorted
)
def test_frozen_inputs(frozen: set[str], backend: str) -> None:
    """Inputs that require no gradient get none, the others get the same as ever."""
    inputs, result = leaves(BY_NAME["gqa_2"], torch.float32, backend)
    result.out.sum().backward()
    wanted = {name: tensor.grad for name, tensor in inputs.differentiable().items()}
    inputs = BY_NAME["gqa_2"].inputs(torch.float32)
    for name, tensor in inputs.differentiable().items():
        tensor.requires_grad_(name not in frozen)
    rk.attention(
        inputs.q, inputs.k, inputs.v, inputs.spans, backend=backend, **inputs.options
    ).out.sum().backward()
    for name, tensor in inputs.differentiable().items():
        if name in frozen:
            assert tensor.grad is None
        else:
            assert tensor.grad is not None and wanted[name] is not None
            assert torch.equal(tensor.grad, wanted[name])  # type: ignore[arg-type]


def test_is_not_differentiable_twice() -> None:
    """Said aloud, not computed as zero."""
    inputs, result = leaves(BY_NAME["decode_5_6"], torch.float64, "reference")
    (dq,) = torch.autograd.grad(result.out.sum(), inputs.q, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_bwd"):
        dq.sum().backward()
