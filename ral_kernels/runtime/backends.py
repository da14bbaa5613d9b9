"""What ops ask of their backends, and which backend runs a call."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal, Protocol, TypeVar

logger = logging.getLogger(__name__)

BackendName = Literal["cuda", "triton", "cpu", "reference"]
# Fastest first; the reference backend last.
ORDER: tuple[BackendName, ...] = ("cuda", "triton", "cpu", "reference")

Args = TypeVar("Args", contravariant=True)
Outputs = TypeVar("Outputs", contravariant=True)
Gradients = TypeVar("Gradients", contravariant=True)


class Choice(Protocol[Args]):
    """What `choose` asks a backend. Each answer is a reason against the backend, or None."""

    def available(self) -> str | None:
        """Why this backend does not work on this machine."""
        return None

    def only_on_request(self) -> str | None:
        """Why the automatic choice skips this backend."""
        return None

    def can_run(self, args: Args, /) -> str | None:
        """Why this backend cannot run `args`."""
        return None


class Backend(Choice[Args], Protocol[Args, Outputs]):
    """A backend of one op. Backends subclass it and write `fwd`.

    The type parameters are dataclasses of the op: its arguments, and the tensors of its results.
    """

    def fwd(self, args: Args, outputs: Outputs, /) -> None:
        """Write every element of every tensor in `outputs`."""
        ...


class DifferentiableBackend(Backend[Args, Outputs], Protocol[Args, Outputs, Gradients]):
    """A backend of an op that has a backward pass.

    `Gradients` holds the gradients that arrive, where None counts as zero. It also holds those to
    write, where None means that one is not wanted.
    """

    def bwd(self, args: Args, outputs: Outputs, gradients: Gradients, /) -> None:
        """Write the gradients of the inputs. `outputs` holds what `fwd` wrote."""
        ...


Chosen = TypeVar("Chosen", bound=Choice[Any])

_tables: dict[str, Mapping[str, Choice[Any]]] = {}  # op -> {name: backend}


def register(op: str, table: Mapping[str, Choice[Any]]) -> None:
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


def choose(op: str, table: Mapping[str, Chosen], args: Any, requested: str) -> Chosen:
    """The backend that runs `args`: the requested one, else the first of `ORDER` that can.

    Raises:
        RuntimeError: the requested backend is missing on this machine.
        NotImplementedError: the requested backend, or without a request every backend, cannot run
            this call.
    """
    if requested:
        return _requested(op, table, args, requested)
    reasons = []
    logged = logger.isEnabledFor(logging.DEBUG)
    for name in ORDER:
        if name not in table:
            continue
        backend = table[name]
        # can_run is asked first, because the device of the tensors rules out most backends.
        reason = backend.can_run(args) or _skipped(backend)
        if reason is None:
            return backend
        reasons.append(reason)
        if logged:
            logger.debug("%s: backend %s skipped: %s", op, name, reason)
    names = (name for name in ORDER if name in table)
    listed = "; ".join(f"{name}: {reason}" for name, reason in zip(names, reasons, strict=True))
    raise NotImplementedError(f"{op}: no backend can run this call ({listed})")


def _requested(op: str, table: Mapping[str, Chosen], args: Any, name: str) -> Chosen:
    backend = table.get(name)
    if backend is None:
        raise NotImplementedError(
            f"{op}: backend {name!r} has no kernels for this op in this version; "
            f"its backends are {', '.join(name for name in ORDER if name in table)}"
        )
    missing = backend.available()
    if missing is not None:
        raise RuntimeError(f"{op}: backend {name!r} is not available: {missing}")
    reason = backend.can_run(args)
    if reason is not None:
        raise NotImplementedError(f"{op}: backend {name!r} cannot run this call: {reason}")
    return backend


def _skipped(backend: Choice[Any]) -> str | None:
    """Why the automatic choice skips a backend whatever the call is, or None."""
    return backend.available() or backend.only_on_request()


def automatic_order() -> dict[str, dict[str, str | None]]:
    """The order in which `backend=None` asks backends: op -> {backend: why it is skipped}.

    The reason is None for a backend that gets every call that its `can_run` allows.
    """
    return {
        op: {name: _skipped(table[name]) for name in ORDER if name in table}
        for op, table in _tables.items()
    }


def available_backends() -> dict[str, str]:
    """Which backends work on this machine: name -> "yes" or the reason why not."""
    found: dict[str, str] = {}
    for name in ORDER:
        backends = [table[name] for table in _tables.values() if name in table]
        if not backends:
            found[name] = "this version has no kernels for it"
            continue
        reasons = [reason for backend in backends if (reason := backend.available()) is not None]
        found[name] = reasons[0] if reasons else "yes"
    return found
