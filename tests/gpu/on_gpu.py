"""The ops' tests on a GPU: kernels get copies of the CPU tensors of a test, results come back.

Cases, truths and baselines stay what they are without a GPU; only `can_run`, `fwd`, `bwd` and
`loss` of a backend are wrapped, so that every test that asks for the backend runs its kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from ral_kernels.runtime import backends

KERNELS = ("fwd", "bwd", "loss")
ALIGNMENT = 64  # elements; what lies off it in its own memory does so in the copy as well


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """The same values, strides and misalignment on `device`, NaN or 0 in the gaps between them."""
    if tensor.numel() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    sizes, strides = tensor.shape, tensor.stride()
    span = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    offset = tensor.storage_offset() % ALIGNMENT
    gap = float("nan") if tensor.is_floating_point() else 0
    memory = torch.full((offset + span,), gap, dtype=tensor.dtype, device=device)
    # an element that several places share (a stride of 0) is written once
    once = [1 if stride == 0 else size for size, stride in zip(sizes, strides, strict=True)]
    source = tensor.detach().as_strided(once, strides, tensor.storage_offset())
    memory.as_strided(once, strides, offset).copy_(source)
    return memory.as_strided(sizes, strides, offset)


class Copies:
    """Copies of the arguments of one call; a tensor that comes twice is copied once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.made: dict[int, tuple[Tensor, Tensor]] = {}  # id -> (on the CPU, its copy)

    def of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.device == self.device:
                return value
            if id(value) not in self.made:
                self.made[id(value)] = (value, copy_to(value, self.device))
            return self.made[id(value)][1]
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {f.name: self.of(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return dataclasses.replace(value, **fields)
        if isinstance(value, (tuple, list)):
            return type(value)(self.of(item) for item in value)
        return value

    def bring_back(self, outputs: Any) -> None:
        """Copy what a kernel may have written: the tensors among its arguments, and in them."""
        for value in outputs:
            if dataclasses.is_dataclass(value):
                fields = dataclasses.fields(value)
                self.bring_back([getattr(value, field.name) for field in fields])
            elif isinstance(value, Tensor) and id(value) in self.made and 0 not in value.stride():
                # .data: autograd must not take an input that comes back unchanged for a new one
                value.data.copy_(self.made[id(value)][1])


def _wrapped(kernel: Any, device: torch.device) -> Any:
    def on_device(args: Any, *others: Any) -> None:
        copies = Copies(device)
        kernel(copies.of(args), *(copies.of(value) for value in others))
        copies.bring_back([args, *others])

    return on_device


@contextmanager
def kernels_on(device: torch.device, backend: str) -> Iterator[None]:
    """Inside, `backend` computes CPU tensors too, on `device`; on request only."""
    with pytest.MonkeyPatch.context() as patch:
        for table in backends._tables.values():
            found = table.get(backend)
            if found is None:
                continue
            can_run = found.can_run
            patch.setattr(found, "can_run", lambda args, f=can_run: f(Copies(device).of(args)))
            patch.setattr(found, "only_on_request", lambda: "tests ask for it")
            for name in KERNELS:
                if hasattr(found, name):
                    patch.setattr(found, name, _wrapped(getattr(found, name), device))
        yield
