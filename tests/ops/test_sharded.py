"""`ShardedPolicy`: the whole sequence's loss and gradients on 2 and 4 gloo processes, and bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ral_kernels as rk
from ral_kernels.sharded.layout import make_plan, union
from tests.asked import asked
from tests.ops.sharded_ranks import CASES, HEADS, KV_HEADS, MOVES, WORLDS, Results

ROOT = Path(__file__).parents[2]
# Error over the largest gradient; in bfloat16, ranks round once more each.
RELATIVE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3}


pytestmark = pytest.mark.xdist_group("sharded")  # one worker starts the ranks of all


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    jobs = dict.fromkeys(
        f"{each['world_size']}:{each['name']}:{each['moves']}" for each in asked(request)
    )
    file = tmp_path_factory.mktemp("sharded") / "found.pt"
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.sharded_ranks", str(file), *jobs],
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results: Results = torch.load(file, weights_only=False)
    return results


@pytest.mark.parametrize("moves", MOVES)
@pytest.mark.parametrize(
    ("world_size", "name"),
    [
        pytest.param(
            size,
            name,
            marks=() if size == 2 else pytest.mark.slow(stands_in="test_ranks_are_as_the_whole"),
        )
        for size in WORLDS
        for name in CASES
    ],
)
def test_ranks_are_as_the_whole(name: str, world_size: int, moves: str, found: Results) -> None:
    """Loss, gradients, values of all rows; exact zeros and equal bits; the bytes that are said."""
    case, ranks = CASES[name], found[world_size, name, moves]
    bound = RELATIVE[case.dtype]
    assert len(ranks) == world_size
    largest = max(ranks[0]["of"])
    assert largest > 1e-5 or name == "no rows"
    for rank in ranks:
        assert rank["loss"] == ranks[0]["loss"]  # the same bits on every rank
        assert rank["loss"] == pytest.approx(rank["wanted"], rel=max(bound, 1e-12), abs=2e-8)
        assert max(rank["gradients"]) <= bound * largest
        for what in ("policy", "divergence"):
            value, gradient = rank.get(what, (0.0, 0.0))
            assert value <= bound and gradient <= 4 * bound, what
        assert rank["repeats"] and rank["zero"]
    if name == "response on the last rank":
        assert [rank["rows"] for rank in ranks] == [0] * (world_size - 1) + [1]
    if case.reference_heads[0] == HEADS and not case.frames and case.dtype != torch.float64:
        moved = ranks[0]["bytes"]
        sent = sum(rank["sent"] for rank in ranks)
        if case.target and moves == "rows":  # one sum a row, where a snapshot has three a head
            targets = ranks[0]["row_count"] * case.batch_size * (3 * HEADS - 1)
            sent += 4 * targets * world_size * (world_size - 1)
        assert sent == moved.forward + moved.backward
        assert max(rank["sent"] for rank in ranks) <= moved.busiest


def test_bytes_by_hand() -> None:
    shape = {"num_heads": 28, "num_kv_heads": 4, "head_dim": 128}
    keys = rk.sharded_bytes(32768, 4, rows=(32000, 32768), **shape)
    # The last rank alone has rows: it receives the other three quarters, and sends gradients back.
    row = 4 * 128 * 2
    assert (keys.forward, keys.backward) == (24576 * row + 4 * 3 * 4, 24576 * row)
    assert keys.busiest == 2 * 24576 * row + 3 * 4
    # Causal: rank 0 of two needs its own quarter and the tail's rows see all, so nothing is saved;
    # with only the head's rows chosen, rank 0 needs nothing of others.
    head = rk.sharded_bytes(1024, 2, rows=(0, 256), layout="head_tail", **shape)
    assert (head.forward, head.backward) == (2 * 4, 0)
    windowed = rk.sharded_bytes(32768, 4, rows=(32000, 32768), window=100, **shape)
    assert windowed.backward == 0
    # Rows move the same at any length.
    short, long = (
        rk.sharded_bytes(n, 4, rows=(n - 768, n), moves="rows", **shape) for n in (32768, 1 << 20)
    )
    assert short == long
    assert short.backward == 3 * 768 * 28 * 128 * 2
    assert short.forward == short.backward + 4 * 3 * 4 * 768 * (7 * 28 + 1)


def test_which_way_is_chosen() -> None:
    """Keys up to 256 MiB a rank; beyond, what moves fewer bytes."""
    shape = {"num_heads": 28, "num_kv_heads": 4, "head_dim": 128}

    def chosen(seqlen: int, rows: int) -> str:
        sizes = {"rows": (seqlen - rows, seqlen), **shape}
        ways = {each: rk.sharded_bytes(seqlen, 4, moves=each, **sizes) for each in MOVES}
        (way,) = (x for x in MOVES if ways[x] == rk.sharded_bytes(seqlen, 4, **sizes))
        return way

    assert [chosen(n, 256) for n in (32768, 262144, 1 << 20)] == ["keys", "keys", "rows"]
    assert chosen(1 << 20, 65536) == "keys"  # so many rows that they would move more


def test_keys_and_rows_of_a_rank() -> None:
    plan = make_plan(
        "op", "head_tail", 2, 40, rows=[(2, 8), (5, 9)], cu_seqlens=[0, 12, 30], window_left=3
    )
    assert plan.chunks == (((0, 10), (30, 40)), ((10, 20), (20, 30)))
    assert [[piece.rows for piece in call] for call in plan.calls(0)] == [[(2, 8)]]
    assert [[piece.rows for piece in call] for call in plan.calls(1)] == [[(17, 20)], [(20, 21)]]
    assert plan.keys_seen() == [[(0, 8)], [(14, 21)]]
    assert [plan.place(x) for x in (2, 7, 17, 20)] == [0, 5, 6, 9]
    assert union([(5, 7), (0, 2), (2, 4), (6, 9), (3, 3)]) == [(0, 4), (5, 9)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A group of this process alone."""
    store = f"file://{tmp_path_factory.mktemp('alone')}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


