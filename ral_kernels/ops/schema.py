"""Registers ops with torch: schemas and flat inputs come from an op's arguments dataclass.

torch's dispatcher takes flat lists of tensors and numbers. `Signature` derives that list from the
dataclass that backends receive, so that the order of the fields stands once. `define` registers an
op: its kernel, its fake kernel for `torch.compile`, and its derivative.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

Args = TypeVar("Args")
Setup = Callable[[Any, tuple[Any, ...], tuple[Tensor, ...]], None]
Backward = Callable[..., tuple[Tensor | None, ...]]


def namespace(package: str) -> str:
    """Of the ops of this package: `ral`, or one of its own if it is loaded under another name.

    So several copies, such as versions from a hub of kernels, live in one process.
    """
    return "ral" if package == "ral_kernels" else re.sub(r"\W", "_", package)


NAMESPACE = namespace(__name__.removesuffix(".ops.schema"))
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    float: "float",
    bool: "bool",
    str: "str",
}
_PART = "ral_kernels.part"


def part(prefix: str = "", absent: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The metadata of a field that is an arguments dataclass itself.

    Args:
        prefix: of the names of its fields in the schema.
        absent: fields that the op does not have, with the values that backends see.
    """
    return {_PART: (prefix, absent or {})}


@dataclasses.dataclass(frozen=True)
class _Input:
    path: str  # from the arguments to the value, "policy.q"
    name: str
    type: str


def _inputs_of(args_type: type, path: str = "", prefix: str = "") -> list[_Input]:
    found: list[_Input] = []
    types = typing.get_type_hints(args_type)
    for field in dataclasses.fields(args_type):
        if _PART in field.metadata:
            inner_prefix, absent = field.metadata[_PART]
            inner = _inputs_of(types[field.name], f"{path}{field.name}.", prefix + inner_prefix)
            found += [x for x in inner if x.path.rpartition(".")[2] not in absent]
        else:
            found.append(_Input(path + field.name, prefix + field.name, _TYPES[types[field.name]]))
    return found


