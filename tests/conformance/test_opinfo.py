"""The samples of torch's own OpInfo of scaled_dot_product_attention, in dtypes and layouts.

They ship with torch. Ours may have at most twice the error of torch's, both against float64. Torch
has two kernels. The fused one rounds `out` before its backward, as ours does. The larger of their
errors counts.

Both fused kernels keep lse in float32. Half an ulp of it moves every weight of a row. Where scores
are large and rows few, chance decides whose half ulp is larger. So dq and dk may be off by half an
ulp of the largest lse, relative to the gradient. `test_errors_over_draws` bounds the mean.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
import types
import unittest
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import ral_kernels as rk
from tests.conformance.conftest import Refused, slow
from tests.ops.accuracy import assert_accurate, error, floor_of

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def _heads_last_but_one(x: Tensor) -> Tensor:
    """[..., H, L, E] in the memory of [..., L, H, E]."""
    return x.transpose(-3, -2).contiguous().transpose(-3, -2)


def _with_offset(x: Tensor) -> Tensor:
    """Every second row of a longer buffer, not from its start."""
    buffer = x.new_full((*x.shape[:-2], 2 * x.shape[-2] + 1, x.shape[-1]), torch.nan)
    buffer[..., 1::2, :] = x
    return buffer[..., 1::2, :]


def _last_stride_two(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def _columns_first(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "heads_last_but_one": _heads_last_but_one,
    "with_offset": _with_offset,
    "last_stride_two": _last_stride_two,
    "columns_first": _columns_first,
    "one_sample_expanded": lambda x: x[:1].expand(x.shape),
}


@functools.cache
def samples(dtype: torch.dtype) -> list[Any]:
    # torch's test helpers import a package that only their own test runner uses.
    if "expecttest" not in sys.modules and importlib.util.find_spec("expecttest") is None:
        stub: Any = types.ModuleType("expecttest")
        stub.TestCase = unittest.TestCase
        sys.modules["expecttest"] = stub
    from torch.testing._internal.common_methods_invocations import op_db

    info = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
    torch.manual_seed(0)
    return list(info.sample_inputs("cpu", dtype, requires_grad=False))


def torch_flash(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Torch's fused kernel, also where torch itself would take its math path."""
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    q, k, v = (x.expand(*lead, *x.shape[-2:]).contiguous() for x in (query, key, value))
    if len(lead) == 1:
        q, k, v = q[None], k[None], v[None]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, **options).reshape(
            *lead, query.shape[-2], -1
        )


NUMBER_OF_SAMPLES = 25  # of torch 2.13; test_every_sample_is_run counts them


QUICK = [
    (0, torch.bfloat16, "with_offset", True),
    (2, torch.float32, "contiguous", True),
    (20, torch.float16, "last_stride_two", True),
    (24, torch.float32, "contiguous", False),
    (24, torch.float64, "heads_last_but_one", True),
]


def case(number: int, dtype: torch.dtype, layout: str, gradient: bool) -> Any:
    quick = (number, dtype, layout, gradient) in QUICK
    marks = [] if quick else [slow("test_opinfo")]
    name = f"{number}-{str(dtype)[6:]}-{layout}-{'gradient' if gradient else 'forward'}"
    return pytest.param(number, dtype, layout, gradient, id=name, marks=marks)


@pytest.mark.parametrize(
    ("number", "dtype", "layout", "gradient"),
    [
        case(number, dtype, layout, gradient)
        for number in range(NUMBER_OF_SAMPLES)
        for dtype in DTYPES
        for layout in LAYOUTS
        for gradient in (False, True)
    ],
)
def test_opinfo(
    number: int, dtype: torch.dtype, layout: str, gradient: bool, refused: Refused
) -> None:
    """Output and gradients in every dtype and layout."""
    if number >= len(samples(dtype)):
        pytest.skip("this version of torch has fewer samples")
    sample = samples(dtype)[number]
    tensors = [LAYOUTS[layout](x) for x in (sample.input, *sample.args)]
    options = dict(sample.kwargs)
    mask = options.get("attn_mask")

    def run(f: Any, cast: torch.dtype, mask: Tensor | None = mask) -> list[Tensor]:
        # The leaf is a view's base: `requires_grad_` of the tensor itself keeps its layout.
        inputs = [x.to(cast) if x.dtype != cast else x.detach() for x in tensors]
        given = options | ({} if mask is None else {"attn_mask": mask.to(cast)})
        for x in inputs:
            x.requires_grad_(gradient)
        out = f(*inputs, **given)
        if not gradient:
            return [out]
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return [out, *torch.autograd.grad(out, inputs, dout.to(out.dtype))]

    ours = rk.scaled_dot_product_attention
    if options["dropout_p"]:
        with refused(NotImplementedError, "dropout is not supported"):
            run(ours, dtype)
        return
    if mask is not None and gradient:  # in OpInfo this mask has a gradient of its own
        with refused(NotImplementedError, "attn_mask gets no gradient"):
            run(ours, dtype, mask.detach().requires_grad_())
        return
    got = run(ours, dtype)
    truth = run(F.scaled_dot_product_attention, torch.float64)
    baselines = [run(F.scaled_dot_product_attention, dtype), run(torch_flash, dtype)]
    with sdpa_kernel(SDPBackend.MATH):
        baselines.append(run(F.scaled_dot_product_attention, dtype))
    half_ulp = 0.0
    if dtype == torch.float32 and gradient:
        q, k, _ = (x.double() for x in tensors)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        half_ulp = float(scores.logsumexp(-1).abs().max()) * torch.finfo(dtype).eps / 2
    for i, (name, x) in enumerate(zip(("out", "dq", "dk", "dv"), got, strict=False)):
        base = max((b[i] for b in baselines), key=lambda b: error(b, truth[i]))
        assert x.dtype == dtype
        floor = max(floor_of(dtype), half_ulp if name in ("dq", "dk") else 0.0)
        assert_accurate(name, x, truth[i], base, floor)


@pytest.mark.parametrize("lengths", [(3, 6), (16, 32)], ids=str)
def test_errors_over_draws(lengths: tuple[int, int]) -> None:
    """Scores up to 100, as in the samples: the mean squared error is torch's, not twice or more.

    Errors are not divided by the norm of the result: where p is almost one key, dq and dk are
    nearly 0, and a few such draws would decide.
    """
    ours, theirs = torch.zeros(4), torch.zeros(4)
    for seed in range(240):
        generator = torch.Generator().manual_seed(seed)
        shapes = [(1, 4, n, 8) for n in (*lengths, lengths[1])]
        tensors = [18 * torch.rand(shape, generator=generator) - 9 for shape in shapes]
        dout = torch.randn(shapes[0], generator=generator)

        def run(
            f: Any, cast: torch.dtype, tensors: list[Tensor] = tensors, dout: Tensor = dout
        ) -> list[Tensor]:
            inputs = [x.to(cast).requires_grad_() for x in tensors]
            out = f(*inputs)
            return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(cast))]

        truth = run(F.scaled_dot_product_attention, torch.float64)
        for total, f in ((ours, rk.scaled_dot_product_attention), (theirs, torch_flash)):
            got = run(f, torch.float32)
            total += torch.tensor([error(x, t) ** 2 for x, t in zip(got, truth, strict=True)])
    ratios = (ours / theirs).sqrt()
    assert (ratios <= 1.25).all(), f"out, dq, dk, dv: {ratios.tolist()} times torch's error"


def test_every_sample_is_run() -> None:
    assert len(samples(torch.float32)) <= NUMBER_OF_SAMPLES
