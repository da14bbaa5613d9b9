"""The grids of flash-attention 2 and 3, with the rule of their tests.

The largest error against float64 is at most twice that of PyTorch, or three times with a soft cap,
plus the absolute terms of those tests. They are twice the rounding of the result at 0.3, and 1e-5,
or 3e-4 for gradients with a soft cap. To them comes the rounding of a float32 sum over the queries.
PyTorch is attention written out in the same dtype.

Every pair of values of a grid occurs, rather than their whole product. There are two samples and
four heads, or one sample and one key head where a head has half a million scores.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import combinations, pairwise
from itertools import product as combined
from typing import Any

import pytest
import torch
from torch import Tensor

import ral_kernels as rk
from tests.conformance.conftest import Refused, slow

DTYPES = [torch.float16, torch.bfloat16]
KV_HEADS = {"mha": 4, "gqa": 2, "mqa": 1}
FLASH2_DIMS = [32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256]
FLASH3_DIMS = [64, 96, 128, 192, 256]
# fmt: off
FLASH2_LENGTHS = [
    (1, 147), (113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (512, 256), (1024, 1024),
    (1023, 1024), (1024, 1023), (2048, 2048),
]
FLASH3_LENGTHS = [
    (1, 1), (1, 3), (2, 1), (511, 1), (3, 513), (64, 128), (128, 192), (239, 1), (799, 3),
    (113, 128), (384, 256), (307, 256), (640, 128),
]
CAUSAL_LENGTHS = [(1, 239), (3, 799), (127, 512), (127, 513), (239, 1), (799, 3)]
CACHE_LENGTHS = [
    (1, 128), (1, 339), (3, 1024), (64, 800), (64, 256), (3, 799), (64, 2048), (128, 128),
]
PACKED_LENGTHS = [97, 128, 200, 257, 384, 768, 1025, 2048]
# fmt: on
Row = dict[str, Any]
flash_attn: Any = rk.flash_attn_func
flash_attn_varlen: Any = rk.flash_attn_varlen_func


def pairs_of(test: str, quick: int = 1, **grid: Sequence[Any]) -> Any:
    """`parametrize` over rows of the grid among which every pair of values occurs."""
    rows = [dict(zip(grid, values, strict=True)) for values in combined(*grid.values())]
    random.Random(0).shuffle(rows)
    numbers: dict[Any, int] = {}  # of pairs: a set of them is the bits of an int
    new = [
        sum(
            1 << numbers.setdefault(pair, len(numbers))
            for pair in combinations([(k, str(v)) for k, v in row.items()], 2)
        )
        for row in rows
    ]
    chosen: list[Row] = []
    seen = 0
    for least in range(math.comb(len(grid), 2), 0, -1):  # first the rows of many new pairs
        for row, pairs in zip(rows, new, strict=True):
            if (pairs & ~seen).bit_count() >= least:
                chosen.append(row)
                seen |= pairs
    small = sorted(chosen, key=lambda row: max(row.get("lengths", (row.get("length", 0),))))[:quick]
    return pytest.mark.parametrize(
        "row",
        [
            pytest.param(
                row,
                id="-".join(f"{name}={value}".replace("torch.", "") for name, value in row.items()),
                marks=[] if row in small else [slow(test)],
            )
            for row in chosen
        ],
    )


def normal(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def window_of(row: Row, seqlen_k: int) -> tuple[int, int]:
    """(left, right); flash-attention draws it from the lengths of the keys."""
    if not row.get("local"):
        return -1, -1
    chance = random.Random(str(row))
    return chance.randrange(seqlen_k), chance.randrange(seqlen_k)


def visible(seqlen_q: int, seqlen_k: int, causal: bool, window: tuple[int, int]) -> Tensor:
    """[T, N], bottom-right aligned."""
    ahead = torch.arange(seqlen_k) - torch.arange(seqlen_q)[:, None] - (seqlen_k - seqlen_q)
    left, right = window
    right = 0 if causal else right
    mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    if left >= 0:
        mask &= ahead >= -left
    return mask & (ahead <= right) if right >= 0 else mask


def product(equation: str, x: Tensor, y: Tensor) -> Tensor:
    """A matrix product of halves, accumulated in float32: torch's own is very slow on some CPUs."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.einsum(equation, x.to(wide), y.to(wide)).to(x.dtype)


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, softcap: float) -> Tensor:
    """Attention of [B, S, H, D] in PyTorch, every result rounded to the dtype of the inputs."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    scores = product("bthd,bnhd->bhtn", q / math.sqrt(q.shape[3]), k)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    p = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1)
    p = p.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return product("bhtn,bnhd->bthd", p, v)


def gradients(out: Tensor, inputs: list[Tensor], dout: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(out.dtype))]


def assert_flash_rule(
    got: Sequence[Tensor],
    truth: Sequence[Tensor],
    baseline: Sequence[Tensor],
    softcap: float,
    of_gradients: tuple[float, float] | None = None,
) -> None:
    """`of_gradients` takes the place of the factor and the absolute term, for gradients."""
    factor = 3.0 if softcap else 2.0
    for name, x, true, base in zip(("out", "dq", "dk", "dv"), got, truth, baseline, strict=False):
        assert x.shape == true.shape
        rounded = true.to(x.dtype)
        atol = 2 * float((rounded + 0.3 - 0.3 - rounded).abs().max()) if true.numel() else 0.0
        # Of one key the true gradients vanish: what is left is the rounding of a sum over queries.
        noise = 4 * torch.finfo(torch.float32).eps * math.sqrt(truth[0].shape[-3:-1].numel())
        atol += 3e-4 if softcap and name != "out" else max(1e-5, noise)
        if of_gradients is not None and name != "out":
            factor, atol = of_gradients
        wanted = factor * largest(base - true) + atol
        assert largest(x - true) <= wanted, f"{name}: {largest(x - true):.3e} > {wanted:.3e}"


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def inputs_of(row: Row, seqlen_q: int, seqlen_k: int) -> list[Tensor]:
    batch_size, heads, kv_heads = 2, 4, KV_HEADS[row.get("heads", "mha")]
    if seqlen_q * seqlen_k >= 2**19:  # written out, these take seconds a head
        batch_size, heads, kv_heads = 1, max(1, heads // kv_heads), 1
    d = row["d"]
    shapes = [(seqlen_q, heads, d), (seqlen_k, kv_heads, d), (seqlen_k, kv_heads, row.get("dv", d))]
    return [
        normal(i, row["dtype"], batch_size, *shape).requires_grad_()
        for i, shape in enumerate(shapes)
    ]


def check(row: Row) -> None:
    seqlen_q, seqlen_k = row["lengths"]
    softcap, causal = row.get("softcap", 0.0), row["causal"]
    tensors = inputs_of(row, seqlen_q, seqlen_k)
    if softcap:  # so that it bends the scores
        tensors[0] = (tensors[0].detach() * softcap).requires_grad_()
    window = window_of(row, seqlen_k)
    out = flash_attn(
        *tensors,
        causal=causal,
        window_size=window,
        softcap=softcap,
        deterministic=row.get("deterministic", False),
    )
    dout = normal(9, row["dtype"], *out.shape)
    mask = visible(seqlen_q, seqlen_k, causal, window)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    results = [
        gradients(written_out(*inputs, mask, softcap), inputs, dout) for inputs in (exact, tensors)
    ]
    assert_flash_rule(gradients(out, tensors, dout), *results, softcap)


@pairs_of(
    "test_flash2",
    dtype=DTYPES,
    heads=list(KV_HEADS),
    deterministic=[False, True],
    local=[False, True],
    causal=[False, True],
    d=FLASH2_DIMS,
    lengths=FLASH2_LENGTHS,
    softcap=[0.0, 50.0],
)
def test_flash2(row: Row) -> None:
    check(row)


@pairs_of(
    "test_flash2_causal",
    dtype=DTYPES,
    local=[False, True],
    causal=[True],
    d=FLASH2_DIMS,
    lengths=CAUSAL_LENGTHS,
)
def test_flash2_causal(row: Row) -> None:
    check(row)


@pairs_of(
    "test_flash3",
    dtype=DTYPES,
    heads=list(KV_HEADS),
    local=[False, True],
    causal=[False, True],
    d=FLASH3_DIMS,
    lengths=FLASH3_LENGTHS,
    softcap=[0.0, 15.0],
)
def test_flash3(row: Row) -> None:
    check(row)


@pairs_of("test_flash3", quick=0, dtype=DTYPES, causal=[True], d=[64], lengths=[(4224, 4224)])
def test_flash3_long(row: Row) -> None:
    check(row)


@pairs_of(
    "test_flash3_head_dims_differ",
    dtype=DTYPES,
    heads=list(KV_HEADS),
    causal=[False, True],
    d=[64, 128, 192],
    dv=[64, 96, 128, 256, 512],
    lengths=[(113, 203), (256, 256), (384, 256)],
)
def test_flash3_head_dims_differ(row: Row) -> None:
    check(row)


def ragged(total: int, seed: int) -> list[int]:
    """Lengths of three sequences up to `total`, one of which may be empty."""
    chance = random.Random(seed)
    return [total, max(1, total - chance.randrange(20)), chance.randrange(min(total, 200) + 1)]


def packed(
    row: Row, lengths_q: list[int], lengths_k: list[int]
) -> tuple[list[Tensor], list[list[Tensor]], list[Tensor]]:
    """q, k, v packed; the same a sequence; cu_seqlens of queries and keys."""
    d, kv_heads = row["d"], KV_HEADS[row.get("heads", "mha")]
    shapes = ((sum(lengths_q), 4), (sum(lengths_k), kv_heads), (sum(lengths_k), kv_heads))
    tensors = [
        normal(i, row["dtype"], *shape, d).requires_grad_() for i, shape in enumerate(shapes)
    ]
    splits = [
        list(x.split(lengths))
        for x, lengths in zip(tensors, (lengths_q, lengths_k, lengths_k), strict=True)
    ]
    bounds = [
        torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) for lengths in (lengths_q, lengths_k)
    ]
    return tensors, splits, bounds


def each_sequence(
    row: Row, tensors: list[Tensor], bounds: list[Tensor], window: tuple[int, int]
) -> Tensor:
    q, k, v = tensors
    parts = []
    for (i, j), (m, n) in zip(*(pairwise(x.tolist()) for x in bounds), strict=True):
        mask = visible(j - i, n - m, row["causal"], window)
        parts.append(
            written_out(q[None, i:j], k[None, m:n], v[None, m:n], mask, row.get("softcap", 0.0))[0]
            if j > i and n > m
            else q.new_zeros(j - i, q.shape[1], v.shape[2])
        )
    return torch.cat(parts)


def check_packed(row: Row, f: Any, lengths_q: list[int], lengths_k: list[int]) -> None:
    tensors, _, bounds = packed(row, lengths_q, lengths_k)
    softcap = row.get("softcap", 0.0)
    window = window_of(row, max(lengths_k))
    out = f(
        tensors,
        bounds,
        max(lengths_q),
        max(lengths_k),
        {"causal": row["causal"], "window_size": window, "softcap": softcap},
    )
    dout = normal(9, row["dtype"], *out.shape)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    results = [
        gradients(each_sequence(row, inputs, bounds, window), inputs, dout)
        for inputs in (exact, tensors)
    ]
    assert_flash_rule(gradients(out, tensors, dout), *results, softcap)


def varlen(tensors: Any, bounds: Any, longest_q: int, longest_k: int, options: Any) -> Tensor:
    return flash_attn_varlen(*tensors, *bounds, longest_q, longest_k, **options)


@pairs_of(
    "test_flash_varlen",
    dtype=DTYPES,
    heads=list(KV_HEADS),
    local=[False, True],
    causal=[False, True],
    d=FLASH2_DIMS,
    lengths=FLASH2_LENGTHS + FLASH3_LENGTHS,
    softcap=[0.0, 15.0],
)
def test_flash_varlen(row: Row) -> None:
    total_q, total_k = row["lengths"]
    check_packed(row, varlen, ragged(total_q, 1), ragged(total_k, 2))


PACKED = ["qkvpacked", "kvpacked", "varlen_qkvpacked", "varlen_kvpacked"]


@pairs_of(
    "test_flash2_packed",
    kind=PACKED,
    dtype=DTYPES,
    local=[False, True],
    causal=[False, True],
    d=FLASH2_DIMS,
    length=PACKED_LENGTHS,
)
def test_flash2_packed(row: Row) -> None:
    """q, k and v, or k and v, in one tensor."""
    kind, length = row["kind"], row["length"]
    f = getattr(rk, f"flash_attn_{kind}_func")
    varlen = kind.startswith("varlen")

    def call(tensors: Any, bounds: Any, longest_q: int, longest_k: int, options: Any) -> Tensor:
        dim = 1 if varlen else 2
        if not varlen:
            tensors = [x[None] for x in tensors]
        q, k, v = tensors
        if kind.endswith("_kvpacked") or kind == "kvpacked":
            sizes = (*bounds, longest_q, longest_k) if varlen else ()
            out = f(q, torch.stack([k, v], dim), *sizes, **options)
        else:
            sizes = (bounds[0], longest_q) if varlen else ()
            out = f(torch.stack([q, k, v], dim), *sizes, **options)
        return out if varlen else out[0]

    lengths = ragged(length, 1) if varlen else [length]
    check_packed(row, call, lengths, lengths)


@pairs_of(
    "test_flash_kvcache",
    dtype=DTYPES,
    heads=list(KV_HEADS),
    new_kv=[False, True],
    local=[False, True],
    causal=[False, True],
    per_sample=[False, True],
    batch_idx=[False, True],
    leftpad=[False, True],
    d=[32, 59, 64, 80, 128, 256],
    lengths=CACHE_LENGTHS,
)
def test_flash_kvcache(row: Row) -> None:
    """New queries over a cache, into which new keys may be written."""
    seqlen_q, seqlen_k = row["lengths"]
    d, kv_heads, dtype = row["d"], KV_HEADS[row["heads"]], row["dtype"]
    batch_size, cache_size = 2, 4 if row["batch_idx"] else 2
    chance = random.Random(str(row))
    q = normal(0, dtype, batch_size, seqlen_q, 4, d)
    caches = [normal(i, dtype, cache_size, seqlen_k, kv_heads, d) for i in (1, 2)]
    new = [normal(i, dtype, batch_size, seqlen_q, kv_heads, d) for i in (3, 4)]
    room = seqlen_k - (seqlen_q if row["new_kv"] else 0)
    lengths = [chance.randrange(room + 1), room] if row["per_sample"] else [room, room]
    chosen = [3, 1] if row["batch_idx"] else [0, 1]
    pads = [chance.randrange(max(1, length)) for length in lengths] if row["leftpad"] else [0, 0]
    window = window_of(row, seqlen_k)
    wanted, base = [], []
    expected = [cache.clone() for cache in caches]
    for b, (length, sample, pad) in enumerate(zip(lengths, chosen, pads, strict=True)):
        total = length
        if row["new_kv"]:
            total += seqlen_q
            for cache, x in zip(expected, new, strict=True):
                cache[sample, length:total] = x[b]
        mask = visible(seqlen_q, total, row["causal"], window) & (torch.arange(total) >= pad)
        inputs = [q[b : b + 1], *(cache[sample : sample + 1, :total] for cache in expected)]
        wanted.append(written_out(*(x.double() for x in inputs), mask, 0.0))
        base.append(written_out(*inputs, mask, 0.0))
    integers = {"dtype": torch.int32}
    out = rk.flash_attn_with_kvcache(
        q,
        caches[0],
        caches[1],
        k=new[0] if row["new_kv"] else None,
        v=new[1] if row["new_kv"] else None,
        cache_seqlens=torch.tensor(lengths, **integers) if row["per_sample"] else room,
        cache_batch_idx=torch.tensor(chosen, **integers) if row["batch_idx"] else None,
        cache_leftpad=torch.tensor(pads, **integers) if row["leftpad"] else None,
        causal=row["causal"],
        window_size=window,
    )
    for cache, x in zip(caches, expected, strict=True):
        assert torch.equal(cache, x)
    assert_flash_rule([out], [torch.cat(wanted)], [torch.cat(base)], 0.0)


def _q(*shape: int) -> Tensor:
    return normal(0, torch.float16, *(shape or (2, 5, 4, 32)))


BOUNDS = torch.tensor([0, 5], dtype=torch.int32)
REFUSED: dict[str, tuple[Any, str]] = {
    "dropout": (lambda: flash_attn(*[_q()] * 3, dropout_p=0.17), "dropout"),
    "dropout_varlen": (
        lambda: flash_attn_varlen(*[_q(5, 4, 32)] * 3, BOUNDS, BOUNDS, 5, 5, dropout_p=0.17),
        "dropout",
    ),
    "alibi": (lambda: flash_attn(*[_q()] * 3, alibi_slopes=torch.ones(4)), "alibi_slopes"),
    "alibi_varlen": (
        lambda: flash_attn_varlen(
            *[_q(5, 4, 32)] * 3, BOUNDS, BOUNDS, 5, 5, alibi_slopes=torch.ones(4)
        ),
        "alibi_slopes",
    ),
    "paged": (
        lambda: flash_attn_varlen(
            *[_q(5, 4, 32)] * 3, BOUNDS, BOUNDS, 5, 5, block_table=torch.zeros(1, 1)
        ),
        "block_table",
    ),
    "float8": (
        lambda: flash_attn(*[_q().to(torch.float8_e4m3fn)] * 3),
        "must be float32, bfloat16, float16",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_flash_refused(kind: str, refused: Refused) -> None:
    call, sentence = REFUSED[kind]
    with refused((NotImplementedError, TypeError), sentence):
        call()


@pytest.mark.parametrize("kind", ["block_table", "rotary_cos", "alibi_slopes"])
def test_flash_kvcache_refused(kind: str, refused: Refused) -> None:
    q = _q()
    with refused(NotImplementedError, kind):
        rk.flash_attn_with_kvcache(q, q.clone(), q.clone(), **{kind: torch.zeros(4)})


@pytest.mark.parametrize("feature", ["qv", "descaled_float8", "attention_chunk", "scheduler"])
def test_flash3_alone(feature: str) -> None:
    pytest.skip("flash-attention 3 has it alone: our signatures are those of flash-attention 2")


@pairs_of(
    "test_flash_bwd_transpose",
    dtype=DTYPES,
    causal=[False, True],
    d=[64, 128],
    length=[97, 128, 200, 256],
)
def test_flash_bwd_transpose(row: Row) -> None:
    """A gradient of another memory layout than the output's."""
    row = row | {"lengths": (row["length"],) * 2}
    tensors = inputs_of(row, *row["lengths"])
    mask = visible(*row["lengths"], row["causal"], (-1, -1))
    out = flash_attn(*tensors, causal=row["causal"])
    dout = normal(9, row["dtype"], *out.transpose(1, 2).shape).transpose(1, 2)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    results = [
        gradients(written_out(*inputs, mask, 0.0), inputs, dout) for inputs in (exact, tensors)
    ]
    assert_flash_rule(gradients(out, tensors, dout), *results, 0.0)


