"""What each of 2 or 4 gloo processes does in the tests of `ShardedPolicy`.

    python -m tests.ops.sharded_ranks FILE WORLD_SIZE:CASE:MOVES ...
    python -m tests.ops.sharded_ranks       # the table of all in docs/sharded.md

A rank computes the whole sequence with the public ops, then its part of it with `ShardedPolicy`.
One process imports everything and then forks the ranks.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

import ral_kernels as rk

N, HEADS, KV_HEADS, HEAD_DIM = 48, 4, 2, 16
WORLDS = (2, 4)
MOVES = ("keys", "rows")
FRAMES = [5, 9, 3, 11, 8]  # lengths of spans; the keys after them are in none


@dataclass(frozen=True)
class Case:
    """A sequence, or several packed ones, and how it lies on ranks.

    rows: of the whole; options: of the ops and of `ShardedPolicy`; chunks: (W) -> layout.
    """

    rows: Any
    layout: str | Callable[[int], Any] = "contiguous"
    batch_size: int = 2
    cu_seqlens: tuple[int, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    reference_heads: tuple[int, int, int] = (HEADS, KV_HEADS, HEAD_DIM)
    kind: str = "jsd"
    reduction: str = "token_mean"
    dtype: torch.dtype = torch.float32
    frames: bool = False
    padding: bool = False
    scope: bool = False
    mask: bool = False
    head_weights: bool = False  # of each sequence, with gradient; a head of weight 0
    target: str | None = None  # in place of a snapshot: "shared", "sequences" or "ids"


def _uneven(world_size: int) -> list[list[tuple[int, int]]]:
    """The last rank has nothing, rank 0 two chunks that do not follow one another."""
    chunks: list[list[tuple[int, int]]] = [[] for _ in range(world_size)]
    chunks[0] = [(30, 41), (0, 7)]
    chunks[1 if world_size > 2 else 0] += [(7, 30), (41, N)]
    return chunks


PACKED = (0, 10, 11, 11, 30, 45)  # a sequence of one token, one of none, a tail after the last
CASES = {
    "ulysses": Case((10, N - 1)),
    "ring": Case((3, N - 1), "head_tail"),
    "response on the last rank": Case((N - 5, N - 1), mask=True, reduction="sequence_mean"),
    "no rows": Case((7, 7)),
    "uneven": Case((5, 44), _uneven, padding=True),
    "window": Case((5, N), "head_tail", options={"window": (6, 0), "softcap": 2.0}),
    "scope": Case((20, N), "head_tail", scope=True, kind="kl"),
    "padding": Case((12, N), padding=True, options={"exclude_self": False}, kind="reverse_kl"),
    "teacher": Case((20, N - 1), "head_tail", reference_heads=(6, 3, 8)),
    "spans": Case((20, N), "head_tail", frames=True),
    "packed": Case([(4, 9), (0, 1), (0, 0), (2, 17), (3, 14)], batch_size=1, cu_seqlens=PACKED),
    "packed ring": Case(
        [(4, 9), (0, 0), (0, 0), (2, 17), (3, 14)], "head_tail", batch_size=1, cu_seqlens=PACKED,
        mask=True, reduction="sequence_mean", options={"window": 5},
    ),
    "packed spans": Case(
        [(0, 10), (0, 1), (0, 0), (0, 19), (0, 15)], "head_tail", batch_size=1, cu_seqlens=PACKED,
        frames=True,
    ),
    "target": Case(
        (20, N), "head_tail", target="shared", kind="cross_entropy", scope=True, padding=True,
        options={"window": (30, 0)},
    ),
    "target ids": Case((5, 44), _uneven, target="ids", kind="cross_entropy"),
    "packed target": Case(
        [(4, 9), (0, 1), (0, 0), (2, 17), (3, 14)], "head_tail", batch_size=1, cu_seqlens=PACKED,
        target="sequences",
    ),
    "packed target ids": Case(
        [(4, 9), (0, 0), (0, 0), (2, 17), (3, 14)], batch_size=1, cu_seqlens=PACKED, mask=True,
        target="ids", kind="reverse_kl", reduction="sequence_mean",
    ),
    "span target": Case(
        (sum(FRAMES), N), "head_tail", frames=True, target="ids", kind="cross_entropy", mask=True
    ),
    "cross-entropy": Case((20, N - 1), "head_tail", kind="cross_entropy"),
    "head weights": Case((20, N - 1), "head_tail", head_weights=True, kind="kl"),
    "packed head weights": Case(
        [(4, 9), (0, 1), (0, 0), (2, 17), (3, 14)], "head_tail", batch_size=1, cu_seqlens=PACKED,
        head_weights=True,
    ),
    "span head weights": Case((20, N), "head_tail", head_weights=True, frames=True),
    "teacher's head weights": Case(
        (20, N - 1), reference_heads=(6, 3, 8), head_weights=True, kind="reverse_kl"
    ),
    "float64": Case((3, N - 1), "head_tail", dtype=torch.float64, options={"softcap": 3.0}),
    "bfloat16": Case((3, N - 1), "head_tail", dtype=torch.bfloat16),
}  # fmt: skip


class Problem:
    """Tensors of a case, the same on every rank."""

    def __init__(self, name: str) -> None:
        self.case = case = CASES[name]
        draw = torch.Generator().manual_seed(len(name))

        def normal(heads: int, head_dim: int) -> Tensor:
            shape = (case.batch_size, heads, N, head_dim)
            return torch.randn(shape, generator=draw, dtype=torch.float64).to(case.dtype)

        heads, kv_heads, head_dim = case.reference_heads
        self.q0, self.k0 = normal(heads, head_dim), normal(kv_heads, head_dim)
        self.q, self.k = normal(HEADS, HEAD_DIM), normal(KV_HEADS, HEAD_DIM)
        self.options: dict[str, Any] = dict(case.options)
        if case.frames:
            ids = torch.repeat_interleave(torch.arange(len(FRAMES)), torch.tensor(FRAMES))
            ids = torch.nn.functional.pad(ids, (0, N - len(ids)), value=-1)
            self.options["spans"] = rk.Spans(ids, len(FRAMES))
        if case.scope:
            self.options["scope"] = torch.rand(N, generator=draw) < 0.6
        if case.padding:
            self.options["key_padding_mask"] = torch.arange(N) >= torch.tensor([[0], [9]])
        bounds = case.cu_seqlens
        self.packing = (
            {}
            if bounds is None
            else {f"cu_seqlens_{x}": torch.tensor(bounds, dtype=torch.int32) for x in "qk"}
        )
        sequences = case.batch_size if bounds is None else len(bounds) - 1
        self.head_weights: Tensor | None = None
        self.reference_weights: Tensor | None = None
        if case.head_weights:
            self.head_weights = torch.rand(sequences, HEADS, generator=draw)
            self.head_weights[-1, 1] = 0.0
            if heads != HEADS:
                self.reference_weights = torch.rand(heads, generator=draw)
        self.num_rows = num_rows = self.whole().num_rows
        self.advantages = torch.randn(sequences, generator=draw)
        if case.batch_size > 1 and not case.mask:
            self.advantages = torch.randn(case.batch_size, num_rows, generator=draw)
        self.mask = None
        if case.mask:
            self.mask = torch.rand(case.batch_size, num_rows, generator=draw) < 0.7

    def whole(self, q: Tensor | None = None, k: Tensor | None = None) -> rk.AttentionSnapshot:
        """The reference, or the snapshot of another policy, in one piece."""
        taken = {x: y for x, y in self.case.options.items() if x != "exclude_self"}
        q, k = self.q0 if q is None else q, self.k0 if k is None else k
        return rk.AttentionSnapshot(
            q, k, rows=self.case.rows, head_weights=self.reference_weights, **taken, **self.packing
        )

    def leaves(self, rank: int | None = None, world_size: int = 1) -> list[Tensor]:
        """q and k, of a rank or whole, and head weights if there are any; with gradients."""
        found = [self.q, self.k]
        if rank is not None:
            found = [self.part(x, rank, world_size) for x in found]
        if self.head_weights is not None:
            found.append(self.head_weights)
        return [x.clone().requires_grad_() for x in found]

    def target(self) -> Tensor | rk.AttentionTarget:
        """Where rows should attend: one [B, 1, N] for all, one a sequence, or ids by index."""
        case, draw = self.case, torch.Generator().manual_seed(5)
        outcomes = len(FRAMES) if case.frames else N
        if case.target != "ids":
            sequences = len(PACKED) - 1 if case.target == "sequences" else 1
            values = torch.rand((case.batch_size, sequences, outcomes), generator=draw)
            return values if case.target == "shared" else rk.AttentionTarget(values)
        shape = (case.batch_size, 3, outcomes // 3)  # of three targets
        ids = torch.stack([torch.randperm(outcomes, generator=draw) for _ in range(shape[0] * 3)])
        index = torch.arange(case.batch_size * self.num_rows).view(case.batch_size, -1) % 4 - 1
        return rk.AttentionTarget(
            torch.rand(shape, generator=draw), ids[:, : shape[2]].reshape(shape), index=index
        )

    def part(self, x: Tensor, rank: int, world_size: int) -> Tensor:
        """What a rank has of a tensor of all positions, in its order."""
        layout = self.case.layout
        if callable(layout):
            chunks = layout(world_size)[rank]
        else:
            parts = world_size * (1 if layout == "contiguous" else 2)
            numbers = [rank] if layout == "contiguous" else [rank, parts - 1 - rank]
            chunks = [(n * N // parts, (n + 1) * N // parts) for n in numbers]
        pieces = [x[:, :, start:stop] for start, stop in chunks]
        return torch.cat(pieces, 2) if pieces else x[:, :, :0]

    def sharded(
        self, q: Tensor, k: Tensor, weights: Tensor | None = None, *, moves: Any
    ) -> rk.ShardedPolicy:
        world_size = dist.get_world_size()
        layout = self.case.layout
        return rk.ShardedPolicy(
            q, k, rows=self.case.rows, moves=moves, head_weights=weights,
            cu_seqlens=cast(Any, self.case.cu_seqlens),
            layout=cast(Any, layout(world_size) if callable(layout) else layout), **self.options,
        )  # fmt: skip


def run(name: str, moves: str) -> dict[str, Any]:
    """Differences from the whole sequence on this rank, and what must hold exactly."""
    problem, rank, world_size = Problem(name), dist.get_rank(), dist.get_world_size()
    case = problem.case
    terms: dict[str, Any] = {"kind": case.kind, "reduction": case.reduction}

    leaves = problem.leaves()
    given: dict[str, Any] = {"rows": case.rows, **problem.options, **problem.packing}
    target = problem.target() if case.target else None
    compared = problem.whole() if target is None else target
    weights = leaves[2] if case.head_weights else None
    whole = rk.ral_loss(
        leaves[0], leaves[1], compared, problem.advantages, problem.mask, head_weights=weights,
        **terms, **given,
    )  # fmt: skip
    wanted = torch.autograd.grad(whole, leaves)

    def part(x: Tensor) -> Tensor:
        return problem.part(x, rank, world_size)

    reference: Any = target
    if target is None:
        old = problem.sharded(part(problem.q0), part(problem.k0), moves=moves)
        reference = old.snapshot(head_weights=problem.reference_weights)
    traffic = Traffic()
    with traffic:
        ours = problem.leaves(rank, world_size)
        sharded = problem.sharded(*ours, moves=moves)
        loss = sharded.ral_loss(reference, problem.advantages, problem.mask, **terms)
        gradients = torch.autograd.grad(loss, ours)
    again = problem.leaves(rank, world_size)
    repeated = problem.sharded(*again, moves=moves)
    own = repeated.snapshot()  # before the loss: what it fetched must keep its graph
    second = repeated.ral_loss(reference, problem.advantages, problem.mask, **terms)
    same = torch.equal(second, loss) and all(
        torch.equal(a, b)
        for a, b in zip(torch.autograd.grad(second, again), gradients, strict=True)
    )
    zero = repeated.ral_loss(own, problem.advantages, problem.mask, **terms)
    zeros = [*torch.autograd.grad(zero, again)]
    if case.kind != "cross_entropy":  # whose value is then the entropy
        zeros.append(zero)
    found: dict[str, Any] = {
        "loss": loss.item(),
        "wanted": whole.item(),
        "of": [x.abs().max().item() for x in wanted[:2]],
        "gradients": _gradients_apart(problem, gradients, wanted),
        "row_count": problem.num_rows,
        "rows": sum(len(calls) for calls in sharded.plan.calls(rank)),
        "repeats": same,
        "zero": all(bool((x == 0).all()) for x in zeros),
        "sent": traffic.sent,
        "bytes": sharded.bytes_moved(),
    }
    for what in ("policy", "divergence") if case.frames else ("divergence",):
        found[what] = _values(problem, what, moves, ours, (compared, reference), given)
    return found


def _gradients_apart(problem: Problem, mine: Any, theirs: Any) -> list[float]:
    """This rank's part of q and k; of head weights, the sum over ranks, in shares of the largest.

    The gradient of a few weights is larger than that of an element of q.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found = [
        _apart(a, problem.part(b, rank, world_size))
        for a, b in zip(mine[:2], theirs[:2], strict=True)
    ]
    if problem.head_weights is not None:
        total = mine[2].clone()
        dist.all_reduce(total)
        scale = max(x.abs().max().item() for x in theirs[:2]) / theirs[2].abs().max().item()
        found.append(_apart(total, theirs[2]) * scale)
    return found


