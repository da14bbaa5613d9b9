"""`capture_router`: the probabilities by which a mixture of experts routes tokens."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime import checks
from .decoder import decoder_stack, layer_numbers, layer_of
from .router_check import check_call, check_router, routing_of
from .visibility import Rows

_OP = "capture_router"
_NAMES = ("gate", "router")  # of the module beside a block's `experts` that chooses among them


@dataclass(frozen=True)
class _Call:
    """What one layer's router made of a forward: logits [B, T, E], chosen experts [B, T, k]."""

    logits: Tensor
    experts: Tensor


class RoutedForward:
    """The routing of one forward in the captured layers.

    Where several layers were captured, the argument `layer` of a method names one by its number,
    negative from the end. None stands for the only one. `rows` are a slice or (start, stop) out of
    the T tokens; default those of the capture.
    """

    def __init__(self, calls: dict[int, _Call], num_layers: int, rows: Rows) -> None:
        self._calls, self._num_layers, self._rows = calls, num_layers, rows

    def logits(self, layer: int | None = None, *, rows: Rows = None) -> Tensor:
        """The router's logits [B, T, E] in its own dtype; part of the graph."""
        return self._cut(self._call(layer).logits, rows)

    def experts(self, layer: int | None = None, *, rows: Rows = None) -> Tensor:
        """The experts that were chosen for each token: int64 [B, T, k], in no order."""
        return self._cut(self._call(layer).experts, rows)

    def policy(
        self, layer: int | None = None, *, rows: Rows = None, renormalised: bool = False
    ) -> Tensor:
        """The probability of each expert: the softmax of the logits, before the top k are taken.

        Args:
            layer, rows: see the class.
            renormalised: over the k chosen experts alone, 0 elsewhere: the shares by which their
                outputs are summed, where the model renormalises them.

        Returns:
            [B, T, E] in float32 (float64 from float64 logits), each row with the sum 1;
            differentiable.
        """
        checks.check_flag(_OP, "renormalised", renormalised)
        logits = self.logits(layer, rows=rows)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        if not renormalised:
            return logits.softmax(-1, dtype=dtype)
        experts = self.experts(layer, rows=rows)
        shares = logits.gather(-1, experts).softmax(-1, dtype=dtype)
        return torch.zeros_like(logits, dtype=dtype).scatter(-1, experts, shares)

    def snapshot(
        self, layer: int | None = None, *, rows: Rows = None, renormalised: bool = False
    ) -> Tensor:
        """`policy` now, as the reference of a later one: without its graph."""
        return self.policy(layer, rows=rows, renormalised=renormalised).detach()

    def load(
        self, layer: int | None = None, *, rows: Rows = None, mask: Tensor | None = None
    ) -> Tensor:
        """How many choices fell on each expert.

        Args:
            layer, rows: see the class.
            mask: bool [B, T] of these rows, True = a token that counts; default all.

        Returns:
            float32 [E]; k for each token that counts, in sum. Without gradient.
        """
        experts, num_experts = self.experts(layer, rows=rows), self._call(layer).logits.shape[-1]
        counts = torch.ones(experts.shape[:2], dtype=torch.bool, device=experts.device)
        if mask is not None:
            checks.check_tensor(_OP, "mask", mask, "None or a bool [B, T] tensor")
            if mask.dtype != torch.bool or mask.shape != counts.shape:
                raise ValueError(
                    f"{_OP}: mask must be bool [B, T] = {tuple(counts.shape)}; got "
                    f"{checks.dtype_name(mask.dtype)} {tuple(mask.shape)}"
                )
            counts = mask
        # One-hot and not `bincount`, which on a GPU neither repeats bit for bit nor runs unwaited.
        chosen = experts[..., None] == torch.arange(num_experts, device=experts.device)
        return (chosen & counts[..., None, None]).sum((0, 1, 2)).float()

    def _call(self, layer: int | None) -> _Call:
        return layer_of(_OP, self._calls, layer, self._num_layers)

    def _cut(self, x: Tensor, rows: Rows) -> Tensor:
        start, stop = checks.resolve_rows(_OP, self._rows if rows is None else rows, x.shape[1])
        return x[:, start:stop]


