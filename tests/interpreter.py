"""Triton's interpreter, made quick enough for a case table."""

from __future__ import annotations

from typing import Any


def patch_once_a_launch() -> None:
    """Let a kernel's helpers run without patching triton.language again.

    The interpreter swaps the functions of triton.language for its own at each launch, and once more
    at each call of a @triton.jit helper: a third of the time of these tests. Within a launch, once
    for each module that helpers come from is enough.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    parts = ("GridExecutor", "InterpretedFunction", "_patch_lang")
    if not all(hasattr(interpreter, part) for part in parts):  # another release: slower, no harm
        return
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
