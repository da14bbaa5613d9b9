"""The CUDA kernels of `policy` in the harness: the op's own cases and checks, at head dims that
have kernels, and what is particular to their tiles, pieces, chunks and lists of spans."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ral_kernels as rk
from ral_kernels.ops.policy import attention_policy, cuda
from tests.cuda_host.backend import POLICY, Kernels, Violation, host_library, on_host
from tests.cuda_host.build import Patch
from tests.cuda_host.test_policy_divergence import (
    HALF,
    SEVERAL,
    TILES,
    dtype_name,
    has_kernel,
    of_dim,
    tile_case,
)
from tests.cuda_host.test_seeded_bugs import FEWER
from tests.ops.packed_cases import PackedCase
from tests.ops.policy_cases import (
    BY_NAME,
    SPAN_CASES,
    TOKEN_CASES,
    WEIGHTED_CASES,
    WEIGHTED_SPAN_CASES,
    PolicyCase,
)
from tests.ops.policy_eager import valid_keys
from tests.ops.test_policy import check_case, gradients, random_like
from tests.ops.test_policy_packed_kernels import CHOSEN, RAGGED, assert_alike, run_policy

CASES = [
    case if case.base.head_dim == 128 else of_dim(case, 64)
    for case in TOKEN_CASES + SPAN_CASES + WEIGHTED_CASES + WEIGHTED_SPAN_CASES
    if has_kernel(case) and case.base.span_bias == "none"
]
SPANS = [
    tile_case("spans_in_pieces", 5, 1100, spans="unsorted", num_spans=40, head_dim=64),
    tile_case(
        "spans_everything_at_once", 70, 200, "batch", batch_size=2, num_heads=6, num_kv_heads=2,
        head_dim=128, key_padding="left", layout="mixed", spans="batch", num_spans=9,
        options={"rows": (3, 69), "window": 100, "scale": 0.25},
    ),
    tile_case("a_span_a_key", 66, 200, spans="equal", num_spans=200, head_dim=64),
]  # fmt: skip
FAST = ("length_2", "gqa_7", "padding_left", "window_both", "large_scores", "spans_unsorted",
    "spans_batch", "weights_samples", "in_pieces", "spans_everything_at_once")  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=case.name,
            marks=() if case.name in FAST else pytest.mark.slow(stands_in="test_policy"),
        )
        for case in CASES + TILES + SPANS
    ],
)
@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
def test_policy(case: PolicyCase, dtype: torch.dtype, cuda_anywhere: None) -> None:
    check_case(case, dtype, "cuda")


def inputs_of(name: str) -> PolicyCase:
    return of_dim(BY_NAME[name], 64)


@pytest.mark.parametrize("name", ["padding_everything", "large_scores"])
def test_gradients_of_zeros_go_nowhere(name: str, cuda_on_host: Kernels) -> None:
    """What a loss of log p sends to keys that are not valid, whose weight underflows, and to empty
    rows is left out."""
    inputs = inputs_of(name).inputs(torch.bfloat16).requires_grad_()
    p = attention_policy(inputs.q, inputs.k, backend="cuda", **inputs.options)
    assert ((p == 0) & valid_keys(inputs)).any() or (p == 0).all(-1).any()
    clean = random_like(p, 1).masked_fill(p == 0, 0.0)
    wanted = torch.autograd.grad(p, (inputs.q, inputs.k), clean, retain_graph=True)
    for poison in (float("nan"), float("inf"), 1e30):
        got = torch.autograd.grad(
            p, (inputs.q, inputs.k), clean.masked_fill(p == 0, poison), retain_graph=True
        )
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a, b)


def test_underflowing_rows_are_zero(cuda_on_host: Kernels) -> None:
    inputs = inputs_of("peaked_on_self").inputs(torch.bfloat16)
    factors = torch.where(torch.arange(inputs.q.shape[2]) % 2 == 0, 100, 0.1)[:, None]
    q = (inputs.q * factors).bfloat16().requires_grad_()
    p = attention_policy(q, inputs.k, backend="cuda")
    empty = (p == 0).all(-1)
    assert p.isfinite().all() and empty.any() and not empty.all()
    (dq,) = torch.autograd.grad(p.square().sum(), q)
    assert dq.isfinite().all() and not dq.transpose(1, 2)[empty].any()


def test_padding_may_hold_anything(cuda_on_host: Kernels) -> None:
    """Padded keys are not read, so that NaN there does no harm."""
    inputs = inputs_of("padding_left").inputs(torch.bfloat16)
    padded = ~inputs.options["key_padding_mask"][:, None, :, None]
    found = []
    for fill in (0.0, float("nan")):
        q, k = inputs.q.clone().requires_grad_(), inputs.k.masked_fill(padded, fill)
        p = attention_policy(q, k.requires_grad_(), backend="cuda", **inputs.options)
        found.append([p, *torch.autograd.grad(p, (q, k), random_like(p, 1))])
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y) and x.isfinite().all()


# -- packed sequences ------------------------------------------------------------------------------

CASE = replace(RAGGED, head_dim=64)
PACKED: dict[str, tuple[PackedCase, torch.dtype]] = {
    "causal": (CASE, torch.bfloat16),
    "not_causal": (
        replace(CASE, options={"is_causal": False, "exclude_self": False}), torch.float16,
    ),
    "window_weights": (
        replace(CASE, num_heads=4, num_kv_heads=2, head_dim=128, head_weights="samples",
            options={"window": 20}), torch.float16,
    ),
    "scope_rows": (replace(CASE, head_dim=128, scope=True, rows=CHOSEN), torch.bfloat16),
    "spans": (replace(CASE, num_spans=5), torch.float16),
    "spans_rows": (replace(CASE, head_dim=128, num_spans=3, rows=CHOSEN), torch.bfloat16),
}  # fmt: skip


@pytest.mark.parametrize("limit", [cuda.CHUNK, 3000, 1], ids=["together", "groups", "alone"])
@pytest.mark.parametrize(("case", "dtype"), PACKED.values(), ids=PACKED)
def test_packed(
    case: PackedCase,
    dtype: torch.dtype,
    limit: int,
    cuda_on_host: Kernels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sequences all together, in groups, and each by itself in chunks of its rows."""
    monkeypatch.setattr(cuda, "CHUNK", limit)
    found, wanted = (run_policy(case, dtype, backend) for backend in ("cuda", "reference"))
    assert cuda_on_host.calls == {"fwd": 1, "bwd": 1}
    assert_alike(found, wanted)
    assert torch.equal(found[0] == 0, wanted[0] == 0)


