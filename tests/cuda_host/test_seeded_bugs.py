"""Bugs put into the kernels of `attention` on purpose: the harness, or the comparison with the
reference that it makes possible, must find each of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.cuda_host.backend import Violation, host_library, on_host
from tests.cuda_host.build import Patch, only, sources_of
from tests.ops import test_attention as common
from tests.ops.attention_cases import AttentionCase

# One dtype and head dim: each bug is a build of its own.
FEWER = only("Fp16, 64")
SOURCES = sources_of("attention/*")
CASE = AttentionCase("seeded", 140, 200, spans="ragged", num_spans=6, options={"is_causal": True})
WRONG_NUMBERS = r"error|cosine|bias"

# What is wrong, the patch, and what finds it: a report of that kind, or None for wrong numbers.
BUGS: list[tuple[str, Patch, str | None]] = [
    (
        "missing_barrier_before_v",
        (
            "attention/fwd.h",
            "sync_block();  // V has arrived; all warps have formed their scores",
            "",
        ),
        r"race: attention_fwd_kernel, block \d+: thread \d+ \(tiles\.h:\d+\)",
    ),
    (
        "missing_barrier_between_heads",
        ("attention/bwd_dkdv.h", "sync_block();  // the previous queries are no longer read", ""),
        r"race: attention_bwd_dkdv_kernel",
    ),
    (
        "missing_wait_for_copies",
        (
            "attention/fwd.h",
            "wait_for_copies<0>();\n      sync_block();  // K has arrived",
            "sync_block();  // K has arrived",
        ),
        r"in flight: attention_fwd_kernel",
    ),
    (
        "missing_warp_barrier_in_the_stage",
        ("core/tiles.h", "  sync_warp();\n  constexpr int kChunks", "  constexpr int kChunks"),
        r"race: attention_\w+_kernel.*without a sync_warp",
    ),
    (
        "key_beyond_the_end",
        (
            "attention/fwd.h",
            "first + row >= visibility.length_k",
            "first + row > visibility.length_k",
        ),
        r"out of range: attention_fwd_kernel",
    ),
    (
        "row_beyond_the_end",
        ("core/tiles.h", "at_row < num_rows &&", "at_row <= num_rows &&"),
        r"(out of range|race between blocks): attention_\w+_kernel",
    ),
    (
        "span_border_off_by_one",
        ("attention/marginals.h", "column >= end) continue", "column > end) continue"),
        None,
    ),
    (
        "span_of_the_next_key",
        (
            "attention/marginals.h",
            "keys.span_of(begin)",
            "keys.span_of(begin == 0 ? 0 : begin - 1)",
        ),
        None,
    ),
    (
        "wrong_lane_mapping",
        (
            "core/tiles.h",
            "offset(lane % 8 + lane / 16 * 8, lane / 8 % 2)",
            "offset(lane % 16, lane / 16)",
        ),
        None,
    ),
    (
        "causal_diagonal_off_by_one",
        ("core/keys.h", "minimum(query + offset + right,", "minimum(query + offset + right + 1,"),
        None,
    ),
    (
        "run_not_rescaled",
        ("attention/marginals.h", "run[i] = run[i] * alpha +", "run[i] = run[i] +"),
        None,
    ),
]


# One of each kind of finding in the quick tier; each bug is a build of its own.
QUICK_BUGS = (
    "missing_barrier_before_v",
    "missing_wait_for_copies",
    "key_beyond_the_end",
    "run_not_rescaled",
)
slow = pytest.mark.slow(stands_in="test_seeded_bug_is_found")


@pytest.mark.parametrize(
    ("patch", "report"),
    [pytest.param(*bug, id=name, marks=() if name in QUICK_BUGS else slow) for name, *bug in BUGS],
)
def test_seeded_bug_is_found(patch: Patch, report: str | None, build_folder: Path) -> None:
    library = host_library(build_folder, (patch, *FEWER), SOURCES)
    with on_host(library), pytest.raises(AssertionError) as caught:
        common.check_case(CASE, torch.float16, "cuda")
    if report is None:
        assert not isinstance(caught.value, Violation), caught.value
        assert re.search(WRONG_NUMBERS, str(caught.value)), caught.value
    else:
        assert isinstance(caught.value, Violation), caught.value
        assert re.search(report, str(caught.value)), caught.value


def test_without_a_bug_nothing_is_found(cuda_on_host: object) -> None:
    common.check_case(CASE, torch.float16, "cuda")
