"""The compiled CUDA library from Python: what it takes, and what is said when it fails."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ral_kernels as rk
from ral_kernels.runtime import backends, cuda_library, native
from tests.conftest import skip_or_fail

GPU = torch.cuda.is_available()
ATTENTION: Any = backends._tables["attention"]["cuda"]


def qkv(head_dim: int = 64, dtype: torch.dtype = torch.bfloat16, v_dim: int | None = None) -> Any:
    generator = torch.Generator().manual_seed(0)
    dims = (head_dim, head_dim, head_dim if v_dim is None else v_dim)
    return [torch.randn(1, 2, 5, d, generator=generator).to(dtype) for d in dims]


@pytest.fixture
def built() -> None:
    if (missing := native.why_missing("ral_cuda")) is not None:
        skip_or_fail("cuda", missing)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend takes CPU tensors for CUDA's: a launch fails before it sees them."""
    monkeypatch.setattr(ATTENTION, "available", lambda: None)
    monkeypatch.setattr(ATTENTION, "can_run", ATTENTION.has_no_kernel)
    monkeypatch.setattr(cuda_library, "on_device_of", lambda x: contextlib.nullcontext())
    monkeypatch.setattr(cuda_library, "stream", lambda x: 0)
    monkeypatch.setattr(cuda_library, "multiprocessors", lambda x: 132)


@pytest.mark.skipif(GPU, reason="launches do not fail here")
def test_a_launch_that_fails_names_kernel_and_shapes(built: None, pretended: None) -> None:
    """A real one: the runtime refuses to launch, because there is no device or no driver."""
    q, k, v = qkv()
    with pytest.raises(RuntimeError) as caught:
        rk.attention(q, k, v, backend="cuda")
    reason, shapes = str(caught.value).split("; ")
    assert reason.startswith("attention: backend 'cuda' failed: attention_fwd_kernel: ")
    assert "driver" in reason or "device" in reason
    assert shapes == "q (1, 2, 5, 64), k (1, 2, 5, 64), v (1, 2, 5, 64)"


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: (qkv(264), {}), "head dims 8 to 256 in steps of 8 are supported; got 264"),
        (lambda: (qkv(68), {}), "head dims 8 to 256 in steps of 8 are supported; got 68"),
        (lambda: (qkv(64, v_dim=264), {}), "in steps of 8 are supported; got 264"),
        (lambda: (qkv(dtype=torch.float32), {}), "supports bfloat16 and float16; got float32"),
    ],
    ids=("head_dim", "head_dim_off_8", "head_dim_v", "dtype"),
)
def test_what_has_no_kernel_is_refused(call: Any, reason: str, pretended: None) -> None:
    tensors, options = call()
    with pytest.raises(NotImplementedError) as caught:
        rk.attention(*tensors, backend="cuda", **options)
    assert str(caught.value).startswith("attention: backend 'cuda' cannot run this call: ")
    assert reason in str(caught.value)


def test_a_gpu_without_room_for_wide_heads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An A100 has 163 KiB of shared memory a CTA, an RTX 4090 has 99."""
    room = SimpleNamespace(shared_memory_per_block_optin=163 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: room)
    monkeypatch.setattr(ATTENTION, "available", lambda: None)
    monkeypatch.setattr(cuda_library, "cannot_run", lambda *tensors, head_dims: None)

    def ran(*args: Any) -> None:
        raise LookupError("the cuda backend was chosen")

    monkeypatch.setattr(ATTENTION, "fwd", ran)
    for head_dim in (128, 136):
        with pytest.raises(LookupError):
            rk.attention(*qkv(head_dim), backend="cuda")
    room.shared_memory_per_block_optin = 99 << 10
    with pytest.raises(LookupError):
        rk.attention(*qkv(128), backend="cuda")
    reason = "head dims above 128 need 128 KiB of shared memory a CTA; this GPU has 99 KiB"
    for dims in ((136, None), (64, 256)):
        with pytest.raises(NotImplementedError, match=reason):
            rk.attention(*qkv(dims[0], v_dim=dims[1]), backend="cuda")


def test_kernels_that_no_gpu_has_run_are_not_chosen(
    pretended: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The automatic choice passes them over; with measurements it would not."""

    def ran(*args: Any) -> None:
        raise LookupError("the cuda backend was chosen")

    monkeypatch.setattr(ATTENTION, "fwd", ran)
    monkeypatch.setattr(cuda_library, "MEASURED", False)
    assert rk.attention(*qkv()).out.isfinite().all()
    monkeypatch.setattr(cuda_library, "MEASURED", True)
    with pytest.raises(LookupError):
        rk.attention(*qkv())


def test_aligned() -> None:
    """Rows begin at multiples of 16 bytes; what does so already is not copied."""
    whole = torch.randn(2, 3, 5, 64).bfloat16()
    for good in (whole, whole.transpose(1, 2), whole[:, :, 1:], whole[:1, :1, :1]):
        assert cuda_library.aligned(good) is good
    gaps = torch.randn(2, 3, 5, 68).bfloat16()[..., :64]  # rows 136 bytes apart
    shifted = torch.randn(2 * 3 * 5 * 64 + 4).bfloat16()[4:].view(2, 3, 5, 64)
    for bad in (gaps, shifted, whole.transpose(2, 3)[..., :5]):
        made = cuda_library.aligned(bad)
        assert torch.equal(made, bad) and made.is_contiguous() and made.data_ptr() % 16 == 0
    assert cuda_library.aligned(shifted[:, :, :1].expand(2, 3, 5, 64)).data_ptr() % 16 == 0


def test_every_reason_why_it_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    def library_of(driver: int, runtime: int) -> Any:
        return lambda: SimpleNamespace(
            ral_cuda_versions=lambda found: found.__setitem__(slice(0, 2), (driver, runtime))
        )

    too_old = (
        "the library is linked with CUDA 13.0; got a driver for CUDA 12.8: update the driver, or "
        "build with an older nvcc"
    )
    for has_gpu, hip, capability, driver, reason in (
        (False, None, (9, 0), 13000, "torch sees no CUDA device"),
        (True, "6.0", (9, 0), 13000, "supports NVIDIA GPUs; got torch for ROCm 6.0"),
        (True, None, (7, 5), 13000, "needs compute capability 8.0 or newer; got 7.5"),
        (True, None, (9, 0), 12080, too_old),
        (True, None, (9, 0), 13000, None),
    ):
        monkeypatch.setattr(cuda_library, "library", library_of(driver, 13000))
        monkeypatch.setattr(torch.cuda, "is_available", lambda x=has_gpu: x)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda x=capability: x)
        assert cuda_library.available() == reason
