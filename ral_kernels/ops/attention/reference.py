"""Reference backend of `attention`: plain PyTorch, with the backward written out by hand.

Variables carry the names of README.md, whose equations the comments cite. It computes in float32,
or in float64 for float64 inputs, and forms whole [T, N] matrices. It explains the other backends
and proves them; it is not meant for training. It runs on every device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...runtime.backends import DifferentiableBackend
from ..qkv import full_precision
from .arguments import AttentionArgs, AttentionGradients, AttentionOutputs


@dataclass(frozen=True)
class _Sequence:
    """Where one (batch of) sequences lies: all of a dense call, or one sequence of a packed one."""

    q: slice
    k: slice
    rows: slice  # queries with marginals, counted from q.start
    marginals: slice  # the same, counted in the marginals tensor


def _sequences(args: AttentionArgs) -> Iterator[_Sequence]:
    if args.cu_seqlens_q is None or args.cu_seqlens_k is None:
        bounds_q, bounds_k = [0, args.seqlen_q], [0, args.seqlen_k]
    else:
        bounds_q, bounds_k = args.cu_seqlens_q.tolist(), args.cu_seqlens_k.tolist()
    for i in range(len(bounds_q) - 1):
        start = min(max(bounds_q[i], args.row_start), bounds_q[i + 1])
        stop = max(min(bounds_q[i + 1], args.row_stop), start)
        yield _Sequence(
            q=slice(bounds_q[i], bounds_q[i + 1]),
            k=slice(bounds_k[i], bounds_k[i + 1]),
            rows=slice(start - bounds_q[i], stop - bounds_q[i]),
            marginals=slice(start - args.row_start, stop - args.row_start),
        )


def _compute(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _per_query_head(args: AttentionArgs, tensor: Tensor) -> Tensor:
    """[B, Hk, ...] -> [B, H, ...]: query head h reads kv head h // (H / Hk)."""
    group = args.num_heads // args.num_kv_heads
    return tensor if group == 1 else tensor.repeat_interleave(group, dim=1)


def _per_kv_head(args: AttentionArgs, tensor: Tensor) -> Tensor:
    """The adjoint: [B, H, ...] -> [B, Hk, ...], summing the heads that share a kv head."""
    group = args.num_heads // args.num_kv_heads
    return tensor if group == 1 else tensor.unflatten(1, (-1, group)).sum(2)


def _of_keys(args: AttentionArgs, seq: _Sequence, tensor: Tensor) -> Tensor:
    """k or v [B, H, N, D] of each query head; padding keys are 0, because 0 * NaN is NaN."""
    tensor = _compute(tensor[:, :, seq.k])
    if args.key_padding_mask is not None:
        tensor = tensor.masked_fill(~args.key_padding_mask[:, None, :, None], 0.0)
    return _per_query_head(args, tensor)


def _span_index(args: AttentionArgs, seq: _Sequence) -> Tensor:
    """The span of each key as [B or 1, 1, 1, N], with S for "no span"."""
    assert args.span_ids is not None
    ids = args.span_ids[..., seq.k].long()
    ids = torch.where(ids >= 0, ids, args.num_spans)
    return ids[:, None, None, :] if ids.dim() == 2 else ids[None, None, None, :]


def _to_keys(args: AttentionArgs, seq: _Sequence, per_span: Tensor) -> Tensor:
    """x Eᵀ: the value of each key's span, [B, H, T, S] -> [B, H, T, N]; 0 for keys in no span."""
    padded = torch.cat([per_span, per_span.new_zeros(*per_span.shape[:-1], 1)], dim=-1)
    index = _span_index(args, seq)
    return padded.gather(-1, index.expand(*per_span.shape[:-1], index.shape[-1]))


def _to_spans(args: AttentionArgs, seq: _Sequence, per_key: Tensor) -> Tensor:
    """x E: the sum over each span's keys, [B, H, T, N] -> [B, H, T, S].

    A matmul with the one-hot E rather than `scatter_add_`, which adds in no fixed order on CUDA.
    """
    spans = torch.arange(args.num_spans, device=per_key.device)
    one_hot = _span_index(args, seq).transpose(-1, -2) == spans  # [B or 1, 1, N, S]
    return per_key @ one_hot.to(per_key.dtype)


def _hidden(args: AttentionArgs, seq: _Sequence) -> Tensor | None:
    """True where a query must not see a key, broadcastable to [B, H, T, N]; None for nowhere."""
    seqlen_q, seqlen_k = seq.q.stop - seq.q.start, seq.k.stop - seq.k.start
    hidden: Tensor | None = None
    if args.window_left >= 0 or args.window_right >= 0:
        offset = 0 if args.top_left else seqlen_k - seqlen_q
        i = torch.arange(seqlen_q, device=args.q.device)[:, None] + offset
        j = torch.arange(seqlen_k, device=args.q.device)[None, :]
        hidden = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool, device=args.q.device)
        if args.window_left >= 0:
            hidden = hidden | (j < i - args.window_left)
        if args.window_right >= 0:
            hidden = hidden | (j > i + args.window_right)
        hidden = hidden[None, None]
    if args.attn_mask is not None and args.attn_mask.dtype == torch.bool:
        hidden = ~args.attn_mask if hidden is None else hidden | ~args.attn_mask
    if args.key_padding_mask is not None:
        padding = ~args.key_padding_mask[:, None, None, :]
        hidden = padding if hidden is None else hidden | padding
    return hidden


