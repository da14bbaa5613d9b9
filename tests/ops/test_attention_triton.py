"""What is particular to the Triton backend of `attention`: packed calls, splits, sums by blocks.

The drop-ins never choose the interpreter, so packed calls are made here, below them.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import ral_kernels as rk
from ral_kernels.ops.attention.interface import call_attention
from ral_kernels.runtime import triton_runtime
from tests.conftest import skip_or_fail

PACKED: tuple[tuple[str, list[int], list[int], dict[str, Any]], ...] = (
    ("self_attention", [33, 0, 5, 70], [33, 0, 5, 70], {"window": (-1, 0)}),
    ("cross_attention", [7, 33, 0, 20], [40, 3, 17, 35], {}),
    ("window", [50, 9], [33, 70], {"window": (13, 4)}),
    ("no_keys", [5, 40], [0, 33], {"window": (-1, 0)}),
    ("decoding", [1, 3, 0, 1], [20, 140, 20, 0], {"window": (-1, 0)}),
    ("top_left", [33, 20], [20, 50], {"window": (-1, 0), "top_left": True}),
    ("rows_softcap", [20, 40], [40, 20], {"rows": (15, 47), "softcap": 2.0}),
)


@pytest.fixture(autouse=True)
def _triton() -> None:
    reason = rk.available_backends()["triton"]
    if reason != "yes":
        skip_or_fail("triton", reason)


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the number of blocks of keys that a split has at least."""
    from ral_kernels.ops.attention.triton import launch as triton_launch

    return lambda blocks: monkeypatch.setattr(triton_launch, "BLOCKS_PER_SPLIT", blocks)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call read q, k and v by tensor descriptors."""
    from ral_kernels.ops.attention.triton import launch as triton_launch

    found: list[bool] = []
    before = triton_launch._by_tensor

    def watched(*args: Any) -> Any:
        found.append(before(*args)["q_tensor"] is not None)
        return before(*args)

    monkeypatch.setattr(triton_launch, "_by_tensor", watched)
    return found


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """How often a kernel was launched since the last time that one asked."""
    counts: Counter[str] = Counter()
    launch = triton_runtime.launch

    def counting(kernel: Any, *args: Any, **kwargs: Any) -> None:
        counts[kernel.fn.__name__] += 1
        launch(kernel, *args, **kwargs)

    monkeypatch.setattr(triton_runtime, "launch", counting)
    return lambda name: counts.pop(name, 0)


def packed(
    backend: str, lengths_q: list[int], lengths_k: list[int], options: dict[str, Any]
) -> list[Tensor]:
    """Outputs and gradients of a packed call with spans and a span bias, GQA and Dv != D."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    total_q, total_k, num_spans = sum(lengths_q), sum(lengths_k), 5
    # Token-major, as packed tensors are.
    q, k, v = (
        normal(1, tokens, heads, size).transpose(1, 2).requires_grad_()
        for tokens, heads, size in ((total_q, 6, 24), (total_k, 2, 24), (total_k, 2, 40))
    )
    bias = normal(1, 6, total_q, num_spans).requires_grad_()
    ids = torch.randint(-1, num_spans, (total_k,), generator=generator)
    ids[: total_k // 2] = ids[: total_k // 2].sort().values
    bounds = [
        torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) for lengths in (lengths_q, lengths_k)
    ]
    outputs = call_attention(
        "attention", q, k, v, rk.Spans(ids, num_spans), span_bias=bias, scale=0.2,
        **{"window": (-1, -1), "softcap": 0.0, **options},
        cu_seqlens_q=bounds[0], cu_seqlens_k=bounds[1], backend=backend,
    )  # fmt: skip
    douts = [normal(*x.shape) for x in outputs if x is not None]
    grads = torch.autograd.grad(outputs, (q, k, v, bias), douts)
    return [*(x for x in outputs if x is not None), *grads]


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k", "options"), [x[1:] for x in PACKED], ids=[x[0] for x in PACKED]
)
def test_packed(lengths_q: list[int], lengths_k: list[int], options: dict[str, Any]) -> None:
    got = packed("triton", lengths_q, lengths_k, options)
    for a, b in zip(got, packed("reference", lengths_q, lengths_k, options), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("group", [1, 7])
def test_splits_over_keys(group: int, splits: Any) -> None:
    """Decoding in one piece and in several gives the same; so does a split that sees no key."""
    q = torch.randn(2, 2 * group, 2, 32)
    k, v = torch.randn(2, 2, 260, 32), torch.randn(2, 2, 260, 20)
    spans = rk.Spans.from_lengths([3] * 40 + [140])
    mask = torch.ones(2, 260, dtype=torch.bool)
    mask[0, :200] = False
    mask[1] = False

    def run() -> rk.AttentionOutput:
        return rk.attention(
            q, k, v, spans, is_causal=True, key_padding_mask=mask, rows=(1, 2), backend="triton"
        )

    splits(1)
    split = run()
    splits(1000)
    whole = run()
    assert split.marginals is not None and whole.marginals is not None
    assert not whole.out[1].any() and whole.out[0].any()
    for a, b in zip(split, whole, strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "options"),
    [(2, 2, {}), (3, 1, {}), (4, 2, {"window": (40, 20)}), (5, 1, {"key_padding": True})],
    ids=["ranges", "odd_group", "window", "padding"],
)
def test_splits_of_dk_and_dv(
    heads: int, kv_heads: int, options: dict[str, Any], splits: Any, launched: Any
) -> None:
    """Parts over heads and ranges of queries add up to the gradient of one program."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, heads, 70, 24, generator=generator)
    k = torch.randn(2, kv_heads, 66, 24, generator=generator, requires_grad=True)
    v = torch.randn(2, kv_heads, 66, 40, generator=generator, requires_grad=True)
    spans = rk.Spans(torch.arange(66) // 13, 6)
    real = torch.arange(66) < torch.tensor([[66], [41]]) if "key_padding" in options else None
    douts = [torch.randn(2, heads, 70, size, generator=generator) for size in (40, spans.num_spans)]

    def run(backend: str) -> tuple[Tensor, ...]:
        out, marginals, _ = rk.attention(
            q, k, v, spans, is_causal="window" not in options, window=options.get("window"),
            key_padding_mask=real, backend=backend,
        )  # fmt: skip
        return torch.autograd.grad((out, marginals), (k, v), douts)

    splits(1000)
    whole = run("triton")
    assert launched("attention_bwd_join_kernel") == 0
    splits(1)
    split = run("triton")
    assert launched("attention_bwd_join_kernel") == 2
    for a, b, exact in zip(split, whole, run("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(a, exact, rtol=2e-5, atol=2e-5)
    assert all(map(torch.equal, split, run("triton")))


@pytest.mark.parametrize("seqlen", [1024, 4096, 16384])
@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 2), (28, 4), (8, 8), (1, 1)])
def test_dk_and_dv_fill_the_machine(heads: int, kv_heads: int, seqlen: int) -> None:
    """Two programs for each multiprocessor of an H100, where there is as much work."""
    from ral_kernels.ops.attention.triton.launch import BLOCKS_PER_SPLIT, key_splits

    block_q, block_k = 16, 128
    programs = kv_heads * seqlen // block_k
    head_parts, ranges = key_splits(heads // kv_heads, seqlen // block_q, programs, 132)
    assert head_parts <= heads // kv_heads
    most = (
        kv_heads * seqlen // block_k * (heads // kv_heads * seqlen // block_q // BLOCKS_PER_SPLIT)
    )
    assert programs * head_parts * ranges >= min(264, most)
    assert head_parts * ranges == 1 or programs * head_parts * ranges < 264 * max(
        2, heads // kv_heads
    )


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_sums_outlive_a_maximum_that_outgrows_them(order: str) -> None:
    """Stored sums are relative to a row's first maximum: 500 units of log2 later they overflow."""
    q = torch.ones(1, 1, 40, 16)
    heights = torch.linspace(0, 500, 320)
    heights = heights if order == "rising" else heights.flip(0)
    k = (heights[:, None] / 16 * torch.ones(16)).reshape(1, 1, 320, 16)
    spans = rk.Spans(torch.arange(320) // 20, 16)
    got, wanted = (
        rk.attention(q, k, k, spans, scale=1.0, backend=backend)
        for backend in ("triton", "reference")
    )
    assert got.marginals is not None and wanted.marginals is not None
    torch.testing.assert_close(got.marginals, wanted.marginals, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_padding_keys_may_hold_anything(poison: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 2, 33, 16, generator=generator)
    k, v = (torch.randn(2, 1, 70, 16, generator=generator) for _ in range(2))
    mask = torch.arange(70) < torch.tensor([[40], [66]])
    spans = rk.Spans(torch.arange(70) // 16, 5)

    def run(fill: float) -> list[Tensor]:
        hidden = ~mask[:, None, :, None]
        leaves = [q.clone(), k.masked_fill(hidden, fill), v.masked_fill(hidden, fill)]
        leaves = [x.requires_grad_() for x in leaves]
        result = rk.attention(*leaves, spans, key_padding_mask=mask, backend="triton")
        assert result.marginals is not None
        outputs = (result.out, result.marginals, result.lse)
        loss = sum(x.square().sum() for x in outputs)
        return [*outputs, *torch.autograd.grad(loss, leaves)]

    for clean, dirty in zip(run(0.0), run(poison), strict=True):
        assert torch.equal(clean, dirty)


def test_span_bias_of_minus_infinity_hides_a_span() -> None:
    q, k = torch.randn(1, 2, 40, 16), torch.randn(1, 1, 100, 16)
    ids = torch.arange(100) // 17
    bias = torch.zeros(1, 1, 40, 6)
    bias[..., 1:3] = -math.inf
    bias[:, :, 5] = -math.inf
    hidden = (ids == 1) | (ids == 2)
    mask = ~hidden.expand(40, 100).clone()
    mask[5] = False
    spans = rk.Spans(ids, 6)
    biased = rk.attention(q, k, k, spans, span_bias=bias, backend="triton")
    masked = rk.attention(q, k, k, spans, attn_mask=mask, backend="triton")
    for a, b in zip(biased, masked, strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", ["tokens", "heads", "packed in one", "kv of one"])
@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"window": (20, 3)}, {"softcap": 2.0}], ids=str
)
def test_tensor_descriptors_give_the_same_bits(
    layout: str, options: dict[str, Any], read: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the strides; and rows of other heads, that a block at an edge holds, stay theirs."""
    torch.manual_seed(0)
    heads, kv_heads = (4, 1) if layout == "kv of one" else (4, 2)
    every = torch.randn(2, 70, heads + 2 * kv_heads, 64).half()
    if layout == "heads":
        every = every.transpose(1, 2).contiguous().transpose(1, 2)
    q, k, v = every.transpose(1, 2).split([heads, kv_heads, kv_heads], 1)
    if layout == "tokens":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    v[1] = v[0, 1:] = math.nan
    outs = []
    for flag in ("0", "1"):
        monkeypatch.setenv("RAL_TRITON_TMA", flag)
        found = rk.attention(q, k, v, backend="triton", **options)
        outs.append((found.out, found.lse))
    assert read == [False, True]
    for plain, by_tensor in zip(*outs, strict=True):
        torch.testing.assert_close(by_tensor, plain, rtol=0, atol=0, equal_nan=True)
    assert outs[1][0][0, : heads // kv_heads].isfinite().all()


@pytest.mark.parametrize(
    "case", ["float32", "head dim 72", "padding", "spans", "features apart", "decoding"]
)
def test_what_tensor_descriptors_do_not_read(
    case: str, read: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAL_TRITON_TMA", "1")
    dtype = torch.float32 if case == "float32" else torch.float16
    head_dim = 72 if case == "head dim 72" else 64
    q = torch.randn(1, 2, 1 if case == "decoding" else 33, head_dim).to(dtype)
    k = torch.randn(1, 2, 33, head_dim).to(dtype)
    if case == "features apart":
        k = torch.randn(1, 2, 33, 65).half()[..., :64]
    options: dict[str, Any] = {}
    if case == "padding":
        options["key_padding_mask"] = torch.ones(1, 33, dtype=torch.bool)
    spans = rk.Spans.from_lengths([33]) if case == "spans" else None
    found = rk.attention(q, k, k, spans, backend="triton", **options)
    wanted = rk.attention(q, k, k, spans, backend="reference", **options)
    assert read == [False]
    torch.testing.assert_close(found.out, wanted.out, rtol=5e-3, atol=5e-3)


def test_head_dims_beyond_256_are_refused() -> None:
    q = torch.randn(1, 1, 2, 264)
    with pytest.raises(NotImplementedError, match="above 256 are not supported; got 264 and 264"):
        rk.attention(q, q, q, backend="triton")


def test_bfloat16_is_not_interpreted() -> None:
    if not triton_runtime.interpreted():
        pytest.skip("a GPU multiplies it")
    q = torch.randn(1, 1, 2, 16, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="bfloat16"):
        rk.attention(q, q, q, backend="triton")
