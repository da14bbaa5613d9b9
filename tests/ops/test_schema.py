"""The ops as torch knows them: their schemas are a promise, whatever derives them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import ral_kernels as rk
from ral_kernels.ops import schema
from ral_kernels.ops.attention.arguments import AttentionArgs
from ral_kernels.ops.attention.interface import attention_fwd
from ral_kernels.ops.policy.arguments import (
    PolicyArgs,
    PolicyDivergenceArgs,
    ReferenceArgs,
    TargetArgs,
)

ATTENTION = (
    "Tensor q, Tensor k, Tensor v, Tensor? span_ids, Tensor? span_bias, Tensor? attn_mask, "
    "Tensor? key_padding_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt num_spans, "
    "float scale, SymInt window_left, SymInt window_right, bool top_left, float softcap, "
    "SymInt row_start, SymInt row_stop, str backend"
)
POLICY = (
    "Tensor q, Tensor k, Tensor? span_ids, Tensor? span_bias, Tensor? head_weights, "
    "Tensor? scope, Tensor? key_padding_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? query_starts, SymInt num_spans, SymInt query_start, float scale, SymInt window_left, "
    "SymInt window_right, float softcap, bool exclude_self, SymInt max_rows, SymInt max_keys, "
    "str backend"
)
POLICY_DIVERGENCE = (
    "Tensor q, Tensor k, Tensor? head_weights, Tensor? scope, Tensor? key_padding_mask, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? query_starts, Tensor? reference_q, "
    "Tensor? reference_k, Tensor? reference_k_prefix, Tensor? reference_prefix_index, "
    "Tensor? reference_head_weights, Tensor? target_values, Tensor? target_ids, "
    "Tensor? target_index, SymInt query_start, float scale, SymInt window_left, "
    "SymInt window_right, float softcap, bool exclude_self, SymInt max_rows, SymInt max_keys, "
    "float reference_scale, SymInt reference_window_left, SymInt reference_window_right, "
    "float reference_softcap, str kind, str backend"
)
SCHEMAS = {
    "attention_fwd": f"({ATTENTION}) -> (Tensor, Tensor, Tensor)",
    "attention_bwd": f"({ATTENTION}, Tensor out, Tensor marginals, Tensor lse, Tensor? dout, "
    "Tensor? dmarginals, Tensor? dlse, bool wants_dspan_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    "policy_fwd": f"({POLICY}) -> (Tensor, Tensor, Tensor)",
    "policy_bwd": f"({POLICY}, Tensor p, Tensor norm, Tensor z, Tensor dp, "
    "bool wants_dspan_bias, bool wants_dhead_weights) -> (Tensor, Tensor, Tensor, Tensor)",
    "policy_divergence_fwd": f"({POLICY_DIVERGENCE}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "policy_divergence_bwd": f"({POLICY_DIVERGENCE}, Tensor norm, Tensor z, "
    "Tensor reference_norm, Tensor reference_z, Tensor u, Tensor w, Tensor dvalue, "
    "bool wants_dhead_weights) -> (Tensor, Tensor, Tensor)",
    "policy_divergence_loss": f"({POLICY_DIVERGENCE}, Tensor weights, Tensor? reference_norm, "
    "Tensor? reference_z, bool wants_dhead_weights) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "divergence_fwd": "(Tensor p, Tensor r, str kind, bool wants_dp, bool wants_dr, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    "scaled_gradient": "(Tensor gradient, Tensor factor) -> Tensor",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas(name: str) -> None:
    op = getattr(torch.ops.ral, name).default
    assert str(op._schema) == f"ral::{name}{SCHEMAS[name]}"
    assert torch.Tag.pt2_compliant_tag in op.tags


def test_nested_arguments_survive_the_flat_form() -> None:
    """Every input lands in its field, and a field that the op does not have holds its constant."""
    q, k, scope, padding, other_q, other_k, weights = (torch.zeros(n) for n in range(1, 8))
    policy = PolicyArgs(
        q, k, span_ids=None, span_bias=None, head_weights=None, scope=scope,
        key_padding_mask=padding, num_spans=0, query_start=1, scale=0.5, window_left=2,
        window_right=3, softcap=4.0, exclude_self=True, cu_seqlens_q=None, cu_seqlens_k=None,
        query_starts=None, max_rows=0, max_keys=0,
    )  # fmt: skip
    reference = ReferenceArgs(other_q, other_k, None, None, weights, 0.25, 5, 6, 7.0)
    args = PolicyDivergenceArgs(policy, reference, "kl", TargetArgs(*map(torch.zeros, (7, 8, 9))))
    signature = schema.Signature(PolicyDivergenceArgs)
    flat = signature.flatten(args, "cpu")
    assert len(flat) == signature.num_inputs
    assert all(x is None or isinstance(x, Tensor) for x in flat[: signature.num_tensors])
    built, *rest = signature.build((*flat, "more"))
    assert rest == ["cpu", "more"]
    assert all(x is y for x, y in zip(signature.tensors(args), flat, strict=False))

    def leaves(x: object) -> list[object]:
        if not dataclasses.is_dataclass(x):
            return [x]
        return [y for f in dataclasses.fields(x) for y in leaves(getattr(x, f.name))]

    assert all(a is b for a, b in zip(leaves(built), leaves(args), strict=True))


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 16, generator=generator) for n in (4, 8, 8))
    return q, k, v


class Seen(TorchDispatchMode):
    """Writes down the ops that reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_see_the_ops() -> None:
    """Selective checkpointing, FLOP counters and the like watch ops through such modes."""
    q, k, v = inputs()
    with Seen() as seen:
        rk.attention(q, k, v)
        rk.attention(q.requires_grad_(), k, v).out.sum().backward()
    ours = [name for name in seen.names if name.startswith("ral.")]
    assert ours == [f"ral.attention_{x}.default" for x in ("fwd", "fwd", "bwd")]


