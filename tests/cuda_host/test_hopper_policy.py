"""Statistics of a policy for Hopper in the harness, where copies and products are badly timed.

They sum over the same blocks in the same order as the kernel for sm_80, which test_policy.py and
test_policy_divergence.py compare with the reference. Here, where products are summed alike, both
must give the same bits. The last section runs them on a Hopper GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from ral_kernels.ops.policy import attention_divergence, attention_policy, cuda, ral_loss
from ral_kernels.snapshot import AttentionSnapshot
from tests.cuda_host.backend import Kernels, host_library, on_host
from tests.cuda_host.build import HARNESS, Patch, only, sources_of, switched
from tests.cuda_host.test_hopper import DEVICE, HOPPER
from tests.cuda_host.test_hopper_bugs import (
    FOR_EVER,
    NOT_BEGUN,
    NOT_WAITED,
    OTHER_BITS,
    STILL_READ,
    UNALIGNED,
    WRITTEN_AFTER,
    WRITTEN_WHILE,
    Bug,
)
from tests.cuda_host.test_policy import CASES
from tests.cuda_host.test_policy_divergence import HALF, TILES, dtype_name, tile_case
from tests.cuda_host.test_policy_packed import CASES as PACKED_CASES
from tests.gpu.on_gpu import kernels_on
from tests.ops import test_policy_divergence_at_reference as at_reference
from tests.ops.packed_cases import PackedCase
from tests.ops.policy_cases import PolicyCase
from tests.ops.test_policy import check_case
from tests.ops.test_policy_packed_kernels import RUNS

SOURCES = (*sources_of("policy/*"), str(HARNESS / "hopper_policy_for_tests.cu"))

# A consumer has 64 rows, a block of threads 128; a buffer is used anew after 256 keys.
CONSUMERS = [
    tile_case("an_even_number_of_blocks", 130, 512, head_dim=64, options={"is_causal": False}),
    tile_case("an_odd_number_of_blocks", 200, 700, head_dim=128, num_heads=4, num_kv_heads=2),
    tile_case("one_key", 129, 1, head_dim=64, options={"is_causal": False, "exclude_self": False}),
    tile_case("last_consumer_has_no_row", 60, 300, "batch", batch_size=2, head_dim=64,
        key_padding="left"),
]  # fmt: skip
EVERY_CASE = [case for case in CASES if case.base.spans == "none"] + TILES + CONSUMERS
QUICK = ("gqa_7", "padding_left", "window_both", "scope_batch", "large_scores", "weights_samples",
    "layout_mixed", *(case.name for case in CONSUMERS))  # fmt: skip
Run = Callable[[], list[Tensor]]


@pytest.fixture(scope="session")
def hopper(build_folder: Path) -> Kernels:
    return host_library(build_folder, (), SOURCES)


@contextmanager
def kernels_for_hopper(library: Kernels, order: int) -> Iterator[None]:
    """Inside, calls may run on them; it is an error if statistics do not."""
    library.set_order(order)
    try:
        with mock.patch.object(cuda, "_isa", lambda q: 1):
            yield
    finally:
        library.set_order(0)


def policy_of(case: PolicyCase, dtype: torch.dtype) -> Run:
    def run() -> list[Tensor]:
        inputs = case.inputs(dtype)
        args: list[Tensor] = []
        fwd = cuda.CudaPolicy.fwd

        def kept(self: cuda.CudaPolicy, given: object, outputs: object) -> None:
            fwd(self, given, outputs)  # type: ignore[arg-type]
            args.extend((outputs.norm, outputs.z))  # type: ignore[attr-defined]

        with mock.patch.object(cuda.CudaPolicy, "fwd", kept):
            p = attention_policy(inputs.q, inputs.k, backend="cuda", **inputs.options)
        return [p, *args]

    return run


def assert_agrees(library: Kernels, run: Run, orders: range) -> None:
    with on_host(library):
        wanted = run()
        for order in orders:
            with kernels_for_hopper(library, order):
                found = run()
            for x, y in zip(found, wanted, strict=True):
                assert not y.isnan().any()
                assert torch.equal(x, y), "other bits"


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            x,
            id=x.name,
            marks=()
            if x.name in QUICK
            else pytest.mark.slow(stands_in="test_same_bits_as_for_sm_80"),
        )
        for x in EVERY_CASE
    ],
)
def test_same_bits_as_for_sm_80(case: PolicyCase, hopper: Kernels) -> None:
    assert_agrees(hopper, policy_of(case, HALF[len(case.name) % 2]), range(1, 2))


@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
@pytest.mark.parametrize("case", CONSUMERS[:2], ids=lambda case: case.name)
def test_any_order_gives_the_same_bits(
    case: PolicyCase, dtype: torch.dtype, hopper: Kernels
) -> None:
    assert_agrees(hopper, policy_of(case, dtype), range(2, 5))


@pytest.mark.parametrize(("case", "dtype"), PACKED_CASES.values(), ids=PACKED_CASES)
def test_packed(case: PackedCase, dtype: torch.dtype, hopper: Kernels) -> None:
    """Value, gradients and loss: keys of the next sequence are not seen."""
    for run in ("policy", "divergence", "loss"):
        assert_agrees(hopper, lambda name=run: RUNS[name](case, dtype, "cuda"), range(1, 2))  # type: ignore[misc]


def test_an_unchanged_policy_is_exactly_zero(hopper: Kernels) -> None:
    case = CONSUMERS[1].inputs(torch.bfloat16).requires_grad_()
    with on_host(hopper), kernels_for_hopper(hopper, 3):
        snapshot = AttentionSnapshot(case.q.detach(), case.k.detach())
        value = attention_divergence(case.q, case.k, snapshot, backend="cuda")
        at_reference.assert_exactly_zero(value, case)
        loss = ral_loss(case.q, case.k, snapshot, torch.ones(1, 200), backend="cuda")
        assert not loss.any()


def test_a_shared_prefix_is_left_to_sm_80_on_both_sides(hopper: Kernels) -> None:
    case = tile_case("", 70, 130, batch_size=2, head_dim=64).inputs(torch.bfloat16)
    case.k[1, :, :100] = case.k[0, :, :100]
    case.requires_grad_()
    with on_host(hopper), kernels_for_hopper(hopper, 1):
        snapshot = AttentionSnapshot(
            case.q.detach(), case.k.detach(), group_size=2, shared_prefix=100
        )
        value = attention_divergence(case.q, case.k, snapshot, backend="cuda")
        at_reference.assert_exactly_zero(value, case)


# ---- Seeded bugs ---------------------------------------------------------------------------------

FILE, TILES_H = "policy/statistics_sm90.h", "hopper/tiles.h"
WAIT, PIN = "wait_for_products<0>();\n      ", "pin(s[0]);\n      "
RELEASE = "if (lane_index() == 0) arrive(&barriers.empty[ring.stage]);"
EMPTY = "wait(&barriers.empty[ring.stage], ring.parity_before());"
EXPECT = "arrive_expecting(&barriers.full[ring.stage], kTileBytes);"
LAST = "take(odd, first + kBlockK);\n      finish(even);"
SCORES = "pin(s);\n  begin_products();"
BUGS: list[Bug] = [
    ("keys_given_up_too_early",
     (FILE, WAIT + PIN + RELEASE, f"{RELEASE}\n{WAIT}{PIN}"), STILL_READ),
    ("scores_not_waited_for", (FILE, WAIT + PIN + RELEASE, PIN + RELEASE), STILL_READ),
    ("sums_of_running_scores", (FILE, "take(even, first);\n      finish(odd);",
     "take(odd, first);\n      finish(odd);"), OTHER_BITS),
    ("one_set_of_accumulators", (FILE, LAST, "take(even, first + kBlockK);\n      finish(even);"),
     OTHER_BITS),
    ("queries_not_waited_for", (FILE, "wait(&barriers.full_q, 0);", ""), NOT_WAITED),
    ("keys_not_waited_for",
     (FILE, "wait(&barriers.full[ring.stage], ring.parity());", ""), NOT_WAITED),
    ("refilled_in_use", (FILE, EMPTY, ""), "hopper: "),
    ("other_parity", (FILE, EMPTY, "wait(&barriers.empty[ring.stage], ring.parity());"), FOR_EVER),
    ("every_lane_gives_up", (FILE, WAIT + PIN + RELEASE,
     f"{WAIT}{PIN}arrive(&barriers.empty[ring.stage]);"), "hopper: "),
    ("never_given_up", (FILE, WAIT + PIN + RELEASE, WAIT + PIN), FOR_EVER),
    ("half_the_bytes_expected", (FILE, EXPECT, EXPECT.replace(");", " / 2);")), "hopper: "),
    ("not_aligned", (FILE, "shared += -shared_address(shared) & (kSwizzledBytes - 1);", ""),
     UNALIGNED),
    ("no_barrier_after_the_setup", (FILE, "sync_block();", ""), NOT_BEGUN),
    ("last_product_not_waited_for", (FILE, LAST, "take(odd, first + kBlockK);"), "hopper: "),
    ("one_block_too_few", (FILE, "2 * num_pairs + 1", "2 * num_pairs"), FOR_EVER),
    ("own_keys_are_valid", (FILE, "(first > own_high || first + kBlockK - 1 < own_low)", "true"),
     OTHER_BITS),
    ("the_first_row_alone_is_asked", (FILE, "visibility.last_key(row)",
     "visibility.last_key(row + 15)"), OTHER_BITS),
    ("scores_written_after_the_fence", (TILES_H, SCORES, f"{SCORES}\ns[0][0] = 3.0f;"),
     WRITTEN_AFTER),
    ("scores_written_while_they_run", (FILE, "take(even, first);\n      finish(odd);",
     "take(even, first);\nodd[0][0][0] = 3.0f;\nfinish(odd);"), WRITTEN_WHILE),
    ("panel_missed", (TILES_H, "columns_descriptor(b, step)", "columns_descriptor(b, step % 4)"),
     OTHER_BITS),
]  # fmt: skip
# Blocks that a warp sees whole lie before and after its own keys.
BUGGED = tile_case("seeded", 140, 520, head_dim=128, num_heads=1, num_kv_heads=1,
    options={"window": (300, 100), "is_causal": False})  # fmt: skip
# What a forward needs, without which there would be more to compile.
SEEDED_SOURCES = (
    "core/entry.cu", *(f"policy/{name}.cu" for name in (
        "policy", "statistics", "terms_fp16", "moments", "bwd_dq", "bwd_dk",
    )), SOURCES[-1],
)  # fmt: skip
QUICK_BUGS = ("keys_given_up_too_early", "own_keys_are_valid")


class Seeded:
    """Statistics by the kernel for sm_80, and by that for Hopper with a bug."""

    def __init__(self, folder: Path) -> None:
        patches: list[Patch] = [patch for _, patch, _ in BUGS]
        self._library = host_library(
            folder, (*switched(patches), *only("Fp16, 128")), SEEDED_SOURCES
        )
        self._run = policy_of(BUGGED, torch.float16)

    def check(self, bug: int, orders: range) -> None:
        with on_host(self._library):
            wanted = self._run()
            for order in orders:
                with kernels_for_hopper(self._library, order), self._library.with_bug(bug):
                    found = self._run()
                for x, y in zip(found, wanted, strict=True):
                    assert torch.equal(x, y), OTHER_BITS


@pytest.fixture(scope="module")
def seeded(build_folder: Path) -> Seeded:
    return Seeded(build_folder)


@pytest.mark.parametrize(
    ("bug", "text"),
    [
        pytest.param(
            number,
            text,
            id=name,
            marks=()
            if name in QUICK_BUGS
            else pytest.mark.slow(stands_in="test_seeded_bug_is_found"),
        )
        for number, (name, _, text) in enumerate(BUGS, start=1)
    ],
)
def test_seeded_bug_is_found(bug: int, text: str, seeded: Seeded) -> None:
    with pytest.raises(AssertionError) as caught:
        seeded.check(bug, range(1, 4))
    assert text in str(caught.value)


def test_without_a_bug_nothing_is_found(seeded: Seeded) -> None:
    seeded.check(0, range(1, 3))


# ---- On a GPU ------------------------------------------------------------------------------------


ON_GPU = [x for x in EVERY_CASE if x.name in QUICK] if HOPPER else []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
@pytest.mark.parametrize("case", ON_GPU, ids=lambda case: case.name)
def test_policy_on_gpu(case: PolicyCase, dtype: torch.dtype, hopper_gpu: None) -> None:
    with kernels_on(DEVICE, "cuda"):
        check_case(case, dtype, "cuda")
