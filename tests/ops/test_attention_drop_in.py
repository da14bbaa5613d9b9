"""The drop-ins, judged by PyTorch's own function, by eager attention and by loops."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import ral_kernels as rk
from ral_kernels.ops.attention.interface import call_attention
from tests.ops.attention_cases import BY_NAME
from tests.ops.attention_eager import eager_attention


@dataclass(frozen=True)
class Call:
    """Shapes and options of one call of scaled_dot_product_attention."""

    name: str
    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    mask: tuple[int, ...] | None = None
    mask_is_bool: bool = True
    options: dict[str, Any] = field(default_factory=dict)


# fmt: off
CALLS = (
    Call("2d", (5, 8), (7, 8), (7, 6)),
    Call("3d", (3, 5, 8), (3, 7, 8), (3, 7, 8)),
    Call("4d", (2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
    Call("5d", (2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 6)),
    Call("6d", (2, 1, 3, 2, 5, 8), (2, 1, 3, 2, 7, 8), (2, 1, 3, 2, 7, 8)),
    Call("causal_square", (2, 3, 5, 8), (2, 3, 5, 8), (2, 3, 5, 8), options={"is_causal": True}),
    Call("causal_wide", (2, 3, 5, 8), (2, 3, 9, 8), (2, 3, 9, 8), options={"is_causal": True}),
    Call("causal_tall", (2, 3, 9, 8), (2, 3, 5, 8), (2, 3, 5, 8), options={"is_causal": True}),
    Call("causal_2d", (9, 8), (5, 8), (5, 8), options={"is_causal": True}),
    Call("scale", (2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), options={"scale": 0.7}),
    Call("gqa", (2, 6, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), options={"enable_gqa": True}),
    Call("gqa_mqa", (2, 6, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8), options={"enable_gqa": True}),
    Call("gqa_3d", (6, 5, 8), (2, 7, 8), (2, 7, 8), options={"enable_gqa": True}),
    Call("gqa_5d", (2, 2, 6, 5, 8), (2, 2, 2, 7, 8), (2, 2, 2, 7, 8), options={"enable_gqa": True}),
    Call("gqa_causal", (2, 6, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8), options={"enable_gqa": True,
        "is_causal": True}),
    Call("gqa_masked", (2, 6, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), (2, 1, 5, 7),
        options={"enable_gqa": True}),
    Call("gqa_unequal_kv", (2, 6, 5, 8), (2, 2, 7, 8), (2, 3, 7, 8), options={"enable_gqa": True}),
    Call("one_kv_head", (2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    Call("one_key_head", (2, 3, 5, 8), (2, 1, 7, 8), (2, 3, 7, 8)),
    Call("one_query_head", (2, 1, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    Call("one_kv_batch", (2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 8)),
    Call("one_query_batch", (1, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    Call("key_2d", (2, 3, 5, 8), (7, 8), (7, 8)),
    Call("query_3d", (3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    Call("broadcast_5d", (2, 1, 3, 5, 8), (1, 4, 3, 7, 8), (2, 4, 1, 7, 8)),
    Call("mask_2d", (2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), (5, 7)),
    Call("mask_row", (2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), (1, 7)),
    Call("mask_column", (2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), (5, 1)),
    Call("mask_3d", (2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), (3, 1, 7)),
    Call("mask_batch", (2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), (2, 1, 1, 7)),
    Call("mask_full", (2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), (2, 3, 5, 7)),
    Call("mask_5d", (2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 8), (2, 1, 1, 5, 7)),
    Call("mask_5d_one", (2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 8), (1, 1, 1, 5, 7)),
    Call("mask_5d_short", (2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 8), (4, 5, 7)),
    Call("mask_of_2d", (5, 8), (7, 8), (7, 8), (5, 7)),
    Call("mask_of_3d", (3, 5, 8), (3, 7, 8), (3, 7, 8), (3, 5, 7)),
    Call("float_mask", (2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), (2, 1, 5, 7), mask_is_bool=False),
    Call("float_mask_2d", (2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), (5, 7), mask_is_bool=False),
    Call("no_keys", (2, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 8)),
    Call("no_queries", (2, 3, 0, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    Call("no_batch", (0, 3, 5, 8), (0, 3, 7, 8), (0, 3, 7, 8)),
)
# fmt: on


def tensors_of(call: Call, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = [normal(shape).requires_grad_() for shape in (call.query, call.key, call.value)]
    options = dict(call.options)
    if call.mask is not None:
        mask = normal(call.mask)
        options["attn_mask"] = mask > -0.5 if call.mask_is_bool else mask
    return tensors, options


def run(f: Any, tensors: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    out = f(*tensors, **options)
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, dout)]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["float64", "float32", "bfloat16"]
)
def test_sdpa(call: Call, dtype: torch.dtype) -> None:
    """The same function in float64; elsewhere test_attention.py judges the accuracy."""
    tensors, options = tensors_of(call, dtype)
    wanted = run(F.scaled_dot_product_attention, tensors, options)
    got = run(rk.scaled_dot_product_attention, tensors, options)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_sdpa_positional_arguments() -> None:
    """The same order of arguments as PyTorch's."""
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 1, 5, 8)
    arguments = (q, k, k, None, 0.0, True)
    torch.testing.assert_close(
        rk.scaled_dot_product_attention(*arguments, scale=0.3, enable_gqa=True),
        F.scaled_dot_product_attention(*arguments, scale=0.3, enable_gqa=True),
    )


