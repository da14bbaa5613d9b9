"""Reference backend of `policy` and `policy_divergence`, with backwards written out by hand.

Variables carry the names of README.md and divergence.md, whose equations the comments cite. It
works on chunks of rows, so the largest tensor is [B, H, chunk, N]. It computes in float32, or in
float64 for float64 inputs, and runs on every device. Packed sequences run one after another, each
on its own slices of all tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

import torch
from torch import Tensor

from ...runtime.backends import DifferentiableBackend
from ..divergence.reference import generalised
from ..qkv import full_precision
from .arguments import (
    LossOutputs,
    PolicyArgs,
    PolicyDivergenceArgs,
    PolicyDivergenceGradients,
    PolicyDivergenceOutputs,
    PolicyGradients,
    PolicyOutputs,
    TargetArgs,
)

ROWS_PER_CHUNK = 64
LOG2_E = 1.4426950408889634
SMALLEST_WEIGHT = 2.0**-100  # of all heads together on the valid keys; less counts as 0
NORMALISED_WITHIN = 2.0**-20  # a target whose valid weights sum to 1 up to this is taken as it is


def _packed_sequences(args: PolicyArgs) -> Iterator[tuple[slice, slice, slice, PolicyArgs]]:
    """Each sequence that has rows and keys, these, and the call that it would be alone."""
    assert args.cu_seqlens_q is not None and args.cu_seqlens_k is not None
    assert args.query_starts is not None
    weights = args.head_weights
    bounds_q, bounds_k = args.cu_seqlens_q.tolist(), args.cu_seqlens_k.tolist()
    for i, query_start in enumerate(args.query_starts.tolist()):
        rows, keys = slice(*bounds_q[i : i + 2]), slice(*bounds_k[i : i + 2])
        sequence = slice(i, i + 1)
        if rows.start == rows.stop or keys.start == keys.stop:
            continue
        yield (
            sequence,
            rows,
            keys,
            replace(
                args,
                q=args.q[:, :, rows],
                k=args.k[:, :, keys],
                span_ids=None if args.span_ids is None else args.span_ids[..., keys],
                span_bias=None if args.span_bias is None else args.span_bias[:, :, rows],
                head_weights=None if weights is None else weights[sequence],
                scope=None if args.scope is None else args.scope[:, keys],
                cu_seqlens_q=None,
                cu_seqlens_k=None,
                query_starts=None,
                query_start=query_start,
                max_rows=0,
                max_keys=0,
            ),
        )


def _packed_comparisons(
    args: PolicyDivergenceArgs,
) -> Iterator[tuple[slice, slice, slice, PolicyDivergenceArgs]]:
    weights = args.reference.head_weights
    for sequence, rows, keys, policy in _packed_sequences(args.policy):
        reference, target = args.reference, args.target
        if reference.q is not None and reference.k is not None:
            reference = replace(
                reference,
                q=reference.q[:, :, rows],
                k=reference.k[:, :, keys],
                head_weights=None if weights is None else weights[sequence],
            )
        else:
            target = _target_of_sequence(target, rows, keys)
        yield sequence, rows, keys, replace(args, policy=policy, reference=reference, target=target)


def _target_of_sequence(target: TargetArgs, rows: slice, keys: slice) -> TargetArgs:
    """The targets of some rows over some keys, which are numbered from 0."""
    values, ids, index = target.values, target.ids, target.index
    assert values is not None and index is not None
    if ids is None:
        return TargetArgs(values[..., keys], None, index[:, rows])
    own = (ids >= keys.start) & (ids < keys.stop)
    return TargetArgs(values, torch.where(own, ids - keys.start, -1), index[:, rows])


def _zero(*tensors: Tensor | None) -> None:
    """What no sequence writes stays 0."""
    for x in tensors:
        if x is not None:
            x.zero_()


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _as_computed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A fresh contiguous copy in `dtype`.

    It always copies, because how a BLAS rounds may depend on strides and alignment. Equal policies
    must come out equal bit for bit, whatever views their inputs are.
    """
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _row_chunks(num_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, ROWS_PER_CHUNK):
        yield slice(start, min(start + ROWS_PER_CHUNK, num_rows))


