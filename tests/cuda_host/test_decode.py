"""A few queries against many keys: heads of a group as queries, and keys in parts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

import ral_kernels as rk
from ral_kernels.ops.attention import cuda as attention_cuda
from tests.cuda_host.backend import Kernels, host_library, on_host
from tests.cuda_host.build import Patch, switched
from tests.cuda_host.test_attention import check_any_order
from tests.cuda_host.test_seeded_bugs import FEWER, SOURCES, WRONG_NUMBERS
from tests.ops import test_attention as common
from tests.ops.attention_cases import AttentionCase

HALF = (torch.bfloat16, torch.float16)
ONE = [
    AttentionCase("plain", 1, 300, 2, 4, 2),
    AttentionCase("group_of_7", 1, 333, 2, 14, 2, 128, spans="ragged", options={"is_causal": True}),
    AttentionCase("one_head_a_group", 1, 300, 2, 3, 3, spans="equal", layout="strided"),
    AttentionCase("group_of_70", 1, 200, 1, 70, 1, spans="unsorted", num_spans=40),
    AttentionCase("window", 1, 300, 1, 4, 2, 80, spans="equal", options={"window": (70, 3)}),
    AttentionCase("no_marginals", 1, 300, 1, 4, 2, spans="equal", options={"rows": (1, 1)}),
    AttentionCase("padding", 1, 300, 2, 4, 2, 96, spans="batch", key_padding="left"),
    AttentionCase("padding_everything", 1, 300, 2, 4, 2, spans="equal", key_padding="everything"),
    AttentionCase("large", 1, 300, 1, 4, 2, scores="large", options={"scale": 1.0}),
    AttentionCase("increasing", 1, 300, 1, 4, 2, scores="increasing", spans="gaps"),
    AttentionCase("all_else", 1, 300, 2, 4, 2, 40, 48, layout="mixed", spans="ragged",
        span_bias="full", attn_mask="minus_infinity", key_padding="left", options={"softcap": 3.0}),
    AttentionCase("broadcast", 1, 290, 2, 32, 2, spans="ragged", span_bias="per_span",
        attn_mask="bool"),
    AttentionCase("dims_256", 1, 200, 1, 4, 2, 256, spans="ragged"),
]  # fmt: skip
FEW = [
    AttentionCase("causal", 9, 300, 2, 4, 2, spans="ragged", options={"is_causal": True}),
    AttentionCase("rows", 61, 300, 1, 2, 1, 128, spans="unsorted", num_spans=9,
        options={"rows": (7, 50), "is_causal": True}),
    AttentionCase("window", 30, 300, 1, 2, 1, spans="equal", options={"window": (20, 5)}),
    AttentionCase("more_parts_than_blocks", 5, 70, 1, 2, 1, spans="equal"),
    AttentionCase("bias", 20, 200, 1, 4, 2, 72, spans="gaps", span_bias="full",
        key_padding="right", options={"softcap": 3.0}),
    AttentionCase("empty_rows", 140, 61, 1, 2, 1, spans="equal", options={"is_causal": True}),
]  # fmt: skip


@contextmanager
def parts_of(num_parts: int) -> Iterator[None]:
    with mock.patch.object(attention_cuda, "key_parts", lambda *_: num_parts):
        yield


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", ONE + FEW, ids=lambda c: f"{c.seqlen_q}_{c.name}")
def test_outputs_and_gradients(
    case: AttentionCase, dtype: torch.dtype, parts: int, cuda_anywhere: None
) -> None:
    with parts_of(parts):
        common.check_case(case, dtype, "cuda")


def test_the_query_of_a_drop_in(cuda_on_host: Kernels) -> None:
    """Causal from the top left, one query sees the first key alone; from the other end, all."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, h, t, 64, generator=draw).half() for h, t in ((4, 1), (2, 300), (2, 300))
    )
    with parts_of(2):
        first = rk.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        last = rk.attention(q, k, v, is_causal=True).out
        whole = rk.attention(q, k, v).out
    assert cuda_on_host.calls["fwd"] == 3
    assert torch.equal(first, v[:, :, :1].repeat_interleave(2, 1)) and torch.equal(last, whole)


