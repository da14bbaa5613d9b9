"""`AttentionTarget` in the CUDA kernels of `policy_divergence`, run by the harness: against eager
PyTorch in float64, and what is particular to tiles, chunks of rows and packed parts."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ral_kernels as rk
from ral_kernels.ops.policy import attention_divergence, cuda, ral_loss
from ral_kernels.ops.policy.c_structs import DivergenceParams
from tests.cuda_host.backend import POLICY, Kernels, Violation, host_library, on_host
from tests.cuda_host.build import Patch
from tests.cuda_host.test_policy_divergence import HALF, SEVERAL, of_dim, tile_case
from tests.cuda_host.test_seeded_bugs import FEWER
from tests.ops import test_targets as common
from tests.ops.packed_cases import BY_NAME as PACKED
from tests.ops.policy_cases import BY_NAME, PolicyCase
from tests.ops.target_cases import dense, target_of
from tests.ops.test_policy_triton import LargestTensor

BF16, FP16 = HALF
SLOW = pytest.mark.slow(stands_in="test_against_a_target")

# Keys off and on 16 bytes, tiles of 64 rows and 128 keys, and what decides which keys are valid.
TILES = {
    "off_16_bytes": tile_case("", 70, 150, "batch", batch_size=2, num_kv_heads=1),
    "on_blocks": tile_case("", 128, 256, num_kv_heads=1),
    "window": tile_case("", 66, 300, options={"window": (70, 3), "is_causal": False}),
    "padding": tile_case("", 70, 140, batch_size=2, key_padding="left", head_dim=128),
}
# A warp has every fourth row of a tile: targets that change from row to row, and that do not.
RUNS = [
    ("off_16_bytes", "indexed", "jsd", BF16, True),
    ("on_blocks", "shared", "kl", FP16, False),
    ("window", "scaled", "reverse_kl", BF16, False),
    ("padding", "sparse", "cross_entropy", FP16, False),
]
MORE = [
    ("on_blocks", "shared", "cross_entropy", BF16, True),
    ("window", "sparse", "jsd", BF16, True),
    ("padding", "indexed", "kl", BF16, False),
    ("off_16_bytes", "scaled", "cross_entropy", FP16, False),
]


@pytest.mark.parametrize(
    ("tile", "form", "kind", "dtype", "through_loss"),
    [*RUNS, *(pytest.param(*run, marks=SLOW) for run in MORE)],
)
def test_against_a_target(
    tile: str, form: str, kind: str, dtype: torch.dtype, through_loss: bool, cuda_on_host: Kernels
) -> None:
    common.check_case(TILES[tile].inputs(dtype), form, kind, "cuda", through_loss)
    expected = {"loss": 1} if through_loss else {"fwd": 1, "bwd": 1}
    assert cuda_on_host.calls == expected


@pytest.mark.parametrize(
    ("name", "form", "kind"),
    [
        pytest.param("length_2", "sparse", "jsd", marks=SLOW),
        pytest.param("gqa_7", "indexed", "cross_entropy", marks=SLOW),
        pytest.param("scope_nothing", "shared", "reverse_kl", marks=SLOW),
        pytest.param("decode", "scaled", "jsd", marks=SLOW),
        pytest.param("rows_middle", "indexed", "kl", marks=SLOW),
    ],
)
def test_cases_of_the_op(name: str, form: str, kind: str, cuda_on_host: Kernels) -> None:
    common.check_case(of_dim(BY_NAME[name], 64).inputs(BF16), form, kind, "cuda")


# All sequences together, or each in a call of its own, whose keys are some of the target's.
@pytest.mark.parametrize(
    ("name", "form", "kind", "limit", "through_loss"),
    [
        ("ragged", "sparse", "cross_entropy", 1, False),
        pytest.param("scope", "indexed", "jsd", 1, True, marks=SLOW),
        pytest.param("tail", "shared", "kl", cuda.CHUNK, True, marks=SLOW),
        pytest.param("many_short", "sparse", "reverse_kl", 3000, False, marks=SLOW),
    ],
)
def test_packed(
    name: str,
    form: str,
    kind: str,
    limit: int,
    through_loss: bool,
    cuda_on_host: Kernels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "CHUNK", limit)
    inputs = replace(PACKED[name], head_dim=64).inputs(BF16)
    common.check_case(inputs, form, kind, "cuda", through_loss)


def results(case: PolicyCase, target: rk.AttentionTarget, kind: str = "jsd") -> list[Tensor]:
    inputs = case.inputs(BF16).requires_grad_()
    return common.results(inputs, target, kind, "cuda")


def test_sparse_and_dense_give_the_same_bits(cuda_on_host: Kernels) -> None:
    case = TILES["padding"]
    sparse = target_of("sparse", case.inputs(BF16))
    same = rk.AttentionTarget(dense(sparse, 140), index=sparse.index)
    first = results(case, sparse)
    assert sparse.ids is not None and first[0].any() and first[1].any()
    common.assert_equal(first, results(case, same))


@SLOW
@pytest.mark.parametrize("form", ["indexed", "sparse"])
def test_chunks_of_rows_and_orders_of_threads(
    form: str, cuda_on_host: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once, two samples of three, and 64 rows of a sample: dk goes from chunk to chunk."""
    target = target_of(form, SEVERAL.inputs(BF16))
    found = []
    for order, limit in enumerate((cuda.CHUNK, 2 * 192 * (256 + 2 * 4), 1)):
        cuda_on_host.set_order(order)
        monkeypatch.setattr(cuda, "CHUNK", limit)
        found.append(results(SEVERAL, target))
    for other in found[1:]:
        for i, (x, y) in enumerate(zip(found[0], other, strict=True)):
            if i in (2, 5):  # dk
                torch.testing.assert_close(x, y, rtol=2e-2, atol=1e-6)
            else:
                assert torch.equal(x, y)