def _attend(
    args: AttentionArgs, seq: _Sequence, q: Tensor, k: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Equations (1) to (5): p [B, H, T, N], lse [B, H, T], the soft cap's derivative (None: 1)."""
    s = q @ k.transpose(-1, -2) * args.scale  # (1)
    dcap = None
    if args.softcap != 0.0:
        squashed = torch.tanh(s / args.softcap)
        s, dcap = squashed * args.softcap, 1 - squashed * squashed  # (2)
    if args.span_bias is not None:
        s = s + _to_keys(args, seq, args.span_bias[:, :, seq.q].to(s.dtype))  # (3)
    if args.attn_mask is not None and args.attn_mask.dtype != torch.bool:
        s = s + args.attn_mask.to(s.dtype)  # (3)
    hidden = _hidden(args, seq)
    if hidden is not None:
        s = s.masked_fill(hidden, float("-inf"))  # (3)
    if s.shape[-1] == 0:
        return s, s.new_full(s.shape[:-1], float("-inf")), dcap
    # The stabiliser of a fully masked row is 0: exp(-inf - 0) is 0, but -inf - (-inf) is NaN.
    # Weights are formed from the row maximum, not from lse: with scores of 1e4 lse itself is
    # rounded to 1e-3.
    stabiliser = s.amax(-1, keepdim=True)
    stabiliser = torch.where(stabiliser == float("-inf"), 0.0, stabiliser)
    p = torch.exp(s - stabiliser)
    normaliser = p.sum(-1, keepdim=True)
    lse = (stabiliser + torch.log(normaliser)).squeeze(-1)  # (4)
    p = p / torch.where(normaliser == 0, 1.0, normaliser)  # (5)
    return p, lse, dcap


class TorchAttention(DifferentiableBackend[AttentionArgs, AttentionOutputs, AttentionGradients]):
    """PyTorch in float32, or float64 for float64 inputs."""

    def can_run(self, args: AttentionArgs) -> str | None:
        if args.cu_seqlens_q is not None and (
            args.attn_mask is not None or args.key_padding_mask is not None
        ):
            return "attn_mask and key_padding_mask are not supported with packed sequences"
        return None

    def fwd(self, args: AttentionArgs, outputs: AttentionOutputs) -> None:
        with full_precision(args.q):
            for seq in _sequences(args):
                _fwd(args, seq, outputs)

    def bwd(
        self, args: AttentionArgs, outputs: AttentionOutputs, gradients: AttentionGradients
    ) -> None:
        with full_precision(args.q):
            for seq in _sequences(args):
                _bwd(args, seq, outputs, gradients)


def _fwd(args: AttentionArgs, seq: _Sequence, outputs: AttentionOutputs) -> None:
    q = _compute(args.q[:, :, seq.q])
    k, v = _of_keys(args, seq, args.k), _of_keys(args, seq, args.v)
    p, outputs.lse[:, :, seq.q], _ = _attend(args, seq, q, k)
    outputs.out[:, :, seq.q] = p @ v  # (6)
    if args.num_spans > 0:
        outputs.marginals[:, :, seq.marginals] = _to_spans(args, seq, p[:, :, seq.rows])  # (7)


def _bwd(
    args: AttentionArgs, seq: _Sequence, outputs: AttentionOutputs, gradients: AttentionGradients
) -> None:
    q = _compute(args.q[:, :, seq.q])
    k, v = _of_keys(args, seq, args.k), _of_keys(args, seq, args.v)
    p, _, dcap = _attend(args, seq, q, k)
    empty = (outputs.lse[:, :, seq.q] == float("-inf"))[..., None]  # its outputs are constants

    dp = torch.zeros_like(p)
    delta = p.new_zeros(*p.shape[:-1], 1)
    if gradients.dout is not None:
        do = _compute(gradients.dout[:, :, seq.q]).masked_fill(empty, 0.0)
        gradients.dv[:, :, seq.k] = _per_kv_head(args, p.transpose(-1, -2) @ do)  # (8)
        dp = do @ v.transpose(-1, -2)  # (9)
        delta = (do * _compute(outputs.out[:, :, seq.q])).sum(-1, keepdim=True)  # (10)
    else:
        gradients.dv[:, :, seq.k] = 0.0
    if gradients.dmarginals is not None and args.num_spans > 0:
        dm = gradients.dmarginals[:, :, seq.marginals]
        m = outputs.marginals[:, :, seq.marginals]
        dp[:, :, seq.rows] += _to_keys(args, seq, dm)  # (9)
        delta[:, :, seq.rows] += (dm * m).sum(-1, keepdim=True)  # (10)
    if gradients.dlse is not None:
        delta -= gradients.dlse[:, :, seq.q, None]  # (10)

    # A weight of exactly 0 (masked, or underflowed) is a constant. Without `where`, 0 times inf or
    # NaN would be NaN.
    ds = torch.where(p == 0, 0.0, p * (dp - delta))  # (11)
    if gradients.dspan_bias is not None:
        m = _to_spans(args, seq, p)
        excess = ds.sum(-1, keepdim=True)
        if gradients.dlse is not None:
            excess -= gradients.dlse[:, :, seq.q, None]
        correction = torch.where(m == 0, 0.0, m * excess)
        gradients.dspan_bias[:, :, seq.q] = _to_spans(args, seq, ds) - correction  # (12), (16)
    if dcap is not None:
        ds = ds * dcap  # (13)
    gradients.dq[:, :, seq.q] = ds @ k * args.scale  # (14)
    gradients.dk[:, :, seq.k] = _per_kv_head(args, ds.transpose(-1, -2) @ q) * args.scale  # (15)
