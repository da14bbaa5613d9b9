"""Reference backend of `policy`: plain PyTorch, with the backward written out by hand.

Variables carry the names of README.md, whose equations the comments cite. Rows are taken in chunks,
so that only [B, H, chunk, N] is ever formed; everything is computed in float32 (float64 for float64
inputs). It runs on every device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ral_kernels.ops.attention.reference import full_precision

from .arguments import PolicyArgs

ROWS_PER_CHUNK = 64
LOG2_E = 1.4426950408889634
SMALLEST_WEIGHT = 2.0**-100  # of all heads on the valid keys; less counts as none


def available() -> str | None:
    return None


def can_run(args: PolicyArgs) -> str | None:
    return None


def compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def as_computed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A fresh contiguous copy in `dtype`.

    Always a copy: how a BLAS rounds may depend on strides and on alignment, and two policies that
    are equal have to come out equal bit for bit, whatever views their inputs are.
    """
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


def row_chunks(num_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, ROWS_PER_CHUNK):
        yield slice(start, min(start + ROWS_PER_CHUNK, num_rows))


def per_query_head(k: Tensor, num_heads: int) -> Tensor:
    """[B, Hk, ...] -> [B, H, ...]: query head h reads kv head h // (H / Hk)."""
    group = num_heads // k.shape[1]
    return k if group == 1 else k.repeat_interleave(group, dim=1)


def per_kv_head(dk: Tensor, num_kv_heads: int) -> Tensor:
    """The adjoint: [B, H, ...] -> [B, Hk, ...], summing the heads that share a kv head."""
    group = dk.shape[1] // num_kv_heads
    return dk if group == 1 else dk.unflatten(1, (-1, group)).sum(2)


def visible_keys(args: PolicyArgs, rows: slice, window_left: int, window_right: int) -> Tensor:
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


def valid_keys(args: PolicyArgs, rows: slice, visible: Tensor) -> Tensor:
    """True on the keys that a row's policy is over, [B or 1, R, N]."""
    valid = visible
    if args.scope is not None:
        valid = valid & args.scope[:, None, :]
    if args.exclude_self:
        device = args.q.device
        d = args.query_start + torch.arange(rows.start, rows.stop, device=device)[:, None]
        valid = valid & (torch.arange(args.seqlen_k, device=device) != d)
    return valid


