"""The ops on tensors of a GPU: large shapes, torch.compile, CUDA graphs, streams, huge offsets.

Where there is no GPU, what does not need one runs in Triton's interpreter on small shapes, so that
this file is known to work before it first meets a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import ral_kernels as rk
from benchmarks.harness import examine
from benchmarks.harness.inputs import Heads
from benchmarks.harness.objective import Contestant, Objective, Problem
from benchmarks.problems.attention import ATTENTION
from benchmarks.problems.attention.problem import random_problem as attention_problem
from benchmarks.problems.ral import RAL
from benchmarks.problems.ral.problem import random_problem as ral_problem
from ral_kernels.runtime import triton_runtime
from tests.conftest import skip_or_fail

pytestmark = pytest.mark.gpu
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
needs_gpu = pytest.mark.skipif(not GPU, reason="no GPU")
# bfloat16 is what a GPU is used with; the interpreter multiplies it wrongly
HALF = torch.bfloat16 if GPU else torch.float16


@pytest.fixture(autouse=True)
def triton_is_there() -> None:
    reason = triton_runtime.available()
    if reason is not None:
        skip_or_fail("triton", reason)


@dataclass(frozen=True)
class Op:
    """One public op on one backend: `call(q, k, v)` gives what is differentiated."""

    name: str
    call: Callable[..., Tensor]
    backend: str = "triton"
    head_dim: int = 32

    def __str__(self) -> str:
        return self.name if self.backend == "triton" else f"{self.name}_{self.backend}"

    def __call__(self, *tensors: Tensor) -> Tensor:
        return self.call(*tensors, backend=self.backend)

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        return _inputs(dtype, seed, self.head_dim)


def _spans(k: Tensor) -> rk.Spans:
    seqlen = k.shape[2]
    return rk.Spans(torch.arange(seqlen, device=k.device) * 8 // seqlen, 8)


def _attention(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    result = rk.attention(q, k, v, _spans(k), is_causal=True, backend=backend)
    assert result.marginals is not None
    return result.out.float().sum() + result.marginals.square().sum() + result.lse.sum()


def _policy(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    return rk.attention_policy(q, k, backend=backend).square().sum()


def _span_policy(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    return rk.attention_policy(q, k, spans=_spans(k), backend=backend).square().sum()


def _divergence(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    p, r = q.float().softmax(-1), v[:, :1, : q.shape[2]].float().softmax(-1).expand_as(q)
    return rk.divergence(p, r, backend=backend).sum()


def _attention_divergence(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    snapshot = rk.AttentionSnapshot(0.9 * q.detach(), k)
    return rk.attention_divergence(q, k, snapshot, backend=backend).sum()


def _ral_loss(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    snapshot = rk.AttentionSnapshot(0.9 * q.detach(), k)
    advantages = torch.linspace(-1, 1, q.shape[2], device=q.device).expand(q.shape[0], -1)
    return rk.ral_loss(q, k, snapshot, advantages, backend=backend)


OPS = tuple(
    Op(call.__name__.strip("_"), call)
    for call in (_attention, _policy, _span_policy, _divergence, _attention_divergence, _ral_loss)
)
if GPU and rk.available_backends()["cuda"] == "yes":
    OPS += tuple(
        Op(call.__name__.strip("_"), call, "cuda", 64)
        for call in (_attention, _policy, _span_policy, _attention_divergence, _ral_loss)
    )
every_op = pytest.mark.parametrize("op", OPS, ids=str)


def _inputs(dtype: torch.dtype, seed: int = 0, head_dim: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    length = 300 if GPU else 17

    def draw(heads: int) -> Tensor:
        x = torch.randn(2, heads, length, head_dim, generator=generator)
        return x.to(DEVICE, dtype).requires_grad_()

    return draw(4), draw(2), draw(2)


def _gradients(op: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    loss = op(*tensors)
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [loss.detach(), *(x for x in found if x is not None)]


def _assert_equal(got: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert not b.isnan().any() and torch.equal(a, b)


@needs_gpu
def test_automatic_choice() -> None:
    """What a user of a GPU gets without asking is Triton, in every op."""
    inputs = _inputs(HALF)
    for op, call in (
        ("attention", lambda: rk.attention(*inputs)),
        ("policy", lambda: rk.attention_policy(*inputs[:2])),
    ):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        assert any(f"{op}_fwd" in event.key for event in profile.key_averages()), op


SHAPES = (Heads(16, 2, 128), Heads(28, 4, 128), Heads(16, 2, 64), Heads(8, 8, 256))


def _check_problem(objective: Objective, problem: Problem, names: tuple[str, ...]) -> None:
    contestants = [objective.registry[name] for name in names]
    exact = objective.exact(problem, {contestant.answer for contestant in contestants})
    for contestant in contestants:
        record = examine.examine_here(objective, contestant, problem, True, exact.__getitem__)
        assert record["status"] == "ok", f"{contestant.name}: {record['reason']}"


def _takes_part(contestant: Contestant, problem: Problem) -> bool:
    """Ours in the sweep's own race; those in layouts differ in their spans alone."""
    is_ours = contestant.ours and DEVICE in contestant.on
    return is_ours and contestant.refuse(problem, True) is None


