"""`capture`: q and k of chosen decoder layers, under any attention, and their policies."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import Tensor

from ...ops.divergence.arguments import Kind
from ...runtime import checks
from ...sharded import ShardedPolicy
from ...snapshot import AttentionSnapshot
from ...spans import Spans
from ...targets import AttentionTarget
from .captured import CapturedLayer
from .decoder import find_layers, layer_of
from .tap import Call, Sink, Tap, tapped

_OP = "capture"


class CapturedForward:
    """The captured layers of one forward or one generation.

    It has the methods of `CapturedLayer`. Where several layers were captured, `layer` names one.
    """

    def __init__(self, layers: dict[int, CapturedLayer], num_layers: int) -> None:
        self._layers, self._num_layers = layers, num_layers

    def layer(self, index: int | None = None) -> CapturedLayer:
        """One of the captured layers, by its number, negative from the end; None for the only one.

        Raises:
            ValueError: the layer was not captured, or None stands for several.
        """
        return layer_of(_OP, self._layers, index, self._num_layers)

    def q(self, layer: int | None = None) -> Tensor:
        """See `CapturedLayer.q`."""
        return self.layer(layer).q

    def k(self, layer: int | None = None) -> Tensor:
        """See `CapturedLayer.k`."""
        return self.layer(layer).k

    @property
    def cu_seqlens(self) -> Tensor | None:
        """See `CapturedLayer.cu_seqlens`; the same for all layers."""
        return next(iter(self._layers.values())).cu_seqlens

    def options(self, layer: int | None = None, **options: Any) -> dict[str, Any]:
        """See `CapturedLayer.options`."""
        return self.layer(layer).options(**options)

    def policy(self, layer: int | None = None, **options: Any) -> Tensor:
        """See `CapturedLayer.policy`."""
        return self.layer(layer).policy(**options)

    def marginals(self, layer: int | None = None, **options: Any) -> Tensor:
        """See `CapturedLayer.marginals`."""
        return self.layer(layer).marginals(**options)

    def snapshot(self, layer: int | None = None, **options: Any) -> AttentionSnapshot:
        """See `CapturedLayer.snapshot`."""
        return self.layer(layer).snapshot(**options)

    def sharded(self, layer: int | None = None, **options: Any) -> ShardedPolicy:
        """See `CapturedLayer.sharded`."""
        return self.layer(layer).sharded(**options)

    def divergence(
        self,
        reference: Tensor | AttentionSnapshot | AttentionTarget,
        kind: Kind = "jsd",
        *,
        layer: int | None = None,
        **options: Any,
    ) -> Tensor:
        """See `CapturedLayer.divergence`."""
        return self.layer(layer).divergence(reference, kind, **options)

    def ral_loss(
        self,
        reference: Tensor | AttentionSnapshot | AttentionTarget,
        advantages: Tensor,
        mask: Tensor | None = None,
        *,
        layer: int | None = None,
        **options: Any,
    ) -> Tensor:
        """See `CapturedLayer.ral_loss`."""
        return self.layer(layer).ral_loss(reference, advantages, mask, **options)


class Capture(CapturedForward):
    """Capture q and k of decoder layers while the model runs, under any attention.

        with rk.capture(model, layers=-1) as captured:
            logits = model(**inputs).logits
        loss = ... + coefficient * captured.ral_loss(reference, advantages, mask, rows=rows)

    q and k are those after RoPE, as the layer's attention gets them, and part of the graph. The
    model's attention itself does not change: sdpa, eager, flash attention, flex attention or "ral".
    Capture works with torch.compile, autocast, LoRA, DDP and FSDP. While it is open, a captured
    layer is exempt from gradient checkpointing, because a checkpoint would cut q and k out of the
    graph. Under FSDP2 the loss must also depend on the model's output, whose backward gathers the
    parameters.

    The methods (`policy`, `marginals`, `snapshot`, `ral_loss`, `divergence`, `sharded`, `q`, `k`,
    `options`) and `cu_seqlens` refer to the last forward. `forwards`, `captured[i]` and
    `len(captured)` refer to all forwards since the capture was opened. They work inside the `with`
    and after it. q and k live as long as the capture, or until `clear()` or the next `with`.

    A `generate()` counts as one forward with a row for each generated token: the query that
    produced it, at the position of the token before. It keeps one cache, not one for each step.
    Greedy search and sampling with a dynamic cache are supported. Other generations raise when a
    method needs their keys.

    At the end of the `with`, also after an exception, the model is as it was. Captures may be
    nested, with each other and with `steer`.

    Args:
        model: a transformers model, or a module that holds one (DDP, FSDP, peft, torch.compile).
        layers: numbers of text decoder layers, negative from the end: an int, a sequence, or "all".
        rows: the rows that the methods use by default: a slice or (start, stop) out of a
            forward's queries, or one for each packed sequence. None: all rows of a forward, and of
            a generation those that produced its tokens; rows of the prompt are then dropped. "all"
            also keeps those of the prompt.
        spans, scope: defaults for the methods.
        detach: keep q and k without their graph.

    Raises:
        TypeError, ValueError: an argument of a wrong type or value.
        NotImplementedError: the model's decoder layers are not found, or not usable.
    """

    def __init__(
        self,
        model: Any,
        layers: int | list[int] | tuple[int, ...] | str = -1,
        *,
        rows: slice | tuple[int, int] | str | None = None,
        spans: Spans | None = None,
        scope: Tensor | Spans | None = None,
        detach: bool = False,
    ) -> None:
        if isinstance(rows, str) and rows != "all":
            raise ValueError(
                f"{_OP}: rows must be None, a slice, (start, stop) or 'all'; got {rows!r}"
            )
        if spans is not None and not isinstance(spans, Spans):
            raise TypeError(f"{_OP}: spans must be None or Spans; got {type(spans).__name__}")
        checks.check_flag(_OP, "detach", detach)
        self._found = find_layers(_OP, model, layers)
        self._num_layers = self._found[0].count
        self._rows, self._spans, self._scope, self._detach = rows, spans, scope, detach
        self._open: ExitStack | None = None
        self._sinks: list[Sink] = []
        self.clear()

    def __enter__(self) -> Capture:
        if self._open is not None:
            raise RuntimeError(f"{_OP}: this capture is open already; nest another one")
        self.clear()
        with ExitStack() as stack:
            stack.enter_context(tapped(self._found, self._open_tap, self._close_tap))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        stack, self._open = self._open, None
        assert stack is not None
        stack.close()

    def _open_tap(self, tap: Tap, number: int) -> None:
        tap.sinks = (*tap.sinks, self._sinks[number])

    def _close_tap(self, tap: Tap) -> None:
        tap.sinks = tuple(sink for sink in tap.sinks if sink not in self._sinks)

    def clear(self) -> None:
        """Forget what was captured so far."""
        if self._open is None:
            keep = self._rows is not None
            self._sinks = [Sink(detach=self._detach, keep_prompt_rows=keep) for _ in self._found]
        else:  # the taps hold these
            for sink in self._sinks:
                sink.newest = sink.last_k = None
        self._grouped: tuple[list[Call | None], list[CapturedForward]] = ([], [])

    @property
    def layers(self) -> list[int]:
        """The numbers of the captured layers."""
        return [layer.index for layer in self._found]

    @property
    def cu_seqlens(self) -> Tensor | None:
        """Offsets of the packed sequences of the last forward; see `CapturedLayer.cu_seqlens`."""
        return self.layer(self.layers[0]).cu_seqlens

    @property
    def forwards(self) -> list[CapturedForward]:
        """All forwards and generations, in order.

        Raises:
            RuntimeError: a forward ended in some captured layers only.
        """
        newest = [sink.newest for sink in self._sinks]
        if newest != self._grouped[0]:
            self._grouped = newest, self._group()
        return self._grouped[1]

    def __len__(self) -> int:
        return len(self.forwards)

    def __bool__(self) -> bool:
        return True  # also when it is empty

    def __getitem__(self, index: int) -> CapturedForward:
        return self.forwards[index]

    def layer(self, index: int | None = None) -> CapturedLayer:
        """A layer of the last forward; see `CapturedForward.layer`."""
        forwards = self.forwards
        if not forwards:
            raise RuntimeError(
                f"{_OP}: a forward must run inside the `with` first; none reached the attention of "
                "the captured layers. A module that calls an attention kernel itself must call "
                "rk.record_attention"
            )
        return forwards[-1].layer(index)

    def _group(self) -> list[CapturedForward]:
        per_layer = [
            _layers_of(found.index, sink, self._default_rows(), self._spans, self._scope)
            for found, sink in zip(self._found, self._sinks, strict=True)
        ]
        if len({len(captured) for captured in per_layer}) > 1:
            raise RuntimeError(
                f"{_OP}: every forward must run through all captured layers; one was interrupted. "
                "Call clear() and run it again"
            )
        return [
            CapturedForward({layer.index: layer for layer in layers}, self._num_layers)
            for layers in zip(*per_layer, strict=True)
        ]

    def _default_rows(self) -> Any:
        return None if isinstance(self._rows, str) else self._rows


def _layers_of(index: int, sink: Sink, rows: Any, spans: Any, scope: Any) -> list[CapturedLayer]:
    """The calls of a layer as forwards: steps of a generation belong to what they continue."""
    groups: list[CapturedLayer] = []
    calls: list[Call] = []
    call, last_k = sink.newest, sink.last_k
    while call is not None:
        calls.insert(0, call)
        if not call.is_step:
            assert last_k is not None
            groups.insert(0, CapturedLayer(index, calls, last_k, rows, spans, scope))
            calls, last_k = [], call.last_k
        call = call.before
    return groups


capture = Capture  # `with capture(model) as captured:`
