"""Packed rows in the kernels for GPUs: their launches, chunks of rows and empty blocks.

The Triton kernels run in the interpreter; tests/cuda_host/test_packed.py has those of CUDA.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

import ral_kernels as rk
from ral_kernels.ops.policy import attention_divergence, attention_policy, ral_loss
from ral_kernels.ops.policy.chunks import Chunk, Packing, chunks_of_sequences
from ral_kernels.ops.policy.triton import tiles as triton_tiles
from ral_kernels.runtime import triton_runtime
from ral_kernels.snapshot import AttentionSnapshot
from tests.conftest import skip_or_fail
from tests.ops.test_policy_triton import LargestTensor

# Rows and keys: a sequence of several blocks, no rows, no keys, one of each, more rows than keys.
LENGTHS_Q = (0, 1, 66, 3, 9)
LENGTHS_K = (4, 1, 130, 0, 4)


@pytest.fixture
def triton_here() -> None:
    reason = rk.available_backends()["triton"]
    if reason != "yes":
        skip_or_fail("triton", reason)


def offsets(lengths: tuple[int, ...] | list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


@dataclass
class Packed:
    """Inputs of a packed call, with tokens beyond the last sequence."""

    lengths_q: tuple[int, ...] = LENGTHS_Q
    lengths_k: tuple[int, ...] = LENGTHS_K
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return sum(self.lengths_q) + 3

    @property
    def all_options(self) -> dict[str, Any]:
        cuts = {"cu_seqlens_q": offsets(self.lengths_q), "cu_seqlens_k": offsets(self.lengths_k)}
        return {**cuts, **self.options}

    def draw(self, seed: int, heads: tuple[int, int] = (2, 1)) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        sizes = zip(heads, (self.num_rows, sum(self.lengths_k) + 2), strict=True)
        q, k = (torch.randn(1, h, n, self.head_dim, generator=generator) for h, n in sizes)
        return q.to(self.dtype), k.to(self.dtype)

    def snapshot(self, q: Tensor, k: Tensor) -> AttentionSnapshot:
        of_both = ("is_causal", "window", "softcap", "rows", "cu_seqlens_q", "cu_seqlens_k")
        options = {name: x for name, x in self.all_options.items() if name in of_both}
        return AttentionSnapshot(q, k, **options)


def random_like(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(3))


def policy_and_gradients(case: Packed, backend: str, dtype: torch.dtype) -> list[Tensor]:
    leaves = [x.to(dtype).requires_grad_() for x in case.draw(1)]
    options = case.all_options
    if "span_bias" in options:
        bias = options["span_bias"].detach().clone().requires_grad_()
        options = {**options, "span_bias": bias}
        leaves.append(bias)
    p = attention_policy(leaves[0], leaves[1], backend=backend, **options)
    return [p, *torch.autograd.grad((p * random_like(p)).sum(), leaves)]


def comparison_and_gradients(case: Packed, backend: str, dtype: torch.dtype) -> list[Tensor]:
    q, k = (x.to(dtype).requires_grad_() for x in case.draw(1))
    reference = case.snapshot(*(x.to(dtype) for x in case.draw(2)))
    value = attention_divergence(q, k, reference, backend=backend, **case.all_options)
    return [value, *torch.autograd.grad((value * random_like(value)).sum(), (q, k))]


def loss_and_gradients(case: Packed, backend: str, dtype: torch.dtype) -> list[Tensor]:
    q, k = (x.to(dtype).requires_grad_() for x in case.draw(1))
    reference = case.snapshot(*(x.to(dtype) for x in case.draw(2)))
    advantages = random_like(torch.empty(len(case.lengths_q)))
    loss = ral_loss(q, k, reference, advantages, backend=backend, **case.all_options)
    return [loss, *torch.autograd.grad(loss, (q, k))]


def assert_alike(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    assert any(x.any() for x in wanted)
    for i, (x, y) in enumerate(zip(found, wanted, strict=True)):
        scale = max(1.0, float(y.detach().abs().max()))
        error = float((x.to(y.dtype) - y).detach().abs().max()) / scale
        assert error <= tolerance, f"tensor {i}: {error}"


Run = Callable[[Packed, str, torch.dtype], list[Tensor]]
NUM_SPANS = 5
NUM_ROWS, NUM_KEYS = sum(LENGTHS_Q) + 3, sum(LENGTHS_K) + 2
SPAN_IDS = torch.arange(NUM_KEYS) * 7 % (NUM_SPANS + 1) - 1  # unsorted, some keys in no span
SPANS = {"spans": rk.Spans(SPAN_IDS, NUM_SPANS)}
BIAS = torch.randn(1, 2, NUM_ROWS, NUM_SPANS, generator=torch.Generator().manual_seed(5))
CHOSEN = [(0, 0), (0, 1), (3, 66), (2, 2), slice(-4, None)]

CASES: dict[str, Packed] = {
    "causal": Packed(),
    "not_causal": Packed(options={"is_causal": False, "exclude_self": False}),
    "window_softcap": Packed(dtype=torch.float16, options={"window": 20, "softcap": 2.0}),
    "scope_rows": Packed(options={"scope": torch.arange(NUM_KEYS) % 3 != 0, "rows": CHOSEN}),
}
SPAN_CASES: dict[str, Packed] = {
    "spans": Packed(dtype=torch.float16, options=SPANS),
    "span_bias": Packed(options={**SPANS, "span_bias": BIAS, "window": 40}),
}


def tolerance(case: Packed) -> float:
    return 1e-6 if case.dtype == torch.float32 else 1e-3


@pytest.mark.slow(stands_in="test_policy_over_spans")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    "run",
    [policy_and_gradients, comparison_and_gradients, loss_and_gradients],
    ids=["policy", "divergence", "loss"],
)
def test_over_keys(case: Packed, run: Run, triton_here: None) -> None:
    """Value and gradients against the reference in float64; 0 where that is 0, and exactly."""
    found, wanted = run(case, "triton", case.dtype), run(case, "reference", torch.float64)
    assert_alike(found, wanted, tolerance(case))
    if run is policy_and_gradients:  # beyond a row's keys, and in rows of no sequence
        assert torch.equal(found[0] == 0, wanted[0] == 0)


@pytest.mark.parametrize("case", SPAN_CASES.values(), ids=SPAN_CASES)
def test_policy_over_spans(case: Packed, triton_here: None) -> None:
    found = policy_and_gradients(case, "triton", case.dtype)
    wanted = policy_and_gradients(case, "reference", torch.float64)
    assert_alike(found, wanted, tolerance(case))


# All rows and keys together, two groups of sequences, and 64 rows at a time.
LIMITS = (2**20, 3000, 1)
SLOW = pytest.mark.slow(stands_in="test_unchanged_policy_is_exactly_zero")


@pytest.mark.parametrize(
    "limit", [pytest.param(2**20, marks=SLOW), 3000, pytest.param(1, marks=SLOW)]
)
def test_unchanged_policy_is_exactly_zero(
    limit: int, triton_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the rows are cut into chunks."""
    monkeypatch.setattr(triton_tiles, "scratch_elements", lambda architecture: limit)
    case = Packed()
    q, k = (x.requires_grad_() for x in case.draw(1))
    snapshot = case.snapshot(q.detach(), k.detach())
    advantages = random_like(torch.empty(len(case.lengths_q)))
    value = attention_divergence(q, k, snapshot, "kl", backend="triton", **case.all_options)
    loss = ral_loss(q, k, snapshot, advantages, backend="triton", **case.all_options)
    assert not value.any() and not loss.any()
    for x in torch.autograd.grad(loss, (q, k)):
        assert not x.any()


