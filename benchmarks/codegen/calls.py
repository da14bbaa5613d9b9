"""The calls whose kernels are compiled: every op, its variants, dtypes and head dims.

The compiler sees shapes only in constants and in divisibility by 16. They are realistic here, and
small enough to allocate on any machine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import ral_kernels as rk
from ral_kernels.ops.divergence.arguments import KINDS, Kind
from ral_kernels.runtime.triton_runtime import ARCHITECTURES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEAD_DIMS = (64, 128, 256)
# float16 differs from bfloat16 in the type alone; these variants stand for the others there
MAIN_VARIANTS = (
    "spans",
    "no spans",
    "decoding",
    "keys",
    "jsd",
    "loss",
    "target jsd",
    "target loss",
)
SPANS, ROWS = 8, 256
SHORT_SPAN = 16  # keys of a span where spans are short


@dataclass(frozen=True)
class Sizes:
    """Heads, heads of k and v, tokens, and the keys of a step of decoding."""

    heads: int = 8
    kv_heads: int = 2
    seqlen: int = 1024
    decoded: int = 16384


COMPILED = Sizes()
COUNTED = tuple(Sizes(16, 2, n, n) for n in (4096, 16384))  # whose programs are counted


@dataclass(frozen=True)
class Call:
    """One public call, forward and where there is one backward, on tensors of the CPU."""

    op: str
    variant: str
    dtype: str
    head_dim: int
    run: Callable[[], None]

    @property
    def name(self) -> str:
        return f"{self.op} {self.variant} {self.dtype} {self.head_dim}"


def _normal(dtype: torch.dtype, *shape: int) -> Tensor:
    """Token-major memory, [B, H, T, D] seen, as a model's projections give it."""
    batch_size, heads, seqlen, head_dim = shape
    memory = torch.zeros(batch_size, seqlen, heads, head_dim, dtype=dtype)
    return memory.transpose(1, 2).requires_grad_()


def _backward(*outputs: Tensor | None) -> None:
    """Launch the backward of all that has a gradient; the values do not matter."""
    given = [output for output in outputs if output is not None]
    torch.autograd.backward(given, [torch.zeros_like(output) for output in given])


def _qkv(
    sizes: Sizes, dtype: torch.dtype, head_dim: int, rows: int | None = None, **more: int
) -> tuple[Tensor, Tensor, Tensor]:
    seqlen_q = sizes.seqlen if rows is None else rows
    head_dim_v = more.get("head_dim_v", head_dim)
    return (
        _normal(dtype, 1, sizes.heads, seqlen_q, head_dim),
        _normal(dtype, 1, sizes.kv_heads, sizes.seqlen, head_dim),
        _normal(dtype, 1, sizes.kv_heads, sizes.seqlen, head_dim_v),
    )


