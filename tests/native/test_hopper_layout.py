"""The kernels for Hopper, as far as they can be checked without a GPU: the numbers that they give
the hardware, and what nvcc made of them. tests/cuda_host/test_hopper*.py run them.
"""

from __future__ import annotations

import ctypes
import random
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks.codegen.cuda import find_cuobjdump, sass
from ral_kernels.runtime import cuda_library, native
from ral_kernels.runtime.c_interface import TensorStruct, tensor_struct
from tests.conftest import skip_or_fail
from tests.cuda_host.build import COMPILER, CUDA, INCLUDE, has_compiler

pytestmark = pytest.mark.xdist_group("cuda_codegen")

PANEL_BYTES = 64 * 128
SHIM = Path(__file__).parent / "hopper_layout_check.cpp"


# ---- Arithmetic of csrc/cuda/hopper/layout.h -----------------------------------------------------


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if not has_compiler():
        skip_or_fail("cpu", "no C++ compiler")
    file = tmp_path_factory.mktemp("hopper") / "layout.so"
    command = [*COMPILER, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    includes = [f"-I{INCLUDE}", f"-I{CUDA}"]
    subprocess.run([*command, *includes, str(SHIM), "-o", str(file)], check=True)
    library = ctypes.CDLL(str(file))
    library.columns.restype = library.rows.restype = ctypes.c_uint64
    library.shape_of_map.restype = ctypes.c_char_p
    return library


def copied_tile(tile: torch.Tensor) -> torch.Tensor:
    """Shared memory, in numbers, after a tile of 64 rows came by boxes of 64 x 64.

    CU_TENSOR_MAP_SWIZZLE_128B: chunk c of 16 bytes of row r lies where chunk c xor r mod 8 would.
    """
    memory = torch.full((tile.numel(),), -1, dtype=tile.dtype)
    for panel in range(tile.shape[1] // 64):
        for row in range(64):
            for chunk in range(8):
                at = panel * PANEL_BYTES // 2 + row * 64 + (chunk ^ row % 8) * 8
                column = 64 * panel + 8 * chunk
                memory[at : at + 8] = tile[row, column : column + 8]
    return memory


def fields(descriptor: int) -> tuple[int, int, int, int]:
    """Address, leading and stride offset in bytes, and the bits above them."""
    return (
        (descriptor & 0x3FFF) << 4,
        (descriptor >> 16 & 0x3FFF) << 4,
        (descriptor >> 32 & 0x3FFF) << 4,
        descriptor >> 46,
    )


def factor(memory: torch.Tensor, descriptor: int, rows: int, k_major: bool) -> torch.Tensor:
    """[rows, 16]: what wgmma reads there, by the canonical layouts of the PTX ISA.

    In numbers of 16 bits, ((8, rows / 8), 16) : ((64, stride), 1) where K is contiguous, else
    ((64, rows / 64), (8, 2)) : ((1, leading), (64, stride)); bits 4 to 6 of the byte address are
    xored with its bits 7 to 9.
    """
    start, leading, stride, mode = fields(descriptor)
    assert mode == 1 << 16  # 128-byte swizzle, base offset 0
    found = torch.empty(rows, 16, dtype=memory.dtype)
    for r in range(rows):
        for k in range(16):
            if k_major:
                at = start + r % 8 * 128 + r // 8 * stride + 2 * k
            else:
                at = start + r % 64 * 2 + r // 64 * leading + k % 8 * 128 + k // 8 * stride
            at ^= (at >> 7 & 7) << 4
            found[r, k] = memory[at // 2]
    return found


@pytest.mark.parametrize("head_dim", [64, 128])
def test_descriptors_find_what_the_copy_engine_brought(head_dim: int, layout: ctypes.CDLL) -> None:
    tile = torch.arange(64 * head_dim, dtype=torch.int32).reshape(64, head_dim)
    memory = copied_tile(tile)
    for step in range(head_dim // 16):  # of q kᵀ
        descriptor = layout.columns(0, step)
        assert torch.equal(
            factor(memory, descriptor, 64, True), tile[:, 16 * step : 16 * step + 16]
        )
    for step in range(4):  # of p v
        descriptor = layout.rows(0, step)
        found = factor(memory, descriptor, head_dim, False)
        assert torch.equal(found, tile[16 * step : 16 * step + 16].T)


def test_descriptors_are_those_of_cutlass(layout: ctypes.CDLL) -> None:
    """Bits that cute's make_gmma_desc gives for these layouts (CUTLASS 4.2, for sm_90a)."""
    tile = 0x2C000
    for step, offset in enumerate((0, 32, 64, 96, 8192, 8224, 8256, 8288)):
        assert layout.columns(tile, step) == 0x4000004000010000 | (tile + offset) >> 4
    for step, offset in enumerate((0, 2048, 4096, 6144)):
        assert layout.rows(tile, step) == 0x4000004002000000 | (tile + offset) >> 4


def map_of(layout: ctypes.CDLL, x: torch.Tensor, struct: TensorStruct | None = None):
    b, h, t, d = x.shape
    found = (ctypes.c_uint64 * 7)()
    given = tensor_struct(x) if struct is None else struct
    reason = layout.shape_of_map(ctypes.byref(given), (ctypes.c_int64 * 4)(d, t, h, b), found)
    return (list(found[:4]), list(found[4:])) if reason is None else reason.decode()


def test_maps(layout: ctypes.CDLL) -> None:
    def bf16(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    assert map_of(layout, bf16(2, 3, 5, 64)) == ([64, 5, 3, 2], [128, 640, 1920])
    # [B, T, H, D] in memory: heads lie closer together than tokens
    assert map_of(layout, bf16(2, 5, 3, 128).transpose(1, 2)) == (
        [128, 5, 3, 2],
        [768, 256, 3840],
    )
    # a dimension of one has no stride to speak of: PyTorch's may be anything
    one = bf16(1, 1, 1, 64).as_strided((1, 1, 1, 64), (3, 0, 2**41, 1))
    assert map_of(layout, one) == ([64, 1, 1, 1], [128, 128, 128])
    packed = bf16(70, 4, 64).transpose(0, 1)[None]
    assert map_of(layout, packed) == ([64, 70, 4, 1], [512, 128, 512])
    far = torch.empty(2, 1, 1, 64, dtype=torch.bfloat16, device="meta").as_strided(
        (2, 1, 1, 64), (2**33, 64, 64, 1)
    )
    assert map_of(layout, far, TensorStruct(64, *far.stride()[:3])) == (
        [64, 1, 1, 2],
        [128, 128, 2**34],
    )


@pytest.mark.parametrize(
    ("strides", "reason"),
    [
        ((1280, 0, 64), "a stride of 0"),
        ((1280, 320, 32), "rows that overlap"),
        ((1280, 324, 64), "a stride off 16 bytes"),
        ((2**39, 320, 64), "a stride beyond 40 bits"),
        ((2**62, 320, 64), "a stride beyond 40 bits"),
    ],
)
def test_what_maps_cannot_say(
    strides: tuple[int, int, int], reason: str, layout: ctypes.CDLL
) -> None:
    x = torch.empty(2, 4, 5, 64, dtype=torch.bfloat16)
    assert map_of(layout, x, TensorStruct(x.data_ptr(), *strides)) == reason


def test_maps_want_elements_at_aligned_addresses(layout: ctypes.CDLL) -> None:
    x = torch.empty(2, 4, 5, 64, dtype=torch.bfloat16)
    assert map_of(layout, x[..., 1:, :][:, :0]) == "a tensor without elements"
    assert map_of(layout, x, TensorStruct(x.data_ptr() + 2, *x.stride()[:3])) == (
        "an address off 16 bytes"
    )


def turn(layout: ctypes.CDLL, n: int) -> tuple[int, int, int]:
    found = (ctypes.c_int32 * 3)()
    layout.turn_of_ring(n, found)
    return found[0], found[1], found[2]


class Barrier:
    """An mbarrier: the phase that is not over has `parity`."""

    def __init__(self, arrivals: int) -> None:
        self.arrivals = self.pending = arrivals
        self.parity = 0

    def arrive(self) -> None:
        assert self.pending > 0
        self.pending -= 1
        if self.pending == 0:
            self.parity, self.pending = self.parity ^ 1, self.arrivals

    def over(self, parity: int) -> bool:
        return self.parity != parity


@pytest.mark.parametrize("num_blocks", [1, 3, 4, 5, 8, 9, 23])
@pytest.mark.parametrize("consumers", [1, 2, 3])
def test_rings_neither_overtake_nor_deadlock(
    num_blocks: int, consumers: int, layout: ctypes.CDLL
) -> None:
    """Producer and consumers of attention/fwd_sm90.h, in any order that their waits allow."""
    stages = 4
    rng = random.Random(num_blocks)
    full = {x: [Barrier(1) for _ in range(stages)] for x in "kv"}
    empty = {x: [Barrier(consumers) for _ in range(stages)] for x in "kv"}
    held: dict[tuple[str, int], int] = {}  # which block is in a buffer
    reading: Counter[tuple[str, int]] = Counter()

    # A step is a condition to wait for, or None.
    def producer() -> Iterator[tuple[Barrier, int] | None]:
        for n in range(num_blocks):
            stage, _, before = turn(layout, n)
            for x in "kv":
                yield empty[x][stage], before
                assert reading[x, stage] == 0
                held[x, stage] = n
                yield None  # the copy takes its time
                full[x][stage].arrive()

    def read(x: str, n: int) -> Iterator[tuple[Barrier, int] | None]:
        stage, parity, _ = turn(layout, n)
        yield full[x][stage], parity
        reading[x, stage] += 1
        assert held[x, stage] == n

    def give_up(x: str, n: int) -> None:
        stage = n % stages
        assert held[x, stage] == n
        reading[x, stage] -= 1
        empty[x][stage].arrive()

    def consumer() -> Iterator[tuple[Barrier, int] | None]:
        yield from read("k", 0)
        yield None
        give_up("k", 0)
        for n in range(1, num_blocks):
            yield from read("k", n)
            yield from read("v", n - 1)
            yield None
            give_up("k", n)
            yield None
            give_up("v", n - 1)
        yield from read("v", num_blocks - 1)

    for _ in range(20):
        threads = [producer(), *(consumer() for _ in range(consumers))]
        waits = {thread: next(thread) for thread in threads}
        while waits:
            ready = [t for t, wait in waits.items() if wait is None or wait[0].over(wait[1])]
            assert ready, "deadlock"
            thread = rng.choice(ready)
            try:
                waits[thread] = next(thread)
            except StopIteration:
                del waits[thread]
        for barriers in (*full.values(), *empty.values()):
            barriers[:] = [Barrier(barrier.arrivals) for barrier in barriers]
        reading.clear()
        held.clear()


# ---- Machine code --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """What the code of a kernel must have.

    Attributes:
        scores: times head_dim / 16 products with both factors from shared memory.
        products: times 4 with the left factor in registers, the right one transposed.
        groups: of products that are waited for together.
        waits: for all groups, and for all but the newest.
        consumers: warpgroups, by head dim.
    """

    scores: int
    products: int
    groups: int
    waits: tuple[int, int]
    consumers: dict[int, int]


EXPECTED = {
    # Twice each, in the loop and before or after it: q kᵀ, p v.
    "attention_fwd_sm90_kernel": Expected(2, 2, 4, (3, 1), {64: 3, 128: 2, 256: 2}),
    # k qᵀ, v doutᵀ, pᵀ dout, dsᵀ q.
    "attention_bwd_dkdv_sm90_kernel": Expected(2, 2, 4, (1, 3), {64: 2, 128: 2}),
    # k qᵀ and pᵀ dout of one consumer, v doutᵀ and dsᵀ q of the other. Each twice, in the loop and
    # before or after it.
    "attention_bwd_dkdv_wide_sm90_kernel": Expected(4, 4, 8, (6, 2), {256: 2}),
    # q kᵀ, dout vᵀ, ds k.
    "attention_bwd_dq_sm90_kernel": Expected(2, 1, 3, (2, 1), {64: 3, 128: 2, 256: 2}),
    # q kᵀ of the first block, and of two in the loop.
    "policy_statistics_sm90_kernel": Expected(3, 0, 3, (3, 0), {64: 2, 128: 2}),
}
FORMS = [
    (kernel, dtype, head_dim)
    for kernel, expected in EXPECTED.items()
    for dtype in ("Bf16", "Fp16")
    for head_dim in expected.consumers
]
Form = tuple[str, str, int]
Code = list[tuple[int, str]]  # (address, instruction) in order


@pytest.fixture(scope="module")
def codes() -> dict[Form, Code]:
    """The kernels for Hopper by what they are compiled for."""
    missing = native.why_missing("ral_cuda") or cuda_library.hopper_missing()
    if missing is not None:
        skip_or_fail("cuda", missing)
    if find_cuobjdump() is None:
        skip_or_fail("cuda", "no cuobjdump")
    found: dict[Form, Code] = {}
    code: Code = []
    for line in sass().splitlines():
        if match := re.search(r"Function : (\S+)", line):
            name = r"((?:attention|policy)_\w+_sm90_kernel)"
            kind = re.search(rf"{name}INS0_4(Bf16|Fp16)ELi(\d+)E", match[1])
            code = found.setdefault((kind[1], kind[2], int(kind[3])), []) if kind else []
        elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            code.append((int(match[1], 16), match[2]))
    return found


def test_every_form_is_compiled(codes: dict[Form, Code]) -> None:
    assert sorted(codes) == sorted(FORMS)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: " ".join(map(str, form)))
def test_instructions(form: Form, codes: dict[Form, Code]) -> None:
    kernel, dtype, head_dim = form
    expected = EXPECTED[kernel]
    text = [instruction for _, instruction in codes[form]]

    def count(pattern: str) -> int:
        return sum(re.search(pattern, line) is not None for line in text)

    kind = r"\.F32" + (r"\.BF16" if dtype == "Bf16" else "") + r" "
    own_in_registers = form[::2] == ("attention_fwd_sm90_kernel", 128)
    left = r"R\d+, gdesc\[\w+\](?!\.tnspB)" if own_in_registers else "gdesc"
    scores = rf"HGMMA\.64x64x16{kind}R\d+, {left}"
    products = rf"HGMMA\.64x{head_dim}x16{kind}R\d+, R\d+, gdesc\[\w+\]\.tnspB"
    assert count(scores) == expected.scores * head_dim // 16
    assert count(products) == expected.products * 4
    assert count("HGMMA") == count(scores) + count(products)
    # As many waits as the source has: had the compiler given up on running products beside other
    # instructions, there would be a wait for all after each group.
    assert count(r"WARPGROUP\.ARRIVE") == expected.groups
    assert count(r"HGMMA.*gsb0") == expected.groups
    for pending, waits in enumerate(expected.waits):
        assert count(rf"WARPGROUP\.DEPBAR\.LE gsb0, 0x{pending}") == waits
    assert count(r"UTMALDG\.4D") >= 3 and count(r"SYNCS\.PHASECHK.*TRYWAIT") > 0
    assert count(r"\bLDSM\b") == (head_dim // 16 if own_in_registers else 0)
    assert count(r"\b(HMMA|LDL|STL)\b") == 0


def reached(code: Code, start: int) -> Iterator[str]:
    """The instructions that may run from the start-th on, by jumps and by falling through."""
    index_of = {address: index for index, (address, _) in enumerate(code)}
    seen: set[int] = set()
    waiting = [start]
    while waiting:
        index = waiting.pop()
        if index in seen or index >= len(code):
            continue
        seen.add(index)
        instruction = code[index][1]
        yield instruction
        if re.search(r"\b(BRA|BSSY|CALL|WARPSYNC|JMP)\b", instruction):
            targets = re.findall(r"\b0x([0-9a-f]+)", instruction)
            waiting += [index_of[a] for t in targets if (a := int(t, 16)) in index_of]
        if not re.fullmatch(r"EXIT|BRA (0x[0-9a-f]+|`.*)", instruction):
            waiting.append(index + 1)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: " ".join(map(str, form)))
def test_roles_keep_to_their_registers(form: Form, codes: dict[Form, Code]) -> None:
    """What runs after a setmaxnreg uses no register beyond its limit."""
    code = codes[form]
    roles = [
        (index, int(match[2], 16), match[1])
        for index, (_, instruction) in enumerate(code)
        if (match := re.search(r"USETMAXREG\.(DEALLOC|TRY_ALLOC)\S* .*?0x([0-9a-f]+)", instruction))
    ]
    consumers = EXPECTED[form[0]].consumers[form[2]]
    assert sorted((kind, limit) for _, limit, kind in roles) == [
        ("DEALLOC", 32 if consumers == 3 else 24),
        ("TRY_ALLOC", 160 if consumers == 3 else 240),
    ]
    assert 128 * sum(n * (consumers if k == "TRY_ALLOC" else 1) for _, n, k in roles) <= 65536
    for start, limit, _ in roles:
        used = [int(n) for line in reached(code, start) for n in re.findall(r"\bR(\d+)\b", line)]
        assert len(used) > 10
        # a pair or a group of four is named by its first
        assert max(used) < limit, f"R{max(used)} of {limit}"


# ---- Switch --------------------------------------------------------------------------------------


def test_off_until_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAL_CUDA_HOPPER", raising=False)
    for value in (None, "", "0"):
        if value is not None:
            monkeypatch.setenv("RAL_CUDA_HOPPER", value)
        reason = cuda_library.hopper()
        assert reason is not None and "RAL_CUDA_HOPPER=1 switches it on" in reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_on_request_it_still_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAL_CUDA_HOPPER", "1")
    assert cuda_library.hopper() == cuda_library.available()
