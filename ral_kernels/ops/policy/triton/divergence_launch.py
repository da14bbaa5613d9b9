"""Launches of `policy_divergence`, of the kernels of `policy` and `divergence`.

Rows are taken in chunks. A chunk's p and r are formed over all keys, by the same kernel, in scratch
of bounded size; ∂D/∂p replaces p there, and is the gradient that the kernels of `policy` continue.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...divergence.triton.kernels import sweep
from ..arguments import PolicyDivergenceArgs
from ..chunks import Chunk, clear_packed
from .bwd_launch import Compared, Gradient, key_gradient, query_gradient, rows_of, sums
from .fwd_launch import over_keys, statistics
from .launch import Keys, Side, row_chunks


@dataclass(frozen=True)
class Normalised:
    """A policy with the statistics of its rows."""

    side: Side
    norm: Tensor  # [2, B, H, T]
    z: Tensor  # [B, T]

    def part(self, chunk: Chunk) -> Normalised:
        batch, rows = chunk.batch, chunk.rows
        side = self.side.part(chunk)
        return Normalised(side, self.norm[:, batch, :, rows], self.z[batch, rows])

    def over_keys(self, keys: Keys) -> Tensor:
        """p or r, [B, T, N], without numbers beyond the keys of a packed row."""
        shape = (self.side.batch_size, keys.num_rows, keys.seqlen_k)
        p = self.z.new_empty(shape)
        over_keys(self.side, keys, self.norm, self.z, p)
        return p


@dataclass(frozen=True)
class Comparison:
    """Both policies, and which keys count for them."""

    policy: Normalised
    reference: Normalised
    keys: Keys
    kind: str

    def part(self, chunk: Chunk) -> Comparison:
        return replace(
            self,
            policy=self.policy.part(chunk),
            reference=self.reference.part(chunk),
            keys=self.keys.part(chunk),
        )

    def chunks(self) -> Iterator[tuple[Chunk, Comparison]]:
        side = self.policy.side
        block_q = side.tile("heads").block_q
        for chunk in row_chunks(self.keys, side.batch_size, block_q, side.q.device):
            yield chunk, self.part(chunk)

    def sweep(self) -> tuple[Tensor, Gradient]:
        """D in pieces [pieces, B, T]: (1), and ∂D/∂p: (2)."""
        p, r = self.policy.over_keys(self.keys), self.reference.over_keys(self.keys)
        rows = p.shape[:2]
        dp = p.flatten(0, 1)  # in the place of p
        value_parts = sweep(
            dp, r.flatten(0, 1), self.kind, generalised=True, dp=dp, dr=None, ends=self.keys.ends()
        )
        gradient = Gradient(self.policy.side, self.keys, self.policy.norm, p)
        return value_parts.unflatten(1, rows), gradient


def _comparison(
    args: PolicyDivergenceArgs, norm: Tensor, z: Tensor, ref_norm: Tensor, ref_z: Tensor
) -> Comparison:
    reference = args.reference
    assert reference.q is not None and reference.k is not None
    side = Side(
        reference.q,
        reference.k,
        reference.scale,
        reference.window_left,
        reference.window_right,
        reference.softcap,
        k_prefix=reference.k_prefix,
        prefix_index=reference.prefix_index,
    )
    policy = Normalised(Side.of(args.policy), norm, z)
    return Comparison(policy, Normalised(side, ref_norm, ref_z), Keys.of(args.policy), args.kind)


def fwd(
    args: PolicyDivergenceArgs,
    value: Tensor,
    norm: Tensor,
    z: Tensor,
    ref_norm: Tensor,
    ref_z: Tensor,
    u: Tensor,
    w: Tensor,
) -> None:
    """Write the divergence of each row and the statistics that the backward starts from."""
    clear_packed(args.policy, value, u, w)
    whole = _comparison(args, norm, z, ref_norm, ref_z)
    statistics(whole.policy.side, whole.keys, norm, z)
    statistics(whole.reference.side, whole.keys, ref_norm, ref_z)
    for chunk, part in whole.chunks():
        batch, rows = chunk.batch, chunk.rows
        value_parts, given = part.sweep()
        compared = Compared(
            part.reference.z,
            value_parts,
            value=value[batch, rows],
            u=u[batch, :, rows],
            w=w[batch, :, rows],
        )
        u_parts, w_parts = sums(given, part.policy.z)  # (3)
        rows_of(part.keys, u_parts, w_parts, part.policy.z, compared, wants_gradient=False)


def bwd(
    args: PolicyDivergenceArgs,
    norm: Tensor,
    z: Tensor,
    ref_norm: Tensor,
    ref_z: Tensor,
    u: Tensor,
    w: Tensor,
    dvalue: Tensor,
    dq: Tensor,
    dk: Tensor,
) -> None:
    """Write the gradients of q and k."""
    clear_packed(args.policy, dq, dk)
    whole = _comparison(args, norm, z, ref_norm, ref_z)
    _gradients(whole, (u, w), dvalue, None, dq, dk)


def loss(
    args: PolicyDivergenceArgs,
    weights: Tensor,
    ref_norm: Tensor,
    ref_z: Tensor,
    normalised: bool,
    value: Tensor,
    dq: Tensor,
    dk: Tensor,
) -> None:
    """Write the divergence of each row, and the gradients of its sum weighted by `weights`."""
    policy = args.policy
    clear_packed(policy, value, dq, dk)
    norm = value.new_empty((2, policy.batch_size, policy.num_heads, policy.num_rows))
    z = torch.empty_like(value)
    whole = _comparison(args, norm, z, ref_norm, ref_z)
    statistics(whole.policy.side, whole.keys, norm, z)
    if not normalised:
        statistics(whole.reference.side, whole.keys, ref_norm, ref_z)
    _gradients(whole, None, weights, value, dq, dk)


def _gradients(
    whole: Comparison,
    u_w: tuple[Tensor, Tensor] | None,
    weight: Tensor,
    value: Tensor | None,
    dq: Tensor,
    dk: Tensor,
) -> None:
    """Write dq and dk, and `value` where given; U and W are formed where they are not given."""
    so_far: Tensor | None = None  # dk of the earlier rows of a sample
    for chunk, part in whole.chunks():
        batch, rows = chunk.batch, chunk.rows
        value_parts, given = part.sweep()
        if u_w is None:
            u_parts, w_parts = sums(given, part.policy.z)  # (3)
        else:
            u_parts, w_parts = (x[None, batch, :, rows] for x in u_w)
        compared = Compared(
            part.reference.z,
            value_parts,
            weight=weight[batch, rows],
            value=None if value is None else value[batch, rows],
        )
        per_row = rows_of(part.keys, u_parts, w_parts, part.policy.z, compared)  # (4), (6)
        assert per_row is not None
        query_gradient(given, per_row, dq[batch, :, rows])  # (9)
        target = dk[batch, :, chunk.keys]
        if chunk.is_first:
            so_far = None
        if not chunk.is_last:  # more rows of this sample follow
            target = so_far if so_far is not None else target.new_empty(
                target.shape, dtype=torch.float32
            )  # fmt: skip
        key_gradient(given, per_row, so_far, target)  # (10)
        so_far = target
