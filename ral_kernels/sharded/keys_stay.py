"""The form of `ShardedPolicy` in which keys stay: queries of the rows and sums move instead.

Each rank has the chosen rows' queries and its own keys. It forms its keys' part of every row's
sums; ranks add them in their order. Names and numbers of equations are those of
`../ops/policy/README.md` and `../ops/policy/divergence.md`. It is plain PyTorch over chunks of
rows, in float32 (float64 for float64 inputs). The largest tensor is [B, H, chunk, L] for the L keys
of the rank, of at most 64 MiB unless one row needs more.

A policy and its reference go through the same operations in the same order. So an unchanged policy
has a divergence, and gradients, of exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.divergence.reference import generalised
from ..ops.policy.arguments import TargetArgs
from ..ops.policy.reference import SMALLEST_WEIGHT, divided, target_weights
from ..ops.qkv import full_precision
from .exchange import gather

_ELEMENTS = 1 << 24  # of a tensor of scores


@dataclass(frozen=True)
class Side:
    """A policy: queries of all T rows, and this rank's keys.

    q: [B, H, T, D]; k: [B, Hk, L, D]. window_left: -1 = all of the sequence; softcap: 0 = off.
    head_weights: [B, H, T], with mean 1 over the heads, or None.
    """

    q: Tensor
    k: Tensor
    scale: float
    window_left: int
    softcap: float
    head_weights: Tensor | None

    @property
    def learned(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What has gradients."""
        return self.q, self.k, self.head_weights

    def detached(self) -> Side:
        weights = None if self.head_weights is None else self.head_weights.detach()
        return replace(self, q=self.q.detach(), k=self.k.detach(), head_weights=weights)


@dataclass(frozen=True)
class Places:
    """Where rows and this rank's keys are, and which keys count; the same for both sides.

    rows, starts: int64 [T], a row's position and that of its sequence's first key.
    keys: int64 [L]. padding: bool [B, L] or None, scope: bool [B or 1, L] or None.
    spans: int64 [B or 1, L], with `num_spans` for keys in none; None without spans.
    """

    rows: Tensor
    starts: Tensor
    keys: Tensor
    padding: Tensor | None
    scope: Tensor | None
    exclude_self: bool
    spans: Tensor | None
    num_spans: int
    group: Any

    def visible(self, rows: slice, window_left: int) -> Tensor:
        """[B or 1, R, L]"""
        own = self.rows[rows, None]
        seen = (self.keys >= self.starts[rows, None]) & (self.keys <= own)
        if window_left >= 0:
            seen = seen & (self.keys >= own - window_left)
        return seen[None] if self.padding is None else seen & self.padding[:, None]

    def valid(self, rows: slice, visible: Tensor) -> Tensor:
        """[B or 1, R, L]"""
        if self.scope is not None:
            visible = visible & self.scope[:, None]
        return visible & (self.keys != self.rows[rows, None]) if self.exclude_self else visible


