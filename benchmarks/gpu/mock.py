"""A mocked Hopper GPU, for the rehearsal and for the kit.

Tensors are the CPU's. A Triton launch takes its real path (arguments, specialisation, cache,
compiler) to a driver that launches nothing. Then the reference backend writes the results. CUDA C++
kernels are replaced by the reference backend once their library has loaded. Faults can be seeded,
by kernel.

RAL_GPU_MOCK switches it on: `{"faults": [{"kernel": "triton attention bwd", "kind": "hang"}]}`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ral_kernels.runtime import backends, cuda_library, native, triton_runtime

VARIABLE = "RAL_GPU_MOCK"
ARCHITECTURE = "sm_90"
KERNELS = ("fwd", "bwd", "loss")
# What a kernel can do to a run. "compiler" is wrong with the bundled ptxas alone.
FAULTS = ("crash", "illegal access", "hang", "wrong", "compiler")


def settings() -> dict[str, Any] | None:
    """What RAL_GPU_MOCK says; None where it is not set."""
    text = os.environ.get(VARIABLE)
    return None if not text else dict(json.loads(text))


class IllegalAccess(RuntimeError):
    """As torch reports it; like the real one it comes back from every call that follows."""


@dataclass
class Device:
    """What the mocked GPU does to kernels, and whether its context is still usable."""

    faults: Sequence[dict[str, str]] = ()
    computes: bool = True  # False: nothing writes results, as large shapes would take hours
    broken: bool = False

    def fault_of(self, kernel: str) -> str:
        if self.broken:
            return "illegal access"
        for fault in self.faults:
            if fault["kernel"] in kernel:
                return fault["kind"]
        return ""

    def before(self, kernel: str) -> None:
        kind = self.fault_of(kernel)
        if kind == "crash":
            os.abort()
        while kind == "hang":
            time.sleep(1)
        if kind == "illegal access":
            self.broken = True
            raise IllegalAccess(f"CUDA error: an illegal memory access was encountered ({kernel})")

    def after(self, kernel: str, results: Any) -> None:
        """Spoil the last tensor of the dataclass that the kernel wrote to, if a fault says so."""
        kind = self.fault_of(kernel)
        bundled = "TRITON_PTXAS_PATH" not in os.environ
        if kind == "wrong" or (kind == "compiler" and bundled):
            values = (getattr(results, field.name) for field in dataclasses.fields(results))
            written = [x for x in values if isinstance(x, Tensor)]
            written[-1].mul_(1.25)


device: Device | None = None
_for_good = contextlib.ExitStack()


def begin(launcher: Callable[..., Any] | None = None) -> None:
    """Take the CPU for a GPU in this process, as RAL_GPU_MOCK says.

    Args:
        launcher: what Triton makes of a compiled kernel, default something that does nothing.
    """
    global device
    given = settings()
    if given is None or device is not None:
        return
    os.environ["TRITON_INTERPRET"] = "0"
    device = Device(given.get("faults", ()), given.get("computes", True))
    if triton_runtime.available() != "triton is not installed (pip install triton)":
        from triton.runtime import driver

        driver.set_active(_driver(launcher or _nothing))
        _for_good.enter_context(triton_runtime.pretend(ARCHITECTURE))
    for op, table in backends._tables.items():
        for name in {"triton", "cuda"} & table.keys():
            _wrap(op, name, table[name], table["reference"])
    cuda_library.cannot_run = cuda_library.cannot_compute
    cuda_library.hopper = _hopper


def _wrap(op: str, name: str, backend: Any, reference: Any) -> None:
    for kernel in KERNELS:
        if hasattr(backend, kernel):
            run = _mocked(op, name, getattr(backend, kernel), getattr(reference, kernel))
            setattr(backend, kernel, run)
    if name == "cuda":
        backend.available = lambda: native.why_missing("ral_cuda")
        backend.can_run = backend.has_no_kernel


def _mocked(op: str, backend: str, real: Any, reference: Any) -> Any:
    def run(*arguments: Any) -> None:
        assert device is not None
        hopper = backend == "cuda" and op == "attention" and _hopper() is None
        kernel = f"{'hopper' if hopper else backend} {op} {reference.__name__}"
        device.before(kernel)
        if backend == "triton":
            real(*arguments)
        if device.computes:
            reference(*arguments)
            device.after(kernel, arguments[-1])

    return run


def _hopper() -> str | None:
    if os.environ.get("RAL_CUDA_HOPPER", "0") in ("", "0"):
        return "RAL_CUDA_HOPPER is not set"
    return native.why_missing("ral_cuda") or cuda_library.hopper_missing()


def _nothing(source: Any, metadata: Any) -> Callable[..., None]:
    return lambda *arguments: None


def _driver(launcher: Callable[..., Any]) -> Any:
    from triton.backends.compiler import GPUTarget

    class Utils:
        def get_device_properties(self, index: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

        def load_binary(self, *arguments: Any) -> tuple[int, int, int, int, int]:
            return 1, 1, 255, 0, 1024  # module, function, registers, spills, threads

    class Driver:
        utils = Utils()
        launcher_cls = staticmethod(launcher)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, index: int = 0) -> int:
            return 0

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    return Driver()
