"""`attention` under opcheck, torch.compile and fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import ral_kernels as rk
from ral_kernels.ops.attention import interface
from tests.ops.attention_cases import BY_NAME, AttentionCase

# fmt: off
CASES = (
    AttentionCase("plain", 5, 7, head_dim=8),
    AttentionCase("everything", 5, 7, batch_size=2, num_heads=4, num_kv_heads=2, head_dim=8,
        head_dim_v=6, spans="batch", num_spans=3, span_bias="per_row", attn_mask="float",
            key_padding="left", layout="bthd", options={"is_causal": True, "window": 4,
                "softcap": 3.0, "rows": slice(-3, None)}),
    AttentionCase("strided", 5, 7, head_dim=8, layout="mixed", spans="unsorted", span_bias="full"),
    AttentionCase("no_keys", 5, 0, head_dim=8, spans="equal"),
)
# fmt: on


def op_inputs(
    case: AttentionCase, monkeypatch: pytest.MonkeyPatch, backend: str
) -> tuple[tuple[Any, ...], Any]:
    """What the public function hands to `ral::attention_fwd`."""
    inputs = case.inputs(torch.float32).requires_grad_()
    handed: list[tuple[Any, ...]] = []
    op = interface.attention_fwd

    def record(*args: Any) -> Any:
        handed.append(interface._SIGNATURE.flatten(*args))
        return op(*args)

    monkeypatch.setattr(interface, "attention_fwd", record)
    result = rk.attention(
        inputs.q, inputs.k, inputs.v, inputs.spans, backend=backend, **inputs.options
    )
    monkeypatch.setattr(interface, "attention_fwd", op)
    # Leaves, as opcheck wants them; the bias stays an expanded view.
    args = [
        x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for x in handed[0]
    ]
    return tuple(args), result


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_opcheck_forward(
    case: AttentionCase, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, _ = op_inputs(case, monkeypatch, backend)
    torch.library.opcheck(torch.ops.ral.attention_fwd.default, args)


@pytest.mark.parametrize("present", ["out", "marginals", "lse", "all"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.in_interpreter(when=lambda case, present: present == "all" or case.name == "plain")
def test_opcheck_backward(
    case: AttentionCase, present: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, _ = op_inputs(case, monkeypatch, backend)
    with torch.no_grad():
        outputs = torch.ops.ral.attention_fwd(*args)
    douts = [
        torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        if present in (name, "all")
        else None
        for name, x in zip(("out", "marginals", "lse"), outputs, strict=True)
    ]
    detached = [x.detach() if isinstance(x, Tensor) else x for x in args]
    torch.library.opcheck(
        torch.ops.ral.attention_bwd.default, (*detached, *outputs, *douts, args[4] is not None)
    )


def loss_of(result: rk.AttentionOutput) -> Tensor:
    loss = result.out.square().sum() + result.lse.sum()
    return loss if result.marginals is None else loss + result.marginals.square().sum()


def value_and_gradients(
    f: Callable[..., Tensor], tensors: tuple[Tensor, ...], *rest: Any
) -> list[Tensor]:
    loss = f(*tensors, *rest)
    return [loss.detach(), *torch.autograd.grad(loss, tensors)]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.in_interpreter(when=lambda compiler: compiler == "inductor")
@pytest.mark.slow_in_interpreter(stands_in="test_compile_without_graph_break")
def test_compile_without_graph_break(compiler: str, backend: str) -> None:
    """Forward and backward with spans from outside, options and elementwise work around the op."""
    inputs = BY_NAME["span_bias_per_row"].inputs(torch.float32).requires_grad_()

    def f(q: Tensor, k: Tensor, v: Tensor, span_bias: Tensor, spans: rk.Spans) -> Tensor:
        result = rk.attention(
            q * 2, k, v.relu(), spans, span_bias=span_bias, is_causal=True, window=40, softcap=20.0,
            rows=slice(-7, None), head_reduction="mean", backend=backend,
        )  # fmt: skip
        return loss_of(result)

    tensors = tuple(inputs.differentiable().values())
    wanted = value_and_gradients(f, tensors, inputs.spans)
    got = value_and_gradients(
        torch.compile(f, fullgraph=True, backend=compiler), tensors, inputs.spans
    )
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_compile_spans_closed_over(backend: str) -> None:
    inputs = BY_NAME["gqa_2"].inputs(torch.float32).requires_grad_()
    spans = inputs.spans

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return loss_of(rk.attention(q, k, v, spans, is_causal=True, backend=backend))

    tensors = (inputs.q, inputs.k, inputs.v)
    wanted = value_and_gradients(f, tensors)
    got = value_and_gradients(torch.compile(f, fullgraph=True, backend="aot_eager"), tensors)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_compile_sees_other_spans(backend: str) -> None:
    """A compiled function is not bound to the values of the spans it was compiled with."""
    inputs = BY_NAME["gqa_2"].inputs(torch.float32)
    f = torch.compile(
        lambda spans: rk.attention(inputs.q, inputs.k, inputs.v, spans, backend=backend).marginals,
        fullgraph=True,
        backend="aot_eager",
    )
    for lengths in ([100, 27], [27, 100], [1, 2, 3, 121]):
        spans = rk.Spans.from_lengths(lengths)
        wanted = rk.attention(inputs.q, inputs.k, inputs.v, spans, backend=backend).marginals
        torch.testing.assert_close(f(spans), wanted)


def test_compile_makes_spans_inside(backend: str) -> None:
    """Where values cannot be read, ids out of range become "no span"."""
    inputs = BY_NAME["gqa_2"].inputs(torch.float32)

    def f(ids: Tensor) -> Tensor | None:
        return rk.attention(
            inputs.q, inputs.k, inputs.v, rk.Spans(ids, 3), backend=backend
        ).marginals

    ids = torch.arange(127) // 50
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), f(ids))
    torch.testing.assert_close(
        compiled(ids * 2), f(torch.where(ids == 1, 2, torch.where(ids == 0, 0, -1)))
    )


def test_compile_dynamic_shapes(backend: str) -> None:
    """One graph serves several lengths."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return loss_of(rk.attention(q, k, v, is_causal=True, rows=slice(-3, None), backend=backend))

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    for seqlen in (17, 33, 61):
        inputs = (
            AttentionCase("", seqlen, seqlen + 10, head_dim=16)
            .inputs(torch.float32)
            .requires_grad_()
        )
        tensors = (inputs.q, inputs.k, inputs.v)
        wanted, got = value_and_gradients(f, tensors), value_and_gradients(compiled, tensors)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_compiled_marginal_only_loss_has_no_dv(backend: str) -> None:
    """The unused `out` stays None in the compiled backward: dv is zero and its work is skipped."""
    inputs = BY_NAME["gqa_2"].inputs(torch.float32).requires_grad_()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = rk.attention(q, k, v, inputs.spans, backend=backend)
        assert result.marginals is not None
        return result.marginals.square().sum()

    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(
        f, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)
    )
    tensors = (inputs.q, inputs.k, inputs.v)
    _, dq, _, dv = value_and_gradients(compiled, tensors)
    assert dq.any() and not dv.any()
    calls = [
        n for g in graphs for n in g.graph.nodes if n.target is torch.ops.ral.attention_bwd.default
    ]
    assert len(calls) == 1
    dout = calls[0].args[21]
    assert dout is None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fake_tensors(case: AttentionCase) -> None:
    """Shapes, dtypes, strides and devices without a kernel."""
    real = case.inputs(torch.bfloat16)
    result = rk.attention(real.q, real.k, real.v, real.spans, **real.options)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        options = {
            n: mode.from_tensor(x) if isinstance(x, Tensor) else x for n, x in real.options.items()
        }
        spans = (
            None
            if real.spans is None
            else rk.Spans(mode.from_tensor(real.spans.ids), real.spans.num_spans)
        )
        fake = rk.attention(
            *(mode.from_tensor(x) for x in (real.q, real.k, real.v)), spans, **options
        )
    for a, b in zip(fake, result, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert (a.shape, a.dtype, a.stride(), a.device) == (
                b.shape,
                b.dtype,
                b.stride(),
                b.device,
            )


def test_meta_tensors() -> None:
    q, k = torch.empty(2, 4, 5, 8, device="meta"), torch.empty(2, 2, 7, 8, device="meta")
    spans = rk.Spans(torch.empty(7, dtype=torch.int32, device="meta"), 3)
    result = rk.attention(q, k, k, spans)
    assert result.marginals is not None
    assert result.marginals.is_meta and result.marginals.shape == (2, 4, 5, 3)


@pytest.mark.parametrize(
    "drop_in", ["scaled_dot_product_attention", "flash_attn_func", "flash_attn_varlen_func"]
)
def test_compile_drop_ins(drop_in: str) -> None:
    bounds = torch.tensor([0, 20, 61], dtype=torch.int32)
    spans = rk.Spans.from_lengths([11, 50])
    calls: dict[str, Callable[..., Any]] = {
        "scaled_dot_product_attention": lambda q, k, v: rk.scaled_dot_product_attention(
            q[:, None], k[:, None], v[:, None], is_causal=True, spans=spans
        ),
        "flash_attn_func": lambda q, k, v: rk.flash_attn_func(
            q[None], k[None], v[None], causal=True, spans=spans
        ),
        "flash_attn_varlen_func": lambda q, k, v: rk.flash_attn_varlen_func(
            q, k, v, bounds, bounds, 41, 41, causal=True, spans=spans
        ),
    }
    if drop_in == "scaled_dot_product_attention":
        spans = rk.Spans.from_lengths([2])

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, marginals = calls[drop_in](q, k, v)
        return out.square().sum() + marginals.square().sum()

    tensors = tuple(torch.randn(61, 2, 16, requires_grad=True) for _ in range(3))
    wanted = value_and_gradients(f, tensors)
    got = value_and_gradients(torch.compile(f, fullgraph=True, backend="aot_eager"), tensors)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