@pytest.mark.slow(stands_in="test_unchanged_policy_is_exactly_zero")
def test_chunks_of_rows(triton_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and dq are the same in bits; dk is summed in another order."""
    found = []
    for limit in LIMITS:
        monkeypatch.setattr(triton_tiles, "scratch_elements", lambda architecture, n=limit: n)
        found.append(comparison_and_gradients(Packed(), "triton", torch.float32))
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0]) and torch.equal(other[1], found[0][1])
        assert_alike(other, found[0], 1e-6)


# -- launches --------------------------------------------------------------------------------------


@pytest.fixture
def launches(triton_here: None, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(kernel, number of programs) of the launches on an H200, which are not run."""
    found: list[tuple[str, int]] = []

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        found.append((kernel.__name__, torch.Size(grid).numel()))

    monkeypatch.setattr(triton_runtime, "launch", launch)
    monkeypatch.setattr(triton_runtime, "architecture", lambda device: "sm_90")
    return found


def run_everything(case: Packed) -> None:
    q, k = (x.requires_grad_() for x in case.draw(1))
    options = case.all_options
    reference = case.snapshot(q, k)
    attention_policy(q, k, backend="triton", **options).sum().backward()
    attention_divergence(q, k, reference, backend="triton", **options).sum().backward()
    ral_loss(q, k, reference, torch.ones(len(case.lengths_q)), backend="triton", **options)


def test_one_launch_for_all_sequences(launches: list[tuple[str, int]]) -> None:
    run_everything(Packed((64,) * 40, (64,) * 40))
    many = [name for name, _ in launches]
    launches.clear()
    run_everything(Packed((64,), (64,)))
    assert many == [name for name, _ in launches]


def test_no_programs_for_padding(launches: list[tuple[str, int]]) -> None:
    """One long sequence and 63 short ones: the blocks of the packed rows, at most one more each."""
    case = Packed((2048,) + (16,) * 63, (2048,) + (16,) * 63)
    run_everything(case)
    rows, heads = case.num_rows, 2
    smallest = 16  # rows or keys of a block of any kernel
    for name, programs in launches:
        if name not in ("policy_fwd_kernel", "divergence_fwd_kernel"):
            assert programs <= (rows // smallest + 64) * heads, name
    # The padded batch would have 64 * 2048 rows.
    assert (rows // smallest + 64) * heads < 64 * 2048 / 64 * heads


def test_scratch_follows_the_lengths(
    launches: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor of all rows times all keys, nor times the keys of the longest sequence."""
    limit = 64 * 2048
    monkeypatch.setattr(triton_tiles, "scratch_elements", lambda architecture: limit)
    case = Packed((64,) + (32,) * 64, (2048,) + (64,) * 64)
    q, k = (x.requires_grad_() for x in case.draw(1))
    reference = case.snapshot(q, k)
    with LargestTensor() as largest:
        ral_loss(q, k, reference, torch.ones(65), backend="triton", **case.all_options)
    assert largest.numel <= limit
    # The long sequence fills the scratch, and all others fit it together.
    assert [name for name, _ in launches].count("policy_bwd_dq_kernel") == 2


# -- chunks of rows, by themselves -----------------------------------------------------------------


def chunks_for(
    lengths_q: list[int], lengths_k: list[int], limit: int, block_q: int
) -> tuple[list[Chunk], list[int]]:
    starts = [k - q for q, k in zip(lengths_q, lengths_k, strict=True)]
    packing = Packing(
        offsets(lengths_q), offsets(lengths_k), torch.tensor(starts, dtype=torch.int32)
    )
    sizes = sum(lengths_q) + 3, max(lengths_k), sum(lengths_k) + 2
    return list(chunks_of_sequences(packing, *sizes, limit, block_q)), starts


@pytest.mark.parametrize("seed", range(40))
def test_every_row_is_in_one_chunk(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(1, 9)
    lengths_q = [draw.choice([0, 1, 7, 30, 100]) for _ in range(count)]
    lengths_k = [draw.choice([0, 1, 16, 90, 300]) for _ in range(count)]
    if max(lengths_q) == 0 or max(lengths_k) == 0:
        lengths_q[0] = lengths_k[0] = 5
    limit, block_q = draw.choice([1, 500, 4000, 10**6]), 16
    chunks, starts = chunks_for(lengths_q, lengths_k, limit, block_q)
    first_rows, first_keys = offsets(lengths_q).tolist(), offsets(lengths_k).tolist()
    seen: dict[int, tuple[int, int, int]] = {}  # row -> its first key, number of keys, position
    for chunk in chunks:
        num_rows = chunk.rows.stop - chunk.rows.start
        assert num_rows * chunk.seqlen_k <= limit or num_rows <= block_q
        if chunk.packing is None:
            assert chunk.is_last == (chunk.rows.stop in first_rows)
            assert chunk.is_first == (chunk.rows.start in first_rows)
            length = chunk.keys.stop - chunk.keys.start
            for t in range(num_rows):
                assert chunk.rows.start + t not in seen
                seen[chunk.rows.start + t] = chunk.keys.start, length, chunk.query_start + t
            continue
        assert chunk.is_first and chunk.is_last
        cuts = (chunk.packing.row_offsets, chunk.packing.key_offsets, chunk.packing.query_starts)
        rows, keys, begins = (x.tolist() for x in cuts)
        for i, begin in enumerate(begins):
            for t in range(rows[i + 1] - rows[i]):
                row = chunk.rows.start + rows[i] + t
                assert row not in seen
                seen[row] = chunk.keys.start + keys[i], keys[i + 1] - keys[i], begin + t
                assert keys[i + 1] - keys[i] <= chunk.seqlen_k
    for i, (num_rows, num_keys) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        for t in range(num_rows):
            wanted = first_keys[i], num_keys, starts[i] + t
            assert seen.get(first_rows[i] + t, wanted) == wanted
            assert num_keys == 0 or first_rows[i] + t in seen