@pytest.mark.parametrize("heads", SHAPES if GPU else SHAPES[:1], ids=str)
@pytest.mark.parametrize("dtype", triton_runtime.DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_large_attention_against_float64(heads: Heads, dtype: torch.dtype) -> None:
    """Outputs and all gradients; no multiple of any tile, and spans of every length."""
    lengths = [1, 4000, 63, 4096, 500] if GPU else [1, 20, 9]
    if not GPU:
        heads = Heads(4, 2, 32)
    problem = attention_problem(lengths, heads, dtype, DEVICE)
    ours = [c.name for c in ATTENTION.contestants if _takes_part(c, problem)]
    assert {"ral", "ral_plain"} <= set(ours)
    _check_problem(ATTENTION, problem, tuple(ours))


@pytest.mark.parametrize("dtype", triton_runtime.DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_large_ral_loss_against_float64(dtype: torch.dtype) -> None:
    heads, lengths, rows = (
        (Heads(), [9000, 1, 7500], 1000) if GPU else (Heads(4, 2, 32), [20, 11], 9)
    )
    problem = ral_problem(lengths, rows, heads, dtype, DEVICE)
    ours = [c.name for c in RAL.contestants if _takes_part(c, problem)]
    assert {"ral", "ral_again", "ral_dense"} <= set(ours)
    _check_problem(RAL, problem, tuple(ours))


@every_op
@pytest.mark.parametrize(
    "dtype", [torch.float32, HALF] if GPU else [HALF], ids=lambda dtype: str(dtype)[6:]
)
def test_repeats_bit_for_bit(op: Op, dtype: torch.dtype) -> None:
    if op.backend == "cuda" and dtype == torch.float32:
        pytest.skip("no float32 in CUDA C++")
    first = _gradients(op, op.inputs(dtype))
    for _ in range(20 if GPU else 1):
        _assert_equal(_gradients(op, op.inputs(dtype)), first)


@pytest.mark.parametrize("op", OPS if GPU else OPS[2:4], ids=str)
def test_compile(op: Op) -> None:
    """Without a graph break, by the compiler that users have."""
    torch._dynamo.reset()
    inputs = op.inputs(HALF)
    compiled = torch.compile(op, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    loss, *gradients = _gradients(op, inputs)
    got_loss, *got = _gradients(compiled, inputs)
    torch.testing.assert_close(got_loss, loss, rtol=1e-3, atol=1e-3)
    for a, b in zip(got, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@needs_gpu
@every_op
def test_cuda_graph(op: Op) -> None:
    """Forward and backward are captured and replayed on other inputs."""
    inputs, others = op.inputs(HALF), op.inputs(HALF, seed=1)
    wanted = _gradients(op, others)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            _gradients(op, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = _gradients(op, inputs)
    with torch.no_grad():
        for mine, other in zip(inputs, others, strict=True):
            mine.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    _assert_equal(got, wanted)


@needs_gpu
@every_op
def test_two_streams(op: Op) -> None:
    """Calls on two streams at once do not share scratch memory."""
    inputs = [op.inputs(HALF, seed) for seed in range(2)]
    wanted = [_gradients(op, tensors) for tensors in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    got: list[list[list[Tensor]]] = [[], []]
    for _ in range(20):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[index].append(_gradients(op, inputs[index]))
    torch.cuda.synchronize()
    for index, results in enumerate(got):
        for result in results:
            _assert_equal(result, wanted[index])


def _far_apart(shape: tuple[int, ...], seed: int) -> Tensor:
    """[2, H, T, D] whose second sample lies more than 2**31 elements behind the first."""
    _, h, t, d = shape
    distance = 2**31 + 64
    memory = torch.empty(distance + h * t * d, dtype=HALF, device=DEVICE)
    view = memory.as_strided(shape, (distance, t * d, d, 1))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return view.copy_(values).requires_grad_()


@needs_gpu
@every_op
def test_offsets_beyond_2_31(op: Op) -> None:
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    far = tuple(
        _far_apart((2, heads, 130, op.head_dim), seed) for seed, heads in enumerate((4, 2, 2))
    )
    near = tuple(x.detach().contiguous().requires_grad_() for x in far)
    try:
        _assert_equal(_gradients(op, far), _gradients(op, near))
    finally:
        del far
        torch.cuda.empty_cache()  # 13 GB, which tests in other processes need
