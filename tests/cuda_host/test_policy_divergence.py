"""The CUDA kernels of `policy_divergence` in the harness: the op's own cases and checks, at head
dims that have kernels, and what is particular to their tiles, pieces and chunks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ral_kernels.ops.divergence.arguments import KINDS
from ral_kernels.ops.policy import attention_divergence, cuda, ral_loss
from ral_kernels.snapshot import AttentionSnapshot
from tests.cuda_host.backend import POLICY, Kernels, Violation, host_library, on_host
from tests.cuda_host.build import Patch
from tests.ops import test_policy_divergence as common
from tests.ops import test_policy_divergence_at_reference as at_reference
from tests.ops import test_ral_loss as of_loss
from tests.ops.attention_cases import AttentionCase
from tests.ops.policy_cases import BY_NAME, TOKEN_CASES, PolicyCase, PolicyInputs, snapshot_inputs
from tests.ops.test_policy import gradients, random_like

HALF = (torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype)[6:]


def of_dim(case: PolicyCase, head_dim: int) -> PolicyCase:
    return replace(case, base=replace(case.base, head_dim=head_dim))


def has_kernel(case: PolicyCase) -> bool:
    return "softcap" not in case.base.options and case.base.head_dim in (32, 64, 128)


# The op's cases are of head dim 32, for speed elsewhere; here they are of 64, or of their own.
CASES = [
    case if case.base.head_dim == 128 else of_dim(case, 64)
    for case in TOKEN_CASES
    if has_kernel(case)
]


def tile_case(
    name: str, seqlen_q: int, seqlen_k: int, scope: str = "none", **base: object
) -> PolicyCase:
    return PolicyCase(AttentionCase(name, seqlen_q, seqlen_k, **base), scope)  # type: ignore[arg-type]


# Blocks are 128 rows (statistics) or 64, and 64 keys, or 128 (terms); a warp has 16 or 32 rows.
TILES = [
    tile_case("rows_beyond_a_block", 140, 150, head_dim=128),
    tile_case("on_blocks", 128, 256, num_heads=4, num_kv_heads=1),
    tile_case("window_across_blocks", 130, 300, options={"window": (70, 3), "is_causal": False}),
    tile_case(
        "everything_at_once", 70, 200, "batch", batch_size=2, num_heads=6, num_kv_heads=2,
        head_dim=128, key_padding="left", layout="mixed",
        options={"rows": (3, 69), "window": 100, "scale": 0.25},
    ),
    tile_case("in_pieces", 5, 1100, head_dim=64),  # of 512 keys
    tile_case("in_pieces_128", 66, 700, "batch", head_dim=128, batch_size=2),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES + TILES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
def test_value_and_gradients(case: PolicyCase, dtype: torch.dtype, cuda_on_host: Kernels) -> None:
    common.check_case(case, dtype, "cuda", "jsd", other_model=False)


@pytest.mark.parametrize("name", ["length_2", "gqa_7", "scope_batch", "padding_left", "decode"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dims", [(64, 128), (128, 64)], ids=lambda dims: f"{dims[0]}")
def test_teacher_of_another_model(
    name: str, kind: str, head_dims: tuple[int, int], cuda_on_host: Kernels
) -> None:
    own, other = head_dims
    dtype = HALF[own // 128]
    common.check_case(of_dim(BY_NAME[name], own), dtype, "cuda", kind, True, other)


def test_reference_of_another_dtype(cuda_on_host: Kernels) -> None:
    inputs = of_dim(BY_NAME["off_blocks"], 64).inputs(torch.bfloat16)
    other = snapshot_inputs(of_dim(BY_NAME["off_blocks"], 64), inputs, False).to(torch.float16)
    value, wanted = (
        attention_divergence(x.q, x.k, common.snapshot_of(r), backend=backend)
        for x, r, backend in (
            (inputs, other, "cuda"),
            (inputs.to(torch.float64), other.to(torch.float64), "reference"),
        )
    )
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-7)


# -- at the reference ------------------------------------------------------------------------------

ZERO = [name for name in at_reference.ZERO_CASES if has_kernel(BY_NAME[name])]


@pytest.mark.parametrize("name", ZERO)
@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
def test_unchanged_policy_is_exactly_zero(
    name: str, dtype: torch.dtype, cuda_on_host: Kernels
) -> None:
    kind = KINDS[(ZERO.index(name) + HALF.index(dtype)) % len(KINDS)]
    at_reference.check_unchanged(of_dim(BY_NAME[name], 64), kind, dtype, "cuda")
    assert cuda_on_host.calls["fwd"] > 0 and cuda_on_host.calls["bwd"] > 0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "cross_entropy"])
def test_unchanged_policy_in_the_loss(kind: str, cuda_on_host: Kernels) -> None:
    of_loss.test_exactly_zero_for_an_unchanged_policy(kind, torch.bfloat16, "cuda")
    assert cuda_on_host.calls == {"loss": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_near_the_reference(kind: str, cuda_on_host: Kernels) -> None:
    at_reference.check_near(kind, torch.bfloat16, "cuda", "reference")


@pytest.mark.parametrize("name", ["q", "k"])
def test_small_gradients_of_float16(name: str, cuda_on_host: Kernels) -> None:
    """dS is 1e-7 here, which float16 cannot hold: its rows are multiplied in units of their own.

    The scale and small queries make dq large again, or small keys dk.
    """
    inputs = tile_case("", 40, 300, num_heads=8, num_kv_heads=2).inputs(torch.float16)
    factors = {"q": (0.5**6, 1.0), "k": (1.0, 0.5**6)}[name]
    q, k = (factor * x for factor, x in zip(factors, (inputs.q, inputs.k), strict=True))
    found = []
    for dtype, backend in ((torch.float16, "cuda"), (torch.float64, "reference")):
        now = PolicyInputs(q, k, {"scale": 8.0}).to(dtype).requires_grad_()
        old = AttentionSnapshot((q * (1 + 2**-8)).to(dtype), k.to(dtype), scale=8.0)
        value = attention_divergence(now.q, now.k, old, backend=backend, scale=8.0)
        found.append(gradients(value, now, random_like(value, 1))[name])
    assert 1e-5 < float(found[1].abs().mean()) < 1e-2, "the test's own premise"
    assert common.relative_error(found[0], found[1]) < 3e-3


@pytest.mark.parametrize("prefix", [1, 30, 64, 100, 130])
@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
def test_shared_prefix_gives_the_same_bits(
    prefix: int, dtype: torch.dtype, cuda_on_host: Kernels
) -> None:
    """Borders of the prefix on and off blocks; samples of two prefixes, shuffled."""
    case = tile_case("", 70, 130, batch_size=4)
    inputs = case.inputs(dtype).requires_grad_()
    k = inputs.k.detach().clone()
    k[1::2, :, :prefix] = k[0::2, :, :prefix]
    order = torch.tensor([2, 0, 3, 1])
    snapshots = [
        AttentionSnapshot(inputs.q.detach(), k, group_size=size, shared_prefix=shared)[order]
        for size, shared in ((1, 0), (2, prefix))
    ]
    assert snapshots[1].nbytes < snapshots[0].nbytes
    results = []
    for snapshot in snapshots:
        value = attention_divergence(inputs.q, inputs.k, snapshot, backend="cuda")
        results.append([value, *gradients(value, inputs, random_like(value, 1)).values()])
    assert results[0][0].any()
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)
    same = PolicyInputs(inputs.q.detach()[order], k[order], {}).requires_grad_()
    value = attention_divergence(same.q, same.k, snapshots[1], backend="cuda")
    at_reference.assert_exactly_zero(value, same)


# -- rows that have no gradient, and weights that are not finite -----------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_windows_that_differ(kind: str, cuda_on_host: Kernels) -> None:
    """Blocks of keys that one side alone sees; infinite rows, whose gradient may be NaN."""
    inputs = tile_case("", 150, 280).inputs(torch.bfloat16).requires_grad_()
    for mine, others in ((None, 20), (20, None), (20, 100)):
        snapshot = AttentionSnapshot(inputs.q.detach() * 0.5, inputs.k.detach(), window=others)
        results = []
        for backend, dtype in (("cuda", torch.bfloat16), ("reference", torch.float64)):
            now = inputs.to(dtype).requires_grad_()
            r = AttentionSnapshot(snapshot.q.to(dtype), snapshot.k.to(dtype), window=others)
            value = attention_divergence(now.q, now.k, r, kind, window=mine, backend=backend)
            dvalue = random_like(value, 3).masked_fill(value.isinf(), float("nan"))
            results.append((value, *gradients(value, now, dvalue).values()))
        (value, *grads), (wanted, *wanted_grads) = results
        assert torch.equal(value.isinf(), wanted.isinf())
        assert wanted.isinf().any() == ((kind == "kl") == (mine is None) and kind != "jsd")
        finite = ~wanted.isinf()
        torch.testing.assert_close(value[finite].double(), wanted[finite], rtol=1e-4, atol=1e-6)
        for x, y in zip(grads, wanted_grads, strict=True):
            assert x.isfinite().all()
            assert common.relative_error(x, y) < 2e-2 if y.any() else not x.any()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_policy_are_zero(kind: str, cuda_on_host: Kernels) -> None:
    inputs = of_dim(BY_NAME["mha"], 64).inputs(torch.bfloat16)
    other = snapshot_inputs(of_dim(BY_NAME["mha"], 64), inputs, False)
    empty = torch.arange(61) < 7
    for case in ("policy", "reference"):
        q, old = inputs.q, other.q
        if case == "policy":  # all weight on the own key: Z underflows
            q = torch.where(empty[:, None], inputs.k[:, :, -61:] * 1e3, q)
        else:
            old = torch.where(empty[:, None], other.k[:, :, -61:] * 1e3, old)
        q = q.detach().requires_grad_()
        value = attention_divergence(
            q, inputs.k, AttentionSnapshot(old, other.k), kind, backend="cuda"
        )
        assert not value[:, empty].any() and (value[:, ~empty] > 0).all()
        (dq,) = torch.autograd.grad(value.sum(), q)
        assert dq.isfinite().all() and not dq[:, :, empty].any() and dq.any()


def test_padding_may_hold_anything(cuda_on_host: Kernels) -> None:
    """Padded keys are not read, so that NaN there does no harm."""
    inputs = of_dim(BY_NAME["padding_left"], 64).inputs(torch.bfloat16)
    other = snapshot_inputs(of_dim(BY_NAME["padding_left"], 64), inputs, False)
    results = []
    for fill in (0.0, float("nan")):
        padded = ~inputs.options["key_padding_mask"][:, None, :, None]
        now = PolicyInputs(inputs.q, inputs.k.masked_fill(padded, fill), inputs.options)
        now.requires_grad_()
        old = common.snapshot_of(PolicyInputs(other.q, other.k.masked_fill(padded, fill), {}))
        value = attention_divergence(now.q, now.k, old, backend="cuda", **now.options)
        results.append([value, *gradients(value, now, random_like(value, 1)).values()])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y) and x.isfinite().all()


# -- the loss --------------------------------------------------------------------------------------

LOSS_CASES = [replace(case, head_dim=64) for case in of_loss.CASES if "softcap" not in case.options]


@pytest.mark.parametrize("case", LOSS_CASES, ids=lambda case: case.name)
def test_loss_as_the_separate_backward(case: of_loss.Case, cuda_on_host: Kernels) -> None:
    of_loss.test_same_as_the_separate_backward(case, torch.bfloat16, "cuda")
    assert cuda_on_host.calls["loss"] > 0


@pytest.mark.parametrize("case", LOSS_CASES[:4], ids=lambda case: case.name)
def test_accuracy_of_the_loss(case: of_loss.Case, cuda_on_host: Kernels) -> None:
    of_loss.test_accuracy(replace(case, head_dim=128), "cuda")


def test_a_snapshot_keeps_its_normalisers(cuda_on_host: Kernels) -> None:
    of_loss.test_a_snapshot_keeps_its_normalisers(LOSS_CASES[0], torch.bfloat16, "cuda")


# -- chunks of rows, order of threads --------------------------------------------------------------


def all_results(case: PolicyCase, dtype: torch.dtype) -> list[Tensor]:
    """Value, gradients, and the same of the loss where it has kernels of its own."""
    inputs = case.inputs(dtype).requires_grad_()
    old = common.snapshot_of(snapshot_inputs(case, inputs, True, 64))
    value = attention_divergence(inputs.q, inputs.k, old, backend="cuda", **inputs.options)
    found = [value, *gradients(value, inputs, random_like(value, 1)).values()]
    weights = random_like(value, 2)
    loss = ral_loss(inputs.q, inputs.k, old, weights, backend="cuda", **inputs.options)
    return [*found, loss, *torch.autograd.grad(loss, (inputs.q, inputs.k))]


SEVERAL = tile_case("", 140, 200, "batch", batch_size=3, key_padding="left", head_dim=64)


@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
def test_chunks_of_rows(
    dtype: torch.dtype, cuda_on_host: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once, two samples of three, and 64 rows of a sample: dk goes from chunk to chunk."""
    found = []
    for limit in (cuda.CHUNK, 2 * 192 * (256 + 2 * 4), 1):
        monkeypatch.setattr(cuda, "CHUNK", limit)
        found.append(all_results(SEVERAL, dtype))
    for other in found[1:]:
        for i, (x, y) in enumerate(zip(found[0], other, strict=True)):
            if i in (2, 5):  # dk
                torch.testing.assert_close(x, y, rtol=2e-2, atol=1e-6)
            else:
                assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
