"""Allocates the tensors that ops return: their dtype, layout and memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulation_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def new_empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Every tensor that a kernel writes is made here (the tests fill it with NaN first)."""
    if like.dtype == dtype:  # torch takes 1 us less without the argument
        return like.new_empty(shape)
    return like.new_empty(shape, dtype=dtype)


def if_wanted(q: Tensor, of: Tensor | None, wanted: bool) -> Tensor:
    """Memory for the gradient of an optional input `of`, in float32; of shape [0] if not wanted."""
    return new_empty(q, of.shape if of is not None and wanted else (0,), accumulation_dtype(q))


def empty_like_layout(like: Tensor, last: int) -> Tensor:
    """An empty [B, H, T, last] laid out as `like`: token-major ([B, T, H, D]) or contiguous."""
    batch_size, num_heads, seqlen, _ = like.shape
    if like.stride(1) < like.stride(2):
        shape = (batch_size, seqlen, num_heads, last)
        return new_empty(like, shape, like.dtype).transpose(1, 2)
    return new_empty(like, (batch_size, num_heads, seqlen, last), like.dtype)
