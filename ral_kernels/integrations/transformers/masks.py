"""The mask function of attn_implementation="ral": key padding and a pattern, not a dense mask.

A decoder's mask is usually a pattern (causal, a window) and a padding of the keys. Both are
arguments of `ral_kernels.attention`. So no [B, 1, T, N] bools are written, which take 256 MiB a
sample at 16k tokens. The mask function returns one of these:

- None: no padding, no window; the attention module says whether it is causal, as for sdpa.
- A tensor [B, n] of a dtype in `KEY_MASK_DTYPES`: nonzero = a real key; the dtype is the pattern.
  If n < N, the attention function leaves out the keys from n on, the unwritten tail of a static
  cache. If n > N, the keys are the last N of the n, as of a cache that keeps a window.
- A bool tensor [B, 1, T, N] from transformers' `sdpa_mask`, for every other pattern: image tokens
  that attend both ways, packed sequences, chunks, a user's own functions. It alone says which keys
  a query sees.

Why a dtype: a mask is stored in dictionaries, moved between devices, checkpointed, passed through
`generate` and traced by `torch.compile`. Attributes and subclasses do not survive all of these; a
dtype does.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime.checks import has_values


class Pattern(NamedTuple):
    """Which keys a query sees by position: up to its own or all; within a window or all."""

    is_causal: bool
    has_window: bool


KEY_MASK_DTYPES = {
    Pattern(is_causal=True, has_window=False): torch.uint8,
    Pattern(is_causal=False, has_window=False): torch.int8,
    Pattern(is_causal=True, has_window=True): torch.int16,
    Pattern(is_causal=False, has_window=True): torch.int32,
}
PATTERNS = {dtype: pattern for pattern, dtype in KEY_MASK_DTYPES.items()}

# Layers of Gemma 4 that share keys take the last rows of the mask, so it must have rows.
CUT_BY_ROWS = {"gemma4_text", "gemma4_unified_text"}
# The decoder of T5Gemma 2 concatenates its mask with that of the encoder's keys.
CONCATENATED = {"t5gemma2", "t5gemma2_decoder"}


def key_mask(
    *,
    batch_size: int,
    q_length: int | None = None,
    kv_length: int,
    q_offset: int | Tensor = 0,
    cache_position: Tensor | None = None,
    kv_offset: int,
    mask_function: Any,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = False,
    allow_is_bidirectional_skip: bool = False,
    local_size: int | None = None,
    config: Any = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor | None:
    """The mask of `attn_implementation="ral"`: see the head of this module for what it returns.

    Called by transformers' `create_causal_mask` and its siblings. Queries are the positions
    q_offset ... q_offset + q_length - 1, keys kv_offset ... kv_offset + kv_length - 1.

    Args:
        q_offset: tokens in the cache; a tensor for a static cache.
        cache_position: int [T], the positions of the queries, in place of q_length and q_offset
            (transformers 4).
        mask_function: (batch, head, query, key indices) -> bool, the whole pattern.
        attention_mask: bool [B, tokens so far], True = a real token; shorter than the keys for a
            static cache.
        allow_is_causal_skip: transformers sets it where the pattern is the plain causal one
            (windowed or chunked with local_size) and needs no tensor;
            allow_is_bidirectional_skip is the same for attention both ways.
        local_size: the window, or the size of a chunk.
        config: of the text model.
        options: dtype and use_vmap, for `sdpa_mask`.

    Raises:
        NotImplementedError: a model whose attention does not use transformers' attention interface.
        TypeError: a mask of one or three dimensions.
    """
    from transformers import masking_utils

    if own := _own_attention(type(config)):
        raise NotImplementedError(
            f"ral attention: {own} is not supported: it calls no attention function of "
            'transformers, and "ral" gives models no dense mask; leave this part under eager, as '
            'attn_implementation={"vision_config": "ral"} does with the text'
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise TypeError(
            "ral attention: attention_mask must be [B, N], or of four dimensions; got "
            f"{tuple(attention_mask.shape)} (packed sequences go by cu_seq_lens_q)"
        )
    queries: dict[str, Any]
    if cache_position is not None:
        q_length, q_offset = cache_position.shape[0], cache_position[0]
        queries = {"cache_position": cache_position}
    else:
        queries = {"q_length": q_length, "q_offset": q_offset}
    assert q_length is not None

    def dense() -> Tensor | None:
        return masking_utils.sdpa_mask(
            batch_size=batch_size,
            kv_length=kv_length,
            kv_offset=kv_offset,
            mask_function=mask_function,
            **queries,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            local_size=local_size,
            device=device,
            **options,
        )

    if getattr(config, "model_type", None) in CONCATENATED:
        return dense()
    # transformers allows a skip only for its own patterns, with nothing added to them: one of the
    # two functions, or one of them with a window or chunks of local_size.
    if allow_is_causal_skip:
        whole_function = masking_utils.causal_mask_function
    elif allow_is_bidirectional_skip:
        whole_function = masking_utils.bidirectional_mask_function
    else:
        return dense()
    has_window = False
    if mask_function is not whole_function:
        if local_size is None:
            return dense()
        has_window = kv_offset + kv_length >= local_size
        if has_window and _may_be_chunk(config, local_size):
            return dense()
        if allow_is_causal_skip and kv_length <= local_size:
            has_window = False  # the cache holds at most the window
    pattern = Pattern(allow_is_causal_skip, has_window)

    # The op aligns the last query with the last key. If the pattern is causal, no query sees the
    # keys after the last query, such as the unwritten tail of a static cache: they are left out.
    stop = kv_offset + kv_length
    if pattern != Pattern(is_causal=False, has_window=False):
        if isinstance(q_offset, Tensor):
            if not has_values(q_offset):
                return dense()  # a graph that reads how full a static cache is waits for the device
            q_offset = int(q_offset)
        q_stop = q_offset + q_length
        if q_stop > stop or (q_stop < stop and (kv_offset > 0 or not pattern.is_causal)):
            return dense()
        stop = q_stop
    # From key 0, although keys may start at kv_offset: in `generate` a model makes a mask from the
    # mask of a static cache.
    keys = None
    if attention_mask is not None:
        keys = F.pad(attention_mask[:, :stop], (0, max(0, stop - attention_mask.shape[1])))
        if has_values(keys) and bool(keys[:, kv_offset:].all()):
            keys = None
    if keys is None:
        # PaliGemma's modules say that they attend both ways: a causal chunk needs a mask.
        both_ways = getattr(config, "use_bidirectional_attention", None) is True
        says_so = both_ways and pattern.is_causal and 1 < q_length < kv_length
        if stop == kv_offset + kv_length and not has_window and not says_so:
            return None
        keys = torch.ones(batch_size, stop, dtype=torch.bool, device=device)
    return dense() if _cuts_by_rows(config) else keys.to(KEY_MASK_DTYPES[pattern])


@torch._dynamo.assume_constant_result  # it reads source, which a graph cannot
def _own_attention(config_class: type) -> str:
    return _own_attention_in_source(config_class)


@functools.cache
def _own_attention_in_source(config_class: type) -> str:
    """The attention class of models that do not use transformers' attention interface, or ""."""
    from transformers import PreTrainedModel

    names = {
        cls.__module__
        for cls in _subclasses(PreTrainedModel)
        if getattr(cls, "config_class", None) is config_class
    }
    found = ""
    for name in sorted(names):
        try:
            source = inspect.getsource(sys.modules[name])
        except (KeyError, OSError, TypeError):  # made at run time
            return ""
        if "ALL_ATTENTION_FUNCTIONS" in source:
            return ""
        if attention := re.search(r"^class (\w*Attention\w*)\(nn\.Module\):", source, re.M):
            found = attention[1]
    return found


def _subclasses(cls: type) -> Iterator[type]:
    subclasses: list[type] = cls.__subclasses__()
    for each in subclasses:
        yield each
        yield from _subclasses(each)


def _cuts_by_rows(config: Any) -> bool:
    shared: int = getattr(config, "num_kv_shared_layers", 0)
    return getattr(config, "model_type", None) in CUT_BY_ROWS and shared > 0


def _may_be_chunk(config: Any, local_size: int) -> bool:
    """Whether `local_size` could be the size of a chunk: the caller does not say which it is."""
    return (
        getattr(config, "sliding_window", None) != local_size
        or getattr(config, "attention_chunk_size", None) == local_size
    )
