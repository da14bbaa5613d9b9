"""Taps: the one place where calls of a layer's attention are recorded or steered.

An attention module looks up its function by the name in its configuration. A tapped module gets a
shallow copy of its configuration with the name of `tapped_attention`. That function records q and k
and passes the call to the implementation that the model was given. The model's own configuration
does not change, so masks stay those of that implementation, and other layers are not affected.

Records go into plain Python objects held by the module: a ContextVar or a global would break the
graphs of torch.compile. Calls form a linked list, because torch.compile recompiles a graph for
every length of a Python list.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...runtime import checks
from .attention import HARMLESS_KEYWORDS, REFUSED_KEYWORDS, reads
from .decoder import DecoderLayer

# A name with "flash" in it, or with "sdpa" at its start, would change what transformers does.
NAME = "ral_tap"
# Arguments of attention functions that a policy accounts for or does not depend on.
KNOWN = HARMLESS_KEYWORDS | {
    "cu_seq_lens_k", "cu_seq_lens_q", "dropout", "is_causal", "kernel_options", "max_length_k",
    "max_length_q", "output_attentions", "scaling", "sliding_window", "softcap",
}  # fmt: skip


class Call:
    """One call of a layer's attention, and the call before it.

    q: [B, H, T, D]; k: [B, Hk, N, D], or in a decoding step only the new key, [B, Hk, 1, D].
    last_k: the layer's keys before this call, which end the generation before it.
    refused: an argument that may keep the weights from being a softmax of q kᵀ, such as sinks.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        mask: Any,
        is_step: bool,
        before: Call | None,
        last_k: Tensor | None,
        config: Any,
        is_causal: bool,
        refused: str | None,
        scaling: float | None,
        sliding_window: int | None,
        softcap: float | None,
        position_ids: Any,
        cu_seq_lens: tuple[Any, Any],
        steering: Any,
    ) -> None:
        self.q, self.k, self.mask, self.is_step = q, k, mask, is_step
        self.before, self.last_k = before, last_k
        self.config, self.is_causal, self.refused = config, is_causal, refused
        self.implementation: str | None = config._attn_implementation
        self.scaling, self.sliding_window, self.softcap = scaling, sliding_window, softcap
        self.position_ids, self.steering = position_ids, steering
        self.cu_seq_lens = cu_seq_lens  # of queries and keys
        self.seqlen_q = q.shape[2]  # `q` may be cut later


class Sink:
    """Where one capture collects the calls of one layer.

    A step of a generation has one query and one more key than the call before. It keeps only its
    new key, because T whole caches would take T times the memory. The newest cache is kept for the
    check that a generation only appended keys.
    """

    def __init__(self, *, detach: bool, keep_prompt_rows: bool) -> None:
        self.detach, self.keep_prompt_rows = detach, keep_prompt_rows
        self.newest: Call | None = None
        self.last_k: Tensor | None = None

    def add(self, tap: Tap, module: nn.Module, q: Tensor, k: Tensor, mask: Any, given: Any) -> None:
        if self.detach:
            q, k = q.detach(), k.detach()
        q, k = _as_attention_sees(q, k)
        before = self.newest
        is_step = (
            q.shape[2] == 1
            and before is not None
            and _continues(k, self.last_k, given.get("sliding_window"))
        )
        if is_step and before is not None:
            before.mask = before.mask if not before.is_step else None
            if not self.keep_prompt_rows and before.q.shape[2] > 1:
                before.q = before.q[:, :, -1:].clone()
        is_causal = given.get("is_causal")
        refused = [
            name
            for name, x in given.items()
            if x is not None
            and name not in KNOWN
            and (name in REFUSED_KEYWORDS or reads(module, name))
        ]
        self.newest = Call(
            q,
            k[:, :, -1:].clone() if is_step else k,
            mask,
            is_step,
            before,
            None if is_step else self.last_k,
            tap.config,
            getattr(module, "is_causal", True) if is_causal is None else is_causal,
            refused[0] if refused else None,
            given.get("scaling"),
            given.get("sliding_window"),
            given.get("softcap"),
            given.get("position_ids"),
            (given.get("cu_seq_lens_q"), given.get("cu_seq_lens_k")),
            tap.steering,
        )
        self.last_k = k