def test_sdpa_fully_masked_rows() -> None:
    tensors, _ = tensors_of(CALLS[2], torch.float64)
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    wanted = run(F.scaled_dot_product_attention, tensors, {"attn_mask": mask})
    got = run(rk.scaled_dot_product_attention, tensors, {"attn_mask": mask})
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (4, 9), (9, 4)])
def test_sdpa_causal_bias(bias: Any, queries: int, keys: int) -> None:
    """Masks that are known by name: their memory holds nothing."""
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (queries, keys, keys))
    options = {"attn_mask": bias(queries, keys)}
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(
        keys - queries if bias is causal_lower_right else 0
    )
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    torch.testing.assert_close(rk.scaled_dot_product_attention(q, k, v, **options), wanted)
    torch.testing.assert_close(rk.attention(q, k, v, **options).out, wanted)
    if queries <= keys:  # PyTorch gives NaN for rows without keys
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, **options), wanted)


def test_sdpa_takes_numbers_of_other_types() -> None:
    """As PyTorch does: scalars of numpy and tensors of no dimensions."""
    q = torch.randn(2, 3, 5, 8)
    wanted = rk.scaled_dot_product_attention(q, q, q, scale=0.5)
    for scale in (np.float32(0.5), np.float64(0.5), torch.tensor(0.5)):
        assert torch.equal(rk.scaled_dot_product_attention(q, q, q, scale=scale), wanted)
        F.scaled_dot_product_attention(q, q, q, scale=scale)


@pytest.mark.parametrize("transpose", ["query", "key", "value", "heads"])
def test_sdpa_takes_any_strides(transpose: str) -> None:
    """Where `attention` asks for .contiguous(), the drop-in does what PyTorch does: it runs."""
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    wanted = F.scaled_dot_product_attention(q, k, v)
    if transpose == "heads":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    else:
        q, k, v = (
            x.mT.contiguous().mT if name == transpose else x
            for name, x in (("query", q), ("key", k), ("value", v))
        )
    torch.testing.assert_close(rk.scaled_dot_product_attention(q, k, v), wanted)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3)], ids=str)
def test_sdpa_spans(lead: tuple[int, ...]) -> None:
    q, k, v = (torch.randn(*lead, n, 8, dtype=torch.float64) for n in (5, 7, 7))
    spans = rk.Spans.from_lengths([3, 4])
    out, marginals = rk.scaled_dot_product_attention(q, k, v, is_causal=True, spans=spans)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    one_hot = F.one_hot(spans.ids.long(), 2).double().expand(*lead, 7, 2)
    wanted = F.scaled_dot_product_attention(q, k, one_hot, is_causal=True)
    assert marginals.shape == (*lead, 5, 2)
    torch.testing.assert_close(marginals, wanted)


def test_sdpa_spans_of_each_sample() -> None:
    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 7, 7))
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [-1, 1, 1, 1, 0, 0, 0]])
    _, marginals = rk.scaled_dot_product_attention(q, k, v, spans=rk.Spans(ids, 2))
    for b in range(2):
        _, wanted = rk.scaled_dot_product_attention(q[b], k[b], v[b], spans=rk.Spans(ids[b], 2))
        torch.testing.assert_close(marginals[b], wanted)


def test_sdpa_under_autocast() -> None:
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = F.scaled_dot_product_attention(q, k, v)
        got = rk.scaled_dot_product_attention(q, k, v)
    assert got.dtype == wanted.dtype == torch.bfloat16


FLASH_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": True},
    {"causal": True, "window_size": (20, -1)},
    {"window_size": (9, 3)},
    {"window_size": (-1, 3)},
    {"causal": True, "window_size": (20, 20), "softcap": 3.0},
    {"softmax_scale": 0.2, "deterministic": True},
)


