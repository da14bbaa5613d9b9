"""Packed rows in the kernels for GPUs: their launches, chunks of rows and empty blocks.

The Triton kernels run in the interpreter; tests/cuda_host/test_policy_packed.py has those of CUDA.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import ral_kernels as rk
from ral_kernels.ops.policy import attention_divergence, attention_policy, ral_loss
from ral_kernels.ops.policy.chunks import Chunk, Packing, chunks_of_sequences
from ral_kernels.ops.policy.triton import tiles as triton_tiles
from ral_kernels.runtime import triton_runtime
from tests.conftest import skip_or_fail
from tests.ops.packed_cases import PackedCase, PackedInputs, offsets
from tests.ops.test_policy import random_like
from tests.ops.test_policy_divergence import snapshot_of
from tests.ops.test_policy_triton import LargestTensor

# No rows, one of each, several blocks, no keys, more rows than keys; and tokens of no sequence.
RAGGED = PackedCase(
    "ragged", ((0, 4), (1, 1), (66, 130), (3, 0), (9, 4)), tail=(3, 2), num_heads=2, num_kv_heads=1,
    head_dim=16,
)  # fmt: skip
CHOSEN = ((0, 0), (0, 1), (3, 66), (2, 2), slice(-4, None))


@pytest.fixture
def triton_here() -> None:
    reason = rk.available_backends()["triton"]
    if reason != "yes":
        skip_or_fail("triton", reason)


def inputs_for(case: PackedCase, dtype: torch.dtype, backend: str, seed: int = 0) -> PackedInputs:
    """The same numbers for all; the reference computes with them in float64."""
    inputs = case.inputs(dtype, seed)
    return inputs.to(torch.float64) if backend == "reference" else inputs


def with_gradients(output: Tensor, inputs: PackedInputs) -> list[Tensor]:
    doutput = random_like(output, 1).to(output.dtype)
    return [output, *torch.autograd.grad(output, [*inputs.differentiable().values()], doutput)]


def run_policy(case: PackedCase, dtype: torch.dtype, backend: str) -> list[Tensor]:
    inputs = inputs_for(case, dtype, backend).requires_grad_()
    p = attention_policy(inputs.q, inputs.k, backend=backend, **inputs.options)
    return with_gradients(p, inputs)


def run_divergence(case: PackedCase, dtype: torch.dtype, backend: str) -> list[Tensor]:
    inputs = inputs_for(case, dtype, backend).requires_grad_()
    other = inputs_for(case, dtype, backend, seed=7)
    reference = snapshot_of(other, **other.packing)
    value = attention_divergence(inputs.q, inputs.k, reference, backend=backend, **inputs.options)
    return with_gradients(value, inputs)


def run_loss(case: PackedCase, dtype: torch.dtype, backend: str) -> list[Tensor]:
    inputs = inputs_for(case, dtype, backend).requires_grad_()
    other = inputs_for(case, dtype, backend, seed=7)
    reference = snapshot_of(other, **other.packing)
    advantages = random_like(torch.empty(len(case.lengths)), 2)
    loss = ral_loss(inputs.q, inputs.k, reference, advantages, backend=backend, **inputs.options)
    return with_gradients(loss, inputs)


RUNS: dict[str, Callable[[PackedCase, torch.dtype, str], list[Tensor]]] = {
    "policy": run_policy,
    "divergence": run_divergence,
    "loss": run_loss,
}


def assert_alike(found: list[Tensor], wanted: list[Tensor]) -> None:
    """Each tensor to the accuracy of its dtype, relative to its largest number."""
    assert any(x.any() for x in wanted)
    for i, (x, y) in enumerate(zip(found, wanted, strict=True)):
        bound = max(1e-5, 2 * torch.finfo(x.dtype).eps) * float(y.detach().abs().max())
        error = float((x.to(y.dtype) - y).detach().abs().max())
        assert error <= bound, f"tensor {i}: {error} > {bound}"


CASES: dict[str, tuple[PackedCase, torch.dtype]] = {
    "causal": (RAGGED, torch.float32),
    "not_causal": (
        replace(RAGGED, options={"is_causal": False, "exclude_self": False}), torch.float32,
    ),
    "window_softcap": (replace(RAGGED, options={"window": 20, "softcap": 2.0}), torch.float16),
    "scope_rows": (replace(RAGGED, scope=True, rows=CHOSEN), torch.float32),
}  # fmt: skip
SPAN_CASES: dict[str, tuple[PackedCase, torch.dtype]] = {
    "spans": (replace(RAGGED, num_spans=5), torch.float16),
    "span_bias": (
        replace(RAGGED, num_spans=5, span_bias="full", options={"window": 40}), torch.float32,
    ),
}  # fmt: skip


@pytest.mark.slow(stands_in="test_policy_over_spans")
@pytest.mark.parametrize(("case", "dtype"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("run", RUNS)
def test_over_keys(run: str, case: PackedCase, dtype: torch.dtype, triton_here: None) -> None:
    """Value and gradients against the reference in float64; p is 0 where that is 0."""
    found, wanted = (RUNS[run](case, dtype, backend) for backend in ("triton", "reference"))
    assert_alike(found, wanted)
    if run == "policy":  # beyond a row's keys, and in rows of no sequence
        assert torch.equal(found[0] == 0, wanted[0] == 0)


@pytest.mark.parametrize(("case", "dtype"), SPAN_CASES.values(), ids=SPAN_CASES)
def test_policy_over_spans(case: PackedCase, dtype: torch.dtype, triton_here: None) -> None:
    found, wanted = (run_policy(case, dtype, backend) for backend in ("triton", "reference"))
    assert_alike(found, wanted)


def check_unchanged(case: PackedCase, dtype: torch.dtype, backend: str) -> None:
    """An unchanged policy has a loss of exactly 0 and gradients of exactly 0."""
    inputs = case.inputs(dtype).requires_grad_()
    snapshot = snapshot_of(inputs, **inputs.packing)
    q, k, options = inputs.q, inputs.k, inputs.options
    advantages = random_like(torch.empty(len(case.lengths)), 2)
    value = attention_divergence(q, k, snapshot, "kl", backend=backend, **options)
    loss = ral_loss(q, k, snapshot, advantages, backend=backend, **options)
    assert not value.any() and not loss.any()
    for x in torch.autograd.grad(value.sum() + loss, (q, k)):
        assert not x.any()


# All rows and keys together, two groups of sequences, and 64 rows at a time.
LIMITS = (2**20, 3000, 1)
SLOW = pytest.mark.slow(stands_in="test_unchanged_policy_is_exactly_zero")


@pytest.mark.parametrize("limit", [LIMITS[1], *(pytest.param(n, marks=SLOW) for n in LIMITS[::2])])
def test_unchanged_policy_is_exactly_zero(
    limit: int, triton_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the rows are cut into chunks."""
    monkeypatch.setattr(triton_tiles, "scratch_elements", lambda architecture: limit)
    check_unchanged(RAGGED, torch.float32, "triton")


