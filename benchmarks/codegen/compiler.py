"""Recorded launches -> cubins, and what the compiler says of them.

A launch is specialised exactly as Triton specialises it at run time (integers equal to 1 and None
become constants, divisibility by 16 is noted), by Triton's own code. Registers, stack and local
memory are read from the cubin with the cuobjdump of Triton's wheel, instructions from the PTX,
remarks of ptxas on wgmma from its log.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ral_kernels.runtime.triton_runtime import Launch

from .loops import Loop, disassemble, main_loops

# Bytes of shared memory that one CTA may have (CUDA C++ Programming Guide, table of technical
# specifications): 163 KiB on 8.0, 227 KiB on 9.0 and 10.0.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
MATRIX_INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
# Tensor copies (TMA) and asynchronous copies.
COPY_INSTRUCTIONS = ("cp.async.bulk.tensor", "cp.async.cg", "cp.async.ca")


@dataclass(frozen=True)
class Facts:
    """What the compiler made of one launch."""

    kernel: str
    architecture: str
    constants: dict[str, Any]  # tile sizes and flags: the constexprs in capitals
    num_warps: int
    num_stages: int
    registers: int  # of a thread
    stack: int  # bytes of a thread; spills go here
    local: int  # or here
    shared: int  # bytes of a CTA
    multiplies: bool  # whether the kernel has a matrix product
    instructions: tuple[str, ...]  # of the two lists above, those in the PTX
    remarks: tuple[str, ...]  # codes of what ptxas says of wgmma: REMARKS in table.py
    seconds: float
    error: str = ""  # why there is no cubin; the numbers are 0 then
    loops: tuple[Loop, ...] = ()  # where they are asked for

    @property
    def spills(self) -> int:
        return self.stack + self.local


def compile_launches(
    launches: Sequence[Launch], architecture: str, with_loops: bool = False
) -> list[Facts]:
    """Compile each different launch once, for `architecture`.

    `with_loops` disassembles the kernels too, which takes about as long as to compile them.
    """
    found: dict[str, Facts] = {}
    for launch in launches:
        source = _source(launch, architecture)
        key = f"{launch.name} {source.hash()} {launch.options}"
        if key not in found:
            try:
                found[key] = _compile(launch, source, architecture, with_loops)
            except Exception as error:  # the other kernels are worth knowing all the same
                found[key] = failure(launch.name, architecture, error)
    return list(found.values())


def failure(kernel: str, architecture: str, error: Exception) -> Facts:
    """Facts of a kernel that did not compile."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip(" ^")]
    text = f"{type(error).__name__}: {' / '.join(lines[-2:])}"
    return Facts(kernel, architecture, {}, 0, 0, 0, 0, 0, 0, False, (), (), 0.0, text)


def _target(architecture: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


def _source(launch: Launch, architecture: str) -> Any:
    """The specialised source of a launch, as `JITFunction.run` makes it."""
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, backend = launch.kernel, make_backend(_target(architecture))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**launch.arguments, **launch.options)
    _, signature, constants, attributes = kernel._pack_args(
        backend, launch.options, bound, specialization, options
    )
    return ASTSource(kernel, signature, constants, attributes)


def _compile(launch: Launch, source: Any, architecture: str, with_loops: bool) -> Facts:
    import triton

    start = time.perf_counter()
    compiled = triton.compile(source, target=_target(architecture), options=launch.options)
    ptx, usage = compiled.asm["ptx"], _resource_usage(compiled.asm["cubin"])
    return Facts(
        kernel=launch.name,
        architecture=architecture,
        constants=dict(sorted(_constants(launch.arguments))),
        num_warps=launch.options["num_warps"],
        num_stages=launch.options["num_stages"],
        registers=usage["REG"],
        stack=usage["STACK"],
        local=usage["LOCAL"],
        shared=compiled.metadata.shared,
        multiplies="tt.dot" in str(compiled.asm["ttir"]),
        instructions=tuple(
            name for name in (*MATRIX_INSTRUCTIONS, *COPY_INSTRUCTIONS) if name in ptx
        ),
        remarks=_remarks(ptx) if "wgmma" in ptx else (),
        seconds=time.perf_counter() - start,
        loops=tuple(main_loops(disassemble(compiled.asm["cubin"]))) if with_loops else (),
    )


def _constants(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names in capitals and their values, within tuples too."""
    for name, value in arguments.items():
        if isinstance(value, tuple):
            yield from _constants(value._asdict())  # type: ignore[attr-defined]
        elif name.isupper():
            yield name, getattr(value, "value", value)


@functools.cache
def _remarks(ptx: str) -> tuple[str, ...]:
    """Codes in the log of ptxas. Triton throws it away, so ptxas is run once more."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(90).path, "-lineinfo", "-v", "--gpu-name=sm_90a", file.name]
        log = subprocess.run(
            [*command, "-o", "/dev/null"], capture_output=True, text=True, check=True
        ).stderr
    return tuple(sorted(set(re.findall(r"\((C\d+)\)", log))))


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL, ... of the one kernel of a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = re.search(r"REG:\d+.*", text)
    if line is None:
        raise RuntimeError(f"codegen: cuobjdump reports no resource usage: {text!r}")
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", line.group())}