def as_attention_options(options: dict[str, Any]) -> dict[str, Any]:
    """What `attention` calls these options."""
    names = {
        "causal": "is_causal",
        "window_size": "window",
        "softmax_scale": "scale",
        "softcap": "softcap",
    }
    return {names[name]: value for name, value in options.items() if name in names}


@pytest.mark.parametrize("options", FLASH_OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("name", ["gqa_2", "batch_spans", "more_queries_than_keys"])
def test_flash_attn_func(name: str, options: dict[str, Any]) -> None:
    """Layout, bottom-right causal mask and order of the results, against eager float64."""
    inputs = BY_NAME[name].inputs(torch.float64).requires_grad_()
    spans = inputs.spans
    q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    out, lse, nothing, marginals = rk.flash_attn_func(
        q, k, v, return_attn_probs=True, spans=spans, **options
    )
    assert nothing is None
    inputs.options.clear()
    inputs.options.update(as_attention_options(options))
    wanted = eager_attention(inputs)
    torch.testing.assert_close(out, wanted[0].transpose(1, 2))
    torch.testing.assert_close(marginals, wanted[1])
    torch.testing.assert_close(lse, wanted[2])
    alone = rk.flash_attn_func(q, k, v, spans=None, **options)
    assert isinstance(alone, Tensor) and torch.equal(alone, out)
    dout, dmarginals = torch.randn_like(out), torch.randn_like(marginals)
    grads = torch.autograd.grad((out, marginals), (q, k, v), (dout, dmarginals))
    true_grads = torch.autograd.grad(
        wanted[:2], (inputs.q, inputs.k, inputs.v), (dout.transpose(1, 2), dmarginals)
    )
    for a, b in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(a, b.transpose(1, 2))


def test_flash_positional_arguments() -> None:
    q, k, v = (torch.randn(2, 5, 4, 8) for _ in range(3))
    got = rk.flash_attn_func(q, k, v, 0.0, 0.3, True, (3, 0), 2.0, None, True, True)
    wanted = rk.attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        scale=0.3,
        is_causal=True,
        window=(3, 0),
        softcap=2.0,
    )
    assert len(got) == 3
    torch.testing.assert_close(got[0], wanted.out.transpose(1, 2))
    torch.testing.assert_close(got[1], wanted.lse)


def test_flash_results() -> None:
    """What comes back: a tensor, flash-attn's triple, and the marginals behind either."""
    q = torch.randn(1, 5, 2, 8)
    spans = rk.Spans.from_lengths([5])
    assert isinstance(rk.flash_attn_func(q, q, q), Tensor)
    assert len(rk.flash_attn_func(q, q, q, return_attn_probs=True)) == 3
    out, marginals = rk.flash_attn_func(q, q, q, spans=spans)
    assert out.shape == q.shape and marginals.shape == (1, 2, 5, 1)


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"window_size": torch.tensor([2, 1])}, {"window_size": (2, 1)}),
        ({"window_size": np.array([2, 1])}, {"window_size": (2, 1)}),
        ({"window_size": [torch.tensor(2), np.int8(1)]}, {"window_size": (2, 1)}),
        ({"window_size": (-5, -5)}, {}),
        ({"softcap": -1}, {}),
        ({"softcap": np.float32(2)}, {"softcap": 2.0}),
        ({"softmax_scale": torch.tensor(0.5)}, {"softmax_scale": 0.5}),
        ({"causal": np.True_}, {"causal": True}),
        ({"causal": 1}, {"causal": True}),
    ],
    ids=str,
)
def test_flash_takes_what_flash_attn_takes(given: dict[str, Any], plain: dict[str, Any]) -> None:
    q, k, v = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 8)
    wanted = rk.flash_attn_func(q, k, v, **plain)
    assert torch.equal(rk.flash_attn_func(q, k, v, **given), wanted)
    # flash-attn copies what has another last stride
    turned = [x.mT.contiguous().mT for x in (q, k, v)]
    assert turned[0].stride(-1) != 1
    assert torch.equal(rk.flash_attn_func(*turned, **given), wanted)
    bounds = torch.tensor([0, 5], dtype=torch.int32)
    for longest in (np.int64(5), torch.tensor(5), torch.tensor(5, dtype=torch.int32)):
        x = turned[0][0]
        out = rk.flash_attn_varlen_func(x, x, x, bounds, bounds, longest, longest, **given)
        torch.testing.assert_close(out, rk.flash_attn_func(x[None], x[None], x[None], **plain)[0])


