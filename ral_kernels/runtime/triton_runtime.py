"""What the Triton kernels of every op share: availability, tile sizes, launches, recorded launches.

Importing this module does not import triton; the modules that hold kernels do.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checks

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")  # what the tables of tile sizes name
INTERPRETER = "interpreter"
OLDEST = (3, 4)  # the first release whose kernels take tuples with None in them


@dataclass(frozen=True)
class Tile:
    """Sizes of one program's tile, and how it is run.

    `flags` are further constexprs of the kernel, such as whether K is read by tensor descriptors.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    flags: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Launch:
    """One launch, as `record_launches` keeps it: enough to compile the kernel ahead of time."""

    kernel: Any  # triton.JITFunction
    name: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by the names of the kernel's parameters, constexprs included
    options: dict[str, Any]  # num_warps, num_stages, enable_fp_fusion


@dataclass
class _Pretence:
    """Tensors of the CPU are taken for those of a GPU of this architecture."""

    architecture: str
    launches: list[Launch] | None  # where launches are recorded; None: they go to Triton's driver


_pretence: _Pretence | None = None


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1: kernels run on the CPU, in Python, to be tested."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _version() -> str | None:
    """The release of Triton; None where its package has another name, as nightly builds have."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def available() -> str | None:
    """None if Triton kernels work on this machine, else the reason why not."""
    if not _installed():
        return "triton is not installed (pip install triton)"
    version = _version()
    if version is not None and tuple(map(int, version.split(".")[:2])) < OLDEST:
        return f"Triton >= {OLDEST[0]}.{OLDEST[1]} is needed; found {version}"
    if _pretence is not None or interpreted():
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device (TRITON_INTERPRET=1 runs the kernels in Python, to test)"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "it needs compute capability 8.0 or newer"
    return None


def cannot_run(x: Tensor, *others: Tensor | None) -> str | None:
    """Why kernels cannot take these tensors (device and dtype); None if they can."""
    on_cpu = interpreted()
    if _pretence is None:
        if on_cpu and not x.is_cpu:
            return f"with TRITON_INTERPRET=1 it needs CPU tensors; got {x.device}"
        if not on_cpu and not x.is_cuda:
            return checks.wrong_device("CUDA", x.device)
    for tensor in (x, *others):
        if tensor is not None and tensor.is_floating_point() and tensor.dtype not in DTYPES:
            return f"it computes float32, bfloat16 and float16; got {tensor.dtype}"
        if on_cpu and tensor is not None and tensor.dtype == torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 wrongly"
    return None


def only_on_request() -> str | None:
    """Why the automatic choice of a backend leaves Triton out; None where it does not."""
    return "the interpreter is for tests" if interpreted() and _pretence is None else None


class TritonChoice:
    """What every Triton backend answers alike to the choice of a backend."""

    def available(self) -> str | None:
        return available()

    def only_on_request(self) -> str | None:
        return only_on_request()


def architecture(device: torch.device) -> str:
    """The row of the tables of tile sizes: "sm_80", "sm_90", "sm_100" or "interpreter"."""
    if _pretence is not None:
        return _pretence.architecture
    if interpreted():
        return INTERPRETER
    return _architecture(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _architecture(index: int) -> str:
    major, _minor = torch.cuda.get_device_capability(index)
    if major == 9:
        return "sm_90"
    # 12.x has the shared memory and the instructions of 8.x as far as these kernels go.
    return "sm_100" if major in (10, 11) else "sm_80"


def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the device; 132, those of an H100, where there is none."""
    if _pretence is not None or interpreted():
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    num_warps: int,
    num_stages: int,
    fp_fusion: bool = True,
) -> None:
    """Launch `kernel` with arguments by name, on the device of its tensors.

    `fp_fusion` lets the compiler form FMAs. It is always passed, because Triton's default has
    changed. Kernels in which two results must agree bit for bit go without.
    """
    if 0 in grid:
        return
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fp_fusion}
    if _pretence is not None and _pretence.launches is not None:
        name = kernel.__name__
        _pretence.launches.append(Launch(kernel, name, grid, arguments, options))
        return
    with _on_device(next((x.device for x in _tensors(arguments.values())), None)):
        kernel[grid](**arguments, **options)


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors among arguments, within tuples too."""
    for x in arguments:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, tuple):
            yield from _tensors(x)


def _on_device(device: torch.device | None) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever the tensors' own."""
    if device is None or device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@contextmanager