class Signature(Generic[Args]):
    """The inputs of an op: the tensors of an arguments dataclass, its options, and `str backend`.

    Args:
        args_type: a dataclass whose fields are Tensor, Tensor | None, int, float, bool or str, or
            another such dataclass (`part`).

    Attributes:
        inputs: as in a schema, "Tensor q, Tensor? span_ids, ..., str backend".
        num_tensors: how many inputs, from the first, are tensors or None.
        num_inputs: with the backend's name.
        tensors: a function from the arguments to their tensors.
    """

    def __init__(self, args_type: type[Args]) -> None:
        found = _inputs_of(typing.cast(type, args_type))
        tensors = [x for x in found if x.type.startswith("Tensor")]
        options = [x for x in found if not x.type.startswith("Tensor")]
        ordered = tensors + options
        self.inputs = ", ".join([f"{x.type} {x.name}" for x in ordered] + ["str backend"])
        self.num_tensors = len(tensors)
        self.num_inputs = len(ordered) + 1
        self._names = [x.name for x in ordered]
        self.tensors = eval(f"lambda args: ({', '.join(f'args.{x.path}' for x in tensors)},)")
        # Python source, which torch.compile can trace, unlike operator.attrgetter.
        self._values = eval(f"lambda args: ({', '.join(f'args.{x.path}' for x in ordered)},)")
        self._build = _builder(
            typing.cast(type, args_type), {x.path: i for i, x in enumerate(ordered)}
        )

    def flatten(self, args: Args, backend: str) -> tuple[Any, ...]:
        """The inputs of a call, in the order of the schema."""
        return (*self._values(args), backend)

    def build(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """From the inputs of an op: (arguments, name of the backend, *the inputs after these)."""
        last = self.num_inputs - 1
        return (self._build(inputs[:last]), *inputs[last:])

    def save(self, ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        """Keep a call for its backward; `saved` gives it back."""
        ctx.save_for_backward(*inputs[: self.num_tensors], *outputs)
        ctx.options = inputs[self.num_tensors : self.num_inputs]

    def saved(self, ctx: Any) -> tuple[Args, str, tuple[Tensor, ...]]:
        """(arguments, name of the backend, outputs)."""
        tensors = ctx.saved_tensors
        *options, backend = ctx.options
        args = self._build((*tensors[: self.num_tensors], *options))
        return args, backend, tensors[self.num_tensors :]

    def index(self, name: str) -> int:
        """The position of an input."""
        return self._names.index(name)

    def gradients(self, **given: Tensor | None) -> tuple[Tensor | None, ...]:
        """What a backward returns: the given gradients in place, None for every other input."""
        return (*(given.get(name) for name in self._names), None)


def _builder(
    args_type: type,
    index: Mapping[str, int],
    path: str = "",
    absent: Mapping[str, Any] | None = None,
) -> Callable[[Sequence[Any]], Any]:
    """A function from the flat values to an instance of `args_type`."""
    absent = absent or {}
    types = typing.get_type_hints(args_type)
    getters: list[Callable[[Sequence[Any]], Any]] = []
    positions = []
    for field in dataclasses.fields(args_type):
        at = path + field.name
        if field.name in absent:
            getters.append(functools.partial(_constant, absent[field.name]))
        elif _PART in field.metadata:
            inner_absent = field.metadata[_PART][1]
            getters.append(_builder(types[field.name], index, at + ".", inner_absent))
        else:
            positions.append(index[at])
            getters.append(operator.itemgetter(index[at]))
    if positions == list(range(len(getters))):  # the usual case, which needs no list
        return lambda values: args_type(*values)
    return lambda values: args_type(*[get(values) for get in getters])


def _constant(value: Any, values: Sequence[Any]) -> Any:
    return value


def define(
    name: str,
    inputs: str,
    num_outputs: int,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    derivative: tuple[Setup, Backward] | None = None,
) -> Callable[..., Any]:
    """Register the functional op `ral::name`, whose kernel takes what the schema says.

    Args:
        inputs: of the schema, without parentheses.
        num_outputs: how many tensors it returns.
        kernel: computes the outputs from the inputs, on every device.
        fake: allocates the outputs, for tracing.
        derivative: `setup_context` and `backward` as in `torch.autograd.Function`, with
            `ctx.set_materialize_grads(False)`. Without a derivative, a backward through the op
            raises.

    Returns:
        A function that does what `torch.ops.ral.name` does. It skips the dispatcher, whose way from
        Python to Python costs more than a small kernel. It goes through the dispatcher under
        `torch.compile`, tracing, a profiler or a dispatch mode, and for tensors that are not plain.
    """
    op = _Op(name, inputs, num_outputs, kernel, fake, derivative)

    def call(*inputs: Any) -> Any:
        way = op.way(op.tensors_of(inputs))
        return (way or kernel)(*inputs)

    return call


def define_with_args(
    name: str,
    signature: Signature[Args],
    more_inputs: str,
    num_outputs: int,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    derivative: tuple[Setup, Backward] | None = None,
) -> Callable[..., Any]:
    """`define` for an op whose first inputs are an arguments dataclass and a backend.

    Args:
        signature: of the first inputs.
        more_inputs: of the schema, after those of `signature`.
        kernel, fake: take (arguments, backend, *more inputs). So does the function returned. A
            plain call passes the dataclass on as it is.
    """

    def flat_kernel(*inputs: Any) -> Any:
        return kernel(*signature.build(inputs))

    def flat_fake(*inputs: Any) -> Any:
        return fake(*signature.build(inputs))

    inputs = f"{signature.inputs}, {more_inputs}" if more_inputs else signature.inputs
    op = _Op(name, inputs, num_outputs, flat_kernel, flat_fake, derivative)

    def call(args: Args, backend: str, *more: Any) -> Any:
        way = op.way((*signature.tensors(args), *more) if more else signature.tensors(args))
        if way is None:
            return kernel(args, backend, *more)
        return way(*signature.flatten(args, backend), *more)

    return call


class _Op:
    """A registered op and the ways to call it."""

    def __init__(
        self,
        name: str,
        inputs: str,
        num_outputs: int,
        kernel: Callable[..., Any],
        fake: Callable[..., Any],
        derivative: tuple[Setup, Backward] | None,
    ) -> None:
        outputs = ", ".join(["Tensor"] * num_outputs)
        schema = f"{name}({inputs}) -> {f'({outputs})' if num_outputs > 1 else outputs}"
        _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        arguments = enumerate(overload._schema.arguments)
        tensors_of = operator.itemgetter(*(i for i, x in arguments if "Tensor" in str(x.type)))
        setup, backward = derivative or (_keep_nothing, functools.partial(_no_derivative, name))

        def below_autograd(*inputs: Any) -> Any:
            if torch._C._len_torch_dispatch_stack() == 0 and _are_plain(tensors_of(inputs)):
                return kernel(*inputs)  # the dispatcher would do nothing else
            with torch._C._AutoDispatchBelowAutograd():
                return overload(*inputs)

        def setup_context(ctx: Any, inputs: tuple[Any, ...], results: Any) -> None:
            ctx.set_materialize_grads(False)  # a gradient of None spares its share of the work
            setup(ctx, inputs, results if num_outputs > 1 else (results,))

        def forward(ctx: Any, *inputs: Any) -> Any:
            results = below_autograd(*inputs)
            setup_context(ctx, inputs, results)
            return results

        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise NotImplementedError(
                f"{NAMESPACE}::{name} has no forward-mode derivative (jvp); use reverse mode"
            )

        methods = {"backward": staticmethod(backward), "jvp": staticmethod(jvp)}
        base = (torch.autograd.Function,)
        function: Any = type(f"ral_{name}", base, {"forward": staticmethod(forward), **methods})
        # torch.func takes functions of this form alone, which costs an ordinary call 30 us more.
        transformed: Any = type(
            f"ral_{name}_transformed",
            base,
            {
                "forward": staticmethod(below_autograd),
                "setup_context": staticmethod(setup_context),
                "generate_vmap_rule": True,
                **methods,
            },
        )

        def autograd(*inputs: Any) -> Any:
            recorded = _is_recorded(tensors_of(inputs))
            return (function.apply if recorded else below_autograd)(*inputs)

        _LIBRARY.impl(name, autograd, "Autograd")
        self.tensors_of = tensors_of
        self._dispatch, self._record, self._transform = (
            overload, function.apply, transformed.apply
        )  # fmt: skip

    def way(self, tensors: Iterable[Any]) -> Callable[..., Any] | None:
        """How to call the op with these tensors; None if its kernel alone does."""
        if torch.compiler.is_compiling():
            return self._dispatch
        transform = torch._C._functorch.peek_interpreter_stack()
        if transform is not None and transform.key() != _FUNCTIONALIZE:
            return self._transform
        if (
            torch._C._autograd._profiler_enabled()
            or torch._C._get_tracing_state() is not None
            or torch._C._len_torch_dispatch_stack() > 0
            or not _are_plain(tensors)
        ):
            return self._dispatch
        return self._record if _is_recorded(tensors) else None


_FUNCTIONALIZE = torch._C._functorch.TransformType.Functionalize


def _is_recorded(tensors: Iterable[Any]) -> bool:
    """Whether autograd follows one of these tensors, backwards or forwards."""
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for x in tensors:
            if isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


_CPU_KEYS = torch._C._dispatch_keys(torch.empty(0)).raw_repr()


@functools.cache
def _cuda_keys() -> int:
    return torch._C._dispatch_keys(torch.empty(0, device="cuda")).raw_repr()


def _are_plain(tensors: Iterable[Any]) -> bool:
    """Whether all tensors are ordinary ones of the CPU or of a GPU.

    Other dispatch keys than theirs say that a tensor is of a subclass, is held by a transform of
    torch.func, or is negated lazily.
    """
    keys_of = torch._C._dispatch_keys
    for x in tensors:
        if isinstance(x, Tensor):
            keys = keys_of(x).raw_repr()
            if keys != _CPU_KEYS and not (x.is_cuda and keys == _cuda_keys()):
                return False
    return True


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    pass


def _no_derivative(name: str, ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError(
        f"{NAMESPACE}::{name} has no derivative: a gradient is not differentiable again"
    )