@pytest.mark.parametrize("sparse", [False, pytest.param(True, marks=SLOW)])
def test_rows_without_a_target(sparse: bool, cuda_on_host: Kernels) -> None:
    """An index of -1, or no weight on valid keys: 0, and no gradient, even of a NaN."""
    inputs = tile_case("", 30, 140).inputs(BF16).requires_grad_()
    values = torch.rand(1, 3, 140, generator=torch.Generator().manual_seed(1)) + 0.1
    values[0, 1, :120] = 0.0  # rows stand at keys 110 to 139: some see none of the others
    values[0, 2] *= 1e-38  # less than 2**-100 counts as none
    index = torch.arange(30)[None] % 4 - 1
    ids = torch.arange(140).expand(1, 3, -1) if sparse else None
    target = rk.AttentionTarget(values, ids, index=index)
    without = (index == -1) | (index == 2) | ((index == 1) & (torch.arange(110, 140) <= 120))
    value = attention_divergence(inputs.q, inputs.k, target, "cross_entropy", backend="cuda")
    assert not value[without].any() and (value[~without] > 0).all()
    dvalue = torch.where(without, float("nan"), 1.0)
    dq, dk = torch.autograd.grad(value, (inputs.q, inputs.k), dvalue)
    assert dq.isfinite().all() and dk.isfinite().all()
    assert not dq[0].mT[:, :, without[0]].any()
    assert dq[0].mT[:, :, ~without[0]].any(1).all()


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_no_tensor_of_rows_times_keys(
    sparse: bool, cuda_on_host: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scratch is a chunk of l, dq in pieces, and what is kept per row. Nothing is launched."""
    num_rows, seqlen_k = 4096, 16384
    q = torch.empty(1, 2, num_rows, 64).bfloat16().requires_grad_()
    k = torch.empty(1, 2, seqlen_k, 64).bfloat16().requires_grad_()
    target = rk.AttentionTarget(torch.ones(1, 1, seqlen_k))
    if sparse:
        index = torch.arange(num_rows)[None]
        ids = torch.arange(4).expand(1, num_rows, -1)
        target = rk.AttentionTarget(torch.ones(1, num_rows, 4), ids, index=index)
    scratch: list[int] = []

    def count(op: str, name: str, params: DivergenceParams, part: object) -> None:
        function = getattr(cuda_on_host.functions, f"{name}_scratch")
        function.restype = ctypes.c_int64
        scratch.append(function(ctypes.byref(params), ctypes.c_int64(cuda.CHUNK)))

    monkeypatch.setattr(cuda, "_run", count)
    with LargestTensor() as largest:
        ral_loss(q, k, target, torch.ones(1), backend="cuda").backward()
    assert largest.numel <= k.numel() and len(scratch) == 1
    assert cuda.CHUNK / 2 < scratch[0] < 1.5 * cuda.CHUNK < num_rows * seqlen_k / 5


BUGS: dict[str, tuple[Patch, str | None]] = {
    "no_barrier_after_zeros": (
        ("policy/target.h", "sync_block();  // ids of a target are distinct", "// "),
        "race: policy_target_rows_kernel",
    ),
    "target_of_the_row_before": (
        ("policy/target.h", "if (g != loaded_ && g >= 0)", "if (loaded_ < 0 && g >= 0)"),
        None,
    ),
}


@SLOW
@pytest.mark.parametrize("name", BUGS)
def test_seeded_bug_is_found(name: str, build_folder: Path) -> None:
    patch, report = BUGS[name]
    # float16 and head dim 64 are what FEWER leaves
    library = host_library(build_folder, (patch, *FEWER), POLICY)
    form = "sparse" if report else "indexed"
    with on_host(library), pytest.raises(AssertionError, match=report or "error") as caught:
        common.check_case(TILES["window"].inputs(FP16), form, "jsd", "cuda")
    assert isinstance(caught.value, Violation) == (report is not None)
