"""A reference policy that is cheap to keep: q and k of a layer instead of its attention."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .ops import packing, qkv
from .ops.packing import PackedRows
from .runtime import checks
from .snapshot_parts import (
    EXACT,
    OP,
    OPTIONS,
    PACKING,
    TENSORS,
    check_dtype,
    check_parts,
    check_prefix,
    check_prefix_index,
    resolve_span_bias,
)

if TYPE_CHECKING:
    from .ops.policy.arguments import PolicyArgs

_PARTS = operator.attrgetter(*TENSORS, *OPTIONS)
_PACKED = operator.attrgetter(*PACKING)
_FORMAT = "ral_kernels.AttentionSnapshot/1"


class AttentionSnapshot:
    """The attention policy of a layer at one moment, kept as its queries and keys.

    It holds T·H·D + N·Hk·D numbers in q's dtype instead of T·N floats. `attention_divergence` and
    `ral_loss` recompute the policy from it tile by tile. Against a snapshot an unchanged policy has
    a loss and a gradient of exactly 0. Rows of probabilities in bfloat16 could not show that: their
    rounding is larger than the difference between two policies one step apart. The reference policy
    may be another model, with its own heads and head dim.

    The tensors are detached copies. Treat the object as immutable. Every method returns a new
    object or shares tensors with this one.

    Args:
        q: [B, H, Tq, D] queries after RoPE, as in `attention_policy`.
        k: [B, Hk, N, D] keys.
        rows: the T queries that have a policy, as in `attention_policy`.
        span_bias: floating, broadcastable to [B, H, T, S], the bias that this policy attends with.
            It applies to the spans of the call that compares with the snapshot.
        head_weights: as in `attention_policy`. Default: those of the call that compares with the
            snapshot, so that weights which are learned need not be given twice.
        is_causal, scale, window, softcap: as in `attention_policy`.
        dtype: dtype of the kept q and k; default q's. Exact zeros need the dtype of the policy.
        device: of the kept tensors; default q's, or the CPU with `pin_memory`.
        pin_memory: keep them in page-locked CPU memory.
        group_size: G, where the G rollouts of a prompt are adjacent in the batch.
        shared_prefix: N0, the first keys that the samples of a group share (the prompt). They are
            kept once per group. Their values must be equal bit for bit.
        cu_seqlens_q, cu_seqlens_k: offsets of packed sequences, with `rows` a sequence, as in
            `attention_policy`. Such a snapshot compares with calls of the same sequences. It
            supports no shared_prefix.

    Attributes:
        q: [B, H, T, D], the chosen rows.
        k: [B, Hk, N - N0, D].
        k_prefix, prefix_index: [P, Hk, N0, D] and int64 [B], each sample's place in it; both None
            without a shared prefix.
        span_bias: [B, 1 or H, 1 or T, S] float32 (float64 with float64 q), or None.
        head_weights: [B, H], or [S, H] where packed, likewise, with mean 1 over the heads; or None.
        query_start: key position of row 0; 0 where packed.
        cu_seqlens_q, cu_seqlens_k, query_starts: where packed, int32 [S + 1], [S + 1] and [S]:
            offsets of the chosen rows and of the keys, and the position of each sequence's first
            row in its own keys; else None.
        scale, window_left, window_right, softcap: resolved options; -1 = no bound, 0 = no soft cap.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, device or value; prefixes of a group that differ.
        RuntimeError: `pin_memory` without an accelerator.

    `load`, `from_tensors` and unpickling make the same checks.
    """

    q: Tensor
    k: Tensor
    k_prefix: Tensor | None
    prefix_index: Tensor | None
    span_bias: Tensor | None
    head_weights: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    query_starts: Tensor | None
    query_start: int
    scale: float
    window_left: int
    window_right: int
    softcap: float
    _normalisers: tuple[list[Any], Tensor, Tensor] | None = (
        None  # of this object only, not of its copies
    )
    _checked: tuple[Any, ...] = ((),)  # see `check`

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        *,
        rows: slice | tuple[int, int] | PackedRows | None = None,
        span_bias: Tensor | None = None,
        head_weights: Tensor | None = None,
        is_causal: bool = True,
        scale: float | None = None,
        window: int | tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        pin_memory: bool = False,
        group_size: int = 1,
        shared_prefix: int = 0,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
    ) -> None:
        q, k, _ = qkv.autocast_inputs(q, k, k)
        qkv.check_qkv(OP, q, k, k, None)  # k in place of v: the same checks
        checks.check_flag(OP, "is_causal", is_causal)
        checks.check_flag(OP, "pin_memory", pin_memory)
        check_dtype(dtype)
        packed = packing.resolve(OP, q, k, cu_seqlens_q, cu_seqlens_k, rows)
        if packed is None:
            start, stop = checks.resolve_rows(OP, rows, q.shape[2])
        self.query_start = 0 if packed is not None else k.shape[2] - q.shape[2] + start
        self.scale = checks.resolve_scale(OP, scale, q.shape[3])
        self.window_left, self.window_right = checks.resolve_window(OP, window, is_causal)
        self.softcap = checks.resolve_softcap(OP, softcap)
        if pin_memory:
            device = "cpu" if device is None else device
            if torch.device(device).type != "cpu":
                raise ValueError(
                    f"{OP}: pin_memory must go with device=None or 'cpu'; got {device}"
                )
        q, k = q.detach(), k.detach()
        if packed is not None and (group_size, shared_prefix) != (1, 0):
            raise ValueError(
                f"{OP}: group_size and shared_prefix are not supported with cu_seqlens_q; got "
                f"{group_size} and {shared_prefix}"
            )
        check_prefix(k, group_size, shared_prefix)
        q = q[:, :, start:stop] if packed is None else packed.chosen(q)
        for name in PACKING:
            setattr(self, name, None if packed is None else getattr(packed, name))
        self.span_bias = resolve_span_bias(span_bias, q)
        if head_weights is not None:
            samples = q.shape[0] if packed is None else packed.num_sequences
            head_weights = qkv.prepare_head_weights(
                OP, head_weights, q, samples, packed is not None
            )
        self.head_weights = None if head_weights is None else head_weights.detach()
        self.k_prefix = self.prefix_index = None
        if group_size > 1 and shared_prefix > 0:
            self.k_prefix = k[::group_size, :, :shared_prefix]
            self.prefix_index = torch.arange(q.shape[0], device=q.device) // group_size
            k = k[:, :, shared_prefix:]
        self.q, self.k = q, k
        if not torch.compiler.is_compiling():
            self._checked = self._found()
        copies = self._map(lambda name, x: _copy(x, device, None if name in EXACT else dtype))
        self._adopt(copies.pin_memory() if pin_memory else copies)

    # -- what it is ------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        return self.q.shape[0]

    @property
    def is_packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def num_sequences(self) -> int:
        """S of a packed snapshot, else the batch size."""
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def num_rows(self) -> int:
        return self.q.shape[2]

    @property
    def shared_prefix(self) -> int:
        """N0, the number of keys kept once per prompt."""
        return 0 if self.k_prefix is None else self.k_prefix.shape[2]

    @property
    def seqlen_k(self) -> int:
        return self.shared_prefix + self.k.shape[2]

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def dtype(self) -> torch.dtype:
        return self.q.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors; a shared prefix counts once."""
        return sum(x.numel() * x.element_size() for x in self._all_tensors().values())

    def __len__(self) -> int:
        return self.num_sequences

    def __repr__(self) -> str:
        return (
            f"AttentionSnapshot(q={tuple(self.q.shape)}, seqlen_k={self.seqlen_k}, "
            f"num_kv_heads={self.k.shape[1]}, shared_prefix={self.shared_prefix}, "
            + (f"sequences={self.num_sequences}, " if self.is_packed else "")
            + f"dtype={checks.dtype_name(self.dtype)}, device={self.device})"
        )

    # -- its normalisers -------------------------------------------------------------------------

    def find_normalisers(
        self, args: PolicyArgs, head_weights: Tensor | None, kernels: str
    ) -> tuple[Tensor, Tensor] | None:
        """(norm [2, B, H, T], Z [B, T]) of an earlier comparison under the same conditions, if any.

        They depend on which keys count, on this side's head weights and on the kernels: an
        unchanged policy has a divergence of exactly 0 only if the same kernels compute both sides.
        """
        if self._normalisers is None:
            return None
        conditions, norm, z = self._normalisers
        same = all(
            torch.equal(a, b)
            if isinstance(a, Tensor) and isinstance(b, Tensor)
            else a is b or a == b
            for a, b in zip(conditions, self._conditions(args, head_weights, kernels), strict=True)
        )
        return (norm, z) if same else None

    def keep_normalisers(
        self, args: PolicyArgs, head_weights: Tensor | None, kernels: str, norm: Tensor, z: Tensor
    ) -> None:
        """Remember the normalisers of the last comparison."""
        conditions = [
            x.clone() if isinstance(x, Tensor) else x
            for x in self._conditions(args, head_weights, kernels)
        ]
        self._normalisers = (conditions, norm, z)

    def _conditions(self, args: PolicyArgs, head_weights: Tensor | None, kernels: str) -> list[Any]:
        return [kernels, args.exclude_self, args.scope, args.key_padding_mask, head_weights]

    def materialised_k(self) -> Tensor:
        """The keys of every sample, [B, Hk, N, D]."""
        if self.k_prefix is None or self.prefix_index is None:
            return self.k
        return torch.cat([self.k_prefix[self.prefix_index], self.k], dim=2)

    # -- where it is -----------------------------------------------------------------------------

    def to(
        self,
        device: torch.device | str | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> AttentionSnapshot:
        """The snapshot on another device, or with q and k in another dtype.

        Tensors that need no change are shared, as in `Tensor.to`. `snapshot.to(dtype)` also works.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        check_dtype(dtype)
        return self._map(
            lambda name, x: x.to(
                device=device,
                dtype=x.dtype if dtype is None or name in EXACT else dtype,
                non_blocking=non_blocking,
            )
        )

    def pin_memory(self) -> AttentionSnapshot:
        """The snapshot in page-locked CPU memory, from which `to(..., non_blocking=True)` is fast.

        Raises:
            RuntimeError: this machine has no accelerator, or the snapshot is not on the CPU.
        """
        if not torch.accelerator.is_available():
            raise RuntimeError(f"{OP}: pin_memory needs an accelerator; this machine has none")
        return self._map(lambda name, x: x.pin_memory())

    # -- along the batch -------------------------------------------------------------------------

    def __getitem__(self, index: Tensor | slice) -> AttentionSnapshot:
        """Some samples: a slice, an int64 tensor of sample numbers, or a bool mask [B].

        Packed, they are sequences of the S, in the order asked for.
        """
        if isinstance(index, Tensor):
            if index.dim() != 1 or index.dtype not in (torch.int64, torch.bool):
                raise TypeError(
                    f"{OP}: index must be a slice, an int64 tensor [n] or a bool mask [B]; got "
                    f"{checks.dtype_name(index.dtype)} {tuple(index.shape)}"
                )
            if index.dtype == torch.bool and index.shape[0] != len(self):
                raise ValueError(
                    f"{OP}: index must be a mask [B] = ({len(self)},); got {tuple(index.shape)}"
                )
            index = index.to(self.device)
        elif not isinstance(index, slice):
            raise TypeError(
                f"{OP}: index must be a slice, an int64 tensor [n] or a bool mask [B]; got "
                f"{type(index).__name__}"
            )
        if self.is_packed:
            return self._pick_sequences(index)
        picked = {name: x[index] for name, x in self.tensors().items()}
        return self.from_tensors(picked, like=self)

    def _pick_sequences(self, index: Tensor | slice) -> AttentionSnapshot:
        self.check()
        assert self.cu_seqlens_q is not None and self.cu_seqlens_k is not None
        assert self.query_starts is not None
        if isinstance(index, Tensor):
            index = index.cpu()
        picked = torch.arange(self.num_sequences)[index]
        bounds_q, bounds_k = self.cu_seqlens_q.cpu(), self.cu_seqlens_k.cpu()
        counts_q, counts_k = (x.diff()[picked].tolist() for x in (bounds_q, bounds_k))
        rows = packing.token_index(bounds_q[picked].tolist(), counts_q).to(self.device)
        keys = packing.token_index(bounds_k[picked].tolist(), counts_k).to(self.device)
        tensors = {
            "q": self.q[:, :, rows],
            "k": self.k[:, :, keys],
            "cu_seqlens_q": packing.offsets_of(counts_q).to(self.device),
            "cu_seqlens_k": packing.offsets_of(counts_k).to(self.device),
            "query_starts": self.query_starts[picked.to(self.device)],
        }
        if self.span_bias is not None:
            by_row = self.span_bias.shape[2] > 1
            tensors["span_bias"] = self.span_bias[:, :, rows] if by_row else self.span_bias
        if self.head_weights is not None:
            tensors["head_weights"] = self.head_weights[picked.to(self.device)]
        return self._make(OP, tensors, self._options(), read_values=False)

    @classmethod
    def cat(cls, snapshots: Sequence[AttentionSnapshot]) -> AttentionSnapshot:
        """One batch of several, in order. All but their batch sizes must agree.

        A prefix that two of them hold is kept twice. Packed ones become one packed snapshot of all
        their sequences.
        """
        snapshots = list(snapshots)
        if not snapshots:
            raise ValueError(f"{OP}.cat: snapshots must hold at least one; got none")
        for snapshot in snapshots:
            if not isinstance(snapshot, AttentionSnapshot):
                raise TypeError(
                    f"{OP}.cat: snapshots must hold snapshots; got {type(snapshot).__name__}"
                )
            snapshot.check()
        first = snapshots[0]
        for i, snapshot in enumerate(snapshots):
            if (got := snapshot._signature()) != (wanted := first._signature()):
                name = next(name for name in wanted if got[name] != wanted[name])
                raise ValueError(
                    f"{OP}.cat: snapshots must agree in {name}; snapshots[0] has {wanted[name]}, "
                    f"snapshots[{i}] has {got[name]}"
                )
        if len(snapshots) == 1:
            return first
        if first.is_packed:
            return cls._cat_packed(snapshots)
        joined: dict[str, Tensor] = {}
        for name in first._all_tensors():
            parts = [snapshot._all_tensors()[name] for snapshot in snapshots]
            if name == "prefix_index":
                sizes = [s.k_prefix.shape[0] for s in snapshots if s.k_prefix is not None]
                offsets = [sum(sizes[:i]) for i in range(len(sizes))]
                parts = [x + offset for x, offset in zip(parts, offsets, strict=True)]
            elif name == "span_bias":
                shape = [max(sizes) for sizes in zip(*(x.shape[1:] for x in parts), strict=True)]
                parts = [x.expand(-1, *shape) for x in parts]
            joined[name] = torch.cat(parts)
        return cls._make(f"{OP}.cat", joined, first._options())

    @classmethod
    def _cat_packed(cls, snapshots: Sequence[AttentionSnapshot]) -> AttentionSnapshot:
        parts = [snapshot[:] for snapshot in snapshots]  # without tokens after the last offset
        joined = {
            name: torch.cat([part._all_tensors()[name] for part in parts], dim=dim)
            for name, dim in (("q", 2), ("k", 2), ("query_starts", 0), ("head_weights", 0))
            if getattr(parts[0], name) is not None
        }
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            lengths = torch.cat([part._all_tensors()[name].diff() for part in parts])
            joined[name] = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        biases = [part.span_bias for part in parts if part.span_bias is not None]
        if biases:
            heads = max(x.shape[1] for x in biases)
            joined["span_bias"] = torch.cat(
                [
                    x.expand(-1, heads, part.num_rows, -1)
                    for x, part in zip(biases, parts, strict=True)
                ],
                dim=2,
            )
        return cls._make(f"{OP}.cat", joined, snapshots[0]._options(), read_values=False)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors whose first dimension is the batch, for a trainer that shuffles or splits.

        A shared prefix is not among them; `prefix_index` says which one each sample has. See
        `from_tensors`.

        Raises:
            ValueError: the snapshot is packed, so no dimension is the batch; index it instead.
        """
        if self.is_packed:
            raise ValueError(
                f"{OP}: tensors are not along a batch where sequences are packed; use "
                "snapshot[index] and AttentionSnapshot.cat"
            )
        return {name: x for name, x in self._all_tensors().items() if name != "k_prefix"}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], *, like: AttentionSnapshot
    ) -> AttentionSnapshot:
        """The inverse of `like.tensors()`, after the batch was permuted, repeated or cut.

        The options come from `like`, and so do the shared prefixes that are still in use.

        Raises:
            TypeError: a tensor of a wrong type or dtype.
            ValueError: a tensor is missing, or has a wrong shape, device or value.
        """
        op = f"{OP}.from_tensors"
        like.check()
        wanted = list(like.tensors())
        if sorted(tensors) != sorted(wanted):
            raise ValueError(
                f"{op}: tensors must be {', '.join(wanted)}; got {', '.join(sorted(tensors))}"
            )
        taken = {name: tensors[name] for name in wanted}
        if like.k_prefix is not None:
            check_prefix_index(op, taken["prefix_index"], like.k_prefix)
            used, index = torch.unique(taken["prefix_index"], return_inverse=True)
            taken["prefix_index"] = index  # int64, whatever the dtype was
            every = used.numel() == like.k_prefix.shape[0]
            taken["k_prefix"] = like.k_prefix if every else like.k_prefix[used.long()]
        return cls._make(op, taken, like._options())

    # -- files -----------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a safetensors file.

        Raises:
            ImportError: the package safetensors is missing.
        """
        metadata = {"format": _FORMAT, "options": json.dumps(self._options())}
        tensors = {name: x.contiguous() for name, x in self._all_tensors().items()}
        _safetensors("save").torch.save_file(tensors, str(path), metadata=metadata)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> AttentionSnapshot:
        """Read a file that `save` wrote.

        Raises:
            ImportError: the package safetensors is missing.
            TypeError: a tensor or an option in the file is of a wrong type.
            ValueError: the file holds something else, or tensors and options that do not fit
                together.
        """
        op, safetensors = f"{OP}.load", _safetensors("load")
        wanted = f"{op}: {path} must be written by AttentionSnapshot.save ({_FORMAT})"
        try:
            with safetensors.safe_open(str(path), framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"{wanted}; got format {metadata.get('format')!r}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            options = json.loads(metadata.get("options", "null"))
        except (safetensors.SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{wanted}; it does not read: {error}") from error
        if not isinstance(options, dict):
            raise ValueError(f"{wanted}; got options {options!r}")
        return cls._make(op, tensors, options)

    def __getstate__(self) -> dict[str, Any]:
        return {**self._all_tensors(), **self._options()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors = {name: state[name] for name in TENSORS if state.get(name) is not None}
        caches = (*TENSORS, "_normalisers", "_checked")
        options = {name: value for name, value in state.items() if name not in caches}
        self._adopt(self._make(OP, tensors, options))

    # -- inside ----------------------------------------------------------------------------------

    def check(self) -> None:
        """Check again what was assigned, or edited in place, since the last check.

        Ops call it, because kernels rely on the checks. It takes 2 us if nothing changed.
        """
        if torch.compiler.is_compiling():
            return
        found = self._found()
        if found[0] != self._checked[0] or not all(map(operator.is_, found[1:], self._checked[1:])):
            check_parts(OP, self._all_tensors(), self._options(), read_values=True)
            self._checked, self._normalisers = found, None

    def _found(self) -> tuple[Any, ...]:
        """How often torch wrote into the indices (None if not counted), and what there is."""
        versions = tuple(
            x._version if isinstance(x, Tensor) and not x.is_inference() else None
            for x in (self.prefix_index, *_PACKED(self))
        )
        return versions, *_PARTS(self)

    def _all_tensors(self) -> dict[str, Tensor]:
        tensors = {name: getattr(self, name) for name in TENSORS}
        return {name: x for name, x in tensors.items() if x is not None}

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in OPTIONS}

    def _signature(self) -> dict[str, Any]:
        """What must be equal in snapshots that form one batch."""
        bias = self.span_bias
        step = 2 if self.is_packed else 1  # their numbers of tokens may differ
        return {
            "packing": "packed" if self.is_packed else "padded",
            **self._options(),
            "shape": (*self.q.shape[1::step], *self.k.shape[1::step]),
            "shared_prefix": self.shared_prefix,
            "num_spans": None if bias is None else bias.shape[-1],
            "having head_weights": self.head_weights is not None,
            "dtype": self.dtype,
            "device": self.device,
        }

    @classmethod
    def _make(
        cls,
        op: str,
        tensors: Mapping[str, Tensor],
        options: Mapping[str, Any],
        *,
        read_values: bool = True,
    ) -> AttentionSnapshot:
        check_parts(op, tensors, options, read_values=read_values)
        snapshot = cls.__new__(cls)
        for name in TENSORS:
            x = tensors.get(name)
            setattr(snapshot, name, x if x is None or name == "span_bias" else x.contiguous())
        for name in OPTIONS:
            setattr(snapshot, name, options[name])
        if not torch.compiler.is_compiling():
            snapshot._checked = snapshot._found()
        return snapshot

    def _map(self, f: Any) -> AttentionSnapshot:
        self.check()
        tensors = {name: f(name, x) for name, x in self._all_tensors().items()}
        # Reading values would wait for a copy to another device.
        return self._make(OP, tensors, self._options(), read_values=False)

    def _adopt(self, other: AttentionSnapshot) -> None:
        self.__dict__.update(other.__dict__)


def _copy(x: Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    """A copy with its own memory: a slice would keep all of q alive."""
    return x.to(
        device=x.device if device is None else device,
        dtype=x.dtype if dtype is None else dtype,
        copy=True,
        memory_format=torch.contiguous_format,
    )


def _safetensors(method: str) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"{OP}.{method} needs the package safetensors; install it with "
            "`pip install safetensors`"
        ) from error
    return safetensors
