"""`attention` in eager PyTorch: the float64 truth of the tests, and a same-dtype baseline.

Written independently of `ral_kernels.ops.attention.reference`: no code is shared and the backward
is autograd's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.ops.attention_cases import AttentionInputs


def visible_keys(inputs: AttentionInputs) -> Tensor:
    """[B, H, T, N], True where a query may see a key."""
    q, k, options = inputs.q, inputs.k, inputs.options
    t, n = q.shape[2], k.shape[2]
    visible = torch.ones(*q.shape[:3], n, dtype=torch.bool, device=q.device)
    distance = torch.arange(n, device=q.device)[None] - (
        torch.arange(t, device=q.device)[:, None] + n - t
    )
    if options.get("is_causal", False):
        visible &= distance <= 0
    window = options.get("window")
    if isinstance(window, int):
        window = (window, window)
    left, right = (-1, -1) if window is None else (-1 if w is None else w for w in window)
    if left >= 0:
        visible &= distance >= -left
    if right >= 0:
        visible &= distance <= right
    mask = options.get("attn_mask")
    if mask is not None and mask.dtype == torch.bool:
        visible &= mask
    if options.get("key_padding_mask") is not None:
        visible &= options["key_padding_mask"][:, None, None]
    return visible


def additive_bias(inputs: AttentionInputs, dtype: torch.dtype) -> Tensor:
    """What is added to the scores, [B, H, T, N]: the float mask and the bias of each key's span."""
    shape = (*inputs.q.shape[:3], inputs.k.shape[2])
    bias = torch.zeros(shape, dtype=dtype, device=inputs.q.device)
    mask = inputs.options.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        bias = bias + mask.to(dtype)
    span_bias = inputs.options.get("span_bias")
    if span_bias is not None:
        bias = bias + span_bias.to(dtype).expand(*shape[:3], -1) @ one_hot(inputs, dtype).mT
    return bias


def one_hot(inputs: AttentionInputs, dtype: torch.dtype) -> Tensor:
    """E of the README: [B or 1, 1, N, S], 1 where key i belongs to span s."""
    assert inputs.spans is not None
    ids = inputs.spans.ids if inputs.spans.ids.dim() == 2 else inputs.spans.ids[None]
    return (ids[:, None, :, None] == torch.arange(inputs.spans.num_spans, device=ids.device)).to(
        dtype
    )


def rows_of(inputs: AttentionInputs) -> slice:
    rows = inputs.options.get("rows")
    return slice(None) if rows is None else rows if isinstance(rows, slice) else slice(*rows)


def eager_attention(inputs: AttentionInputs) -> tuple[Tensor, Tensor | None, Tensor]:
    """(out, marginals, lse) in the inputs' dtype, the softmax at least in float32, as models do."""
    q, k, v = inputs.q, inputs.k, inputs.v
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    softmax_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = inputs.options.get("scale", 1 / math.sqrt(q.shape[3]))
    s = (q @ k.mT * scale).to(softmax_dtype)
    softcap = inputs.options.get("softcap")
    if softcap is not None:
        s = torch.tanh(s / softcap) * softcap
    s = s + additive_bias(inputs, softmax_dtype)
    s = s.masked_fill(~visible_keys(inputs), float("-inf"))
    empty = (s == float("-inf")).all(-1, keepdim=True)
    s = torch.where(empty, 0.0, s)  # keeps NaN out of the softmax and of its backward
    p = torch.softmax(s, -1) * ~empty
    lse = torch.logsumexp(s, -1).masked_fill(empty[..., 0], float("-inf"))
    out = p.to(q.dtype) @ v
    marginals = None
    if inputs.spans is not None:
        marginals = p[:, :, rows_of(inputs)] @ one_hot(inputs, softmax_dtype)
    return out, marginals, lse


def sdpa_out(inputs: AttentionInputs) -> Tensor | None:
    """`out` by PyTorch's own kernel in the same dtype; None where it lacks an option."""
    if "softcap" in inputs.options or inputs.k.shape[2] == 0:
        return None
    visible = visible_keys(inputs)
    mask = (
        additive_bias(inputs, torch.float32).masked_fill(~visible, float("-inf")).to(inputs.q.dtype)
    )
    scale = inputs.options.get("scale")
    return scaled_dot_product_attention(
        inputs.q, inputs.k, inputs.v, attn_mask=mask, scale=scale, enable_gqa=True
    )