@pairs_of(
    "test_flash_bwd_transpose",
    quick=0,
    causal=[False, True],
    d=[16, 32, 64],
    length=[1, 2, 5, 17, 128],
)
def test_flash_bwd_overflow(row: Row) -> None:
    """Scores near the end of float16's range."""
    row = row | {"lengths": (row["length"],) * 2, "dtype": torch.float16}
    tensors = inputs_of(row, *row["lengths"])
    tensors[0] = (tensors[0].detach() * 5).requires_grad_()
    mask = visible(*row["lengths"], row["causal"], (-1, -1))
    out = flash_attn(*tensors, causal=row["causal"])
    dout = normal(9, torch.float16, *out.shape) * 3
    exact = [x.detach().double().requires_grad_() for x in tensors]
    results = [
        gradients(written_out(*inputs, mask, 0.0), inputs, dout) for inputs in (exact, tensors)
    ]
    truth, baseline = results
    assert_flash_rule(gradients(out, tensors, dout), truth, baseline, 0.0, (5.0, 1e-3))


@pairs_of(
    "test_flash_deterministic",
    dtype=DTYPES,
    local=[False, True],
    causal=[False, True],
    d=[32, 59, 128, 256],
    lengths=[(1, 239), (113, 203), (512, 256), (1023, 1024)],
)
def test_flash_deterministic(row: Row) -> None:
    """The same bits in every run, and for any number of threads."""
    tensors = inputs_of(row, *row["lengths"])
    window = window_of(row, row["lengths"][1])

    def run() -> list[Tensor]:
        out = flash_attn(*tensors, causal=row["causal"], window_size=window, deterministic=True)
        return gradients(out, tensors, normal(9, row["dtype"], *out.shape))

    first = run()
    threads = torch.get_num_threads()
    for number in (threads, threads + 1):
        torch.set_num_threads(number)
        again = run()
        torch.set_num_threads(threads)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