def attend(
    q: Tensor, k: Tensor, visible: Tensor, scale: float, softcap: float, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Equations (1) to (4): P [B, H, R, N], norm [2, B, H, R], the soft cap's slope (None: 1).

    `q` and `k` come from `as_computed`, k with one head per query head.
    """
    s = q @ k.transpose(-1, -2) * scale  # (1)
    dcap = None
    if softcap != 0.0:
        squashed = torch.tanh(s / softcap)
        s, dcap = squashed * softcap, 1 - squashed * squashed  # (1)
    if bias is not None:
        s = s + bias  # (2)
    s = s.masked_fill(~visible[:, None], float("-inf"))  # (2)
    # The stabiliser of a fully masked row is 0, so that exp(-inf - 0) = 0 where -inf - (-inf) is
    # NaN. Weights are formed from the row maximum, not from lse, which is rounded at large scores.
    stabiliser = s.amax(-1, keepdim=True)
    stabiliser = torch.where(stabiliser == float("-inf"), 0.0, stabiliser)
    p_h = torch.exp(s - stabiliser)
    normaliser = p_h.sum(-1, keepdim=True)
    inverse = torch.where(normaliser == 0, 0.0, 1 / normaliser)  # (3)
    p_h = p_h * inverse  # (4)
    norm = torch.stack([stabiliser * LOG2_E, inverse]).squeeze(-1)
    return p_h, norm, dcap


def mean_over_valid(p_h: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Equations (5) to (7): p [B, R, N] and Z [B, R], with rows of 0 where Z = 0."""
    mean = torch.where(valid, p_h.mean(1), 0.0)  # (5)
    z = mean.sum(-1)  # (6)
    z = torch.where(z * p_h.shape[1] < SMALLEST_WEIGHT, 0.0, z)
    mean = torch.where((z == 0)[..., None], 0.0, mean)
    return mean / torch.where(z == 0, 1.0, z)[..., None], z  # (7)


def score_gradient(p_h: Tensor, valid: Tensor, z: Tensor, centred: Tensor) -> Tensor:
    """P G = P (dp - c) / (Z H) on valid keys and 0 elsewhere, (10), from `centred` = dp - c.

    A weight of exactly 0 is left out, whatever dp is there. z is as `fwd` wrote it, 0 where
    it is below SMALLEST_WEIGHT.
    """
    z = torch.where(z == 0, 1.0, z)[:, None, :, None]
    share = torch.where(valid[:, None], p_h / z / p_h.shape[1], 0.0)
    return torch.where(share == 0, 0.0, share * centred)


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


def fwd(args: PolicyArgs, p: Tensor, norm: Tensor, z: Tensor) -> None:
    """Write `p`, `norm` and `z`."""
    with full_precision(args.q):
        _fwd(args, p, norm, z)


def _fwd(args: PolicyArgs, p: Tensor, norm: Tensor, z: Tensor) -> None:
    dtype = compute_dtype(args.q)
    k = as_computed(per_query_head(args.k, args.num_heads), dtype)
    one_hot = None if args.span_ids is None else _one_hot(args, dtype)
    for rows in row_chunks(args.num_rows):
        visible = visible_keys(args, rows, args.window_left, args.window_right)
        bias = None if args.span_bias is None else _to_keys(args, args.span_bias[:, :, rows])
        q = as_computed(args.q[:, :, rows], dtype)
        p_h, norm[:, :, :, rows], _ = attend(q, k, visible, args.scale, args.softcap, bias)
        p_keys, z[:, rows] = mean_over_valid(p_h, valid_keys(args, rows, visible))
        p[:, rows] = p_keys if one_hot is None else p_keys @ one_hot  # (8)


def bwd(
    args: PolicyArgs,
    p: Tensor,
    norm: Tensor,
    z: Tensor,
    dp: Tensor,
    dq: Tensor,
    dk: Tensor,
    dspan_bias: Tensor | None,
) -> None:
    """Write the gradients of q, k and, if wanted, span_bias."""
    with full_precision(args.q):
        _bwd(args, p, z, dp, dq, dk, dspan_bias)


def _bwd(
    args: PolicyArgs,
    p: Tensor,
    z: Tensor,
    dp: Tensor,
    dq: Tensor,
    dk: Tensor,
    dspan_bias: Tensor | None,
) -> None:
    dtype = compute_dtype(args.q)
    k = as_computed(per_query_head(args.k, args.num_heads), dtype)
    dk_h = torch.zeros_like(k)
    one_hot = None if args.span_ids is None else _one_hot(args, dtype)
    for rows in row_chunks(args.num_rows):
        visible = visible_keys(args, rows, args.window_left, args.window_right)
        valid = valid_keys(args, rows, visible)
        bias = None if args.span_bias is None else _to_keys(args, args.span_bias[:, :, rows])
        q = as_computed(args.q[:, :, rows], dtype)
        p_h, _, dcap = attend(q, k, visible, args.scale, args.softcap, bias)

        # Outcomes of probability 0 are constants, and so is every outcome of a row with Z = 0.
        dp_rows = torch.where(p[:, rows] == 0, 0.0, dp[:, rows])
        c = (p[:, rows] * dp_rows).sum(-1, keepdim=True)  # (9)
        if one_hot is not None:
            dp_rows = _to_keys(args, dp_rows)
        centred = torch.where(z[:, rows, None] == 0, 0.0, dp_rows - c)[:, None]
        ds = score_gradient(p_h, valid, z[:, rows], centred)  # (10)
        ds = ds - p_h * ds.sum(-1, keepdim=True)  # (11), (12)
        if dspan_bias is not None:
            assert one_hot is not None
            dspan_bias[:, :, rows] = ds @ one_hot[:, None]  # (13)
        if dcap is not None:
            ds = ds * dcap  # (14)
        dq[:, :, rows] = ds @ k * args.scale  # (15)
        dk_h += ds.transpose(-1, -2) @ q
    dk[:] = per_kv_head(dk_h, args.num_kv_heads) * args.scale  # (16)