@dataclass(frozen=True)
class Statistics:
    """Of all ranks together: stabiliser and w/normaliser [B, H, T], W [B, H, T], Z [B, T]."""

    stabiliser: Tensor
    inverse: Tensor
    w: Tensor
    z: Tensor

    def at(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        return self.stabiliser[:, :, rows, None], self.inverse[:, :, rows, None], self.z[:, rows]


class _Computed:
    """A side in the dtype of the computation, over chunks of rows."""

    def __init__(self, side: Side, places: Places) -> None:
        self.side, self.places = side, places
        dtype = torch.float64 if side.q.dtype == torch.float64 else torch.float32
        k = side.k
        if places.padding is not None:  # 0 * NaN is NaN
            k = k.masked_fill(~places.padding[:, None, :, None], 0.0)
        # A fresh copy: how a BLAS rounds may depend on strides, and equal policies must be equal.
        self.k = k.to(dtype, copy=True, memory_format=torch.contiguous_format)
        self.q = side.q.to(dtype, copy=True, memory_format=torch.contiguous_format)
        self.statistics = self._find_statistics()

    def chunks(self) -> Iterator[slice]:
        batch_size, num_heads, num_rows, _ = self.q.shape
        step = max(1, _ELEMENTS // max(1, batch_size * num_heads * self.k.shape[2]))
        for start in range(0, num_rows, step):
            yield slice(start, min(start + step, num_rows))

    def grouped(self, rows: slice) -> Tensor:
        """Queries as [B, Hk, H/Hk R, D]: the heads of a kv head follow one another."""
        return self.per_kv_head(self.q[:, :, rows])

    def per_kv_head(self, x: Tensor) -> Tensor:
        """[B, H, R, ...] -> [B, Hk, H/Hk R, ...]"""
        num_kv_heads = self.k.shape[1]
        stacked = x.shape[1] // num_kv_heads * x.shape[2]
        return x.reshape(x.shape[0], num_kv_heads, stacked, x.shape[3])

    def scores(self, rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """(1), (2): scores [B, H, R, L], visible keys, and the slope of the soft cap (None: 1)."""
        s = self.grouped(rows) @ self.k.transpose(-1, -2) * self.side.scale
        s = s.view(*self.q.shape[:2], rows.stop - rows.start, s.shape[3])
        slope = None
        if self.side.softcap != 0.0:
            squashed = torch.tanh(s / self.side.softcap)
            s, slope = squashed * self.side.softcap, 1 - squashed * squashed
        visible = self.places.visible(rows, self.side.window_left)
        return s.masked_fill(~visible[:, None], float("-inf")), visible, slope

    def _find_statistics(self) -> Statistics:
        parts = []
        for rows in self.chunks():
            s, visible, _ = self.scores(rows)
            top = _largest(s)
            e = torch.exp(s - _stabiliser(top)[..., None])
            on_valid = torch.where(self.places.valid(rows, visible)[:, None], e, 0.0)
            parts.append(torch.stack([top, e.sum(-1), on_valid.sum(-1)]))
        shape = (3, *self.q.shape[:2], 0)
        local = torch.cat(parts, dim=-1) if parts else self.q.new_empty(shape)
        tops, sums, weights = gather(local, self.places.group).unbind(1)  # each [W, B, H, T]
        stabiliser = _stabiliser(tops.amax(0))
        factors = torch.exp(tops - stabiliser)
        total = (sums * factors).sum(0)
        inverse = torch.where(total == 0, 0.0, 1 / total)  # (3)
        if self.side.head_weights is not None:
            inverse = inverse * self.side.head_weights  # of (5)
        w = (weights * factors).sum(0) * inverse
        z = w.mean(1)  # (6)
        z = torch.where(z * w.shape[1] < SMALLEST_WEIGHT, 0.0, z)
        return Statistics(stabiliser, inverse, w, z)

    @property
    def z(self) -> Tensor:
        return self.statistics.z

    def distribution(self, rows: slice) -> Tensor:
        """p over this rank's keys, [B, R, L]."""
        return self.policy(rows)[0]

    def policy(self, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """p over this rank's keys [B, R, L], w P [B, H, R, L], valid keys, the soft cap's slope."""
        s, visible, slope = self.scores(rows)
        stabiliser, inverse, z = self.statistics.at(rows)
        p_h = torch.exp(s - stabiliser) * inverse  # (4)
        valid = self.places.valid(rows, visible)
        none = (z == 0)[..., None]
        mean = torch.where(valid & ~none, p_h.mean(1), 0.0)  # (5)
        return mean / torch.where(none, 1.0, z[..., None]), p_h, valid, slope  # (7)

    def per_weight(self, x: Tensor) -> Tensor:
        """x / w of [B, H, T], 0 where w = 0: from a sum over w P_h the sum over P_h, as in (11)."""
        w = self.side.head_weights
        return x if w is None else torch.where(w == 0, 0.0, x / w)

    def weight_gradient(self, delta: Tensor) -> Tensor | None:
        """(17) of each row: [B, H, T], on the first rank, as ranks' gradients are added."""
        if self.side.head_weights is None:
            return None
        first = dist.get_rank(self.places.group) == 0
        return delta if first else torch.zeros_like(delta)

    def gradients(
        self,
        derivative: Callable[[slice, Tensor], Tensor],
        c: Tensor,
        delta: Tensor,
        out: tuple[Tensor, Tensor],
    ) -> None:
        """dq of this rank's keys, and dk, for the derivative by p of the rows in a slice.

        Args:
            c: [B, T]; delta: [B, H, T], of the README's (9) and (11), over all ranks.
            out: where to write; dq [B, H, T, D] and dk [B, Hk, L, D].
        """
        dq, dk = out
        total = torch.zeros_like(self.k)
        for rows in self.chunks():
            p, p_h, valid, slope = self.policy(rows)
            ds = self.score_gradient(rows, p_h, valid, derivative(rows, p) - c[:, rows, None])
            ds = ds - p_h * delta[:, :, rows, None]  # (12)
            if slope is not None:
                ds = ds * slope  # (14)
            ds = self.per_kv_head(ds)
            own = ds @ self.k * self.side.scale  # (15)
            dq[:, :, rows] = own.view(dq[:, :, rows].shape)
            total += ds.transpose(-1, -2) @ self.grouped(rows)
        dk.copy_(total * self.side.scale)  # (16)

    def score_gradient(self, rows: slice, p_h: Tensor, valid: Tensor, centred: Tensor) -> Tensor:
        """w P G, (10), [B, H, R, L]; a weight of exactly 0 gives 0, whatever the derivative is."""
        z = self.statistics.z[:, rows, None]
        centred = torch.where(z == 0, 0.0, centred / torch.where(z == 0, 1.0, z))
        share = torch.where(valid[:, None], p_h, 0.0)
        return torch.where(share == 0, 0.0, share * centred[:, None]) / p_h.shape[1]


class _Restricted:
    """Rows' targets over this rank's keys, restricted to the valid keys of the policy's rows."""

    def __init__(self, target: TargetArgs, policy: _Computed) -> None:
        self.target, self.policy = target, policy
        parts = [self._weights(rows).sum(-1) for rows in policy.chunks()]
        self.sums = gather(torch.cat(parts, dim=1), policy.places.group).sum(0)
        self.z = divided(self.sums[..., None], self.sums)[1]

    def distribution(self, rows: slice) -> Tensor:
        """r over this rank's keys, [B, R, L]: (11)."""
        return divided(self._weights(rows), self.sums[:, rows])[0]

    def _weights(self, rows: slice) -> Tensor:
        places, side = self.policy.places, self.policy.side
        valid = places.valid(rows, places.visible(rows, side.window_left))
        return target_weights(self.target, rows, valid, side.k.shape[2])


def _largest(s: Tensor) -> Tensor:
    """The largest score of each row; -inf where a rank has no keys."""
    return s.amax(-1) if s.shape[-1] > 0 else s.new_full(s.shape[:-1], float("-inf"))


def _stabiliser(top: Tensor) -> Tensor:
    return torch.where(top == float("-inf"), 0.0, top)


class _Divergence(torch.autograd.Function):
    """What a side has gradients of -> D [B, T], over the keys of all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        head_weights: Tensor | None,
        side: Side,
        reference: Side | TargetArgs,
        places: Places,
        kind: str,
    ) -> Tensor:
        with full_precision(q):
            ours = _Computed(side, places)
            theirs: _Computed | _Restricted
            if isinstance(reference, Side):
                theirs = _Computed(reference, places)
            else:
                theirs = _Restricted(reference, ours)
            values, sums = [], []
            for rows in ours.chunks():
                p, p_h, valid, _ = ours.policy(rows)
                terms, dp = generalised(p, theirs.distribution(rows), kind)  # (1), (2)
                on_valid = torch.where(valid[:, None] & (p_h != 0), p_h * dp[:, None], 0.0)
                values.append(terms.sum(-1))
                sums.append(on_valid.sum(-1))  # (3)
            local = torch.cat([torch.cat(values, -1)[:, None], torch.cat(sums, -1)], dim=1)
            value, u = gather(local, places.group).sum(0).split([1, local.shape[1] - 1], dim=1)
        nowhere = (ours.z == 0) | (theirs.z == 0)
        value = value[:, 0].masked_fill(nowhere, 0.0)
        ctx.constant = nowhere | value.isinf()
        ctx.sides, ctx.kind, ctx.u = (ours, theirs), kind, u
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dvalue: Tensor) -> tuple[Tensor | None, ...]:
        ours, theirs = ctx.sides
        weight = dvalue.masked_fill(ctx.constant, 0.0)
        z = torch.where(ours.statistics.z == 0, 1.0, ours.statistics.z)
        u = torch.where(ctx.constant[:, None], 0.0, ctx.u)
        z_h = z[:, None] * u.shape[1]
        c = (u / z_h).sum(1)  # (4)
        delta = ours.per_weight((u - c[:, None] * ours.statistics.w) / z_h)  # (6)
        delta = delta * weight[:, None]

        def derivative(rows: slice, p: Tensor) -> Tensor:
            _, dp = generalised(p, theirs.distribution(rows), ctx.kind)
            dp = dp.masked_fill(ctx.constant[:, rows, None], 0.0)
            return dp * weight[:, rows, None]

        out = torch.empty_like(ours.side.q), torch.empty_like(ours.side.k)
        with full_precision(ours.q):
            ours.gradients(derivative, c * weight, delta, out)
        return *out, ours.weight_gradient(delta), None, None, None, None


def divergence(side: Side, reference: Side | TargetArgs, places: Places, kind: str) -> Tensor:
    """D [B, T] of all rows, the same on every rank; differentiable in what the side has.

    Args:
        reference: another policy, or targets over this rank's keys for all rows.
    """
    result: Tensor = _Divergence.apply(*side.learned, side.detached(), reference, places, kind)
    return result


class _SpanPolicy(torch.autograd.Function):
    """What a side has gradients of -> p [B, T, S], over the keys of all ranks."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, head_weights: Tensor | None, side: Side, places: Places
    ) -> Tensor:
        with full_precision(q):
            ours = _Computed(side, places)
            one_hot = _one_hot(places, ours.k.dtype)
            parts = [ours.policy(rows)[0] @ one_hot for rows in ours.chunks()]  # (8)
            p = gather(torch.cat(parts, dim=1), places.group).sum(0)
        ctx.ours = ours
        ctx.save_for_backward(p)
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dp: Tensor) -> tuple[Tensor | None, ...]:
        ours, (p,) = ctx.ours, ctx.saved_tensors
        places = ours.places
        dp = torch.where(p == 0, 0.0, dp)
        c = (p * dp).sum(-1)  # (9)
        padded = torch.nn.functional.pad(dp, (0, 1))  # keys in no span: 0

        def derivative(rows: slice, _: Tensor) -> Tensor:
            chosen = padded[:, rows]
            index = places.spans[:, None].expand(*chosen.shape[:2], -1)
            return chosen.gather(-1, index)

        with full_precision(ours.q):
            parts = []
            for rows in ours.chunks():
                p_keys, p_h, valid, _ = ours.policy(rows)
                centred = derivative(rows, p_keys) - c[:, rows, None]
                parts.append(ours.score_gradient(rows, p_h, valid, centred).sum(-1))
            delta = gather(torch.cat(parts, dim=-1), places.group).sum(0)
            delta = ours.per_weight(delta)  # (11)
            out = torch.empty_like(ours.side.q), torch.empty_like(ours.side.k)
            ours.gradients(derivative, c, delta, out)
        return *out, ours.weight_gradient(delta), None, None


def _one_hot(places: Places, dtype: torch.dtype) -> Tensor:
    """E, [B or 1, L, S]. A matmul with it adds in a fixed order on CUDA, too."""
    assert places.spans is not None
    spans = torch.arange(places.num_spans, device=places.spans.device)
    return (places.spans[..., None] == spans).to(dtype)


def span_policy(side: Side, places: Places) -> Tensor:
    """p [B, T, S] of all rows, the same on every rank; differentiable in what the side has."""
    result: Tensor = _SpanPolicy.apply(*side.learned, side.detached(), places)
    return result
