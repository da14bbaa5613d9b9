"""A library of `build`, loaded: its kernels' memory, reports and order."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

import torch

_REPORT_BYTES = 64 * 1024


class HostLibrary:
    """Kernels of one library and the rules that they run under.

    The library's functions are attributes of `functions`, a `ctypes.CDLL`.
    """

    def __init__(self, path: Path) -> None:
        self.functions = ctypes.CDLL(str(path))
        self.functions.ral_host_allow.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32]
        self.functions.ral_host_allow.restype = None
        self.functions.ral_host_forget_all.argtypes = []
        self.functions.ral_host_forget_all.restype = None
        self.functions.ral_host_set_order.argtypes = [ctypes.c_uint64]
        self.functions.ral_host_set_order.restype = None
        self.functions.ral_host_seed_bug.argtypes = [ctypes.c_int32]
        self.functions.ral_host_seed_bug.restype = None
        self.functions.ral_host_report.argtypes = [ctypes.c_char_p, ctypes.c_int64]
        self.functions.ral_host_report.restype = ctypes.c_int64
        self.functions.ral_host_clear_report.argtypes = []
        self.functions.ral_host_clear_report.restype = None

    def allow(self, *tensors: torch.Tensor | None, writable: bool = False) -> None:
        """Let kernels touch the bytes from each tensor's first element to its last.

        The caller keeps the tensors alive until `forget`. Reports number ranges in this order;
        tensors without elements and None count too.
        """
        for tensor in tensors:
            if tensor is None or tensor.numel() == 0:
                address, size = None, 0
            else:
                steps = zip(tensor.shape, tensor.stride(), strict=True)
                last = sum((length - 1) * stride for length, stride in steps)
                address, size = tensor.data_ptr(), (last + 1) * tensor.element_size()
            self.functions.ral_host_allow(address, size, int(writable))

    def forget(self) -> None:
        """Forbid all memory again."""
        self.functions.ral_host_forget_all()

    def report(self) -> str:
        """What rules were broken since the last `clear`; empty if none were."""
        buffer = ctypes.create_string_buffer(_REPORT_BYTES)
        self.functions.ral_host_report(buffer, len(buffer))
        return buffer.value.decode()

    def clear(self) -> None:
        self.functions.ral_host_clear_report()

    def set_order(self, seed: int) -> None:
        """Choose the order of lanes, warps and blocks; 0 is ascending."""
        self.functions.ral_host_set_order(seed)

    @contextlib.contextmanager
    def with_bug(self, number: int) -> Iterator[None]:
        """Inside, the kernels have that bug of those `switched` into them, counted from 1."""
        self.functions.ral_host_seed_bug(number)
        try:
            yield
        finally:
            self.functions.ral_host_seed_bug(0)
