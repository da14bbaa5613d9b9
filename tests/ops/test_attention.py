"""`attention` over backend x dtype x case: outputs and every gradient against float64."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ral_kernels as rk
from tests.ops.accuracy import (
    assert_accurate,
    assert_gradient_accurate,
    assert_lse_accurate,
    floor_of,
)
from tests.ops.attention_cases import BY_NAME, CASES, AttentionCase, AttentionInputs
from tests.ops.attention_eager import eager_attention, sdpa_out

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Outputs = tuple[Tensor, Tensor | None, Tensor]


def half_precision(backend: str) -> torch.dtype:
    """bfloat16, but for Triton's interpreter, which multiplies it wrongly."""
    return torch.float16 if backend == "triton" else torch.bfloat16


def random_like(tensor: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)


def output_gradients(outputs: Outputs) -> list[Tensor | None]:
    """Random gradients of out (rounded to its dtype), marginals and lse.

    Gradients of -inf must not matter: they are there, and big.
    """
    out, marginals, lse = outputs
    dlse = random_like(lse, 3).masked_fill(lse == float("-inf"), 1e4)
    return [random_like(out, 1), None if marginals is None else random_like(marginals, 2), dlse]


def gradients(
    outputs: Outputs,
    inputs: AttentionInputs,
    douts: list[Tensor | None],
    retain_graph: bool = False,
) -> dict[str, Tensor]:
    """Gradients of the inputs under Σ outputs · douts; outputs whose dout is None are left out."""
    pairs = [
        (output, dout.to(output.dtype))
        for output, dout in zip(outputs, douts, strict=True)
        if output is not None and dout is not None
    ]
    tensors = inputs.differentiable()
    found = torch.autograd.grad(
        [output for output, _ in pairs],
        list(tensors.values()),
        [dout for _, dout in pairs],
        retain_graph=retain_graph,
        allow_unused=True,
    )
    return {
        name: torch.zeros_like(tensors[name]) if gradient is None else gradient
        for name, gradient in zip(tensors, found, strict=True)
    }


def finite_eager(outputs: Outputs) -> Outputs:
    """The outputs without -inf in lse, whose gradient would be inf * 0 in eager."""
    out, marginals, lse = outputs
    return out, marginals, lse.masked_fill(lse == float("-inf"), 0.0)


def check_case(case: AttentionCase, dtype: torch.dtype, backend: str) -> None:
    inputs = case.inputs(dtype).requires_grad_()
    result = rk.attention(
        inputs.q, inputs.k, inputs.v, inputs.spans, backend=backend, **inputs.options
    )
    exact = inputs.to(torch.float64).requires_grad_()
    truth = eager_attention(exact)
    baseline_inputs = inputs.to(dtype).requires_grad_()
    if "span_bias" in baseline_inputs.options:  # a float32 tensor in every dtype
        bias = inputs.options["span_bias"].detach().clone().requires_grad_()
        baseline_inputs.options["span_bias"] = bias
    baseline = eager_attention(baseline_inputs)
    upcast = eager_attention(inputs.to(torch.float32))
    torch_out = sdpa_out(baseline_inputs)

    # outputs
    assert result.out.dtype == dtype and result.lse.dtype == torch.float32
    magnitude = max(1.0, float(inputs.v.detach().abs().max())) if inputs.v.numel() else 1.0
    out_baseline = baseline[0] if torch_out is None else torch_out
    assert_accurate("out", result.out, truth[0], out_baseline, floor_of(dtype), magnitude)
    half = dtype != torch.float32
    compact_floor = torch.finfo(dtype).eps / 16 if half else floor_of(dtype)
    if inputs.spans is None:
        assert result.marginals is None
    else:
        assert result.marginals is not None and truth[1] is not None and upcast[1] is not None
        assert result.marginals.dtype == torch.float32
        assert_accurate("marginals", result.marginals, truth[1], upcast[1], compact_floor)
    assert_lse_accurate(result.lse, truth[2], upcast[2], compact_floor)
    empty = truth[2] == float("-inf")
    assert not result.out[empty].any(), "out must be 0 in fully masked rows"

    # gradients of everything together, then those of out alone against PyTorch's kernel
    douts = output_gradients(result)
    grads = gradients(result, inputs, douts, retain_graph=True)
    true_grads = gradients(finite_eager(truth), exact, douts)
    baseline_grads = gradients(finite_eager(baseline), baseline_inputs, douts)
    scale = max(
        [1.0, *(float(x.detach().abs().max()) for x in (inputs.q, inputs.k, inputs.v) if x.numel())]
    )
    # A backward that recomputes weights from the float32 lse knows them to |lse| * eps (1e-3 at
    # scores of 1e4).
    lse = truth[2].detach()[~empty]
    condition = 2 * torch.finfo(torch.float32).eps * float(lse.abs().max()) if lse.numel() else 0.0
    for name, grad in grads.items():
        assert grad.dtype == inputs.differentiable()[name].dtype
        assert_gradient_accurate(
            f"d{name}", grad, true_grads[name], baseline_grads[name], scale, condition
        )

    if torch_out is not None:
        douts = [douts[0], None, None]
        grads = gradients(result, inputs, douts)
        true_grads = gradients(eager_attention(exact), exact, douts)
        eager_grads = gradients(eager_attention(baseline_inputs), baseline_inputs, douts)
        torch_grads = gradients(
            (torch_out, None, torch_out), baseline_inputs, [douts[0], None, None]
        )
        for name, grad in grads.items():
            # PyTorch has a fused kernel for Dv = D alone; elsewhere it computes in float32.
            fused = case.head_dim_v in (None, case.head_dim) and name != "span_bias"
            reference = torch_grads if fused else eager_grads
            assert_gradient_accurate(
                f"d{name} of out alone", grad, true_grads[name], reference[name], scale, condition
            )


