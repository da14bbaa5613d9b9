"""Reference policies of a rollout batch, taken as the models run and kept for its inner steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import ral_kernels as rk

Snapshots = dict[int, rk.AttentionSnapshot]


@contextmanager
def taking_snapshots(
    model: nn.Module, layers: Any, rows: tuple[int, int], *, steered: bool = True
) -> Iterator[dict[int, list[rk.AttentionSnapshot]]]:
    """Collect a snapshot of the chosen layers from each forward of `model` inside the `with`.

    After each forward only k and the chosen rows of q are kept. A rollout batch runs in several
    forwards, and all rows of q of all of them would take as much memory as a layer's activations.

    Args:
        model: any module that `rk.capture` takes.
        layers: as in `rk.capture`.
        rows: (start, stop) of the queries of response tokens.
        steered: with the bias of the `rk.steer` that the model runs under, if any.

    Yields:
        A list of snapshots for each layer's number, in the order of the forwards.
    """
    taken: dict[int, list[rk.AttentionSnapshot]] = {}
    with rk.capture(model, layers, rows=rows, detach=True) as captured:

        def take(*_: Any) -> None:
            for layer in captured.layers:
                taken.setdefault(layer, []).append(captured.snapshot(layer=layer, steered=steered))
            captured.clear()

        handle = model.register_forward_hook(take)
        try:
            yield taken
        finally:
            handle.remove()


@contextmanager
def taking_hidden_states(
    backbone: nn.Module, rows: tuple[int, int], *, detach: bool
) -> Iterator[list[Tensor]]:
    """Collect rows (start, stop) of the last hidden state of each forward of a model's backbone.

    Yields:
        A list of [B, stop - start, D]. With `detach` they are copies, so that the kept memory does
        not grow with the prompts.
    """
    taken: list[Tensor] = []

    def take(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output.last_hidden_state[:, slice(*rows)]
        taken.append(hidden.detach().clone() if detach else hidden)

    handle = backbone.register_forward_hook(take)
    try:
        yield taken
    finally:
        handle.remove()


class References:
    """Snapshots of a rollout batch by name ("old", "ref", "teacher"), for each micro-batch.

    TRL shuffles a rollout batch and splits it. `rollout_index`, int64 [b], says which rollouts a
    micro-batch holds. A micro-batch gets the same objects in every iteration, unless they are kept
    on another device. So the normalisers of a snapshot are computed once.
    """

    def __init__(self, device: str | None = None) -> None:
        self._keep_on = device
        # Snapshots by name and by the rollouts that they hold, in their order.
        self._parts: dict[str, dict[tuple[int, ...], Snapshots]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all kept snapshots."""
        return sum(
            snapshot.nbytes
            for parts in self._parts.values()
            for part in parts.values()
            for snapshot in part.values()
        )

    def clear(self) -> None:
        """Forget the rollout batch."""
        self._parts = {}

    def add(self, name: str, taken: dict[int, list[rk.AttentionSnapshot]]) -> None:
        """Keep what `taking_snapshots` collected of the rollout batch, in its order."""
        joined = {layer: rk.AttentionSnapshot.cat(parts) for layer, parts in taken.items()}
        if self._keep_on is not None:
            joined = {layer: snapshot.to(self._keep_on) for layer, snapshot in joined.items()}
        size = next(iter(joined.values())).batch_size
        self._parts[name] = {tuple(range(size)): joined}

    def split(self, parts: list[Tensor]) -> None:
        """Keep the snapshots of each micro-batch, and no longer those of the whole batch.

        Args:
            parts: `rollout_index` of each micro-batch.
        """
        for name in self._parts:
            whole = self._joined(name)
            split: dict[tuple[int, ...], Snapshots] = {tuple(x.tolist()): {} for x in parts}
            for layer in list(whole):
                snapshot = whole.pop(layer)  # only one layer at a time exists twice
                for key, part in split.items():
                    part[layer] = snapshot[torch.tensor(key)]
            self._parts[name] = split

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def of(self, name: str, rollout_index: Tensor, device: torch.device) -> Snapshots:
        """The snapshots of some rollouts, on `device`, by layer.

        Raises:
            KeyError: nothing of that name was added.
        """
        key = tuple(rollout_index.tolist())
        part = self._parts[name].get(key)
        if part is None:
            whole = self._joined(name)
            part = {layer: snapshot[torch.tensor(key)] for layer, snapshot in whole.items()}
        return {
            layer: snapshot if snapshot.device == device else snapshot.to(device)
            for layer, snapshot in part.items()
        }

    def _joined(self, name: str) -> Snapshots:
        """The snapshots of all rollouts, in the order of their numbers."""
        parts = self._parts[name]
        numbers = torch.tensor([number for key in parts for number in key])
        if len(parts) == 1 and torch.equal(numbers, torch.arange(len(numbers))):
            (whole,) = parts.values()
            return whole
        layers = next(iter(parts.values()))
        return {
            layer: rk.AttentionSnapshot.cat([part[layer] for part in parts.values()])[
                numbers.argsort()
            ]
            for layer in layers
        }
