"""The `cuda` backend with its kernels run by the harness: CPU tensors in, every access checked."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from ral_kernels.ops.attention import cuda as attention_cuda
from ral_kernels.ops.attention import interface as attention_interface
from ral_kernels.ops.policy import cuda as policy_cuda
from ral_kernels.ops.policy import divergence as divergence_interface
from ral_kernels.ops.policy import interface as policy_interface
from ral_kernels.ops.policy.arguments import PolicyArgs
from ral_kernels.ops.policy.chunks import Chunk, chunks_of_sequences
from ral_kernels.ops.policy.cuda import span_lists
from ral_kernels.runtime import cuda_library
from tests.cuda_host.build import Patch, build, sources_of
from tests.cuda_host.library import HostLibrary

WITHOUT_HOPPER = "policy/statistics_sm90.cu"  # which takes no call: host_hopper.h is left out
POLICY = (*sources_of("policy/*"), WITHOUT_HOPPER)
SOURCES = (*sources_of("*/*"), WITHOUT_HOPPER)


class Violation(AssertionError):
    """What the harness reports of a call."""


class Kernels(HostLibrary):
    """The kernels of the package; `calls` counts what `on_host` handed to them."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.calls: collections.Counter[str] = collections.Counter()


@functools.cache
def host_library(
    folder: Path, patches: tuple[Patch, ...] = (), sources: tuple[str, ...] = SOURCES
) -> Kernels:
    """The kernels of the package, with seeded bugs if so wished, compiled for the host."""
    library = Kernels(build(sources, folder, patches))
    library.functions.ral_cuda_failed_kernel.restype = ctypes.c_char_p
    library.functions.ral_cuda_error_string.restype = ctypes.c_char_p
    return library


class _Watched:
    """A backend whose calls see a library and the tensors of the call, nothing else.

    `module` is where it finds `cuda_library` and `_library`.
    """

    def __init__(self, backend: Any, module: Any, library: Kernels) -> None:
        self._backend, self._module, self._library = backend, module, library

    def available(self) -> str | None:
        return None

    def only_on_request(self) -> str | None:
        return None

    def can_run(self, args: Any) -> str | None:
        reason: str | None = self._backend.has_no_kernel(args)
        return reason

    def __getattr__(self, name: str) -> Any:
        return functools.partial(self._call, name)

    def _call(self, name: str, args: Any, *others: Any) -> None:
        library = self._library
        alive: list[torch.Tensor] = []

        def allow(x: Any, writable: bool) -> None:
            if isinstance(x, torch.Tensor):
                library.allow(x, writable=writable)
                alive.append(x)
            elif dataclasses.is_dataclass(x):
                for field in dataclasses.fields(x):
                    allow(getattr(x, field.name), writable)

        def scratch(like: torch.Tensor, *shape: int) -> torch.Tensor:
            made = torch.full(shape, float("nan"), dtype=torch.float32)
            allow(made, True)
            return made

        def aligned(x: torch.Tensor) -> torch.Tensor:
            made = cuda_library.aligned(x)
            if made is not x:
                allow(made, False)
            return made

        def chunks(*sizes: Any, **more: Any) -> Iterator[Chunk]:
            for chunk in chunks_of_sequences(*sizes, **more):
                allow(chunk.packing, False)
                yield chunk

        def lists(policy: PolicyArgs) -> tuple[torch.Tensor, ...]:
            made = span_lists(policy)
            for x in made:
                allow(x, False)
            return made

        library.calls[name] += 1
        library.clear()
        allow(args, False)
        for x in others:
            allow(x, True)
        seam = SimpleNamespace(**vars(cuda_library))
        seam.library = lambda: library.functions
        seam.scratch, seam.aligned = scratch, aligned
        seam.stream = lambda x: 0
        seam.on_device_of = lambda x: contextlib.nullcontext()
        seam.raise_for_status = lambda *rest, **tensors: None
        try:
            with (
                mock.patch.object(self._module, "cuda_library", seam),
                mock.patch.object(self._module, "_library", lambda: library.functions),
                mock.patch.object(self._module, "chunks_of_sequences", chunks, create=True),
                mock.patch.object(self._module, "span_lists", lists, create=True),
            ):
                getattr(self._backend, name)(args, *others)
        finally:
            library.forget()
        report = library.report()
        if report:
            raise Violation(report)


@contextlib.contextmanager
def on_host(library: Kernels) -> Iterator[None]:
    """Inside, `backend="cuda"` runs the kernels of `library`, on CPU tensors."""
    library.calls.clear()
    attention = {"cuda": _Watched(attention_cuda.CudaAttention(), attention_cuda, library)}
    policy = {"cuda": _Watched(policy_cuda.CudaPolicy(), policy_cuda, library)}
    divergence = {"cuda": _Watched(policy_cuda.CudaPolicyDivergence(), policy_cuda, library)}
    with (
        mock.patch.dict(attention_interface.BACKENDS, attention),
        mock.patch.dict(policy_interface.BACKENDS, policy),
        mock.patch.dict(divergence_interface.BACKENDS, divergence),
    ):
        yield
