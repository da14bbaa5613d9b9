"""Launches of `policy_divergence`, of the kernels of `policy` and `divergence`.

Rows are taken in chunks. A chunk's p and r are formed over all keys, by the same kernel, in scratch
of bounded size; ∂D/∂p replaces p there, and is the gradient that the kernels of `policy` continue.
A target has no r: the kernel of p reads it and writes ∂D/∂p.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ....runtime import triton_runtime
from ....runtime.triton_rows import constant
from ...divergence.arguments import KINDS
from ...divergence.triton.kernels import sweep
from ..arguments import PolicyDivergenceArgs
from ..chunks import Chunk, clear_packed
from . import parameters
from .bwd_launch import (
    Compared,
    Gradient,
    key_gradient,
    query_gradient,
    rows_of,
    sums,
    weights_gradient,
)
from .fwd_launch import over_keys, statistics
from .launch import NO_TARGET, Keys, Side, row_chunks, splits_of, weights_of_rows
from .side import SMALLEST_WEIGHT
from .target import policy_target_kernel


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

    def over_keys(
        self, keys: Keys, target: parameters.Target = NO_TARGET
    ) -> tuple[Tensor | None, Tensor]:
        """(what `over_keys` returns, what it writes)."""
        p = keys.scratch(self.side)
        return over_keys(self.side, keys, self.norm, self.z, p, target), p


@dataclass(frozen=True)
class Target:
    """An `AttentionTarget`, with its weight on the valid keys of each row."""

    values: Tensor  # float32 [B, G, N], or [B, G, K] with ids
    ids: Tensor | None  # int32 [B, G, K]
    index: Tensor  # int32 [B, T]
    z: Tensor  # [B, T]
    first_key: int = 0  # what ids call the first key of `part`

    def part(self, chunk: Chunk) -> Target:
        batch, rows, keys = chunk.batch, chunk.rows, chunk.keys
        return Target(
            self.values[batch] if self.ids is not None else self.values[batch, :, keys],
            None if self.ids is None else self.ids[batch],
            self.index[batch, rows],
            self.z[batch, rows],
            self.first_key + keys.start,
        )

    def parameters(self, keys: Keys, kind: str) -> parameters.Target:
        stride_b, stride_g, _ = self.values.stride()
        if keys.packing is not None:  # what a sequence's first key is multiplied by
            stride_b = 1 if self.ids is None else 0
        num_ids = 0 if self.ids is None else self.ids.shape[2]
        return parameters.Target(
            self.values, stride_b, stride_g, self.ids, num_ids, max(num_ids - 1, 0).bit_length(),
            self.first_key, keys.per_row(self.index), keys.per_row(self.z), None,
            constant(KINDS.index(kind)),
        )  # fmt: skip

    def measure(self, policy: Side, keys: Keys) -> None:
        """Write z: (11)."""
        batch_size, num_rows = self.z.shape
        tile = policy.tile("target")
        programs = keys.row_blocks(tile.block_q, batch_size)
        length = keys.seqlen_k if self.ids is None else self.ids.shape[2]
        splits, per_split = splits_of(programs, length, tile.block_k, self.z.device)
        # Zeros, because rows of no packed sequence are not written.
        partial = self.z.new_zeros((splits, batch_size, num_rows), dtype=torch.float64)
        triton_runtime.launch(
            policy_target_kernel,
            (programs * splits,),
            {
                "target": self.parameters(keys, KINDS[0]),
                "flags": keys.flags(None),
                "partial_ptr": partial,
                "samples": keys.samples(batch_size),
                "heads": parameters.Heads(1, 1, keys.seqlen_k),
                **policy.positions(keys),
                "per_split": per_split,
                "BLOCK_Q": tile.block_q,
                "BLOCK_K": tile.block_k,
                "EXCLUDE_SELF": keys.exclude_self,
            },
            tile.num_warps,
            tile.num_stages,
        )
        total = partial.sum(0)
        self.z.copy_(torch.where(total < SMALLEST_WEIGHT.value, 0.0, total))


@dataclass(frozen=True)
class Comparison:
    """A policy and its reference, and which keys count for them."""

    policy: Normalised
    reference: Normalised | Target
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
        for chunk in row_chunks(self.keys, side.batch_size, side.q.device):
            yield chunk, self.part(chunk)

    def measure_reference(self) -> None:
        """Write the statistics of the reference."""
        reference = self.reference
        if isinstance(reference, Target):
            reference.measure(self.policy.side, self.keys)
        else:
            statistics(reference.side, self.keys, reference.norm, reference.z)

    def sweep(self) -> tuple[Tensor, Gradient]:
        """D in pieces [pieces, B, T]: (1), and ∂D/∂p: (2)."""
        if isinstance(self.reference, Target):
            return self._sweep_with_target(self.reference)
        (_, p), (_, r) = (side.over_keys(self.keys) for side in (self.policy, self.reference))
        rows = p.shape[:2]
        dp = p.flatten(0, 1)  # in the place of p
        value_parts = sweep(
            dp, r.flatten(0, 1), self.kind, generalised=True, dp=dp, dr=None, ends=self.keys.ends()
        )
        return value_parts.unflatten(1, rows), self._gradient(p)

    def _sweep_with_target(self, target: Target) -> tuple[Tensor, Gradient]:
        value_parts, dp = self.policy.over_keys(self.keys, target.parameters(self.keys, self.kind))
        assert value_parts is not None
        # One piece: the kernel of the rows would add so many one after the other.
        return value_parts.sum(0, keepdim=True), self._gradient(dp)

    def _gradient(self, dp: Tensor) -> Gradient:
        return Gradient(self.policy.side, self.keys, self.policy.norm, dp)


def _comparison(
    args: PolicyDivergenceArgs, norm: Tensor, z: Tensor, ref_norm: Tensor, ref_z: Tensor
) -> Comparison:
    policy, keys = Normalised(Side.of(args.policy), norm, z), Keys.of(args.policy)
    values, index = args.target.values, args.target.index
    if values is not None and index is not None:
        target = Target(values, args.target.ids, index, ref_z)
        return Comparison(policy, target, keys, args.kind)
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
        head_weights=weights_of_rows(reference.head_weights, args.policy),
    )
    return Comparison(policy, Normalised(side, ref_norm, ref_z), keys, args.kind)


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
    whole.measure_reference()
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
        given_z = part.policy.z
        rows_of(given.side, part.keys, u_parts, w_parts, given_z, compared, wants_gradient=False)


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
    dhead_weights: Tensor | None,
) -> None:
    """Write the gradients of q, k and, where given, head_weights."""
    clear_packed(args.policy, dq, dk)
    whole = _comparison(args, norm, z, ref_norm, ref_z)
    _gradients(whole, (u, w), dvalue, None, dq, dk, dhead_weights)


def loss(
    args: PolicyDivergenceArgs,
    weights: Tensor,
    ref_norm: Tensor,
    ref_z: Tensor,
    normalised: bool,
    value: Tensor,
    dq: Tensor,
    dk: Tensor,
    dhead_weights: Tensor | None,
) -> None:
    """Write the divergence of each row, and the gradients of its sum weighted by `weights`."""
    policy = args.policy
    clear_packed(policy, value, dq, dk)
    norm = value.new_empty((2, policy.batch_size, policy.num_heads, policy.num_rows))
    z = torch.empty_like(value)
    whole = _comparison(args, norm, z, ref_norm, ref_z)
    statistics(whole.policy.side, whole.keys, norm, z)
    if not normalised:
        whole.measure_reference()
    _gradients(whole, None, weights, value, dq, dk, dhead_weights)


def _gradients(
    whole: Comparison,
    u_w: tuple[Tensor, Tensor] | None,
    weight: Tensor,
    value: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dhead_weights: Tensor | None,
) -> None:
    """Write dq and dk, and what else is given; U and W are formed where they are not given."""
    delta: Tensor | None = None  # of all rows, 0 for those that see no key
    if dhead_weights is not None:
        delta = whole.policy.norm.new_zeros(whole.policy.norm.shape[1:])
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
        per_row = rows_of(  # (4), (6)
            given.side, part.keys, u_parts, w_parts, part.policy.z, compared
        )
        assert per_row is not None
        if delta is not None:
            delta[batch, :, rows] = per_row.delta
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
    if delta is not None and dhead_weights is not None:
        weights_gradient(whole.keys, delta, dhead_weights)  # (12)
