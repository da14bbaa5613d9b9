"""Packed sequences: one after another along the tokens, told apart by offsets (cu_seqlens).

The ops of a policy and `AttentionSnapshot` take them. Offsets come as tensors; their values are
read once a call, because the lengths bound loops and shape results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from ..runtime import checks

# Rows of each sequence: slices of step 1 or (start, stop), relative to the sequence's own queries.
PackedRows = Sequence[slice | tuple[int, int]]


@dataclass(frozen=True)
class Packing:
    """Where the chosen rows and the keys of each of S sequences lie."""

    cu_seqlens_q: Tensor  # int32 [S + 1], offsets of the chosen rows
    cu_seqlens_k: Tensor  # int32 [S + 1]
    query_starts: Tensor  # int32 [S], key position of each sequence's first row in its own keys
    max_rows: int
    max_keys: int
    index: Tensor | None  # int64 [T], the chosen queries; None: all, as they lie

    @property
    def num_sequences(self) -> int:
        """S."""
        return self.query_starts.shape[0]

    def chosen(self, q: Tensor) -> Tensor:
        """The chosen rows [1, H, T, D] of q [1, H, Tq, D], with a gradient."""
        return q if self.index is None else q.index_select(2, self.index)


def resolve(
    op: str, q: Tensor, k: Tensor, cu_seqlens_q: Any, cu_seqlens_k: Any, rows: Any
) -> Packing | None:
    """Check the offsets and rows of a call; None for a padded call, which has no offsets.

    Offsets on the CPU are read without a wait. Those on a GPU make the host wait for it.
    """
    if cu_seqlens_q is None and cu_seqlens_k is None:
        return None
    for name, given, other in (
        ("cu_seqlens_q", cu_seqlens_q, "cu_seqlens_k"),
        ("cu_seqlens_k", cu_seqlens_k, "cu_seqlens_q"),
    ):
        if given is None:
            raise ValueError(f"{op}: {other} needs {name}; got {name}=None")
        check_offsets(op, name, given, q)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"{op}: cu_seqlens_k must be [S + 1] = {tuple(cu_seqlens_q.shape)} like cu_seqlens_q; "
            f"got {tuple(cu_seqlens_k.shape)}"
        )
    if q.shape[0] != 1:
        raise ValueError(
            f"{op}: q must be [1, H, Tq, D] with cu_seqlens_q, all sequences one after another; "
            f"got {tuple(q.shape)}"
        )
    if rows is None and not checks.has_values(cu_seqlens_q):
        return _traced(cu_seqlens_q.to(q.device), cu_seqlens_k.to(q.device))
    if rows is not None and _is_exporting():
        raise NotImplementedError(
            f"{op}: rows is not supported with cu_seqlens_q under torch.export, which cannot read "
            "lengths; give the chosen queries as q, each sequence's last one at its last key, and "
            "their own cu_seqlens_q"
        )
    lengths_q = lengths(op, "cu_seqlens_q", cu_seqlens_q, q.shape[2], "q")
    lengths_k = lengths(op, "cu_seqlens_k", cu_seqlens_k, k.shape[2], "k")
    starts, counts = [0] * len(lengths_q), lengths_q
    index = None
    if rows is not None:
        chosen = _resolve_rows(op, rows, lengths_q)
        starts, counts = [a for a, _ in chosen], [b - a for a, b in chosen]
        begins = [
            a + start for a, start in zip(accumulate(lengths_q, initial=0), starts, strict=False)
        ]
        index = token_index(begins, counts).to(q.device)
        cu_seqlens_q = offsets_of(counts)
    first = [n - t + start for n, t, start in zip(lengths_k, lengths_q, starts, strict=True)]
    return Packing(
        cu_seqlens_q=cu_seqlens_q.to(q.device),
        cu_seqlens_k=cu_seqlens_k.to(q.device),
        query_starts=_int32(first).to(q.device),
        max_rows=max(counts, default=0),
        max_keys=max(lengths_k, default=0),
        index=index,
    )


def _is_exporting() -> bool:
    is_exporting = getattr(torch.compiler, "is_exporting", None)  # of torch 2.7 and newer
    return is_exporting is not None and bool(is_exporting())


def _traced(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Packing:
    """All rows, where values cannot be kept: the two lengths alone are read, unchecked."""
    lengths_q, lengths_k = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    longest = [
        checks.to_int(lengths.max().item()) if lengths.shape[0] > 0 else 0
        for lengths in (lengths_q, lengths_k)
    ]
    for length in longest:
        torch._check(length >= 0)  # a size, for the tracer
    max_rows, max_keys = longest
    starts = lengths_k - lengths_q
    return Packing(cu_seqlens_q, cu_seqlens_k, starts, max_rows, max_keys, index=None)


def check_offsets(
    op: str, name: str, offsets: Any, q: Tensor, what: str = "[S + 1]", least: int = 1
) -> None:
    """Check all but the values: int32, at least `least` of them, on the CPU or on q's device."""
    checks.check_tensor(op, name, offsets, f"None or an int32 tensor {what}")
    if offsets.dtype != torch.int32:
        raise TypeError(f"{op}: {name} must be int32; got {checks.dtype_name(offsets.dtype)}")
    if offsets.dim() != 1 or offsets.shape[0] < least:
        raise ValueError(f"{op}: {name} must be {what}; got {tuple(offsets.shape)}")
    if offsets.device.type != "cpu":
        checks.check_same_device(op, name, offsets, q, "q")


def lengths(op: str, name: str, offsets: Tensor, total: int, side: str) -> list[int]:
    """The length of each sequence, from offsets that are checked here."""
    bounds = offsets.tolist()
    if bounds[0] != 0:
        raise ValueError(f"{op}: {name} must start at 0; got {bounds[0]}")
    for i, (start, stop) in enumerate(pairwise(bounds)):
        if stop < start:
            raise ValueError(
                f"{op}: {name} must never decrease; got {stop} after {start} at index {i + 1}"
            )
    if bounds[-1] > total:
        raise ValueError(
            f"{op}: {name} must end at most at {total}, the tokens of {side}; got {bounds[-1]}"
        )
    return [stop - start for start, stop in pairwise(bounds)]


def _resolve_rows(op: str, rows: Any, lengths: list[int]) -> list[tuple[int, int]]:
    wanted = "None or a sequence of slices or (start, stop), one for each sequence"
    if not isinstance(rows, (tuple, list)):
        raise TypeError(
            f"{op}: rows must be {wanted}, with cu_seqlens_q; got {type(rows).__name__}"
        )
    if len(rows) != len(lengths):
        raise ValueError(
            f"{op}: rows must hold one slice or (start, stop) for each of S={len(lengths)} "
            f"sequences; got {len(rows)}"
        )
    return [
        checks.resolve_rows(op, chosen, length, f"rows[{i}]")
        for i, (chosen, length) in enumerate(zip(rows, lengths, strict=True))
    ]


def token_index(begins: Sequence[int], counts: Sequence[int]) -> Tensor:
    """[sum(counts)] int64: `counts[i]` tokens from `begins[i]` on, for one i after the other."""
    begin, count = (torch.tensor(x, dtype=torch.int64) for x in (begins, counts))
    shift = begin - (count.cumsum(0) - count)
    return torch.arange(sum(counts)) + shift.repeat_interleave(count)


def offsets_of(counts: Sequence[int]) -> Tensor:
    """[n + 1] int32."""
    return _int32(list(accumulate(counts, initial=0)))


def _int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