def _values(
    problem: Problem, what: str, moves: str, ours: list[Tensor], references: Any, given: Any
) -> tuple[float, float]:
    """Of `policy` or `divergence`, how far values and gradients of all rows are from the whole."""
    leaves = problem.leaves()
    q, k = leaves[:2]
    if problem.head_weights is not None:
        given = {**given, "head_weights": leaves[2]}
    sharded = problem.sharded(*ours, moves=moves)
    if what == "policy":
        wanted, got = rk.attention_policy(q, k, **given), sharded.policy()
    else:
        kind = "jsd" if problem.case.target is None else problem.case.kind
        wanted = rk.attention_divergence(q, k, references[0], kind, **given)
        got = sharded.divergence(references[1], kind)
        if problem.case.frames:  # a dense reference, too
            old = problem.sharded(*(x.detach() for x in ours), moves=moves).policy().flip(-1)
            dense = rk.attention_divergence(q, k, old, **given)
            wanted, got = torch.stack([wanted, dense]), torch.stack([got, sharded.divergence(old)])
    cotangent = torch.cos(torch.arange(wanted.numel(), dtype=wanted.dtype).view(wanted.shape))
    theirs = torch.autograd.grad(wanted, leaves, cotangent)
    mine = torch.autograd.grad(got, ours, cotangent)
    return _apart(got, wanted), max(_gradients_apart(problem, mine, theirs))