@pytest.mark.slow(stands_in="test_unchanged_policy_is_exactly_zero")
def test_chunks_of_rows(triton_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and dq are the same in bits; dk is summed in another order."""
    found = []
    for limit in LIMITS:
        monkeypatch.setattr(triton_tiles, "scratch_elements", lambda architecture, n=limit: n)
        found.append(run_divergence(RAGGED, torch.float32, "triton"))
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0]) and torch.equal(other[1], found[0][1])
        assert_alike(other, found[0])


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


def alike(*lengths: tuple[int, int, int]) -> PackedCase:
    """(how many sequences, their rows, their keys), each."""
    each = tuple((rows, keys) for count, rows, keys in lengths for _ in range(count))
    return replace(RAGGED, lengths=each)


def run_everything(case: PackedCase) -> None:
    for run in RUNS.values():
        run(case, torch.float32, "triton")


def test_one_launch_for_all_sequences(launches: list[tuple[str, int]]) -> None:
    run_everything(alike((40, 64, 64)))
    many = [name for name, _ in launches]
    launches.clear()
    run_everything(alike((1, 64, 64)))
    assert many == [name for name, _ in launches]


def test_no_programs_for_padding(launches: list[tuple[str, int]]) -> None:
    """One long sequence and 63 short ones: the blocks of the packed rows, at most one more each."""
    run_everything(alike((1, 2048, 2048), (63, 16, 16)))
    tokens, heads = 2048 + 63 * 16 + 3, 2
    smallest = 16  # rows or keys of a block of any kernel
    most = (tokens // smallest + 64) * heads
    for name, programs in launches:
        # These have a program for each block of the longest sequence's keys, too.
        if name not in ("policy_fwd_kernel", "divergence_fwd_kernel"):
            assert programs <= most, name
    assert most < 64 * 2048 // 64 * heads  # that many the padded batch has, in blocks of 64


def test_scratch_follows_the_lengths(
    launches: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor of all rows times all keys, nor times the keys of the longest sequence."""
    limit = 64 * 2048
    monkeypatch.setattr(triton_tiles, "scratch_elements", lambda architecture: limit)
    case = alike((1, 64, 2048), (16, 32, 64))
    with LargestTensor() as largest:
        run_loss(case, torch.float32, "triton")
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
