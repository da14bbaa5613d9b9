"""`ShardedPolicy`: the policy of a sequence that is spread over ranks, as if it were whole."""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops import qkv
from ..ops.allocation import accumulation_dtype
from ..ops.divergence.arguments import Kind
from ..ops.divergence.interface import check_kind
from ..ops.packing import offsets_of
from ..ops.policy import attention_divergence, attention_policy, ral_loss
from ..ops.policy.arguments import PolicyArgs, TargetArgs
from ..ops.policy.divergence import composed, shared_by_rows, span_rows_of, target_args
from ..ops.policy.interface import resolve_call
from ..ops.policy.loss import Reduction, row_weights, weighted_sum
from ..runtime import backends, checks
from ..runtime.backends import BackendName
from ..snapshot import AttentionSnapshot
from ..spans import Spans
from ..targets import AttentionTarget
from . import keys_stay
from .exchange import Exchange, cut, place, sum_over_ranks
from .layout import BytesMoved, Layout, Moves, Piece, Plan, Range, make_plan

_OP = "ShardedPolicy"


@dataclass(frozen=True)
class ShardedSnapshot:
    """What a rank keeps of a reference policy: see `ShardedPolicy.snapshot`.

    Attributes:
        parts: with moves="keys" a snapshot for each chunk of the rank that has rows, with the keys
            that they see; with moves="rows" one, with the queries of all rows and the rank's keys.
        moves, plan: those of the `ShardedPolicy` that made it.
        head_weights: with moves="rows", its own weights of the whole, or None.
    """

    parts: tuple[AttentionSnapshot, ...]
    moves: Moves
    plan: Plan
    head_weights: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes on this rank."""
        return sum(part.nbytes for part in self.parts)

    def to(self, *args: Any, **options: Any) -> ShardedSnapshot:
        """On another device, or in another dtype: `AttentionSnapshot.to`."""
        parts = tuple(part.to(*args, **options) for part in self.parts)
        weights = self.head_weights
        weights = None if weights is None else weights.to(parts[0].device)
        return ShardedSnapshot(parts, self.moves, self.plan, weights)


ShardedReference = ShardedSnapshot | AttentionTarget | Tensor


class ShardedPolicy:
    """The attention policy of a layer whose sequence is spread over ranks, as if it were whole.

        sharded = rk.ShardedPolicy(q, k, rows=(start, stop), layout="head_tail", group=group)
        loss = sharded.ral_loss(reference, advantages)     # the whole sequence's, on every rank

    q and k are this rank's. All that is small is the whole's and the same on every rank: rows,
    advantages, mask, spans, scope and padding. Results are the whole's, too. Every rank must make
    the same calls, those without rows as well, and call backward on the same function of the
    results. It then gets the whole loss's gradient of its own q and k. Parameters get the sum of
    their gradients over ranks. Data parallelism takes a mean instead: multiply by the group's size.

    There are two ways, whose results agree up to rounding:

    - moves="keys": each rank receives the keys that its rows see, up to its last row and from the
      window's start, and sends their gradients back. The ops' kernels do the rest.
    - moves="rows": keys stay. Every rank receives the queries of all rows and forms its keys' part
      of each row's sums; these, and gradients of the queries, go back. It takes O(T·H·D) bytes
      whatever the length, and plain PyTorch in place of kernels.
    - None: "keys", unless a rank would receive more than 256 MiB of them and rows move fewer bytes.

    Under Ulysses, q and k are those before the all-to-all: all heads, this rank's rows. Under ring
    attention and context parallelism, a rank's rows often come as a head and a tail. Attention is
    causal. The sums that ranks exchange are float32 (float64 for float64 q); they are added in the
    order of ranks, so results repeat bit for bit and are equal on all ranks.

    Args:
        q: [B, H, L, D] this rank's queries after RoPE.
        k: [B, Hk, L, D] this rank's keys.
        rows: the T rows of the whole that have a policy, a slice or (start, stop); default all.
            With `cu_seqlens`, None or one for each sequence, relative to its start.
        layout: which positions a rank holds. "contiguous": rank r has the r-th of W chunks.
            "head_tail": ranks have chunks r and 2W - 1 - r of 2W, as context parallelism balances
            causal work. Or the (start, stop) chunks of each rank, in the order that it holds them.
        group: the ranks of one sequence; default the default group.
        cu_seqlens: where B = 1 and sequences are packed, their offsets in the whole, int [S + 1].
        spans, scope, key_padding_mask: as in `attention_policy`, of the whole's N keys.
        head_weights: as in `attention_policy`, [H] or [B, H] (packed [S, H]), the same on every
            rank. As a parameter's, their gradient is the sum over ranks.
        exclude_self, scale, window, softcap, backend: as in `attention_policy`.
        moves: "keys", "rows" or None, as above.

    Raises:
        TypeError, ValueError: an argument of a wrong type or value.
        RuntimeError: torch.distributed is not initialised.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        *,
        rows: Any = None,
        layout: Layout = "contiguous",
        group: dist.ProcessGroup | None = None,
        cu_seqlens: Tensor | list[int] | None = None,
        spans: Spans | None = None,
        scope: Tensor | Spans | None = None,
        key_padding_mask: Tensor | None = None,
        head_weights: Tensor | None = None,
        exclude_self: bool = True,
        scale: float | None = None,
        window: int | tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        moves: Moves | None = None,
        backend: BackendName | None = None,
    ) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                f"{_OP}: torch.distributed must be initialised; without ranks, use "
                "attention_policy, attention_divergence and ral_loss"
            )
        q, k, _ = qkv.autocast_inputs(q, k, k)
        qkv.check_qkv(_OP, q, k, k, None)  # k in place of v: the same checks
        if q.shape[2] != k.shape[2]:
            raise ValueError(
                f"{_OP}: q and k must be of the same positions; got {q.shape[2]} and {k.shape[2]}"
            )
        if cu_seqlens is not None and q.shape[0] != 1:
            raise ValueError(f"{_OP}: cu_seqlens needs a batch of 1; got B={q.shape[0]}")
        if moves not in (None, "keys", "rows"):
            raise ValueError(f"{_OP}: moves must be None, 'keys' or 'rows'; got {moves!r}")
        checks.check_flag(_OP, "exclude_self", exclude_self)
        self.q, self.k, self._group = q, k, group
        self._backend, self._requested = backend, backends.check_backend(_OP, backend)
        self._rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        window_left, _ = checks.resolve_window(_OP, window, is_causal=True)
        self.plan = make_plan(
            _OP, layout, world_size, world_size * q.shape[2], rows=rows, cu_seqlens=cu_seqlens,
            window_left=window_left,
        )  # fmt: skip
        held = sum(stop - start for start, stop in self.plan.chunks[self._rank])
        if held != q.shape[2]:
            raise ValueError(
                f"{_OP}: q must hold the {held} positions that layout gives rank {self._rank}; got "
                f"{q.shape[2]}"
            )
        if cu_seqlens is not None and key_padding_mask is not None:
            raise NotImplementedError(
                f"{_OP}: key_padding_mask is not supported with cu_seqlens: packed rows have no "
                "padding"
            )
        self._is_packed, self._exclude_self = cu_seqlens is not None, exclude_self
        self._head_weights = head_weights
        self._spans = spans
        if spans is not None:
            self._check_spans(spans)
        scope = scope.ids >= 0 if isinstance(scope, Spans) else scope
        self._scope = self._check_keys("scope", scope)
        self._head_weights_of(head_weights, q)
        self._padding = self._check_keys("key_padding_mask", key_padding_mask)
        self._options: dict[str, Any] = {
            "scale": checks.resolve_scale(_OP, scale, q.shape[3]),
            "window": None if window_left < 0 else (window_left, 0),
            "softcap": softcap,
        }
        self._softcap = checks.resolve_softcap(_OP, softcap)
        self._calls = self.plan.calls(self._rank)
        self._sizes = q.shape[0], (q.shape[1], k.shape[1]), q.shape[3], q.element_size()
        self.moves: Moves = self.plan.choose(*self._sizes) if moves is None else moves

    # -- what it gives ---------------------------------------------------------------------------

    def policy(self) -> Tensor:
        """The policy over spans: `attention_policy`, float32 [B, T, S]; differentiable.

        Raises:
            ValueError: without spans, as rows over keys are of the size of all keys.
        """
        if self._spans is None:
            raise ValueError(f"{_OP}.policy: spans must be given; got None")
        if self.moves == "keys":
            return self._assembled(
                [
                    attention_policy(q, k, backend=self._backend, **options)
                    for q, k, options in self._arguments()
                ],
                (self._spans.num_spans,),
            )
        if self.plan.num_rows == 0:
            return self._assembled([], (self._spans.num_spans,))
        return keys_stay.span_policy(self._side(), self._places())

    def divergence(self, reference: ShardedReference, kind: Kind = "jsd") -> Tensor:
        """How far the policy is from `reference`: `attention_divergence`, float32 [B, T].

        Args:
            reference: a `snapshot` of the same rows and ranks; or an `AttentionTarget` of the
                whole, over its N keys or over spans, the same on every rank, as [B, 1, N] or
                [B, 1, S] too; with spans also a tensor [B, T, S].
            kind: as in `attention_divergence`.
        """
        op = f"{_OP}.divergence"
        check_kind(op, kind)
        reference = shared_by_rows(reference, self._whole)
        target = None
        if isinstance(reference, AttentionTarget):
            target = target_args(op, reference, self._whole)
            if self._spans is not None:
                reference = span_rows_of(target, self._whole)
        if isinstance(reference, Tensor) and self._spans is not None:
            p = self.policy()
            if reference.shape != p.shape:
                raise ValueError(
                    f"{op}: reference must be [B, T, S] = {tuple(p.shape)}; got "
                    f"{tuple(reference.shape)}"
                )
            return composed(p, reference, kind, self._requested)
        parts = self._parts_of(op, reference, target)
        if self.moves == "keys":
            return self._assembled(
                [
                    attention_divergence(q, k, part, kind, backend=self._backend, **options)
                    for (q, k, options), part in zip(self._arguments(), parts, strict=True)
                ]
            )
        if self.plan.num_rows == 0:
            return self._assembled([])
        if target is not None:
            own = _over_keys(target, self.plan.chunks[self._rank])
            return keys_stay.divergence(self._side(), own, self._places(), kind)
        (part,) = parts
        assert isinstance(part, AttentionSnapshot)
        weights = self._weights_of_rows(self._weights_of_reference(op, reference, part))
        theirs = keys_stay.Side(part.q, part.k, part.scale, part.window_left, part.softcap, weights)
        if self._spans is None:
            return keys_stay.divergence(self._side(), theirs, self._places(), kind)
        with torch.no_grad():
            r = keys_stay.span_policy(theirs, self._places())
        return composed(self.policy(), r, kind, self._requested)

    def ral_loss(
        self,
        reference: ShardedReference,
        advantages: Tensor,
        mask: Tensor | None = None,
        *,
        kind: Kind = "jsd",
        reduction: Reduction = "token_mean",
    ) -> Tensor:
        """The RAL objective of the whole sequence: `ral_loss`, a float32 scalar on every rank.

        Args:
            reference, kind: as in `divergence`.
            advantages: floating [B], [B, T], or with `cu_seqlens` one for each sequence, [S].
            mask: bool [B, T], True = a token that counts; default all.
            reduction: as in `ral_loss`; means are over the tokens of all ranks.
        """
        op = f"{_OP}.ral_loss"
        weights = row_weights(op, advantages, mask, reduction, self._whole)
        check_kind(op, kind)
        if self.moves == "rows" or self._spans is not None:
            return weighted_sum(self.divergence(reference, kind), weights)
        reference = shared_by_rows(reference, self._whole)
        target = None
        if isinstance(reference, AttentionTarget):
            target = target_args(op, reference, self._whole)
        parts = self._parts_of(op, reference, target)
        total = self._zero()
        for (q, k, options), part, pieces in zip(
            self._arguments(), parts, self._calls, strict=True
        ):
            total = total + ral_loss(
                q, k, part, weights[:, self._rows_of(pieces)], kind=kind, reduction="sum",
                backend=self._backend, **options,
            )  # fmt: skip
        return sum_over_ranks(total, self._group)

    @torch.no_grad()
    def snapshot(self, *, head_weights: Tensor | None = None, **options: Any) -> ShardedSnapshot:
        """The policy now, as a reference policy. Making it moves what a forward moves, once.

        Args:
            head_weights: its own, as those of `ShardedPolicy`; default those of the policy that is
                compared with it.
            options: dtype, device, pin_memory, as in `AttentionSnapshot`.
        """
        own = self._head_weights_of(head_weights, self.q)
        if self.moves == "rows":
            taken = {**self._options, **options}
            parts = [AttentionSnapshot(self._all_rows, self.k, **taken)]
        else:
            own = None  # each part has them
            parts = []
            _ = self._keys_seen  # ranks without rows send their keys, too
            for (q, k, arguments), pieces in zip(self._arguments(), self._calls, strict=True):
                for name in ("spans", "scope", "key_padding_mask", "exclude_self"):
                    arguments.pop(name, None)  # the comparing call's
                arguments["head_weights"] = self._weights_of_call(head_weights, pieces)
                parts.append(AttentionSnapshot(q, k, **arguments, **options))
        return ShardedSnapshot(tuple(parts), self.moves, self.plan, own)

    def bytes_moved(self, moves: Moves | None = None) -> BytesMoved:
        """What one `ral_loss` and its backward move, as `sharded_bytes` says; default as chosen."""
        return self.plan.bytes_moved(moves or self.moves, *self._sizes)

    # -- inside ----------------------------------------------------------------------------------

    @functools.cached_property
    def _whole(self) -> PolicyArgs:
        """The sizes of the whole's call, for checks: its rows, keys, sequences and spans."""
        zero, batch_size = self.q.new_zeros(1), self.q.shape[0]
        q, k = (zero.expand(batch_size, 1, n, 1) for n in (self.plan.num_rows, self.plan.seqlen))
        of_rows, of_keys = (
            offsets_of([stop - start for start, stop in ranges]) if self._is_packed else None
            for ranges in (self.plan.rows, self.plan.sequences)
        )
        return resolve_call(
            _OP, q, k, rows=None, spans=self._spans, span_bias=None, scope=None,
            head_weights=None, exclude_self=True, is_causal=True, scale=None, window=None,
            softcap=None, key_padding_mask=None, cu_seqlens_q=of_rows, cu_seqlens_k=of_keys,
        )  # fmt: skip

    @functools.cached_property
    def _keys_seen(self) -> Tensor:
        """[B, Hk, n, D], the keys that this rank's rows see, in the order of positions."""
        return self._exchanged(self.k, self.plan.keys_seen())

    @functools.cached_property
    def _all_rows(self) -> Tensor:
        """[B, H, T, D], the queries of all ranks' rows."""
        return self._exchanged(self.q, self.plan.all_rows())

    def _exchanged(self, x: Tensor, needs: list[list[Range]]) -> Tensor:
        with torch.enable_grad():  # the result is kept, and a later call may need gradients
            return Exchange(self.plan.chunks, needs, self._rank, self._group)(x)

    def _arguments(self) -> list[tuple[Tensor, Tensor, dict[str, Any]]]:
        """q, k and keyword arguments of an op, for each chunk of this rank that has rows."""
        return [self._arguments_of(pieces) for pieces in self._calls]

    def _arguments_of(self, pieces: list[Piece]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        keys = [piece.keys for piece in pieces]
        counts = [piece.rows[1] - piece.rows[0] for piece in pieces]
        queries = [(x.local, x.local + n) for x, n in zip(pieces, counts, strict=True)]
        options: dict[str, Any] = {**self._options, "exclude_self": self._exclude_self}
        if self._spans is not None:
            ids = cut(self._spans.ids, keys, -1).contiguous()
            options["spans"] = self._spans._replace(ids, self._spans.num_spans)
        if self._scope is not None:
            options["scope"] = cut(self._scope, keys, -1)
        if self._padding is not None:
            options["key_padding_mask"] = cut(self._padding, keys, -1)
        if self._head_weights is not None:
            options["head_weights"] = self._weights_of_call(self._head_weights, pieces)
        if len(pieces) > 1:
            options["cu_seqlens_q"] = offsets_of(counts)
            options["cu_seqlens_k"] = offsets_of([stop - start for start, stop in keys])
        received = self.plan.keys_seen()[self._rank]
        places = [place(each, received) for each in keys]
        return cut(self.q, queries, 2), cut(self._keys_seen, places, 2), options

    def _rows_of(self, pieces: list[Piece]) -> slice:
        """Which of all T rows a chunk has; they follow one another."""
        count = sum(piece.rows[1] - piece.rows[0] for piece in pieces)
        first = self.plan.place(pieces[0].rows[0])
        return slice(first, first + count)

    def _assembled(self, values: list[Tensor], last: tuple[int, ...] = ()) -> Tensor:
        """[B, T, *last] of all ranks, from the rows of each chunk of this one."""
        whole = self._zero().expand(self.q.shape[0], self.plan.num_rows, *last)
        for value, pieces in zip(values, self._calls, strict=True):
            rows = self._rows_of(pieces)
            around = (0, 0) * len(last) + (rows.start, self.plan.num_rows - rows.stop)
            whole = whole + torch.nn.functional.pad(value, around)
        return sum_over_ranks(whole, self._group)

    def _zero(self) -> Tensor:
        """0 that has q's and k's place in the graph: ranks without rows take part in backwards."""
        received = self._keys_seen if self.moves == "keys" else self._all_rows
        empty = [x[:, :, :0].sum(dtype=accumulation_dtype(x)) for x in (self.q, self.k, received)]
        if self._head_weights is not None:
            empty.append(self._head_weights[..., :0].sum(dtype=accumulation_dtype(self.q)))
        return torch.stack(empty).sum()

    def _head_weights_of(self, head_weights: Any, q: Tensor) -> Tensor | None:
        """Checked and normalised weights of the whole's sequences, [B or S, H]; None without."""
        if head_weights is None:
            return None
        samples = len(self.plan.rows) if self._is_packed else q.shape[0]
        return qkv.prepare_head_weights(_OP, head_weights, q, samples, self._is_packed)

    def _weights_of_call(self, weights: Tensor | None, pieces: list[Piece]) -> Tensor | None:
        """As they were given, for the sequences of a chunk's rows."""
        if weights is None or weights.dim() == 1 or not self._is_packed:
            return weights
        starts = [start for start, _ in self.plan.sequences]
        return weights[[bisect_right(starts, piece.rows[0]) - 1 for piece in pieces]]

    def _weights_of_rows(self, weights: Tensor | None) -> Tensor | None:
        """[B, H, T], from normalised weights of the whole's sequences."""
        if weights is None:
            return None
        if not self._is_packed:
            return weights[:, :, None].expand(-1, -1, self.plan.num_rows)
        counts = torch.tensor([stop - start for start, stop in self.plan.rows])
        return weights.repeat_interleave(counts.to(weights.device), 0).T[None]

    def _weights_of_reference(
        self, op: str, reference: Any, part: AttentionSnapshot
    ) -> Tensor | None:
        """The snapshot's own weights, or this policy's as constants, as the ops take them."""
        ours = self._head_weights_of(self._head_weights, self.q)
        own = reference.head_weights
        if own is not None:
            return qkv.floored(own) if qkv.is_learned(self._head_weights) else own
        if ours is not None and part.q.shape[1] != ours.shape[1]:
            raise ValueError(
                f"{op}: reference must have head_weights of its own, or H={ours.shape[1]} heads, "
                f"for those of this policy; got {part.q.shape[1]} heads"
            )
        return None if ours is None else ours.detach()

    def _side(self) -> keys_stay.Side:
        scale = self._options["scale"]
        left = self.plan.window_left
        weights = self._weights_of_rows(self._head_weights_of(self._head_weights, self.q))
        return keys_stay.Side(self._all_rows, self.k, scale, left, self._softcap, weights)

    def _places(self) -> keys_stay.Places:
        """Where rows and this rank's keys are."""
        chunks, device = self.plan.chunks[self._rank], self.q.device
        rows = cut(torch.arange(self.plan.seqlen, device=device), self.plan.rows, 0)
        starts = [
            torch.full((stop - start,), first, device=device)
            for (first, _), (start, stop) in zip(self.plan.sequences, self.plan.rows, strict=True)
        ]
        keys = cut(torch.arange(self.plan.seqlen, device=device), chunks, 0)
        spans, scope = self._spans, self._scope
        if spans is not None and scope is None:
            scope = spans.ids >= 0  # as in the ops: rows over spans sum to 1
        ids = None
        if spans is not None:
            ids = torch.where(spans.ids >= 0, spans.ids, spans.num_spans).long()
            ids = cut(torch.atleast_2d(ids), chunks, -1)
        return keys_stay.Places(
            rows=rows,
            starts=torch.cat(starts),
            keys=keys,
            padding=None if self._padding is None else cut(self._padding, chunks, -1),
            scope=None if scope is None else cut(torch.atleast_2d(scope), chunks, -1),
            exclude_self=self._exclude_self,
            spans=ids,
            num_spans=0 if spans is None else spans.num_spans,
            group=self._group,
        )

    def _parts_of(
        self, op: str, reference: Any, target: TargetArgs | None
    ) -> Sequence[AttentionSnapshot | AttentionTarget]:
        """The reference of each chunk of this rank that has rows; with moves="rows" of all rows."""
        if target is not None:
            return [self._target_of(target, pieces) for pieces in self._calls]
        if not isinstance(reference, ShardedSnapshot):
            raise TypeError(
                f"{op}: reference must be a ShardedSnapshot or an AttentionTarget, or with spans a "
                f"tensor [B, T, S]; got {type(reference).__name__}"
            )
        got = {"moves": reference.moves, **vars(reference.plan)}
        for name, wanted in {"moves": self.moves, **vars(self.plan)}.items():
            if got[name] != wanted:
                raise ValueError(
                    f"{op}: reference must have the {name} of this policy, {wanted!r}; got "
                    f"{got[name]!r}"
                )
        return reference.parts

    def _target_of(self, target: TargetArgs, pieces: list[Piece]) -> AttentionTarget:
        """The targets of a chunk's rows over the keys that they see, by index."""
        assert target.index is not None
        own = _over_keys(target, [piece.keys for piece in pieces])
        assert own.values is not None
        index = target.index[:, self._rows_of(pieces)]
        return AttentionTarget(own.values, own.ids, index=index)

    def _check_spans(self, spans: Any) -> None:
        wanted = f"{_OP}: spans must be Spans over the whole's N={self.plan.seqlen} keys"
        if not isinstance(spans, Spans):
            raise TypeError(f"{wanted}; got {type(spans).__name__}")
        spans.check()
        if spans.seqlen_k != self.plan.seqlen or spans.batch_size not in (None, self.q.shape[0]):
            raise ValueError(f"{wanted}; got {tuple(spans.ids.shape)}")
        checks.check_same_device(_OP, "spans", spans.ids, self.q, "q")

    def _check_keys(self, name: str, value: Any) -> Tensor | None:
        """A bool tensor over all N keys, or None."""
        if value is None:
            return None
        wanted = (
            f"{_OP}: {name} must be bool [N] or [B, N] over the whole's N={self.plan.seqlen} keys"
        )
        if not isinstance(value, Tensor) or value.dtype != torch.bool:
            raise TypeError(f"{wanted}; got {getattr(value, 'dtype', type(value).__name__)}")
        if tuple(value.shape) not in (
            (self.plan.seqlen,),
            (1, self.plan.seqlen),
            (self.q.shape[0], self.plan.seqlen),
        ):
            raise ValueError(f"{wanted}; got {tuple(value.shape)}")
        checks.check_same_device(_OP, name, value, self.q, "q")
        return value


def _over_keys(target: TargetArgs, ranges: Sequence[Range]) -> TargetArgs:
    """The same targets over the keys of `ranges` alone, numbered as they follow one another."""
    assert target.values is not None
    if target.ids is None:
        return TargetArgs(cut(target.values, ranges, -1), None, target.index)
    ids, before = torch.full_like(target.ids, -1), 0
    for start, stop in ranges:
        inside = (target.ids >= start) & (target.ids < stop)
        ids = torch.where(inside, target.ids - start + before, ids)
        before += stop - start
    return TargetArgs(target.values, ids, target.index)
