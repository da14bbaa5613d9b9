"""`steer`: a bias per span on the scores of chosen decoder layers while the model runs."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import Tensor

from ...ops.attention import attention
from ...runtime import checks
from ...spans import Spans
from .attention import refuse_unsupported
from .decoder import find_layers
from .tap import Tap, tapped
from .visibility import allowed, read_simple_mask

_OP = "steer"


class Steer:
    """Steer where decoder layers attend: a bias per span of keys on their scores.

        with rk.steer(model, span_bias, spans=spans, layers=-1):
            tokens = model.generate(**inputs)

        s = softcap(scale * q kᵀ) + span_bias[σ]        (eq. of `attention`; ∂lse/∂span_bias = m)

    The chosen layers run `ral_kernels.attention` with the bias, under the masks and padding that
    the model gives them. The other layers keep the model's own attention. In a `generate()` rows of
    generated tokens are steered too, and generated keys belong to no span. The bias may require
    grad: ∂loss/∂span_bias flows back from the model's output. While the steer is open, a steered
    layer is exempt from gradient checkpointing: a layer recomputed in the backward, after the
    `with`, would have no bias. A `capture` of a steered layer includes the bias.

    At the end of the `with`, also after an exception, the model is as it was. A layer has one steer
    at a time; several layers may each have their own.

    Args:
        model: a transformers model, or a module that holds one (DDP, FSDP, peft, torch.compile).
        span_bias: floating, [S], [B, S], or broadcastable to [B, H, T, S], in natural units: adding
            log 2 doubles a span's odds against the rest. A bias with T > 1 needs forwards of T
            queries.
        spans: S spans over the prompt's keys, padding included; later keys belong to none.
        layers: numbers of text decoder layers, negative from the end: an int, a sequence, or "all".

    Raises:
        TypeError, ValueError: an argument of a wrong type or value.
        NotImplementedError: the model's decoder layers are not found, or not usable; while the
            model runs: attention with sinks, a position bias, dropout or a paged cache.
    """

    def __init__(
        self,
        model: Any,
        span_bias: Tensor,
        *,
        spans: Spans,
        layers: int | list[int] | tuple[int, ...] | str = "all",
    ) -> None:
        if not isinstance(spans, Spans):
            raise TypeError(f"{_OP}: spans must be Spans; got {type(spans).__name__}")
        checks.check_tensor(_OP, "span_bias", span_bias, "a tensor [S], [B, S] or [B, H, T, S]")
        if not span_bias.is_floating_point():
            raise TypeError(
                f"{_OP}: span_bias must be floating; got {checks.dtype_name(span_bias.dtype)}"
            )
        if span_bias.dim() not in (1, 2, 4) or span_bias.shape[-1] not in (1, spans.num_spans):
            raise ValueError(
                f"{_OP}: span_bias must be [S], [B, S] or broadcastable to [B, H, T, S] with "
                f"S={spans.num_spans}; got {tuple(span_bias.shape)}"
            )
        if span_bias.dim() == 2:
            span_bias = span_bias[:, None, None]
        self.bias = span_bias.expand(*(1,) * (4 - span_bias.dim()), *span_bias.shape)
        self.spans = spans
        self._found = find_layers(_OP, model, layers)
        self._open: ExitStack | None = None

    def __enter__(self) -> Steer:
        if self._open is not None:
            raise RuntimeError(f"{_OP}: this steer is already open")
        with ExitStack() as stack:
            stack.enter_context(tapped(self._found, self._open_tap, self._close_tap))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        stack, self._open = self._open, None
        assert stack is not None
        stack.close()

    def _open_tap(self, tap: Tap, number: int) -> None:
        if tap.steering is not None:
            raise ValueError(
                f"{_OP}: layers must not be steered already; layer {self._found[number].index} is"
            )
        tap.steering = self
        tap.watch_cache()

    def _close_tap(self, tap: Tap) -> None:
        if tap.steering is self:
            tap.steering = None
            tap.unwatch_cache()

    def attend(
        self, tap: Tap, q: Tensor, k: Tensor, v: Tensor, mask: Any, given: dict[str, Any]
    ) -> tuple[Tensor, None]:
        """The layer's attention function: its call, with the bias.

        Returns:
            (out [B, T, H, Dv] contiguous, None), as attention functions return.
        """
        given = dict(given)
        dropout = given.pop("dropout", 0.0)
        scale, softcap = given.pop("scaling", None), given.pop("softcap", None)
        sliding_window, is_causal = given.pop("sliding_window", None), given.pop("is_causal", None)
        refuse_unsupported(tap.module, dropout, given)
        if is_causal is None:
            is_causal = bool(getattr(tap.module, "is_causal", True))
        batch_size, seqlen_q, seqlen_k = k.shape[0], q.shape[2], k.shape[2]
        bias_batch, _, bias_rows, _ = self.bias.shape
        # not `in`, which under torch.compile does not find sizes that are symbolic
        if not (bias_batch == 1 or bias_batch == batch_size) or not (
            bias_rows == 1 or bias_rows == seqlen_q
        ):
            raise ValueError(
                f"{_OP}: span_bias must be broadcastable to [B, H, T, S] with B={batch_size}, "
                f"T={seqlen_q}; got {tuple(self.bias.shape)} (generated tokens have T=1, and "
                "several sequences per prompt need a row each)"
            )
        simple = read_simple_mask(
            _OP,
            mask,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            implementation=tap.config._attn_implementation,
            is_causal=is_causal,
            sliding_window=sliding_window,
            config=tap.config,
        )
        ids = self._ids(tap, sliding_window, seqlen_q, seqlen_k)
        visible: dict[str, Any]
        if simple is None:  # a dense mask alone says which keys are seen
            if not isinstance(mask, Tensor):
                mask = allowed(_OP, mask, seqlen_q, seqlen_k)[:, None]
            visible = {"attn_mask": mask[..., :seqlen_k]}
        else:
            num_keys, seen = simple
            k, v, ids = k[:, :, :num_keys], v[:, :, :num_keys], ids[..., :num_keys]
            visible = {
                "is_causal": seen.is_causal,
                "window": seen.window,
                "key_padding_mask": seen.key_padding_mask,
            }
        out = attention(
            q,
            k,
            v,
            self.spans._replace(ids.contiguous(), self.spans.num_spans),
            span_bias=self.bias,
            scale=scale,
            softcap=softcap,
            **visible,
        ).out
        return out.transpose(1, 2).contiguous(), None

    def _ids(self, tap: Tap, window: int | None, seqlen_q: int, seqlen_k: int) -> Tensor:
        """The span of each key of a call; a sliding cache has no keys before its window."""
        dropped = 0
        if window is not None and seqlen_q < seqlen_k and tap.cache is not None:
            dropped = tap.cache.get_seq_length(tap.module.layer_idx) - seqlen_k
        if self.spans.seqlen_k > dropped + seqlen_k:
            raise ValueError(
                f"{_OP}: spans must cover no more than the keys, N={dropped + seqlen_k}; got "
                f"{self.spans.seqlen_k}"
            )
        return self.spans.extend_to(dropped + seqlen_k).ids[..., dropped:]


steer = Steer  # `with steer(model, ...):`
