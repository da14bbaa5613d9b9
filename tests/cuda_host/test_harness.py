"""The harness of the CUDA kernels: right kernels pass, and each way to be wrong is reported."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.cuda_host.build import CUDA, build
from tests.cuda_host.library import HostLibrary
from tests.cuda_host.small_kernels import VIOLATION, Bug, SmallKernels, small_kernels_in

SEEDS = (0, 1, 2, 3, 4)


# ---- Collectives and numbers ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_exchange(small_kernels: SmallKernels, seed: int) -> None:
    small_kernels.set_order(seed)
    a = torch.randn(64, generator=torch.Generator().manual_seed(1))
    out = torch.full((64, 6), float("nan"))
    assert small_kernels.launch("exchange", out, a) == 0, small_kernels.report()
    lanes = torch.arange(32)
    for warp, values in enumerate(a.split(32)):
        expected = torch.stack(
            [
                values[5 * lanes % 32],
                values[lanes ^ 9],
                values[torch.where(lanes < 3, lanes, lanes - 3)],
                (31 - lanes - 40).float(),
                torch.full(
                    (32,), float(sum(int(values[i] > 0) << (i - 16) for i in range(16, 32)))
                ),
                torch.full((32,), float(warp)),
            ],
            dim=1,
        )
        assert torch.equal(out[32 * warp : 32 * warp + 32], expected)


def products(small_kernels: SmallKernels, dtype: torch.dtype, bug: Bug) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(16, 32, generator=generator).to(dtype)
    b = torch.randn(32, 32, generator=generator).to(dtype)
    out = torch.full((2, 16, 32), float("nan"))
    name = {torch.bfloat16: "product_bf16", torch.float16: "product_fp16"}[dtype]
    assert small_kernels.launch(name, out, a, b, bug=bug) == 0, small_kernels.report()
    return out.double(), torch.stack([a.double() @ b.double().T, a.double() @ b.double()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products(small_kernels: SmallKernels, dtype: torch.dtype) -> None:
    out, expected = products(small_kernels, dtype, Bug.none)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wrong_lane_mapping_is_a_wrong_product(
    small_kernels: SmallKernels, dtype: torch.dtype
) -> None:
    out, expected = products(small_kernels, dtype, Bug.wrong_lane)
    assert (out - expected).abs().mean() > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers(small_kernels: SmallKernels, dtype: torch.dtype) -> None:
    special = [0.0, -0.0, 1.0, float("inf"), -float("inf"), float("nan"), 1e-40, -1e-40, 3.4e38]
    ties = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 65519.0, 65520.0, -65520.0]
    tiny = [2**-14, 2**-14 * (1 - 2**-11), 2**-24, 2**-25, 3 * 2**-26, 1.5 * 2**-24, 2**-126]
    large = [127.9, 128.0, -126.0, -126.5, -149.0, 1.01 * 2**-126, 0.3, -7.25, 1e9]
    a = torch.tensor(special + ties + tiny + large)
    b = a.flip(0).contiguous()
    out = torch.full((32, 6), float("nan"))
    name = {torch.bfloat16: "numbers_bf16", torch.float16: "numbers_fp16"}[dtype]
    # As torch may be told to, and a GPU does not.
    torch.set_flush_denormal(True)
    try:
        assert small_kernels.launch(name, out, a, b) == 0, small_kernels.report()
    finally:
        torch.set_flush_denormal(False)
    low, high, exp2, log2, maximum, lowest_bit = out.unbind(1)
    exact = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(low, a.to(dtype).float(), **exact)
    torch.testing.assert_close(high, b.to(dtype).float(), **exact)
    assert torch.equal(low[:2].signbit(), torch.tensor([False, True]))
    expected = a.double().exp2().float()
    expected[expected < 2**-126] = 0
    torch.testing.assert_close(exp2, expected, rtol=3e-7, atol=0, equal_nan=True)
    expected = torch.where(a.abs() < 2**-126, 0.0, a.double()).log2().float()
    torch.testing.assert_close(log2, expected, rtol=3e-7, atol=0, equal_nan=True)
    assert torch.equal(maximum, a.nan_to_num(-float("inf"), float("inf"), -float("inf")))
    assert torch.equal(lowest_bit, torch.arange(17, 49).float())


# ---- What is reported ----------------------------------------------------------------------------


def operands(name: str) -> tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """Of a kernel: out, a, the number of blocks, and what out is to be."""
    nan = float("nan")
    floats = torch.arange(64.0)
    if name == "hand":
        return torch.full((64,), nan), floats, 1, floats.roll(-74)
    if name == "hand_in_warp":
        shorts = torch.arange(32, dtype=torch.int16)
        return torch.zeros(32, dtype=torch.int16), shorts, 1, shorts.roll(-10)
    if name == "rows":
        rows = torch.arange(256, dtype=torch.int16).view(4, 8, 4, 2)
        # Lane l gets the pair (row l / 4, column l % 4) of each matrix.
        spread = rows.flatten(1, 2).transpose(0, 1)
        return torch.zeros(32, 4, 2, dtype=torch.int16), rows, 1, spread
    if name == "same_value":
        return torch.full((32,), nan), floats, 1, torch.full((32,), 3.0)
    if name == "hand_in_global":
        return torch.full((3, 64), nan), floats, 3, floats.roll(-37).expand(3, 64)
    if name == "blocks":
        shorts = torch.arange(10, dtype=torch.int16)
        return torch.zeros(10, dtype=torch.int16), floats, 10, shorts
    if name == "copy":
        rows = torch.arange(256, dtype=torch.int32).view(64, 4)
        kept = torch.where(torch.arange(64)[:, None] < 63, rows, 0)
        return torch.zeros(64, 4, dtype=torch.int32), rows, 1, kept.roll(-37, 0)
    if name == "ranges":
        return torch.full((32,), nan), floats[:32], 1, floats[:32].flip(0)
    assert name == "meeting"
    warps = torch.tensor([0, 32], dtype=torch.int32).repeat_interleave(32)
    return torch.zeros(2, 64, dtype=torch.int32), floats, 2, warps.expand(2, 64)


RIGHT = [
    *("hand", "hand_in_warp", "rows", "same_value", "hand_in_global", "blocks", "copy", "ranges"),
    "meeting",
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_give_no_report(small_kernels: SmallKernels, name: str, seed: int) -> None:
    small_kernels.set_order(seed)
    out, a, num_blocks, expected = operands(name)
    assert small_kernels.launch(name, out, a, num_blocks=num_blocks) == 0
    assert small_kernels.report() == ""
    assert torch.equal(out, expected)


# Of each bug, a regular expression for a line of the report in every order.
AT = r"\(kernels_for_tests\.cu:\d+\)"
SYNC_BLOCK = "without a sync_block between"
SYNC_WARP = "without a sync_warp or sync_block between"
WRONG = [
    ("hand", Bug.no_barrier, rf"race: hand, block 0: thread \d+ {AT} .*, {SYNC_BLOCK}"),
    ("hand", Bug.warp_barrier_only, rf"race: hand, .*, {SYNC_BLOCK}"),
    ("hand", Bug.no_second_barrier, rf"race: hand, .*, {SYNC_BLOCK}"),
    (
        "hand",
        Bug.no_second_barrier,
        rf"thread \d+ {AT} writes shared \+ \d+ \(4 bytes\), which thread \d+ read {AT}, without",
    ),
    ("hand_in_warp", Bug.no_barrier, rf"race: .* (reads|writes) shared .*, {SYNC_WARP}"),
    ("hand_in_warp", Bug.no_second_barrier, rf"race: .* writes .* read {AT}, {SYNC_WARP}"),
    ("rows", Bug.no_barrier, rf"reads shared \+ \d+ \(16 bytes\), .* wrote {AT}, {SYNC_WARP}"),
    ("rows", Bug.no_second_barrier, rf"writes shared \+ \d+ \(4 bytes\), .* read .* {SYNC_WARP}"),
    ("same_value", Bug.no_barrier, rf"writes shared \+ 0 \(4 bytes\), .* wrote {AT}, {SYNC_WARP}"),
    ("hand_in_global", Bug.no_barrier, rf"race: hand_in_global, .* range 2 \+ \d+ .*{SYNC_BLOCK}"),
    ("hand_in_global", Bug.no_second_barrier, rf"race: .* writes range 2 .* read {AT}, without"),
    (
        "blocks",
        Bug.writes_others,
        rf"race between blocks: blocks, block \d: thread 0 {AT} writes range 2 \+ \d+ \(2 bytes\), "
        rf"which thread 0 of block \d wrote {AT}",
    ),
    (
        "blocks",
        Bug.reads_others,
        r"race between blocks: .* (reads .* block \d wrote|writes .* block \d read) ",
    ),
    ("blocks", Bug.writes_what_others_read, r"race between blocks: .* thread 0 of block \d "),
    ("copy", Bug.no_barrier, rf"race: .* shared .* {AT}, {SYNC_BLOCK}"),
    ("copy", Bug.no_wait, rf"in flight: .* reads shared .* while the copy of thread \d+ {AT}"),
    ("copy", Bug.no_wait, r"in flight: .* ends without waiting for shared"),
    ("copy", Bug.no_commit, r"in flight: .* thread (3[2-9]|[456]\d) .* ends without waiting"),
    ("copy", Bug.waits_for_too_few, r"in flight: .* of thread (3[2-9]|[456]\d) "),
    ("copy", Bug.touched_in_flight, r"in flight: .* thread (\d+) .* writes .* copy of thread \1 "),
    ("copy", Bug.copied_twice, r"in flight: .* copies to shared \+ 496, .* the copy of thread 31 "),
    ("copy", Bug.source_changes, r"in flight: .* thread 0 .* copies a source that changed"),
    (
        "copy",
        Bug.misaligned,
        r"misaligned: .* reads 16 bytes at an address that is 4 above .* 32 like",
    ),
    ("ranges", Bug.too_far, r"thread 31 .* reads 4 bytes at range 0 \+ 128, which has 128 bytes"),
    ("ranges", Bug.too_far, r"thread 31 .* writes 4 bytes at range 2 \+ 128, which has 128 bytes"),
    ("ranges", Bug.too_far, r"thread 0 .* reads 4 bytes at shared \+ 128, which has 128 bytes"),
    ("ranges", Bug.too_far, r"thread 31 .* writes 4 bytes at shared \+ 128, which has 128 bytes"),
    ("ranges", Bug.too_low, r"thread 0 .* reads 4 bytes at range 0 \+ -4, which has 128 bytes"),
    ("ranges", Bug.too_low, r"thread 0 .* writes 4 bytes at shared \+ -4, which has 128 bytes"),
    ("ranges", Bug.read_only, r"read-only: .* writes 4 bytes at range 0 \+ \d+, .*; 32 like it"),
    ("ranges", Bug.wrong_space, r"out of range: .* reads 4 bytes at shared \+ \d+ as global"),
    ("ranges", Bug.misaligned, r"misaligned: .* reads 4 bytes at an address that is 2 above"),
    ("ranges", Bug.misaligned, r"misaligned: .* reads 4 bytes at an address that is 1 above"),
    ("ranges", Bug.never_written, r"uninitialised: .* thread 28 .* reads shared \+ 12 \(4 bytes\)"),
    ("meeting", Bug.ends_early, r"divergent: meeting, block .*thread 5 has ended.*; 2 like it"),
    ("meeting", Bug.other_collective, rf"divergent: .*thread 5 waits at sync_warp {AT}"),
    (
        "meeting",
        Bug.warp_ends_early,
        rf"divergent: .* thread \d+ waits at sync_block {AT} while thread \d+ has ended",
    ),
]


@pytest.mark.parametrize("seed", SEEDS[:3])
@pytest.mark.parametrize(
    ("name", "bug", "expected"),
    WRONG,
    ids=[f"{n}-{b.name}-{i}" for i, (n, b, _) in enumerate(WRONG)],
)
def test_wrong_kernels_are_reported(
    small_kernels: SmallKernels, name: str, bug: Bug, expected: str, seed: int
) -> None:
    small_kernels.set_order(seed)
    out, a, num_blocks, _ = operands(name)
    if bug == Bug.source_changes:
        a = out
    assert small_kernels.launch(name, out, a, bug=bug, num_blocks=num_blocks) == VIOLATION
    report = small_kernels.report()
    assert re.search(expected, report), report


def test_a_launch_is_refused(small_kernels: SmallKernels) -> None:
    for name, reason in (
        ("too_many_threads", "kThreads is 1056"),
        ("odd_threads", "kThreads is 48"),
        ("too_much_shared", "kSharedBytes is 232464: more than 227 KiB"),
    ):
        assert small_kernels.launch(name) not in (0, VIOLATION)
        assert f"refused: {name}: {reason}" in small_kernels.report()
    assert small_kernels.launch("hand", num_blocks=-1) not in (0, VIOLATION)
    small_kernels.clear()
    assert small_kernels.launch("hand", num_blocks=0) == 0
    assert small_kernels.report() == ""


def test_a_report_has_one_line_of_like_violations(small_kernels: SmallKernels) -> None:
    out, a, _, _ = operands("ranges")
    for _ in range(2):
        assert small_kernels.launch("ranges", out, a, bug=Bug.read_only) == VIOLATION
    lines = small_kernels.report().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("read-only: ranges, block 0: thread 0 ")
    assert lines[0].endswith("; 64 like it")
    assert lines[1] == "64 in all: read-only 64"
    small_kernels.clear()
    assert small_kernels.report() == ""
    assert small_kernels.launch("ranges", out, a) == 0


def test_the_order_is_chosen_by_the_seed(small_kernels: SmallKernels) -> None:
    def left_over(seed: int) -> list[int]:
        small_kernels.set_order(seed)
        out = torch.zeros(9, dtype=torch.int32)
        assert small_kernels.launch("last_wins", out, num_blocks=8) == VIOLATION
        return out.tolist()

    assert left_over(0) == [127] * 8 + [7]
    assert left_over(5) == left_over(5)
    others = [left_over(seed) for seed in range(1, 6)]
    assert len({tuple(other) for other in others}) == 5
    assert len({thread % 32 for other in others for thread in other[:-1]}) > 5
    assert len({thread // 32 for other in others for thread in other[:-1]}) > 1
    assert len({other[-1] for other in others}) > 1


def test_a_view_is_allowed_from_its_first_element_to_its_last(small_kernels: SmallKernels) -> None:
    out, _, _, _ = operands("ranges")
    a = torch.zeros(3, 64)[1:, :32]
    assert small_kernels.launch("ranges", out, a) == 0
    assert small_kernels.launch("ranges", out, a, bug=Bug.too_low) == VIOLATION
    assert f"range 0 + -4, which has {4 * (64 + 32)} bytes" in small_kernels.report()


def test_nothing_is_allowed_unasked(small_kernels: SmallKernels) -> None:
    out, a, _, _ = operands("ranges")
    assert small_kernels.launch("ranges", out, a) == 0
    assert small_kernels.launch("ranges", out, a, allow=False) == VIOLATION
    assert "an address while no range is allowed" in small_kernels.report()


# ---- Building ------------------------------------------------------------------------------------

KERNEL = """#include "core/device.h"
#include "answer.h"
extern "C" __attribute__((visibility("default"))) int answer() { return kAnswer; }
"""


def test_patches_change_a_copy(
    build_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = tmp_path / "cuda"
    cuda.mkdir()
    (cuda / "core").mkdir()
    for name in ("core/device.h", "core/types.h"):
        (cuda / name).write_text((CUDA / name).read_text())
    (cuda / "answer.cu").write_text(KERNEL)
    (cuda / "answer.h").write_text("constexpr int kAnswer = 42, kOther = 42;\n")
    patch = ("answer.h", "kAnswer = 42", "kAnswer = 43")

    right = build(["answer.cu"], build_folder, cuda=cuda)
    wrong = build(["answer.cu"], build_folder, [patch], cuda=cuda)
    assert HostLibrary(right).functions.answer() == 42
    assert HostLibrary(wrong).functions.answer() == 43
    assert "= 42, kOther" in (cuda / "answer.h").read_text()

    with monkeypatch.context() as without_compiler:
        without_compiler.setattr("tests.cuda_host.build._run", pytest.fail)  # both are kept
        assert build(["answer.cu"], build_folder, [patch], cuda=cuda) == wrong
        assert build(["answer.cu"], build_folder, cuda=cuda) == right

    with pytest.raises(ValueError, match="'= 42' occurs 2 times, not once"):
        build(["answer.cu"], build_folder, [("answer.h", "= 42", "= 43")], cuda=cuda)
    with pytest.raises(RuntimeError, match="kAnswer"):
        build(["answer.cu"], build_folder, [("answer.h", "kAnswer", "kNone")], cuda=cuda)


@pytest.mark.slow(stands_in="test_exchange")
def test_the_portable_switch_of_threads(build_folder: Path) -> None:
    """What other machines than x86-64 use."""
    kernels = small_kernels_in(build_folder, ("-DRAL_HOST_UCONTEXT",))
    kernels.reset()
    for name in RIGHT:
        out, a, num_blocks, expected = operands(name)
        assert kernels.launch(name, out, a, num_blocks=num_blocks) == 0, kernels.report()
        assert torch.equal(out, expected)
    out, a, num_blocks, _ = operands("meeting")
    assert kernels.launch("meeting", out, a, bug=Bug.ends_early, num_blocks=2) == VIOLATION