# -- chunks of rows, order of threads --------------------------------------------------------------


def all_results(case: PolicyCase, dtype: torch.dtype) -> list[Tensor]:
    inputs = case.inputs(dtype).requires_grad_()
    p = attention_policy(inputs.q, inputs.k, backend="cuda", **inputs.options)
    return [p, *gradients(p, inputs, random_like(p, 1)).values()]


WITH_SPANS = replace(SEVERAL, base=replace(SEVERAL.base, spans="batch", num_spans=7))


@pytest.mark.parametrize("case", [SEVERAL, WITH_SPANS], ids=["keys", "spans"])
def test_chunks_of_rows(
    case: PolicyCase, cuda_on_host: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once, two samples of three, and 64 rows of a sample: dk goes from chunk to chunk."""
    found = []
    for limit in (cuda.CHUNK, 2 * 192 * 256, 1):
        monkeypatch.setattr(cuda, "CHUNK", limit)
        found.append(all_results(case, torch.bfloat16))
    for other in found[1:]:
        for i, (x, y) in enumerate(zip(found[0], other, strict=True)):
            if i == 2:  # dk
                torch.testing.assert_close(x, y, rtol=2e-2, atol=1e-5)
            else:
                assert torch.equal(x, y)


@pytest.mark.parametrize("spans", ["none", "unsorted"])
def test_any_order_of_threads_gives_the_same_bits(
    spans: str, cuda_on_host: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "CHUNK", 1)
    case = tile_case("", 70, 600, num_kv_heads=1, spans=spans, num_spans=5)  # in pieces, too
    found = []
    for order in range(3):
        cuda_on_host.set_order(order)
        found.append(all_results(case, torch.float16))
    for other in found[1:]:
        for x, y in zip(found[0], other, strict=True):
            assert torch.equal(x, y)


# -- what has no kernel, what is wrong -------------------------------------------------------------


def test_refusals(cuda_on_host: Kernels) -> None:
    q, k = torch.randn(1, 2, 5, 64).bfloat16(), torch.randn(1, 1, 7, 64).bfloat16()
    spans = rk.Spans.from_lengths([3, 4])
    for x, y, options, reason in (
        (q, k, {"softcap": 2.0}, "softcap is not supported"),
        (q, k, {"spans": spans, "span_bias": torch.zeros(2)}, "span_bias is not supported"),
        (q.float(), k.float(), {}, "supports bfloat16 and float16; got float32"),
        (q[..., :32], k[..., :32], {}, "head dims 64 and 128 are supported; got 32"),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            attention_policy(x, y, backend="cuda", **options)  # type: ignore[arg-type]


BUGS: dict[str, tuple[Patch, str | None]] = {
    "no_barrier_before_the_next_keys": (
        (
            "policy/moments.h",
            "sync_block();  // the tile has arrived; the previous one is no longer read",
            "",
        ),
        "race|in flight",
    ),
    "moments_of_hidden_keys": (
        ("policy/moments.h", "if (!kFull && !mask.counts(c, e)) continue;", ""),
        None,
    ),
    "one_piece_of_the_moments": (
        ("policy/moments.h", "u += load_global(params.u_parts", "u = load_global(params.u_parts"),
        None,
    ),
    "constants_have_a_gradient": (
        ("policy/outcomes.h", "!= 0.0f;", ">= 0.0f;"),
        None,
    ),
    "spans_of_the_first_sample": (
        ("policy/outcomes.h", "int64_t(sample.index) * num_spans", "0 * num_spans"),
        None,
    ),
    "keys_that_a_row_does_not_see": (
        ("policy/outcomes.h", "key >= seen.low && key <= seen.high", "true"),
        None,
    ),
}
BUGGED = tile_case(
    "bugged", 70, 1100, batch_size=2, spans="batch", num_spans=9, options={"window": 300}
)


@pytest.mark.slow(stands_in="test_policy")
@pytest.mark.parametrize(("patch", "report"), BUGS.values(), ids=BUGS)
def test_seeded_bug_is_found(patch: Patch, report: str | None, build_folder: Path) -> None:
    library = host_library(build_folder, (patch, *FEWER), POLICY)
    cases = [of_dim(BUGGED, 64), inputs_of("large_scores")]
    with on_host(library), pytest.raises((AssertionError, Violation), match=report) as caught:
        for case in cases:
            check_case(case, torch.float16, "cuda")
            check_zeros(case)
    assert isinstance(caught.value, Violation) == (report is not None)


def check_zeros(case: PolicyCase) -> None:
    """A gradient that is NaN where p is 0 leaves no trace."""
    inputs = case.inputs(torch.float16).requires_grad_()
    p = attention_policy(inputs.q, inputs.k, backend="cuda", **inputs.options)
    dp = torch.where(p == 0, float("nan"), 1.0)
    for gradient in torch.autograd.grad(p, (inputs.q, inputs.k), dp):
        assert gradient.isfinite().all()