def test_any_order_of_threads_gives_the_same_bits(
    dtype: torch.dtype, cuda_on_host: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "CHUNK", 1)
    case = tile_case("", 70, 600, num_kv_heads=1)  # in pieces, too
    found = []
    for order in range(3):
        cuda_on_host.set_order(order)
        found.append(all_results(case, dtype))
    for other in found[1:]:
        for x, y in zip(found[0], other, strict=True):
            assert torch.equal(x, y)


# -- what has no kernel, what is wrong -------------------------------------------------------------


def test_refusals(cuda_on_host: Kernels) -> None:
    q, k = torch.randn(1, 2, 5, 64).bfloat16(), torch.randn(1, 1, 7, 64).bfloat16()
    snapshot = AttentionSnapshot(q, k)
    for wrong, options, reason in (
        ((q, k, AttentionSnapshot(q, k, softcap=2.0)), {}, "softcap is not supported"),
        ((q, k, snapshot), {"softcap": 2.0}, "softcap is not supported"),
        ((q.float(), k.float(), snapshot), {}, "supports bfloat16 and float16; got float32"),
        ((q[..., :32], k[..., :32], snapshot), {}, "head dims 64 and 128 are supported; got 32"),
        (
            (q, k, AttentionSnapshot(q[..., :32], k[..., :32])),
            {},
            "reference policy: head dims 64 and 128 are supported; got 32",
        ),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            attention_divergence(*wrong, backend="cuda", **options)  # type: ignore[arg-type]


BUGS: list[tuple[str, Patch, str | None]] = [
    (
        "no_barrier_before_the_stage",
        ("policy/terms.h", "sync_block();  // queries and keys are no longer read", ""),
        "race: policy_terms_kernel",
    ),
    (
        "own_key_of_the_next_row",
        ("policy/side.h", "row + visibility.offset - first", "row + 1 + visibility.offset - first"),
        None,
    ),
]


@pytest.mark.parametrize(("patch", "report"), [b[1:] for b in BUGS], ids=[b[0] for b in BUGS])
def test_seeded_bug_is_found(patch: Patch, report: str | None, build_folder: Path) -> None:
    library = host_library(build_folder, (patch,), POLICY)
    with on_host(library), pytest.raises(AssertionError, match=report or "error") as caught:
        common.check_case(of_dim(BY_NAME["off_blocks"], 64), HALF[0], "cuda", "jsd", False)
    assert isinstance(caught.value, Violation) == (report is not None)
