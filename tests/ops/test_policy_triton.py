"""What only the Triton backend of `policy` and `policy_divergence` has: blocks, scratch, tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ral_kernels as rk
from ral_kernels.ops.policy import attention_divergence, attention_policy, ral_loss
from ral_kernels.ops.policy.triton import tiles as triton_tiles
from ral_kernels.runtime import triton_runtime
from ral_kernels.snapshot import AttentionSnapshot
from tests.conftest import skip_or_fail
from tests.ops.policy_cases import BY_NAME


@pytest.fixture(autouse=True)
def triton_here() -> None:
    reason = rk.available_backends()["triton"]
    if reason != "yes":
        skip_or_fail("triton", reason)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that an operator made."""

    numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and "view" not in func.name() and "expand" not in func.name():
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("objective", ["divergence", "loss", "spans"])
def test_no_tensor_of_rows_times_keys(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches on an H200 are counted, and not run."""
    monkeypatch.setattr(triton_runtime, "launch", lambda *args, **kwargs: None)
    monkeypatch.setattr(triton_runtime, "architecture", lambda device: "sm_90")
    num_rows, seqlen_k, heads = 2048, 16384, 4
    q = torch.empty(2, heads, num_rows, 16, requires_grad=True)
    k = torch.empty(2, 2, seqlen_k, 16, requires_grad=True)
    with LargestTensor() as largest:
        if objective == "spans":
            spans = rk.Spans.from_lengths([128] * (seqlen_k // 128))
            attention_policy(q, k, spans=spans, backend="triton").sum().backward()
        elif objective == "loss":
            ral_loss(q, k, AttentionSnapshot(q, k), torch.ones(2), backend="triton").backward()
        else:
            snapshot = AttentionSnapshot(q, k)
            attention_divergence(q, k, snapshot, backend="triton").sum().backward()
    bound = max(triton_tiles.scratch_elements("sm_90"), 128 * seqlen_k)
    assert largest.numel <= bound < num_rows * seqlen_k / 3


# -- blocks of keys that need masks, and others ----------------------------------------------------

# Two blocks of 64 rows and three of 128 keys; the rows stand at keys 258 to 327.
NUM_ROWS, NUM_KEYS = 70, 328


def drawn(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k = (
        torch.randn(2, h, t, 16, generator=generator, dtype=torch.float64).to(dtype)
        for h, t in ((2, NUM_ROWS), (1, NUM_KEYS))
    )
    return q.requires_grad_(), k.requires_grad_()


def masks(*lengths: int, first: bool) -> Tensor:
    """[2, N], alternately `first` and not for so many keys; all True in sample 1."""
    values = torch.arange(len(lengths)) % 2 == (0 if first else 1)
    mask = torch.ones(2, NUM_KEYS, dtype=torch.bool)
    mask[0] = values.repeat_interleave(torch.tensor(lengths))
    return mask


# Whole blocks of padding and outside the scope, blocks with both kinds of keys, and clean ones.
PADDING = masks(150, 178, first=False)
SCOPE = masks(128, 128, 20, 52, first=False)
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {},
    "padding": {"key_padding_mask": PADDING},
    "scope": {"scope": SCOPE},
    "padding_and_scope": {"key_padding_mask": PADDING, "scope": SCOPE},
    "window": {"window": 140, "exclude_self": False},
    "window_both": {"window": (200, 30), "is_causal": False},
    "not_causal": {"is_causal": False},
    "with_self": {"is_causal": False, "exclude_self": False, "softcap": 2.0},
}
SLOW = pytest.mark.slow(stands_in="test_blocks")
Results = list[Tensor]


def policy_and_gradients(backend: str, dtype: torch.dtype, **options: Any) -> Results:
    q, k = drawn(0, dtype)
    p = attention_policy(q, k, backend=backend, **options)
    dp = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    return [p.detach(), *torch.autograd.grad(p, (q, k), dp.to(dtype))]


def loss_and_gradients(backend: str, dtype: torch.dtype, **options: Any) -> Results:
    q, k = drawn(0, dtype)
    window = {x: options[x] for x in ("window", "is_causal", "softcap") if x in options}
    snapshot = AttentionSnapshot(*drawn(2, dtype), **window)
    loss = ral_loss(q, k, snapshot, torch.tensor([1.0, -2.0]), backend=backend, **options)
    return [loss.detach(), *torch.autograd.grad(loss, (q, k))]


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (policy_and_gradients, "padding_and_scope"),
        (loss_and_gradients, "window_both"),
        *(
            pytest.param(run, name, marks=SLOW)
            for run in (policy_and_gradients, loss_and_gradients)
            for name in OPTIONS
        ),
    ],
)
def test_blocks(run: Callable[..., Results], name: str) -> None:
    """Values and gradients are those of float64, whichever blocks go without masks."""
    found = run("triton", torch.float32, **OPTIONS[name])
    wanted = run("reference", torch.float64, **OPTIONS[name])
    for i, (x, y) in enumerate(zip(found, wanted, strict=True)):
        error, size = float((x - y).abs().max()), float(y.abs().max())
        assert error <= 3e-6 * size, f"result {i}: {error} of {size}"


@pytest.mark.slow(stands_in="test_blocks")
def test_flags_that_hide_nothing_change_no_bit() -> None:
    nothing = torch.ones(2, NUM_KEYS, dtype=torch.bool)
    plain = policy_and_gradients("triton", torch.float32)
    flagged = policy_and_gradients(
        "triton", torch.float32, key_padding_mask=nothing, scope=nothing[0]
    )
    for x, y in zip(plain, flagged, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "poison",
    [
        float("nan"),
        pytest.param(
            float("inf"),
            marks=pytest.mark.slow(
                stands_in="test_gradients_of_keys_that_do_not_count_may_be_anything"
            ),
        ),
    ],
)
def test_gradients_of_keys_that_do_not_count_may_be_anything(poison: float) -> None:
    """Padding, keys outside the scope, the row's own, later ones, and those without weight."""
    options = OPTIONS["padding_and_scope"]
    q, k = drawn()
    with torch.no_grad():
        k[:, :, 210] *= 150  # some rows look at it alone, and others at all but it
    p = attention_policy(q, k, backend="triton", **options)
    dp = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    found = [
        torch.autograd.grad(p, (q, k), torch.where(p == 0, x, dp), retain_graph=True)
        for x in (0.0, poison)
    ]
    assert (p[:, :, 220:258] == 0).any() and (p[:, :, 220:258] != 0).any()
    for x, y in zip(*found, strict=True):
        assert x.any() and torch.equal(x, y)


# -- launches, which are looked at and not run -----------------------------------------------------


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """(kernel, arguments) of the launches on an H200."""
    found: list[tuple[str, dict[str, Any]]] = []

    def launch(
        kernel: Any, grid: Any, arguments: dict[str, Any], *more: Any, **options: Any
    ) -> None:
        found.append((kernel.__name__, arguments))

    monkeypatch.setattr(triton_runtime, "launch", launch)
    monkeypatch.setattr(triton_runtime, "architecture", lambda device: "sm_90")
    return found


@pytest.mark.parametrize("seqlen_k", [513, 516])
@pytest.mark.parametrize("fused", [False, True], ids=["policy", "loss"])
def test_rows_of_dp_are_aligned(
    fused: bool, seqlen_k: int, launched: list[tuple[str, dict[str, Any]]]
) -> None:
    """Scratch is, for every N; a gradient from outside, where N is a multiple of 4."""
    q = torch.empty(1, 4, 32, 16, requires_grad=True)
    k = torch.empty(1, 2, seqlen_k, 16, requires_grad=True)
    if fused:
        ral_loss(q, k, AttentionSnapshot(q, k), torch.ones(1), backend="triton").backward()
    else:
        attention_policy(q, k, backend="triton").sum().backward()
    readers = [arguments["dp"] for _, arguments in launched if "dp" in arguments]
    assert len(readers) == 3  # sums, dq, dk
    for dp in readers:
        assert dp.ALIGNED.value == (fused or seqlen_k % 4 == 0)
        assert dp.ALIGNED.value == (dp.stride_t % 4 == 0)


def test_chunks_have_whole_blocks_of_rows(launched: list[tuple[str, dict[str, Any]]]) -> None:
    """128 rows at 128k keys, where 64 would leave half of a block of dq empty."""
    q = torch.empty(1, 2, 300, 16, requires_grad=True)
    k = torch.empty(1, 2, 2**17, 16, requires_grad=True)
    ral_loss(q, k, AttentionSnapshot(q, k), torch.ones(1), backend="triton").backward()
    rows = [x["num_rows"] for name, x in launched if name == "policy_bwd_dq_kernel"]
    assert rows == [128, 128, 44]


OTHERS = pytest.mark.slow(stands_in="test_padding_keys_may_hold_anything")


@pytest.mark.parametrize(
    "poison", [float("nan"), *(pytest.param(x, marks=OTHERS) for x in (float("inf"), -1e30))]
)
def test_padding_keys_may_hold_anything(poison: float) -> None:
    inputs = BY_NAME["padding_right"].inputs(torch.float32)
    hidden = ~inputs.options["key_padding_mask"][:, None, :, None]

    def run(k: Tensor) -> list[Tensor]:
        leaves = (inputs.q.detach().requires_grad_(), k.requires_grad_())
        snapshot = AttentionSnapshot(inputs.q * 0.5, k)
        p = attention_policy(*leaves, backend="triton", **inputs.options)
        value = attention_divergence(*leaves, snapshot, backend="triton", **inputs.options)
        return [p, value, *torch.autograd.grad(p.square().sum() + value.sum(), leaves)]

    for a, b in zip(run(inputs.k.clone()), run(inputs.k.masked_fill(hidden, poison)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("architecture", triton_runtime.ARCHITECTURES)
@pytest.mark.parametrize("dtype", triton_runtime.DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("heavy", [False, True])
def test_every_kernel_has_a_tile(architecture: str, dtype: torch.dtype, heavy: bool) -> None:
    for kernel in triton_tiles.KERNELS:
        if kernel == "bias" and not heavy:
            continue  # its gradient comes with a bias
        for head_dim in (16, 32, 64, 128, 256):
            tile = triton_tiles.tile(kernel, architecture, dtype, head_dim, heavy)
            # wgmma and tcgen05 multiply 64 rows at least, mma.sync of sm_80 16
            least = 16 if architecture == "sm_80" else 64
            assert (tile.block_k if kernel == "dk" else tile.block_q) >= least
