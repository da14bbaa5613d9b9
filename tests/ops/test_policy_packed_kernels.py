"""Packed rows in the kernels for GPUs: their launches, chunks of rows and empty blocks.

The Triton kernels run in the interpreter; tests/cuda_host/test_packed.py has those of CUDA.
"""

from __future__ import annotations

import random
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
LENGTHS_Q = (5, 0, 1, 70, 3, 1, 9)
LENGTHS_K = (5, 4, 1, 130, 0, 150, 4)


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
    def all_options(self) -> dict[str, Any]:
        cuts = {"cu_seqlens_q": offsets(self.lengths_q), "cu_seqlens_k": offsets(self.lengths_k)}
        return {**cuts, **self.options}

    def draw(self, seed: int, heads: tuple[int, int] = (4, 2)) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        sizes = zip(heads, (sum(self.lengths_q) + 3, sum(self.lengths_k) + 2), strict=True)
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
    """The divergence and the loss, with their gradients."""
    q, k = (x.to(dtype).requires_grad_() for x in case.draw(1))
    reference = case.snapshot(*(x.to(dtype) for x in case.draw(2)))
    value = attention_divergence(q, k, reference, backend=backend, **case.all_options)
    found = [value, *torch.autograd.grad((value * random_like(value)).sum(), (q, k))]
    weights = random_like(value).abs()
    loss = ral_loss(q, k, reference, weights, backend=backend, **case.all_options)
    return [*found, loss, *torch.autograd.grad(loss, (q, k))]


def assert_alike(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    assert any(x.any() for x in wanted)
    for i, (x, y) in enumerate(zip(found, wanted, strict=True)):
        scale = max(1.0, float(y.abs().max()))
        error = float((x.to(y.dtype) - y).abs().max()) / scale if y.numel() else 0.0
        assert error <= tolerance, f"tensor {i}: {error}"


NUM_SPANS = 5
NUM_ROWS, NUM_KEYS = sum(LENGTHS_Q) + 3, sum(LENGTHS_K) + 2
SPAN_IDS = torch.arange(NUM_KEYS) * 7 % (NUM_SPANS + 1) - 1  # unsorted, some keys in no span
SPANS = {"spans": rk.Spans(SPAN_IDS, NUM_SPANS)}
BIAS = torch.randn(1, 4, NUM_ROWS, NUM_SPANS, generator=torch.Generator().manual_seed(5))
CHOSEN = [(2, 5), (0, 0), (0, 1), (3, 68), (3, 3), slice(None), slice(-4, None)]

CASES = {
    "causal": {},
    "not_causal": {"is_causal": False, "exclude_self": False},
    "window_softcap": {"window": 20, "softcap": 2.0},
    "scope_rows": {"scope": torch.arange(NUM_KEYS) % 3 != 0, "rows": CHOSEN},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_comparison(name: str, dtype: torch.dtype, triton_here: None) -> None:
    """Value and gradients against the reference in float64, in chunks and in one."""
    case = Packed(options=CASES[name], dtype=dtype)
    wanted = comparison_and_gradients(case, "reference", torch.float64)
    found = comparison_and_gradients(case, "triton", dtype)
    assert_alike(found, wanted, 1e-6 if dtype == torch.float32 else 2e-4)


@pytest.mark.parametrize(
    "options",
    [*CASES.values(), SPANS, {**SPANS, "span_bias": BIAS, "window": 40}],
    ids=[*CASES, "spans", "span_bias"],
)
def test_policy(options: dict[str, Any], triton_here: None) -> None:
    """p, exactly 0 beyond a row's own keys, and gradients against the reference in float64."""
    case = Packed(options=options)
    wanted = policy_and_gradients(case, "reference", torch.float64)
    found = policy_and_gradients(case, "triton", torch.float32)
    assert_alike(found, wanted, 1e-6)
    assert torch.equal(found[0] == 0, wanted[0] == 0)


@pytest.mark.parametrize("limit", [1, 3000, 2**20])
def test_unchanged_policy_is_exactly_zero(
    limit: int, triton_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the rows are cut into chunks."""
    monkeypatch.setattr(triton_tiles, "scratch_elements", lambda architecture: limit)
    case = Packed()
    q, k = (x.requires_grad_() for x in case.draw(1))
    snapshot = case.snapshot(q.detach(), k.detach())
    value = attention_divergence(q, k, snapshot, "kl", backend="triton", **case.all_options)
    loss = ral_loss(q, k, snapshot, random_like(value), backend="triton", **case.all_options)
    assert not value.any() and not loss.any()
    for x in torch.autograd.grad(value.sum() + loss, (q, k)):
        assert not x.any()


@pytest.mark.parametrize("limit", [1, 3000])
def test_chunks_of_rows(limit: int, triton_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some sequences together, others cut between their rows: the value is the same in bits."""
    case = Packed()
    monkeypatch.setattr(triton_tiles, "scratch_elements", lambda architecture: 2**20)
    whole = comparison_and_gradients(case, "triton", torch.float32)
    monkeypatch.setattr(triton_tiles, "scratch_elements", lambda architecture: limit)
    found = comparison_and_gradients(case, "triton", torch.float32)
    assert torch.equal(found[0], whole[0]) and torch.equal(found[1], whole[1])
    assert_alike(found, whole, 1e-6)


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
    rows, heads = sum(case.lengths_q) + 3, 4
    smallest = 16  # rows or keys of a block of any kernel
    for name, programs in launches:
        if name not in ("policy_fwd_kernel", "divergence_fwd_kernel"):
            assert programs <= (rows // smallest + 64) * heads, name
    # The padded batch would have 64 * 2048 rows.
    assert (rows // smallest + 64) * heads < 64 * 2048 / 64 * heads


def test_scratch_follows_the_lengths(launches: list[tuple[str, int]]) -> None:
    """No tensor of all rows times all keys, nor of all rows times the longest sequence's keys."""
    case = Packed((512,) + (256,) * 64, (16384,) + (512,) * 64)
    q, k = (x.requires_grad_() for x in case.draw(1))
    reference = case.snapshot(q, k)
    with LargestTensor() as largest:
        ral_loss(q, k, reference, torch.ones(65), backend="triton", **case.all_options)
    assert largest.numel <= triton_tiles.scratch_elements("sm_90")
    names = [name for name, _ in launches]
    # 512 rows of 16384 keys fill the scratch; all other sequences fit it together.
    assert names.count("policy_bwd_dq_kernel") == 2


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
