"""Reference policies of a rollout batch, kept for its inner steps. It does not use TRL."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

PINNED = "pinned"  # page-locked memory of the CPU, as a device


class Rows(Protocol):
    """What can be kept: `rk.AttentionSnapshot`, and tensors whose first dimension is the batch.

    A class of one's own also needs `cat`, a class method that joins a sequence along the batch.
    """

    @property
    def device(self) -> torch.device: ...

    @property
    def nbytes(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...

    def to(self, device: Any, *, non_blocking: bool) -> Any: ...

    def pin_memory(self) -> Any: ...


Kept = dict[int, Any]  # rows by the number of their layer


class References:
    """What the terms compare a rollout batch with, by name, for each micro-batch of its update.

        references.add("old", {layer: [snapshot, ...]})     # as the forwards come
        references.split([index, ...])                      # the micro-batches to come, if known
        references.of("old", index, device)[layer]          # the rollouts of one of them
        references.clear()                                  # before the next rollout batch

    Rollouts have numbers. A micro-batch names those that it holds, in its order. It gets the same
    objects in every iteration, unless they are kept on another device. So the normalisers of a
    snapshot are computed once.

    Args:
        device: where to keep everything: None where it was made, a device such as "cpu", or
            "pinned", memory of the CPU from which copies to a GPU do not wait.
    """

    def __init__(self, device: str | None = None) -> None:
        self._keep_on = device
        # By name, and by the numbers of the rollouts that a part holds, in its order.
        self._parts: dict[str, dict[tuple[int, ...], Kept]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(
            rows.nbytes
            for parts in self._parts.values()
            for part in parts.values()
            for rows in part.values()
        )

    def clear(self) -> None:
        """Forget the rollout batch."""
        self._parts = {}

    def add(
        self, name: str, taken: Mapping[int, Sequence[Rows]], index: Tensor | None = None
    ) -> None:
        """Keep rows of some rollouts.

        Args:
            name: such as "old", "ref" or "teacher".
            taken: by the number of its layer, what each forward gave, in their order.
            index: int64 [b], the numbers of these rollouts; default those after the ones that are
                here.

        Raises:
            ValueError: layers with different numbers of rows, an index of another length, or a
                rollout that is here.
            RuntimeError: "pinned" on a machine without an accelerator.
        """
        joined = {layer: self._placed(_cat(rows)) for layer, rows in taken.items()}
        here = [number for key in self._parts.get(name, {}) for number in key]
        sizes = {len(rows) for rows in joined.values()}
        if len(sizes) != 1:
            got = ", ".join(map(str, sorted(sizes))) or "none"
            raise ValueError(f"References.add: layers must have the same number of rows; got {got}")
        (size,) = sizes
        first = max(here, default=-1) + 1
        key = tuple(range(first, first + size) if index is None else index.tolist())
        if len(key) != size or len(set(key).difference(here)) != size:
            raise ValueError(
                f"References.add: index must hold {size} rollouts that {name!r} does not have; "
                f"got {list(key)}, with {here} here"
            )
        self._parts.setdefault(name, {})[key] = joined

    def split(self, parts: Iterable[Tensor]) -> None:
        """Keep the rows of each micro-batch, and no longer those of the whole batch.

        Args:
            parts: int64 [b], the rollouts of each micro-batch.

        Raises:
            KeyError: a rollout that was not added.
        """
        keys = [tuple(numbers.tolist()) for numbers in parts]
        for name, whole in self._parts.items():
            split: dict[tuple[int, ...], Kept] = {key: {} for key in keys}
            for layer in list(next(iter(whole.values()))):
                for key, part in split.items():
                    part[layer] = _picked(name, whole, layer, key)
                for part in whole.values():
                    del part[layer]  # only one layer at a time exists twice
            self._parts[name] = split

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def of(self, name: str, rollout_index: Tensor, device: torch.device) -> Kept:
        """The rows of some rollouts, on `device`, by layer.

        Args:
            name: as it was added.
            rollout_index: int64 [b], their numbers.
            device: where to have them.

        Raises:
            KeyError: nothing of that name was added, or not of these rollouts.
        """
        if name not in self._parts:
            raise KeyError(
                f"References.of: {name!r} was not added; {', '.join(self._parts) or 'nothing'} was"
            )
        parts, key = self._parts[name], tuple(rollout_index.tolist())
        found = parts.get(key)
        if found is None:
            layers = next(iter(parts.values()))
            found = {layer: _picked(name, parts, layer, key) for layer in layers}
        return {
            # Only a copy from the CPU may run while we go on: its reader waits for it by itself.
            layer: rows
            if rows.device == device
            else rows.to(device, non_blocking=rows.device.type == "cpu")
            for layer, rows in found.items()
        }

    def _placed(self, rows: Any) -> Any:
        if self._keep_on is None:
            return rows
        if self._keep_on == PINNED:
            if not torch.accelerator.is_available():
                raise RuntimeError("References: device='pinned' needs an accelerator; got none")
            return rows.to("cpu", non_blocking=False).pin_memory()
        return rows.to(self._keep_on, non_blocking=False)


def _picked(
    name: str, parts: Mapping[tuple[int, ...], Kept], layer: int, numbers: tuple[int, ...]
) -> Any:
    """A layer's rows of these rollouts, in this order, from the parts that hold them."""
    pieces, found = [], []
    for key, part in parts.items():
        places = {number: place for place, number in enumerate(key)}
        here = [number for number in numbers if number in places]
        if here:
            pieces.append(part[layer][torch.tensor([places[number] for number in here])])
            found += here
    missing = set(numbers).difference(found)
    if missing:
        raise KeyError(f"References: rollouts {sorted(missing)} of {name!r} were not added")
    joined = _cat(pieces)
    if found == list(numbers):
        return joined
    order = {number: place for place, number in enumerate(found)}
    return joined[torch.tensor([order[number] for number in numbers])]


def _cat(rows: Sequence[Any]) -> Any:
    first = rows[0]
    if isinstance(first, Tensor):
        return torch.cat(list(rows)) if len(rows) > 1 else first
    return type(first).cat(rows)