def pretend(architecture: str) -> Iterator[None]:
    """Inside, tensors of the CPU are taken for those of a GPU of `architecture`.

    Kernels are specialised, compiled and looked up as on that GPU. Triton's driver must be one that
    does not run them.
    """
    with _pretending(_Pretence(architecture, None)):
        yield


@contextmanager
def record_launches(architecture: str) -> Iterator[list[Launch]]:
    """Inside, launches on `architecture` are recorded. No kernel runs: outputs keep their values.

    Kernels are so compiled ahead of time, for a GPU that is not there, with exactly the arguments
    and tile sizes of a call.
    """
    launches: list[Launch] = []
    with _pretending(_Pretence(architecture, launches)):
        yield launches


@contextmanager
def _pretending(pretence: _Pretence) -> Iterator[None]:
    global _pretence
    if interpreted():
        raise RuntimeError("kernels are not compiled under TRITON_INTERPRET=1")
    before, _pretence = _pretence, pretence
    try:
        yield
    finally:
        _pretence = before


def tuned(
    name: str,
    key: tuple[Any, ...],
    default: Tile,
    candidates: Callable[[], Sequence[Tile]],
    run: Callable[[Tile], None],
    device: torch.device,
) -> Tile:
    """The tile of a kernel: `default` from the table, or with RAL_AUTOTUNE=1 the fastest candidate.

    `candidates` is called only with RAL_AUTOTUNE=1, so that other launches do not pay for the list.
    `key` is what the choice depends on (dtype, head dims, ...). `run` launches the kernel with a
    tile on `device`; it may be called often. Choices are kept in RAL_CACHE_DIR, by default
    ~/.cache/ral_kernels: one file for each GPU and release of Triton.
    """
    if os.environ.get("RAL_AUTOTUNE", "0") != "1" or _pretence is not None or interpreted():
        return default
    with _on_device(device):
        return _fastest(name, key, candidates(), run)


def _fastest(
    name: str, key: tuple[Any, ...], tiles: Sequence[Tile], run: Callable[[Tile], None]
) -> Tile:
    cache = _tuning_cache()
    entry = f"{name} {key} {_fingerprint(tiles)}"
    if cache.get(entry, -1) not in range(len(tiles)):
        times = [_milliseconds(run, tile) for tile in tiles]
        best = min(range(len(tiles)), key=times.__getitem__)
        if times[best] == float("inf"):
            raise RuntimeError(f"{name}: none of {len(tiles)} tile sizes runs for {key}")
        logger.info("%s %s: %s (%.3f ms)", name, key, tiles[best], times[best])
        cache[entry] = best
        _keep(cache)
    return tiles[cache[entry]]


def _milliseconds(run: Callable[[Tile], None], tile: Tile) -> float:
    import triton

    try:
        return float(triton.testing.do_bench(lambda: run(tile), warmup=10, rep=50))
    except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError) as error:
        logger.debug("tile %s: %s", tile, error)
        return float("inf")


def _fingerprint(tiles: Sequence[Tile]) -> str:
    """Part of an entry's name: another list of candidates needs another search."""
    return hashlib.sha256(repr(tiles).encode()).hexdigest()[:12]


def _cache_file() -> Path:
    import triton

    folder = os.environ.get("RAL_CACHE_DIR") or Path.home() / ".cache" / "ral_kernels"
    gpu = torch.cuda.get_device_name().replace(" ", "_")
    return Path(folder) / f"tiles-{gpu}-triton-{triton.__version__}.json"


@functools.cache
def _tuning_cache() -> dict[str, int]:
    try:
        found = json.loads(_cache_file().read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {entry: index for entry, index in found.items() if type(index) is int}


def _keep(cache: dict[str, int]) -> None:
    """Write the choices. Where the folder cannot be written, the next process searches again."""
    path = _cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(cache, indent=1))
        temporary.replace(path)
    except OSError as error:
        logger.warning("RAL_AUTOTUNE: cannot write %s (%s)", path, error)