def _apart(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
    return (a - b).abs().max().item() if a.numel() else 0.0


class Traffic:
    """Counts the bytes that this rank sends to others, by replacing the two collectives."""

    def __init__(self) -> None:
        self.sent = 0

    def __enter__(self) -> None:
        self._kept = dist.all_to_all_single, dist.all_gather
        exchange, gather = self._kept

        def counted_exchange(out: Tensor, x: Tensor, outs: Any, ins: list[int], **o: Any) -> Any:
            own = ins[dist.get_rank()]
            row = x[:1].numel() if len(x) else 0
            self.sent += (sum(ins) - own) * row * x.element_size()
            return exchange(out, x, outs, ins, **o)

        def counted_gather(parts: Any, x: Tensor, **options: Any) -> Any:
            self.sent += (len(parts) - 1) * x.numel() * x.element_size()
            return gather(parts, x, **options)

        self._put(counted_exchange, counted_gather)

    def __exit__(self, *exception: object) -> None:
        self._put(*self._kept)

    def _put(self, exchange: Any, gather: Any) -> None:
        dist.all_to_all_single, dist.all_gather = exchange, gather


def _rank(rank: int, world_size: int, folder: str, jobs: list[tuple[str, str]]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store{world_size}"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )  # a rank that failed lets the others fail, too
    try:
        of_all: list[Any] = [None] * world_size
        dist.all_gather_object(of_all, {job: run(*job) for job in jobs})
        if rank == 0:
            found = {(world_size, *job): [each[job] for each in of_all] for job in jobs}
            torch.save(found, f"{folder}/{world_size}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


Results = dict[tuple[int, str, str], list[dict[str, Any]]]


def results(jobs: list[tuple[int, str, str]]) -> Results:
    """(world size, case, moves) -> what each rank found."""
    found: Results = {}
    with tempfile.TemporaryDirectory() as folder:
        for world_size in sorted({job[0] for job in jobs}):
            own = [(name, moves) for size, name, moves in jobs if size == world_size]
            start_processes(
                _rank, (world_size, folder, own), nprocs=world_size, start_method="fork"
            )
            found.update(torch.load(f"{folder}/{world_size}.pt", weights_only=False))
    return found


def table(found: Results) -> str:
    """Markdown: how far ranks are from the whole, the most of any rank."""
    ways = [(size, moves) for size in WORLDS for moves in MOVES]
    titles = [f"{size} ranks, {moves}" for size, moves in ways]
    lines = [
        f"| case | {' | '.join(titles)} | largest gradient | loss |",
        f"|---|{'---:|' * (len(ways) + 2)}",
    ]
    for name in CASES:
        by_way = [found[size, name, moves] for size, moves in ways]
        apart = [max(max(rank["gradients"]) for rank in ranks) for ranks in by_way]
        loss = max(abs(rank["loss"] - rank["wanted"]) for ranks in by_way for rank in ranks)
        numbers = [*apart, max(by_way[0][0]["of"]), loss]
        lines.append(f"| {name} | {' | '.join(f'{x:.0e}' for x in numbers)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:]:
        asked = [job.split(":") for job in sys.argv[2:]]
        torch.save(results([(int(size), name, moves) for size, name, moves in asked]), sys.argv[1])
    else:
        every = [(size, name, moves) for name in CASES for size in WORLDS for moves in MOVES]
        print(table(results(every)))
