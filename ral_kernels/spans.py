"""Spans: which key belongs to which frame, image, tile or token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .runtime.checks import check_tensor, dtype_name, has_values, is_int, to_int

Granularity = Literal["frame", "image", "tile", "token"]
GRANULARITIES: tuple[Granularity, ...] = ("frame", "image", "tile", "token")


class Spans:
    """A map from keys to spans: `ids[i]` is the span of key `i`, or -1 for none.

    Spans may be contiguous, which is the fast path of every backend, or not. Treat the object as
    immutable: kernels rely on the checks that are made here. Ids that torch edited since are
    checked again by the next call. Under `torch.compile` the values cannot be read, so ids out of
    range become -1 and do not raise.

    Args:
        ids: integer tensor [N] for all samples of a batch, or [B, N]; kept as a copy, contiguous
            int32.
        num_spans: number of spans S; every id is in [-1, S).

    Raises:
        TypeError: `ids` is not an int32 or int64 tensor, or `num_spans` is not an int.
        ValueError: a shape or a value out of range.
    """

    ids: Tensor
    num_spans: int

    def __init__(self, ids: Tensor, num_spans: int) -> None:
        _check_kinds(ids, num_spans)
        num_spans = to_int(num_spans)
        if has_values(ids):
            # The copy is what is checked: the caller's memory may change at any time.
            ids = ids.to(ids.dtype, copy=True)
            _check_values(ids, num_spans)
        else:
            ids = torch.where((ids >= 0) & (ids < num_spans), ids, -1)
        self._keep(ids.to(torch.int32).contiguous(), num_spans)

    def _keep(self, ids: Tensor, num_spans: int) -> None:
        self.ids = ids
        self.num_spans = num_spans
        self._checked = None if torch.compiler.is_compiling() else (ids, num_spans, _version(ids))

    def check(self) -> None:
        """Check `ids` and `num_spans` again if they were assigned, or edited in place, since.

        Ops call it, because kernels rely on the check. It takes 2 us if nothing changed.
        """
        if torch.compiler.is_compiling():
            return
        ids, num_spans = self.ids, self.num_spans
        last = self._checked
        if last is None or last[0] is not ids or last[1:] != (num_spans, _version(ids)):
            _check_kinds(ids, num_spans)
            if ids.dtype != torch.int32:
                raise TypeError(f"Spans: ids must stay int32; got {dtype_name(ids.dtype)}")
            if has_values(ids):
                _check_values(ids, num_spans)
            self._keep(ids.contiguous(), num_spans)

    def __getstate__(self) -> dict[str, Any]:
        return {"ids": self.ids, "num_spans": self.num_spans}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state.get("ids"), state.get("num_spans"))  # type: ignore[misc]

    @classmethod
    def from_lengths(
        cls,
        lengths: Iterable[int],
        *,
        start: int = 0,
        seqlen_k: int | None = None,
        device: torch.device | str | None = None,
    ) -> Spans:
        """Contiguous spans of the given lengths, one after the other from key `start`.

        Args:
            lengths: number of keys of each span, >= 0.
            start: keys before `start` belong to no span.
            seqlen_k: total number of keys N, default `start + sum(lengths)`; keys after the last
                span belong to none.
            device: of `ids` [N].
        """
        given: Any = lengths.tolist() if isinstance(lengths, Tensor) else lengths
        if not isinstance(given, Iterable):
            raise TypeError(
                "Spans.from_lengths: lengths must be a sequence of integers, one a span; got "
                f"{given!r}"
            )
        lengths = list(given)
        for length in lengths:
            if not is_int(length):
                raise TypeError(f"Spans.from_lengths: lengths must hold integers; got {length!r}")
            if length < 0:
                raise ValueError(f"Spans.from_lengths: lengths must be >= 0; got {length}")
        if not is_int(start) or start < 0:
            raise ValueError(f"Spans.from_lengths: start must be an int >= 0; got {start!r}")
        if seqlen_k is not None and not is_int(seqlen_k):
            raise TypeError(
                f"Spans.from_lengths: seqlen_k must be None or an int; got {seqlen_k!r}"
            )
        lengths = [to_int(length) for length in lengths]
        start = to_int(start)
        stop = start + sum(lengths)
        total = stop if seqlen_k is None else to_int(seqlen_k)
        if total < stop:
            raise ValueError(
                f"Spans.from_lengths: seqlen_k must be at least start + sum(lengths) = {stop}; got "
                f"{total}"
            )
        ids = torch.full((total,), -1, dtype=torch.int32)
        ids[start:stop] = torch.repeat_interleave(
            torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths, dtype=torch.int64)
        )
        return cls(ids if device is None else ids.to(device), len(lengths))

    @classmethod
    def from_vision_grid(
        cls,
        input_ids: Tensor,
        grid_thw: Tensor | Sequence[Sequence[int]],
        *,
        token_id: int | Sequence[int],
        merge_size: int = 2,
        granularity: Granularity = "frame",
        tile: tuple[int, int] | None = None,
    ) -> Spans:
        """Spans over the visual tokens of a prompt, from the output of a Qwen-VL processor.

        An item (image or video) of grid `(t, h, w)` takes `t * (h / merge_size) * (w / merge_size)`
        placeholder tokens, in the order time, row, column. Only order matches placeholders to
        grids, so both layouts work: one run of placeholders a video (Qwen2-VL, Qwen2.5-VL), and one
        run a frame between timestamps (Qwen3-VL). A "frame" is one step of `t`, which is
        `temporal_patch_size` (2) frames of the source video.

        Args:
            input_ids: [N] or [B, N] prompt with placeholders. Grids follow the order of the batch,
                as processors return them. The numbering of spans restarts in each sample, and
                `num_spans` is the largest number.
            grid_thw: [items, 3] `image_grid_thw` or `video_grid_thw`, in patches. Images and videos
                of one prompt are two calls, joined by `union`.
            token_id: the placeholder's id (`image_token_id` or `video_token_id` of the processor or
                config), or several.
            merge_size: patches a side that the model merges into one token (`spatial_merge_size`).
            granularity: one span a "frame", a whole "image" (or video), a "tile" of a frame, or a
                "token".
            tile: (rows, columns) of tokens in a tile, for `granularity="tile"`; tiles at the edge
                may be smaller.

        Raises:
            TypeError, ValueError: arguments of a wrong type or value, or token counts that do not
                match the grid.
        """
        name = "Spans.from_vision_grid"
        if not isinstance(input_ids, Tensor):
            raise TypeError(f"{name}: input_ids must be a tensor; got {type(input_ids).__name__}")
        if input_ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"{name}: input_ids must be integers; got {dtype_name(input_ids.dtype)}"
            )
        if input_ids.dim() not in (1, 2):
            raise ValueError(
                f"{name}: input_ids must be [N] or [B, N]; got {tuple(input_ids.shape)}"
            )
        token_ids = _token_ids(name, token_id)
        grids = merged_grids(name, grid_thw, merge_size)
        tile = check_granularity(name, granularity, tile)
        items = [number_tokens(grid, granularity, tile) for grid in grids]

        visual = torch.isin(input_ids, torch.tensor(token_ids, device=input_ids.device)).cpu()
        samples = visual if visual.dim() == 2 else visual[None]
        wanted, got = sum(ids.numel() for ids, _ in items), int(samples.sum())
        if wanted != got:
            raise ValueError(
                f"{name}: grid_thw of {len(grids)} items describes {wanted} visual tokens, "
                f"but input_ids holds {got}"
            )
        ids = torch.full(samples.shape, -1, dtype=torch.int32)
        num_spans, item = 0, 0
        for index, sample in enumerate(samples):
            count = int(sample.sum())
            parts: list[Tensor] = []
            offset = filled = 0
            while filled < count:
                numbers, size = items[item]
                parts.append(numbers + offset)
                offset, filled, item = offset + size, filled + numbers.numel(), item + 1
            if filled != count:
                raise ValueError(
                    f"{name}: the grids must end where samples end; sample {index} holds {count} "
                    f"visual tokens, its grids up to item {item - 1} describe {filled}"
                )
            if parts:
                ids[index, sample] = torch.cat(parts)
            num_spans = max(num_spans, offset)
        return cls(ids.reshape(input_ids.shape).to(input_ids.device), num_spans)

    @property
    def seqlen_k(self) -> int:
        """Number of keys N."""
        return self.ids.shape[-1]

    @property
    def batch_size(self) -> int | None:
        """Batch size of per-sample ids [B, N]; None for ids [N], which fit any batch."""
        return self.ids.shape[0] if self.ids.dim() == 2 else None

    @property
    def device(self) -> torch.device:
        return self.ids.device

    @property
    def is_contiguous(self) -> bool:
        """Whether every span is one run of keys in each sample."""
        ids = self.ids if self.ids.dim() == 2 else self.ids[None]
        for row in ids.cpu():
            runs = torch.unique_consecutive(row)
            runs = runs[runs >= 0]
            if runs.numel() != torch.unique(runs).numel():
                return False
        return True

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Spans:
        """The same spans on `device`."""
        return self._replace(self.ids.to(device, non_blocking=non_blocking), self.num_spans)

    def extend_to(self, seqlen_k: int) -> Spans:
        """The same spans over more keys, such as generated text; the new keys belong to none."""
        if not is_int(seqlen_k):
            raise TypeError(f"Spans.extend_to: seqlen_k must be an int; got {seqlen_k!r}")
        extra = to_int(seqlen_k) - self.seqlen_k
        if extra < 0:
            raise ValueError(
                f"Spans.extend_to: seqlen_k must be at least {self.seqlen_k}; got {seqlen_k}"
            )
        ids = torch.nn.functional.pad(self.ids, (0, extra), value=-1)
        return self._replace(ids, self.num_spans)

    def union(self, other: Spans) -> Spans:
        """Both sets of spans, such as images and videos; those of `other` are numbered after these.

        Raises:
            ValueError: the two differ in N or B, or a key belongs to both.
        """
        if not isinstance(other, Spans):
            raise TypeError(f"Spans.union: other must be Spans; got {type(other).__name__}")
        batches = {spans.batch_size for spans in (self, other)} - {None}
        if self.seqlen_k != other.seqlen_k or len(batches) > 1:
            raise ValueError(
                f"Spans.union: both must cover the same keys; got {tuple(self.ids.shape)} and "
                f"{tuple(other.ids.shape)}"
            )
        both = (self.ids >= 0) & (other.ids >= 0)
        if has_values(both) and bool(both.any()):
            raise ValueError(
                f"Spans.union: spans must be disjoint; got {int(both.sum())} keys in both"
            )
        shifted = torch.where(other.ids >= 0, other.ids + self.num_spans, -1)
        ids = torch.where(self.ids >= 0, self.ids, shifted.to(torch.int32))
        return self._replace(ids, self.num_spans + other.num_spans)

    def _replace(self, ids: Tensor, num_spans: int) -> Spans:
        """Spans from valid ids, without a check of values, which would wait for the device."""
        self.check()
        spans = object.__new__(Spans)
        spans._keep(ids, num_spans)
        return spans

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Spans):
            return NotImplemented
        return self.num_spans == other.num_spans and torch.equal(self.ids, other.ids)

    def __repr__(self) -> str:
        shape = ", ".join(str(size) for size in self.ids.shape)
        return f"Spans(ids=int32[{shape}] on {self.ids.device}, num_spans={self.num_spans})"


def _check_kinds(ids: Any, num_spans: Any) -> None:
    check_tensor("Spans", "ids", ids, "an int32 tensor")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"Spans: ids must be int32 or int64; got {dtype_name(ids.dtype)}")
    if ids.dim() not in (1, 2):
        raise ValueError(f"Spans: ids must be [N] or [B, N]; got {tuple(ids.shape)}")
    if not is_int(num_spans):
        raise TypeError(f"Spans: num_spans must be an int; got {type(num_spans).__name__}")
    if num_spans < 0 or num_spans > torch.iinfo(torch.int32).max:
        raise ValueError(f"Spans: num_spans must be in [0, 2**31); got {num_spans}")


def _check_values(ids: Tensor, num_spans: int) -> None:
    if ids.numel() == 0:
        return
    low, high = (int(value) for value in torch.aminmax(ids))
    if low < -1 or high >= num_spans:
        raise ValueError(
            f"Spans: ids must be in [-1, num_spans={num_spans}); got values from {low} to {high}"
        )


def _version(ids: Tensor) -> int | None:
    """How often torch wrote into `ids`; None in inference mode, which does not count."""
    return None if ids.is_inference() else ids._version


def _token_ids(name: str, token_id: Any) -> list[int]:
    token_ids = [token_id] if is_int(token_id) else token_id
    if not isinstance(token_ids, (list, tuple)) or not token_ids or not all(map(is_int, token_ids)):
        raise TypeError(
            f"{name}: token_id must be an int or a non-empty sequence of ints; got {token_id!r}"
        )
    return [to_int(token) for token in token_ids]


def merged_grids(name: str, grid_thw: Any, merge_size: Any) -> list[tuple[int, int, int]]:
    """The grids in tokens: (t, h / merge_size, w / merge_size) of each item."""
    if not is_int(merge_size) or merge_size < 1:
        raise ValueError(f"{name}: merge_size must be an int >= 1; got {merge_size!r}")
    try:
        grid = torch.as_tensor(grid_thw)
    except (TypeError, ValueError, RuntimeError):  # None, text, rows of different lengths
        raise TypeError(
            f"{name}: grid_thw must be integers [items, 3] of (t, h, w); got {grid_thw!r}"
        ) from None
    if grid.numel() == 0:
        return []  # a batch of text alone
    if grid.is_floating_point() or grid.dtype == torch.bool:
        raise TypeError(f"{name}: grid_thw must be integers; got {dtype_name(grid.dtype)}")
    if grid.dim() != 2 or grid.shape[1] != 3:
        raise ValueError(
            f"{name}: grid_thw must be [items, 3] of (t, h, w); got {tuple(grid.shape)}"
        )
    grids = []
    for t, h, w in grid.tolist():
        if min(t, h, w) < 1 or h % merge_size or w % merge_size:
            raise ValueError(
                f"{name}: grid_thw must hold t >= 1 and h, w that are multiples of "
                f"merge_size={merge_size}; got {(t, h, w)}"
            )
        grids.append((t, h // to_int(merge_size), w // to_int(merge_size)))
    return grids


def check_granularity(name: str, granularity: Any, tile: Any) -> tuple[int, int]:
    """The tile in tokens: the given one, or (1, 1) for other granularities."""
    if granularity not in GRANULARITIES:
        raise ValueError(
            f"{name}: granularity must be one of {', '.join(GRANULARITIES)}; got {granularity!r}"
        )
    if granularity != "tile":
        if tile is not None:
            raise ValueError(f"{name}: tile needs granularity='tile'; got {granularity!r}")
        return 1, 1
    if (
        not isinstance(tile, (tuple, list))
        or len(tile) != 2
        or not all(is_int(side) and side >= 1 for side in tile)
    ):
        raise ValueError(f"{name}: tile must be (rows, columns) of tokens, both >= 1; got {tile!r}")
    return to_int(tile[0]), to_int(tile[1])


def number_tokens(
    grid: tuple[int, int, int], granularity: str, tile: tuple[int, int]
) -> tuple[Tensor, int]:
    """The span of each token of one item, in the order of its tokens, and the number of spans."""
    t, h, w = grid
    if granularity == "image":
        return torch.zeros(t * h * w, dtype=torch.int32), 1
    frame = torch.arange(t, dtype=torch.int32)[:, None, None]
    if granularity == "frame":
        return frame.expand(t, h, w).reshape(-1), t
    # A token is a tile of 1 x 1.
    tile_rows, tile_columns = math.ceil(h / tile[0]), math.ceil(w / tile[1])
    row = (torch.arange(h, dtype=torch.int32) // tile[0])[:, None]
    column = torch.arange(w, dtype=torch.int32) // tile[1]
    ids = (frame * tile_rows + row) * tile_columns + column
    return ids.reshape(-1), t * tile_rows * tile_columns
