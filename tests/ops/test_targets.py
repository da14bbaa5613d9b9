"""Divergences from an `AttentionTarget`: values and gradients, forms, exactness, packing, spans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ral_kernels as rk
from ral_kernels.ops.divergence.arguments import KINDS
from ral_kernels.ops.policy import attention_divergence, attention_policy, ral_loss
from ral_kernels.runtime import cpu_library
from tests.conftest import skip_or_fail
from tests.ops.accuracy import assert_accurate, assert_gradient_accurate
from tests.ops.attention_cases import AttentionCase
from tests.ops.packed_cases import BY_NAME as PACKED
from tests.ops.packed_cases import PackedInputs
from tests.ops.policy_cases import BY_NAME, PolicyCase, PolicyInputs
from tests.ops.policy_eager import eager_divergence, eager_policy
from tests.ops.target_cases import FORMS, dense, num_rows_of, rows_of, target_of
from tests.ops.test_policy import (
    compact_floor,
    condition_of,
    gradients,
    magnitude_of,
    random_like,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("reference", "cpu")  # those that stream targets
CASES = ("length_2", "off_blocks", "gqa_7", "rows_middle", "scope_batch", "padding_left",
    "window_both", "with_self", "decode", "together", "scope_nothing", "empty_batch",
    "no_keys")  # fmt: skip
OF_FORM = {  # kl of a target with zeros is infinite: test_infinite_rows
    "shared": KINDS,
    "indexed": ("kl", "cross_entropy"),
    "sparse": ("jsd", "cross_entropy"),
    "scaled": ("reverse_kl",),
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    reason = rk.available_backends()[request.param]
    if reason != "yes":
        skip_or_fail(request.param, reason)
    return str(request.param)


def check_case(
    inputs: PolicyInputs, form: str, kind: str, backend: str, through_loss: bool = False
) -> None:
    dtype = inputs.q.dtype
    inputs.requires_grad_()
    target = target_of(form, inputs)
    call: dict[str, Any] = {**inputs.options, "backend": backend}
    weights = random_like(torch.empty(inputs.q.shape[0], num_rows_of(inputs)), 1)
    if through_loss:
        loss = ral_loss(inputs.q, inputs.k, target, weights, kind=kind, reduction="sum", **call)
        assert dtype == torch.float16 or "policy_divergence_loss" in str(loss.grad_fn)
        grads = gradients(loss, inputs, torch.ones(()))
    else:
        value = attention_divergence(inputs.q, inputs.k, target, kind, **call)
        grads = gradients(value, inputs, weights)

    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    conditions = []
    for wide in (torch.float64, dtype):
        x = inputs.to(wide).requires_grad_()
        p, lse = x.eager() if isinstance(x, PackedInputs) else eager_policy(x)
        r = rows_of(target, x, p.dtype)
        y = eager_divergence(p, r, kind)
        conditions.append(condition_of(lse))
        found.append((y, gradients(y, x, weights)))
    upcast = inputs.to(torch.float32)
    p, _ = upcast.eager() if isinstance(upcast, PackedInputs) else eager_policy(upcast)
    condition = conditions[0]
    (truth, true_grads), (_, baseline_grads) = found
    if through_loss:
        torch.testing.assert_close(
            loss.double(), (truth * weights).sum(), rtol=1e-4, atol=compact_floor(dtype) * 10
        )
    else:
        assert value.dtype == torch.float32
        baseline = eager_divergence(p, rows_of(target, upcast, torch.float32), kind)
        assert_accurate("value", value, truth, baseline, max(compact_floor(dtype), condition))
    for name, grad in grads.items():
        assert_gradient_accurate(
            f"d{name}", grad, true_grads[name], baseline_grads[name],
            magnitude_of(inputs, condition), condition,
        )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "form,kind", [(form, kind) for form in FORMS for kind in OF_FORM[form]], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
def test_against_a_target(
    case: str, form: str, kind: str, dtype: torch.dtype, backend: str
) -> None:
    check_case(BY_NAME[case].inputs(dtype), form, kind, backend)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "form,kind", [("shared", "jsd"), ("indexed", "kl"), ("sparse", "cross_entropy")], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
def test_loss_against_a_target(
    case: str, form: str, kind: str, dtype: torch.dtype, backend: str
) -> None:
    """Loss and gradients in one go."""
    if BY_NAME[case].base.batch_size > 0:
        check_case(BY_NAME[case].inputs(dtype), form, kind, backend, through_loss=True)


@pytest.mark.parametrize("through_loss", [False, True], ids=["divergence", "loss"])
@pytest.mark.parametrize("case", ["ragged", "rows", "tail", "many_short", "gqa_7", "scope",
    "window_both", "softcap"])  # fmt: skip
@pytest.mark.parametrize(
    "form,kind", [("shared", "jsd"), ("indexed", "kl"), ("sparse", "cross_entropy")], ids=str
)
def test_packed(case: str, form: str, kind: str, through_loss: bool, backend: str) -> None:
    check_case(PACKED[case].inputs(torch.float32), form, kind, backend, through_loss)


def test_packed_rows_have_the_target_of_their_sequence(backend: str) -> None:
    """The default index where G = S; rows after the last offset have none."""
    inputs = PACKED["tail"].inputs(torch.float32)
    values = torch.rand(1, 8, inputs.k.shape[2], generator=torch.Generator().manual_seed(1))
    bounds = inputs.options["cu_seqlens_q"].diff().tolist()
    index = torch.tensor([i for i, n in enumerate(bounds) for _ in range(n)] + [-1] * 3)
    got, wanted = (
        attention_divergence(inputs.q, inputs.k, target, backend=backend, **inputs.options)
        for target in (rk.AttentionTarget(values), rk.AttentionTarget(values, index=index[None]))
    )
    assert torch.equal(got, wanted) and got[0, :5].all() and not got[0, -3:].any()


@pytest.mark.slow(stands_in="test_against_a_target")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str, kind: str) -> None:
    case = PolicyCase(AttentionCase("", 3, 5, num_kv_heads=1, head_dim=2,
        options={"softcap": 2.0}))  # fmt: skip
    inputs = case.inputs(torch.float64).requires_grad_()
    target = target_of(form, inputs)

    def value(q: Tensor, k: Tensor) -> Tensor:
        return attention_divergence(q, k, target, kind, **inputs.options)

    finite = value(inputs.q, inputs.k).isfinite()
    assert finite.all() or kind == "kl"
    weights = torch.randn(1, 3).masked_fill(~finite, 0.0)
    for f in (
        lambda q, k: value(q, k).masked_fill(~finite, 0.0),
        lambda q, k: ral_loss(q, k, target, weights, kind=kind, **inputs.options),
    ):
        assert torch.autograd.gradcheck(f, (inputs.q, inputs.k))


# -- forms of one target ---------------------------------------------------------------------------


def results(inputs: PolicyInputs, reference: Any, kind: str, backend: str) -> list[Tensor]:
    """Divergence, its gradients, loss, its gradients."""
    call: dict[str, Any] = {"kind": kind, "backend": backend, **inputs.options}
    value = attention_divergence(inputs.q, inputs.k, reference, **call)
    weights = random_like(value, 1).masked_fill(value.isinf(), 0.0)
    loss = ral_loss(inputs.q, inputs.k, reference, weights, **call)
    return [
        value, *gradients(value, inputs, weights).values(),
        loss, *gradients(loss, inputs, torch.ones(())).values(),
    ]  # fmt: skip


def assert_equal(first: list[Tensor], second: list[Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", ["gqa_7", "padding_left", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_sparse_and_dense_give_the_same_bits(kind: str, case: str, backend: str) -> None:
    cases: dict[str, Any] = {**BY_NAME, "packed": PACKED["tail"]}
    inputs = cases[case].inputs(torch.float32).requires_grad_()
    sparse = target_of("sparse", inputs)
    same = rk.AttentionTarget(dense(sparse, inputs.k.shape[2]), index=sparse.index)
    assert sparse.ids is not None and same.ids is None
    first = results(inputs, sparse, kind, backend)
    assert first[0].any() and (kind == "kl" or first[1].any())
    assert_equal(first, results(inputs, same, kind, backend))


@pytest.mark.parametrize("kind", KINDS)
def test_as_dense_rows(kind: str, backend: str) -> None:
    """[B, T, N] of weights on valid keys that sum to 1 is the same reference, by the other way."""
    inputs = BY_NAME["padding_left"].inputs(torch.float32).requires_grad_()
    target = target_of("indexed", inputs)
    rows = rows_of(target, inputs, torch.float64).float()
    got = results(inputs, target, kind, backend)
    wanted = results(inputs, rows, kind, backend)
    without = ~rows.any(-1)
    assert without.any() and not got[0][without].any() and not wanted[0][without].any()
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-7)


def test_a_tensor_of_one_row_is_a_target(backend: str) -> None:
    inputs = BY_NAME["padding_left"].inputs(torch.float32).requires_grad_()
    target = target_of("shared", inputs)
    values = results(inputs, target.values.bfloat16(), "kl", backend)
    assert_equal(
        values, results(inputs, rk.AttentionTarget(target.values.bfloat16()), "kl", backend)
    )
    # with one row it is a dense row, which is not renormalised
    last = {**inputs.options, "rows": (60, 61), "backend": backend}
    row = 2 * target.values
    got = attention_divergence(inputs.q, inputs.k, row, **last)
    p = attention_policy(inputs.q, inputs.k, **last)
    torch.testing.assert_close(got, rk.divergence(p, row))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_target(kind: str, sparse: bool, backend: str) -> None:
    """An index of -1, or no weight on valid keys: 0, no gradient, even of a NaN that arrives."""
    inputs = BY_NAME["mha"].inputs(torch.float32).requires_grad_()
    values = torch.rand(1, 3, 127, generator=torch.Generator().manual_seed(1)) + 0.1
    values[0, 1, :80] = 0.0  # rows stand at keys 66 to 126: some see none of the others
    values[0, 2] *= 1e-38  # less than 2**-100 counts as none
    index = torch.arange(61)[None] % 4 - 1
    ids = torch.arange(127).expand(1, 3, -1) if sparse else None
    target = rk.AttentionTarget(values, ids, index=index)
    without = (index == -1) | (index == 2) | ((index == 1) & (torch.arange(66, 127) <= 80))
    value = attention_divergence(inputs.q, inputs.k, target, kind, backend=backend)
    assert not value[without].any() and (value[~without] > 0).all()
    finite = value.isfinite()
    dvalue = torch.where(without | ~finite, float("nan"), 1.0)
    dq, dk = torch.autograd.grad(value, (inputs.q, inputs.k), dvalue)
    assert dq.isfinite().all() and dk.isfinite().all()
    assert not dq[0].mT[:, :, without[0]].any()
    assert dq[0].mT[:, :, (~without & finite)[0]].any(1).all()


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "cross_entropy"])
def test_infinite_rows(kind: str, backend: str) -> None:
    """kl where the target lacks a key; the others where the policy puts no weight on one."""
    inputs = BY_NAME["mha"].inputs(torch.float32)
    values = torch.ones(1, 2, 127)
    if kind == "kl":
        values[:, 1, 3] = 0.0
    else:
        inputs.q.mul_(40)  # weights underflow
        p = attention_policy(inputs.q, inputs.k, backend=backend)
        values[:, 1] = (p > 0).all(1)
    inputs.requires_grad_()
    index = (torch.arange(61)[None] % 3 == 0).long()
    target = rk.AttentionTarget(values, index=index)
    value = attention_divergence(inputs.q, inputs.k, target, kind, backend=backend)
    infinite = value.isinf()
    if kind == "kl":
        assert torch.equal(infinite, index == 1)
    else:
        p = attention_policy(inputs.q, inputs.k, backend=backend)
        r = rows_of(target, inputs, torch.float32)
        assert torch.equal(infinite, ((p == 0) & (r > 0)).any(-1)) and infinite.any()
    finite = torch.where(infinite, float("nan"), 1.0)
    grads = torch.autograd.grad(value, (inputs.q, inputs.k), finite)
    assert all(x.isfinite().all() for x in grads) and not grads[0][:, :, infinite[0]].any()
    loss = ral_loss(
        inputs.q, inputs.k, target, torch.ones(1), ~infinite, kind=kind, backend=backend
    )
    assert loss.isfinite()
    for x in torch.autograd.grad(loss, (inputs.q, inputs.k)):
        assert x.isfinite().all()


# -- exactness -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["off_blocks", "gqa_7", "rows_middle", "scope_batch", "together"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_a_policy_that_equals_its_target_has_no_gradient(
    case: str, kind: str, dtype: torch.dtype, backend: str
) -> None:
    """Exactly zero: weights that are a policy already are not rounded again."""
    inputs = BY_NAME[case].inputs(dtype).requires_grad_()
    call: dict[str, Any] = {**inputs.options, "backend": backend}
    p = attention_policy(inputs.q, inputs.k, **call).detach()
    index = torch.arange(p.shape[1]).expand(p.shape[:2])
    value = attention_divergence(
        inputs.q, inputs.k, rk.AttentionTarget(p, index=index), kind, **call
    )
    for gradient in gradients(value, inputs, random_like(value, 1)).values():
        assert not gradient.any()
    if kind == "cross_entropy":
        entropy = -torch.special.xlogy(p, p).sum(-1)
        torch.testing.assert_close(value, entropy, rtol=1e-5, atol=1e-6)
    else:
        assert not value.any()


@pytest.mark.parametrize("scale", [2.0**-60, 3e-5, 7.0, 2.0**60])
def test_the_sum_of_weights_does_not_matter(scale: float, backend: str) -> None:
    inputs = BY_NAME["scope_batch"].inputs(torch.float32).requires_grad_()
    target = target_of("indexed", inputs)
    scaled = rk.AttentionTarget(target.values * scale, index=target.index)
    first = results(inputs, target, "jsd", backend)
    exactly = scale in (2.0**-60, 2.0**60)  # powers of two scale every weight and sum exactly
    for a, b in zip(first, results(inputs, scaled, "jsd", backend), strict=True):
        torch.testing.assert_close(a, b, **({"rtol": 0, "atol": 0} if exactly else {}))


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("case", ["off_blocks", "gqa_7", "together", "packed"])
def test_repeats_bit_for_bit(case: str, backend: str, threads: int) -> None:
    """Whatever the number of threads."""
    cases: dict[str, Any] = {**BY_NAME, "packed": PACKED["ragged"]}
    inputs = cases[case].inputs(torch.bfloat16).requires_grad_()
    target = target_of("sparse", inputs)
    first = results(inputs, target, "cross_entropy", backend)
    assert_equal(first, results(inputs, target, "cross_entropy", backend))
    torch.set_num_threads(1)
    assert_equal(first, results(inputs, target, "cross_entropy", backend))


# -- the kernels of the cpu backend ----------------------------------------------------------------


@pytest.mark.slow(stands_in="test_against_a_target")
@pytest.mark.parametrize("threads", [3], indirect=True)
@pytest.mark.parametrize("through_loss", [False, True], ids=["divergence", "loss"])
@pytest.mark.parametrize("case", ["gqa_7", "together", "packed"])
@pytest.mark.parametrize(
    "form,kind", [("shared", "jsd"), ("indexed", "kl"), ("sparse", "cross_entropy")], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_cpu_variants(
    case: str,
    form: str,
    kind: str,
    dtype: torch.dtype,
    through_loss: bool,
    isa: str,
    threads: int,
) -> None:
    cases: dict[str, Any] = {**BY_NAME, "packed": PACKED["tail_with_rows"]}
    check_case(cases[case].inputs(dtype), form, kind, "cpu", through_loss)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_scratch_does_not_grow_with_rows_times_keys(sparse: bool) -> None:
    """What grows with rows alone, or with keys alone, drops out of the mixed difference."""

    if (reason := rk.available_backends()["cpu"]) != "yes":
        skip_or_fail("cpu", reason)

    def scratch(num_rows: int, seqlen_k: int) -> list[int]:
        q, k = torch.zeros(1, 1, num_rows, 8).requires_grad_(), torch.zeros(1, 1, seqlen_k, 8)
        ids = torch.arange(0, seqlen_k, 1 + 6 * sparse)[None, None]
        target = rk.AttentionTarget(torch.ones(ids.shape), ids if sparse else None)
        found = []

        def measure(f: Callable[[], Tensor]) -> Tensor:
            cpu_library.scratch(reset=True)
            result = f()
            found.append(cpu_library.scratch()[0])
            return result

        value = measure(lambda: attention_divergence(q, k, target, backend="cpu"))
        measure(lambda: torch.autograd.grad(value.sum(), q)[0])
        measure(lambda: ral_loss(q, k, target, torch.ones(1), backend="cpu"))
        return found

    rows, keys = 128, 1024
    sizes = [scratch(m * rows, n * keys) for m, n in ((1, 1), (1, 2), (2, 1), (2, 2))]
    for base, keys_twice, rows_twice, both in zip(*sizes, strict=True):
        assert base > 0 and abs(both - keys_twice - rows_twice + base) < rows * keys // 8


# -- over spans ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("kind", KINDS)
def test_over_spans(kind: str, sparse: bool, backend: str) -> None:
    """Weights of spans, renormalised over all of them."""
    inputs = BY_NAME["spans_batch"].inputs(torch.float32).requires_grad_()
    values = torch.rand(3, 2, 5, generator=torch.Generator().manual_seed(1)) + 0.1
    index = torch.arange(33).expand(3, -1) % 3 - 1
    ids = torch.randperm(5, generator=torch.Generator().manual_seed(2)).expand(3, 2, 5)
    dense_values = torch.empty_like(values).scatter(-1, ids, values) if sparse else values
    target = rk.AttentionTarget(values, ids if sparse else None, index=index)
    got = results(inputs, target, kind, backend)
    r = dense_values / dense_values.sum(-1, keepdim=True)
    r = r.gather(1, index.clamp_min(0)[..., None].expand(-1, -1, 5))
    r = r.masked_fill((index == -1)[..., None], 0.0)
    wanted = results(inputs, r, kind, backend)
    assert got[0].any()
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    one = target_of("shared", PolicyInputs(inputs.q, values.new_zeros(3, 1, 5, 1), inputs.options))
    assert_equal(results(inputs, one, kind, backend), results(inputs, one.values, kind, backend))


# -- torch.library, torch.compile ------------------------------------------------------------------


@pytest.mark.slow(stands_in="test_against_a_target")
@pytest.mark.parametrize("backend", ["reference"], indirect=True)  # opcheck looks at no values
def test_opcheck(backend: str) -> None:
    inputs = BY_NAME["padding_left"].inputs(torch.float32).requires_grad_()
    target = target_of("sparse", inputs)
    args = (
        *(inputs.q, inputs.k, None, None, inputs.options["key_padding_mask"], None, None, None),
        *(None, None, None, None, None, target.values, target.ids, target.index),
        *(0, 0.25, -1, 0, 0.0, True, 0, 0, 0.25, -1, -1, 0.0, "cross_entropy", backend),
    )
    torch.library.opcheck(torch.ops.ral.policy_divergence_fwd.default, args)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in args]
    with torch.no_grad():
        value, *kept = torch.ops.ral.policy_divergence_fwd(*args)
    torch.library.opcheck(
        torch.ops.ral.policy_divergence_bwd.default,
        (*detached, *kept, random_like(value, 1), False),
    )
    op = torch.ops.ral.policy_divergence_loss.default
    torch.library.opcheck(op, (*args, random_like(value, 1), None, None, False))


@pytest.mark.slow(stands_in="test_against_a_target")
@pytest.mark.parametrize(
    "form,backend", [("sparse", "reference"), ("inside", "cpu"), ("tensor", "cpu")],
    indirect=["backend"],
)  # fmt: skip
def test_compile_without_graph_break(form: str, backend: str) -> None:
    """A target made before, one made in the graph, and a tensor of one row."""
    inputs = BY_NAME["padding_left"].inputs(torch.float32).requires_grad_()
    made = target_of("shared" if form == "tensor" else "sparse", inputs)

    def objective(q: Tensor, k: Tensor, values: Tensor) -> Tensor:
        target: Any = made
        if form == "inside":
            target = rk.AttentionTarget(values, made.ids, index=made.index)
        elif form == "tensor":
            target = values
        return ral_loss(
            q, k, target, torch.ones(3), kind="reverse_kl", backend=backend, **inputs.options
        )

    torch._dynamo.reset()
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    call = (inputs.q, inputs.k, made.values)
    torch.testing.assert_close(compiled(*call), objective(*call))
    for a, b in zip(
        torch.autograd.grad(compiled(*call), call[:2]),
        torch.autograd.grad(objective(*call), call[:2]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
