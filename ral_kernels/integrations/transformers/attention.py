"""The attention function of attn_implementation="ral": `ral_kernels.attention` inside a model."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...ops import qkv
from ...ops.attention import attention, flash_attn_varlen_func
from ...runtime import checks
from .masks import PATTERNS, Pattern

# Keywords that attention modules name in their calls, and that change nothing here: positions are
# used by RoPE and by the mask function, and the backward is always deterministic.
HARMLESS_KEYWORDS = {"deterministic", "position_ids"}

REFUSED_KEYWORDS = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a position bias",
    "indices": "sparse attention by indices",
    "block_indices": "sparse attention by blocks",
    "cache": "a paged cache",
    "block_table": "a paged cache",
    "k_cache": "a paged cache",
    "v_cache": "a paged cache",
}


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """`ral_kernels.attention` as transformers' attention modules call it.

    Without a mask the last query is aligned with the last key, as in flash attention. sdpa aligns
    the first query with the first key.

    Args:
        module: the attention module; its `is_causal` (default True) holds where neither
            `is_causal` nor the mask says otherwise.
        query: [B, H, T, D]. B may be 1 for learned queries shared by the batch.
        key: [B, Hk, N, D], heads not repeated.
        value: [B, Hk, N, Dv].
        attention_mask: one of: None; what `masks.key_mask` returns; [B, n] with n <= N, bool or
            integer, nonzero = a real key among the first n; [B, 1 or H, T, N], bool or additive,
            which alone says which keys a query sees.
        dropout: must be 0.
        scaling: factor on the scores; default 1/sqrt(D).
        sliding_window: keys that a causal query sees, its own included. Other queries see
            sliding_window - 1 keys to either side, in packed sequences or if the mask has a window.
            If a mask of `masks.key_mask` has a window, the configuration's takes its place.
        softcap: as in `ral_kernels.attention`.
        cu_seq_lens_q: int [number of sequences + 1] with cu_seq_lens_k, max_length_q and
            max_length_k: packed sequences. Used if attention_mask is None; a dense mask already
            separates the sequences.
        keywords: what else reaches attention. Those of the model, such as its labels, are ignored;
            those that attention reads are refused. See `reads`.

    Returns:
        (out [B, T, H, Dv] contiguous, None).

    Raises:
        NotImplementedError: dropout in training, or a keyword that is not supported.
        TypeError, ValueError: a mask of another kind, or what `ral_kernels.attention` refuses.
    """
    refuse_unsupported(module, dropout, keywords)
    if query.shape[0] == 1 and key.shape[0] > 1:
        query = query.expand(key.shape[0], -1, -1, -1)
    query, key, value = (qkv.unit_last_stride(x) for x in (query, key, value))
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))

    if attention_mask is not None and type(attention_mask) is not Tensor:
        checks.check_tensor(
            f"ral attention: {_name(module)}", "attention_mask", attention_mask, "None or a tensor"
        )
    if attention_mask is not None and attention_mask.dim() == 4:
        result = attention(
            query,
            key,
            value,
            attn_mask=_dense_mask(module, attention_mask, query),
            scale=scaling,
            softcap=softcap,
        )
        return result.out.transpose(1, 2).contiguous(), None

    lengths = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    if any(x is not None for x in lengths):
        if any(x is None for x in lengths) or attention_mask is not None:
            raise NotImplementedError(
                f"ral attention: {_name(module)}: packed sequences need cu_seq_lens_q, "
                "cu_seq_lens_k, max_length_q and max_length_k, and no padding mask; got "
                f"{', '.join(_given(lengths))} and attention_mask "
                f"{None if attention_mask is None else tuple(attention_mask.shape)}"
            )
        window = _window(module, is_causal, sliding_window)
        return _packed(query, key, value, lengths, is_causal, window, scaling, softcap), None

    keys, pattern = None, None
    if attention_mask is not None:
        keys, pattern = _key_mask(module, attention_mask, key.shape[2])
        key, value = key[:, :, : keys.shape[1]], value[:, :, : keys.shape[1]]
        if pattern is not None:
            is_causal = pattern.is_causal
            if pattern.has_window:
                sliding_window = _configured_window(module, is_causal, sliding_window)
    if not is_causal and not (pattern and pattern.has_window):
        sliding_window = None  # as under eager and sdpa: DiffusionGemma's decoder passes one
    result = attention(
        query,
        key,
        value,
        key_padding_mask=keys,
        is_causal=is_causal,
        window=_window(module, is_causal, sliding_window),
        scale=scaling,
        softcap=softcap,
    )
    return result.out.transpose(1, 2).contiguous(), None


def _name(module: Any) -> str:
    """The module as a message calls it, e.g. `LlamaAttention, layer 3`."""
    layer = getattr(module, "layer_idx", None)
    return type(module).__name__ + ("" if layer is None else f", layer {layer}")


def refuse_unsupported(module: Any, dropout: float, keywords: dict[str, Any]) -> None:
    if dropout > 0:
        raise NotImplementedError(
            f"ral attention: {_name(module)}: dropout must be 0; got {dropout} (set the "
            "configuration's attention_dropout to 0)"
        )
    if getattr(module, "sinks", None) is not None:  # some models' own attention reads them there
        raise NotImplementedError(
            f"ral attention: {_name(module)}: attention sinks (module.sinks) are not supported"
        )
    for keyword, value in keywords.items():
        if value is None or keyword in HARMLESS_KEYWORDS:
            continue
        if keyword == "output_attentions":
            if value:
                raise NotImplementedError(
                    f"ral attention: {_name(module)}: output_attentions=True is not supported: "
                    "the weights are never stored; use ral_kernels.capture, or "
                    'attn_implementation="eager"'
                )
            continue
        what = REFUSED_KEYWORDS.get(keyword)
        if what is not None:
            raise NotImplementedError(
                f"ral attention: {_name(module)}: {what} ({keyword}) is not supported"
            )
        if reads(module, keyword):
            raise NotImplementedError(
                f"ral attention: {_name(module)}: {keyword}, which its attention reads, is not "
                f"supported: it must be None; got {type(value).__name__}"
            )


def reads(module: Any, keyword: str) -> bool:
    """Whether a keyword may change what the attention of this module computes.

    Attention also gets the keywords of the whole model, such as labels. It reads those that the
    module names in its call, and the parameters of the functions that the module may call: its own
    eager one, and those of transformers.
    """
    return keyword in _keywords_read(type(module).forward)


@torch._dynamo.assume_constant_result  # it reads source, which a graph cannot
def _keywords_read(forward: Callable[..., Any]) -> tuple[str, ...]:
    return _keywords_in_source(inspect.unwrap(forward))


@functools.cache
def _keywords_in_source(forward: Any) -> tuple[str, ...]:
    """See `reads`; `forward` is the method of the module's class."""
    from transformers.modeling_flash_attention_utils import _flash_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    names = forward.__globals__
    functions = [ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS]
    functions.append(_flash_attention_forward)  # gets the keywords that flash attention is given
    if "eager_attention_forward" in names:
        functions.append(names["eager_attention_forward"])
    found = {name for function in functions for name in inspect.signature(function).parameters}
    try:  # the class, as its other methods may make the call
        source = inspect.getsource(names.get(forward.__qualname__.partition(".")[0], forward))
    except (OSError, TypeError):  # made at run time
        return tuple(found)
    for node in ast.walk(ast.parse(textwrap.dedent(source))):
        named = {x.arg for x in node.keywords if x.arg} if isinstance(node, ast.Call) else set()
        if "scaling" in named:  # the call of an attention function
            found |= named
    return tuple(found)


