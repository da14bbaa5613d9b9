"""Which keys the rows of a captured call saw, as arguments of the policy ops.

The ops take causality, a window and a padding of keys. An attention function gets a mask in the
form of its implementation: None, a [B, N] padding, a dense mask or a BlockMask. This module reads
the padding from the mask and then compares the mask with what the ops will assume. A mask that
differs (a batch of several packed rows, images that attend both ways) is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ops.packing import PackedRows
from .masks import PATTERNS
from .registration import NAME as RAL

Window = tuple[int, int | None] | None
Rows = slice | tuple[int, int] | PackedRows | None
# Implementations that tell packed sequences apart by their mask, and ignore positions and lengths.
PACKED_BY_MASK_ALONE = (None, "eager", "sdpa", "flex_attention")
_CHUNK = 1 << 24  # elements of a mask that are compared at a time


@dataclass(frozen=True)
class Visibility:
    """Which keys a row sees: those of `key_padding_mask`, causal and within the window."""

    is_causal: bool
    window: Window
    key_padding_mask: Tensor | None
    cu_seqlens: Tensor | None = None  # int32 [S + 1], of packed sequences, causal each

    def rows(self, start: int, stop: int, seqlen_q: int, seqlen_k: int, device: Any) -> Tensor:
        """Bool [B or 1, stop - start, N] for these queries of `seqlen_q`."""
        key = torch.arange(seqlen_k, device=device)
        own = torch.arange(start, stop, device=device)[:, None] + (seqlen_k - seqlen_q)
        seen = torch.ones(stop - start, seqlen_k, dtype=torch.bool, device=device)
        if self.is_causal:
            seen &= key <= own
        if self.cu_seqlens is not None:
            first = torch.searchsorted(self.cu_seqlens, own.int(), right=True) - 1
            seen &= key >= self.cu_seqlens[first]
        if self.window is not None:
            seen &= key >= own - self.window[0]
            if self.window[1] is not None:
                seen &= key <= own + self.window[1]
        return (
            seen[None] if self.key_padding_mask is None else seen & self.key_padding_mask[:, None]
        )


def window_of(sliding_window: int | None, is_causal: bool) -> Window:
    """The window of `rk`, in keys to either side; transformers also counts the row's own key."""
    if sliding_window is None:
        return None
    return sliding_window - 1, None if is_causal else sliding_window - 1


def read_simple_mask(
    op: str,
    mask: Any,
    *,
    seqlen_q: int,
    seqlen_k: int,
    implementation: str | None,
    is_causal: bool,
    sliding_window: int | None,
    config: Any,
) -> tuple[int, Visibility] | None:
    """What a mask that is not dense says: (number of keys that exist, visibility), or None.

    Args:
        op: the public function, for messages.
        mask: as the attention function was given it, like `is_causal` and `sliding_window`.
        implementation: whose mask it is; what None means differs.
        config: of the attention module, for the window of a mask of "ral".
    """
    window = window_of(sliding_window, is_causal)
    if mask is None:
        if implementation in (None, "eager", "flex_attention"):
            return seqlen_k, Visibility(False, None, None)
        if implementation in ("sdpa", RAL) and not is_causal:
            window = None  # theirs is in the mask; causal, the keys of this call are within it
        # sdpa aligns its first query with the first key: later keys are a static cache's.
        top_left = implementation == "sdpa" and is_causal and 1 < seqlen_q < seqlen_k
        return seqlen_q if top_left else seqlen_k, Visibility(is_causal, window, None)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    if implementation == RAL:  # see masks.py
        mask = mask[:, max(0, mask.shape[1] - seqlen_k) :]
        pattern = PATTERNS.get(mask.dtype)
        has_window = pattern is not None and pattern.has_window
        if pattern is not None:
            is_causal = pattern.is_causal
        if has_window and (configured := getattr(config, "sliding_window", None)) is not None:
            # A mask that is not causal counts the keys to either side alone.
            sliding_window = configured if is_causal else configured + 1
        if not is_causal and not has_window:
            sliding_window = None  # as in attention_forward
        window = window_of(sliding_window, is_causal)
        return mask.shape[1], Visibility(is_causal, window, mask.bool())
    if mask.shape[1] < seqlen_k:
        raise NotImplementedError(
            f"{op}: the attention mask must cover every key, N={seqlen_k}; got "
            f"{tuple(mask.shape)}, as with a static cache"
        )
    return seqlen_k, Visibility(is_causal, window, mask[:, -seqlen_k:].bool())


def read_dense_mask(
    op: str,
    mask: Any,
    rows: tuple[int, int],
    *,
    seqlen_q: int,
    seqlen_k: int,
    is_causal: bool,
    sliding_window: int | None,
) -> Visibility:
    """What a dense mask or a BlockMask says about the queries `rows`, a half-open range.

    A mask without a window takes precedence over `sliding_window`.

    Raises:
        NotImplementedError: it is no combination of causality, a window and a padding of keys.
    """
    dense = allowed(op, mask, seqlen_q, seqlen_k)
    window = window_of(sliding_window, is_causal)
    if seqlen_q == 0 or seqlen_k == 0:
        return Visibility(is_causal, window, None)
    padding = dense.any(-2)
    own = slice(seqlen_k - seqlen_q + rows[0], seqlen_k - seqlen_q + rows[1])
    # A row that sees keys but not its own is padding, or after a cache a static cache's empty tail.
    if seqlen_q < seqlen_k and bool((dense.any(-1)[:, slice(*rows)] & ~padding[:, own]).any()):
        raise NotImplementedError(
            f"{op}: the last query must be aligned with the last key; rows of this call do not see "
            "their own key, as with a static cache"
        )
    for candidate in dict.fromkeys((window, None)):
        visibility = Visibility(is_causal, candidate, padding)
        if _agrees(visibility, dense, rows, seqlen_q, seqlen_k):
            return visibility
    raise NotImplementedError(
        f"{op}: rows {rows[0]} to {rows[1]} must see the keys before them, except padding and keys "
        "outside a window; the attention mask of this call differs (packed sequences, a static "
        "cache, or images that attend both ways: choose rows after them)"
    )