def test_tensors_that_need_the_dispatcher_get_it() -> None:
    """A lazily negated tensor, a transform of torch.func, and inference mode."""
    q, k, v = inputs()
    wanted = rk.attention(-q, k, v).out
    assert torch.equal(rk.attention(torch._neg_view(q), k, v).out, wanted)
    with torch.inference_mode():
        assert torch.equal(rk.attention(-q, k, v).out, wanted)
    batched = torch.func.vmap(lambda x: rk.attention(x, k, v).out)(torch.stack([-q, q]))
    assert torch.equal(batched[0], wanted)
    functional = torch.func.functionalize(lambda x: rk.attention(x, k, v).out)
    assert torch.equal(functional(-q), wanted)


def every_op() -> dict[str, Callable[[Tensor], Tensor]]:
    """Public function -> a sum of it as a function of the queries."""
    q, k, v = inputs()
    snapshot, advantages = rk.AttentionSnapshot(1.1 * q, k), torch.ones(1)
    spans = rk.Spans.from_lengths([3, 5])

    def marginals(x: Tensor) -> Tensor:
        found = rk.attention(x, k, v, spans).marginals
        assert found is not None
        return found.square().sum()

    return {
        "attention": lambda x: rk.attention(x, k, v).out.square().sum(),
        "attention, marginals": marginals,
        "scaled_dot_product_attention": lambda x: (
            rk.scaled_dot_product_attention(x, k, v).square().sum()
        ),
        "attention_policy": lambda x: rk.attention_policy(x, k).square().sum(),
        "attention_divergence": lambda x: rk.attention_divergence(x, k, snapshot).sum(),
        "ral_loss": lambda x: rk.ral_loss(x, k, snapshot, advantages),
        "divergence": lambda x: rk.divergence(x.softmax(-1), v[0, 0, 0].softmax(-1).expand_as(x))
        .sum(),
    }  # fmt: skip


@pytest.mark.parametrize("name", every_op())
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_torch_func_takes_gradients(name: str) -> None:
    """`grad`, and `vmap` around it, give what backward gives."""
    function, (q, _, _) = every_op()[name], inputs()
    leaf = q.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(function(leaf), leaf)
    assert torch.count_nonzero(wanted) > 0
    assert torch.equal(torch.func.grad(function)(q), wanted)
    batched = torch.func.vmap(torch.func.grad(function))(torch.stack([0.5 * q, q]))
    torch.testing.assert_close(batched[1], wanted)


@pytest.mark.parametrize("name", every_op())
def test_forward_mode_raises(name: str) -> None:
    """A tangent of zero would be a wrong answer."""
    function, (q, _, _) = every_op()[name], inputs()
    with pytest.raises(NotImplementedError, match=r"ral::\w+ has no forward-mode derivative"):
        torch.func.jvp(function, (q,), (q,))
    with forward_ad.dual_level():
        assert torch.equal(function(q), function(q))  # without a tangent
        with pytest.raises(NotImplementedError, match=r"ral::\w+ has no forward-mode derivative"):
            function(forward_ad.make_dual(q, q))


@pytest.mark.parametrize("name", every_op())
def test_a_second_derivative_raises(name: str) -> None:
    function, q = every_op()[name], inputs()[0].requires_grad_()
    (dq,) = torch.autograd.grad(function(q), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"ral::\w+ has no derivative"):
        torch.autograd.grad(dq.sum(), q)


def test_a_profiler_sees_a_plain_call() -> None:
    q, k, v = inputs()
    with torch.autograd.profiler.profile() as profile:
        rk.attention(q, k, v)
    assert [x.name for x in profile.function_events].count("ral::attention_fwd") == 1


def test_the_direct_call_gives_the_bits_of_the_dispatcher() -> None:
    """`define` returns a call that skips the dispatcher for plain tensors."""
    q, k, v = inputs()
    args = AttentionArgs(
        q, k, v, span_ids=torch.arange(8, dtype=torch.int32) // 3, span_bias=None, attn_mask=None,
        key_padding_mask=None, cu_seqlens_q=None, cu_seqlens_k=None, num_spans=3, scale=0.25,
        window_left=-1, window_right=0, top_left=False, softcap=0.0, row_start=0, row_stop=4,
    )  # fmt: skip

    def dispatch(args: AttentionArgs, backend: str) -> Any:
        return torch.ops.ral.attention_fwd(*schema.Signature(AttentionArgs).flatten(args, backend))

    def results(call: Callable[[AttentionArgs, str], Any]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        outputs = call(dataclasses.replace(args, q=leaves[0], k=leaves[1], v=leaves[2]), "")
        generator = torch.Generator().manual_seed(1)
        arriving = [torch.randn(x.shape, generator=generator) for x in outputs]
        with torch.no_grad():
            unrecorded = call(args, "")
        return [*outputs, *torch.autograd.grad(outputs, leaves, arriving), *unrecorded]

    direct, dispatched = results(attention_fwd), results(dispatch)
    assert len(direct) == 9
    for a, b in zip(direct, dispatched, strict=True):
        assert torch.equal(a, b)
