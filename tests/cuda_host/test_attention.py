"""The CUDA kernels of `attention` in the harness: the op's own cases, and those of its tiles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ral_kernels as rk
from ral_kernels.ops.attention.cuda import HEAD_DIMS
from tests.cuda_host.backend import Kernels
from tests.ops import test_attention as common
from tests.ops.attention_cases import CASES, AttentionCase

HALF = (torch.bfloat16, torch.float16)


def has_kernel(case: AttentionCase) -> bool:
    return (
        case.head_dim in HEAD_DIMS
        and case.head_dim_v in (None, case.head_dim)
        and case.span_bias == "none"
        and case.attn_mask == "none"
        and "softcap" not in case.options
    )


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


@pytest.mark.parametrize(
    "case", [c for c in CASES if has_kernel(c)] + TILES + WIDTHS, ids=lambda c: c.name
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


@pytest.mark.parametrize("causal", [False, True], ids=("full", "causal"))
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
    lengths: tuple[list[int], list[int]], causal: bool, cuda_on_host: Kernels
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
            tensors[0], tensors[1], tensors[2], cu_q, cu_k, longest_q, longest_k, causal=causal,
            spans=spans,
        )  # fmt: skip
        douts = [common.random_like(x, seed) for seed, x in enumerate(outputs)]
        results.append([*outputs, *torch.autograd.grad(outputs, tensors, douts)])
    assert cuda_on_host.calls == {"fwd": 1, "bwd": 1}
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-2, atol=2e-2)


def test_what_lies_behind_padding_does_not_matter(cuda_on_host: Kernels) -> None:
    """NaN in keys and values that nobody may see: no output and no gradient has any of it."""
    case = AttentionCase("padded", 70, 130, 2, spans="equal", key_padding="left")
    inputs = case.inputs(torch.float16)
    hidden = ~inputs.options["key_padding_mask"][:, None, :, None]
    found = []
    for fill in (0.0, float("nan")):
        k, v = (x.masked_fill(hidden, fill).requires_grad_() for x in (inputs.k, inputs.v))
        q = inputs.q.clone().requires_grad_()
        outputs = rk.attention(q, k, v, inputs.spans, backend="cuda", **inputs.options)
        douts = [common.random_like(x, seed) for seed, x in enumerate(outputs)]
        found.append([*outputs, *torch.autograd.grad(outputs, (q, k, v), douts)])
    for zero, nan in zip(*found, strict=True):
        assert torch.equal(zero, nan)


@pytest.mark.parametrize("case", [TILES[0], TILES[3], TILES[-1]], ids=lambda c: c.name)
def test_any_order_of_threads_gives_the_same_bits(
    case: AttentionCase, cuda_on_host: Kernels
) -> None:
    found = []
    for order in range(4):
        cuda_on_host.set_order(order)
        inputs = case.inputs(torch.bfloat16).requires_grad_()
        outputs = rk.attention(
            inputs.q, inputs.k, inputs.v, inputs.spans, backend="cuda", **inputs.options
        )
        grads = common.gradients(outputs, inputs, common.output_gradients(outputs))
        found.append([*outputs, *grads.values()])
    for other in found[1:]:
        for x, y in zip(found[0], other, strict=True):
            assert torch.equal(x, y)
