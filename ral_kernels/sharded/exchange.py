"""Collectives of `ShardedPolicy`, with their gradients: plain torch.distributed.

The convention of all of them: every rank forms the same loss and calls backward on it once. A rank
then receives the whole loss's gradient of its own q and k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layout import Range, overlaps


class Exchange:
    """Every rank receives the positions that it asks for, in ascending order.

    Args:
        chunks: positions that each rank holds, in its order.
        needs: disjoint ascending ranges of positions that each rank asks for.
        rank, group: this rank in its group.
    """

    def __init__(
        self,
        chunks: Sequence[Sequence[Range]],
        needs: Sequence[Sequence[Range]],
        rank: int,
        group: Any,
    ) -> None:
        self.group = group
        # By rank, then in the order in which the sender holds them: slices of x, of the result.
        self.sent = [
            [place(each, chunks[rank]) for each in overlaps(chunks[rank], ranges)]
            for ranges in needs
        ]
        self.received = [
            [place(each, needs[rank]) for each in overlaps(each_chunks, needs[rank])]
            for each_chunks in chunks
        ]

    def __call__(self, x: Tensor) -> Tensor:
        """[B, H, L, D], this rank's positions -> [B, H, n, D], those it asks for; differentiable.

        The backward sums what ranks return in float32 (float64 for float64), in their order.
        """
        result: Tensor = _Exchanged.apply(x, self)
        return result

    def forward(self, x: Tensor) -> Tensor:
        got = self._swap(x, self.sent, self.received)
        slices = [each for of_rank in self.received for each in of_rank]
        if slices != sorted(slices):
            ordered = torch.empty_like(got)
            for (start, stop), piece in zip(slices, got.split(_lengths(slices)), strict=True):
                ordered[start:stop] = piece
            got = ordered
        return got.movedim(0, 2)

    def backward(self, grad: Tensor, length: int) -> Tensor:
        got = self._swap(grad, self.received, self.sent)
        dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
        total = got.new_zeros((length, *got.shape[1:]), dtype=dtype)
        slices = [each for of_rank in self.sent for each in of_rank]
        for (start, stop), piece in zip(slices, got.split(_lengths(slices)), strict=True):
            total[start:stop] += piece
        return total.to(grad.dtype).movedim(0, 2)

    def _swap(self, x: Tensor, sent: list[list[Range]], received: list[list[Range]]) -> Tensor:
        """Slices of x's positions to every rank, for as many from it as `received` says."""
        x = x.movedim(2, 0)
        slices = [x[start:stop] for of_rank in sent for start, stop in of_rank]
        outgoing = torch.cat(slices) if slices else x[:0].contiguous()
        counts = [sum(_lengths(of_rank)) for of_rank in received]
        incoming = x.new_empty((sum(counts), *x.shape[1:]))
        dist.all_to_all_single(
            incoming, outgoing, counts, [sum(_lengths(each)) for each in sent], group=self.group
        )
        return incoming


def place(positions: Range, ranges: Sequence[Range]) -> Range:
    """Where positions that one of `ranges` holds lie in the concatenation of `ranges`."""
    before = 0
    for start, stop in ranges:
        if start <= positions[0] and positions[1] <= stop:
            return before + positions[0] - start, before + positions[1] - start
        before += stop - start
    raise AssertionError(f"{positions} are in none of {ranges}")


def cut(x: Tensor, ranges: Sequence[Range], dim: int) -> Tensor:
    """These ranges of x along `dim`, one after another; a view if they are one."""
    parts = [x.narrow(dim, start, stop - start) for start, stop in ranges or [(0, 0)]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _lengths(slices: list[Range]) -> list[int]:
    return [stop - start for start, stop in slices]


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange, ctx.length = exchange, x.shape[2]
        return exchange.forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.backward(grad, ctx.length), None


def gather(x: Tensor, group: Any) -> Tensor:
    """[W, ...], every rank's `x` in the order of ranks; the shape is the same on every rank."""
    parts = x.new_empty((dist.get_world_size(group), *x.shape))
    dist.all_gather(list(parts.unbind()), x.contiguous(), group=group)
    return parts


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return gather(x, group).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None  # see the head of this module: every rank adds its own part


def sum_over_ranks(x: Tensor, group: Any) -> Tensor:
    """The sum of every rank's `x`, the same bits on every rank; a rank's gradient is its own."""
    result: Tensor = _Summed.apply(x, group)
    return result
