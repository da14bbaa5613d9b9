"""Reference backend of `policy_divergence`: plain PyTorch, with the backward written out by hand.

Variables carry the names of README.md, whose equations the comments cite. Rows are taken in chunks,
so that no tensor has a heads x T x N extent. Both policies go through the same functions in the
same order, on copies of the same layout: equal inputs give equal bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ral_kernels.ops.attention.reference import full_precision
from ral_kernels.ops.divergence.reference import generalised

from .divergence_arguments import PolicyDivergenceArgs
from .reference import (
    as_computed,
    attend,
    compute_dtype,
    mean_over_valid,
    per_kv_head,
    per_query_head,
    row_chunks,
    score_gradient,
    valid_keys,
    visible_keys,
)


def available() -> str | None:
    return None


def can_run(args: PolicyDivergenceArgs) -> str | None:
    return None


def _policy_keys(args: PolicyDivergenceArgs) -> Tensor:
    """The policy's keys as float, one head per query head."""
    policy = args.policy
    return as_computed(per_query_head(policy.k, policy.num_heads), compute_dtype(policy.q))


def _reference_keys(args: PolicyDivergenceArgs) -> Tensor:
    """The snapshot's keys as float, one head per query head."""
    reference = args.reference
    k = reference.k
    if reference.k_prefix is not None:
        assert reference.prefix_index is not None
        k = torch.cat([reference.k_prefix[reference.prefix_index], k], dim=2)
    return as_computed(per_query_head(k, reference.num_heads), compute_dtype(args.policy.q))


def _reference_rows(
    args: PolicyDivergenceArgs, k: Tensor, rows: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """r [B, R, N], its norm [2, B, Hr, R] and Z [B, R]."""
    reference = args.reference
    visible = visible_keys(args.policy, rows, reference.window_left, reference.window_right)
    q = as_computed(reference.q[:, :, rows], compute_dtype(args.policy.q))
    p_h, norm, _ = attend(q, k, visible, reference.scale, reference.softcap, None)
    r, z = mean_over_valid(p_h, valid_keys(args.policy, rows, visible))
    return r, norm, z


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
    with full_precision(args.policy.q):
        _fwd(args, value, norm, z, ref_norm, ref_z, u, w)


def _fwd(
    args: PolicyDivergenceArgs,
    value: Tensor,
    norm: Tensor,
    z: Tensor,
    ref_norm: Tensor,
    ref_z: Tensor,
    u: Tensor,
    w: Tensor,
) -> None:
    policy = args.policy
    k, reference_k = _policy_keys(args), _reference_keys(args)
    for rows in row_chunks(policy.num_rows):
        visible = visible_keys(policy, rows, policy.window_left, policy.window_right)
        valid = valid_keys(policy, rows, visible)
        q = as_computed(policy.q[:, :, rows], compute_dtype(policy.q))
        p_h, norm[:, :, :, rows], _ = attend(q, k, visible, policy.scale, policy.softcap, None)
        p, z[:, rows] = mean_over_valid(p_h, valid)
        r, ref_norm[:, :, :, rows], ref_z[:, rows] = _reference_rows(args, reference_k, rows)

        terms, dp = generalised(p, r, args.kind)  # (1), (2)
        nowhere = (z[:, rows] == 0) | (ref_z[:, rows] == 0)
        value[:, rows] = terms.sum(-1).masked_fill(nowhere, 0.0)
        constant = nowhere | value[:, rows].isinf()
        dp = dp.masked_fill(constant[..., None], 0.0)
        on_valid = torch.where(valid[:, None], p_h, 0.0)
        u[:, :, rows] = (on_valid * dp[:, None]).sum(-1)  # (3)
        w[:, :, rows] = on_valid.sum(-1)  # (3)


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
    dspan_bias: Tensor | None,
) -> None:
    """Write the gradients of q and k. `dspan_bias` is None: there are no spans here."""
    assert dspan_bias is None
    with full_precision(args.policy.q):
        _bwd(args, z, ref_z, u, w, dvalue, dq, dk)


def _bwd(
    args: PolicyDivergenceArgs,
    z: Tensor,
    ref_z: Tensor,
    u: Tensor,
    w: Tensor,
    dvalue: Tensor,
    dq: Tensor,
    dk: Tensor,
) -> None:
    policy = args.policy
    k, reference_k = _policy_keys(args), _reference_keys(args)
    dk_h = torch.zeros_like(k)
    for rows in row_chunks(policy.num_rows):
        visible = visible_keys(policy, rows, policy.window_left, policy.window_right)
        valid = valid_keys(policy, rows, visible)
        q = as_computed(policy.q[:, :, rows], compute_dtype(policy.q))
        p_h, _, dcap = attend(q, k, visible, policy.scale, policy.softcap, None)
        p, _ = mean_over_valid(p_h, valid)
        r, _, _ = _reference_rows(args, reference_k, rows)
        terms, dp = generalised(p, r, args.kind)  # (2)
        constant = (z[:, rows] == 0) | (ref_z[:, rows] == 0) | terms.sum(-1).isinf()
        weight = dvalue[:, rows].masked_fill(constant, 0.0)[:, None, :, None]
        dp = dp.masked_fill(constant[..., None], 0.0)

        norm = torch.where(z[:, rows] == 0, 1.0, z[:, rows])[:, None] * policy.num_heads
        c = (u[:, :, rows] / norm).sum(1, keepdim=True)  # (4)
        delta = (u[:, :, rows] - c * w[:, :, rows]) / norm  # (6)
        g = score_gradient(p_h, valid, z[:, rows], dp[:, None] - c[..., None])  # (5)
        ds = weight * (g - p_h * delta[..., None])  # (7)
        if dcap is not None:
            ds = ds * dcap  # (8)
        dq[:, :, rows] = ds @ k * policy.scale  # (9)
        dk_h += ds.transpose(-1, -2) @ q
    dk[:] = per_kv_head(dk_h, policy.num_kv_heads) * policy.scale  # (10)


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
    """Write the divergence of each row, and the gradients of its sum weighted by `weights`.

    `normalised` says that `ref_norm` and `ref_z` are right already; here they are written again.
    """
    policy = args.policy
    per_head = (policy.batch_size, policy.num_heads, policy.num_rows)
    norm, u, w = (value.new_empty(shape) for shape in ((2, *per_head), per_head, per_head))
    z = torch.empty_like(value)
    if normalised:  # inputs of an op are not to be written to
        ref_norm, ref_z = torch.empty_like(ref_norm), torch.empty_like(ref_z)
    fwd(args, value, norm, z, ref_norm, ref_z, u, w)
    bwd(args, norm, z, ref_norm, ref_z, u, w, weights, dq, dk, None)
