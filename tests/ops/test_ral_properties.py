"""Identities of policies and divergences that hold for any input."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import ral_kernels as rk
from ral_kernels.ops.divergence import divergence
from ral_kernels.ops.divergence.arguments import KINDS
from ral_kernels.ops.policy import attention_divergence, attention_policy, ral_loss
from ral_kernels.runtime import triton_runtime
from ral_kernels.snapshot import AttentionSnapshot
from tests.hypothesis_settings import REPRODUCIBLE

# The backend's fixture and those of conftest.py hold for all examples of a test.
EXAMPLES = settings(
    REPRODUCIBLE,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
EXAMPLES_IN_INTERPRETER = 3  # of Triton's kernels: an example takes seconds there


def few_in_interpreter(test: Callable[..., None]) -> Callable[..., None]:
    """Leave out later examples where each takes seconds."""
    calls: Counter[str] = Counter()

    @functools.wraps(test)
    def run(*args: Any, backend: str, **kwargs: Any) -> None:
        calls[backend] += 1
        slow = backend == "triton" and triton_runtime.interpreted()
        if not slow or calls[backend] <= EXAMPLES_IN_INTERPRETER:
            test(*args, backend=backend, **kwargs)

    return run


pytestmark = pytest.mark.slow_in_interpreter(
    stands_in="tests/ops/test_policy_divergence.py::test_against_snapshot"
)
TOLERANCE = 2e-6  # float32 rounding of sums over at most 70 keys


class Draw:
    """A random problem: q and k of a policy and of a reference, and options for both."""

    def __init__(self, draw: Any) -> None:
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        b, hk, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
        n = draw(st.integers(1, 70))
        t = draw(st.integers(1, n))
        d = draw(st.sampled_from([4, 16, 24]))
        sharpness = draw(st.sampled_from([0.1, 1.0, 3.0]))

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.num_heads, self.num_kv_heads, self.seqlen_k = hk * group, hk, n
        self.q, self.q_old = (sharpness * normal(b, hk * group, t, d) for _ in range(2))
        self.k, self.k_old = normal(b, hk, n, d), normal(b, hk, n, d)
        self.advantages = normal(b, t)
        self.scope = torch.rand(b, n, generator=generator) < 0.7
        num_spans = draw(st.integers(1, 6))
        self.spans = rk.Spans(torch.randint(-1, num_spans, (n,), generator=generator), num_spans)
        self.partition = rk.Spans(torch.randint(0, num_spans, (n,), generator=generator), num_spans)
        self.options: dict[str, Any] = {
            "is_causal": draw(st.booleans()),
            "exclude_self": draw(st.booleans()),
        }
        if draw(st.booleans()):
            self.options["window"] = draw(st.integers(0, n))
        if draw(st.booleans()):
            self.options["softcap"] = draw(st.sampled_from([0.5, 2.0]))
        self.generator = generator

    def snapshot(self) -> AttentionSnapshot:
        options = {name: x for name, x in self.options.items() if name != "exclude_self"}
        return AttentionSnapshot(self.q_old, self.k_old, **options)

    def reference(self, **options: Any) -> Tensor:
        return attention_policy(self.q_old, self.k_old, **self.options, **options)


PROBLEMS = st.composite(lambda draw: Draw(draw))()


def sums_to_one_or_zero(p: Tensor) -> bool:
    sums = p.sum(-1)
    return bool((((sums - 1).abs() < TOLERANCE) | (sums == 0)).all())


@EXAMPLES
@given(problem=PROBLEMS)
@few_in_interpreter
def test_rows_sum_to_one(problem: Draw, backend: str) -> None:
    for more in ({}, {"scope": problem.scope}, {"spans": problem.spans}):
        p = attention_policy(problem.q, problem.k, backend=backend, **problem.options, **more)
        assert (p >= 0).all() and sums_to_one_or_zero(p)
    causal = attention_policy(problem.q, problem.k, backend=backend)
    at_first_key = problem.seqlen_k == problem.q.shape[2]  # row 0 then has no key before its own
    assert ((causal.sum(-1)[:, int(at_first_key) :] - 1).abs() < TOLERANCE).all()


@EXAMPLES
@given(problem=PROBLEMS)
@few_in_interpreter
def test_p_outside_the_scope_is_zero(problem: Draw, backend: str) -> None:
    p = attention_policy(
        problem.q, problem.k, scope=problem.scope, backend=backend, **problem.options
    )
    assert not p[~problem.scope[:, None].expand_as(p)].any()


@EXAMPLES
@given(problem=PROBLEMS)
@few_in_interpreter
def test_restricting_the_scope_renormalises(problem: Draw, backend: str) -> None:
    options = {**problem.options, "backend": backend}
    p = attention_policy(problem.q, problem.k, **options)
    restricted = attention_policy(problem.q, problem.k, scope=problem.scope, **options)
    share = torch.where(problem.scope[:, None], p, 0.0)
    total = share.sum(-1, keepdim=True)
    wanted = share / torch.where(total == 0, 1.0, total)
    torch.testing.assert_close(restricted, wanted, rtol=1e-5, atol=TOLERANCE)


@EXAMPLES
@given(problem=PROBLEMS)
@few_in_interpreter
def test_jsd_is_bounded_and_symmetric(problem: Draw, backend: str) -> None:
    options = {**problem.options, "backend": backend}
    p, r = attention_policy(problem.q, problem.k, **options), problem.reference(backend=backend)
    forward = attention_divergence(problem.q, problem.k, problem.snapshot(), **options)
    backward = attention_divergence(problem.q_old, problem.k_old, p, **options)
    dense = divergence(p, r, backend=backend)
    for value in (forward, backward, dense):
        assert (value >= 0).all() and (value <= math.log(2) + TOLERANCE).all()
        torch.testing.assert_close(value, dense, rtol=1e-5, atol=TOLERANCE)
    assert torch.equal(dense, divergence(r, p, backend=backend))


@EXAMPLES
@given(problem=PROBLEMS)
@few_in_interpreter
def test_divergences_are_not_negative(problem: Draw, backend: str) -> None:
    for kind in KINDS:
        value = attention_divergence(
            problem.q, problem.k, problem.snapshot(), kind, backend=backend, **problem.options
        )
        # -log p of a p that is rounded above 1
        assert (value >= (-TOLERANCE if kind == "cross_entropy" else 0)).all()


@EXAMPLES
@given(problem=PROBLEMS)
@few_in_interpreter
def test_jsd_over_spans_is_at_most_jsd_over_tokens(problem: Draw, backend: str) -> None:
    """Merging outcomes loses information: the data-processing inequality."""
    options = {**problem.options, "scope": problem.spans, "backend": backend}
    tokens = attention_divergence(problem.q, problem.k, problem.snapshot(), **options)
    spans = attention_divergence(
        problem.q, problem.k, problem.snapshot(), spans=problem.spans, **options
    )
    assert (spans <= tokens + TOLERANCE).all()


@EXAMPLES
@given(problem=PROBLEMS)
@few_in_interpreter
def test_permuting_heads_changes_nothing(problem: Draw, backend: str) -> None:
    """The heads of a kv head move together with it, and among themselves."""
    kv = torch.randperm(problem.num_kv_heads, generator=problem.generator)
    group = problem.num_heads // problem.num_kv_heads
    inner = torch.randperm(group, generator=problem.generator)
    heads = (kv[:, None] * group + inner).flatten()
    options = {**problem.options, "backend": backend}
    p = attention_policy(problem.q, problem.k, **options)
    permuted = attention_policy(problem.q[:, heads], problem.k[:, kv], **options)
    torch.testing.assert_close(permuted, p, rtol=1e-5, atol=TOLERANCE)
    snapshot = problem.snapshot()
    values = [
        attention_divergence(q, k, snapshot, **options)
        for q, k in ((problem.q, problem.k), (problem.q[:, heads], problem.k[:, kv]))
    ]
    torch.testing.assert_close(*values, rtol=1e-4, atol=TOLERANCE)


@EXAMPLES
@given(problem=PROBLEMS)
@few_in_interpreter
def test_relabelling_spans_changes_nothing(problem: Draw, backend: str) -> None:
    spans = problem.partition
    labels = torch.randperm(spans.num_spans, generator=problem.generator)
    relabelled = rk.Spans(labels[spans.ids.long()], spans.num_spans)
    options = {**problem.options, "backend": backend}
    p = attention_policy(problem.q, problem.k, spans=spans, **options)
    q = attention_policy(problem.q, problem.k, spans=relabelled, **options)
    torch.testing.assert_close(q[..., labels], p, rtol=1e-5, atol=TOLERANCE)
    values = [
        attention_divergence(problem.q, problem.k, problem.snapshot(), spans=s, **options)
        for s in (spans, relabelled)
    ]
    torch.testing.assert_close(*values, rtol=1e-4, atol=TOLERANCE)


@EXAMPLES
@given(problem=PROBLEMS, factor=st.sampled_from([-4.0, -1.0, 0.5, 0.0, 2.0]))
@few_in_interpreter
def test_scaling_the_advantages_scales_the_gradients(
    problem: Draw, factor: float, backend: str
) -> None:
    """Of either sign, and by 0."""
    q, k = problem.q.requires_grad_(), problem.k.requires_grad_()
    snapshot = problem.snapshot()

    def gradients(advantages: Tensor) -> tuple[Tensor, ...]:
        loss = ral_loss(q, k, snapshot, advantages, backend=backend, **problem.options)
        return torch.autograd.grad(loss, (q, k))

    once, scaled = gradients(problem.advantages), gradients(factor * problem.advantages)
    for a, b in zip(once, scaled, strict=True):
        torch.testing.assert_close(b, factor * a, rtol=1e-5, atol=1e-12)


@EXAMPLES
@given(problem=PROBLEMS)
@few_in_interpreter
def test_loss_is_linear_in_the_tokens(problem: Draw, backend: str) -> None:
    """The loss of a batch is the sum over any split of its tokens."""
    snapshot = problem.snapshot()
    options = {**problem.options, "backend": backend, "reduction": "sum"}
    mask = torch.rand(problem.advantages.shape, generator=problem.generator) < 0.5
    parts = [
        ral_loss(problem.q, problem.k, snapshot, problem.advantages, m, **options)
        for m in (torch.ones_like(mask), mask, ~mask)
    ]
    torch.testing.assert_close(parts[0], parts[1] + parts[2], rtol=1e-4, atol=1e-5)


@EXAMPLES
@given(problem=PROBLEMS)
@few_in_interpreter
def test_equal_advantages_over_a_shared_prefix_cancel(problem: Draw, backend: str) -> None:
    """Rollouts with the same prefix and advantages that sum to 0 get no signal: DESIGN, fact 3."""
    q = problem.q[:1].expand(2, -1, -1, -1).clone().requires_grad_()
    k = problem.k[:1].expand(2, -1, -1, -1).clone()
    snapshot = problem.snapshot()[torch.tensor([0, 0])]
    loss = ral_loss(q, k, snapshot, torch.tensor([1.0, -1.0]), backend=backend, **problem.options)
    assert abs(float(loss.detach())) < 1e-7
    (dq,) = torch.autograd.grad(loss, q)
    assert torch.equal(dq[0], -dq[1])