# Longer than two blocks of keys of the CPU kernels, the largest of all; the interpreter takes a
# minute for them.
LONG_CASES = ("increasing_for_long", "window_over_blocks")


# In the interpreter float16 differs from float32 by where the kernels convert, which these pass.
HALF_CASES = ("decode", "gqa_7", "head_dim_v_smaller", "unsorted_spans", "span_bias_softcap",
    "span_bias_in_a_window", "span_bias_rows_middle", "mask_float", "fully_masked_rows",
    "window_causal", "rows_none", "large_scores")  # fmt: skip


@pytest.mark.in_interpreter(
    when=lambda case, dtype: (
        case.name not in LONG_CASES and (dtype == torch.float32 or case.name in HALF_CASES)
    )
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_attention(case: AttentionCase, dtype: torch.dtype, backend: str) -> None:
    check_case(case, dtype, backend)


ISA_CASES = (
    "decode_mha",
    "decode_gqa_5",
    "decode_gqa_7",
    "decode_6_queries",
    "decode_with_options",
    "decode_increasing",
    "length_1",
    "off_blocks",
    "chunked_prefill",
    "gqa_7",
    "head_dim_16",
    "head_dim_256",
    "head_dim_odd",
    "head_dim_v_larger",
    "layout_mixed",
    "unsorted_spans",
    "span_bias_full",
    "span_bias_in_a_window",
    "span_bias_rows_middle",
    "fully_masked_rows",
    "padding_left",
    "window_both",
    "softcap",
    "rows_middle",
    "large_scores",
    "increasing_scores",
    *LONG_CASES,
)


@pytest.mark.parametrize("threads", [3], indirect=True)
@pytest.mark.parametrize("name", ISA_CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_every_cpu_variant(name: str, dtype: torch.dtype, isa: str, threads: int) -> None:
    check_case(BY_NAME[name], dtype, "cpu")


def outputs_and_gradients(inputs: AttentionInputs, backend: str) -> list[Tensor]:
    """Both, by one call; `inputs` are not changed."""
    leaves = AttentionInputs(
        *(tensor.detach().clone() for tensor in (inputs.q, inputs.k, inputs.v)),
        inputs.spans,
        inputs.options,
    ).requires_grad_()
    result = rk.attention(
        leaves.q, leaves.k, leaves.v, leaves.spans, backend=backend, **leaves.options
    )
    douts = [None if x is None else random_like(x, i) for i, x in enumerate(result)]
    grads = gradients(result, leaves, douts)
    return [*(x for x in result if x is not None), *grads.values()]


def check_padding_is_not_read(case: AttentionCase, dtype: torch.dtype, backend: str) -> None:
    """A cache holds anything where there is no token, and NaN times 0 is NaN."""
    inputs = case.inputs(dtype)
    hidden = ~inputs.options["key_padding_mask"][:, None, :, None]
    assert hidden.any()
    clean = outputs_and_gradients(inputs, backend)
    assert not any(x.isnan().any() for x in clean)
    inputs.k.masked_fill_(hidden, float("nan"))
    inputs.v.masked_fill_(hidden, float("nan"))
    for wanted, got in zip(clean, outputs_and_gradients(inputs, backend), strict=True):
        assert torch.equal(wanted, got)


@pytest.mark.parametrize("num_heads", range(1, 9))
@pytest.mark.parametrize("seqlen_q", [1, 9])  # with and without packing
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_no_cpu_variant_reads_padding(
    num_heads: int, seqlen_q: int, dtype: torch.dtype, isa: str
) -> None:
    case = AttentionCase("", seqlen_q, 100, num_heads=num_heads, head_dim=40, key_padding="right")
    check_padding_is_not_read(case, dtype, "cpu")


@pytest.mark.parametrize("seqlen_q", [1, 33])
def test_padding_keys_are_never_read(seqlen_q: int, backend: str) -> None:
    case = AttentionCase("", seqlen_q, 40, batch_size=2, head_dim=16, key_padding="right",
                         spans="equal", options={"softcap": 2.0})  # fmt: skip
    check_padding_is_not_read(case, torch.float32, backend)


@pytest.mark.parametrize("hidden_by", ["mask", "window"])
@pytest.mark.parametrize("seqlen_q", [4, 33])
def test_a_hidden_value_gives_the_right_numbers_or_nan(
    hidden_by: str, seqlen_q: int, backend: str
) -> None:
    """A mask or window gives a key a weight of 0, and 0 * NaN is NaN, as in torch."""
    inputs = AttentionCase("", seqlen_q, 40, head_dim=16).inputs(torch.float32)
    mask = torch.ones(seqlen_q, 40, dtype=torch.bool)
    if hidden_by == "mask":
        mask[:, 1] = False
        options: dict[str, Any] = {"attn_mask": mask}
    else:
        rows = torch.arange(seqlen_q)[:, None] + 40 - seqlen_q
        mask &= torch.arange(40) >= rows - 3
        options = {"window": (3, None)}
    found = []
    for value in (0.0, float("nan")):
        v = inputs.v.clone()
        v[:, :, 1] = value
        found.append(rk.attention(inputs.q, inputs.k, v, backend=backend, **options))
        theirs = F.scaled_dot_product_attention(inputs.q, inputs.k, v, attn_mask=mask)
    assert theirs.isnan().all()
    wanted, got = found
    assert torch.equal(got.lse, wanted.lse)
    right = (got.out == wanted.out).all(-1)
    assert (right | got.out.isnan().all(-1)).all()
    assert got.out[:, :, mask[:, 1]].isnan().all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("seqlen_q", [2, 6, 50])
@pytest.mark.parametrize("spans", ["none", "everything", "equal"])
def test_nan_stays_where_it_is_on_every_cpu_variant(
    poison: float, seqlen_q: int, spans: str, isa: str
) -> None:
    check_nan_stays(poison, seqlen_q, spans, "cpu")


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_stays_where_it_is(poison: float, backend: str) -> None:
    check_nan_stays(poison, 6, "equal", backend)


def check_nan_stays(poison: float, seqlen_q: int, spans: str, backend: str) -> None:
    """A bad number of q reaches its row and its kv head's keys, one of k or v its kv head alone."""
    # 7 keys are no multiple of a tile's 6: padding follows them.
    case = AttentionCase("", seqlen_q, 7, batch_size=2, num_heads=6, num_kv_heads=2, head_dim=8,
                         spans=spans, num_spans=2)  # fmt: skip
    inputs = case.inputs(torch.float32)
    clean = outputs_and_gradients(inputs, backend)
    for name in ("q", "k", "v"):
        before = getattr(inputs, name).clone()
        getattr(inputs, name)[0, 0, 1] = poison
        got = outputs_and_gradients(inputs, backend)
        getattr(inputs, name).copy_(before)
        if poison != poison:
            assert got[0][0, 0, 1].isnan().any()
        for i, (x, wanted) in enumerate(zip(got, clean, strict=True)):
            heads = x.shape[1] // 2  # of the kv head
            of_keys = i >= len(got) - 2  # dk and dv
            if name == "q" and not of_keys:
                x[0, 0, 1] = wanted[0, 0, 1]
            else:
                x[0, :heads] = wanted[0, :heads]
            assert torch.equal(x, wanted), (name, i)


@pytest.mark.parametrize(
    "name",
    ["off_blocks", "gqa_7", "unsorted_spans", "span_bias_per_span", "window_both", "rows_middle"],
)
@pytest.mark.parametrize("threads", [1, 4], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.in_interpreter(  # which runs one program after the other
    when=lambda name, dtype: name == "gqa_7" and dtype == torch.float32
)
def test_repeats_bit_for_bit(name: str, dtype: torch.dtype, backend: str, threads: int) -> None:
    case = BY_NAME[name]
    repeats = 1 if backend == "triton" else 4  # the interpreter runs programs one after another

    def run() -> list[Tensor]:
        inputs = case.inputs(dtype).requires_grad_()
        result = rk.attention(
            inputs.q, inputs.k, inputs.v, inputs.spans, backend=backend, **inputs.options
        )
        grads = gradients(result, inputs, output_gradients(result))
        return [*(x for x in result if x is not None), *grads.values()]

    first = run()
    for _ in range(repeats):
        for once, again in zip(first, run(), strict=True):
            assert torch.equal(once, again)


def test_shares_no_heads_across_batch(backend: str) -> None:
    """A sample's result does not depend on the batch it is in."""
    case = BY_NAME["padding_left"]
    inputs = case.inputs(torch.float32)
    together = rk.attention(
        inputs.q, inputs.k, inputs.v, inputs.spans, backend=backend, **inputs.options
    )
    mask = inputs.options["key_padding_mask"]
    for b in range(case.batch_size):
        one = slice(b, b + 1)
        alone = rk.attention(
            inputs.q[one],
            inputs.k[one],
            inputs.v[one],
            inputs.spans,
            backend=backend,
            key_padding_mask=mask[one],
            is_causal=True,
        )
        assert torch.equal(together.out[one], alone.out)
        assert together.marginals is not None and alone.marginals is not None
        assert torch.equal(together.marginals[one], alone.marginals)


@pytest.mark.parametrize("seqlen_q", [3, 9, 70])  # without packing, and with one block and more
@pytest.mark.parametrize("key_padding", ["none", "right"])
@pytest.mark.parametrize("size", [1.0, 30.0, 1e3])
def test_an_only_key_has_a_weight_of_one(
    size: float, key_padding: str, seqlen_q: int, isa: str
) -> None:
    """In the backward too, however large its score: dv is the sum of dout to the bit."""
    seqlen_k = 1 if key_padding == "none" else 4  # of which 3 are padding
    case = AttentionCase("", seqlen_q, seqlen_k, head_dim=24, key_padding=key_padding)
    inputs = case.inputs(torch.float32)
    inputs.q.mul_(size)
    inputs.requires_grad_()
    out = rk.attention(inputs.q, inputs.k, inputs.v, backend="cpu", **inputs.options).out
    dout = random_like(out, 1).mul(8).round()  # whole numbers: every order of their sum is exact
    (dv,) = torch.autograd.grad(out, inputs.v, dout)
    assert torch.equal(dv[0, 0, 0], dout.sum((0, 1, 2)))
    assert not dv[:, :, 1:].any()


def test_large_scores_cost_no_accuracy(isa: str) -> None:
    """The same error as PyTorch's kernel, though the backward has weights from lse alone."""
    inputs = AttentionCase("", 128, 128, num_kv_heads=2, head_dim=64).inputs(torch.float32)
    for tensor in (inputs.q, inputs.k):
        tensor.mul_(300**0.5)  # scores of 1e3
    truth, torchs = (inputs.to(x).requires_grad_() for x in (torch.float64, torch.float32))
    inputs.requires_grad_()
    dout = random_like(inputs.q, 1)
    ours = rk.attention(inputs.q, inputs.k, inputs.v, backend="cpu").out
    results = [(ours, inputs), (eager_attention(truth)[0], truth)]
    results.append((torch.nn.functional.scaled_dot_product_attention(torchs.q, torchs.k, torchs.v),
                    torchs))  # fmt: skip
    grads = [torch.autograd.grad(out, (x.q, x.k, x.v), dout.to(out.dtype)) for out, x in results]
    for name, got, exact, baseline in zip(("dq", "dk", "dv"), *grads, strict=True):
        assert_accurate(name, got, exact, baseline, floor_of(torch.float32))


@pytest.mark.parametrize("seqlen_q", [4, 16])  # without packing and with it
@pytest.mark.parametrize("num_spans", [0, 1, 20000])
def test_long_sums(num_spans: int, seqlen_q: int, isa: str) -> None:
    """Values that do not average out show what sums over many keys lose."""
    case = AttentionCase("", seqlen_q, 20000, head_dim=16, num_spans=num_spans,
                         spans="equal" if num_spans else "none")  # fmt: skip
    inputs = case.inputs(torch.float32)
    inputs.v.add_(1)
    result = rk.attention(inputs.q, inputs.k, inputs.v, inputs.spans, backend="cpu")
    k = inputs.k.double().repeat_interleave(2, 1)
    p = torch.softmax(inputs.q.double() @ k.mT / 4, -1)
    floor = floor_of(torch.float32) / 4
    baseline = sdpa_out(inputs)
    assert baseline is not None
    assert_accurate("out", result.out, p @ inputs.v.double(), baseline, floor, 0.0)
    if num_spans == 20000:
        baseline = torch.softmax(inputs.q @ k.float().mT / 4, -1)
        assert result.marginals is not None
        assert_accurate("marginals", result.marginals, p, baseline, floor, 0.0)


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
def test_outputs_keep_the_layout_of_inputs(layout: str, backend: str) -> None:
    inputs = AttentionCase("", 7, 9, num_heads=4, num_kv_heads=2, layout=layout).inputs(
        torch.float32
    )
    inputs.requires_grad_()
    result = rk.attention(inputs.q, inputs.k, inputs.v, backend=backend)
    result.out.sum().backward()
    assert result.out.stride() == inputs.q.stride()
    for tensor in (inputs.q, inputs.k, inputs.v):
        assert tensor.grad is not None
        assert tensor.grad.stride() == tensor.stride()


def test_rows_are_rows_of_the_whole(backend: str) -> None:
    inputs = BY_NAME["chunked_prefill"].inputs(torch.float32)
    whole = rk.attention(
        inputs.q, inputs.k, inputs.v, inputs.spans, is_causal=True, backend=backend
    )
    assert whole.marginals is not None
    for rows in (slice(3, 70), slice(-5, None), slice(None, 1), (64, 128), (-130, -1), slice(None)):
        part = rk.attention(
            inputs.q, inputs.k, inputs.v, inputs.spans, is_causal=True, rows=rows, backend=backend
        )
        wanted = whole.marginals[:, :, rows if isinstance(rows, slice) else slice(*rows)]
        assert part.marginals is not None
        # Not bit for bit: a block of rows without marginals may take another path.
        torch.testing.assert_close(part.marginals, wanted)
        torch.testing.assert_close(part.out, whole.out)


def test_head_reduction(backend: str) -> None:
    inputs = BY_NAME["gqa_7"].inputs(torch.float32)
    per_head = rk.attention(inputs.q, inputs.k, inputs.v, inputs.spans, backend=backend)
    mean = rk.attention(
        inputs.q, inputs.k, inputs.v, inputs.spans, head_reduction="mean", backend=backend
    )
    assert per_head.marginals is not None and mean.marginals is not None
    assert mean.marginals.shape == (1, 61, 4)
    assert torch.equal(mean.marginals, per_head.marginals.mean(1))


def test_marginals_of_a_partition_sum_to_one(backend: str) -> None:
    inputs = BY_NAME["off_blocks"].inputs(torch.float32)
    marginals = rk.attention(inputs.q, inputs.k, inputs.v, inputs.spans, backend=backend).marginals
    assert marginals is not None
    torch.testing.assert_close(marginals.sum(-1), torch.ones(2, 2, 127))


def test_no_span_at_all(backend: str) -> None:
    """A batch of text alone: Spans of zero spans, marginals of width zero."""
    inputs = BY_NAME["mha"].inputs(torch.float32)
    spans = rk.Spans(torch.full((127,), -1), 0)
    result = rk.attention(inputs.q, inputs.k, inputs.v, spans, backend=backend)
    assert result.marginals is not None and result.marginals.shape == (1, 3, 61, 0)


def test_rows_of_finfo_min_stay_finite(backend: str) -> None:
    """Models mask whole rows (padded queries) with finfo.min: what comes back must be finite."""
    inputs = BY_NAME["mha"].inputs(torch.float32).requires_grad_()
    mask = torch.zeros(61, 127)
    mask[:5] = torch.finfo(torch.float32).min
    result = rk.attention(
        inputs.q, inputs.k, inputs.v, inputs.spans, attn_mask=mask, backend=backend
    )
    grads = gradients((result.out, result.marginals, result.lse), inputs, [result.out, None, None])
    assert result.out.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads.values())


def test_autocast(backend: str) -> None:
    """Under autocast, mixed inputs are cast as PyTorch casts those of its own attention."""
    dtype = half_precision(backend)
    q, k, v = (torch.randn(1, 2, 9, 16) for _ in range(3))
    with torch.autocast("cpu", dtype=dtype):
        result = rk.attention(q, k, v.to(dtype), backend=backend)
    assert result.out.dtype == dtype
    cast = rk.attention(q.to(dtype), k.to(dtype), v.to(dtype), backend=backend)
    assert torch.equal(result.out, cast.out)
    assert torch.equal(result.lse, cast.lse)  # float32 inside, whatever the caller's autocast


def _far_apart(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """A [2, H, T, D] tensor whose second sample lies more than 2**31 elements behind the first.

    Only the pages that are written become memory, so this needs gigabytes of address space and
    little else.
    """
    _, h, t, d = shape
    distance = 2**31 + 64
    buffer = torch.empty(distance + h * t * d, dtype=dtype)
    view = buffer.as_strided(shape, (distance, t * d, d, 1))
    return view.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.large
def test_offsets_beyond_2_31(backend: str) -> None:
    dtype = half_precision(backend)
    q, k, v = (
        _far_apart((2, 2, 33, 64), 0, dtype),
        _far_apart((2, 1, 127, 64), 1, dtype),
        _far_apart((2, 1, 127, 64), 2, dtype),
    )
    spans = rk.Spans.from_lengths([27, 100])

    def run(*tensors: Tensor) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        result = rk.attention(*leaves, spans, is_causal=True, backend=backend)
        assert result.marginals is not None
        loss = result.out.float().square().sum() + result.marginals.square().sum()
        return [result.out, result.marginals, *torch.autograd.grad(loss, leaves)]

    far = run(q, k, v)
    near = run(q.contiguous(), k.contiguous(), v.contiguous())
    for a, b in zip(far, near, strict=True):
        assert torch.equal(a, b)
    gc.collect()


@pytest.mark.large
def test_mask_offsets_beyond_2_31(backend: str) -> None:
    """The mask of the second sample lies beyond 2**31 elements."""
    inputs = AttentionCase("", 33, 127, batch_size=2).inputs(torch.float32)
    distance = 2**31 + 64
    buffer = torch.empty(distance + 33 * 127, dtype=torch.bool)
    mask = buffer.as_strided((2, 1, 33, 127), (distance, 33 * 127, 127, 1))
    mask.copy_(torch.rand(2, 1, 33, 127) < 0.5)
    far = rk.attention(inputs.q, inputs.k, inputs.v, attn_mask=mask, backend=backend)
    near = rk.attention(inputs.q, inputs.k, inputs.v, attn_mask=mask.contiguous(), backend=backend)
    assert torch.equal(far.out, near.out)
