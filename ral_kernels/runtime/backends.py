"""One ordered list of backends: how an op picks the one that runs, and what a machine has."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

logger = logging.getLogger(__name__)

ORDER = ("cuda", "triton", "cpu", "reference")  # fastest first; the reference runs everything


class Backend(Protocol):
    """What a backend module of an op offers: its `fwd` and `bwd` fill preallocated outputs.

    A module may also have `only_on_request()`: why the automatic choice passes it over, or None.
    """

    fwd: Any
    bwd: Any

    def can_run(self, args: Any, /) -> str | None:
        """None if this backend can run `args`, otherwise the reason why not."""
        ...

    def available(self) -> str | None:
        """None if this backend works on this machine, otherwise the reason why not."""
        ...


_tables: dict[str, Mapping[str, Any]] = {}  # op -> {backend: module}


def register(op: str, table: Mapping[str, Any]) -> None:
    """Make the backends of `op` known to `available_backends`."""
    _tables[op] = table


def check_backend(op: str, backend: Any) -> str:
    """The name of the requested backend, "" for the automatic choice."""
    if backend is None:
        return ""
    if not isinstance(backend, str):
        raise TypeError(f"{op}: backend must be None or a name; got {type(backend).__name__}")
    if backend not in ORDER:
        raise ValueError(
            f"{op}: backend must be None or one of {', '.join(ORDER)}; got {backend!r}"
        )
    return backend


def choose(op: str, table: Mapping[str, Any], args: Any, requested: str) -> Any:
    """The backend that runs `args`: the requested one, else the first of `ORDER` that can.

    Raises:
        RuntimeError: the requested backend is missing on this machine.
        NotImplementedError: the requested backend, or with no request every backend, cannot run
            this case.
    """
    if requested:
        module = table.get(requested)
        if module is None:
            raise NotImplementedError(
                f"{op}: backend {requested!r} has no kernels for this op in this version; "
                f"there are {', '.join(name for name in ORDER if name in table)}"
            )
        missing = module.available()
        if missing is not None:
            raise RuntimeError(f"{op}: backend {requested!r} is not available: {missing}")
        reason = module.can_run(args)
        if reason is not None:
            raise NotImplementedError(f"{op}: backend {requested!r} cannot run this call: {reason}")
        return module
    reasons = []
    for name in ORDER:
        module = table.get(name)
        if module is None:
            continue
        reason = module.can_run(args)  # first: where the tensors are is said at once
        if reason is None:
            reason = _passed_over(module)
        if reason is None:
            return module
        logger.debug("%s: backend %s passed over: %s", op, name, reason)
        reasons.append(f"{name}: {reason}")
    raise NotImplementedError(f"{op}: no backend can run this call ({'; '.join(reasons)})")


def _passed_over(module: Any) -> str | None:
    """Why the automatic choice does not even ask whether a backend can run a call, or None."""
    reason: str | None = module.available()
    if reason is None and hasattr(module, "only_on_request"):
        reason = module.only_on_request()
    return reason


def automatic_order() -> dict[str, dict[str, str | None]]:
    """What `backend=None` walks through on this machine: op -> {backend: why it is passed over}.

    None stands for a backend that takes every call that its `can_run` allows.
    """
    found: dict[str, dict[str, str | None]] = {}
    for op, table in _tables.items():
        found[op] = {}
        for name in (name for name in ORDER if name in table):
            found[op][name] = _passed_over(table[name])
    return found


def available_backends() -> dict[str, str]:
    """Which backends work on this machine: name -> "yes" or the reason why not."""
    found = {}
    for name in ORDER:
        modules = [table[name] for table in _tables.values() if name in table]
        if not modules:
            found[name] = "this version has no kernels for it"
            continue
        reasons = [reason for module in modules if (reason := module.available()) is not None]
        found[name] = reasons[0] if reasons else "yes"
    return found
