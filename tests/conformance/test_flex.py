"""FlexAttention's kinds of score_mod and mask_mod, by the options of ours that express them.

FlexAttention has no backward on the CPU. So the same functions are applied to the whole matrix of
scores too. That must agree with FlexAttention, and gives the gradients. Ours may have at most twice
its error in the same dtype, both against float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex

import ral_kernels as rk
from tests.conformance.conftest import Refused, slow
from tests.ops.accuracy import assert_accurate, error, floor_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
T, N, BATCH_SIZE, HEADS = 40, 52, 2, 4
Index = Tensor
Modify = Callable[[Tensor, Index, Index, Index, Index], Tensor]
Keep = Callable[[Index, Index, Index, Index], Tensor]


@dataclass(frozen=True)
class Kind:
    """A mask_mod or score_mod of FlexAttention, and our options for it.

    options: (seqlen_q, seqlen_k, dtype) -> keywords of `ral_kernels.attention`.
    """

    options: Callable[[int, int, torch.dtype], dict[str, Any]]
    keep: Keep | None = None
    modify: Modify | None = None
    square: bool = False  # only for as many queries as keys
    flex_options: dict[str, Any] = field(default_factory=dict)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


DOCUMENT = torch.tensor([0] * 9 + [1] * 20 + [2] * 1 + [3] * 22)
LENGTHS = [9, 20, 1, 22]
PREFIX = torch.tensor([17, 4])
REAL = torch.tensor([N, 31])  # keys of each sample; the others are padding
HEAD_BIAS = noise(HEADS, seed=5)
BIAS = noise(N, N, seed=6)
SLOPES = torch.tensor([2.0 ** -(i + 1) for i in range(HEADS)])
SPANS = torch.arange(N) // 13
SPAN_BIAS = noise(HEADS, 4, seed=8)


def mask_of(keep: Keep) -> Callable[[int, int, torch.dtype], dict[str, Any]]:
    """A kind that only a dense mask expresses."""
    return lambda t, n, dtype: {"attn_mask": keep(*indices(t, n)).expand(BATCH_SIZE, -1, t, n)}


def bias_of(modify: Modify) -> Callable[[int, int, torch.dtype], dict[str, Any]]:
    """A kind that adds to the scores."""
    return lambda t, n, dtype: {
        "attn_mask": modify(torch.zeros(()), *indices(t, n)).to(torch.float32)
    }


def indices(seqlen_q: int, seqlen_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four indices that FlexAttention passes, of every score."""
    sizes = (BATCH_SIZE, HEADS, seqlen_q, seqlen_k)
    b, h, i, j = (
        torch.arange(size).view([-1 if d == dim else 1 for d in range(4)])
        for dim, size in enumerate(sizes)
    )
    return b, h, i, j


def causal(b: Index, h: Index, i: Index, j: Index) -> Tensor:
    return i >= j


def prefix(b: Index, h: Index, i: Index, j: Index) -> Tensor:
    return (j < PREFIX[b]) | (i >= j)


def documents(b: Index, h: Index, i: Index, j: Index) -> Tensor:
    return (DOCUMENT[i] == DOCUMENT[j]) & (i >= j)


def dilated(b: Index, h: Index, i: Index, j: Index) -> Tensor:
    return ((i - j).abs() <= 12) & ((i - j) % 3 == 0)


