"""Bugs put into the kernels for Hopper on purpose: the harness, or other bits, must tell of each.

One library of each pass has them all, and a call chooses one. What must be reported is part of the
text of the report; OTHER_BITS if wrong numbers are all there is to see.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cuda_host import test_hopper as forward
from tests.cuda_host import test_hopper_bwd as backward
from tests.cuda_host.backend import Kernels, host_library, on_host
from tests.cuda_host.build import Patch, only, switched
from tests.ops.attention_cases import AttentionCase

OTHER_BITS = "bits"
NOT_WAITED = "whose copy its warp has not waited for"
STILL_READ = "still to read"
WRITTEN_WHILE = "registers were written while a product ran on them"
WRITTEN_AFTER = "registers were written after they were pinned for a product"
NOT_BEGUN = "a barrier that has not begun"
UNALIGNED = "a panel off 1024 bytes"
FOR_EVER = "waits for ever"
UNINITIALISED = "which this block never wrote"
Bug = tuple[str, Patch, str]

FWD, TILES = "attention/fwd_sm90.h", "hopper/tiles.h"
MARGINALS, NOTES = "attention/marginals_sm90.h", "hopper/noted_keys.h"
K_DONE = """wait_for_products<1>();
      pin(s[0]);
      give_up(barriers.empty_k, ring_k);"""
V_DONE = """wait_for_products<0>();
      pin(out[0]);
      pin(p);
      sync_warp();  // all lanes have read the note of these values
      give_up(barriers.empty_v, ring_v);"""
WRITE_NOTE = "keys.write(notes(shared) + ring.stage, loaded, next_span);"
NOTED = "if (lane_index() == 0) arrive(&barriers.full_k[ring.stage]);"
EMPTY = "wait(&empty[ring.stage], ring.parity_before());"
RELEASE = "if (lane_index() == 0) arrive(&empty[ring.stage]);"
SCORES = "pin(s);\n  pin(left);\n  begin_products();"
PRODUCTS = "pin(sum);\n  pin(left);\n  begin_products();"
FORWARD: list[Bug] = [
    ("k_given_up_too_early",
     (FWD, K_DONE, "give_up(barriers.empty_k, ring_k);\nwait_for_products<1>();\npin(s[0]);"),
     STILL_READ),
    ("scores_not_waited_for",
     (FWD, K_DONE, "pin(s[0]);\ngive_up(barriers.empty_k, ring_k);"), WRITTEN_WHILE),
    ("v_given_up_too_early",
     (FWD, V_DONE, "sync_warp();\ngive_up(barriers.empty_v, ring_v);\n"
      "wait_for_products<0>();\npin(out[0]);\npin(p);"), STILL_READ),
    ("weights_rounded_too_early",
     (FWD, V_DONE, f"round_left<T>(p, s[0]);\n{V_DONE}"), WRITTEN_WHILE),
    ("out_scaled_too_early",
     (FWD, V_DONE, "sync_warp();\ngive_up(barriers.empty_v, ring_v);"), WRITTEN_WHILE),
    ("scores_written_after_the_fence",
     (TILES, SCORES, f"{SCORES}\ns[0][0] = 3.0f;"), WRITTEN_AFTER),
    ("weights_written_after_the_fence",
     (TILES, PRODUCTS, f"{PRODUCTS}\nleft[0][0] ^= 1;"), WRITTEN_AFTER),
    ("not_aligned", (FWD, "shared += -shared_address(shared) & (kSwizzledBytes - 1);", ""),
     UNALIGNED),
    ("no_barrier_after_the_setup", (FWD, "sync_block();", ""), NOT_BEGUN),
    ("queries_not_waited_for", (FWD, "wait(&barriers.full_q, 0);", ""), UNINITIALISED),
    ("keys_not_waited_for",
     (FWD, "wait(&barriers.full_k[ring_k.stage], ring_k.parity());", ""), NOT_WAITED),
    ("values_not_waited_for",
     (FWD, "wait(&barriers.full_v[ring_v.stage], ring_v.parity());", ""), NOT_WAITED),
    ("refilled_in_use", (FWD, EMPTY, ""), "hopper: "),
    ("other_parity", (FWD, EMPTY, "wait(&empty[ring.stage], ring.parity());"), FOR_EVER),
    ("every_lane_gives_up", (FWD, RELEASE, "arrive(&empty[ring.stage]);"),
     "hopper: "),
    ("never_given_up", (FWD, RELEASE, ""), FOR_EVER),
    ("half_the_bytes_expected",
     (FWD, "arrive_expecting(&full[ring.stage], kTileBytes);",
      "arrive_expecting(&full[ring.stage], kTileBytes / 2);"), "hopper: "),
    ("zeros_not_published", (FWD, "publish_to_async();", ""), "stores without publish_to_async"),
    ("last_product_not_waited_for",
     (FWD, "start_p_v();\n      wait_for_products<0>();", "start_p_v();"), "products running"),
    ("span_border_off_by_one", (MARGINALS, "mine + e < end", "mine + e <= end"), OTHER_BITS),
    ("run_not_rescaled", (MARGINALS, "run[i] * alpha[i]", "run[i]"), OTHER_BITS),
    ("run_not_closed",
     (MARGINALS, "close(load_shared(&keys->spans[block.border()]));",
      "span = load_shared(&keys->spans[block.border()]);"), OTHER_BITS),
    ("queue_written_with_new_maxima",
     (FWD, "marginals.empty_queue(before);", "marginals.empty_queue(m);"), OTHER_BITS),
    ("queue_overwritten", (MARGINALS, "queued = 0;\n    sync_warp();", "queued = 0;"), "race"),
    ("queue_read_too_early",
     (MARGINALS, "// All lanes have stored their parts.\n    sync_warp();", ""), "race"),
    ("span_that_comes_back_overwritten",
     (MARGINALS, "again = span <= highest ? 1 : again;", "again = 0;"), OTHER_BITS),
    ("note_not_synchronised",
     (FWD, f"{WRITE_NOTE}\n      sync_warp();", WRITE_NOTE), "race"),
    ("note_never_arrives", (FWD, NOTED, ""), FOR_EVER),
    ("note_not_waited_for", (FWD, "begin_barrier(&barriers->full_k[stage], 2);",
                             "begin_barrier(&barriers->full_k[stage], 1);"), "race"),
    ("note_overwritten",
     (FWD, "wait(&barriers.empty_v[ring.stage], ring.parity_before());", ""), "race"),
    ("note_given_up_while_lanes_read",
     (FWD, V_DONE, V_DONE.replace("sync_warp();", "")), "race"),
    ("note_of_another_block", (FWD, "notes(shared) + ring_k.stage", "notes(shared)"), OTHER_BITS),
    ("run_that_goes_on_forgotten", (NOTES, "open = keys.span_of(kBlockK - 1);", ""), OTHER_BITS),
    ("span_of_a_key_goes_on", (NOTES, "next_span != open", "true"), OTHER_BITS),
    ("new_spans_that_are_not", (NOTES, "note.first_span > highest", "true"), OTHER_BITS),
    ("panel_missed",
     (TILES, "columns_descriptor(right, step)", "columns_descriptor(right, step % 4)"),
     OTHER_BITS),
    ("queries_of_one_panel", (TILES, "tile + step / 4 * kPanelBytes", "tile"), OTHER_BITS),
    ("output_over_queries_of_others",
     (FWD, "marginals.rows = &of_warp->rows;  // no register holds it through the loop\n"
      "    sync_group(1 + group);", "marginals.rows = &of_warp->rows;"), "race"),
]  # fmt: skip

DKDV, DQ, SHARED = (f"attention/bwd_{name}.h" for name in ("dkdv_sm90", "dq_sm90", "sm90"))
DONE = """wait_for_products<1>();
        pin(dv[0]);
        pin(left_p);
        Base::give_up(barriers, rings, 1);
        wait_for_products<0>();
        pin(dk[0]);
        pin(left_ds);
        Base::give_up(barriers, rings, 0);"""
GIVE_UP_DOUT, GIVE_UP_Q = (f"Base::give_up(barriers, rings, {which});" for which in (1, 0))
BACKWARD: list[Bug] = [
    ("dout_never_given_up", (DKDV, DONE, DONE.replace(GIVE_UP_DOUT, "")), FOR_EVER),
    ("dout_given_up_too_early",
     (DKDV, DONE, GIVE_UP_DOUT + DONE.replace(GIVE_UP_DOUT, "")), STILL_READ),
    ("q_given_up_too_early",
     (DKDV, DONE, GIVE_UP_Q + DONE.replace(GIVE_UP_Q, "")), STILL_READ),
    ("gradients_not_waited_for",
     (DKDV, "wait_for_products<1>();\n        pin(ds[0]);", "pin(ds[0]);"), WRITTEN_WHILE),
    ("operand_used_twice",
     (DKDV, "round_left<T>(left_ds, ds[0]);", "round_left<T>(left_p, ds[0]);"), WRITTEN_WHILE),
    ("statistics_overwritten",
     (DKDV, "sync_warp();  // all lanes have read the previous statistics", ""), "race"),
    ("own_keys_not_waited_for", (DKDV, "wait(&barriers.full_own, 0);", ""), NOT_WAITED),
    ("dout_not_waited_for",
     (DKDV, "Base::wait_for(barriers, rings, 1);\n"
      "        start_all_scores<T, kHeadDim, true>(ds[0], v, dout);",
      "start_all_scores<T, kHeadDim, true>(ds[0], v, dout);"), NOT_WAITED),
    ("keys_given_up_too_early",
     (DQ, "wait_for_products<0>();\n      pin(dq[0]);", ""),
     STILL_READ),
    ("zeros_not_published", (DQ, "publish_to_async();", ""), "stores without publish_to_async"),
    ("own_queries_not_waited_for", (DQ, "wait(&barriers.full_own, 0);", ""), NOT_WAITED),
    ("passed_over_and_kept",
     (SHARED, "for (int which = 0; which < 2; ++which) give_up(barriers, rings, which);", ""),
     FOR_EVER),
    ("half_the_bytes_expected",
     (SHARED, "arrive_expecting(full, kTileBytes);", "arrive_expecting(full, kTileBytes / 2);"),
     "hopper: "),
    ("no_barrier_after_the_setup",
     (SHARED, "sync_block();\n    return *barriers;", "return *barriers;"), NOT_BEGUN),
]  # fmt: skip

WIDE = "attention/bwd_dkdv_wide_sm90.h"
GIVE = "sync_warp();\n      if (lane_index() == 0) arrive(&handover.given[warp]);"
ASK = "sync_warp();\n      if (lane_index() == 0) arrive(&handover.wants[warp]);"
DK_DONE = "wait_for_products<1>();\n        give_up_dk();"
WIDE_BACKWARD: list[Bug] = [
    ("weights_written_unasked", (WIDE, "wait(&handover.wants[warp], tiles.parity());", ""), "race"),
    ("asked_while_lanes_read", (WIDE, ASK, ASK.replace("sync_warp();", "")), "race"),
    ("never_asked", (WIDE, ASK, "sync_warp();"), FOR_EVER),
    ("weights_not_waited_for",
     (WIDE, "wait(&handover.given[warp], tiles.parity());", ""), "race"),
    ("given_while_lanes_write", (WIDE, GIVE, GIVE.replace("sync_warp();", "")), "race"),
    ("never_given", (WIDE, GIVE, "sync_warp();"), FOR_EVER),
    ("weights_overwritten",
     (WIDE, "sync_warp();  // all lanes have read the weights of the tile before", ""), "race"),
    ("lse_read_too_early",
     (WIDE, "lse_log2.store(statistics->lse_log2);\n      sync_warp();",
      "lse_log2.store(statistics->lse_log2);"), "race"),
    ("operand_of_dv_written_while_it_runs",
     (WIDE, "end_dv();\n        advance();", "advance();\n        end_dv();"), WRITTEN_WHILE),
    ("queries_given_up_too_early",
     (WIDE, DK_DONE, "give_up_dk();\n        wait_for_products<1>();"), STILL_READ),
    ("dout_given_up_too_early",
     (WIDE, "wait_for_products<0>();\n        differentiate();", "differentiate();"),
     WRITTEN_WHILE),
    ("queries_of_the_next_tile",
     (WIDE, "Base::tile(shared, rings_before, 0)", "Base::tile(shared, rings, 0)"), NOT_WAITED),
    ("dout_of_the_next_tile",
     (WIDE, "Base::tile(shared, rings_before, 1)", "Base::tile(shared, rings, 1)"), NOT_WAITED),
    ("dm_of_rows_before_those_that_have_one",
     ("attention/bwd.h", "maximum(first - query, 0)", "0"), OTHER_BITS),
    ("dm_of_rows_after_those_that_have_one",
     ("attention/bwd.h", "minimum(stop - query, count)", "count"), OTHER_BITS),
    ("zeros_not_published", (WIDE, "publish_to_async();", ""), "stores without publish_to_async"),
    ("zeros_not_synchronised", (WIDE, "sync_group(1 + group);", ""), OTHER_BITS),
]  # fmt: skip

FORWARD_CASES = (
    AttentionCase("seeded", 140, 400, 1, 1, 1, 128, spans="ragged", key_padding="left"),
    AttentionCase("spans_come_back", 140, 200, 1, 1, 1, 128, spans="unsorted"),
    *(
        forward.TokensCase(name, 70, 300, 1, 1, 1, 128)
        for name in ("each_token_twice", "the_last_token_goes_on")
    ),
)
BACKWARD_CASE, WIDE_CASE = (
    AttentionCase(
        "seeded", 270, 300, 1, 1, 1, head_dim, spans="ragged", key_padding="left",
        options={"is_causal": True},
    )
    for head_dim in (128, 256)
)  # fmt: skip

WIDE_ROWS_CASE = AttentionCase(
    "rows", 100, 70, 1, 1, 1, 256, spans="equal", num_spans=40, options={"rows": (30, 61)}
)


# One of each kind in the quick tier.
QUICK = (
    "k_given_up_too_early", "scores_written_after_the_fence", "not_aligned",
    "values_not_waited_for", "never_given_up", "operand_used_twice", "lse_overwritten",
)  # fmt: skip


def library_of(bugs: list[Bug], sources: tuple[str, ...], folder: Path, kernel: str) -> Kernels:
    """Of one dtype and head dim: bugs need no more."""
    patches = switched([patch for _, patch, _ in bugs])
    return host_library(folder, (*patches, *only(kernel)), sources)


class SeededForward:
    """A forward by the kernel for sm_80, and by that for Hopper with a bug."""

    def __init__(self, folder: Path) -> None:
        self._library = library_of(FORWARD, forward.SOURCES, folder, "Fp16, 128")
        with on_host(self._library):
            self._wanted = [self._outputs(None, case) for case in FORWARD_CASES]

    def _outputs(self, order: int | None, case: AttentionCase) -> tuple[Tensor | None, ...]:
        return forward.outputs(self._library, order, case, torch.float16)

    def check(self, bug: int, orders: range) -> None:
        for case, wanted in zip(FORWARD_CASES, self._wanted, strict=True):
            for order in orders:
                with on_host(self._library), self._library.with_bug(bug):
                    found = self._outputs(order, case)
                forward.assert_same_bits(found, wanted)


class SeededBackward:
    """The same of backwards."""

    def __init__(
        self, library: Kernels, runs: list[backward.Backward | backward.PackedBackward]
    ) -> None:
        self._library, self._runs = library, runs

    def check(self, bug: int, orders: range) -> None:
        for run in self._runs:
            for order in orders:
                with self._library.with_bug(bug):
                    found = run.on_hopper(order)
                backward.assert_agree(run.wanted, [found])


@pytest.fixture(scope="module")
def seeded_forward(build_folder: Path) -> SeededForward:
    return SeededForward(build_folder)


@pytest.fixture(scope="module")
def seeded_backward(build_folder: Path) -> SeededBackward:
    library = library_of(BACKWARD, backward.SOURCES, build_folder, "Fp16, 128")
    return SeededBackward(library, [backward.Backward(library, BACKWARD_CASE, torch.float16)])


@pytest.fixture(scope="module")
def seeded_wide_backward(build_folder: Path) -> SeededBackward:
    library = library_of(WIDE_BACKWARD, backward.SOURCES, build_folder, "Bf16, 256")
    return SeededBackward(
        library,
        [
            backward.Backward(library, WIDE_CASE, torch.bfloat16),
            backward.Backward(library, WIDE_ROWS_CASE, torch.bfloat16),
            backward.PackedBackward(library, [65, 30, 20], [65, 30, 20], 256),
        ],
    )


def named(bugs: list[Bug], stands_in: str) -> list[object]:
    slow = pytest.mark.slow(stands_in=stands_in)
    return [
        pytest.param(number, text, id=name, marks=() if name in QUICK else slow)
        for number, (name, _, text) in enumerate(bugs, start=1)
    ]


@pytest.mark.parametrize(("bug", "text"), named(FORWARD, "test_seeded_bug_of_the_forward_is_found"))
def test_seeded_bug_of_the_forward_is_found(
    bug: int, text: str, seeded_forward: SeededForward
) -> None:
    with pytest.raises(AssertionError) as caught:
        seeded_forward.check(bug, range(1, 4))
    assert text in str(caught.value) or text == OTHER_BITS


@pytest.mark.parametrize(
    ("bug", "text"), named(BACKWARD, "test_seeded_bug_of_the_backward_is_found")
)
def test_seeded_bug_of_the_backward_is_found(
    bug: int, text: str, seeded_backward: SeededBackward
) -> None:
    with pytest.raises(AssertionError) as caught:
        seeded_backward.check(bug, range(1, 4))
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("bug", "text"), named(WIDE_BACKWARD, "test_seeded_bug_of_the_backward_is_found")
)
def test_seeded_bug_of_the_wide_backward_is_found(
    bug: int, text: str, seeded_wide_backward: SeededBackward
) -> None:
    with pytest.raises(AssertionError) as caught:
        seeded_wide_backward.check(bug, range(1, 4))
    assert text in str(caught.value) or text == OTHER_BITS


def test_without_a_bug_nothing_is_found(
    seeded_forward: SeededForward, seeded_backward: SeededBackward
) -> None:
    seeded_forward.check(0, range(1, 3))
    seeded_backward.check(0, range(1, 2))


@pytest.mark.slow(stands_in="test_without_a_bug_nothing_is_found")
def test_without_a_bug_nothing_is_found_in_the_wide_backward(
    seeded_wide_backward: SeededBackward,
) -> None:
    seeded_wide_backward.check(0, range(1, 2))