def _frames(seqlen: int) -> rk.Spans:
    return rk.Spans.from_lengths([seqlen // SPANS] * SPANS)


def _attention(sizes: Sizes, dtype: torch.dtype, head_dim: int, variant: str) -> None:
    options: dict[str, Any] = {"is_causal": True}
    spans: rk.Spans | None = _frames(sizes.seqlen)
    q, k, v = _qkv(sizes, dtype, head_dim, head_dim_v=64 if variant == "Dv = 64" else head_dim)
    if variant == "no spans":
        spans = None
    elif variant == "short spans":
        spans = rk.Spans.from_lengths([SHORT_SPAN] * (sizes.seqlen // SHORT_SPAN))
    elif variant == "span bias":
        options["span_bias"] = torch.zeros(1, sizes.heads, sizes.seqlen, SPANS, requires_grad=True)
    elif variant == "masks":
        padding = torch.ones(1, sizes.seqlen, dtype=torch.bool)
        mask = torch.zeros(1, 1, sizes.seqlen, sizes.seqlen)
        options.update(window=256, softcap=20.0, key_padding_mask=padding, attn_mask=mask)
    result = rk.attention(q, k, v, spans, backend="triton", **options)
    _backward(result.out, result.marginals, result.lse)


def _decode(sizes: Sizes, dtype: torch.dtype, head_dim: int) -> None:
    with torch.no_grad():
        q, k, v = _qkv(replace(sizes, seqlen=sizes.decoded), dtype, head_dim, 1)
        rk.attention(q, k, v, _frames(sizes.decoded), is_causal=True, backend="triton")


def _packed(sizes: Sizes, dtype: torch.dtype, head_dim: int) -> None:
    """Packed sequences; the drop-in takes the first backend."""
    q, k, v = (x.detach()[0].transpose(0, 1).requires_grad_() for x in _qkv(sizes, dtype, head_dim))
    bounds = torch.tensor([0, sizes.seqlen // 4, sizes.seqlen], dtype=torch.int32)
    out, lse, _, marginals = rk.flash_attn_varlen_func(
        q, k, v, bounds, bounds, sizes.seqlen, sizes.seqlen,
        causal=True, return_attn_probs=True, spans=_frames(sizes.seqlen),
    )  # fmt: skip
    _backward(out, lse, marginals)


def _offsets(sizes: Sizes) -> dict[str, Any]:
    """Two packed sequences of a policy, of different lengths."""
    rows, keys = ([0, n // 4, n] for n in (ROWS, sizes.seqlen))
    return {
        "cu_seqlens_q": torch.tensor(rows, dtype=torch.int32),
        "cu_seqlens_k": torch.tensor(keys, dtype=torch.int32),
    }


def _policy(sizes: Sizes, dtype: torch.dtype, head_dim: int, variant: str) -> None:
    q, k, _ = _qkv(sizes, dtype, head_dim, ROWS)
    options: dict[str, Any] = _offsets(sizes) if variant.startswith("packed") else {}
    if variant.endswith("spans"):
        bias = torch.zeros(1, sizes.heads, ROWS, SPANS, requires_grad=True)
        weights = torch.ones(sizes.heads, requires_grad=True)
        options.update(spans=_frames(sizes.seqlen), span_bias=bias, head_weights=weights)
    elif variant == "masks":
        scope, padding = (torch.ones(1, sizes.seqlen, dtype=torch.bool) for _ in range(2))
        options.update(scope=scope, key_padding_mask=padding, window=256, softcap=20.0)
    _backward(rk.attention_policy(q, k, backend="triton", **options))


def _divergence(sizes: Sizes, kind: Kind) -> None:
    p = torch.full((ROWS, sizes.seqlen), 1 / sizes.seqlen).requires_grad_()
    _backward(rk.divergence(p, p.detach(), kind, backend="triton"))


def _snapshot(
    sizes: Sizes, dtype: torch.dtype, head_dim: int, **offsets: Any
) -> rk.AttentionSnapshot:
    q, k, _ = _qkv(sizes, dtype, head_dim, ROWS)
    return rk.AttentionSnapshot(q, k, **offsets)


def _policy_divergence(
    sizes: Sizes,
    dtype: torch.dtype,
    head_dim: int,
    kind: Kind,
    reference_dim: int,
    packed: bool = False,
) -> None:
    q, k, _ = _qkv(sizes, dtype, head_dim, ROWS)
    offsets = _offsets(sizes) if packed else {}
    reference = _snapshot(sizes, dtype, reference_dim, **offsets)
    _backward(rk.attention_divergence(q, k, reference, kind, backend="triton", **offsets))


def _target(sizes: Sizes, ids: bool) -> rk.AttentionTarget:
    """A target for each span of rows, of all keys or of some."""
    values = torch.ones(1, SPANS, sizes.seqlen // 16 if ids else sizes.seqlen)
    keys = torch.arange(values.shape[2]).expand(values.shape) if ids else None
    return rk.AttentionTarget(values, keys, index=torch.arange(ROWS)[None] % SPANS)


def _against_target(
    sizes: Sizes,
    dtype: torch.dtype,
    head_dim: int,
    kind: Kind,
    ids: bool = False,
    packed: bool = False,
) -> None:
    """Forward alone: the backward is that against a snapshot."""
    q, k, _ = _qkv(sizes, dtype, head_dim, ROWS)
    offsets = _offsets(sizes) if packed else {}
    with torch.no_grad():
        rk.attention_divergence(q, k, _target(sizes, ids), kind, backend="triton", **offsets)


def _ral_loss(sizes: Sizes, dtype: torch.dtype, head_dim: int, with_target: bool) -> None:
    q, k, _ = _qkv(sizes, dtype, head_dim, ROWS)
    reference = _target(sizes, ids=True) if with_target else _snapshot(sizes, dtype, head_dim)
    _backward(rk.ral_loss(q, k, reference, torch.zeros(1, ROWS), backend="triton"))


def _of_model(
    sizes: Sizes, name: str, head_dim: int
) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """(op, variant, run) of the calls that take q and k, for one dtype and head dim."""
    dtype = DTYPES[name]
    variants = ["spans", "short spans", "no spans", "span bias"]
    policies = ["keys", "spans", "packed keys", "packed spans"]
    teacher = 128 if head_dim == 64 else 64
    if head_dim == 128:
        variants += ["masks", "Dv = 64"]
        policies += ["masks"]
    for variant in variants:
        yield "attention", variant, functools.partial(_attention, sizes, dtype, head_dim, variant)
    yield "attention", "packed", functools.partial(_packed, sizes, dtype, head_dim)
    yield "attention", "decoding", functools.partial(_decode, sizes, dtype, head_dim)
    for variant in policies:
        yield "policy", variant, functools.partial(_policy, sizes, dtype, head_dim, variant)
    for kind in KINDS:
        run = functools.partial(_policy_divergence, sizes, dtype, head_dim, kind, head_dim)
        yield "policy_divergence", kind, run
    run = functools.partial(_policy_divergence, sizes, dtype, head_dim, "jsd", teacher)
    yield "policy_divergence", f"teacher of {teacher}", run
    run = functools.partial(
        _policy_divergence, sizes, dtype, head_dim, "jsd", head_dim, packed=True
    )
    yield "policy_divergence", "packed", run
    for kind in KINDS:
        run = functools.partial(_against_target, sizes, dtype, head_dim, kind)
        yield "policy_divergence", f"target {kind}", run
        run = functools.partial(_against_target, sizes, dtype, head_dim, kind, ids=True)
        yield "policy_divergence", f"target ids {kind}", run
    run = functools.partial(_against_target, sizes, dtype, head_dim, "jsd", ids=True, packed=True)
    yield "policy_divergence", "packed target ids", run
    for variant, with_target in (("loss", False), ("target loss", True)):
        run = functools.partial(_ral_loss, sizes, dtype, head_dim, with_target)
        yield "policy_divergence", variant, run


def calls(sizes: Sizes = COMPILED) -> list[Call]:
    """The whole table, in the order in which it is shown."""
    table = [
        Call(op, variant, name, head_dim, run)
        for name in DTYPES
        for head_dim in HEAD_DIMS
        for op, variant, run in _of_model(sizes, name, head_dim)
        if name != "float16" or variant in MAIN_VARIANTS
    ]
    # head dims that are no powers of two: products in two parts, masks along them
    table += [
        Call(op, variant, "bfloat16", head_dim, run)
        for head_dim in (80, 96)
        for op, variant, run in _of_model(sizes, "bfloat16", head_dim)
        if variant in ("spans", "short spans", "no spans", "keys", "jsd", "decoding")
    ]
    # a row of probabilities has no head dim
    table += [
        Call("divergence", kind, "float32", 0, functools.partial(_divergence, sizes, kind))
        for kind in KINDS
    ]
    return table


# What the tests compile: each kernel and each dtype on each architecture, in the fewest calls. The
# variants and head dims left out differ in constants; `make codegen` has them all.
TESTED = (
    ("bfloat16", 128, "attention", "spans"),
    ("bfloat16", 128, "attention", "no spans"),
    ("bfloat16", 128, "attention", "decoding"),
    ("bfloat16", 128, "policy", "keys"),
    ("bfloat16", 128, "policy", "spans"),
    ("bfloat16", 128, "policy_divergence", "jsd"),
    ("bfloat16", 128, "policy_divergence", "target loss"),
    ("float16", 64, "attention", "spans"),
    ("float16", 64, "policy", "keys"),
    ("float32", 64, "attention", "spans"),
    ("float32", 64, "policy", "keys"),
    ("float32", 0, "divergence", "jsd"),
)
TESTED_ON_SM_90 = (
    ("bfloat16", 128, "attention", "short spans"),
    ("bfloat16", 128, "attention", "span bias"),
    ("bfloat16", 256, "attention", "spans"),  # Triton 3.6 has tiles of its own here
    ("bfloat16", 64, "policy", "packed spans"),
    ("bfloat16", 64, "policy_divergence", "packed"),
    ("bfloat16", 64, "policy_divergence", "packed target ids"),
    ("bfloat16", 64, "policy_divergence", "target cross_entropy"),
    ("float32", 64, "policy_divergence", "target ids reverse_kl"),
)


def compiled_in_tests() -> list[tuple[Call, str]]:
    """(call, architecture) of what tests/codegen/test_triton.py compiles."""
    table = {(call.dtype, call.head_dim, call.op, call.variant): call for call in calls()}
    pairs = [(table[key], architecture) for key in TESTED for architecture in ARCHITECTURES]
    return pairs + [(table[key], "sm_90") for key in TESTED_ON_SM_90]