def _given(lengths: tuple[Any, ...]) -> list[str]:
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    return [name for name, x in zip(names, lengths, strict=True) if x is not None]


def _dense_mask(module: Any, mask: Tensor, query: Tensor) -> Tensor:
    if not (mask.is_floating_point() or mask.dtype == torch.bool):
        raise TypeError(
            f"ral attention: {_name(module)}: a mask of four dimensions must be bool (True = "
            f"attend) or floating (added to the scores); got {mask.dtype}"
        )
    return mask.to(query.dtype) if mask.is_floating_point() else mask


def _key_mask(module: Any, mask: Tensor, seqlen_k: int) -> tuple[Tensor, Pattern | None]:
    """Which of the first keys are real, and the pattern of the mask's dtype, if it has one."""
    if mask.dim() != 2 or mask.is_floating_point():
        hint = " (packed sequences go by cu_seq_lens_q)" if mask.dim() in (1, 3) else ""
        raise TypeError(
            f"ral attention: {_name(module)}: attention_mask must be None, bool or integer "
            f"[B, N], or of four dimensions; got {mask.dtype} {tuple(mask.shape)}{hint}"
        )
    pattern = PATTERNS.get(mask.dtype)
    if mask.shape[1] > seqlen_k:
        if pattern is None:
            raise ValueError(
                f"ral attention: {_name(module)}: attention_mask must be [B, N] with N <= "
                f"{seqlen_k} keys; got {tuple(mask.shape)}"
            )
        mask = mask[:, mask.shape[1] - seqlen_k :]
    return mask.bool().contiguous(), pattern


def _configured_window(module: Any, is_causal: bool, sliding_window: int | None) -> int:
    """`sliding_window` as the caller would pass it for the window that the mask was made for."""
    window = getattr(getattr(module, "config", None), "sliding_window", None)
    if window is not None:
        # A mask that is not causal counts the keys to either side, a module counts the query too.
        return int(window) if is_causal else int(window) + 1
    if sliding_window is None:
        raise NotImplementedError(
            f"ral attention: {_name(module)}: its mask has a sliding window, but neither the call "
            "nor module.config says how wide"
        )
    return sliding_window


def _window(module: Any, is_causal: bool, sliding_window: int | None) -> tuple[int, int] | None:
    if sliding_window is None:
        return None
    if sliding_window < 1:
        raise ValueError(
            f"ral attention: {_name(module)}: sliding_window must be None or >= 1; got "
            f"{sliding_window}"
        )
    return sliding_window - 1, 0 if is_causal else sliding_window - 1


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[Any, ...],
    is_causal: bool,
    window: tuple[int, int] | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = lengths
    batch_size, _, seqlen_q, _ = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out: Tensor = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q.to(torch.int32),
        cu_seqlens_k.to(torch.int32),
        int(max_seqlen_q),
        int(max_seqlen_k),
        softmax_scale=scaling,
        causal=is_causal,
        window_size=(-1, -1) if window is None else window,
        softcap=0.0 if softcap is None else softcap,
    )
    return out.unflatten(0, (batch_size, seqlen_q)).contiguous()
