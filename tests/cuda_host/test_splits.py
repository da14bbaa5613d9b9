"""dk and dv of `attention` in parts, where kv heads and keys are too few to fill a GPU.

Each case runs in parts that its size would not ask for: against float64, with every gradient, and
on the kernels for Hopper, which must give the same bits in any order of threads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import ral_kernels as rk
from ral_kernels.ops.attention import cuda as attention_cuda
from tests.cuda_host.backend import Kernels, Violation, host_library, on_host
from tests.cuda_host.build import Patch, switched
from tests.cuda_host.test_attention import packed
from tests.cuda_host.test_hopper import DEVICE, HEAD_DIMS_ON_GPU, assert_close, assert_same_bits
from tests.cuda_host.test_hopper_bwd import BWD, BWD_SM90, Backward, assert_agree, both, hopper
from tests.cuda_host.test_seeded_bugs import FEWER, SOURCES, WRONG_NUMBERS
from tests.ops import test_attention as common
from tests.ops.attention_cases import AttentionCase

__all__ = ["hopper"]  # a fixture

CAUSAL = {"is_causal": True}
# A case and its parts: of the heads of a group, and ranges of queries, in tiles of 64.
SPLITS = [
    (AttentionCase("heads_28_4", 70, 90, 1, 28, 4, spans="ragged", options=CAUSAL), (4, 1)),
    (AttentionCase("heads_16_2", 70, 90, 1, 16, 2, 128, spans="equal"), (8, 1)),
    (AttentionCase("uneven_heads", 130, 140, 2, 6, 2, spans="gaps", options=CAUSAL), (2, 2)),
    (AttentionCase("ranges", 330, 140, 1, 2, 2, spans="unsorted", options=CAUSAL), (1, 3)),
    (AttentionCase("window", 300, 300, 1, 2, 1, options={"window": (70, 3)}), (2, 3)),
    (AttentionCase("more_parts_than_tiles", 130, 200, 1, 2, 1, spans="ragged"), (2, 5)),
    (AttentionCase("one_block_of_keys", 200, 40, 1, 3, 1, spans="equal"), (3, 2)),
    (AttentionCase("one_key", 70, 1, 1, 4, 2), (2, 2)),
    (AttentionCase("empty_rows", 150, 70, 1, 4, 2, spans="equal", options=CAUSAL), (2, 2)),
    (AttentionCase("padding", 90, 150, 2, 4, 2, key_padding="left", spans="batch"), (2, 2)),
    (AttentionCase("no_key_is_real", 70, 70, 2, 4, 2, key_padding="everything"), (2, 1)),
    (AttentionCase("mixed_128", 129, 65, 2, 4, 2, 128, layout="mixed", spans="gaps"), (2, 2)),
]
ids = [case.name for case, _ in SPLITS]

# Hopper's imitation is slow where heads or columns are many.
slow = pytest.mark.slow(stands_in="test_same_bits_on_hopper")
SLOW = {"heads_28_4", "heads_16_2", "uneven_heads", "mixed_128"}
ON_HOPPER = [
    pytest.param(*row, id=row[0].name, marks=slow if row[0].name in SLOW else ()) for row in SPLITS
]
# The rows that differ most.
FEW = [ON_HOPPER[i] for i in (2, 3, 5)]


@contextmanager
def parts_of(heads: int, ranges: int) -> Iterator[None]:
    with mock.patch.object(attention_cuda, "key_splits", lambda *_: (heads, ranges)):
        yield


# In a kernel that is wider than a head dim, and that Hopper has not.
COLUMNS = AttentionCase("columns_72", 140, 150, 1, 6, 2, 72, spans="ragged", options=CAUSAL)
# In the general kernels, whose tiles of queries are half as long.
GENERAL = AttentionCase("general", 140, 150, 2, 6, 2, 72, 128, spans="ragged", span_bias="full",
    key_padding="left", options={**CAUSAL, "softcap": 3.0})  # fmt: skip
# Of which two CTAs write two bands of columns.
BANDS = AttentionCase("bands", 140, 150, 1, 6, 2, 200, 256, spans="ragged", options=CAUSAL)
NOT_ON_HOPPER = [(COLUMNS, (3, 2)), (GENERAL, (3, 2)), (BANDS, (3, 2))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("case", "splits"),
    [*SPLITS, *NOT_ON_HOPPER],
    ids=[*ids, *(case.name for case, _ in NOT_ON_HOPPER)],
)
def test_outputs_and_gradients(
    case: AttentionCase, splits: tuple[int, int], dtype: torch.dtype, cuda_anywhere: None
) -> None:
    with parts_of(*splits):
        common.check_case(case, dtype, "cuda")


@pytest.mark.parametrize(("case", "splits"), ON_HOPPER)
def test_same_bits_on_hopper(case: AttentionCase, splits: tuple[int, int], hopper: Kernels) -> None:
    with parts_of(*splits):
        assert_agree(*both(hopper, case, torch.bfloat16, range(1, 2)))


@pytest.mark.parametrize(("case", "splits"), FEW)
def test_parts_repeat_and_leave_dq_alone(
    case: AttentionCase, splits: tuple[int, int], hopper: Kernels
) -> None:
    """The same bits in any order of threads; dq has no parts, and dk has other roundings."""
    whole = Backward(hopper, case, torch.float16).wanted
    with parts_of(*splits):
        wanted, found = both(hopper, case, torch.float16, range(2, 5))
        assert_agree(wanted, found)
        hopper.set_order(5)
        assert_agree(wanted, [Backward(hopper, case, torch.float16).wanted])
        hopper.set_order(0)
    assert torch.equal(wanted["q"], whole["q"])
    assert not torch.equal(wanted["k"], whole["k"])  # so the sums were in parts


@pytest.mark.parametrize("splits", [(2, 1), (1, 2), (2, 3)], ids=str)
def test_packed_sequences(splits: tuple[int, int], hopper: Kernels) -> None:
    """Sequences without queries, without keys, and shorter than a range has tiles."""
    lengths_q, lengths_k = [1, 130, 3, 0, 70], [65, 131, 0, 9, 70]
    q, k, v, cu_q, cu_k = packed(0, lengths_q, lengths_k, 64)
    spans = rk.Spans(torch.arange(len(k)) * 6 // len(k), 6)

    def outputs_of(*tensors: Tensor) -> list[Tensor]:
        outputs = rk.flash_attn_varlen_func(
            *tensors, cu_q, cu_k, max(lengths_q), max(lengths_k), causal=True, spans=spans
        )  # type: ignore[misc]
        return list(outputs)

    def gradients_of(outputs: list[Tensor], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        douts = [common.random_like(x, seed) for seed, x in enumerate(outputs)]
        return torch.autograd.grad(outputs, tensors, douts, retain_graph=True)

    exact = tuple(x.detach().double().requires_grad_() for x in (q, k, v))
    truth = gradients_of(outputs_of(*exact), exact)
    with on_host(hopper), parts_of(*splits):
        outputs = outputs_of(q, k, v)
        ours = gradients_of(outputs, (q, k, v))
        with mock.patch.object(hopper.functions, BWD, getattr(hopper.functions, BWD_SM90)):
            hopper.set_order(1)
            on_hopper = gradients_of(outputs, (q, k, v))
            hopper.set_order(0)
        assert hopper.calls == {"fwd": 1, "bwd": 2}
    for x, y, exactly in zip(ours, on_hopper, truth, strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(x.double(), exactly, rtol=2e-2, atol=2e-2)


def test_a_loss_on_marginals_alone(hopper: Kernels) -> None:
    """Without a gradient of `out`, parts of dv are exactly 0, and so is their sum."""
    case = AttentionCase("marginals", 70, 150, 1, 4, 2, spans="ragged")
    with parts_of(2, 2):
        wanted, found = both(hopper, case, torch.bfloat16, range(1, 3), (False, True, True))
    assert_agree(wanted, found)
    assert not wanted["v"].any() and wanted["q"].any() and wanted["k"].any()


# ---- Bugs put in on purpose ---------------------------------------------------------------------

SCORES = "attention/bwd_scores.h"
# The patch, and what finds it: a report that says so, or None for wrong numbers.
BUGS: dict[str, tuple[Patch, str | None]] = {
    "a_part_is_left_out": (
        ("attention/bwd_join.h", "part < params.splits.num_parts", "part < 3"),
        None,
    ),
    "parts_in_one_place": (
        (SCORES, "block.share * call.batch_size + block.b", "block.b"),
        "race between blocks: attention_bwd_dkdv_kernel",
    ),
    "a_head_is_left_out": ((SCORES, "cut(of_heads + 1)", "cut(of_heads + 1) - 1"), None),
    "ranges_overlap": ((SCORES, "int32_t(range * tiles / splits.ranges) * kTile", "0"), None),
    "parts_off_16_bytes": (
        ("attention/bwd.h", "(size + 3) / 4 * 4", "size"),
        "misaligned: attention_bwd_join_kernel",
    ),
}
# Rows, in all heads, are odd in number.
SEEDED = AttentionCase("seeded", 205, 100, 1, 3, 1, spans="ragged", options=CAUSAL)


@pytest.fixture(scope="module")
def seeded(build_folder: Path) -> Kernels:
    patches = switched([patch for patch, _ in BUGS.values()])
    return host_library(build_folder, (*patches, *FEWER), SOURCES)


@pytest.mark.parametrize("bug", range(len(BUGS) + 1), ids=["none", *BUGS])
def test_seeded_bug_of_parts_is_found(bug: int, seeded: Kernels) -> None:
    with on_host(seeded), parts_of(2, 2), seeded.with_bug(bug):
        if bug == 0:
            common.check_case(SEEDED, torch.float16, "cuda")
            return
        with pytest.raises(AssertionError) as caught:
            common.check_case(SEEDED, torch.float16, "cuda")
    _, report = list(BUGS.values())[bug - 1]
    if report is None:
        assert not isinstance(caught.value, Violation), caught.value
        assert re.search(WRONG_NUMBERS, str(caught.value)), caught.value
    else:
        assert isinstance(caught.value, Violation) and report in str(caught.value), caught.value


# ---- How many parts ------------------------------------------------------------------------------


def splits_of(
    seqlen: int,
    num_heads: int,
    num_kv_heads: int,
    multiprocessors: int = 132,
    sequences: int = 0,
    window: tuple[int, int] = (-1, 0),
) -> tuple[int, int]:
    args = SimpleNamespace(
        batch_size=1, num_heads=num_heads, num_kv_heads=num_kv_heads, seqlen_q=seqlen,
        seqlen_k=seqlen, cu_seqlens_q=torch.zeros(sequences + 1) if sequences else None,
        window_left=window[0], window_right=window[1],
    )  # fmt: skip
    return attention_cuda.key_splits(args, multiprocessors)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((2048, 28, 4), (4, 1)),
        ((4096, 28, 4), (2, 1)),
        ((8192, 28, 4), (1, 1)),  # 256 CTAs, the longest first
        ((8192, 4, 4), (1, 1)),
        ((4096, 1, 1), (1, 4)),
        ((61, 2, 1), (1, 1)),  # too little to do
        ((0, 2, 1), (1, 1)),
        ((4096, 28, 4, 16), (1, 1)),  # a GPU with fewer multiprocessors
        ((4096, 16, 2, 132, 8), (4, 1)),  # packed
        ((4096, 1, 1, 132, 0, (1024, 0)), (1, 1)),  # most ranges would see nothing of a block
        ((4096, 16, 2, 132, 0, (1024, 0)), (4, 1)),
        ((4096, 16, 2, 132, 0, (64, 64)), (2, 1)),  # a block of keys has 256 queries
        ((4096, 1, 1, 132, 0, (4096, 0)), (1, 4)),  # no window in fact
    ],
    ids=str,
)
def test_parts_are_as_many_as_fill_the_gpu(shape: Any, wanted: tuple[int, int]) -> None:
    assert splits_of(*shape) == wanted


def test_parts_take_no_more_memory_than_documented() -> None:
    """2 · 128 · (D + Dv) floats a multiprocessor, however long and wide a call is."""
    for multiprocessors in (16, 108, 132):
        for seqlen in (1, 100, 1000, 4096, 30000):
            for heads in ((28, 4), (16, 2), (8, 8), (64, 1)):
                parts = math.prod(splits_of(seqlen, *heads, multiprocessors))
                rows = math.ceil(seqlen / 128) * 128 * heads[1]
                assert parts == 1 or parts * rows <= 2 * 128 * multiprocessors


# ---- On a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS_ON_GPU)
def test_parts_in_a_graph_on_gpu(head_dim: int, hopper_gpu: None) -> None:
    """As many parts as the GPU asks for: near the sums without parts, and replayed bit for bit."""
    draw = torch.Generator(DEVICE).manual_seed(0)
    q, k, v = (
        torch.randn(1, h, 1024, head_dim, generator=draw, device=DEVICE).half().requires_grad_()
        for h in (16, 2, 2)
    )
    out = rk.attention(q, k, v, is_causal=True, backend="cuda").out
    dout = torch.randn(out.shape, generator=draw, device=DEVICE).half()

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

    with parts_of(1, 1):
        whole = call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        first = call()
    torch.cuda.current_stream().wait_stream(stream)
    assert_close(first, whole)
    assert not torch.equal(first[1], whole[1])  # so the sums were in parts
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(20):
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(captured, first)