class RouterCapture(RoutedForward):
    """Capture how a mixture of experts routes tokens, while the model runs.

        with rk.capture_router(model, layers="all", rows=response) as routed:
            logits = model(**inputs).logits
        p = routed.policy(layer=0)                                       # [B, T, E]
        loss = ... + rk.policy_loss(p, reference, advantages, mask, logits=False)

    The routers must choose the k most probable experts by a softmax over their logits, as in
    Qwen3-MoE, Qwen3-VL-MoE and Mixtral. Each is tried on random tokens when the capture is made, or
    judged by its first call where it cannot be tried; its class does not matter. Refused are
    sigmoids, biases of the choice and groups of experts: under them no distribution over experts
    decides.

    Gradients flow into the logits, and from there into the model. The model does not change, and
    its balance loss stays. Capture works with padding, autocast, LoRA, and with gradient
    checkpointing that is not reentrant: its recomputation is not captured again. A model under
    torch.compile is refused: a graph that was compiled before runs without hooks.

    The methods refer to the last forward; `forwards`, `captured[i]` and `len(captured)` to all
    since the capture was opened. They work inside the `with` and after it. Each step of a
    `generate()` is a forward of its own.

    Args:
        model: a transformers model, or a module that holds one.
        layers: numbers of text decoder layers with a router, negative from the end: an int, a
            sequence, or "all" that have one.
        rows: the tokens that the methods use by default; None for all.
        detach: keep the logits without their graph.

    Attributes:
        layers: the numbers of the captured layers.

    Raises:
        TypeError, ValueError: an argument of a wrong type or value.
        NotImplementedError: the model has no routers, or what they choose by is no distribution.
    """

    def __init__(
        self,
        model: Any,
        layers: int | list[int] | tuple[int, ...] | str = -1,
        *,
        rows: Rows = None,
        detach: bool = False,
    ) -> None:
        checks.check_flag(_OP, "detach", detach)
        decoder, stack = decoder_stack(_OP, model)
        if any(map(_is_compiled, model.modules())):
            raise NotImplementedError(
                f"{_OP}: model must not be compiled; got one under torch.compile, whose graph may "
                "run without the capture"
            )
        found = {number: _router_of(layer) for number, layer in enumerate(stack)}
        having = [number for number, router in found.items() if router is not None]
        if not having:
            raise NotImplementedError(
                f"{_OP}: model must have blocks of `experts` with a `gate` or `router` beside "
                f"them; found none in {type(decoder).__name__}"
            )
        everything = isinstance(layers, str) and layers == "all"
        self.layers = having if everything else layer_numbers(_OP, layers, len(stack))
        config: Any = decoder.config
        hidden_size: int = config.hidden_size
        self._places: list[tuple[nn.Module, nn.Module]] = []
        for number in self.layers:
            router = found[number]
            if router is None:
                raise NotImplementedError(
                    f"{_OP}: layers must pick layers with a router, which are "
                    f"{', '.join(map(str, having))} of this model; got {number}"
                )
            check_router(_OP, router, hidden_size)
            self._places.append((stack[number], router))
        self._detach = detach
        self._open: ExitStack | None = None
        super().__init__({}, len(stack), rows)
        self.clear()

    def __enter__(self) -> RouterCapture:
        if self._open is not None:
            raise RuntimeError(f"{_OP}: this capture is open already; nest another one")
        for layer, _ in self._places:
            _check_checkpointing(layer)
        self.clear()
        with ExitStack() as stack:
            for number, (layer, router) in enumerate(self._places):
                stack.enter_context(_Hooks(layer, router, self._seen[number], self._detach))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        stack, self._open = self._open, None
        assert stack is not None
        stack.close()

    def clear(self) -> None:
        """Forget what was captured so far."""
        if self._open is None:
            self._seen: list[list[_Call]] = [[] for _ in self._places]
        else:  # the hooks hold these
            for seen in self._seen:
                seen.clear()

    @property
    def forwards(self) -> list[RoutedForward]:
        """All forwards since the capture was opened, in order.

        Raises:
            RuntimeError: a forward ended in some captured layers only.
        """
        if len({len(seen) for seen in self._seen}) > 1:
            raise RuntimeError(
                f"{_OP}: every forward must run through all captured layers; one was interrupted. "
                "Call clear() and run it again"
            )
        return [
            RoutedForward(dict(zip(self.layers, calls, strict=True)), self._num_layers, self._rows)
            for calls in zip(*self._seen, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.forwards)

    def __bool__(self) -> bool:
        return True  # also when it is empty

    def __getitem__(self, index: int) -> RoutedForward:
        return self.forwards[index]

    def _call(self, layer: int | None) -> _Call:
        forwards = self.forwards
        if not forwards:
            raise RuntimeError(
                f"{_OP}: a forward must run inside the `with` first; none reached the routers"
            )
        return forwards[-1]._call(layer)


class _Hooks:
    """Hooks on a layer and its router, for the time of a `with`, that append to `seen`.

    Only logits and choices are kept, and nothing is computed from them here: a checkpoint counts
    the tensors that a layer saves for its backward, and the hooks may be gone when it recomputes.
    """

    def __init__(
        self, layer: nn.Module, router: nn.Module, seen: list[_Call], detach: bool
    ) -> None:
        self._layer, self._router, self._seen, self._detach = layer, router, seen, detach
        self._shape: torch.Size | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        self._handles = [
            self._layer.register_forward_pre_hook(self._before_layer, with_kwargs=True),
            self._router.register_forward_hook(self._after_router),
        ]

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _before_layer(self, layer: nn.Module, args: Any, given: dict[str, Any]) -> None:
        hidden_states = args[0] if args else given["hidden_states"]
        self._shape = hidden_states.shape[:2]  # routers get tokens without it

    def _after_router(self, router: nn.Module, args: Any, output: Any) -> None:
        if torch._C._current_graph_task_id() != -1:
            return  # a checkpoint recomputes the layer in the backward
        routing = routing_of(_OP, router, output)
        check_call(_OP, router, routing)
        logits, _, experts = routing
        assert self._shape is not None  # a router runs inside its layer
        logits = logits.detach() if self._detach else logits
        self._seen.append(_Call(*(x.view(*self._shape, -1) for x in (logits, experts))))


def _router_of(layer: nn.Module) -> nn.Module | None:
    """The module beside the layer's `experts` that chooses among them."""
    for block in layer.modules():
        inside = block._modules
        if inside.get("experts") is not None:
            for name in _NAMES:
                router = inside.get(name)
                if router is not None:
                    return router
    return None


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def _check_checkpointing(layer: nn.Module) -> None:
    """A reentrant checkpoint runs its layer without a graph, which would cut the logits out."""
    function = getattr(layer, "_gradient_checkpointing_func", None)
    given = getattr(function, "keywords", {})
    checkpoints = layer.training and getattr(layer, "gradient_checkpointing", False)
    if checkpoints and torch.is_grad_enabled() and given.get("use_reentrant"):
        raise NotImplementedError(
            f"{_OP}: gradient checkpointing must not be reentrant; enable it with "
            "gradient_checkpointing_kwargs={'use_reentrant': False}"
        )


capture_router = RouterCapture  # `with capture_router(model) as routed:`
