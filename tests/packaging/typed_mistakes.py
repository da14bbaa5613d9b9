"""Mistakes that mypy must find, a line each: `tests/packaging/test_types.py`."""

from torch import Tensor

import ral_kernels as rk


def mistakes(q: Tensor, spans: rk.Spans) -> None:
    rk.attention(q, q, q).marginals.sum()  # E: there are none without spans
    rk.attention(q, q, q, backend="cpuu")  # E: no such backend
    rk.divergence(q, q, "js")  # E: no such kind
    rk.ral_loss(q, q, q, q, reduction="mean")  # E: no such reduction
    rk.scaled_dot_product_attention(q, q, q, spans=spans).sum()  # E: a tuple
    rk.Spans.from_vision_grid(q, q, token_id=1, granularity="frames")  # E: no such granularity
    rk.flash_attn_func(q, q, q, return_attn_probs=True).sum()  # E: a tuple
