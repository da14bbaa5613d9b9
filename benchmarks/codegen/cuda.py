"""What nvcc made of the CUDA C++ kernels, as benchmarks/results/codegen_cuda.md.

    python -m benchmarks.codegen.cuda            # writes the table; status 1 if a limit is broken

Facts of the compiler, no measurement: no GPU is needed, and none is used.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import dataclasses
import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ral_kernels.runtime import cuda_library

from .compiler import SHARED_LIMIT
from .main_loop import Code, MainLoop, Step, main_loops, opcode_of, parse, way
from .model import ASSUMPTIONS, Handover, Timing, timing

RESULT = Path(__file__).resolve().parents[1] / "results" / "codegen_cuda.md"
LIBRARY = "libral_cuda.so"
REGISTERS, THREADS = 64 * 1024, 2048  # of a multiprocessor
BLOCK_OVERHEAD = 1024  # bytes of shared memory that a block costs beyond its own
# What is worth counting in the machine code: products, loads for them, copies, 2^x and the like.
INSTRUCTIONS = ("HMMA", "HGMMA", "LDSM", "LDGSTS", "UTMALDG", "MUFU", "LDL", "STL")
PRODUCTS = ("HMMA", "HGMMA")
# Bytes a thread that may lie in local memory, where registers run short; all others have none.
STACK_LIMIT = {
    "attention_fwd_kernel 96": 128,
    "attention_fwd_kernel 128": 152,
    "attention_fwd_split_kernel 256": 8,  # on sm_90
    "attention_bwd_dkdv_kernel 96": 48,
    "attention_bwd_dkdv_kernel 128": 32,
    "attention_bwd_dkdv_general_kernel 128": 24,  # on sm_80
    "attention_bwd_dkdv_general_kernel 256": 24,  # on sm_80
    "attention_bwd_dq_general_kernel 256": 48,
    "policy_bwd_dk_kernel 64": 8,  # float16 on sm_90
}
# What a warp may issue for one block of a main loop: instructions, taken branches, global loads,
# and instructions between neighbouring products.
LOOP_LIMIT = {
    "attention_fwd_sm90_kernel 64": (295, 7, 0, 7),
    "attention_fwd_sm90_kernel 128": (305, 7, 0, 7),
    "attention_fwd_sm90_kernel 256": (370, 7, 0, 8),
    "attention_bwd_dq_sm90_kernel 64": (370, 9, 0, 6),
    "attention_bwd_dq_sm90_kernel 128": (405, 9, 0, 6),
    "attention_bwd_dq_sm90_kernel 256": (505, 9, 0, 5),
    "attention_bwd_dkdv_sm90_kernel 64": (445, 6, 4, 8),
    "attention_bwd_dkdv_sm90_kernel 128": (485, 6, 4, 8),
    "attention_bwd_dkdv_wide_sm90_kernel 256 dk": (390, 6, 2, 5),
    "attention_bwd_dkdv_wide_sm90_kernel 256 dv": (320, 4, 2, 5),
    "policy_statistics_sm90_kernel 64": (475, 14, 0, 8),  # two blocks a turn
    "policy_statistics_sm90_kernel 128": (510, 14, 0, 8),
}

# Consumers of different roles, in the order of their code, and who waits for whom. All others have
# one role.
ROLES: dict[str, tuple[str, ...]] = {"attention_bwd_dkdv_wide_sm90_kernel": ("dk", "dv")}
HANDOVERS = {
    "attention_bwd_dkdv_wide_sm90_kernel": (Handover(0, 0, 1, 2), Handover(1, 1, 0, 2)),
}

FUSED = "fused multiply-additions"
# Blocks that a main loop may meet, each by what its way through the loop counts, and the most
# clocks that it may take at each head dim, as a multiple of the first's. Of several roles the
# first's way counts, and the others go their shortest.
BLOCKS: dict[str, dict[str, tuple[dict[str, int], dict[int, float]]]] = {
    "attention_fwd_sm90_kernel": {
        "without marginals":
            ({"stores": 0, "shared stores": 0, FUSED: 34}, {64: 1.0, 128: 1.0, 256: 1.0}),
        "in the span of the block before":
            ({"stores": 0, "shared stores": 0, FUSED: 36}, {64: 1.05, 128: 1.05, 256: 1.05}),
        "a span of its own":
            ({"stores": 0, "shared stores": 2, FUSED: 36}, {64: 1.12, 128: 1.05, 256: 1.05}),
        "a span of its own, 8 are written":
            ({"stores": 4, "shared stores": 2, FUSED: 36}, {64: 1.55, 128: 1.4, 256: 1.05}),
        "one border":
            ({"stores": 0, "shared stores": 2, "shared loads": 2, "additions": 96},
             {64: 1.2, 128: 1.1, 256: 1.05}),
        "spans of 16 tokens: 4 borders":
            ({"stores": 0, "shared stores": 8, "shared loads": 5, "additions": 78},
             {64: 1.8, 128: 1.6, 256: 1.05}),
        "a span each token":
            ({"stores": 32, "shared stores": 2}, {64: 1.8, 128: 1.6, 256: 1.05}),
    },
    "attention_bwd_dq_sm90_kernel": {
        "without marginals": ({"loads": 0}, {64: 1.0, 128: 1.0, 256: 1.0}),
        "one span": ({"loads": 4}, {64: 1.15, 128: 1.05, 256: 1.05}),
        "one border": ({"loads": 6}, {64: 1.1, 128: 1.05, 256: 1.05}),
        "more borders, up to one each token": ({"loads": 34}, {64: 1.5, 128: 1.15, 256: 1.05}),
    },
    "attention_bwd_dkdv_sm90_kernel": {
        "without marginals": ({"loads": 4}, {64: 1.0, 128: 1.0}),
        "one or two spans in 16 keys": ({"loads": 8}, {64: 1.15, 128: 1.05}),
        "more, up to one each token": ({"loads": 36}, {64: 1.85, 128: 1.35}),
    },
    "attention_bwd_dkdv_wide_sm90_kernel": {
        "without marginals": ({"loads": 2}, {256: 1.0}),
        "one or two spans in 16 keys": ({"loads": 6}, {256: 1.05}),
        "more, up to one each token": ({"loads": 34}, {256: 1.2}),
    },
}  # fmt: skip


class _Entry(ctypes.Structure):
    """`ral::cuda::KernelFacts`."""

    _fields_ = [
        ("type", ctypes.c_char_p),
        ("threads", ctypes.c_int32),
        ("shared_bytes", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class CudaKernel:
    """One kernel for one architecture.

    Attributes:
        name: of the kernel; dtype and head_dim: what it is compiled for, "" and 0 for any.
        threads: of a block; shared: bytes of a block.
        registers: of a thread; stack: bytes of a thread in local memory, where spills go.
        instructions: how often each of INSTRUCTIONS stands in the code.
        loops: the main loops of a kernel for Hopper, one of each role.
    """

    name: str
    dtype: str
    head_dim: int
    architecture: str
    threads: int
    shared: int
    registers: int
    stack: int
    instructions: dict[str, int]
    loops: list[MainLoop] = dataclasses.field(default_factory=list)
    code: Code = dataclasses.field(default_factory=list, repr=False, compare=False)

    @property
    def blocks(self) -> int:
        """How many blocks a multiprocessor holds, by threads, registers and shared memory."""
        registers = -(-self.registers // 8) * 8 * self.threads
        shared = SHARED_LIMIT[self.architecture] + BLOCK_OVERHEAD
        return min(
            THREADS // self.threads,
            REGISTERS // registers,
            shared // (self.shared + BLOCK_OVERHEAD),
        )


def find_cuobjdump() -> str | None:
    """CUDA's disassembler: on PATH, or the one that Triton's wheel carries."""
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(path) if path.exists() else None
    return found


def kernels() -> list[CudaKernel]:
    """All kernels of the built library.

    Raises:
        RuntimeError: the library, or cuobjdump, is missing.
    """
    entries = list(_entries())
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        raise RuntimeError("cuobjdump is neither on PATH nor in a wheel of triton")
    path = cuda_library.library()._name
    usage = _run(cuobjdump, "-res-usage", path)
    codes = _functions(sass())
    found = []
    architecture = ""
    for line in usage.splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+?):", line):
            symbol = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+)", line):
            for entry in entries:
                kind = entry.type.decode().removeprefix("N3ral4cuda").removesuffix("E")
                if f"5entryINS0_{kind}" not in symbol:
                    continue
                name, dtype, head_dim = _parse(kind)
                code = codes[architecture, symbol]
                found.append(
                    CudaKernel(
                        name, dtype, head_dim, architecture.removesuffix("a"), entry.threads,
                        entry.shared_bytes, int(match[1]), int(match[2]),
                        _count(code), main_loops(code), code,
                    )
                )  # fmt: skip
    return sorted(found, key=lambda k: (k.name, k.dtype, k.head_dim, k.architecture))


@functools.cache  # it takes half a minute
def sass() -> str:
    """The machine code of the built library, for all architectures, as cuobjdump prints it.

    Raises:
        RuntimeError: the library, or cuobjdump, is missing.
    """
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        raise RuntimeError("cuobjdump is neither on PATH nor in a wheel of triton")
    return _run(cuobjdump, "-sass", cuda_library.library()._name)


def _entries() -> Iterator[_Entry]:
    library = cuda_library.library()
    library.ral_cuda_kernel.restype = ctypes.POINTER(_Entry)
    index = 0
    while entry := library.ral_cuda_kernel(index):
        yield entry.contents
        index += 1


def _parse(kind: str) -> tuple[str, str, int]:
    """A mangled type, such as 20attention_fwd_kernelINS0_4Bf16ELi64EE."""
    length = re.match(r"\d+", kind)
    assert length is not None
    name = kind[length.end() : length.end() + int(length[0])]
    match = re.search(r"4(Bf16|Fp16)(?:ELi(\d+))?E", kind)
    return (name, match[1].lower(), int(match[2] or 0)) if match else (name, "", 0)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _functions(sass: str) -> dict[tuple[str, str], Code]:
    """The code of each function, by architecture and symbol."""
    lines: dict[tuple[str, str], list[str]] = {}
    architecture = ""
    current: list[str] = []
    for line in sass.splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            current = lines.setdefault((architecture, match[1]), [])
        else:
            current.append(line)
    return {key: parse(of_function) for key, of_function in lines.items()}


def _count(code: Code) -> dict[str, int]:
    counts = collections.Counter(opcode_of(instruction) for _, instruction in code)
    return {i: counts[i] for i in INSTRUCTIONS if counts[i]}


def problems(found: Sequence[CudaKernel]) -> list[str]:
    """What must not be: more in local memory than known, too much shared memory, longer loops."""
    wrong = []
    for kernel in found:
        where = f"{kernel.architecture} {kernel.name} {kernel.dtype} {kernel.head_dim}"
        allowed = STACK_LIMIT.get(f"{kernel.name} {kernel.head_dim}", 0)
        if kernel.stack > allowed:
            wrong.append(f"{where}: {kernel.stack} bytes in local memory, {allowed} are known of")
        if kernel.blocks < 1:
            wrong.append(f"{where}: {kernel.shared} bytes of shared memory do not fit")
        for name, loop in named_loops(kernel):
            limit = LOOP_LIMIT[name]
            issued = loop_facts(loop)
            if any(x > y for x, y in zip(issued, limit, strict=True)):
                wrong.append(f"{where}: its main loop issues {issued}, {limit} are allowed")
    return wrong


@dataclass(frozen=True)
class Block:
    """One of BLOCKS on its way through a main loop, as the model sees it."""

    kernel: str
    head_dim: int
    name: str
    instructions: int
    branches: int
    timing: Timing
    ratio: float  # of clocks to those of the first block
    limit: float


def blocks(found: Sequence[CudaKernel]) -> list[Block]:
    """The blocks of BLOCKS in the kernels for Hopper, of bfloat16."""
    described = []
    for kernel in found:
        if kernel.name not in BLOCKS or kernel.dtype != "bf16" or not kernel.code:
            continue
        first = None
        for name, (counts, limits) in BLOCKS[kernel.name].items():
            steps = _way(kernel, name, counts)
            ways = [steps] * (kernel.threads // 128 - 1)
            for role in range(1, len(ROLES.get(kernel.name, ""))):
                ways[role] = _way(kernel, name, {}, role)
            result = timing(ways, HANDOVERS.get(kernel.name, ()))
            first = first or result
            described.append(
                Block(
                    kernel.name, kernel.head_dim, name, len(steps), sum(x.taken for x in steps),
                    result, result.clocks / first.clocks, limits[kernel.head_dim],
                )
            )  # fmt: skip
    return described


def _way(kernel: CudaKernel, name: str, counts: Mapping[str, int], role: int = 0) -> list[Step]:
    steps = way(kernel.code, counts, role)
    assert steps is not None, f"{kernel.name} {kernel.head_dim} has no way for: {name}"
    return steps


def named_loops(kernel: CudaKernel) -> list[tuple[str, MainLoop]]:
    """Its main loops, under their names in LOOP_LIMIT."""
    name = f"{kernel.name} {kernel.head_dim}"
    roles = ROLES.get(kernel.name)
    if roles is None:
        return [(name, loop) for loop in kernel.loops]
    return [(f"{name} {role}", loop) for role, loop in zip(roles, kernel.loops, strict=True)]


def loop_facts(loop: MainLoop) -> tuple[int, int, int, int]:
    """What LOOP_LIMIT limits."""
    return loop.instructions, loop.branches, loop.loads, loop.between


def markdown(found: Sequence[CudaKernel], nvcc: str) -> str:
    """The whole file. Rows of dtypes that differ in nothing are joined."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for kernel in found:
        counts = ", ".join(f"{name} {n}" for name, n in kernel.instructions.items())
        key = (
            f"`{kernel.name}`", str(kernel.head_dim or ""), kernel.architecture,
            str(kernel.threads), str(kernel.registers), str(kernel.stack or ""),
            f"{kernel.shared / 1024:.0f}", str(kernel.blocks), counts,
        )  # fmt: skip
        lines.setdefault(key, []).append(kernel.dtype)
    head = (
        "kernel", "head dim", "architecture", "threads", "registers", "bytes in local memory",
        "shared memory, KiB", "blocks an SM", "instructions in the code", "dtypes",
    )  # fmt: skip
    rows = [(*key, ", ".join(filter(None, dtypes))) for key, dtypes in lines.items()]
    text = [
        "# What the CUDA C++ kernels compile to",
        "",
        f"Written by `python -m benchmarks.codegen.cuda` with {nvcc}.",
        "",
        "Facts of the compiler, read from the machine code. They are no measurement on a GPU: "
        "nothing here says how fast a kernel is. Blocks an SM: by registers and shared memory.",
        "",
        *_table(head, sorted(rows)),
        "",
        "## Main loops of the kernels for Hopper",
        "",
        "What a warp issues for one block without masks and spans, where no wait lasts: the "
        "shortest way through the loop that passes all products. `main_loop.py` finds it. "
        "Between products: the most instructions from one product of a group to the next. A turn "
        "of `policy_statistics_sm90_kernel` has two blocks.",
        "",
        *_table(
            ("kernel", "head dim and role", "products", "instructions", "on uniform registers",
             "taken branches", "global loads", "between products"),
            sorted({
                (f"`{k.name}`", name.removeprefix(f"{k.name} "),
                 *map(str, dataclasses.astuple(loop)))
                for k in found for name, loop in named_loops(k)
            }),
        ),
        "",
        "## What marginals cost, by a model",
        "",
        "A block is 64 keys, for dk and dv 64 queries. `python -m benchmarks.codegen.cuda` finds "
        "the shortest way of each kind of block through the loop, with no mask and no new maximum, "
        "and `model.py` runs it. Spans of 64 or of 256 tokens have one border in every block, or "
        "in every fourth. The model is no measurement:",
        "",
        *(f"- {line}" for line in ASSUMPTIONS),
        "",
        *_table(
            ("kernel", "head dim", "block", "instructions", "taken branches", "clocks a round",
             "tensor pipe", "clocks, to the first"),
            [
                (f"`{b.kernel}`", str(b.head_dim), b.name, str(b.instructions), str(b.branches),
                 f"{b.timing.clocks:.0f}", f"{b.timing.utilisation:.2f}", f"{b.ratio:.2f}")
                for b in blocks(found)
            ],
        ),
    ]  # fmt: skip
    return "\n".join(text) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def nvcc_version() -> str:
    nvcc = shutil.which("nvcc")
    match = re.search(r"V(\d[\d.]+)", _run(nvcc, "--version")) if nvcc else None
    return f"nvcc {match[1]}" if match else "an unknown nvcc"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=RESULT, help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        found = kernels()
    except RuntimeError as error:
        parser.error(str(error))
    options.out.write_text(markdown(found, nvcc_version()))
    print(f"wrote {options.out}")
    wrong = problems(found)
    for line in wrong:
        print(line, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