def read_packed_mask(
    op: str,
    mask: Any,
    positions: Any,
    *,
    seqlen_q: int,
    seqlen_k: int,
    sliding_window: int | None,
) -> Visibility | None:
    """The packed sequences of a dense mask or a BlockMask; None if it holds none.

    A sequence starts where a token does not see the one before, unless that is padding. Positions
    that count up say that there is one sequence, as where attention is in chunks.
    """
    if seqlen_q != seqlen_k or seqlen_q < 2 or sliding_window == 1:
        return None
    if isinstance(positions, Tensor) and positions.dim() == 2 and _counts_up(positions):
        return None
    dense = allowed(op, mask, seqlen_q, seqlen_k)
    if dense.shape[0] != 1:
        return None
    padding = dense.any(-2)
    apart = ~dense[0].diagonal(-1) & padding[0, :-1] & padding[0, 1:]
    starts = apart.nonzero()[:, 0].int() + 1
    if starts.numel() == 0:
        return None
    if not bool(padding.all()):
        return None
    cu_seqlens = torch.cat([starts.new_tensor([0]), starts, starts.new_tensor([seqlen_k])])
    window = window_of(sliding_window, is_causal=True)
    for candidate in dict.fromkeys((window, None)):
        visibility = Visibility(True, candidate, padding, cu_seqlens)
        if _agrees(visibility, dense, (0, seqlen_q), seqlen_q, seqlen_k):
            return Visibility(True, candidate, None, cu_seqlens)
    return None


def _counts_up(positions: Tensor) -> bool:
    return bool((positions.diff(dim=-1) == 1).all())


def packed_by_position(positions: Any, seqlen_q: int, seqlen_k: int) -> Tensor | None:
    """Offsets [S + 1] of the sequences that flash attention finds in positions, or None.

    It takes one row of positions that do not count up, and starts a sequence at each smallest one.
    """
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[0] != 1:
        return None
    if positions.shape[1] != seqlen_q or seqlen_q != seqlen_k:
        return None
    if _counts_up(positions):
        return None
    starts = (positions[0] == positions.min()).nonzero()[:, 0].int()
    return torch.cat([starts, starts.new_tensor([seqlen_q])])


def allowed(op: str, mask: Any, seqlen_q: int, seqlen_k: int) -> Tensor:
    """A dense mask or a BlockMask as bool [B, Tq, N]."""
    if not isinstance(mask, Tensor):
        mask = _of_block_mask(op, mask, seqlen_q, seqlen_k)
    if mask.dim() != 4 or mask.shape[2] != seqlen_q or mask.shape[3] < seqlen_k:
        raise NotImplementedError(
            f"{op}: the attention mask must be [B, N] or [B, 1, T, N] with T={seqlen_q}, "
            f"N={seqlen_k}; got {tuple(mask.shape)}"
        )
    mask = mask[..., :seqlen_k]
    if mask.dtype != torch.bool:
        lowest = torch.finfo(mask.dtype).min / 2
        if not bool(((mask == 0) | (mask <= lowest)).all()):
            raise NotImplementedError(
                f"{op}: a floating attention mask must hold 0 and -inf (or the dtype's minimum); "
                "got other values"
            )
        mask = mask == 0
    if mask.shape[1] > 1 and not bool((mask == mask[:, :1]).all()):
        raise NotImplementedError(
            f"{op}: the attention mask must be the same for all heads; got {tuple(mask.shape)}"
        )
    return mask[:, 0]


def _of_block_mask(op: str, mask: Any, seqlen_q: int, seqlen_k: int) -> Tensor:
    from torch.nn.attention.flex_attention import BlockMask, create_mask

    if not isinstance(mask, BlockMask):
        raise NotImplementedError(
            f"{op}: the attention mask must be None, a tensor or a BlockMask; got "
            f"{type(mask).__name__}"
        )
    batch_size = mask.kv_num_blocks.shape[0]
    device = mask.kv_num_blocks.device
    return create_mask(mask.mask_mod, batch_size, 1, seqlen_q, seqlen_k, device=str(device))


def _agrees(
    visibility: Visibility, dense: Tensor, rows: tuple[int, int], seqlen_q: int, seqlen_k: int
) -> bool:
    """Whether `dense` is what `visibility` says, in rows whose own key is real.

    Rows of padding are not compared: implementations differ in them, and no method uses them.
    """
    start, stop = rows
    step = max(1, _CHUNK // max(1, dense.shape[0] * seqlen_k))
    padding = visibility.key_padding_mask
    assert padding is not None  # made from the mask
    for first in range(start, stop, step):
        last = min(first + step, stop)
        expected = visibility.rows(first, last, seqlen_q, seqlen_k, dense.device)
        own = slice(first + seqlen_k - seqlen_q, last + seqlen_k - seqlen_q)
        differs = (expected != dense[:, first:last]) & padding[:, own, None]
        if bool(differs.any()):
            return False
    return True
