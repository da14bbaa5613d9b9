"""Bugs put into the general kernels of `attention`: soft cap, bias, masks, head dims that differ.

All are in one library, of which a call chooses one.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from tests.cuda_host.backend import Kernels, Violation, host_library, on_host
from tests.cuda_host.build import Patch, only, switched
from tests.cuda_host.test_seeded_bugs import SOURCES, WRONG_NUMBERS
from tests.cuda_host.test_splits import parts_of
from tests.ops import test_attention as common
from tests.ops.attention_cases import AttentionCase

# One dtype of two.
FEWER = only("Fp16, 64", "Fp16, 128", "Fp16, 256")
GENERAL, SPAN_BIAS = "attention/general.h", "attention/span_bias.h"
DQ, DKDV = "attention/bwd_dq.h", "attention/bwd_dkdv.h"
TILES, ROWS, SCORES = "core/tiles.h", "attention/fwd_rows.h", "attention/bwd_scores.h"

# Head dims below the columns of the kernels, in rows that follow each other.
CASE = AttentionCase("seeded", 70, 140, 2, 4, 2, 40, 48, spans="unsorted", num_spans=6,
    span_bias="full", attn_mask="float", key_padding="left",
    options={"is_causal": True, "softcap": 2.0})  # fmt: skip

# The last run of spans ends with the last block: no key without a span follows.
ON_BLOCKS = dataclasses.replace(CASE, seqlen_k=128, options={"softcap": 2.0})

# Two CTAs write two bands of columns.
IN_BANDS = dataclasses.replace(CASE, head_dim=256, head_dim_v=136, options={"softcap": 2.0})

SLOPES = "general.differentiate(slopes, p);"
BIASED = "general.template add_transposed<T>(p, keys, first);"
LAST_RUN = (
    "gradients.flush([&](int32_t r) { return sums_of(r); },\n"
    "                    [&](int i, float sum) { count(i, sum); });"
)
IN_ROW = "chunk * kChunk < num_columns"

# The patch, and what finds it: a report that says so, or None for wrong numbers.
BUGS: dict[str, tuple[Patch, str | None]] = {
    "no_slope_of_the_cap": ((GENERAL, "ds == 0.0f ? 0.0f : ds * slope", "ds"), None),
    "slope_of_the_biased_score": (
        (DKDV, "\n        ".join((SLOPES, BIASED)), "\n        ".join((BIASED, SLOPES))),
        None,
    ),
    "bias_gradient_after_the_cap": (
        (
            DQ,
            "dbias.add(ds, keys);\n      slopes.multiply(ds);",
            "slopes.multiply(ds);\n      dbias.add(ds, keys);",
        ),
        None,
    ),
    "polynomial_too_far": ((GENERAL, "size < 0.625f", "size < 1.25f"), None),
    "bias_in_natural_units": ((GENERAL, "bias * kLog2e", "bias"), None),
    "bias_beyond_the_rows": (
        (GENERAL, "span < 0 || query >= length_q", "span < 0"),
        r"out of range: attention_\w+_general_kernel",
    ),
    "bias_of_the_first_key_s_span": ((GENERAL, "keys.span[e / 2]", "keys.span[0]"), None),
    "bias_of_the_next_column": (
        (GENERAL, "keys.span_of_column(c, e)", "keys.span_of_column(c, 1 - e)"),
        None,
    ),
    "mask_of_the_lane_s_first_key": (
        (GENERAL, "first + mine + column", "first + column"),
        None,
    ),
    "mask_beyond_the_keys": (
        (GENERAL, "!real || query >= length_q", "query >= length_q"),
        r"out of range: attention_\w+_general_kernel",
    ),
    "mask_beyond_the_queries": (
        (GENERAL, "!real || query >= length_q", "!real"),
        r"out of range: attention_\w+_general_kernel",
    ),
    "columns_of_the_next_row": (
        (
            TILES,
            f"(tile.kStride == kColumns && !kFewer) || {IN_ROW}",
            f"tile.kStride == kColumns || {IN_ROW}",
        ),
        r"out of range: attention_\w+_general_kernel|error",
    ),
    "columns_of_q_for_out": (
        (ROWS, "kGeneral ? call.head_dim_v : call.head_dim", "call.head_dim"),
        None,
    ),
    "columns_of_q_for_dv": (
        (SCORES, "kGeneral ? call.head_dim_v : call.head_dim", "call.head_dim"),
        None,
    ),
    "columns_of_q_for_the_parts_of_dv": (
        ("attention/bwd_join.h", "is_dk ? call.head_dim : call.head_dim_v", "call.head_dim"),
        None,
    ),
    "a_span_that_comes_back_is_stored_again": (
        (SPAN_BIAS, "if (span <= highest) sum += load_global(row + span);", ";"),
        None,
    ),
    "spans_that_nobody_sees_keep_what_was_there": (
        (SPAN_BIAS, "store_global(sums_of(r) + s, 0.0f);", ";"),
        None,
    ),
    "the_last_run_is_lost": ((SPAN_BIAS, LAST_RUN, ";"), None),
    "the_excess_of_a_row_forgets_dlse": (
        (SPAN_BIAS, "params.gradients.dlse != nullptr", "false"),
        None,
    ),
    "the_excess_of_a_row_forgets_keys_in_no_span": (
        (SPAN_BIAS, "excess += sum;", "excess += gradients.span >= 0 ? sum : 0.0f;"),
        None,
    ),
    "bias_gradient_of_rows_beyond": (
        (SPAN_BIAS, "row < num_rows()", "row <= num_rows()"),
        r"(out of range|race between blocks|race): attention_bwd_dq_general_kernel|dspan_bias",
    ),
    "bands_of_dq_alike": ((DQ, "TileT{opaque(k.data) + column}", "TileT{opaque(k.data)}"), None),
    "bands_of_dk_alike": ((DKDV, "TileT{opaque(q.data) + column}", "TileT{opaque(q.data)}"), None),
    "bands_of_dv_alike": (
        (DKDV, "TileT{opaque(dout.data) + column}", "TileT{opaque(dout.data)}"),
        None,
    ),
    "bands_of_the_parts_in_one_place": (
        (
            SCORES,
            "(matrix * call.seqlen_k + first_token) * kHeadDim + first_column",
            "(matrix * call.seqlen_k + first_token) * kHeadDim",
        ),
        "race between blocks: attention_bwd_dkdv_general_kernel",
    ),
    "bands_write_one_bias": (
        (
            SPAN_BIAS,
            "params.gradients.dspan_bias != nullptr && block.share == 0",
            "params.gradients.dspan_bias != nullptr",
        ),
        "race between blocks: attention_bwd_dq_general_kernel",
    ),
    "chunks_further_on_are_not_swizzled": (
        (
            TILES,
            "(offset ^ d % kSwizzled * kChunk) + d / kSwizzled * (kSwizzled * kChunk)",
            "offset + d * kChunk",
        ),
        "(in flight|race|out of range): attention_fwd_general_kernel",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def seeded(build_folder: Path) -> Kernels:
    patches = switched([patch for patch, _ in BUGS.values()])
    return host_library(build_folder, (*patches, *FEWER), SOURCES)


@pytest.mark.parametrize("bug", range(len(BUGS) + 1), ids=["none", *BUGS])
def test_seeded_bug_of_general_kernels_is_found(bug: int, seeded: Kernels) -> None:
    name = ["none", *BUGS][bug]
    case = CASE
    if name == "the_last_run_is_lost":
        case = ON_BLOCKS
    elif name.startswith("bands"):
        case = IN_BANDS
    parts = 2 if "parts" in name else 1
    with on_host(seeded), parts_of(parts, 1), seeded.with_bug(bug):
        if bug == 0:
            for correct in (CASE, ON_BLOCKS, IN_BANDS):
                common.check_case(correct, torch.float16, "cuda")
            return
        with pytest.raises(AssertionError) as caught:
            common.check_case(case, torch.float16, "cuda")
    _, report = BUGS[name]
    assert re.search(report or f"{WRONG_NUMBERS}|NaN", str(caught.value)), caught.value
    assert report is not None or not isinstance(caught.value, Violation), caught.value