Q, K = torch.randn(2, HEADS, 12, 8), torch.randn(2, KV_HEADS, 12, 8)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "layout": ({"layout": "zigzag"}, ValueError, "layout must be 'contiguous', 'head_tail' or"),
    "chunks": ({"layout": [[(0, 5), (6, 13)]]}, ValueError, "every position from 0 on"),
    "ranks": ({"layout": [[(0, 6)], [(6, 12)]]}, ValueError, "each of the 1 ranks"),
    "positions": ({"layout": [[(0, 11)]]}, ValueError, "q must hold the 11 positions .* got 12"),
    "moves": ({"moves": "both"}, ValueError, "moves must be None, 'keys' or 'rows'; got 'both'"),
    "rows": ({"rows": (3, 13)}, ValueError, "0 <= start <= stop <= T=12"),
    "batch": ({"cu_seqlens": [0, 12]}, ValueError, "cu_seqlens needs a batch of 1; got B=2"),
    "keys": ({"k": K[:, :, 1:]}, ValueError, "of the same positions; got 12 and 11"),
    "spans": ({"spans": rk.Spans.from_lengths([11])}, ValueError, r"N=12 keys; got \(11,\)"),
    "no spans": ({"spans": torch.zeros(12)}, TypeError, "spans must be Spans .* got Tensor"),
    "scope": ({"scope": torch.ones(12)}, TypeError, r"scope must be bool .* got torch.float32"),
    "weights": (
        {"head_weights": torch.ones(3)}, ValueError,
        r"head_weights must be \[H\] or \[B, H\] with B=2, H=4; got \(3,\)",
    ),
    "padding": (
        {"key_padding_mask": torch.ones(3, 12, dtype=torch.bool)}, ValueError,
        r"key_padding_mask must be bool .* over the whole's N=12 keys; got \(3, 12\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, alone: None) -> None:
    options, error, message = REFUSED[name]
    with pytest.raises(error, match=f"^ShardedPolicy: .*{message}"):
        rk.ShardedPolicy(**{"q": Q, "k": K, **options})


def test_packed_calls_that_are_refused(alone: None) -> None:
    given: dict[str, Any] = {"q": Q[:1], "k": K[:1]}
    for offsets, message in (
        ([0, 13], "ascend from 0 to at most 12"),
        ([1, 12], "ascend from 0"),
        ([0, 9, 5], "ascend from 0"),
    ):
        with pytest.raises(ValueError, match=message):
            rk.ShardedPolicy(**given, cu_seqlens=offsets)
    with pytest.raises(TypeError, match="offsets of the packed sequences"):
        rk.ShardedPolicy(**given, cu_seqlens=torch.tensor([0.0, 12.0]))
    with pytest.raises(ValueError, match="for each of the 2 packed sequences"):
        rk.ShardedPolicy(**given, cu_seqlens=[0, 5, 12], rows=(0, 5, 12))
    with pytest.raises(NotImplementedError, match="key_padding_mask is not supported with cu_seq"):
        keys = torch.ones(1, 12, dtype=torch.bool)
        rk.ShardedPolicy(**given, cu_seqlens=[0, 12], key_padding_mask=keys)


def test_references_that_are_refused(alone: None) -> None:
    sharded = rk.ShardedPolicy(Q, K, rows=(4, 12))
    advantages = torch.ones(2)
    with pytest.raises(TypeError, match=r"ral_loss: reference must be a ShardedSnapshot or an"):
        sharded.ral_loss(rk.AttentionSnapshot(Q, K), advantages)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"values must be \[B, G, N\] with N=12; got \(2, 1, 11\)"):
        sharded.divergence(rk.AttentionTarget(torch.ones(2, 1, 11)))
    with pytest.raises(ValueError, match=r"ral_loss: reference.index must be \[B, T\] = \(2, 8\)"):
        every = torch.zeros(2, 12, dtype=torch.int64)  # this rank's queries, not the rows
        sharded.ral_loss(rk.AttentionTarget(torch.ones(2, 1, 12), index=every), advantages)
    other = rk.ShardedPolicy(Q, K, rows=(5, 12)).snapshot()
    with pytest.raises(ValueError, match=r"reference must have the rows .*\(4, 12\).*\(5, 12\)"):
        sharded.divergence(other)
    moved = rk.ShardedPolicy(Q, K, rows=(4, 12), moves="rows").snapshot()
    with pytest.raises(ValueError, match="reference must have the moves of this policy, 'keys'"):
        sharded.divergence(moved)
    with pytest.raises(ValueError, match=r"advantages must be \[B\] or \[B, T\] with B=2, T=8"):
        sharded.ral_loss(sharded.snapshot(), torch.ones(3))
    moves: Any
    for moves in MOVES:
        weighted = rk.ShardedPolicy(
            Q,
            K,
            rows=(4, 12),
            moves=moves,
            head_weights=torch.rand(HEADS),
        )
        teacher = rk.ShardedPolicy(Q[:, :2], K, rows=(4, 12), moves=moves).snapshot()
        with pytest.raises(
            ValueError, match=r"have head_weights of its own, or H=4 .* got 2 heads"
        ):
            weighted.divergence(teacher)
    with pytest.raises(ValueError, match="spans must be given; got None"):
        sharded.policy()
    spans = rk.ShardedPolicy(Q, K, rows=(4, 12), spans=rk.Spans.from_lengths([5, 7]))
    with pytest.raises(ValueError, match=r"reference must be \[B, T, S\] = \(2, 8, 2\)"):
        spans.divergence(torch.zeros(2, 8, 3))


def test_a_snapshot_moves_and_says_its_size(alone: None) -> None:
    sharded = rk.ShardedPolicy(Q, K, rows=(4, 12))
    kept = sharded.snapshot()
    assert kept.nbytes == (Q[:, :, 4:].numel() + K.numel()) * 4
    assert kept.to(torch.bfloat16).nbytes == kept.nbytes // 2
    assert sharded.ral_loss(kept, torch.ones(2)) == 0


def test_without_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    with pytest.raises(RuntimeError, match=r"torch\.distributed must be initialised"):
        rk.ShardedPolicy(Q, K)
