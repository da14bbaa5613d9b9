"""Registers "ral" with transformers when transformers' models are imported, not before."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# This module defines the interface of attention functions, and every model imports it. The package
# is lazy: importing it does not import this module.
HOOKED = "transformers.modeling_utils"


def install() -> None:
    """Register now if transformers' models are imported, otherwise when they are.

    It imports nothing, so `import ral_kernels` stays fast.
    """
    if HOOKED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from .transformers.registration import register

    try:
        register()
    except ImportError as error:
        # The user may want transformers without "ral", so their import must not fail.
        warnings.warn(f'attn_implementation="ral" is not available: {error}', stacklevel=2)


class _Finder:
    """Finds `HOOKED` as the other finders do, and has its loader register after the import."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != HOOKED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            # An attribute of this loader only, and deleted here, so that nothing remains.
            del loader.exec_module
            execute(module)
            _register()

        loader.exec_module = exec_module
        return spec
