"""Regressions of `attention` and its drop-ins: `pytest benchmarks --benchmark-only`, small shapes.

Each shape is held against float64 before it is timed. Compare two commits with `--benchmark-save`
and `--benchmark-compare`; the sweeps measure ratios against PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ral_kernels as rk
from benchmarks.harness.gate import TOLERANCE, relative_errors, verdict
from tests.ops.attention_cases import AttentionCase, AttentionInputs
from tests.ops.attention_eager import eager_attention

CAUSAL: dict[str, Any] = {"is_causal": True}
QWEN: dict[str, Any] = {"num_heads": 16, "num_kv_heads": 2, "head_dim": 128}
FRAMES: dict[str, Any] = {"spans": "equal", "num_spans": 8}
PREFILL = AttentionCase("prefill", 768, 768, layout="bthd", options=CAUSAL, **QWEN, **FRAMES)
SHAPES = (
    PREFILL,
    AttentionCase("prefill_no_spans", 768, 768, layout="bthd", options=CAUSAL, **QWEN),
    AttentionCase("prefill_off_blocks", 701, 701, options=CAUSAL, **QWEN, **FRAMES),
    AttentionCase("decode", 1, 4096, options=CAUSAL, **QWEN, **FRAMES),
    AttentionCase(
        "decode_mha", 1, 4096, num_heads=16, num_kv_heads=16, head_dim=128, options=CAUSAL, **FRAMES
    ),
    AttentionCase("chunk_of_prefill", 128, 2048, options=CAUSAL, **QWEN, **FRAMES),
    AttentionCase("mha_64", 512, 512, batch_size=2, num_heads=8, num_kv_heads=8, **FRAMES),
    AttentionCase("window", 768, 768, options={**CAUSAL, "window": 128}, **QWEN, **FRAMES),
    AttentionCase("scattered_spans", 768, 768, spans="unsorted", num_spans=64, **QWEN),
    AttentionCase("span_bias", 768, 768, span_bias="full", options=CAUSAL, **QWEN, **FRAMES),
    AttentionCase("padding", 512, 512, batch_size=2, key_padding="left", **QWEN, **FRAMES),
    AttentionCase(
        "last_rows", 768, 768, options={**CAUSAL, "rows": slice(-64, None)}, **QWEN, **FRAMES
    ),
)
PACKED = AttentionCase("packed", 384, 384, batch_size=2, options=CAUSAL, **QWEN, **FRAMES)
DTYPES = (torch.bfloat16, torch.float32)
Result = tuple[Tensor, "Tensor | None"]


def attention(inputs: AttentionInputs) -> Result:
    result = rk.attention(inputs.q, inputs.k, inputs.v, inputs.spans, **inputs.options)
    return result.out, result.marginals


def scaled_dot_product_attention(inputs: AttentionInputs) -> Result:
    out, marginals = rk.scaled_dot_product_attention(
        inputs.q, inputs.k, inputs.v, is_causal=True, enable_gqa=True, spans=inputs.spans
    )
    return out, marginals


def flash_attn_func(inputs: AttentionInputs) -> Result:
    q, k, v = (tensor.transpose(1, 2) for tensor in (inputs.q, inputs.k, inputs.v))
    out, marginals = rk.flash_attn_func(q, k, v, causal=True, spans=inputs.spans)
    return out.transpose(1, 2), marginals


def flash_attn_varlen_func(inputs: AttentionInputs) -> Result:
    batch_size, _, seqlen, _ = inputs.q.shape
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (inputs.q, inputs.k, inputs.v))
    assert inputs.spans is not None
    spans = rk.Spans(inputs.spans.ids.repeat(batch_size), inputs.spans.num_spans)
    cu_seqlens = torch.arange(batch_size + 1, dtype=torch.int32) * seqlen
    out, marginals = rk.flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, seqlen, seqlen, causal=True, spans=spans
    )
    by_sample = (batch_size, seqlen)
    return out.unflatten(0, by_sample).transpose(1, 2), marginals.unflatten(1, by_sample).movedim(
        1, 0
    )


OPS: tuple[tuple[Callable[[AttentionInputs], Result], AttentionCase], ...] = (
    *((attention, case) for case in SHAPES),
    (scaled_dot_product_attention, PREFILL),
    (flash_attn_func, PREFILL),
    (flash_attn_varlen_func, PACKED),
)


def gradients(
    inputs: AttentionInputs, outputs: tuple[Tensor | None, ...], like: tuple[Tensor | None, ...]
) -> dict[str, Tensor]:
    """Gradients of <outputs, fixed random numbers> in everything differentiable, by name."""
    generator = torch.Generator().manual_seed(5)
    pairs = [
        (output, torch.randn(wanted.shape, generator=generator).to(wanted.dtype).to(output.dtype))
        for output, wanted in zip(outputs, like, strict=True)
        if output is not None and wanted is not None
    ]
    tensors = inputs.differentiable()
    found = torch.autograd.grad(
        [output for output, _ in pairs], list(tensors.values()), [grad for _, grad in pairs]
    )
    return {f"d{name}": gradient for name, gradient in zip(tensors, found, strict=True)}


def check(op: Callable[[AttentionInputs], Result], inputs: AttentionInputs) -> None:
    """Fail unless outputs and all gradients are right to within roundings of the dtype."""
    dtype = inputs.q.dtype
    assert dtype in TOLERANCE
    inputs.requires_grad_()
    exact_inputs = inputs.to(torch.float64).requires_grad_()
    result, truth = op(inputs), eager_attention(exact_inputs)[:2]
    got: dict[str, Tensor | None] = {"out": result[0], "marginals": result[1]}
    wanted = {name: tensor for name, tensor in zip(got, truth, strict=True) if tensor is not None}
    got.update(gradients(inputs, result, result))
    wanted.update(gradients(exact_inputs, truth, result))
    reason = verdict(relative_errors(got, wanted), dtype)
    assert reason is None, reason


@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "fwd_bwd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float32"])
@pytest.mark.parametrize(("op", "case"), OPS, ids=lambda x: getattr(x, "__name__", None) or x.name)
def test_speed(
    op: Callable[[AttentionInputs], Result],
    case: AttentionCase,
    dtype: torch.dtype,
    backward: bool,
    benchmark: Any,
) -> None:
    check(op, case.inputs(dtype))
    inputs = case.inputs(dtype)
    if backward:
        inputs.requires_grad_()
    out, marginals = op(inputs)
    dout = torch.randn_like(out)
    dmarginals = None if marginals is None else torch.randn_like(marginals)
    tensors = list(inputs.differentiable().values())

    def run() -> object:
        with torch.set_grad_enabled(backward):
            results = op(inputs)
        if not backward:
            return results
        outputs = [x for x in results if x is not None]
        return torch.autograd.grad(
            outputs, tensors, [x for x in (dout, dmarginals) if x is not None]
        )

    benchmark.group = f"{op.__name__} {case.name}"
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.pedantic(run, rounds=5, iterations=1, warmup_rounds=1)
