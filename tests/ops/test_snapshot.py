"""`AttentionSnapshot`: what it keeps, where it goes, indexing, joining, saving."""

from __future__ import annotations

import builtins
import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ral_kernels as rk
from ral_kernels.ops.policy import attention_divergence, attention_policy
from ral_kernels.snapshot import AttentionSnapshot

B, H, HK, T, N, D, PREFIX = 6, 4, 2, 5, 9, 8, 4


def draw(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Three prompts with two rollouts each."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, H, T, D, generator=generator)
    k = torch.randn(B, HK, N, D, generator=generator)
    k[1::2, :, :PREFIX] = k[::2, :, :PREFIX]
    return q.to(dtype), k.to(dtype)


def shared(**options: Any) -> AttentionSnapshot:
    return AttentionSnapshot(*draw(), group_size=2, shared_prefix=PREFIX, **options)


def assert_same(a: AttentionSnapshot, b: AttentionSnapshot) -> None:
    assert torch.equal(a.q, b.q) and torch.equal(a.materialised_k(), b.materialised_k())
    assert (a.span_bias is None) == (b.span_bias is None)
    if a.span_bias is not None and b.span_bias is not None:
        assert torch.equal(a.span_bias, b.span_bias)
    for name in ("query_start", "scale", "window_left", "window_right", "softcap", "dtype"):
        assert getattr(a, name) == getattr(b, name), name


def test_what_it_keeps() -> None:
    q, k = draw()
    snapshot = AttentionSnapshot(q, k, rows=(1, 4), scale=0.3, window=3, softcap=2.0)
    assert torch.equal(snapshot.q, q[:, :, 1:4]) and torch.equal(snapshot.k, k)
    assert (snapshot.batch_size, len(snapshot), snapshot.num_rows, snapshot.seqlen_k) == (
        B,
        B,
        3,
        N,
    )
    assert snapshot.query_start == N - T + 1
    assert (snapshot.scale, snapshot.softcap) == (0.3, 2.0)
    assert (snapshot.window_left, snapshot.window_right) == (3, 0)
    assert snapshot.k_prefix is None and snapshot.prefix_index is None
    assert snapshot.nbytes == 4 * (B * H * 3 * D + B * HK * N * D)
    assert "q=(6, 4, 3, 8)" in repr(snapshot)


def test_is_a_detached_copy() -> None:
    q, k = (x.requires_grad_() for x in draw())
    snapshot = AttentionSnapshot(q, k, rows=slice(2, 4))
    kept = snapshot.q.clone(), snapshot.k.clone()
    with torch.no_grad():
        q.zero_()
        k.zero_()
    assert torch.equal(snapshot.q, kept[0]) and torch.equal(snapshot.k, kept[1])
    assert not snapshot.q.requires_grad and not snapshot.k.requires_grad
    # Some rows of q do not keep all of q alive.
    assert snapshot.q.untyped_storage().nbytes() == 4 * B * H * 2 * D


def test_shared_prefix_is_kept_once() -> None:
    q, k = draw()
    snapshot = shared()
    assert snapshot.k_prefix is not None and snapshot.k_prefix.shape == (3, HK, PREFIX, D)
    assert snapshot.k.shape == (B, HK, N - PREFIX, D) and snapshot.seqlen_k == N
    assert snapshot.prefix_index is not None
    assert snapshot.prefix_index.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(snapshot.materialised_k(), k)
    plain = AttentionSnapshot(q, k)
    assert plain.nbytes - snapshot.nbytes == 4 * 3 * HK * PREFIX * D - 8 * B


def test_prefix_must_be_equal() -> None:
    q, k = draw()
    k[3, 0, PREFIX - 1, 2] += 0.25
    with pytest.raises(ValueError, match=r"shared_prefix must cover keys that are equal.*0\.25"):
        AttentionSnapshot(q, k, group_size=2, shared_prefix=PREFIX)
    AttentionSnapshot(q, k, group_size=2, shared_prefix=PREFIX - 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype(dtype: torch.dtype) -> None:
    bias = torch.randn(B, 1, 1, 3)
    converted = (
        shared(dtype=dtype, span_bias=bias),
        shared(span_bias=bias).to(dtype),
        shared(span_bias=bias).to(dtype=dtype),
        shared(span_bias=bias).to("cpu", dtype),
    )
    for snapshot in converted:
        assert snapshot.dtype == snapshot.k.dtype == dtype
        assert snapshot.k_prefix is not None and snapshot.k_prefix.dtype == dtype
        assert snapshot.span_bias is not None and snapshot.span_bias.dtype == torch.float32
        assert snapshot.prefix_index is not None and snapshot.prefix_index.dtype == torch.int64
        assert_same(snapshot, converted[0])


def test_device() -> None:
    for snapshot in (shared(device="meta"), shared().to("meta"), shared().to(torch.device("meta"))):
        assert snapshot.device.type == "meta" and snapshot.dtype == torch.float32
        assert snapshot.materialised_k().shape == (B, HK, N, D)


def test_pin_memory() -> None:
    if torch.accelerator.is_available():
        assert shared().pin_memory().q.is_pinned() and shared(pin_memory=True).k.is_pinned()
        return
    for pin in (lambda: shared().pin_memory(), lambda: shared(pin_memory=True)):
        with pytest.raises(RuntimeError, match=r"^AttentionSnapshot: pin_memory needs an accel"):
            pin()


INDICES = (
    slice(None),
    slice(2, 4),
    slice(1, 6, 2),
    slice(0, 0),
    torch.tensor([5, 0, 0, 3]),
    torch.tensor([4]),
    torch.tensor([], dtype=torch.int64),
    torch.tensor([-1, 1]),
    torch.tensor([True, False, False, True, True, False]),
)


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_index(index: Any) -> None:
    q, k = draw()
    bias = torch.randn(B, 1, T, 3)
    options = {"span_bias": bias, "softcap": 3.0}
    part = shared(**options)[index]
    wanted = AttentionSnapshot(q[index], k[index], span_bias=bias[index], softcap=3.0)
    assert_same(part, wanted)
    assert part.shared_prefix == PREFIX
    # Prefixes that are no longer used are let go.
    assert part.k_prefix is not None and part.prefix_index is not None
    assert part.k_prefix.shape[0] == len(set((torch.arange(B) // 2)[index].tolist()))


def test_cat() -> None:
    whole = shared(span_bias=torch.randn(B, H, 1, 3))
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    pieces = [whole[order[:1]], whole[order[1:4]], whole[order[4:]]]
    joined = AttentionSnapshot.cat(pieces)
    assert_same(joined, whole[order])
    assert_same(joined[torch.argsort(order)], whole)
    assert_same(AttentionSnapshot.cat([whole]), whole)
    plain = AttentionSnapshot(*draw())
    assert_same(AttentionSnapshot.cat([plain[:2], plain[2:]]), plain)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("query_start", lambda q, k: AttentionSnapshot(q[:, :, :4], k)),
        ("scale", lambda q, k: AttentionSnapshot(q, k, scale=0.5)),
        ("window_left", lambda q, k: AttentionSnapshot(q, k, window=4)),
        ("softcap", lambda q, k: AttentionSnapshot(q, k, softcap=4.0)),
        ("shape", lambda q, k: AttentionSnapshot(q[:, :2], k)),
        ("dtype", lambda q, k: AttentionSnapshot(q, k, dtype=torch.bfloat16)),
        ("num_spans", lambda q, k: AttentionSnapshot(q, k, span_bias=torch.zeros(3))),
    ],
)
def test_cat_refuses_what_differs(name: str, other: Any) -> None:
    q, k = draw()
    with pytest.raises(ValueError, match=rf"^AttentionSnapshot\.cat: .* must agree in {name}"):
        AttentionSnapshot.cat([AttentionSnapshot(q, k), other(q, k)])


def test_cat_refuses_other_prefixes() -> None:
    with pytest.raises(ValueError, match="must agree in"):
        AttentionSnapshot.cat([shared(), AttentionSnapshot(*draw())])
    with pytest.raises(ValueError, match="at least one"):
        AttentionSnapshot.cat([])
    with pytest.raises(TypeError, match="snapshots must hold snapshots; got Tensor"):
        not_snapshots: Any = [torch.zeros(3)]
        AttentionSnapshot.cat(not_snapshots)


def test_a_trainer_shuffles_and_splits_its_tensors() -> None:
    """As TRL does with its buffer: every tensor by the same permutation, then in chunks."""
    snapshot = shared(span_bias=torch.randn(B, 1, 1, 3))
    buffer = {"advantages": torch.arange(float(B)), **snapshot.tensors()}
    assert all(x.shape[0] == B for x in buffer.values())
    order = torch.randperm(B, generator=torch.Generator().manual_seed(1))
    shuffled = {name: x[order] for name, x in buffer.items()}
    for start in range(0, B, 2):
        chunk = {name: x[start : start + 2] for name, x in shuffled.items()}
        chunk.pop("advantages")
        part = AttentionSnapshot.from_tensors(chunk, like=snapshot)
        assert_same(part, snapshot[order[start : start + 2]])
    with pytest.raises(ValueError, match=r"^AttentionSnapshot\.from_tensors: tensors must be q, k"):
        AttentionSnapshot.from_tensors({"q": snapshot.q}, like=snapshot)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    for name, snapshot in {
        "shared": shared(dtype=dtype, span_bias=torch.randn(3), window=5, scale=0.1),
        "plain": AttentionSnapshot(*draw(dtype), rows=slice(2, None)),
    }.items():
        path = tmp_path / f"{name}.safetensors"
        snapshot.save(path)
        loaded = AttentionSnapshot.load(path)
        assert_same(loaded, snapshot)
        assert loaded.nbytes == snapshot.nbytes
        q, k = draw(dtype)
        if name == "plain":
            value = attention_divergence(q, k, loaded, rows=slice(2, None))
            assert not value.any()


def test_load_refuses_other_files(tmp_path: Path) -> None:
    safetensors_torch = pytest.importorskip("safetensors.torch")
    path = tmp_path / "other.safetensors"
    safetensors_torch.save_file({"q": torch.zeros(2)}, str(path))
    with pytest.raises(ValueError, match=r"^AttentionSnapshot\.load: .* must be written by"):
        AttentionSnapshot.load(path)


@pytest.mark.parametrize("method", ["save", "load"])
def test_without_safetensors(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_module = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("safetensors"):
            raise ImportError(name)
        return import_module(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=rf"^AttentionSnapshot\.{method} needs .* safetensors"):
        getattr(shared(), method)(tmp_path / "x")


def test_a_smaller_dtype_is_another_policy() -> None:
    """Close, and not exactly zero: what the docstring says about dtype."""
    q, k = draw()
    value = attention_divergence(q, k, AttentionSnapshot(q, k, dtype=torch.bfloat16))
    assert 0 < float(value.max()) < 1e-4


def test_span_bias_follows_the_batch() -> None:
    q, k = draw()
    spans = rk.Spans.from_lengths([4, 5])
    bias = torch.randn(B, 1, 1, 2)
    part = AttentionSnapshot(q, k, span_bias=bias)[torch.tensor([4, 1])]
    value = attention_divergence(q[[4, 1]], k[[4, 1]], part, spans=spans, span_bias=bias[[4, 1]])
    assert not value.any()
    clean = attention_policy(q, k, spans=spans)
    steered = attention_policy(q, k, spans=spans, span_bias=bias)
    assert (clean - steered).abs().max() > 0.01


# ---- Every way in makes the checks of `__init__` -------------------------------------------------


def parts(snapshot: AttentionSnapshot) -> dict[str, Any]:
    return dict(snapshot.__getstate__())


def by_load(state: dict[str, Any], path: Path) -> AttentionSnapshot:
    safetensors_torch = pytest.importorskip("safetensors.torch")
    tensors = {name: x.contiguous() for name, x in state.items() if isinstance(x, Tensor)}
    options = {name: x for name, x in state.items() if not isinstance(x, Tensor)}
    metadata = {"format": "ral_kernels.AttentionSnapshot/1", "options": json.dumps(options)}
    safetensors_torch.save_file(tensors, str(path / "x.safetensors"), metadata=metadata)
    return AttentionSnapshot.load(path / "x.safetensors")


def by_unpickling(state: dict[str, Any], path: Path) -> AttentionSnapshot:
    snapshot = AttentionSnapshot.__new__(AttentionSnapshot)
    snapshot.__setstate__(state)
    return snapshot


def by_assignment(state: dict[str, Any], path: Path) -> AttentionSnapshot:
    snapshot = shared(span_bias=torch.zeros(B, 1, 1, 3))
    for name in parts(snapshot):
        setattr(snapshot, name, state.get(name))
    snapshot.check()
    return snapshot


FAULTS: dict[str, tuple[Any, type[Exception], str]] = {
    # of prefix_index
    "far_index": ({"prefix_index": lambda x: x * 10**9}, ValueError, r"prefix_index .* \[0, 3\)"),
    "negative_index": ({"prefix_index": lambda x: x - 1}, ValueError, "prefix_index must lie in"),
    "float_index": ({"prefix_index": Tensor.float}, TypeError, "prefix_index must be integer"),
    "bool_index": ({"prefix_index": Tensor.bool}, TypeError, "prefix_index must be integer"),
    "int32_index": ({"prefix_index": Tensor.int}, TypeError, "prefix_index must be int64"),
    "short_index": ({"prefix_index": lambda x: x[:2]}, ValueError, r"prefix_index must be \[B\]"),
    "index_2d": ({"prefix_index": lambda x: x[:, None]}, ValueError, r"prefix_index must be \[B\]"),
    "no_index": ({"prefix_index": None}, ValueError, "k_prefix needs prefix_index"),
    "no_prefix": ({"k_prefix": None}, ValueError, "prefix_index needs k_prefix"),
    # of k_prefix
    "prefix_dtype": ({"k_prefix": Tensor.half}, TypeError, "k_prefix must have k's dtype float32"),
    "prefix_dim": ({"k_prefix": lambda x: x[..., :4]}, ValueError, r"k_prefix must be \[P, Hk"),
    "prefix_heads": ({"k_prefix": lambda x: x[:, :1]}, ValueError, r"k_prefix must be \[P, Hk"),
    "prefix_3d": ({"k_prefix": lambda x: x[0]}, ValueError, r"k_prefix must be \[P, Hk"),
    # of k and q
    "k_dtype": ({"k": Tensor.bfloat16}, TypeError, "k must have q's dtype float32; got bfloat16"),
    "k_integer": ({"k": Tensor.int}, TypeError, "k must have q's dtype float32; got int32"),
    "k_batch": ({"k": lambda x: x[:1]}, ValueError, r"k must be \[B, Hk, N, D\] with B=6, D=8"),
    "k_dim": ({"k": lambda x: x[..., :4]}, ValueError, r"k must be \[B, Hk, N, D\] with B=6"),
    "k_3d": ({"k": lambda x: x[0]}, ValueError, r"k must be \[B, Hk, N, D\] with B=6, D=8"),
    "no_kv_heads": ({"k": lambda x: x[:, :0]}, ValueError, "Hk that divides H=4; got Hk=0"),
    "three_kv_heads": ({"k": lambda x: x[:, [0, 1, 1]]}, ValueError, "Hk that divides H=4; got Hk"),
    "no_k": ({"k": None}, ValueError, "k is missing|k must be"),
    "q_integer": ({"q": Tensor.int}, TypeError, "q must be float32, bfloat16"),
    "q_3d": ({"q": lambda x: x[0]}, ValueError, r"q must be \[B, H, T, D\]"),
    # of the bias
    "bias_dtype": ({"span_bias": Tensor.int}, TypeError, "span_bias must be float32 or float64"),
    "bias_batch": ({"span_bias": lambda x: x[:1]}, ValueError, r"span_bias must be .* with B=6"),
    "bias_heads": (
        {"span_bias": lambda x: x.expand(-1, 3, -1, -1)}, ValueError, "span_bias must be broadcast"
    ),
    # of the options
    "scale_negative": ({"scale": -0.5}, ValueError, "scale must be .* > 0; got -0.5"),
    "scale_zero": ({"scale": 0.0}, ValueError, "scale must be .* > 0; got 0.0"),
    "scale_nan": ({"scale": float("nan")}, ValueError, "scale must be .*; got nan"),
    "scale_text": ({"scale": "1"}, TypeError, "scale must be .*; got str"),
    "scale_none": ({"scale": None}, TypeError, "scale and softcap must be numbers; got None"),
    "softcap_false": ({"softcap": False}, TypeError, "softcap must be .*; got bool"),
    "softcap_negative": ({"softcap": -1.0}, ValueError, "softcap must be .*; got -1.0"),
    "window": ({"window_left": -2}, ValueError, "window_left must lie in .*; got -2"),
    "window_float": ({"window_right": 1.0}, TypeError, "window_right must be an int; got float"),
    "query_start": ({"query_start": 2**40}, ValueError, "query_start must lie in .*; got 1099"),
}  # fmt: skip
WAYS = {"load": by_load, "unpickling": by_unpickling, "assignment": by_assignment}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_in_refuses(way: str, fault: str, tmp_path: Path) -> None:
    changes, exception, message = FAULTS[fault]
    state = parts(shared(span_bias=torch.zeros(B, 1, 1, 3)))
    assert_same(WAYS[way](state, tmp_path), shared(span_bias=torch.zeros(B, 1, 1, 3)))
    for name, change in changes.items():
        state[name] = change(state[name]) if callable(change) else change
        if change is None and name in ("k", "k_prefix", "prefix_index"):
            del state[name]
    with pytest.raises(exception, match=rf"^AttentionSnapshot(\.load)?: .*({message})"):
        WAYS[way](state, tmp_path)


@pytest.mark.parametrize("way", ["load", "unpickling"])
@pytest.mark.parametrize(("name", "word"), [("scale", "missing"), ("colour", "unknown")])
def test_options_must_be_complete_and_known(way: str, name: str, word: str, tmp_path: Path) -> None:
    state = parts(shared())
    if word == "missing":
        del state[name]
    else:
        state[name] = 3
    with pytest.raises(ValueError, match=rf"options must hold .*; {name} is {word}"):
        WAYS[way](state, tmp_path)


@pytest.mark.parametrize(
    "fault",
    [name for name, (x, *_) in FAULTS.items() if {*x} <= {"q", "k", "prefix_index", "span_bias"}],
)
def test_from_tensors_refuses(fault: str) -> None:
    changes, exception, message = FAULTS[fault]
    snapshot = shared(span_bias=torch.zeros(B, 1, 1, 3))
    tensors: dict[str, Any] = snapshot.tensors()
    for name, change in changes.items():
        tensors[name] = change(tensors[name]) if change else None
    if fault == "no_index":
        exception, message = TypeError, "prefix_index must be an int64"
    elif fault == "no_k":
        exception, message = TypeError, r"k must be a \[B, Hk, N, D\] tensor; got NoneType"
    elif fault == "int32_index":  # a trainer's buffer may narrow it
        assert_same(AttentionSnapshot.from_tensors(tensors, like=snapshot), snapshot)
        return
    with pytest.raises(exception, match=rf"^AttentionSnapshot\.from_tensors: .*{message}"):
        AttentionSnapshot.from_tensors(tensors, like=snapshot)


def test_a_slip_in_a_trainer_does_not_read_beyond_the_heap() -> None:
    snapshot = AttentionSnapshot(*draw())
    slip = {"q": snapshot.q, "k": snapshot.k[:1].clone()}
    with pytest.raises(ValueError, match=r"from_tensors: k must be \[B, Hk, N, D\] with B=6"):
        AttentionSnapshot.from_tensors(slip, like=snapshot)


def test_copies_and_pickles_are_the_same_snapshot() -> None:
    snapshot = shared(span_bias=torch.randn(B, 1, 1, 3), softcap=2.0)
    copies = copy.copy(snapshot), copy.deepcopy(snapshot), pickle.loads(pickle.dumps(snapshot))
    for other in copies:
        assert_same(other, snapshot)
    snapshot.k = snapshot.k[:1]
    with pytest.raises(ValueError, match=r"k must be \[B, Hk, N, D\] with B=6"):
        copy.copy(snapshot)


def test_ops_check_what_was_assigned_or_edited_since() -> None:
    q, k = draw()
    snapshot = shared()
    assert not attention_divergence(q, k, snapshot).any()
    assert snapshot.prefix_index is not None
    snapshot.prefix_index[0] = 10**9
    with pytest.raises(ValueError, match=r"prefix_index must lie in \[0, 3\); got values from 0"):
        attention_divergence(q, k, snapshot)
    with pytest.raises(ValueError, match="prefix_index must lie in"):
        snapshot.to(torch.bfloat16)
    snapshot.prefix_index[0] = 0
    assert not attention_divergence(q, k, snapshot).any()
    snapshot.k = snapshot.k[:1].clone()
    for use in (
        lambda: AttentionSnapshot.cat([snapshot, shared()]),
        lambda: AttentionSnapshot.from_tensors(shared().tensors(), like=snapshot),
    ):
        with pytest.raises(ValueError, match=r"k must be \[B, Hk, N, D\] with B=6"):
            use()
    with pytest.raises(ValueError, match=r"k must be \[B, Hk, N, D\] with B=6"):
        rk.ral_loss(q.requires_grad_(), k, snapshot, torch.ones(B))


@pytest.mark.parametrize("damage", ["truncated", "no JSON", "a list"])
def test_load_refuses_damaged_files(damage: str, tmp_path: Path) -> None:
    safetensors_torch = pytest.importorskip("safetensors.torch")
    path = tmp_path / "x.safetensors"
    shared().save(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        options = "{" if damage == "no JSON" else "[1]"
        metadata = {"format": "ral_kernels.AttentionSnapshot/1", "options": options}
        safetensors_torch.save_file({"q": torch.zeros(2)}, str(path), metadata=metadata)
    with pytest.raises(ValueError, match=r"^AttentionSnapshot\.load: .* must be written by"):
        AttentionSnapshot.load(path)


# ---- Packed sequences ----------------------------------------------------------------------------

LENGTHS = ((2, 5), (0, 3), (3, 4), (1, 6))  # queries and keys


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def packed(pick: list[int] | None = None, **options: Any) -> AttentionSnapshot:
    """Sequences of `LENGTHS`, in the order asked for; two tokens after the last offset if all."""
    generator = torch.Generator().manual_seed(0)
    parts = [
        (
            torch.randn(1, H, t, D, generator=generator),
            torch.randn(1, HK, n, D, generator=generator),
        )
        for t, n in LENGTHS
    ]
    order = [0, 1, 2, 3] if pick is None else pick
    more = [(torch.ones(1, H, 2, D), torch.ones(1, HK, 2, D))] if pick is None else []
    q, k = (torch.cat(x, dim=2) for x in zip(*([parts[i] for i in order] + more), strict=True))
    return AttentionSnapshot(
        q, k, cu_seqlens_q=offsets([LENGTHS[i][0] for i in order]),
        cu_seqlens_k=offsets([LENGTHS[i][1] for i in order]), **options,
    )  # fmt: skip


def assert_same_packing(a: AttentionSnapshot, b: AttentionSnapshot) -> None:
    assert_same(a, b)
    for name in ("cu_seqlens_q", "cu_seqlens_k", "query_starts"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert getattr(a, name).dtype == torch.int32


def test_what_a_packed_one_keeps() -> None:
    snapshot = packed()
    assert snapshot.is_packed and len(snapshot) == snapshot.num_sequences == 4
    assert (snapshot.batch_size, snapshot.num_rows, snapshot.seqlen_k) == (1, 8, 20)
    assert snapshot.query_starts is not None
    assert snapshot.query_starts.tolist() == [3, 3, 1, 5]  # N_i - Tq_i
    assert "sequences=4" in repr(snapshot) and not AttentionSnapshot(*draw()).is_packed
    some = packed(rows=[(1, 2), (0, 0), slice(-2, None), (0, 1)])
    assert some.cu_seqlens_q is not None and some.query_starts is not None
    assert some.cu_seqlens_q.tolist() == [0, 1, 1, 3, 4]
    assert some.query_starts.tolist() == [4, 3, 2, 5]
    assert torch.equal(some.q, snapshot.q[:, :, [1, 3, 4, 5]])
    assert some.q.data_ptr() != snapshot.q.data_ptr()


@pytest.mark.parametrize("index", [slice(1, 3), torch.tensor([3, 0, 2, 2]), slice(0, 0),
    torch.tensor([False, True, False, True])], ids=str)  # fmt: skip
def test_picking_sequences(index: Any) -> None:
    order = torch.arange(4)[index].tolist()
    if order:
        assert_same_packing(packed()[index], packed(order))
    else:
        assert len(packed()[index]) == 0 and packed()[index].q.shape == (1, H, 0, D)


def test_joining_packed_ones() -> None:
    """In any order; the tokens after the last offset are let go."""
    joined = AttentionSnapshot.cat([packed()[2:], packed([1, 0]), packed()[:1]])
    assert_same_packing(joined, packed([2, 3, 1, 0, 0]))
    with pytest.raises(ValueError, match=r"must agree in packing; snapshots\[0\] has packed"):
        AttentionSnapshot.cat([packed(), AttentionSnapshot(*draw())])


def test_the_bias_follows_the_sequences() -> None:
    by_row = torch.randn(1, H, 8, 3)
    assert packed(span_bias=by_row).span_bias is not None
    picked = packed(span_bias=by_row)[torch.tensor([2, 0])]
    assert torch.equal(picked.span_bias, by_row[:, :, [2, 3, 4, 0, 1]])  # type: ignore[arg-type]
    shared_by_rows = torch.randn(1, 1, 1, 3)
    joined = AttentionSnapshot.cat([packed([0], span_bias=shared_by_rows), picked])
    wanted = torch.cat([shared_by_rows.expand(1, H, 2, 3), by_row[:, :, [2, 3, 4, 0, 1]]], dim=2)
    assert torch.equal(joined.span_bias, wanted)  # type: ignore[arg-type]


def test_copies_and_files_of_packed_ones(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    snapshot = packed(window=5, span_bias=torch.randn(3))
    snapshot.save(tmp_path / "packed.safetensors")
    loaded = AttentionSnapshot.load(tmp_path / "packed.safetensors")
    for other in (
        copy.copy(snapshot), copy.deepcopy(snapshot), pickle.loads(pickle.dumps(snapshot)), loaded,
        snapshot.to("cpu"), snapshot.to(torch.float64).to(torch.float32),
    ):  # fmt: skip
        assert_same_packing(other, snapshot)
    assert snapshot.to(torch.bfloat16).dtype == torch.bfloat16
    assert snapshot.nbytes == loaded.nbytes == 4 * (8 * H * D + 20 * HK * D + 3 + 5 + 5 + 4)


PACKED_FAULTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "alone": ({"cu_seqlens_k": None}, ValueError, "cu_seqlens_q needs cu_seqlens_k"),
    "no_starts": ({"query_starts": None}, ValueError, "cu_seqlens_q needs query_starts"),
    "dtype": ({"cu_seqlens_q": Tensor.long}, TypeError, "cu_seqlens_q must be int32; got int64"),
    "starts_2d": ({"query_starts": lambda x: x[None]}, ValueError, r"query_starts must be \[S\]"),
    "short": ({"cu_seqlens_k": lambda x: x[:-1]}, ValueError,
              r"cu_seqlens_k must be \[S \+ 1\] with S=4"),
    "start": ({"cu_seqlens_q": lambda x: x + 1}, ValueError, "cu_seqlens_q must start at 0; got 1"),
    "decrease": ({"cu_seqlens_k": lambda x: -x}, ValueError, "cu_seqlens_k must never decrease"),
    "beyond": ({"cu_seqlens_k": lambda x: 2 * x}, ValueError, "cu_seqlens_k must end at most at"),
    "batch": ({"q": lambda x: x.repeat(2, 1, 1, 1), "k": lambda x: x.repeat(2, 1, 1, 1)},
              ValueError, r"q must be \[1, H, T, D\] with cu_seqlens_q"),
    "prefix": ({"k_prefix": lambda x: torch.zeros(1, HK, 2, D),
                "prefix_index": lambda x: torch.zeros(1, dtype=torch.int64)},
               ValueError, "k_prefix is not supported with cu_seqlens_q"),
}  # fmt: skip


@pytest.mark.parametrize("fault", PACKED_FAULTS)
@pytest.mark.parametrize("way", ["load", "unpickling"])
def test_every_way_in_refuses_packed_ones(way: str, fault: str, tmp_path: Path) -> None:
    changes, exception, message = PACKED_FAULTS[fault]
    state = parts(packed())
    assert_same_packing(WAYS[way](state, tmp_path), packed())
    for name, change in changes.items():
        state[name] = None if change is None else change(state.get(name))
        if change is None:
            del state[name]
    with pytest.raises(exception, match=rf"^AttentionSnapshot(\.load)?: .*({message})"):
        WAYS[way](state, tmp_path)


def test_ops_check_offsets_that_were_edited_since() -> None:
    snapshot = packed()
    assert snapshot.cu_seqlens_k is not None
    snapshot.cu_seqlens_k[-1] = 10**6
    with pytest.raises(ValueError, match="cu_seqlens_k must end at most at 20"):
        snapshot.to(torch.bfloat16)