def test_packed_sequences(cuda_on_host: Kernels) -> None:
    """Sequences shorter than a part, without keys, and with more queries than one."""
    queries, keys = (1, 3, 0, 1, 1), (200, 5, 70, 0, 129)
    q_cuts, k_cuts = (torch.tensor((0, *n)).cumsum(0).int() for n in (queries, keys))
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(sum(n), h, 64, generator=draw).half()
        for n, h in ((queries, 4), (keys, 2), (keys, 2))
    )
    spans = rk.Spans(torch.arange(sum(keys)).int() // 50, 9)
    found = []
    for parts in (1, 3):
        with parts_of(parts):
            found.append(
                rk.flash_attn_varlen_func(q, k, v, q_cuts, k_cuts, 3, 200, causal=True, spans=spans)
            )
    assert cuda_on_host.calls["fwd"] == 2
    for whole, split in zip(*found, strict=True):
        torch.testing.assert_close(split, whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", [ONE[1], ONE[10], FEW[1]], ids=lambda c: c.name)
def test_any_order_of_threads_gives_the_same_bits(
    case: AttentionCase, cuda_on_host: Kernels
) -> None:
    with parts_of(3):
        check_any_order(case, cuda_on_host)


# ---- Bugs put in on purpose ---------------------------------------------------------------------

ROWS, JOIN = "attention/fwd_rows.h", "attention/fwd_join.h"
# The patch, and what finds it: a report that says so, or None for wrong numbers.
BUGS: dict[str, tuple[Patch, str | None]] = {
    "parts_in_one_place": (
        (ROWS, "store_global(params.parts.sums + first_row + row, Float2{m[i], sum});",
         "store_global(params.parts.sums + first_row % call.seqlen_q + row, Float2{m[i], sum});"),
        "race between blocks|uninitialised",
    ),
    "a_part_begins_within_a_block": (
        (ROWS, "low = int32_t(part * blocks / parts.num_parts) * kBlockK;",
         "low = int32_t(part * blocks / parts.num_parts) * kBlockK - (part > 0 ? 1 : 0);"),
        None,
    ),
    "the_last_part_is_left_out": (
        (ROWS, "(part + 1) * blocks / parts.num_parts",
         "(part + 1) * (blocks - 1) / parts.num_parts"),
        None,
    ),
    "all_parts_weigh_the_same": (
        (JOIN, "of_part.y * exp2(of_part.x - stabiliser(m))", "of_part.y"),
        None,
    ),
    "maximum_of_the_first_part": (
        (JOIN, "m = maximum(m, load_global(parts.sums + part * num_rows + row).x);",
         "m = load_global(parts.sums + row).x;"),
        None,
    ),
    "marginals_are_not_divided": ((JOIN, "share * inverse", "share"), None),
}  # fmt: skip
SEEDED = AttentionCase("seeded", 1, 300, 1, 4, 2, spans="ragged", scores="increasing")  # fmt: skip
# From part to part weights grow beyond what float32 holds.
STEEP = dataclasses.replace(SEEDED, options={"scale": 1.0})


@pytest.fixture(scope="module")
def seeded(build_folder: Path) -> Kernels:
    patches = switched([patch for patch, _ in BUGS.values()])
    return host_library(build_folder, (*patches, *FEWER), SOURCES)


@pytest.mark.parametrize("bug", range(len(BUGS) + 1), ids=["none", *BUGS])
def test_seeded_bug_of_parts_is_found(bug: int, seeded: Kernels) -> None:
    name = ["none", *BUGS][bug]
    with on_host(seeded), parts_of(3), seeded.with_bug(bug):
        if bug == 0:
            for correct in (SEEDED, STEEP):
                common.check_case(correct, torch.float16, "cuda")
            return
        with pytest.raises(AssertionError) as caught:
            common.check_case(STEEP if "maximum" in name else SEEDED, torch.float16, "cuda")
    _, report = BUGS[name]
    assert re.search(report or f"{WRONG_NUMBERS}|NaN", str(caught.value)), caught.value


# ---- How many parts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((1, 4, 4096), 16),  # what 256 keys a part allow
        ((1, 4, 100_000), 66),  # two CTAs a multiprocessor
        ((1, 4, 300), 1),
        ((64, 4, 100_000), 66),
        ((65, 4, 100_000), 1),  # more queries than a CTA has
        ((0, 4, 4096), 16),
        ((1, 4, 0), 1),
        ((1, 300, 100_000), 1),
        ((8, 4, 32_000, 8), 8),  # packed
        ((64, 4, 100_000, 0, 4096), 15),  # marginals of parts in 64 MiB
    ],
    ids=str,
)
def test_parts_are_as_many_as_fill_the_gpu(shape: Any, wanted: int) -> None:
    seqlen_q, num_heads, seqlen_k, sequences, num_spans = (*shape, 0, 0)[:5]
    args: Any = SimpleNamespace(
        batch_size=1, num_heads=num_heads, seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=128,
        head_dim_v=128, num_spans=num_spans,
        cu_seqlens_q=torch.zeros(sequences + 1) if sequences else None,
    )  # fmt: skip
    assert attention_cuda.key_parts(args, 132) == wanted
