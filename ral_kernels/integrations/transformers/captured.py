"""q and k that a capture took from one layer, and policies computed from them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ...ops import packing
from ...ops.attention import attention
from ...ops.divergence.arguments import Kind
from ...ops.policy import attention_divergence, attention_policy, ral_loss
from ...ops.policy.loss import Reduction
from ...runtime import checks
from ...runtime.backends import BackendName
from ...sharded import ShardedPolicy
from ...snapshot import AttentionSnapshot
from ...spans import Spans
from ...targets import AttentionTarget
from .registration import NAME as RAL
from .tap import Call
from .visibility import (
    PACKED_BY_MASK_ALONE,
    Rows,
    Visibility,
    allowed,
    packed_by_position,
    read_dense_mask,
    read_packed_mask,
    read_simple_mask,
    window_of,
)

_OP = "capture"


class CapturedLayer:
    """q and k of one layer in one forward or one generation, as its attention got them.

    The methods pass the layer's scale, window, soft cap, causality and key padding to the policy
    ops. Gradients flow into q and k and from there into the model, unless the forward ran without
    gradients.

    A generation has one row for each generated token: the query that produced it, at the position
    of the token before. Rows of the prompt come first, if the capture keeps them.

    A packed call (`cu_seqlens`) holds S sequences one after another, in a batch of 1. `rows` is
    then None or (start, stop) for each, relative to its own tokens. Results are [1, T, ...] for the
    T rows of all sequences. The forward says so itself, under every attention: by positions that
    restart, or under "ral" and flash attention by cu_seq_lens_q and cu_seq_lens_k.

    Attributes:
        index: the layer's number.
        num_generated: rows of a generation; 0 for a forward.
    """

    def __init__(
        self, index: int, calls: list[Call], last_k: Tensor, rows: Any, spans: Any, scope: Any
    ) -> None:
        self.index = index
        self._calls, self._last_k = calls, last_k
        self._rows, self._spans, self._scope = rows, spans, scope
        self._joined: tuple[Tensor, Tensor] | None = None
        self._heads: list[int] | None = None  # of the layer's query heads; None = all
        self._seen: dict[tuple[int, int], Visibility] = {}

    @property
    def num_generated(self) -> int:
        return len(self._calls) if len(self._calls) > 1 else 0

    @property
    def q(self) -> Tensor:
        """[B, H, T, D] queries after RoPE; query t is at the position of key N - T + t."""
        return self._join()[0]

    @property
    def k(self) -> Tensor:
        """[B, Hk, N, D] keys after RoPE, those of the cache included."""
        return self._join()[1]

    @property
    def cu_seqlens(self) -> Tensor | None:
        """int32 [S + 1], the offsets of S packed sequences; None where the call is not packed."""
        seen = self._packed
        return None if seen is None else seen.cu_seqlens

    @property
    def scoring(self) -> dict[str, Any]:
        """scale, window and softcap of the layer, as the policy ops take them, whatever its mask.

        For rows and keys that the caller cuts out of q and k, such as one packed sequence. Whether
        these rows see exactly those keys, the caller must know.

        Raises:
            NotImplementedError: an argument of the attention may keep it from being a softmax of
                q kᵀ.
        """
        self._refuse_keywords()
        first = self._calls[0]
        return {
            "scale": first.scaling,
            "window": window_of(first.sliding_window, first.is_causal),
            "softcap": first.softcap,
        }

    def options(self, rows: Rows = None) -> dict[str, Any]:
        """Keyword arguments of the policy ops under which q and k give this layer's attention.

        Args:
            rows: the queries that they are for; default all. The mask may be non-causal elsewhere
                (images that attend both ways), if the chosen rows see what a causal mask shows.

        Returns:
            is_causal, scale, window, softcap and key_padding_mask (bool [B, N] or None), as
            `attention_policy`, `ral_loss` and `attention_divergence` take them. Of a packed call
            also cu_seqlens_q and cu_seqlens_k, and all rows.

        Raises:
            NotImplementedError: the ops do not support how these rows attend.
        """
        self._refuse()
        seen = self._packed
        if seen is None:
            seen = self._visibility(*checks.resolve_rows(_OP, rows, self.q.shape[2]))
        first = self._calls[0]
        options = {
            "is_causal": seen.is_causal,
            "scale": first.scaling,
            "window": seen.window,
            "softcap": first.softcap,
            "key_padding_mask": seen.key_padding_mask,
        }
        if seen.cu_seqlens is not None:
            options.update(cu_seqlens_q=seen.cu_seqlens, cu_seqlens_k=seen.cu_seqlens)
        return options

    def policy(
        self,
        *,
        rows: Rows = None,
        spans: Spans | None = None,
        scope: Tensor | Spans | None = None,
        head_weights: Tensor | None = None,
        exclude_self: bool = True,
        steered: bool = True,
        backend: BackendName | None = None,
    ) -> Tensor:
        """The layer's attention policy: `attention_policy` of its q and k.

        It equals the mean over heads of eager's `output_attentions`, without each row's own key,
        renormalised. A row of padding is 0; eager attends uniformly there.

        Args:
            rows: out of the T rows of `q`; default the capture's.
            spans: over spans instead of keys; default the capture's. Spans of fewer keys than N are
                extended: later keys, such as generated ones, belong to no span.
            scope: as in `attention_policy`; default the capture's. A bool tensor over fewer keys is
                extended with False.
            head_weights: as in `attention_policy`; after `of_heads`, of the heads that are left.
            exclude_self, backend: as in `attention_policy`.
            steered: with the bias of the `steer` that the forward ran under, if any; needs the
                spans of that `steer`. False for the policy of the same q and k without it.

        Returns:
            float32 [B, T, N], or [B, T, S] over spans; differentiable.
        """
        return attention_policy(
            self.q, self.k, head_weights=head_weights, exclude_self=exclude_self, backend=backend,
            **self._arguments(rows, spans, scope, steered),
        )  # fmt: skip

    def divergence(
        self,
        reference: Tensor | AttentionSnapshot | AttentionTarget,
        kind: Kind = "jsd",
        *,
        rows: Rows = None,
        spans: Spans | None = None,
        scope: Tensor | Spans | None = None,
        head_weights: Tensor | None = None,
        exclude_self: bool = True,
        steered: bool = True,
        backend: BackendName | None = None,
    ) -> Tensor:
        """How far the layer's policy is from `reference`: `attention_divergence`, float32 [B, T].

        The other arguments are those of `policy`.
        """
        return attention_divergence(
            self.q, self.k, reference, kind, head_weights=head_weights, exclude_self=exclude_self,
            backend=backend, **self._arguments(rows, spans, scope, steered),
        )  # fmt: skip

    def ral_loss(
        self,
        reference: Tensor | AttentionSnapshot | AttentionTarget,
        advantages: Tensor,
        mask: Tensor | None = None,
        *,
        kind: Kind = "jsd",
        reduction: Reduction = "token_mean",
        rows: Rows = None,
        spans: Spans | None = None,
        scope: Tensor | Spans | None = None,
        head_weights: Tensor | None = None,
        exclude_self: bool = True,
        steered: bool = True,
        backend: BackendName | None = None,
    ) -> Tensor:
        """The RAL objective of the layer's policy: `ral_loss`, a float32 scalar.

        The other arguments are those of `policy`. Under FSDP2 add it to a loss that touches the
        model's output: parameters are gathered for the backward from there.
        """
        return ral_loss(
            self.q, self.k, reference, advantages, mask, kind=kind, reduction=reduction,
            head_weights=head_weights, exclude_self=exclude_self, backend=backend,
            **self._arguments(rows, spans, scope, steered),
        )  # fmt: skip

    def snapshot(
        self,
        *,
        rows: Rows = None,
        steered: bool = True,
        **options: Any,
    ) -> AttentionSnapshot:
        """The layer's policy now, as a reference policy: `AttentionSnapshot` of its q and k.

        Args:
            rows: out of the T rows of `q`; default the capture's.
            steered: as in `policy`.
            options: head_weights, dtype, device, pin_memory, group_size, shared_prefix, as in
                `AttentionSnapshot`.
        """
        arguments = self._arguments(rows, None, None, steered, any_spans=True)
        for name in ("spans", "scope", "key_padding_mask"):  # the comparing call's
            del arguments[name]
        return AttentionSnapshot(self.q, self.k, **arguments, **options)

    def marginals(
        self,
        *,
        rows: Rows = None,
        spans: Spans | None = None,
        head_reduction: Literal["mean"] | None = None,
        steered: bool = True,
        backend: BackendName | None = None,
    ) -> Tensor:
        """The attention of each head on each span: the marginals of `attention`.

        Unlike a policy they include the row's own key and are not renormalised.

        Args:
            rows, spans, steered: as in `policy`; there must be spans.
            head_reduction: "mean" averages over heads.

        Returns:
            float32 [B, H, T, S], or [B, T, S] with head_reduction; differentiable.
        """
        arguments = self._arguments(rows, spans, None, steered)
        del arguments["scope"]
        if arguments["spans"] is None:
            raise ValueError(f"{_OP}.marginals: spans must be given, here or to capture; got None")
        chosen = arguments.pop("rows")
        if self.cu_seqlens is None:
            return self._marginals(chosen, (0, self.k.shape[2]), head_reduction, backend, arguments)
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            del arguments[name]
        bias, parts, done = arguments.pop("span_bias", None), [], 0
        for first, start, stop in self._packed_rows(chosen):
            own = dict(arguments)
            if bias is not None:
                at = slice(None) if bias.shape[2] == 1 else slice(done, done + stop - start)
                own["span_bias"] = bias[:, :, at]
            done += stop - start
            parts.append(
                self._marginals((start, stop), (first, stop), head_reduction, backend, own)
            )
        return torch.cat(parts, dim=1 if head_reduction else 2)

    def _marginals(
        self,
        rows: tuple[int, int],
        keys: tuple[int, int],
        head_reduction: Literal["mean"] | None,
        backend: BackendName | None,
        arguments: dict[str, Any],
    ) -> Tensor:
        """Those of `rows` over a sequence's keys, a half-open range of the tokens."""
        q, k, (start, stop) = self.q, self.k, rows
        first, last = keys
        arguments = dict(arguments)
        if arguments["is_causal"]:
            # Rows before `start` need no attention, and no row sees a key after the last one.
            last = min(last, k.shape[2] - q.shape[2] + stop)
            q, k = q[:, :, start:stop], k[:, :, first:last]
            cut = arguments["spans"].ids[..., first:last].contiguous()
            arguments["spans"] = arguments["spans"]._replace(cut, arguments["spans"].num_spans)
            if arguments["key_padding_mask"] is not None:
                arguments["key_padding_mask"] = arguments["key_padding_mask"][:, first:last]
        else:
            arguments["rows"] = rows
        values = k[..., :1].detach()  # `out` is not used, so values are one column
        return attention(
            q, k, values, head_reduction=head_reduction, backend=backend, **arguments
        ).marginals

    def sharded(self, **options: Any) -> ShardedPolicy:
        """The policy of a sequence of which this rank's forward had a part: `ShardedPolicy`.

        The layer's scale, window and soft cap are given, and the capture's rows, spans and scope.
        The forward's mask is not read: it says nothing of other ranks' keys.

        Args:
            options: those of `ShardedPolicy`, such as layout, group and rows.

        Raises:
            NotImplementedError: a generation, or an argument that may change the layer's attention.
        """
        self._refuse()
        if self._heads is not None:
            raise NotImplementedError(f"{_OP}.sharded: it must have all heads; got {self._heads}")
        first, *steps = self._calls
        if steps or first.steering is not None:
            raise NotImplementedError(
                f"{_OP}.sharded: it must be a forward without `steer`; got "
                f"{'a generation' if steps else 'a steered one'}"
            )
        given = {
            "rows": self._rows,
            "spans": self._spans,
            "scope": self._scope,
            "scale": first.scaling,
            "window": window_of(first.sliding_window, is_causal=True),
            "softcap": first.softcap,
        }
        return ShardedPolicy(first.q, first.k, **{**given, **options})

    def of_heads(self, heads: Sequence[int]) -> CapturedLayer:
        """The same layer with some of its query heads alone, and the key heads that they attend to.

        Its policy is the mean over these heads. Queries share key heads as in the whole layer. The
        other heads take no work, whereas `head_weights` computes all of them.

        Args:
            heads: numbers of query heads, in [0, H), each once. They are taken in rising order.

        Raises:
            TypeError: something else than ints.
            ValueError: no head, a head twice, or one that the layer does not have.
        """
        count = self.q.shape[1]
        chosen = heads_in_order(_OP, heads, count)
        size = count // self.k.shape[1]  # query heads of a key head
        of_keys = [head // size for head in chosen]
        shared = sorted(set(of_keys))
        if len({of_keys.count(number) for number in shared}) == 1:
            of_keys = shared  # groups of one size: queries still share
        made = copy.copy(self)
        with torch.enable_grad():
            made._joined = self.q[:, chosen], self.k[:, of_keys]
        made._heads = chosen if self._heads is None else [self._heads[head] for head in chosen]
        return made

    # -- inside ----------------------------------------------------------------------------------

    def _join(self) -> tuple[Tensor, Tensor]:
        if self._joined is None:
            # With gradients, because the result is kept and a later call may need them.
            with torch.enable_grad():
                self._joined = self._join_calls()
        return self._joined

    def _join_calls(self) -> tuple[Tensor, Tensor]:
        first, *steps = self._calls
        q, k = first.q, first.k[:, :, : self._first_keys()[0]]
        if steps:
            q = torch.cat([q, *(step.q for step in steps)], dim=2)
            k = torch.cat([k, *(step.k for step in steps)], dim=2)
            kept = self._last_k.shape[2]
            if kept > k.shape[2] or not torch.equal(k[:, :, k.shape[2] - kept :], self._last_k):
                raise NotImplementedError(
                    f"{_OP}: a generation must extend its cache by the key of each token; the "
                    "keys of this one were reordered or rounded (beam search, assisted "
                    "decoding, a static or quantised cache)"
                )
        return q, k

    def _first_keys(self) -> tuple[int, Visibility | None]:
        """The number of keys of the first call, and what its mask says if it is not dense."""
        first = self._calls[0]
        seqlen_k = first.k.shape[2]
        simple = read_simple_mask(
            _OP,
            first.mask,
            seqlen_q=first.seqlen_q,
            seqlen_k=seqlen_k,
            implementation=first.implementation,
            is_causal=first.is_causal,
            sliding_window=first.sliding_window,
            config=first.config,
        )
        return (seqlen_k, None) if simple is None else simple

    def _visibility(self, start: int, stop: int) -> Visibility:
        """What these rows of `q` see, checked against the masks of the calls."""
        if (start, stop) not in self._seen:
            self._seen[start, stop] = self._read_masks(start, stop)
        return self._seen[start, stop]

    def _read_masks(self, start: int, stop: int) -> Visibility:
        first, *steps = self._calls
        num_keys, seen = self._first_keys()
        if seen is None:
            # The rows as queries of the first call; those of steps come after its last.
            shift = first.seqlen_q - (self.q.shape[2] - len(steps))
            seen = read_dense_mask(
                _OP,
                first.mask,
                (min(start + shift, first.seqlen_q), min(stop + shift, first.seqlen_q)),
                seqlen_q=first.seqlen_q,
                seqlen_k=num_keys,
                is_causal=first.is_causal,
                sliding_window=first.sliding_window,
            )
        if not steps:
            return seen
        padding = seen.key_padding_mask
        if padding is not None:
            padding = torch.nn.functional.pad(padding, (0, len(steps)), value=True)
        seen = Visibility(seen.is_causal, seen.window, padding)
        self._check_last_step(seen)
        return seen

    def _check_last_step(self, seen: Visibility) -> None:
        """The last step's mask covers every key: it must be what the prompt's mask implies."""
        step, kept, total = self._calls[-1], self._last_k.shape[2], self.k.shape[2]
        simple = read_simple_mask(
            _OP,
            step.mask,
            seqlen_q=1,
            seqlen_k=kept,
            implementation=step.implementation,
            is_causal=step.is_causal,
            sliding_window=step.sliding_window,
            config=step.config,
        )
        device = step.q.device
        if simple is None:
            got = allowed(_OP, step.mask, 1, kept)
        else:
            got = simple[1].rows(0, 1, 1, kept, device)
        wanted = seen.rows(total - 1, total, total, total, device)[..., total - kept :]
        if not bool((got == wanted).all()):
            raise NotImplementedError(
                f"{_OP}: tokens of a generation must see the prompt without its padding, and what "
                "was generated before them, within the layer's window; the mask of the last step "
                "differs"
            )

    def _refuse_keywords(self) -> None:
        for call in self._calls:
            if call.refused is not None:
                raise NotImplementedError(
                    f"{_OP}: a policy must be the softmax of q kᵀ over keys; layer {self.index} "
                    f"was given {call.refused!r}, which may change its attention"
                )

    def _refuse(self) -> None:
        self._refuse_keywords()
        first = self._calls[0]
        for call in self._calls:
            if call.steering is not first.steering:
                raise NotImplementedError(
                    f"{_OP}: a generation must be steered in the same way from its start to its end"
                )

    @functools.cached_property
    def _packed(self) -> Visibility | None:
        """What rows of packed sequences see; None where the call is not packed."""
        first, *steps = self._calls
        if steps:
            return None
        sizes = {"seqlen_q": first.seqlen_q, "seqlen_k": first.k.shape[2]}
        if self._first_keys()[1] is None:
            return read_packed_mask(
                _OP, first.mask, first.position_ids, sliding_window=first.sliding_window, **sizes
            )
        if first.mask is not None or first.implementation in PACKED_BY_MASK_ALONE:
            return None
        cu_seqlens, of_keys = first.cu_seq_lens
        if cu_seqlens is None and first.implementation != RAL:
            cu_seqlens = of_keys = packed_by_position(first.position_ids, **sizes)
        if cu_seqlens is None:
            return None
        if not torch.equal(cu_seqlens, of_keys):
            raise NotImplementedError(
                f"{_OP}: packed sequences must have a query for each key; cu_seq_lens_q and "
                "cu_seq_lens_k of this call differ"
            )
        if not first.is_causal:
            raise NotImplementedError(
                f"{_OP}: packed sequences must be causal; got is_causal=False"
            )
        window = window_of(first.sliding_window, is_causal=True)
        return Visibility(True, window, None, cu_seqlens.to(torch.int32))

    def _packed_rows(self, rows: Any) -> list[tuple[int, int, int]]:
        """(first key, first row, row after the last) of each packed sequence, along the tokens."""
        bounds = self.cu_seqlens
        packed = packing.resolve(_OP, self.q, self.k, bounds, bounds, rows)
        assert bounds is not None and packed is not None
        places = zip(
            bounds.tolist(), packed.query_starts.tolist(), packed.cu_seqlens_q.diff().tolist(),
            strict=False,  # the last offset begins no sequence
        )  # fmt: skip
        return [(first, first + start, first + start + count) for first, start, count in places]

    def _arguments(
        self, rows: Any, spans: Any, scope: Any, steered: bool, any_spans: bool = False
    ) -> dict[str, Any]:
        """Keyword arguments of an op, with the capture's defaults filled in."""
        checks.check_flag(_OP, "steered", steered)
        rows = self._rows if rows is None else rows
        spans = self._extend(self._spans if spans is None else spans)
        scope = self._extend(self._scope if scope is None else scope)
        if self.cu_seqlens is None:
            rows = checks.resolve_rows(_OP, rows, self.q.shape[2])
        arguments = self.options(rows)
        arguments.update(rows=rows, spans=spans, scope=scope)
        steering = self._calls[0].steering
        if steering is not None and steered:
            own = self._extend(steering.spans)
            if not any_spans and spans != own:
                raise NotImplementedError(
                    f"{_OP}: spans must be those of the steer that layer {self.index} ran under, "
                    "or steered must be False; got other spans"
                )
            arguments["span_bias"] = self._rows_of_bias(steering.bias, rows)
        return arguments

    def _rows_of_bias(self, bias: Tensor, rows: Any) -> Tensor:
        if self._heads is not None and bias.shape[1] > 1:
            bias = bias[:, self._heads]
        if bias.shape[2] == 1:
            return bias
        if self.cu_seqlens is None:
            return bias[:, :, slice(*rows)]
        ranges = self._packed_rows(rows)
        return torch.cat([bias[:, :, start:stop] for _, start, stop in ranges], dim=2)

    def _extend(self, keys: Any) -> Any:
        """Spans or a scope over the first keys, extended to all."""
        seqlen_k = self.k.shape[2]
        if isinstance(keys, Spans):
            return keys if keys.seqlen_k >= seqlen_k else keys.extend_to(seqlen_k)
        if isinstance(keys, Tensor) and keys.dim() > 0 and keys.shape[-1] < seqlen_k:
            return torch.nn.functional.pad(keys, (0, seqlen_k - keys.shape[-1]), value=False)
        return keys


def heads_in_order(op: str, heads: Any, count: int) -> list[int]:
    """Numbers of query heads, checked and in rising order.

    Args:
        op: named in errors.
        heads: a sequence of ints.
        count: how many heads the layer has.

    Raises:
        TypeError: something else than ints.
        ValueError: none, one twice, or one outside of [0, count).
    """
    if not isinstance(heads, Sequence) or not all(checks.is_int(head) for head in heads):
        raise TypeError(f"{op}: heads must be a sequence of ints; got {heads!r}")
    chosen = sorted(heads)
    if not chosen or len(set(chosen)) < len(chosen) or not 0 <= chosen[0] <= chosen[-1] < count:
        raise ValueError(
            f"{op}: heads must be different numbers in [0, {count}), one or more; got {heads!r}"
        )
    return chosen
