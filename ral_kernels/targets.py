"""Distributions over keys or spans that many rows share, as a reference of the divergences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .runtime import checks

OP = "AttentionTarget"
_INTEGERS = (torch.int32, torch.int64)
_LARGEST_ID = 2**31 - 2  # so that the number of keys is an int32 too
_LARGEST_SUM = 2.0**100  # so that neither a sum nor its reciprocal leaves float32


class AttentionTarget:
    """Where rows should attend: G distributions in each sample, and which of them each row has.

        r_i = v_i / Σ_{j valid} v_j  for valid i, else 0   (equation 11 of ops/policy/divergence.md)

    `attention_divergence` and `ral_loss` take it as `reference`. A row's weights are restricted to
    the row's valid keys and renormalised there, exactly as the policy is. A target without weight
    on them gives a divergence of 0 and no gradient, and so does a row without a target. Nothing of
    size T·N is formed. Such targets teach a model where to look: regions that people marked, a
    teacher's map, a uniform distribution. The target gets no gradient.

    The tensors are copies. Treat the object as immutable: kernels rely on the checks that are made
    here. What torch edited since is checked again by the next call. Under `torch.compile` values
    cannot be read. Then a weight < 0, an id or an index out of range counts as none, and whether
    ids are distinct is not checked.

    Args:
        values: floating [B, G, N], weights >= 0 over keys, or over spans [B, G, S] for a call with
            spans. They need not sum to 1. With `ids` [B, G, K], the weights of `ids`.
        ids: int32 or int64 [B, G, K], the keys or spans that have weight; distinct within a target,
            -1 = none. No tensor of G·N is then formed.
        index: int32 or int64 [B, T], the target of each row in [0, G), -1 = a row without one.
            Default: with G = 1 every row has it; packed with G = S, that of the row's sequence.
            Packed calls have B = 1 and number keys through all sequences. Each row reads its own
            sequence's keys alone.

    Attributes:
        values: contiguous, float32 (float64 if given so); 0 where ids is -1.
        ids: contiguous int32, ascending in a target and -1 last; or None.
        index: contiguous int32, or None.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, device or value.
        NotImplementedError: values that require grad.
    """

    values: Tensor
    ids: Tensor | None
    index: Tensor | None

    def __init__(
        self, values: Tensor, ids: Tensor | None = None, *, index: Tensor | None = None
    ) -> None:
        _check_kinds(values, ids, index)
        dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
        # Copies are what is checked: the caller's memory may change at any time.
        values = values.detach().to(dtype, copy=True)
        ids = None if ids is None else ids.to(ids.dtype, copy=True)
        index = None if index is None else index.to(index.dtype, copy=True)
        if ids is not None:
            values = torch.where(ids == -1, 0.0, values)
        if checks.has_values(values):
            _check_values(values, ids, index)
        else:
            values = torch.where((values >= 0) & (values <= _LARGEST_SUM), values, 0.0)
            if ids is not None:
                ids = torch.where((ids >= 0) & (ids <= _LARGEST_ID), ids, -1)
            if index is not None:
                index = torch.where((index >= 0) & (index < values.shape[1]), index, -1)
        if ids is not None:
            order = torch.where(ids < 0, torch.iinfo(ids.dtype).max, ids).argsort(-1)
            values, ids = values.gather(-1, order), ids.gather(-1, order)
        self._keep(values, ids, index)

    def _keep(self, values: Tensor, ids: Tensor | None, index: Tensor | None) -> None:
        self.values = values.contiguous()
        self.ids = None if ids is None else ids.to(torch.int32).contiguous()
        self.index = None if index is None else index.to(torch.int32).contiguous()
        self._checked = None if torch.compiler.is_compiling() else self._found()
        self._largest_id: int | None = None
        if ids is not None and checks.has_values(ids):
            self._largest_id = int(ids.max()) if ids.numel() > 0 else -1

    def check(self) -> None:
        """Check the tensors again if they were assigned, or edited in place, since.

        Ops call it, because kernels rely on the checks. It takes 2 us if nothing changed.
        """
        if torch.compiler.is_compiling():
            return
        found, last = self._found(), self._checked
        same = last is not None and all(
            a is b if isinstance(a, Tensor) else a == b for a, b in zip(found, last, strict=True)
        )
        if not same:
            self.__init__(self.values, self.ids, index=self.index)  # type: ignore[misc]

    def check_length(self, op: str, name: str, length: int) -> None:
        """Check the size of the distributions against a call of `length` outcomes.

        Args:
            op, name: for the message: of the public function; "N" for keys, "S" for spans.

        Raises:
            ValueError: the sizes differ, or an id is too large.
        """
        if self.ids is None and self.values.shape[2] != length:
            raise ValueError(
                f"{op}: reference.values must be [B, G, {name}] with {name}={length}; got "
                f"{tuple(self.values.shape)}"
            )
        if self.ids is not None and self._largest_id is not None and self._largest_id >= length:
            raise ValueError(
                f"{op}: reference.ids must be in [-1, {name}={length}); got {self._largest_id}"
            )

    @property
    def batch_size(self) -> int:
        return self.values.shape[0]

    @property
    def num_targets(self) -> int:
        """G, the number of distributions in each sample."""
        return self.values.shape[1]

    @property
    def device(self) -> torch.device:
        return self.values.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> AttentionTarget:
        """The same targets on `device`."""
        self.check()
        moved = object.__new__(AttentionTarget)

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, non_blocking=non_blocking)

        moved.values = self.values.to(device, non_blocking=non_blocking)
        moved.ids, moved.index = move(self.ids), move(self.index)
        moved._checked = None if torch.compiler.is_compiling() else moved._found()
        moved._largest_id = self._largest_id
        return moved

    def __getstate__(self) -> dict[str, Any]:
        return {"values": self.values, "ids": self.ids, "index": self.index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state.get("values"), state.get("ids"), index=state.get("index"))  # type: ignore[misc]

    def __repr__(self) -> str:
        def shape(x: Tensor | None) -> str:
            return "None" if x is None else f"{checks.dtype_name(x.dtype)}{list(x.shape)}"

        return (
            f"AttentionTarget(values={shape(self.values)} on {self.device}, "
            f"ids={shape(self.ids)}, index={shape(self.index)})"
        )

    def _found(self) -> tuple[Any, ...]:
        """The tensors, and how often torch wrote into each (None if not counted)."""
        tensors = (self.values, self.ids, self.index)
        versions = (None if x is None or x.is_inference() else x._version for x in tensors)
        return *tensors, *versions


def _check_kinds(values: Any, ids: Any, index: Any) -> None:
    checks.check_tensor(OP, "values", values, "a floating tensor")
    if not values.is_floating_point():
        raise TypeError(f"{OP}: values must be floating; got {checks.dtype_name(values.dtype)}")
    if values.dim() != 3:
        raise ValueError(
            f"{OP}: values must be [B, G, N], or [B, G, K] with ids; got {tuple(values.shape)}"
        )
    if values.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            f"{OP}: values get no gradient, so they must not require grad; use values.detach()"
        )
    dims = {"ids": "[B, G, K]", "index": "[B, T]"}
    for name, x, shape in (
        ("ids", ids, tuple(values.shape)),
        ("index", index, (values.shape[0], -1)),
    ):
        if x is None:
            continue
        wanted = f"an integer tensor {dims[name]}"
        checks.check_tensor(OP, name, x, wanted)
        if x.dtype not in _INTEGERS:
            raise TypeError(
                f"{OP}: {name} must be int32 or int64; got {checks.dtype_name(x.dtype)}"
            )
        if x.dim() != len(shape) or any(
            a != b for a, b in zip(x.shape, shape, strict=True) if b != -1
        ):
            sizes = " with B={}".format(*shape) if name == "index" else f" = {shape}"
            raise ValueError(f"{OP}: {name} must be {dims[name]}{sizes}; got {tuple(x.shape)}")
        checks.check_same_device(OP, name, x, values, "values")


def _check_values(values: Tensor, ids: Tensor | None, index: Tensor | None) -> None:
    if values.numel() > 0:
        # One read of the device. A NaN makes both wrong.
        low, high = torch.stack([values.min(), values.sum(-1).max()]).tolist()
        if not low >= 0:
            raise ValueError(f"{OP}: values must be >= 0; got {low}")
        if not high <= _LARGEST_SUM:
            raise ValueError(f"{OP}: values of one target must sum to at most 2**100; got {high}")
    if ids is not None and ids.numel() > 0:
        low, high = (int(x) for x in torch.aminmax(ids))
        if low < -1 or high > _LARGEST_ID:
            raise ValueError(
                f"{OP}: ids must be in [-1, 2**31 - 1); got values from {low} to {high}"
            )
        ordered = ids.sort(-1).values
        twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
        if bool(twice.any()):
            b, g, i = twice.nonzero()[0].tolist()
            raise ValueError(
                f"{OP}: ids must be distinct within a target; got {int(ordered[b, g, i])} twice in "
                f"target {g} of sample {b}"
            )
    if index is not None and index.numel() > 0:
        low, high = (int(x) for x in torch.aminmax(index))
        if low < -1 or high >= values.shape[1]:
            raise ValueError(
                f"{OP}: index must be in [-1, G={values.shape[1]}); got values from {low} to {high}"
            )