def _keys(args: PolicyArgs, k: Tensor, num_heads: int) -> Tensor:
    """k as float, one head per query head. Padding keys are 0, because 0 * NaN is NaN."""
    if args.key_padding_mask is not None:
        k = k.masked_fill(~args.key_padding_mask[:, None, :, None], 0.0)
    k = k.repeat_interleave(num_heads // k.shape[1], dim=1)
    return _as_computed(k, _compute_dtype(args.q))


def _per_kv_head(dk: Tensor, num_kv_heads: int) -> Tensor:
    """The adjoint: [B, H, ...] -> [B, Hk, ...], summing the heads that share a kv head."""
    group = dk.shape[1] // num_kv_heads
    return dk if group == 1 else dk.unflatten(1, (-1, group)).sum(2)


def _visible_keys(args: PolicyArgs, rows: slice, window_left: int, window_right: int) -> Tensor:
    """True where a row of the chunk sees a key, [B or 1, R, N]."""
    device = args.q.device
    d = args.query_start + torch.arange(rows.start, rows.stop, device=device)[:, None]
    j = torch.arange(args.seqlen_k, device=device)
    visible = torch.ones(d.shape[0], args.seqlen_k, dtype=torch.bool, device=device)
    if window_left >= 0:
        visible = visible & (j >= d - window_left)
    if window_right >= 0:
        visible = visible & (j <= d + window_right)
    visible = visible[None]
    if args.key_padding_mask is not None:
        visible = visible & args.key_padding_mask[:, None, :]
    return visible


def _valid_keys(args: PolicyArgs, rows: slice, visible: Tensor) -> Tensor:
    """True on the keys that a row's policy is over, [B or 1, R, N]."""
    valid = visible
    if args.scope is not None:
        valid = valid & args.scope[:, None, :]
    if args.exclude_self:
        device = args.q.device
        d = args.query_start + torch.arange(rows.start, rows.stop, device=device)[:, None]
        valid = valid & (torch.arange(args.seqlen_k, device=device) != d)
    return valid


def _attend(
    q: Tensor,
    k: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float,
    bias: Tensor | None,
    head_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Equations (1) to (4): w P [B, H, R, N], norm [2, B, H, R], the soft cap's slope (None: 1).

    `q` and `k` come from `_as_computed`, k with one head per query head.
    """
    s = q @ k.transpose(-1, -2) * scale  # (1)
    dcap = None
    if softcap != 0.0:
        squashed = torch.tanh(s / softcap)
        s, dcap = squashed * softcap, 1 - squashed * squashed  # (1)
    if bias is not None:
        s = s + bias  # (2)
    s = s.masked_fill(~visible[:, None], float("-inf"))  # (2)
    # The stabiliser of a fully masked row is 0: exp(-inf - 0) is 0, but -inf - (-inf) is NaN.
    # Weights are formed from the row maximum, not from lse, which is rounded at large scores.
    stabiliser = s.amax(-1, keepdim=True)
    stabiliser = torch.where(stabiliser == float("-inf"), 0.0, stabiliser)
    p_h = torch.exp(s - stabiliser)
    normaliser = p_h.sum(-1, keepdim=True)
    inverse = torch.where(normaliser == 0, 0.0, 1 / normaliser)  # (3)
    if head_weights is not None:
        inverse = inverse * head_weights[:, :, None, None]  # of (5)
    p_h = p_h * inverse  # (4)
    norm = torch.stack([stabiliser * LOG2_E, inverse]).squeeze(-1)
    return p_h, norm, dcap


def _mean_over_valid(p_h: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Equations (5) to (7) of w P: p [B, R, N] and Z [B, R], with rows of 0 where Z = 0."""
    mean = torch.where(valid, p_h.mean(1), 0.0)  # (5)
    z = mean.sum(-1)  # (6)
    z = torch.where(z * p_h.shape[1] < SMALLEST_WEIGHT, 0.0, z)
    mean = torch.where((z == 0)[..., None], 0.0, mean)
    return mean / torch.where(z == 0, 1.0, z)[..., None], z  # (7)


def _score_gradient(p_h: Tensor, valid: Tensor, z: Tensor, centred: Tensor) -> Tensor:
    """w P G = w P (dp - c) / (Z H) on valid keys, else 0: (10), from w P and `centred` = dp - c.

    A weight of exactly 0 gives 0, whatever dp is there. z is as `fwd` wrote it: 0 where it counts
    as 0 (SMALLEST_WEIGHT).
    """
    z = torch.where(z == 0, 1.0, z)[:, None, :, None]
    share = torch.where(valid[:, None], p_h / z / p_h.shape[1], 0.0)
    return torch.where(share == 0, 0.0, share * centred)


def _per_weight(x: Tensor, head_weights: Tensor | None) -> Tensor:
    """x / w of [B, H, R], 0 where w = 0: from a sum over w P_h the sum over P_h, as in (11)."""
    if head_weights is None:
        return x
    w = head_weights[:, :, None]
    return torch.where(w == 0, 0.0, x / w)


def _span_index(args: PolicyArgs) -> Tensor:
    """The span of each key as [B or 1, N], with S for "no span"."""
    assert args.span_ids is not None
    ids = args.span_ids.long()
    ids = torch.where(ids >= 0, ids, args.num_spans)
    return ids if ids.dim() == 2 else ids[None]


def _one_hot(args: PolicyArgs, dtype: torch.dtype) -> Tensor:
    """E, [B or 1, N, S]. A matmul with it, unlike `scatter_add_`, adds in a fixed order on CUDA."""
    spans = torch.arange(args.num_spans, device=args.q.device)
    return (_span_index(args)[..., None] == spans).to(dtype)


def _to_keys(args: PolicyArgs, per_span: Tensor) -> Tensor:
    """x Eᵀ: the value of each key's span, [B, ..., S] -> [B, ..., N]; 0 for keys in no span."""
    padded = torch.cat([per_span, per_span.new_zeros(*per_span.shape[:-1], 1)], dim=-1)
    index = _span_index(args)
    while index.dim() < per_span.dim():
        index = index.unsqueeze(1)
    return padded.gather(-1, index.expand(*per_span.shape[:-1], index.shape[-1]))


class TorchPolicy(DifferentiableBackend[PolicyArgs, PolicyOutputs, PolicyGradients]):
    """PyTorch in float32, or float64 for float64 inputs."""

    def fwd(self, args: PolicyArgs, outputs: PolicyOutputs) -> None:
        with full_precision(args.q):
            _policy_fwd(args, outputs)

    def bwd(self, args: PolicyArgs, outputs: PolicyOutputs, gradients: PolicyGradients) -> None:
        with full_precision(args.q):
            _policy_bwd(args, outputs, gradients)


def _outputs_of(args: PolicyArgs, outputs: PolicyOutputs, rows: slice) -> PolicyOutputs:
    """The outputs of one packed sequence, over its own keys."""
    p = outputs.p[:, rows]
    return PolicyOutputs(
        p if args.span_ids is not None else p[..., : args.seqlen_k],
        outputs.norm[..., rows],
        outputs.z[:, rows],
    )


def _policy_fwd(args: PolicyArgs, outputs: PolicyOutputs) -> None:
    if args.is_packed:
        _zero(outputs.p, outputs.norm, outputs.z)
        for _, rows, _, own in _packed_sequences(args):
            _policy_fwd(own, _outputs_of(own, outputs, rows))
        return
    dtype = _compute_dtype(args.q)
    k = _keys(args, args.k, args.num_heads)
    one_hot = None if args.span_ids is None else _one_hot(args, dtype)
    for rows in _row_chunks(args.num_rows):
        visible = _visible_keys(args, rows, args.window_left, args.window_right)
        bias = None if args.span_bias is None else _to_keys(args, args.span_bias[:, :, rows])
        q = _as_computed(args.q[:, :, rows], dtype)
        p_h, norm, _ = _attend(q, k, visible, args.scale, args.softcap, bias, args.head_weights)
        p_keys, z = _mean_over_valid(p_h, _valid_keys(args, rows, visible))
        outputs.norm[:, :, :, rows], outputs.z[:, rows] = norm, z
        outputs.p[:, rows] = p_keys if one_hot is None else p_keys @ one_hot  # (8)


def _policy_bwd(args: PolicyArgs, outputs: PolicyOutputs, gradients: PolicyGradients) -> None:
    if args.is_packed:
        dspan_bias, dhead_weights = gradients.dspan_bias, gradients.dhead_weights
        _zero(gradients.dq, gradients.dk, dspan_bias, dhead_weights)
        for sequence, rows, keys, own in _packed_sequences(args):
            own_outputs = _outputs_of(own, outputs, rows)
            own_gradients = PolicyGradients(
                dp=gradients.dp[:, rows, : own_outputs.p.shape[-1]],
                dq=gradients.dq[:, :, rows],
                dk=gradients.dk[:, :, keys],
                dspan_bias=None if dspan_bias is None else dspan_bias[:, :, rows],
                dhead_weights=None if dhead_weights is None else dhead_weights[sequence],
            )
            _policy_bwd(own, own_outputs, own_gradients)
        return
    dtype = _compute_dtype(args.q)
    k = _keys(args, args.k, args.num_heads)
    dk_h = torch.zeros_like(k)
    one_hot = None if args.span_ids is None else _one_hot(args, dtype)
    _zero(gradients.dhead_weights)
    for rows in _row_chunks(args.num_rows):
        visible = _visible_keys(args, rows, args.window_left, args.window_right)
        valid = _valid_keys(args, rows, visible)
        bias = None if args.span_bias is None else _to_keys(args, args.span_bias[:, :, rows])
        q = _as_computed(args.q[:, :, rows], dtype)
        p_h, _, dcap = _attend(q, k, visible, args.scale, args.softcap, bias, args.head_weights)

        # Outcomes of probability 0 are constants, and so is every outcome of a row with Z = 0.
        p, z = outputs.p[:, rows], outputs.z[:, rows]
        dp = torch.where(p == 0, 0.0, gradients.dp[:, rows])
        c = (p * dp).sum(-1, keepdim=True)  # (9)
        if one_hot is not None:
            dp = _to_keys(args, dp)
        centred = torch.where(z[..., None] == 0, 0.0, dp - c)[:, None]
        ds = _score_gradient(p_h, valid, z, centred)  # (10)
        delta = _per_weight(ds.sum(-1), args.head_weights)  # (11)
        ds = ds - p_h * delta[..., None]  # (12)
        if gradients.dhead_weights is not None:
            gradients.dhead_weights += delta.sum(-1)  # (17)
        if gradients.dspan_bias is not None:
            assert one_hot is not None
            gradients.dspan_bias[:, :, rows] = ds @ one_hot[:, None]  # (13)
        if dcap is not None:
            ds = ds * dcap  # (14)
        gradients.dq[:, :, rows] = ds @ k * args.scale  # (15)
        dk_h += ds.transpose(-1, -2) @ q
    gradients.dk[:] = _per_kv_head(dk_h, args.num_kv_heads) * args.scale  # (16)


class TorchPolicyDivergence(
    DifferentiableBackend[PolicyDivergenceArgs, PolicyDivergenceOutputs, PolicyDivergenceGradients]
):
    """PyTorch in float32, or float64 for float64 inputs (equations: divergence.md)."""

    def fwd(self, args: PolicyDivergenceArgs, outputs: PolicyDivergenceOutputs) -> None:
        with full_precision(args.policy.q):
            _divergence_fwd(args, outputs)

    def bwd(
        self,
        args: PolicyDivergenceArgs,
        outputs: PolicyDivergenceOutputs,
        gradients: PolicyDivergenceGradients,
    ) -> None:
        with full_precision(args.policy.q):
            _divergence_bwd(args, outputs, gradients)

    def loss(
        self, args: PolicyDivergenceArgs, weights: Tensor, normalised: bool, outputs: LossOutputs
    ) -> None:
        """Write the results. `normalised` saves no work, because `fwd` forms all statistics."""
        policy, value = args.policy, outputs.value
        norm, z = outputs.reference_norm, outputs.reference_z
        if normalised:  # they are inputs of the op, which it must not write to
            norm, z = torch.empty_like(norm), torch.empty_like(z)
        per_head = (policy.batch_size, policy.num_heads, policy.num_rows)
        statistics = PolicyDivergenceOutputs(
            value=value,
            norm=value.new_empty((2, *per_head)),
            z=torch.empty_like(value),
            reference_norm=norm,
            reference_z=z,
            u=value.new_empty(per_head),
            w=value.new_empty(per_head),
        )
        self.fwd(args, statistics)
        gradients = PolicyDivergenceGradients(
            weights, outputs.dq, outputs.dk, outputs.dhead_weights
        )
        self.bwd(args, statistics, gradients)


def _policy_keys(args: PolicyDivergenceArgs) -> Tensor:
    """The policy's keys as float, one head per query head."""
    return _keys(args.policy, args.policy.k, args.policy.num_heads)


def _reference_keys(args: PolicyDivergenceArgs) -> Tensor | None:
    """The snapshot's keys as float, one head per query head; None with a target."""
    reference = args.reference
    k = reference.k
    if k is None:
        return None
    if reference.k_prefix is not None:
        assert reference.prefix_index is not None
        k = torch.cat([reference.k_prefix[reference.prefix_index], k], dim=2)
    return _keys(args.policy, k, reference.num_heads)


def _reference_rows(
    args: PolicyDivergenceArgs, k: Tensor | None, rows: slice, valid: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """r [B, R, N], its norm [2, B, Hr, R] (None with a target) and Z [B, R].

    `valid` are the keys that the policy of each row is over.
    """
    reference = args.reference
    if k is None or reference.q is None:
        r, z = renormalised(args.target, rows, valid, args.policy.seqlen_k)
        return r, None, z
    visible = _visible_keys(args.policy, rows, reference.window_left, reference.window_right)
    q = _as_computed(reference.q[:, :, rows], _compute_dtype(args.policy.q))
    p_h, norm, _ = _attend(
        q, k, visible, reference.scale, reference.softcap, None, reference.head_weights
    )
    r, z = _mean_over_valid(p_h, _valid_keys(args.policy, rows, visible))
    return r, norm, z


def renormalised(
    target: TargetArgs, rows: slice, valid: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """Equation (11): each row's target over its valid outcomes, [B, R, length], and their sum Z.

    Rows without a target, or without weight on valid outcomes, are 0.
    """
    v = target_weights(target, rows, valid, length)
    return divided(v, v.sum(-1))


def target_weights(target: TargetArgs, rows: slice, valid: Tensor, length: int) -> Tensor:
    """v of each row on its valid outcomes, 0 elsewhere: [B, R, length]."""
    assert target.values is not None and target.index is not None
    index = target.index[:, rows].long()
    number = index.clamp_min(0)[..., None]
    v = target.values.gather(1, number.expand(-1, -1, target.length))
    if target.ids is not None:
        ids = target.ids.long().gather(1, number.expand(-1, -1, target.length))
        places = torch.where(ids >= 0, ids, length)
        v = v.new_zeros(*v.shape[:2], length + 1).scatter(-1, places, v)[..., :length]
    return torch.where(valid & (index >= 0)[..., None], v, 0.0)


def divided(v: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Equation (11): v by the sum z of its row, and z, which is 0 where it counts as 0."""
    z = torch.where(z < SMALLEST_WEIGHT, 0.0, z)
    v = torch.where((z == 0)[..., None], 0.0, v)
    # Weights that are a policy already, up to rounding, are not rounded again: equal policies then
    # have a gradient of exactly 0.
    divisor = torch.where((z == 0) | ((z - 1).abs() <= NORMALISED_WITHIN), 1.0, z)
    return v / divisor[..., None], z  # (11)


def _divergence_outputs_of(
    outputs: PolicyDivergenceOutputs, rows: slice
) -> PolicyDivergenceOutputs:
    """The outputs of one packed sequence: rows are the last dimension of each."""
    return PolicyDivergenceOutputs(*(getattr(outputs, x.name)[..., rows] for x in fields(outputs)))


def _divergence_fwd(args: PolicyDivergenceArgs, outputs: PolicyDivergenceOutputs) -> None:
    policy = args.policy
    if policy.is_packed:
        _zero(*(getattr(outputs, x.name) for x in fields(outputs)))
        for _, rows, _, own in _packed_comparisons(args):
            _divergence_fwd(own, _divergence_outputs_of(outputs, rows))
        return
    k, reference_k = _policy_keys(args), _reference_keys(args)
    for rows in _row_chunks(policy.num_rows):
        visible = _visible_keys(policy, rows, policy.window_left, policy.window_right)
        valid = _valid_keys(policy, rows, visible)
        q = _as_computed(policy.q[:, :, rows], _compute_dtype(policy.q))
        p_h, norm, _ = _attend(
            q, k, visible, policy.scale, policy.softcap, None, policy.head_weights
        )
        p, z = _mean_over_valid(p_h, valid)
        r, reference_norm, reference_z = _reference_rows(args, reference_k, rows, valid)

        terms, dp = generalised(p, r, args.kind)  # (1), (2)
        nowhere = (z == 0) | (reference_z == 0)
        value = terms.sum(-1).masked_fill(nowhere, 0.0)
        constant = nowhere | value.isinf()
        dp = dp.masked_fill(constant[..., None], 0.0)
        on_valid = torch.where(valid[:, None], p_h, 0.0)
        outputs.value[:, rows] = value
        outputs.norm[:, :, :, rows], outputs.z[:, rows] = norm, z
        if reference_norm is not None:
            outputs.reference_norm[:, :, :, rows] = reference_norm
        outputs.reference_z[:, rows] = reference_z
        outputs.u[:, :, rows] = (on_valid * dp[:, None]).sum(-1)  # (3)
        outputs.w[:, :, rows] = on_valid.sum(-1)  # (3)


def _divergence_bwd(
    args: PolicyDivergenceArgs,
    outputs: PolicyDivergenceOutputs,
    gradients: PolicyDivergenceGradients,
) -> None:
    policy = args.policy
    if policy.is_packed:
        dhead_weights = gradients.dhead_weights
        _zero(gradients.dq, gradients.dk, dhead_weights)
        for sequence, rows, keys, own in _packed_comparisons(args):
            own_gradients = PolicyDivergenceGradients(
                gradients.dvalue[:, rows],
                gradients.dq[:, :, rows],
                gradients.dk[:, :, keys],
                None if dhead_weights is None else dhead_weights[sequence],
            )
            _divergence_bwd(own, _divergence_outputs_of(outputs, rows), own_gradients)
        return
    k, reference_k = _policy_keys(args), _reference_keys(args)
    dk_h = torch.zeros_like(k)
    _zero(gradients.dhead_weights)
    for rows in _row_chunks(policy.num_rows):
        visible = _visible_keys(policy, rows, policy.window_left, policy.window_right)
        valid = _valid_keys(policy, rows, visible)
        q = _as_computed(policy.q[:, :, rows], _compute_dtype(policy.q))
        p_h, _, dcap = _attend(
            q, k, visible, policy.scale, policy.softcap, None, policy.head_weights
        )
        p, _ = _mean_over_valid(p_h, valid)
        r, _, _ = _reference_rows(args, reference_k, rows, valid)
        terms, dp = generalised(p, r, args.kind)  # (2)
        z, reference_z = outputs.z[:, rows], outputs.reference_z[:, rows]
        constant = (z == 0) | (reference_z == 0) | terms.sum(-1).isinf()
        weight = gradients.dvalue[:, rows].masked_fill(constant, 0.0)[:, None, :, None]
        dp = dp.masked_fill(constant[..., None], 0.0)

        u, w = outputs.u[:, :, rows], outputs.w[:, :, rows]
        norm = torch.where(z == 0, 1.0, z)[:, None] * policy.num_heads
        c = (u / norm).sum(1, keepdim=True)  # (4)
        delta = _per_weight((u - c * w) / norm, policy.head_weights)  # (6)
        if gradients.dhead_weights is not None:
            gradients.dhead_weights += (weight[..., 0] * delta).sum(-1)  # (12)
        g = _score_gradient(p_h, valid, z, dp[:, None] - c[..., None])  # (5)
        ds = weight * (g - p_h * delta[..., None])  # (7)
        if dcap is not None:
            ds = ds * dcap  # (8)
        gradients.dq[:, :, rows] = ds @ k * policy.scale  # (9)
        dk_h += ds.transpose(-1, -2) @ q
    gradients.dk[:] = _per_kv_head(dk_h, policy.num_kv_heads) * policy.scale  # (10)
