"""`AttentionTarget` itself: what it checks, keeps and refuses, alone and against a call."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ral_kernels as rk

B, G, K, N, T, H, D = 2, 3, 4, 7, 5, 4, 8
NAN = float("nan")


def values(*shape: int, **changes: Any) -> Tensor:
    return torch.rand(*(shape or (B, G, N)), **changes)


def ids(*rows: list[int]) -> Tensor:
    """[B, G, K], the rows given and then empty ones."""
    given = [*rows, *[[-1] * K] * (B * G - len(rows))]
    return torch.tensor(given).view(B, G, K)


def target(x: Tensor | None = None, *rows: list[int], **changes: Any) -> rk.AttentionTarget:
    if rows:
        return rk.AttentionTarget(values(B, G, K), ids(*rows), **changes)
    return rk.AttentionTarget(values() if x is None else x, **changes)


def changed(at: tuple[int, ...], value: float) -> Tensor:
    x = values()
    x[at] = value
    return x


def against(reference: Any, **options: Any) -> Tensor:
    q, k = torch.zeros(B, H, T, D), torch.zeros(B, 2, N, D)
    return rk.attention_divergence(q, k, reference, **options)


def packed(reference: Any) -> Tensor:
    q, k = torch.zeros(1, H, T, D), torch.zeros(1, 2, N, D)
    bounds = [torch.tensor(x, dtype=torch.int32) for x in ((0, 2, 5), (0, 3, 7))]
    return rk.attention_divergence(q, k, reference, cu_seqlens_q=bounds[0], cu_seqlens_k=bounds[1])


INDEX = torch.zeros(B, T, dtype=torch.int64)
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "values_list": (lambda: target([[1.0]]), TypeError,  # type: ignore[arg-type]
        "values must be a floating tensor; got list"),
    "values_int": (lambda: target(INDEX), TypeError, "values must be floating; got int64"),
    "values_2d": (lambda: target(values(B, N)), ValueError,
        r"values must be \[B, G, N\], or \[B, G, K\] with ids; got \(2, 7\)"),
    "values_negative": (lambda: target(changed((1, 2, 3), -0.5)), ValueError,
        "values must be >= 0; got -0.5"),
    "values_nan": (lambda: target(changed((0, 0, 3), NAN)), ValueError, "values .*; got nan"),
    "values_inf": (lambda: target(changed((0, 0, 3), float("inf"))), ValueError,
        r"values of one target must sum to at most 2\*\*100; got inf"),
    "values_huge": (lambda: target(changed((0, 0, 3), 2e30)), ValueError,
        "values .* at most .* got 2"),
    "values_grad": (lambda: target(values(requires_grad=True)), NotImplementedError,
        r"values get no gradient, so they must not require grad; use values.detach\(\)"),
    "ids_float": (lambda: rk.AttentionTarget(values(), values()), TypeError,
        "ids must be int32 or int64; got float32"),
    "ids_shape": (lambda: rk.AttentionTarget(values(), ids()), ValueError,
        r"ids must be \[B, G, K\] = \(2, 3, 7\); got \(2, 3, 4\)"),
    "ids_low": (lambda: target(None, [0, -2, 1, 2]), ValueError,
        r"ids must be in \[-1, 2\*\*31 - 1\); got values from -2 to 2"),
    "ids_twice": (lambda: target(None, [0, 1, 2, 3], [5, 0, -1, 5]), ValueError,
        "ids must be distinct within a target; got 5 twice in target 1 of sample 0"),
    "index_float": (lambda: target(index=INDEX.float()), TypeError,
        "index must be int32 or int64; got float32"),
    "index_shape": (lambda: target(index=INDEX[:1]), ValueError,
        r"index must be \[B, T\] with B=2; got \(1, 5\)"),
    "index_high": (lambda: target(index=INDEX + G), ValueError,
        r"index must be in \[-1, G=3\); got values from 3 to 3"),
    "index_low": (lambda: target(index=INDEX - 2), ValueError,
        "index .* got values from -2 to -2"),
}  # fmt: skip
BAD_CALLS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "batch": (lambda: against(rk.AttentionTarget(values(3, 1, N))), ValueError,
        "reference must be a target of batch size B=2; got 3"),
    "keys": (lambda: against(rk.AttentionTarget(values(B, 1, N + 1))), ValueError,
        r"reference.values must be \[B, G, N\] with N=7; got \(2, 1, 8\)"),
    "spans": (lambda: against(rk.AttentionTarget(values(B, 1, N)),
        spans=rk.Spans.from_lengths([3, 4])), ValueError,
        r"reference.values must be \[B, G, S\] with S=2; got \(2, 1, 7\)"),
    "ids": (lambda: against(target(None, [0, 7, -1, 1], index=INDEX)), ValueError,
        r"reference.ids must be in \[-1, N=7\); got 7"),
    "rows": (lambda: against(target(index=INDEX), rows=(1, 5)), ValueError,
        r"reference.index must be \[B, T\] = \(2, 4\); got \(2, 5\)"),
    "no_index": (lambda: against(target()), ValueError,
        "reference without an index must be a target of G=1; got G=3"),
    "no_index_packed": (lambda: packed(rk.AttentionTarget(values(1, G, N))), ValueError,
        "reference without an index must be a target of G=1 or G=S=2; got G=3"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    make, error, message = BAD[name]
    with pytest.raises(error, match=f"^AttentionTarget: {message}"):
        make()


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name: str) -> None:
    make, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=f"^attention_divergence: {message}"):
        make()


def test_kept_as_kernels_want_it() -> None:
    """Ids ascend and -1 is last; what stands there is 0, whatever it was. Copies are kept."""
    places = ids([6, -1, 0, 2])
    given = torch.tensor([5.0, 4.0, 1.0, 3.0]).expand(B, G, K).masked_fill(places < 0, NAN)
    made = rk.AttentionTarget(given.bfloat16(), places, index=INDEX)
    assert made.ids is not None and made.index is not None
    assert made.ids.dtype == made.index.dtype == torch.int32 and made.values.dtype == torch.float32
    assert made.ids[0, 0].tolist() == [0, 2, 6, -1]
    assert made.values[0, 0].tolist() == [1.0, 3.0, 5.0, 0.0] and not made.values[1].any()
    assert rk.AttentionTarget(values(dtype=torch.float64)).values.dtype == torch.float64
    x = values()
    made = rk.AttentionTarget(x)
    x.fill_(-1)
    assert (made.values >= 0).all()
    assert (made.batch_size, made.num_targets, made.device) == (B, G, torch.device("cpu"))


def test_repr_to_and_pickle() -> None:
    made = target(None, [0, 2, 5, -1], index=INDEX)
    text = "AttentionTarget(values=float32[2, 3, 4] on cpu, ids=int32[2, 3, 4], index=int32[2, 5])"
    assert repr(made) == text
    assert repr(target()) == "AttentionTarget(values=float32[2, 3, 7] on cpu, ids=None, index=None)"
    wanted = against(made, kind="cross_entropy")
    for again in (made.to("cpu"), pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert repr(again) == text
        assert torch.equal(against(again, kind="cross_entropy"), wanted)
    assert made.to("meta").values.is_meta


def test_edits_are_checked_again() -> None:
    """In place and by assignment; the next call raises as the constructor does."""
    made = target(None, [0, 2, 5, -1], index=INDEX)
    wanted = against(made, kind="cross_entropy")
    assert made.ids is not None and made.index is not None
    made.ids[0, 0, :3] = torch.tensor([5, 2, 0])
    made.values[0, 0, :3] = made.values[0, 0, :3].flip(0)
    assert torch.equal(against(made, kind="cross_entropy"), wanted)
    assert made.ids[0, 0].tolist() == [0, 2, 5, -1]
    made.index[1, 4] = G
    with pytest.raises(ValueError, match=r"^AttentionTarget: index must be in"):
        against(made)
    made.index = INDEX.int()
    made.ids[0, 0, 0] = N
    with pytest.raises(ValueError, match=r"reference\.ids must be in"):
        against(made)
    made.values = values(B, 1, N, requires_grad=True)
    made.ids = made.index = None
    with pytest.raises(NotImplementedError, match=r"^AttentionTarget: values get no gradient"):
        against(made)


def test_targets_without_a_key_or_none_at_all() -> None:
    """K = 0 and G = 0, as of a batch in which nothing is marked."""
    for shape in ((B, G, 0), (B, 0, 0), (B, 0, K)):
        empty = rk.AttentionTarget(
            values(*shape), torch.zeros(shape, dtype=torch.int64), index=torch.full((B, T), -1)
        )
        for spans in (None, rk.Spans.from_lengths([3, 4])):
            assert not against(empty, spans=spans).any()
    assert not against(rk.AttentionTarget(values(B, 0, N), index=torch.full((B, T), -1))).any()


def test_where_values_cannot_be_read() -> None:
    """Under vmap what is out of range counts as none."""
    x = torch.stack([values(), values()])
    x[0, 0, 0, 0] = -1.0
    index = torch.tensor([0, 1, 2, 3, -5]).expand(2, B, T)
    kept = torch.vmap(lambda x, i: rk.AttentionTarget(x, index=i).values)(x, index)
    assert torch.equal(kept, x.clamp_min(0))
    numbers: Any = torch.vmap(lambda x, i: rk.AttentionTarget(x, index=i).index)(x, index)
    assert numbers[0, 0].tolist() == [0, 1, 2, -1, -1]
    places = torch.tensor([3, -7, 0, 2]).expand(2, B, G, K)
    numbers = torch.vmap(lambda x, i: rk.AttentionTarget(x, i).ids)(x[..., :K], places)
    assert numbers[0, 0, 0].tolist() == [0, 2, 3, -1]


def test_through_vmap() -> None:
    """A function of q is mapped over copies of it, as other ops' are."""
    q, k = torch.randn(2, B, H, T, D), torch.randn(B, 2, N, D)
    made = target(None, [0, 2, 5, -1], [1, -1, -1, -1], index=INDEX)

    def f(q: Tensor) -> Tensor:
        return rk.attention_divergence(q, k, made)

    with pytest.warns(UserWarning, match="batching rule"):
        mapped = torch.vmap(f)(q)
    torch.testing.assert_close(mapped, torch.stack([f(x) for x in q]))
