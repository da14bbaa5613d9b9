"""The CUDA kernels of `attention` in the harness: the op's own cases, and those of its tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ral_kernels as rk
from ral_kernels.integrations.transformers import register
from ral_kernels.ops.attention.cuda import HEAD_DIMS
from tests.cuda_host.backend import Kernels
from tests.integrations.models import build
from tests.integrations.models import inputs as inputs_of
from tests.ops import test_attention as common
from tests.ops.attention_cases import CASES, AttentionCase

HALF = (torch.bfloat16, torch.float16)


def has_kernel(case: AttentionCase) -> bool:
    return case.head_dim in HEAD_DIMS and case.head_dim_v in (None, *HEAD_DIMS)


# Blocks are 128 queries (forward), 64 (backward) and 64 keys; a warp has 32 rows, or 16.
TILES = [
    AttentionCase("a_span_every_few_keys", 61, 190, spans="equal", num_spans=90),
    AttentionCase("spans_at_block_borders", 61, 256, spans="equal", num_spans=4),
    AttentionCase("unsorted_128", 140, 130, head_dim=128, spans="unsorted", num_spans=7),
    AttentionCase("more_spans_than_lanes", 40, 127, spans="unsorted", num_spans=70),
    AttentionCase("rows_across_blocks", 260, 70, options={"rows": (100, 230), "is_causal": True}),
    AttentionCase(
        "rows_across_blocks_and_spans", 260, 70, spans="ragged", options={"rows": (100, 230)}
    ),
    AttentionCase("rows_within_a_warp", 200, 70, spans="equal", options={"rows": (129, 130)}),
    AttentionCase(
        "padding_and_spans", 130, 200, 2, spans="batch", key_padding="left", head_dim=128
    ),
    AttentionCase("padding_everything", 30, 70, 2, spans="equal", key_padding="everything"),
    AttentionCase("long_windows", 300, 300, spans="equal", options={"window": (70, 3)}),
    AttentionCase("group_of_7", 33, 65, num_heads=7, spans="equal", options={"is_causal": True}),
    AttentionCase("mixed_128", 129, 65, 2, 4, 2, 128, layout="mixed", spans="gaps"),
]


# In kernels for 96 columns. Heads that are strided hold what no column of them may read or write.
WIDTHS = [
    AttentionCase("columns_72", 140, 150, 2, 4, 2, 72, spans="ragged", options={"is_causal": True}),
    AttentionCase("columns_80", 130, 200, 1, 4, 2, 80, spans="equal", layout="strided"),
    AttentionCase("columns_88", 61, 70, 1, 2, 1, 88, spans="unsorted", layout="mixed"),
    AttentionCase("columns_96", 129, 65, 2, 2, 1, 96, spans="gaps", key_padding="left"),
    AttentionCase("columns_80_window", 300, 300, 1, 2, 1, 80, options={"window": (70, 3)}),
]


# In the general kernels. Their blocks are 64 queries, for dk and dv 32.
GENERAL = [
    AttentionCase("bias_at_block_borders", 130, 256, spans="equal", span_bias="full"),
    AttentionCase("bias_group_of_7", 70, 131, 1, 7, 1, 128, spans="ragged", num_spans=9,
        span_bias="full", options={"is_causal": True, "softcap": 3.0}),
    AttentionCase("bias_unsorted_128", 140, 130, 2, 4, 2, 128, spans="unsorted", num_spans=70,
        span_bias="full", key_padding="left"),
    AttentionCase("bias_of_other_rows", 260, 140, spans="gaps", span_bias="full",
        options={"rows": (100, 230), "window": (70, 3)}),
    AttentionCase("bias_rows_none", 70, 140, spans="equal", span_bias="full",
        options={"rows": (7, 7)}),
    AttentionCase("bias_padding_everything", 70, 140, 2, spans="equal", span_bias="per_row",
        key_padding="everything"),
    AttentionCase("bias_empty_rows", 140, 61, spans="equal", span_bias="full",
        options={"window": (3, 2)}),
    AttentionCase("softcap_saturated", 130, 150, 1, 2, 1, 128, scores="large", spans="ragged",
        options={"softcap": 20.0, "scale": 0.01}),
    AttentionCase("softcap_128_window", 140, 200, 1, 2, 1, 128, layout="mixed",
        options={"softcap": 2.0, "window": (70, 3)}),
    AttentionCase("dims_40_128", 130, 150, 1, 4, 2, 40, 128, layout="strided", spans="ragged"),
    AttentionCase("dims_128_8", 130, 150, 1, 4, 2, 128, 8, layout="mixed", key_padding="right"),
    AttentionCase("dims_64_32", 61, 200, 2, 2, 1, 64, 32, layout="strided", spans="gaps",
        options={"is_causal": True}),
    AttentionCase("mask_and_all_else", 140, 150, 2, 4, 2, 128, 80, layout="strided",
        spans="unsorted", span_bias="full", attn_mask="minus_infinity", key_padding="left",
        options={"is_causal": True, "softcap": 3.0}),
    AttentionCase("mask_empty_rows_128", 140, 70, 2, 2, 1, 128, attn_mask="empty_rows"),
]  # fmt: skip

# Of 256 columns: dq, dk and dv are written in two bands of 128.
WIDE = [
    AttentionCase("dims_256", 140, 150, 2, 4, 2, 256, spans="ragged", layout="strided",
        options={"is_causal": True}),
    AttentionCase("dims_136", 61, 130, 1, 2, 1, 136, spans="unsorted", layout="mixed"),
    AttentionCase("dims_248_window", 140, 200, 1, 2, 1, 248, key_padding="left",
        options={"window": (70, 3)}),
    AttentionCase("dims_64_256", 70, 130, 1, 2, 1, 64, 256, spans="equal", layout="strided"),
    AttentionCase("dims_256_64", 70, 130, 1, 2, 1, 256, 64, spans="gaps", layout="strided"),
    AttentionCase("all_else_256", 100, 150, 2, 4, 2, 256, 192, layout="strided",
        spans="unsorted", span_bias="full", attn_mask="minus_infinity", key_padding="left",
        options={"is_causal": True, "softcap": 3.0, "rows": (10, 90)}),
]  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if has_kernel(c)] + TILES + WIDTHS + GENERAL + WIDE,
    ids=lambda c: c.name,
)
@pytest.mark.parametrize("dtype", HALF, ids=("bfloat16", "float16"))
def test_outputs_and_gradients(
    case: AttentionCase, dtype: torch.dtype, cuda_anywhere: None
) -> None:
    common.check_case(case, dtype, "cuda")


def packed(seed: int, lengths_q: list[int], lengths_k: list[int], head_dim: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(sum(lengths_q), 4), (sum(lengths_k), 2), (sum(lengths_k), 2)]
    tensors = [
        torch.randn(*shape, head_dim, generator=generator).bfloat16().requires_grad_()
        for shape in shapes
    ]
    cuts = [torch.tensor([0, *ns]).cumsum(0).int() for ns in (lengths_q, lengths_k)]
    return [*tensors, *cuts]


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"causal": True, "softcap": 2.0}],
    ids=("full", "causal", "softcap"),
)
@pytest.mark.parametrize(
    "lengths",
    [
        ([128, 64], [64, 128]),
        ([1, 130, 3, 0, 70], [65, 131, 0, 9, 70]),
        ([5] * 9, [7] * 9),
    ],
    ids=("on_blocks", "ragged", "short"),
)
def test_packed_sequences(
    lengths: tuple[list[int], list[int]], options: dict[str, Any], cuda_on_host: Kernels
) -> None:
    """Against the reference on the same packed tensors, spans that cross the cuts included."""
    q, k, v, cu_q, cu_k = packed(0, *lengths, 64)
    num_spans = 6
    spans = rk.Spans(torch.arange(len(k)) * num_spans // len(k), num_spans)
    results = []
    for dtype in (torch.bfloat16, torch.float64):  # the second goes to the reference
        tensors = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        longest_q, longest_k = map(max, lengths)
        outputs = rk.flash_attn_varlen_func(
            tensors[0], tensors[1], tensors[2], cu_q, cu_k, longest_q, longest_k, spans=spans,
            **options,
        )  # fmt: skip
        douts = [common.random_like(x, seed) for seed, x in enumerate(outputs)]
        results.append([*outputs, *torch.autograd.grad(outputs, tensors, douts)])
    assert cuda_on_host.calls == {"fwd": 1, "bwd": 1}
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "more",
    [{}, {"span_bias": "full", "attn_mask": "float", "options": {"softcap": 2.0}}],
    ids=("plain", "general"),
)
def test_what_lies_behind_padding_does_not_matter(
    more: dict[str, Any], cuda_on_host: Kernels
) -> None:
    """NaN in keys and values that nobody may see: no output and no gradient has any of it."""
    case = AttentionCase("padded", 70, 130, 2, spans="equal", key_padding="left", **more)
    inputs = case.inputs(torch.float16)
    hidden = ~inputs.options["key_padding_mask"][:, None, :, None]
    found = []
    for fill in (0.0, float("nan")):
        k, v = (x.masked_fill(hidden, fill).requires_grad_() for x in (inputs.k, inputs.v))
        tensors = [inputs.q.clone().requires_grad_(), k, v]
        if (bias := inputs.options.get("span_bias")) is not None:
            tensors.append(bias.requires_grad_())
        outputs = rk.attention(*tensors[:3], inputs.spans, backend="cuda", **inputs.options)
        douts = [common.random_like(x, seed) for seed, x in enumerate(outputs)]
        found.append([*outputs, *torch.autograd.grad(outputs, tensors, douts)])
    for zero, nan in zip(*found, strict=True):
        assert torch.equal(zero, nan)


@pytest.mark.parametrize("dtype", HALF, ids=("bfloat16", "float16"))
def test_a_mask_in_the_dtype_of_q(dtype: torch.dtype, cuda_on_host: Kernels) -> None:
    """The same bits as from float32 of the same values; -inf and the lowest number among them."""
    case = AttentionCase("mask", 70, 130, 2, spans="equal", attn_mask="float")
    inputs = case.inputs(dtype).requires_grad_()
    mask = inputs.options["attn_mask"].to(dtype)
    mask[:, :, ::5, ::3], mask[:, :, 1::5, 1:] = float("-inf"), torch.finfo(dtype).min
    found = []
    for given in (mask, mask.float(), mask.float().expand(2, 2, 70, 130)):
        outputs = rk.attention(
            inputs.q, inputs.k, inputs.v, inputs.spans, attn_mask=given, backend="cuda"
        )
        grads = common.gradients(outputs, inputs, common.output_gradients(outputs))
        found.append([*outputs, *grads.values()])
    for x, *others in zip(*found, strict=True):
        assert x.isfinite().all() and all(torch.equal(x, y) for y in others)


def test_a_bias_that_hides_spans(cuda_on_host: Kernels) -> None:
    """-inf in a bias is a mask, to the bit; rows without another span see nothing."""
    case = AttentionCase("hidden", 70, 130, spans="equal", span_bias="full")
    inputs = case.inputs(torch.bfloat16)
    spans = inputs.spans
    assert spans is not None
    hidden = torch.rand(1, 2, 70, 4, generator=torch.Generator().manual_seed(1)) < 0.4
    hidden[:, :, ::7] = True
    bias = inputs.options["span_bias"].masked_fill(hidden, float("-inf")).requires_grad_()
    mask = ~hidden[..., spans.ids.long()]
    found = []
    for options in ({}, {"attn_mask": mask}):
        q, k, v = (x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
        seen = bias if not options else bias.masked_fill(hidden, 0.0)
        outputs = rk.attention(q, k, v, spans, span_bias=seen, backend="cuda", **options)
        douts = [common.random_like(x, seed) for seed, x in enumerate(outputs)]
        found.append([*outputs, *torch.autograd.grad(outputs, (q, k, v, bias), douts)])
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y) and not x.isnan().any()
    assert (found[0][2][:, :, ::7] == float("-inf")).all() and not found[0][0][:, :, ::7].any()


def test_steering_a_model(cuda_on_host: Kernels) -> None:
    """`rk.steer` reaches the kernels: a bias of a span changes the logits, and has a gradient."""
    register()
    torch.manual_seed(0)
    model = build("qwen2", "ral", torch.bfloat16)
    batch = inputs_of("qwen2")
    ids = torch.full(batch["input_ids"].shape, -1, dtype=torch.int32)
    ids[:, 1:4] = 0
    spans = rk.Spans(ids, 1)
    bias = torch.full((len(ids), 1, 1, 1), -30.0, requires_grad=True)
    with rk.steer(model, bias, spans=spans, layers=-1):
        out = model(**batch, use_cache=False).logits
    steered = dict(cuda_on_host.calls)
    assert steered["fwd"] > 0
    (gradient,) = torch.autograd.grad(out.float().square().sum(), bias)
    assert cuda_on_host.calls["bwd"] > 0 and gradient.isfinite().all()
    assert not torch.equal(out, model(**batch, use_cache=False).logits)


def check_any_order(case: AttentionCase, kernels: Kernels) -> None:
    """Outputs and gradients have the same bits in any order of threads."""
    found = []
    for order in range(4):
        kernels.set_order(order)
        inputs = case.inputs(torch.bfloat16).requires_grad_()
        outputs = rk.attention(
            inputs.q, inputs.k, inputs.v, inputs.spans, backend="cuda", **inputs.options
        )
        grads = common.gradients(outputs, inputs, common.output_gradients(outputs))
        found.append([*outputs, *grads.values()])
    for other in found[1:]:
        for x, y in zip(found[0], other, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize(
    "case", [TILES[0], TILES[3], TILES[-1], *GENERAL[1:3], WIDE[-1]], ids=lambda c: c.name
)
def test_any_order_of_threads_gives_the_same_bits(
    case: AttentionCase, cuda_on_host: Kernels
) -> None:
    check_any_order(case, cuda_on_host)