@pytest.mark.parametrize("options", FLASH_OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_flash_packed_forms(options: dict[str, Any]) -> None:
    """The same as the function on separate tensors, with the gradient in the packed tensor."""
    spans = rk.Spans.from_lengths([3, 4])
    everything = {**options, "return_attn_probs": True, "spans": spans}
    bounds = torch.tensor([0, 2, 7], dtype=torch.int32)
    padded = torch.randn(2, 7, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    packed = padded.detach()[0].clone().requires_grad_()
    cases: list[tuple[Tensor, Any, Any]] = [
        (
            padded,
            lambda x: rk.flash_attn_func(*x.unbind(2), **everything),
            lambda x: rk.flash_attn_qkvpacked_func(x, **everything),
        ),
        (
            padded,
            lambda x: rk.flash_attn_func(*x.unbind(2), **everything),
            lambda x: rk.flash_attn_kvpacked_func(x[:, :, 0], x[:, :, 1:], **everything),
        ),
        (
            packed,
            lambda x: rk.flash_attn_varlen_func(*x.unbind(1), bounds, bounds, 5, 5, **everything),
            lambda x: rk.flash_attn_varlen_qkvpacked_func(x, bounds, 5, **everything),
        ),
        (
            packed,
            lambda x: rk.flash_attn_varlen_func(*x.unbind(1), bounds, bounds, 5, 5, **everything),
            lambda x: rk.flash_attn_varlen_kvpacked_func(
                x[:, 0], x[:, 1:], bounds, bounds, 5, 5, **everything
            ),
        ),
    ]
    for x, separate, together in cases:
        wanted, got = separate(x), together(x)
        assert len(got) == len(wanted) == 4 and got[2] is None
        tensors = [(a, b) for a, b in zip(got, wanted, strict=True) if a is not None]
        assert all(torch.equal(a, b) for a, b in tensors)
        grads = [
            torch.autograd.grad(sum(y.sum() for y in ys), x)[0] for ys in zip(*tensors, strict=True)
        ]
        assert torch.equal(*grads)


@pytest.mark.parametrize("options", FLASH_OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("lengths", ["full", "int", "tensor"])
@pytest.mark.parametrize("rest", ["", "new", "samples", "new_samples_leftpad"])
def test_flash_attn_with_kvcache(options: dict[str, Any], lengths: str, rest: str) -> None:
    """Against one call a sample on the keys that count, and the cache against a loop."""
    options = {name: x for name, x in options.items() if name != "deterministic"}
    batch, queries, room, new = 3, 4, 12, 2 if "new" in rest else 0
    q = torch.randn(batch, queries, 4, 8, dtype=torch.float64)
    caches = [torch.randn(5, room, 2, dim, dtype=torch.float64) for dim in (8, 6)]
    added = [torch.randn(batch, new, 2, dim, dtype=torch.float64) for dim in (8, 6)]
    sample = [4, 0, 2] if "samples" in rest else [0, 1, 2]
    if "samples" not in rest:
        caches = [x[:batch].clone() for x in caches]
    pads = [0, 3, 1] if "leftpad" in rest else [0, 0, 0]
    counts = {"full": [room - new] * 3, "int": [7] * 3, "tensor": [9, 3, 0]}[lengths]
    pads = [min(pad, count) for pad, count in zip(pads, counts, strict=True)]

    wanted_caches = [x.clone() for x in caches]
    outs, lses = [], []
    for b in range(batch):
        for cache, x in zip(wanted_caches, added, strict=True):
            cache[sample[b], counts[b] : counts[b] + new] = x[b]
        k, v = (x[sample[b], pads[b] : counts[b] + new][None] for x in wanted_caches)
        out, lse, _ = rk.flash_attn_func(q[b : b + 1], k, v, return_attn_probs=True, **options)
        outs.append(out)
        lses.append(lse)

    seqlens: Any = {"full": None, "int": np.int64(counts[0])}.get(
        lengths, torch.tensor(counts, dtype=torch.int32)
    )
    if lengths == "full" and new:
        seqlens = counts[0]
    extra: dict[str, Any] = {"cache_seqlens": seqlens}
    if new:
        extra.update(k=added[0], v=added[1])
    if "samples" in rest:
        extra["cache_batch_idx"] = torch.tensor(sample, dtype=torch.int32)
    if "leftpad" in rest:
        extra["cache_leftpad"] = torch.tensor(pads, dtype=torch.int32)
    out, lse = rk.flash_attn_with_kvcache(
        q, caches[0], caches[1], **extra, return_softmax_lse=True, num_splits=1, **options
    )
    torch.testing.assert_close(out, torch.cat(outs))
    torch.testing.assert_close(lse, torch.cat(lses))
    assert all(torch.equal(a, b) for a, b in zip(caches, wanted_caches, strict=True))
    again = rk.flash_attn_with_kvcache(q, caches[0], caches[1], **extra, **options)
    assert isinstance(again, Tensor) and torch.equal(again, out)


PACKS = (
    ([5, 7, 3], [5, 7, 3]),
    ([5, 0, 61, 1], [9, 4, 61, 130]),  # no queries, square, decoding
    ([4, 6], [0, 3]),  # no keys, more queries than keys
    ([130], [250]),
    ([0, 0], [0, 0]),
    ([1] * 7, [1, 5, 6, 7, 61, 127, 130]),
)


@pytest.mark.parametrize("options", FLASH_OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize(("lengths_q", "lengths_k"), PACKS, ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["float64", "float32", "bfloat16"]
)
def test_flash_attn_varlen_func(
    lengths_q: list[int], lengths_k: list[int], options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Against one call of `attention` a sequence, on the same backend, forward and backward."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    q, k = normal(sum(lengths_q), 4, 16), normal(sum(lengths_k), 2, 16)
    v = normal(sum(lengths_k), 2, 24)
    ids = torch.randint(-1, 3, (sum(lengths_k),), generator=generator)
    bounds_q, bounds_k = (
        torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) for lengths in (lengths_q, lengths_k)
    )
    out, lse, _, marginals = rk.flash_attn_varlen_func(
        q, k, v, bounds_q, bounds_k, max(lengths_q), max(lengths_k), return_attn_probs=True,
        spans=rk.Spans(ids, 3), **options,
    )  # fmt: skip
    assert out.shape == (*q.shape[:2], 24)
    assert lse.shape == (4, q.shape[0]) and marginals.shape == (4, q.shape[0], 3)

    parts = []
    for qs, ks, vs, i in zip(
        q.split(lengths_q),
        k.split(lengths_k),
        v.split(lengths_k),
        ids.split(lengths_k),
        strict=True,
    ):
        result = rk.attention(
            *(x.transpose(0, 1)[None] for x in (qs, ks, vs)),
            rk.Spans(i, 3),
            **as_attention_options(options),
        )
        assert result.marginals is not None
        parts.append((result.out[0].transpose(0, 1), result.marginals[0], result.lse[0]))
    wanted = (
        torch.cat([part[0] for part in parts]),
        torch.cat([part[1] for part in parts], 1),
        torch.cat([part[2] for part in parts], 1),
    )
    exact = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    got = (out, marginals, lse)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=exact, atol=exact)
    douts = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in got]
    grads = torch.autograd.grad(got, (q, k, v), douts)
    wanted_grads = torch.autograd.grad(wanted, (q, k, v), douts)
    for a, b in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=exact, atol=exact * math.sqrt(max(*lengths_q, 1)))


def test_tokens_of_no_packed_sequence(backend: str) -> None:
    """After the last bound, which nobody checks on a GPU or in a graph: zeros, not old memory."""
    q, k, v = (torch.randn(1, heads, 9, 16, requires_grad=True) for heads in (4, 2, 2))
    spans = rk.Spans.from_lengths([4, 5])
    bias = torch.randn(1, 4, 9, 2, requires_grad=True)
    bounds = torch.tensor([0, 3, 6], dtype=torch.int32)

    def call(count: int) -> tuple[Tensor, ...]:
        ids = rk.Spans(spans.ids[:count], 2)
        out, marginals, lse = call_attention(
            "attention", q[:, :, :count], k[:, :, :count], v[:, :, :count], ids, scale=0.25,
            window=(-1, 0), softcap=0.0, span_bias=bias[:, :, :count], cu_seqlens_q=bounds,
            cu_seqlens_k=bounds, backend=backend,
        )  # fmt: skip
        assert marginals is not None
        sums = (out.sum() + marginals.square().sum() + lse[:, :, :6].sum(),)
        return (out, marginals, lse, *torch.autograd.grad(sums, (q, k, v, bias)))

    got, wanted = call(9), call(6)
    for a, b in zip(got[:3], wanted[:3], strict=True):
        assert torch.equal(a[:, :, :6], b)
    assert not got[0][:, :, 6:].any() and not got[1][:, :, 6:].any()
    assert (got[2][:, :, 6:] == -math.inf).all()
    for a, b in zip(got[3:], wanted[3:], strict=True):  # zeros from 6 on in `wanted`, by slicing
        assert torch.equal(a, b)