def grid(b: Index, h: Index, i: Index, j: Index) -> Tensor:
    """Neighbours in a picture eight wide."""
    return ((i % 8 - j % 8).abs() <= 1) & ((i // 8 - j // 8).abs() <= 1)


def some_heads(b: Index, h: Index, i: Index, j: Index) -> Tensor:
    return (h % 2 == 0) | (i >= j)


def nothing(b: Index, h: Index, i: Index, j: Index) -> Tensor:
    return (i < 0) & (j < 0)


def some_rows(b: Index, h: Index, i: Index, j: Index) -> Tensor:
    return (i % 3 != 0) & (j >= 0)


def alibi(s: Tensor, b: Index, h: Index, i: Index, j: Index) -> Tensor:
    return s + SLOPES[h] * (j - i)


def relative(s: Tensor, b: Index, h: Index, i: Index, j: Index) -> Tensor:
    return s + (i - j)


def relative_causal(s: Tensor, b: Index, h: Index, i: Index, j: Index) -> Tensor:
    return torch.where(i >= j, s + (i - j), -torch.inf)


def checkerboard(s: Tensor, b: Index, h: Index, i: Index, j: Index) -> Tensor:
    return torch.where((i - j) % 2 == 0, s - 1, s)


def of_head(s: Tensor, b: Index, h: Index, i: Index, j: Index) -> Tensor:
    return s + HEAD_BIAS[h]


def table(s: Tensor, b: Index, h: Index, i: Index, j: Index) -> Tensor:
    return s + BIAS[i, j]


def softcap(s: Tensor, b: Index, h: Index, i: Index, j: Index) -> Tensor:
    return 2.0 * torch.tanh(s / 2.0)


def of_spans(s: Tensor, b: Index, h: Index, i: Index, j: Index) -> Tensor:
    return s + SPAN_BIAS[h, SPANS[j]]


def span_options(t: int, n: int, dtype: torch.dtype) -> dict[str, Any]:
    bias = SPAN_BIAS[None, :, None].expand(BATCH_SIZE, -1, t, -1)
    return {"spans": rk.Spans(SPANS[:n].to(torch.int32), 4), "span_bias": bias}


KINDS: dict[str, Kind] = {
    "noop": Kind(lambda t, n, dtype: {}),
    "causal": Kind(lambda t, n, dtype: {"is_causal": True}, keep=causal, square=True),
    "causal_top_left": Kind(mask_of(causal), keep=causal),
    "causal_bottom_right": Kind(
        lambda t, n, dtype: {"is_causal": True}, keep=lambda b, h, i, j: i + (N - T) >= j
    ),
    "inverse_causal": Kind(
        lambda t, n, dtype: {"window": (0, None)}, keep=lambda b, h, i, j: i <= j, square=True
    ),
    "sliding_window": Kind(
        lambda t, n, dtype: {"is_causal": True, "window": 7},
        keep=lambda b, h, i, j: (i >= j) & (i - j <= 7),
        square=True,
    ),
    "window_both_ways": Kind(
        lambda t, n, dtype: {"window": (5, 3)},
        keep=lambda b, h, i, j: (i - j <= 5) & (j - i <= 3),
        square=True,
    ),
    "prefix_lm": Kind(mask_of(prefix), keep=prefix, square=True),
    "documents": Kind(mask_of(documents), keep=documents, square=True),
    "padding": Kind(
        lambda t, n, dtype: {"key_padding_mask": torch.arange(n) < REAL[:, None]},
        keep=lambda b, h, i, j: j < REAL[b],
    ),
    "padding_and_causal": Kind(
        lambda t, n, dtype: {
            "key_padding_mask": torch.arange(n) < REAL[:, None],
            "is_causal": True,
        },
        keep=lambda b, h, i, j: (j < REAL[b]) & (i >= j),
        square=True,
    ),
    "dilated_window": Kind(mask_of(dilated), keep=dilated),
    "neighbours_in_a_picture": Kind(mask_of(grid), keep=grid),
    "causal_in_some_heads": Kind(mask_of(some_heads), keep=some_heads),
    "nothing_visible": Kind(mask_of(nothing), keep=nothing),
    "some_rows_see_nothing": Kind(mask_of(some_rows), keep=some_rows),
    "alibi": Kind(bias_of(alibi), modify=alibi),
    "alibi_and_causal": Kind(
        lambda t, n, dtype: {**bias_of(alibi)(t, n, dtype), "is_causal": True},
        modify=alibi,
        keep=causal,
        square=True,
    ),
    "relative_bias": Kind(bias_of(relative), modify=relative),
    "relative_causal_bias": Kind(bias_of(relative_causal), modify=relative_causal),
    "checkerboard": Kind(bias_of(checkerboard), modify=checkerboard),
    "bias_of_head": Kind(bias_of(of_head), modify=of_head),
    "bias_from_a_table": Kind(bias_of(table), modify=table),
    "softcap": Kind(lambda t, n, dtype: {"softcap": 2.0}, modify=softcap),
    "softcap_and_causal": Kind(
        lambda t, n, dtype: {"softcap": 2.0, "is_causal": True},
        modify=softcap,
        keep=causal,
        square=True,
    ),
    "bias_of_spans": Kind(span_options, modify=of_spans),
    "scale": Kind(lambda t, n, dtype: {"scale": 0.4}, flex_options={"scale": 0.4}),
}
HEADS_OF_KEYS = {"mha": HEADS, "gqa": 2, "mqa": 1}


@pytest.fixture(autouse=True)
def flex_as_it_is(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FlexAttention's own mathematics, without a compiler in front."""
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    yield


def on_whole_matrix(kind: Kind, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """(out, lse) with the kind's functions on all scores, in float32 or wider."""
    groups = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = (x.repeat_interleave(groups, 1).to(wide) for x in (k, v))
    scale = kind.flex_options.get("scale", 1 / math.sqrt(q.shape[3]))
    scores = (q.to(wide) * scale) @ keys.mT
    at = indices(*scores.shape[2:])
    if kind.modify is not None:
        scores = kind.modify(scores, *at).to(wide)
    if kind.keep is not None:
        scores = scores.masked_fill(~kind.keep(*at), -torch.inf)
    lse = scores.logsumexp(-1)
    p = torch.exp(scores - lse.masked_fill(lse.isinf(), 0.0)[..., None])
    return [(p.to(q.dtype).to(wide) @ values).to(q.dtype), lse]


def tensors_of(name: str, heads: str, dtype: torch.dtype, dim: int, dim_v: int) -> list[Tensor]:
    t = N if KINDS[name].square else T
    kv_heads = HEADS_OF_KEYS[heads]
    shapes = ((HEADS, t, dim), (kv_heads, N, dim), (kv_heads, N, dim_v))
    return [noise(BATCH_SIZE, *s, seed=i).to(dtype) for i, s in enumerate(shapes)]


def case(name: str, heads: str, dtype: torch.dtype, dims: tuple[int, int]) -> Any:
    quick = (heads, dtype, dims) == ("gqa", torch.float32, (16, 16))
    return pytest.param(
        name,
        heads,
        dtype,
        dims,
        id=f"{name}-{heads}-{str(dtype)[6:]}-{dims[0]}-{dims[1]}",
        marks=[] if quick and name in ("documents", "softcap_and_causal") else [slow("test_flex")],
    )


@pytest.mark.parametrize(
    ("name", "heads", "dtype", "dims"),
    [
        case(name, heads, dtype, dims)
        for name in KINDS
        for heads in HEADS_OF_KEYS
        for dtype in DTYPES
        for dims in ((16, 16), (64, 24))
    ],
)
def test_flex(name: str, heads: str, dtype: torch.dtype, dims: tuple[int, int]) -> None:
    """out, lse and the gradients of q, k and v."""
    kind = KINDS[name]
    tensors = tensors_of(name, heads, dtype, *dims)
    t, n = tensors[0].shape[2], tensors[1].shape[2]

    def with_gradients(run: Callable[..., list[Tensor]], to: torch.dtype) -> list[Tensor]:
        inputs = [x.to(to).detach().requires_grad_() for x in tensors]
        out, lse = run(*inputs)
        dout = noise(*out.shape, seed=9).to(dtype).to(out.dtype)
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, inputs, dout)]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        result = rk.attention(q, k, v, **kind.options(t, n, dtype))
        return [result.out, result.lse]

    def whole(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return on_whole_matrix(kind, q, k, v)

    truth = with_gradients(whole, torch.float64)
    baseline = with_gradients(whole, dtype)
    got = with_gradients(ours, dtype)
    theirs = flex_forward(kind, tensors)
    torch.testing.assert_close(theirs.double(), truth[0], rtol=2e-2, atol=2e-2)
    if error(theirs, truth[0]) > error(baseline[0], truth[0]):
        baseline[0] = theirs
    unmasked = ~truth[1].isinf()
    assert torch.equal(unmasked, ~got[1].isinf())
    for result in (truth, baseline, got):
        result[1] = result[1].masked_fill(~unmasked, 0.0)
    for what, x, true, base in zip(
        ("out", "lse", "dq", "dk", "dv"), got, truth, baseline, strict=True
    ):
        assert_accurate(what, x, true, base, floor_of(torch.float32 if what == "lse" else dtype))


def flex_forward(kind: Kind, tensors: list[Tensor]) -> Tensor:
    """FlexAttention itself; a row that sees nothing is zero there too."""
    q, k, v = tensors
    block_mask = None
    if kind.keep is not None:
        sizes = (BATCH_SIZE, HEADS, q.shape[2], k.shape[2])
        block_mask = flex.create_block_mask(kind.keep, *sizes, device="cpu")
    out: Any = flex.flex_attention(
        q,
        k,
        v,
        score_mod=kind.modify,
        block_mask=block_mask,
        enable_gqa=q.shape[1] != k.shape[1],
        **kind.flex_options,
    )
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_documents_packed(dtype: torch.dtype) -> None:
    """The mask of documents by cu_seqlens, which needs no mask."""
    q, k, v = tensors_of("documents", "gqa", dtype, 16, 16)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    wanted = flex_forward(KINDS["documents"], [q, k, v])
    for b in range(BATCH_SIZE):
        packed = [x[b].transpose(0, 1) for x in (q, k, v)]
        got = rk.flash_attn_varlen_func(
            packed[0], packed[1], packed[2], bounds, bounds, 22, 22, causal=True
        )
        tolerance = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(got.transpose(0, 1), wanted[b], rtol=tolerance, atol=tolerance)


def test_gradient_of_a_learned_bias_of_spans() -> None:
    """FlexAttention's captured buffers have gradients: a bias a span has one here."""
    kind = KINDS["bias_of_spans"]
    q, k, v = (x.double() for x in tensors_of("bias_of_spans", "mha", torch.float32, 16, 16))
    options = kind.options(T, N, torch.float64)
    bias = SPAN_BIAS.double().requires_grad_()
    options["span_bias"] = bias[None, :, None].expand(BATCH_SIZE, -1, T, -1)
    dout = noise(BATCH_SIZE, HEADS, T, 16, seed=9).double()
    (got,) = torch.autograd.grad(rk.attention(q, k, v, **options).out, bias, dout)
    one_hot = F.one_hot(SPANS, 4).double()
    mask = (bias @ one_hot.T)[None, :, None].expand(BATCH_SIZE, -1, T, -1)
    (wanted,) = torch.autograd.grad(
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask), bias, dout
    )
    torch.testing.assert_close(got, wanted)


def test_gradient_of_a_learned_table(refused: Refused) -> None:
    """Any other captured buffer has none here."""
    q, k, v = tensors_of("bias_from_a_table", "mha", torch.float32, 16, 16)
    with refused(NotImplementedError, "attn_mask gets no gradient"):
        rk.attention(q, k, v, attn_mask=BIAS[:T].clone().requires_grad_())


@pytest.mark.parametrize("feature", ["any score_mod", "paged attention", "block_mask"])
def test_flex_alone(feature: str) -> None:
    pytest.skip(f"{feature}: ours takes options and tensors, no functions or tables of pages")
