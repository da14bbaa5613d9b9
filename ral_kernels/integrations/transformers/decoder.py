"""Find the decoder layers of a model, through any wrappers."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from ...runtime import checks

# An attention module that compares the name of its implementation takes another path under another
# name. `get_interface(self.config._attn_implementation, ...)` and `!= "eager"` do not.
_READS_ITS_NAME = re.compile(
    r"_attn_implementation\s*(==|in\b|not\s+in\b)|is_flash_attention_requested\("
)
_Layer = TypeVar("_Layer")
_ATTENTION_NAMES = ("self_attn", "attention", "attn", "self_attention")


@dataclass(frozen=True)
class DecoderLayer:
    """A text decoder layer and its attention module.

    index, count: its number, out of how many.
    decoder: the module that runs the layers.
    path: the modules from the element of the decoder's layer list down to the attention module,
    wrappers (compiled, checkpointed, sharded) included.
    """

    index: int
    count: int
    decoder: nn.Module
    attention: nn.Module
    path: tuple[nn.Module, ...]


def find_layers(op: str, model: Any, layers: Any) -> list[DecoderLayer]:
    """The layers that `layers` picks, in the order of the model.

    Args:
        op: the public function, for messages.
        model: a transformers model, or any module that holds one: DDP, FSDP, peft, compiled.
        layers: an int or a sequence of ints, negative from the end, or "all".

    Raises:
        TypeError, ValueError: `model` holds no or several models, `layers` picks none of them.
        NotImplementedError: the decoder layers or their attention are not found, or not usable.
    """
    found = _decoder_layers(op, model)
    if layers == "all" and isinstance(layers, str):
        chosen = [layer for layer in found if isinstance(layer, DecoderLayer)]
        if not chosen:
            raise NotImplementedError(f"{op}: model must have attention layers; found none")
    else:
        chosen = [_pick(op, found, index) for index in layer_numbers(op, layers, len(found))]
    for layer in chosen:
        _check_attention(op, layer.attention)
    return chosen


def _find_model(op: str, model: Any) -> PreTrainedModel:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{op}: model must be a transformers model or a module around one; got "
            f"{type(model).__name__}"
        )
    outermost: list[PreTrainedModel] = []
    inside: set[nn.Module] = set()
    for module in model.modules():  # parents come before their children
        if isinstance(module, PreTrainedModel) and module not in inside:
            outermost.append(module)
            inside.update(module.modules())
    if len(outermost) != 1:
        raise ValueError(
            f"{op}: model must hold one transformers model; got {type(model).__name__} with "
            f"{', '.join(type(found).__name__ for found in outermost) or 'none'}"
        )
    return outermost[0]


def decoder_stack(op: str, given: Any) -> tuple[nn.Module, nn.ModuleList]:
    """The text decoder of a model, and the list of its layers.

    Args:
        op, given: `op` and `model` as in `find_layers`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `find_layers`.
    """
    model = _find_model(op, given)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    stack = getattr(decoder, "layers", None)
    if stack is None:  # one wrapper more, such as torch.compile around the decoder
        stacks = [m.layers for m in decoder.modules() if isinstance(m, PreTrainedModel)
                  and isinstance(getattr(m, "layers", None), nn.ModuleList)]  # fmt: skip
        stack = stacks[0] if len(stacks) == 1 else None
    if not isinstance(stack, nn.ModuleList) or len(stack) == 0:
        raise NotImplementedError(
            f"{op}: model must have its decoder layers in a ModuleList `layers` of its text "
            f"decoder; {type(model).__name__} has none in {type(decoder).__name__}"
        )
    return decoder, stack


def _decoder_layers(op: str, model: Any) -> list[DecoderLayer | str]:
    """Every layer of the text decoder; the class of one without self-attention.

    That is a state space, say, or cross-attention to pictures.
    """
    decoder, stack = decoder_stack(op, model)
    return [
        _decoder_layer(index, len(stack), decoder, layer) or type(layer).__name__
        for index, layer in enumerate(stack)
    ]


def _decoder_layer(
    index: int, count: int, decoder: nn.Module, layer: nn.Module
) -> DecoderLayer | None:
    for name, module in layer.named_modules():
        if name.rpartition(".")[2] not in _ATTENTION_NAMES:
            continue
        path = [layer]
        for part in name.split("."):
            path.append(path[-1].get_submodule(part))
        while inner := [path[-1].get_submodule(w) for w in _WRAPPED if w in path[-1]._modules]:
            path += inner
        module = path[-1]
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(
            getattr(module, "config", None), "_attn_implementation"
        ):
            return DecoderLayer(index, count, decoder, module, tuple(path))
    return None


# What wrappers call the module inside them: torch.compile, activation checkpointing, FSDP1, DDP.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module")


def layer_numbers(op: str, layers: Any, count: int) -> list[int]:
    """The numbers that `layers` picks out of `count`: an int or ints, negative from the end."""
    wanted = "an int, a sequence of ints or 'all'"
    given = [layers] if checks.is_int(layers) else layers
    if not isinstance(given, (list, tuple, range)) or not all(map(checks.is_int, given)):
        raise TypeError(f"{op}: layers must be {wanted}; got {layers!r}")
    if len(given) == 0:
        raise ValueError(f"{op}: layers must pick at least one layer; got {layers!r}")
    for index in given:
        if not -count <= index < count:
            raise ValueError(f"{op}: layers must lie in [-{count}, {count}); got {index}")
    return sorted({index % count for index in given})


def _pick(op: str, found: list[DecoderLayer | str], index: int) -> DecoderLayer:
    layer = found[index]
    if isinstance(layer, str):
        having = [str(i) for i, other in enumerate(found) if isinstance(other, DecoderLayer)]
        raise NotImplementedError(
            f"{op}: layers must pick layers with self-attention through transformers' attention "
            f"interface, which are {', '.join(having) or 'none'} of this model; got {index}, a "
            f"{layer}"
        )
    return layer


def _check_attention(op: str, attention: nn.Module) -> None:
    cls: Any = type(attention)  # mypy finds classes of modules not hashable
    reader = _class_that_reads_its_name(cls)
    if reader is not None:
        raise NotImplementedError(
            f"{op}: model must choose its attention only through transformers' attention "
            f"interface; {reader} compares the name of its implementation"
        )


@functools.cache  # a trainer opens captures at every step, and finding a source takes 30 ms
def _class_that_reads_its_name(attention: type) -> str | None:
    for cls in attention.__mro__:
        if cls is nn.Module:
            break
        try:
            source = inspect.getsource(cls)
        except (OSError, TypeError):  # made at run time, such as FSDP2's subclass of a module
            continue
        if _READS_ITS_NAME.search(source):
            return cls.__name__
    return None


def layer_of(op: str, captured: Mapping[int, _Layer], layer: Any, count: int) -> _Layer:
    """What was captured of one layer.

    Args:
        op: for messages.
        captured: by the layer's number.
        layer: its number, negative from the end, or None for the only one.
        count: how many layers the model has.

    Raises:
        TypeError: layer is neither None nor an int.
        ValueError: the layer was not captured, or None stands for several.
    """
    names = ", ".join(map(str, captured))
    if layer is None:
        if len(captured) > 1:
            raise ValueError(f"{op}: layer must be one of {names}; got None")
        return next(iter(captured.values()))
    if not checks.is_int(layer):
        raise TypeError(f"{op}: layer must be None or an int; got {layer!r}")
    found = captured.get(layer + count if layer < 0 else layer)
    if found is None:
        raise ValueError(f"{op}: layer must be one of {names}; got {layer}")
    return found
