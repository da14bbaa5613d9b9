"""Every kernel once on small shapes, forward and backward.

`points.py` holds the results against float64; compute-sanitizer watches the same calls
(`sanitizer.py`). Lengths lie off the block sizes, tensors have gaps, and some keys are hidden.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import ral_kernels as rk
from ral_kernels.ops.divergence.arguments import KINDS, Kind
from ral_kernels.runtime import cuda_library

BATCH, HEADS, KV_HEADS = 2, 4, 2
BACKENDS = ("triton", "cuda", "hopper")  # hopper: backend="cuda" with RAL_CUDA_HOPPER=1
Results = dict[str, Tensor]


class Small:
    """The inputs of one call on one backend: drawn alike for every backend and device.

    Args:
        device: of all tensors.
        dtype: of q, k, v; their values are those that `rounded` has, default `dtype`.
        seqlen: of queries and keys.
        backend: one of BACKENDS, or "reference".
        head_dim: of q, k, v.
        rounded: what inputs are rounded to before they are converted to `dtype`.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        seqlen: int,
        backend: str = "triton",
        head_dim: int = 64,
        rounded: torch.dtype | None = None,
    ) -> None:
        self.device, self.dtype, self.seqlen, self.head_dim = device, dtype, seqlen, head_dim
        self.backend: Any = "cuda" if backend == "hopper" else backend
        self.rounded = rounded or dtype
        self.leaves: Results = {}
        self.generator = torch.Generator().manual_seed(0)
        if backend in ("cuda", "hopper"):
            os.environ["RAL_CUDA_HOPPER"] = "1" if backend == "hopper" else "0"

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)

    def leaf(self, name: str, values: Tensor) -> Tensor:
        self.leaves[name] = values.detach().requires_grad_()
        return self.leaves[name]

    def heads(self, heads: int, length: int, head_dim: int | None = None) -> Tensor:
        """[B, heads, length, D], token-major memory."""
        memory = self.normal(BATCH, length, heads, head_dim or self.head_dim)
        return memory.to(self.rounded).to(self.dtype).transpose(1, 2)

    def qkv(self, seqlen_q: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        q = self.leaf("q", self.heads(HEADS, self.seqlen if seqlen_q is None else seqlen_q))
        k, v = (self.leaf(name, self.heads(KV_HEADS, self.seqlen)) for name in "kv")
        return q, k, v

    def spans(self, kind: str = "contiguous") -> rk.Spans:
        keys = torch.arange(self.seqlen, device=self.device)
        return rk.Spans(keys % 6 - 1 if kind == "scattered" else keys * 5 // self.seqlen, 5)

    def mask(self) -> Tensor:
        return (torch.arange(self.seqlen, device=self.device) > 3).expand(BATCH, -1)

    def exact(self) -> bool:
        return self.dtype == torch.float64


Call = Callable[[Small], Results]


def _attention(small: Small, variant: str) -> Results:
    q, k, v = small.qkv(1 if variant == "decoding" else None)
    spans: rk.Spans | None = small.spans("scattered" if variant == "scattered" else "contiguous")
    options: dict[str, Any] = {"is_causal": True}
    if variant == "no spans":
        spans = None
    if variant == "span bias":
        options["span_bias"] = small.leaf("span_bias", small.normal(5))
    if variant in ("masks", "masks and softcap"):
        options.update(window=30, key_padding_mask=small.mask())
    if variant == "masks and softcap":
        options["softcap"] = 5.0
    result = rk.attention(q, k, v, spans, backend=small.backend, **options)
    found = {"out": result.out, "lse": result.lse}
    return found if result.marginals is None else {**found, "marginals": result.marginals}


def _packed(small: Small) -> Results:
    q, k, v = (
        small.leaf(name, x.detach()[0].transpose(0, 1))
        for name, x in zip("qkv", small.qkv(), strict=True)
    )
    bounds = torch.tensor([0, 7, 7, small.seqlen], dtype=torch.int32, device=small.device)
    # The drop-in has no backend to ask for: the CUDA kernels come first once they are measured.
    with mock.patch.object(cuda_library, "MEASURED", small.backend == "cuda"):
        out, marginals = rk.flash_attn_varlen_func(
            q, k, v, bounds, bounds, small.seqlen, small.seqlen, causal=True, spans=small.spans()
        )
    return {"out": out, "marginals": marginals}


def _policy(small: Small, spans: bool) -> Results:
    q, k, _ = small.qkv()
    small.leaves.pop("v")
    options: dict[str, Any] = {"key_padding_mask": small.mask()}
    if spans:
        bias = small.leaf("span_bias", small.normal(5))
        options.update(spans=small.spans(), span_bias=bias)
    return {"p": rk.attention_policy(q, k, backend=small.backend, **options)}


def _divergence(small: Small, kind: Kind) -> Results:
    rows = (small.normal(3, small.seqlen).softmax(-1) for _ in range(2))
    p, r = (row.double() if small.exact() else row for row in rows)
    return {"value": rk.divergence(small.leaf("p", p), r, kind, backend=small.backend)}


def _objective(small: Small, kind: Kind, loss: bool) -> Results:
    q, k, _ = small.qkv()
    small.leaves.pop("v")
    # The policy's and the reference's head dims may differ; CUDA C++ has kernels for 64 and 128.
    head_dim = 192 - small.head_dim
    teacher = rk.AttentionSnapshot(
        small.heads(6, small.seqlen, head_dim), small.heads(3, small.seqlen, head_dim)
    )
    if not loss:
        value = rk.attention_divergence(q, k, teacher, kind, backend=small.backend)
        return {"value": value}
    advantages = small.normal(BATCH, small.seqlen)
    return {"loss": rk.ral_loss(q, k, teacher, advantages, kind=kind, backend=small.backend)}


def calls(backend: str) -> dict[str, Call]:
    """Name -> call, all ops that a backend of BACKENDS has."""
    found: dict[str, Call] = {}
    variants = ["spans", "no spans", "scattered", "masks", "decoding"]
    if backend == "triton":
        variants += ["masks and softcap", "span bias"]
    for variant in variants:
        found[f"attention {variant}"] = partial(_attention, variant=variant)
    found["attention packed"] = _packed
    if backend == "hopper":
        return found
    for kind in KINDS:
        found[f"policy_divergence {kind}"] = partial(_objective, kind=kind, loss=False)
        found[f"loss {kind}"] = partial(_objective, kind=kind, loss=True)
    if backend == "triton":
        found["policy over keys"] = partial(_policy, spans=False)
        found["policy over spans"] = partial(_policy, spans=True)
        for kind in KINDS:
            found[f"divergence {kind}"] = partial(_divergence, kind=kind)
    return found


def is_wide(backend: str, call: str) -> bool:
    """Whether a call has kernels of its own for head dim 256."""
    return backend != "triton" and call.startswith("attention")


def run(call: Call, small: Small) -> Results:
    """The outputs of a call, and as `d<name>` the gradients of its inputs."""
    outputs = call(small)
    upstream = [small.normal(*x.shape).to(x.dtype) for x in outputs.values()]
    gradients = torch.autograd.grad(
        list(outputs.values()), list(small.leaves.values()), upstream, allow_unused=True
    )
    found = {name: x.detach() for name, x in outputs.items()}
    named: Mapping[str, Tensor | None] = dict(zip(small.leaves, gradients, strict=True))
    return found | {f"d{name}": x for name, x in named.items() if x is not None}
