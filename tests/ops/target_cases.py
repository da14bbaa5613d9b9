"""Targets for the tests of `policy_divergence`, and their rows in eager PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

import ral_kernels as rk
from tests.ops.packed_cases import PackedInputs
from tests.ops.policy_cases import PolicyInputs
from tests.ops.policy_eager import valid_keys

FORMS = ("shared", "indexed", "sparse", "scaled")


def target_of(form: str, inputs: PolicyInputs, seed: int = 3) -> rk.AttentionTarget:
    """A target of the rows of `inputs`.

    "shared": one of all rows, positive everywhere. "indexed": several, some rows without one.
    "sparse": several of a few keys each, in no order, with gaps; one of keys that may be hidden
    from every row, one without keys. "scaled": sums far from 1, zeros, rows in steps of an index.
    """
    generator = torch.Generator().manual_seed(seed)
    batch_size, seqlen_k = inputs.q.shape[0], inputs.k.shape[2]
    num_rows = num_rows_of(inputs)
    if form == "shared":
        values = torch.rand(batch_size, 1, seqlen_k, generator=generator) + 0.1
        return rk.AttentionTarget(values)
    num_targets = 4
    index = torch.randint(-1, num_targets, (batch_size, num_rows), generator=generator)
    if form == "sparse":
        length = max(min(9, seqlen_k - 2), 1)
        noise = torch.rand(batch_size, num_targets, seqlen_k, generator=generator)
        ids = noise.argsort(-1)[..., :length]
        ids[..., 0, :] = torch.where(ids[..., 0, :] == seqlen_k - 1, seqlen_k - 1, -1)
        ids[..., 1, :] = -1
        ids[..., length // 2 : length // 2 + 1] = -1
        values = torch.rand(ids.shape, generator=generator) + 0.1
        return rk.AttentionTarget(values, ids, index=index)
    values = torch.rand(batch_size, num_targets, seqlen_k, generator=generator) + 0.1
    if form == "scaled":
        values = values * torch.tensor([1e-20, 1.0, 1e6, 1e20])[:, None]
        values[torch.rand(values.shape, generator=generator) < 0.7] = 0.0
        index = index.sort(-1).values
    return rk.AttentionTarget(values, index=index)


def num_rows_of(inputs: PolicyInputs) -> int:
    if not isinstance(inputs, PackedInputs):
        return len(range(inputs.q.shape[2])[inputs.rows])
    if "rows" not in inputs.options:
        return inputs.q.shape[2]
    return sum(len(range(x.q.shape[2])[x.rows]) for x in inputs.sequences())


def dense(target: rk.AttentionTarget, length: int) -> Tensor:
    """[B, G, N], the weights of all keys."""
    if target.ids is None:
        return target.values
    padded = target.values.new_zeros(*target.values.shape[:2], length + 1)
    places = torch.where(target.ids >= 0, target.ids, length).long()
    return padded.scatter(-1, places, target.values)[..., :length]


def rows_of(target: rk.AttentionTarget, inputs: PolicyInputs, dtype: torch.dtype) -> Tensor:
    """The target of each row on its valid keys, renormalised, [B, T, N]; packed [1, T, max N_i]."""
    weights = dense(target, inputs.k.shape[2]).to(dtype)
    index = target.index
    if isinstance(inputs, PackedInputs):
        found, key, row = [], 0, 0
        for i, own in enumerate(inputs.sequences()):
            keys, rows = slice(key, key + own.k.shape[2]), slice(row, row + num_rows_of(own))
            if index is None:
                number = i if target.num_targets > 1 else 0
                chosen = torch.full((1, rows.stop - rows.start), number)
            else:
                chosen = index[:, rows]
            found.append(_chosen(weights[..., keys], chosen, valid_keys(own)))
            key, row = keys.stop, rows.stop
        return inputs.join(found).to(dtype)
    shape = (inputs.q.shape[0], num_rows_of(inputs))
    chosen = torch.zeros(shape, dtype=torch.int64) if index is None else index
    return _chosen(weights, chosen, valid_keys(inputs))


def _chosen(weights: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    number = index.long().clamp_min(0)[..., None].expand(-1, -1, weights.shape[2])
    v = weights.gather(1, number) * (valid & (index >= 0)[..., None])
    z = v.sum(-1, keepdim=True)
    return v / torch.where(z == 0, 1.0, z)
