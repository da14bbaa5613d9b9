"""Triton's interpreter, made quick enough for a case table.

It spends its time on types, not on numbers: what is patched here are lookups whose answers never
change. A release of Triton that has not these parts is left alone: slower, no harm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


def make_quick() -> None:
    """Patch the interpreter of the installed Triton: the same results in under half the time."""
    try:
        from triton.language import core, semantic
        from triton.runtime import interpreter
    except ImportError:
        return
    for patch, module, parts in (
        (_patch_once_a_launch, interpreter, ("GridExecutor", "InterpretedFunction", "_patch_lang")),
        (_leave_out_dead_checks, interpreter, ("InterpreterOptions", "interpreter_builder")),
        (_look_up_dtypes, interpreter, ("_get_np_dtype",)),
        (_share_types, core, ("block_type", "tensor", "constexpr")),
        (_broadcast_what_differs, semantic, ("TritonSemantic",)),
    ):
        if all(hasattr(module, part) for part in parts):
            patch(module)


def _patch_once_a_launch(interpreter: Any) -> None:
    """Let a kernel's helpers run without patching triton.language again.

    The interpreter swaps the functions of triton.language for its own at each launch, and once more
    at each call of a @triton.jit helper. Within a launch, once for each module that helpers come
    from is enough.
    """
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: set[int] | None = None  # modules, by their globals, in the launch that runs

    def launch_and_remember(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal patched
        before, patched = patched, set()
        try:
            return launch(self, *args, **kwargs)
        finally:
            patched = before

    def call_helper(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = id(self.fn.__globals__)
        if patched is None or module not in patched:
            patch(self.fn)
            if patched is not None:
                patched.add(module)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = launch_and_remember
    interpreter.InterpretedFunction.__call__ = call_helper


def _leave_out_dead_checks(interpreter: Any) -> None:
    """No checks of int32 overflow: without `debug` they are computed, in int64, and thrown away."""
    builder = interpreter.interpreter_builder
    options: Any = getattr(builder, "options", None)
    if not getattr(options, "debug", True) and hasattr(options, "sanitize_overflow"):
        builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _look_up_dtypes(interpreter: Any) -> None:
    """The numpy dtype of a Triton dtype by its name; the interpreter builds the table each time."""
    find: Callable[[Any], Any] = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def look_up(dtype: Any) -> Any:
        element = dtype.scalar
        name = "pointer" if element.is_ptr() else element.name
        found = known.get(name)
        if found is None:
            found = known[name] = find(element)
        return found

    interpreter._get_np_dtype = look_up


def _share_types(core: Any) -> None:
    """Block types of one shape and element share their attributes, and so do tensors of a type.

    Neither is changed after it is made; each was validated, named and counted anew per operation.
    """
    init_type, init_tensor = core.block_type.__init__, core.tensor.__init__
    constexpr = core.constexpr
    types: dict[tuple[str | int, ...], dict[str, Any]] = {}

    def shared_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = [size.value if isinstance(size, constexpr) else size for size in shape]
        key = (element_ty.name, *sizes)
        found = types.get(key)
        if found is not None:
            self.__dict__ = found
            return
        init_type(self, element_ty, shape)
        types[key] = self.__dict__

    def shared_tensor(self: Any, handle: Any, type: Any) -> None:
        found = type.__dict__.get("attributes_of_tensors")
        if found is None:
            init_tensor(self, handle, type)
            found = {k: v for k, v in self.__dict__.items() if k not in ("handle", "type")}
            type.__dict__["attributes_of_tensors"] = found
            return
        self.__dict__.update(found)
        self.handle = handle
        self.type = type

    core.block_type.__init__ = shared_type
    core.tensor.__init__ = shared_tensor


def _broadcast_what_differs(semantic: Any) -> None:
    """Two operands of one type need no broadcast; the interpreter compares their shapes."""
    broadcast = semantic.TritonSemantic.broadcast_impl_value

    def broadcast_unless_alike(self: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.type.__dict__ is rhs.type.__dict__:  # as _share_types leaves them
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    semantic.TritonSemantic.broadcast_impl_value = broadcast_unless_alike
