"""Reference policies of a rollout batch: taken as the models run, kept for its inner steps."""

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

    After each forward only the chosen rows of q, and k, are kept: a rollout batch runs in several
    forwards, and q of all rows of all of them would be as large as the activations of a layer.

    Args:
        model: any module that `rk.capture` takes.
        layers: as in `rk.capture`.
        rows: (start, stop) of the queries that stand for response tokens.
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
def taking_hidden_states(backbone: nn.Module, detach: bool) -> Iterator[list[Tensor]]:
    """Collect the last hidden state, [B, L, D], of each forward of a model's backbone."""
    taken: list[Tensor] = []

    def take(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output.last_hidden_state
        taken.append(hidden.detach() if detach else hidden)

    handle = backbone.register_forward_hook(take)
    try:
        yield taken
    finally:
        handle.remove()


class References:
    """Snapshots of a rollout batch by name ("old", "ref", "teacher"), handed out by micro-batch.

    TRL shuffles a rollout batch and splits it; `rollout_index`, int64 [b], says which rollouts a
    micro-batch holds. A micro-batch gets the same objects at every iteration, so that a snapshot's
    normalisers are formed once.
    """

    def __init__(self, device: str | None = None) -> None:
        self._keep_on = device
        self._whole: dict[str, Snapshots] = {}
        self._parts: dict[tuple[str, tuple[int, ...]], Snapshots] = {}

    def clear(self) -> None:
        """Forget the rollout batch."""
        self._whole, self._parts = {}, {}

    def add(self, name: str, taken: dict[int, list[rk.AttentionSnapshot]]) -> None:
        """Keep what `taking_snapshots` collected of the rollout batch, in its order."""
        joined = {layer: rk.AttentionSnapshot.cat(parts) for layer, parts in taken.items()}
        if self._keep_on is not None:
            joined = {layer: snapshot.to(self._keep_on) for layer, snapshot in joined.items()}
        self._whole[name] = joined

    def __contains__(self, name: str) -> bool:
        return name in self._whole

    def of(self, name: str, rollout_index: Tensor, device: torch.device) -> Snapshots:
        """The snapshots of some rollouts, on `device`, by layer.

        Raises:
            KeyError: nothing of that name was added.
        """
        key = (name, tuple(rollout_index.tolist()))
        if key not in self._parts:
            whole = self._whole[name]
            self._parts[key] = {layer: snapshot[rollout_index] for layer, snapshot in whole.items()}
        part = self._parts[key]
        return {layer: snapshot.to(device) for layer, snapshot in part.items()}