def _as_attention_sees(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q and k in the dtype of attention: under autocast RoPE returns float32."""
    if not torch.is_autocast_enabled(q.device.type) or q.dtype == torch.float64:
        return q, k
    dtype = torch.get_autocast_dtype(q.device.type)
    return q.to(dtype), k.to(dtype)


def _continues(k: Tensor, last_k: Tensor | None, window: int | None) -> bool:
    """Whether a call with one query looks like the next step of a generation.

    A sliding cache keeps the length of its window, and a static cache its own; the latter is
    refused when its keys are asked for. `CapturedLayer` checks later that the keys are the same.
    """
    if last_k is None or k.shape[0] != last_k.shape[0] or last_k.shape[2] == 0:
        return False
    length, before = k.shape[2], last_k.shape[2]
    if length == before + 1 or (length == before and length > 1):
        return True
    return window is not None and length == window and before > window


class Tap:
    """A layer of indirection between an attention module and its attention function."""

    def __init__(self, layer: DecoderLayer) -> None:
        module = layer.attention
        self.module = module
        self.path, self.decoder = layer.path, layer.decoder
        self.config: Any = module.config
        self.sinks: tuple[Sink, ...] = ()
        self.steering: Any = None
        self.cache: Any = None  # of the call that runs, while the cache is watched
        self._watch: Any = None
        self.interface, self.eager = _lookups(module)
        self._unchecked: list[tuple[nn.Module, str, Any]] = []

    def install(self) -> None:
        config = copy.copy(self.config)
        # Not through the property: it would rename the sub-configurations, which are shared.
        config._attn_implementation_internal = NAME
        if config._attn_implementation != NAME:
            raise NotImplementedError(
                "capture and steer: this version of transformers is not supported; it keeps the "
                "name of the attention implementation elsewhere"
            )
        self._exempt_from_checkpointing()  # raises before it changes anything
        module: Any = self.module
        module._ral_tap = self
        module.config = config

    def remove(self) -> None:
        module: Any = self.module
        module.config = self.config
        del module._ral_tap
        for owner, name, value in reversed(self._unchecked):
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        self._unchecked.clear()

    def watch_cache(self) -> None:
        """Keep the cache of each call: attention functions do not get it, and it may drop keys."""
        self._watch = self.module.register_forward_pre_hook(_keep_cache, with_kwargs=True)

    def unwatch_cache(self) -> None:
        self._watch.remove()
        self._watch = None

    def _exempt_from_checkpointing(self) -> None:
        """Have the layer keep its activations: a checkpoint would cut q and k out of the graph.

        Reentrant checkpointing runs the layer without a graph. A layer recomputed in the backward,
        after the end of the `with`, would run without the tap.
        """
        if getattr(self.decoder, "gradient_checkpointing", False) and not any(
            hasattr(owner, "gradient_checkpointing") for owner in self.path
        ):
            raise NotImplementedError(
                "capture and steer: gradient checkpointing must be the layers' own, as in "
                f"transformers' GradientCheckpointingLayer; {type(self.decoder).__name__} "
                "checkpoints from outside"
            )
        for owner in self.path:
            if isinstance(owner.__dict__.get("gradient_checkpointing"), bool):
                self._put(owner, "gradient_checkpointing", False)
            if "_checkpoint_wrapped_module" in owner._modules:
                self._put(owner, "checkpoint_fn", _call_through)

    def _put(self, owner: nn.Module, name: str, value: Any) -> None:
        self._unchecked.append((owner, name, owner.__dict__.get(name, _ABSENT)))
        setattr(owner, name, value)

    def attend(self, *tensors: Any, **given: Any) -> Any:
        """Call the attention function of the model's own implementation."""
        name = self.config._attn_implementation
        if name is None or name == "eager":
            function = self.eager
        else:
            function = self.interface.get_interface(name, self.eager)
        if function is None:
            raise NotImplementedError(
                f"capture: the eager attention of {type(self.module).__name__} must be a function "
                f"`eager_attention_forward` of its source file; got none"
            )
        return function(self.module, *tensors, **given)


_ABSENT = object()


def _keep_cache(module: Any, args: Any, given: dict[str, Any]) -> None:
    module._ral_tap.cache = given.get("past_key_values")


def _call_through(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _lookups(module: nn.Module) -> tuple[Any, Callable[..., Any] | None]:
    """The attention interface that the module's source file looks into, and its eager function."""
    interface, eager = None, None
    for cls in type(module).__mro__:
        names = vars(sys.modules.get(cls.__module__, object))
        interface = interface or names.get("ALL_ATTENTION_FUNCTIONS")
        eager = eager or names.get("eager_attention_forward")
    return ALL_ATTENTION_FUNCTIONS if interface is None else interface, eager


def tapped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any
) -> Any:
    """The attention function of tapped modules: record, then steer or pass on."""
    tap: Tap = module._ral_tap
    for sink in tap.sinks:
        sink.add(tap, module, query, key, attention_mask, given)
    # Attention functions look into the module's configuration, too (flash attention for its name).
    own = module.config
    module.config = tap.config
    try:
        if tap.steering is not None:
            return tap.steering.attend(tap, query, key, value, attention_mask, given)
        return tap.attend(query, key, value, attention_mask, **given)
    finally:
        module.config, tap.cache = own, None


AttentionInterface.register(NAME, tapped_attention)


def record_attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    attention_mask: Any = None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
) -> None:
    """Hand q and k to the captures that are open on an attention module.

    For a forward that calls its attention kernel itself, so that nothing of it passes transformers'
    attention interface, where `capture` listens. Call it where the kernel is called:

        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        rk.record_attention(self, q, k, attention_mask, scaling=self.scaling)
        out = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), ...)

    It does nothing where no capture is open on `module`, so the call may stay. The forward must not
    go through the attention interface as well: it would be recorded twice.

    Args:
        module: the attention module of a decoder layer, as transformers has it.
        q: [B, H, T, D] queries after RoPE, part of the graph.
        k: [B, Hk, N, D] keys after RoPE, those of the cache included; H a multiple of Hk.
        attention_mask: as the module's own implementation (`config._attn_implementation`) takes it.
        scaling, sliding_window, softcap, is_causal, position_ids: what the kernel computes with, as
            transformers' attention functions take it; is_causal defaults to the module's.

    Raises:
        TypeError, ValueError: q or k is no tensor of that form.
        NotImplementedError: the layer is steered, which only the attention interface can do.
    """
    op = "record_attention"
    for name, x, wanted in (("q", q, "[B, H, T, D]"), ("k", k, "[B, Hk, N, D]")):
        checks.check_tensor(op, name, x, f"a {wanted} tensor")
        if x.dim() != 4:
            raise ValueError(f"{op}: {name} must be {wanted}; got {tuple(x.shape)}")
    heads = k.shape[1]
    if q.shape[::3] != k.shape[::3] or heads == 0 or q.shape[1] % heads:
        raise ValueError(
            f"{op}: k must be [B, Hk, N, D] with B={q.shape[0]}, D={q.shape[3]} and Hk a divisor "
            f"of {q.shape[1]}; got {tuple(k.shape)}"
        )
    tap: Tap | None = getattr(module, "_ral_tap", None)
    if tap is None:
        return
    if tap.steering is not None:
        raise NotImplementedError(
            f"steer: {type(module).__name__} must call its attention through transformers' "
            "attention interface; it calls its own and records that"
        )
    given = {
        "scaling": scaling,
        "sliding_window": sliding_window,
        "softcap": softcap,
        "is_causal": is_causal,
        "position_ids": position_ids,
    }
    for sink in tap.sinks:
        sink.add(tap, module, q, k, attention_mask, given)


@contextmanager
def tapped(
    layers: Sequence[DecoderLayer], open_: Callable[[Tap, int], None], close: Callable[[Tap], None]
) -> Iterator[None]:
    """Taps on `layers`. Nested users of a layer share its tap; the last one removes it."""
    opened: list[Tap] = []
    try:
        for number, layer in enumerate(layers):
            tap = getattr(layer.attention, "_ral_tap", None)
            if tap is None:
                tap = Tap(layer)
                tap.install()
            opened.append(tap)
            open_(tap, number)
        yield
    finally:
        for tap in opened:
            close(tap)
            if not tap.sinks and tap.steering is None:
                tap.remove()
