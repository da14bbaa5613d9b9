"""Attention policies in eager PyTorch: the float64 truth of the tests, and a same-dtype baseline.

Written from the equations, independently of the reference backends: no code is shared and the
backward is autograd's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import ral_kernels as rk
from tests.ops.policy_cases import PolicyInputs


def own_keys(inputs: PolicyInputs) -> Tensor:
    """[T, N], True at each row's own key."""
    tq, n = inputs.q.shape[2], inputs.k.shape[2]
    return torch.arange(n) == (torch.arange(tq)[inputs.rows] + n - tq)[:, None]


def visible_keys(inputs: PolicyInputs) -> Tensor:
    """[B, T, N], True where a row sees a key."""
    options = inputs.options
    b, tq, n = inputs.q.shape[0], inputs.q.shape[2], inputs.k.shape[2]
    position = (torch.arange(tq)[inputs.rows] + n - tq)[:, None]
    distance = torch.arange(n)[None] - position
    visible = torch.ones_like(distance, dtype=torch.bool)
    window = options.get("window")
    left, right = (window, window) if window is None or isinstance(window, int) else window
    if options["is_causal"]:
        right = 0
    if left is not None and left >= 0:
        visible = visible & (distance >= -left)
    if right is not None and right >= 0:
        visible = visible & (distance <= right)
    visible = visible.expand(b, -1, -1)
    if "key_padding_mask" in options:
        visible = visible & options["key_padding_mask"][:, None]
    return visible


def valid_keys(inputs: PolicyInputs) -> Tensor:
    """[B, T, N], True where the policy of a row is."""
    valid = visible_keys(inputs)
    scope = inputs.options.get("scope", inputs.options.get("spans"))
    if scope is not None:
        in_scope = scope.ids >= 0 if isinstance(scope, rk.Spans) else scope
        valid = valid & (in_scope[:, None] if in_scope.dim() == 2 else in_scope)
    if inputs.options.get("exclude_self", True):
        valid = valid & ~own_keys(inputs)
    return valid


def one_hot(inputs: PolicyInputs, dtype: torch.dtype) -> Tensor:
    """[B or 1, N, S]."""
    spans = inputs.options["spans"]
    ids = spans.ids if spans.ids.dim() == 2 else spans.ids[None]
    return (ids[..., None] == torch.arange(spans.num_spans)).to(dtype)


def eager_policy(inputs: PolicyInputs) -> tuple[Tensor, Tensor]:
    """(p, lse); scores in the inputs' dtype, the softmax at least in float32, as models do."""
    q, k, options = inputs.q[:, :, inputs.rows], inputs.k, inputs.options
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    s = (q @ k.mT * options.get("scale", 1 / math.sqrt(q.shape[3]))).to(dtype)
    if "softcap" in options:
        s = torch.tanh(s / options["softcap"]) * options["softcap"]
    if "span_bias" in options:
        shape = (*s.shape[:3], options["spans"].num_spans)
        s = s + options["span_bias"].to(dtype).expand(shape) @ one_hot(inputs, dtype)[:, None].mT
    visible = visible_keys(inputs)[:, None]
    s = s.masked_fill(~visible, float("-inf"))
    empty = ~visible.any(-1, keepdim=True)
    s = torch.where(empty, 0.0, s)  # keeps NaN out of the softmax and of its backward
    lse = torch.logsumexp(s, -1).masked_fill(empty[..., 0], float("-inf"))
    maps = torch.softmax(s, -1) * ~empty
    if "head_weights" in options:
        weights = options["head_weights"].to(dtype)
        weights = weights / weights.mean(-1, keepdim=True)
        maps = maps * weights.expand(maps.shape[:2])[..., None, None]
    mean = maps.mean(1) * valid_keys(inputs)
    z = mean.sum(-1, keepdim=True)
    p = mean / torch.where(z == 0, 1.0, z)
    return (p @ one_hot(inputs, dtype) if "spans" in options else p), lse


def eager_divergence(p: Tensor, r: Tensor, kind: str) -> Tensor:
    """The formulas as they stand, where 0 log 0 = 0; r is a constant."""

    def log(x: Tensor) -> Tensor:
        return torch.log(torch.where(x > 0, x, 1.0))

    both = (p > 0).any(-1) & (r > 0).any(-1)
    if kind == "jsd":
        m = (p + r) / 2
        value = (p * (log(p) - log(m)) + r * (log(r) - log(m))).sum(-1) / 2
    elif kind == "kl":
        value = (p * (log(p) - log(r))).sum(-1)
    elif kind == "cross_entropy":
        value = -(r * log(p)).sum(-1)
    else:
        value = (r * (log(r) - log(p))).sum(-1)
    return torch.where(both, value, 0.0)
