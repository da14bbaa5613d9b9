"""The C entry points refuse calls whose pointers, sizes or indices do not fit together.

Python refuses such calls earlier and by name, so these tests fill the structs themselves.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import ral_kernels as rk
from ral_kernels.ops.attention import c_structs as attention_structs
from ral_kernels.ops.attention.arguments import (
    AttentionArgs,
    AttentionGradients,
    AttentionOutputs,
)
from ral_kernels.ops.divergence import c_structs as divergence_structs
from ral_kernels.ops.policy import c_structs as policy_structs
from ral_kernels.ops.policy.arguments import PolicyArgs, PolicyDivergenceArgs, ReferenceArgs
from ral_kernels.runtime import cpu_library, cuda_library, native
from ral_kernels.runtime.c_interface import address, tensor_struct

OK = 0  # ral_status
BAD_ARGUMENT, BAD_SPAN_ID, BAD_PREFIX_INDEX, BAD_BOUNDS, BAD_TARGET = 3, 4, 5, 6, 7
REFUSED_ON_A_GPU = -3  # kBadArgument of csrc/cuda/core/launch.h
B, H, HK, T, N, D, S, P, PREFIX = 2, 4, 2, 5, 9, 64, 3, 2, 4

needs_library = pytest.mark.skipif(
    native.why_missing("ral_cpu") is not None, reason="ral_cpu is not built"
)


@dataclass
class Call:
    """The structs of a call, the tensors that they point into, and the entry point."""

    entry: str
    structs: list[Any]
    tensors: dict[str, Tensor]

    def run(self, library: ctypes.CDLL, *rest: Any) -> int:
        given = (None if x is None else ctypes.byref(x) for x in self.structs)
        status: int = getattr(library, self.entry)(*given, *rest)
        return status

    def set(self, path: str, value: Any) -> None:
        """`path` is the number of a struct and fields: "0.q.data"."""
        index, *names, last = path.split(".")
        target = self.structs[int(index)]
        for name in names:
            target = getattr(target, name)
        setattr(target, last, value)


def attention_call(*, packed: bool = False, backward: bool = False) -> Call:
    batch_size, bounds = (1, torch.tensor([0, 2, T], dtype=torch.int32)) if packed else (B, None)
    q, out, dout, dq = (torch.randn(batch_size, H, T, D) for _ in range(4))
    k, v, dk, dv = (torch.randn(batch_size, HK, N, D) for _ in range(4))
    ids = torch.randint(-1, S, (batch_size, N), dtype=torch.int32)
    bias, marginals, dmarginals = (torch.zeros(batch_size, H, T, S) for _ in range(3))
    lse, keys = torch.zeros(batch_size, H, T), torch.tensor([0, 4, N], dtype=torch.int32)
    args = AttentionArgs(
        q=q, k=k, v=v, span_ids=ids, span_bias=bias, attn_mask=None, key_padding_mask=None,
        cu_seqlens_q=bounds, cu_seqlens_k=keys if packed else None, num_spans=S, scale=0.1,
        window_left=-1, window_right=0, top_left=False, softcap=0.0, row_start=0, row_stop=T,
    )  # fmt: skip
    isa = cpu_library.chosen_isa()
    structs: list[Any] = [
        attention_structs.Params.from_buffer_copy(attention_structs.params(args, isa, 1)),
        attention_structs.Outputs.from_buffer_copy(
            attention_structs.outputs(AttentionOutputs(out, marginals, lse))
        ),
    ]
    tensors = {"ids": ids}
    if bounds is not None:
        tensors.update(q_bounds=bounds, k_bounds=keys)
    if backward:
        gradients = AttentionGradients(dout, dmarginals, None, dq, dk, dv, torch.zeros_like(bias))
        packed_bytes = attention_structs.gradients(gradients)
        structs.append(attention_structs.Gradients.from_buffer_copy(packed_bytes))
        assert gradients.dspan_bias is not None
        tensors["dspan_bias"] = gradients.dspan_bias
    kept = dict(zip("abcdefghijklm", (q, out, dout, dq, k, v, dk, dv, bias, marginals, dmarginals,
                                      lse), strict=False))  # fmt: skip
    entry = f"ral_cpu_attention_{'bwd' if backward else 'fwd'}"
    return Call(entry, structs, {**tensors, **kept})


def _policy_args(with_spans: bool, packed: bool) -> PolicyArgs:
    batch_size, q_bounds, k_bounds, starts = B, None, None, None
    if packed:
        batch_size = 1
        q_bounds, k_bounds, starts = (
            torch.tensor(x, dtype=torch.int32) for x in ([0, 2, T], [0, 4, N], [2, 2])
        )
    return PolicyArgs(
        q=torch.randn(batch_size, H, T, D), k=torch.randn(batch_size, HK, N, D),
        span_ids=torch.randint(-1, S, (batch_size, N), dtype=torch.int32) if with_spans else None,
        span_bias=torch.zeros(batch_size, H, T, S) if with_spans else None, scope=None,
        head_weights=None, key_padding_mask=None, num_spans=S if with_spans else 0,
        query_start=0 if packed else N - T, scale=0.1,
        window_left=-1, window_right=0, softcap=0.0, exclude_self=True, cu_seqlens_q=q_bounds,
        cu_seqlens_k=k_bounds, query_starts=starts, max_rows=3 if packed else 0,
        max_keys=5 if packed else 0,
    )  # fmt: skip


def _bounds_of(args: PolicyArgs) -> dict[str, Tensor]:
    names = {"q_bounds": args.cu_seqlens_q, "k_bounds": args.cu_seqlens_k,
             "starts": args.query_starts}  # fmt: skip
    return {name: x for name, x in names.items() if x is not None}


def policy_call(*, packed: bool = False, backward: bool = False) -> Call:
    args, isa = _policy_args(True, packed), cpu_library.chosen_isa()
    norm, z, p = torch.ones(2, B, H, T), torch.ones(B, T), torch.zeros(B, T, S)
    dq, dk = torch.zeros_like(args.q), torch.zeros_like(args.k)
    structs = policy_structs.CallStructs(args, norm, z, isa, 1)
    params = policy_structs.Params(common=structs.common, policy=structs.policy, p=address(p))
    if backward:
        params.dp, params.dq, params.dk = address(p), tensor_struct(dq), tensor_struct(dk)
    assert args.span_ids is not None and args.span_bias is not None
    kept = (args.q, args.k, args.span_bias, norm, z, p, dq, dk)
    tensors = {f"kept_{i}": x for i, x in enumerate(kept)}
    entry = f"ral_cpu_policy_{'bwd' if backward else 'fwd'}"
    return Call(entry, [params], {"ids": args.span_ids, **tensors, **_bounds_of(args)})


def divergence_call(entry: str = "ral_cpu_policy_divergence_fwd", *, packed: bool = False) -> Call:
    policy, isa = _policy_args(False, packed), cpu_library.chosen_isa()
    index, prefix = torch.tensor([1, 0]), 0 if packed else PREFIX
    reference = ReferenceArgs(
        q=torch.randn(B, H, T, D), k=torch.randn(B, HK, N - prefix, D),
        k_prefix=None if packed else torch.randn(P, HK, PREFIX, D),
        prefix_index=None if packed else index, scale=0.1, window_left=-1, window_right=0,
        softcap=0.0, head_weights=None,
    )  # fmt: skip
    norm, z, other_norm, other_z = (torch.ones(*x, B, T) for x in ((2, H), (), (2, H), ()))
    value, dvalue, u, w = torch.zeros(B, T), torch.ones(B, T), torch.ones(B, H, T), torch.ones(
        B, H, T
    )  # fmt: skip
    dq, dk = torch.zeros_like(policy.q), torch.zeros_like(policy.k)
    structs = policy_structs.CallStructs(policy, norm, z, isa, 1)
    args = PolicyDivergenceArgs(policy, reference, "jsd")
    params = policy_structs.divergence_params(structs, args, other_norm, other_z, u, w)
    params.value, params.dvalue = address(value), address(dvalue)
    params.dq, params.dk = tensor_struct(dq), tensor_struct(dk)
    kept = (policy.q, policy.k, reference.q, reference.k, reference.k_prefix, norm, z, other_norm,
            other_z, value, dvalue, u, w, dq, dk)  # fmt: skip
    tensors = {f"kept_{i}": x for i, x in enumerate(kept) if x is not None}
    return Call(entry, [params], {"index": index, **tensors, **_bounds_of(policy)})


def target_call(
    entry: str = "ral_cpu_policy_divergence_fwd", *, packed: bool = False, sparse: bool = True
) -> Call:
    """`divergence_call` against two targets of a sample in place of a reference policy."""
    call = divergence_call(entry, packed=packed)
    batch_size, length = 1 if packed else B, 4 if sparse else N
    values = torch.rand(batch_size, 2, length)
    ids = torch.tensor([0, 3, 4, -1], dtype=torch.int32).repeat(batch_size, 2, 1)
    rows = torch.randint(-1, 2, (batch_size, T), dtype=torch.int32)
    params = call.structs[0]
    params.reference = policy_structs.SideStruct(z=params.reference.z)
    params.target = policy_structs.TargetStruct(
        values=address(values),
        ids=address(ids) if sparse else 0,
        index=address(rows),
        num_targets=2,
        length=length,
    )
    call.tensors.update(values=values, ids=ids, rows=rows)
    return call


def rows_call() -> Call:
    p, r, dp, dr, value = (torch.rand(x) for x in ((T, N), (T, N), (T, N), (T, N), (T,)))
    params = divergence_structs.Params(
        num_rows=T, length=N, p=address(p), r=address(r), value=address(value), dp=address(dp),
        dr=address(dr), kind=0, isa=cpu_library.chosen_isa(), num_threads=1,
    )  # fmt: skip
    return Call(
        "ral_cpu_divergence_fwd", [params], {"p": p, "r": r, "dp": dp, "dr": dr, "v": value}
    )


HUGE = (-1, 0, 2**31, 2**62, -(2**63))
_ATTENTION_SIZES = ("batch_size", "num_heads", "num_kv_heads", "seqlen_q", "seqlen_k", "head_dim",
                    "head_dim_v", "num_sequences")  # fmt: skip
_SCORES = {"window_left": (-2, 2**40), "window_right": (-2, 2**40), "scale": (-1.0, 0.0,
           float("nan"), float("inf")), "softcap": (-1.0, float("nan"), float("inf"))}  # fmt: skip
ATTENTION: dict[str, tuple[Any, ...]] = {
    **{f"0.{name}": HUGE for name in _ATTENTION_SIZES},
    **{f"0.{name}": values for name, values in _SCORES.items()},
    "0.num_kv_heads": (*HUGE, 3),
    "0.num_sequences": (B - 1, B + 1),
    "0.num_spans": (-1, 2**31, 2**62),
    "0.row_start": (-1, T + 1),
    "0.row_stop": (-1, T + 1),
    "0.dtype": (-1, 3, 99),
    "0.num_threads": (0, -1),
    **{f"0.{x}.data": (None,) for x in "qkv"},
    "0.span_ids": (None,),  # with a bias and marginals
    "1.out.data": (None,),
    "1.lse": (None,),
}
_SIDE = {
    **dict.fromkeys(("num_heads", "head_dim"), HUGE),
    "num_kv_heads": (*HUGE, 3),
    **_SCORES,
    "dtype": (-1, 3, 99),
    "q.data": (None,),
    "k.data": (None,),
}
_COMMON = {
    **{f"0.common.{name}": HUGE for name in ("batch_size", "num_rows", "seqlen_k")},
    "0.common.num_spans": (-1, 2**31, 2**62),
    "0.common.query_start": (2**40, -(2**40)),
    "0.common.total_rows": (T - 1, T + 1, 2**62),
    "0.common.row_length": (-1, 2, 2**62),
    "0.common.num_threads": (0, -1),
}
POLICY: dict[str, tuple[Any, ...]] = {
    **_COMMON,
    **{f"0.policy.{name}": values for name, values in _SIDE.items()},
    "0.common.span_ids": (None,),
    "0.policy.norm": (None,),
    "0.policy.z": (None,),
}
DIVERGENCE: dict[str, tuple[Any, ...]] = {
    **_COMMON,
    **{f"0.{side}.{x}": y for side in ("policy", "reference") for x, y in _SIDE.items()},
    "0.common.num_spans": (1, *HUGE[2:]),  # without ids
    "0.reference.shared_prefix": (-1, N + 1, 2**62),
    "0.reference.num_prefixes": (0, -1),
    "0.reference.k_prefix.data": (None,),
    "0.reference.prefix_index": (None,),
    "0.reference.norm": (None,),
    "0.reference.z": (None,),
    "0.kind": (-1, 4),
}
TARGET: dict[str, tuple[Any, ...]] = {
    **_COMMON,
    **{f"0.policy.{x}": y for x, y in _SIDE.items()},
    "0.target.index": (None,),
    "0.target.ids": (None,),  # then `length` is not that of the keys
    "0.target.num_targets": HUGE,
    "0.target.length": HUGE,
    "0.target.first_key": (-1, 1, 2**62),
    "0.reference.z": (None,),
    "0.reference_normalised": (1,),
    "0.kind": (-1, 4),
}
_NO_WEIGHTS = {"0.dhead_weights": (64,)}  # a gradient of head weights that there are not
CALLS: dict[str, tuple[Callable[[], Call], dict[str, tuple[Any, ...]]]] = {
    "attention_fwd": (attention_call, {**ATTENTION, "1.marginals": (None,)}),
    "attention_bwd": (
        lambda: attention_call(backward=True),
        {**ATTENTION, **{f"2.{x}.data": (None,) for x in ("dq", "dk", "dv")}},
    ),
    "policy_fwd": (policy_call, {**POLICY, "0.p": (None,)}),
    "policy_bwd": (
        lambda: policy_call(backward=True),
        {**POLICY, **_NO_WEIGHTS, **{f"0.{x}": (None,) for x in ("dp", "dq.data", "dk.data")}},
    ),
    "policy_divergence_fwd": (
        divergence_call,
        {**DIVERGENCE, **{f"0.{x}": (None,) for x in ("value", "u", "w", "policy.norm")}},
    ),
    "policy_divergence_bwd": (
        lambda: divergence_call("ral_cpu_policy_divergence_bwd"),
        {**DIVERGENCE, **_NO_WEIGHTS,
         **{f"0.{x}": (None,) for x in ("dvalue", "dq.data", "dk.data", "u")}},
    ),
    "policy_loss": (
        lambda: divergence_call("ral_cpu_policy_loss"),
        {**DIVERGENCE, **_NO_WEIGHTS,
         **{f"0.{x}": (None,) for x in ("value", "dvalue", "dq.data", "dk.data")}},
    ),
    **{
        f"target_{name}": (functools.partial(target_call, f"ral_cpu_policy_{name}"), TARGET)
        for name in ("divergence_fwd", "divergence_bwd", "loss")
    },
    "divergence_fwd": (
        rows_call,
        {"0.num_rows": (-1, 2**31, 2**62), "0.length": (-1, 2**31, 2**63 - 1), "0.p": (None,),
         "0.r": (None,), "0.value": (None,), "0.kind": (-1, 4), "0.num_threads": (0, -1)},
    ),
}  # fmt: skip


@needs_library
@pytest.mark.parametrize("name", CALLS)
def test_what_does_not_fit_together_is_refused(name: str) -> None:
    make, faults = CALLS[name]
    library = cpu_library.library()
    call = make()
    assert call.run(library) == OK
    for path, values in faults.items():
        for value in values:
            call = make()
            call.set(path, value)
            assert call.run(library) == BAD_ARGUMENT, f"{path} = {value}"
    for i in range(len(call.structs)):
        call = make()
        call.structs[i] = None
        assert call.run(library) == BAD_ARGUMENT, f"struct {i} = NULL"


@needs_library
@pytest.mark.parametrize("bad", [-2, S, 7 * 10**7, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("name", ["attention_fwd", "attention_bwd", "policy_fwd", "policy_bwd"])
def test_span_ids_out_of_range_are_refused(name: str, bad: int) -> None:
    call = CALLS[name][0]()
    call.tensors["ids"][-1, -1] = bad
    assert call.run(cpu_library.library()) == BAD_SPAN_ID


@needs_library
@pytest.mark.parametrize("bad", [-1, P, 10**9, -(10**9)])
@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("policy_div")])
def test_prefix_indices_out_of_range_are_refused(name: str, bad: int) -> None:
    call = CALLS[name][0]()
    call.tensors["index"][1] = bad
    assert call.run(cpu_library.library()) == BAD_PREFIX_INDEX


@needs_library
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["divergence_fwd", "divergence_bwd", "loss"])
def test_targets_that_cannot_be_read_are_refused(name: str, packed: bool) -> None:
    """An index without a target, and ids that are no keys, not ascending or after a -1."""
    library = cpu_library.library()

    def call() -> Call:
        return target_call(f"ral_cpu_policy_{name}", packed=packed)

    assert call().run(library) == OK
    assert target_call(f"ral_cpu_policy_{name}", packed=packed, sparse=False).run(library) == OK
    for tensor, bad in (
        ("rows", -2), ("rows", 2), ("rows", 2**31 - 1), ("ids", [0, 3, N, -1]),
        ("ids", [0, 3, 3, -1]), ("ids", [3, 0, -1, -1]), ("ids", [0, -1, 4, -1]),
        ("ids", [-2, 3, 4, -1]),
    ):  # fmt: skip
        wrong = call()
        wrong.tensors[tensor][-1, -1] = torch.tensor(bad)
        assert wrong.run(library) == BAD_TARGET, f"{tensor} = {bad}"


@needs_library
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "bounds", [(-1, 2, 5), (0, 6, 5), (0, 2, 10), (0, 2, 2**31 - 1), (3, 2, 5)], ids=str
)
def test_bounds_of_packed_sequences(bounds: tuple[int, ...], backward: bool) -> None:
    assert attention_call(packed=True, backward=backward).run(cpu_library.library()) == OK
    for name in ("q_bounds", "k_bounds"):
        call = attention_call(packed=True, backward=backward)
        call.tensors[name][:] = torch.tensor(bounds, dtype=torch.int32)
        assert call.run(cpu_library.library()) == BAD_BOUNDS
    call = attention_call(packed=True, backward=backward)
    call.set("0.cu_seqlens_k", None)
    assert call.run(cpu_library.library()) == BAD_ARGUMENT


PACKED_CALLS: dict[str, Callable[[], Call]] = {
    "policy_fwd": lambda: policy_call(packed=True),
    "policy_bwd": lambda: policy_call(packed=True, backward=True),
    "policy_divergence_fwd": lambda: divergence_call(packed=True),
    "policy_divergence_bwd": lambda: divergence_call("ral_cpu_policy_divergence_bwd", packed=True),
    "policy_loss": lambda: divergence_call("ral_cpu_policy_loss", packed=True),
}


@needs_library
@pytest.mark.parametrize("name", PACKED_CALLS)
def test_packed_policies_that_do_not_fit_together_are_refused(name: str) -> None:
    """Offsets from 0 that do not decrease, no sequence longer than `max_rows` and `max_keys`."""
    make, library = PACKED_CALLS[name], cpu_library.library()
    assert make().run(library) == OK
    for which, bounds in (
        ("q_bounds", (1, 2, 5)), ("q_bounds", (0, 6, 5)), ("q_bounds", (0, 2, 6)),
        ("q_bounds", (0, -1, 2)), ("q_bounds", (0, 4, 5)), ("k_bounds", (1, 4, 9)),
        ("k_bounds", (0, 3, 2)), ("k_bounds", (0, 4, 10)), ("k_bounds", (0, 4, 2**31 - 1)),
        ("k_bounds", (0, 6, 9)),
    ):  # fmt: skip
        call = make()
        call.tensors[which][:] = torch.tensor(bounds, dtype=torch.int32)
        assert call.run(library) == BAD_BOUNDS, f"{which} = {bounds}"
    mask = torch.ones(N, dtype=torch.bool)
    for field, values in {
        "batch_size": (B,), "num_sequences": (-1, 2**31), "max_rows": (0, T + 1),
        "max_keys": (0, N + 1), "cu_seqlens_q": (None,), "cu_seqlens_k": (None,),
        "query_starts": (None,), "key_padding_mask": (address(mask),),
    }.items():  # fmt: skip
        for value in values:
            call = make()
            call.set(f"0.common.{field}", value)
            assert call.run(library) == BAD_ARGUMENT, f"{field} = {value}"


@needs_library
def test_ids_that_numpy_edits_are_found_where_they_are_used() -> None:
    """Torch does not count these writes, so that Python cannot see them."""
    q = torch.randn(1, 1, 7, 8)
    spans = rk.Spans(torch.zeros(7, dtype=torch.int32), 3)
    spans.ids.numpy()[2] = 50
    wanted = r"^attention: backend 'cpu' failed: a span id lies outside \[-1, num_spans\)"
    with pytest.raises(ValueError, match=wanted):
        rk.attention(q, q, q, spans, backend="cpu")
    with pytest.raises(ValueError, match=r"^attention_policy: backend 'cpu' failed: a span id"):
        rk.attention_policy(q, q, spans=spans, backend="cpu")


@needs_library
def test_the_rate_of_tiles_takes_no_nonsense() -> None:
    library, isa = cpu_library.library(), cpu_library.chosen_isa()
    assert library.ral_cpu_tile_flops(isa, 0, 0, 1) == 0
    assert library.ral_cpu_tile_flops(isa, 0, 1, -1) == 0
    library.ral_cpu_expect_writes(None, 8 << 20)
    library.ral_cpu_expect_writes(q := torch.zeros(8).data_ptr(), -(2**62))
    assert q != 0


@pytest.mark.parametrize("name", [name for name in CALLS if name != "divergence_fwd"])
def test_the_cuda_library_refuses_the_same(name: str) -> None:
    """Before it launches anything, so that no GPU is needed."""
    if (missing := native.why_missing("ral_cuda")) is not None:
        pytest.skip(missing)
    library, (make, faults) = cuda_library.library(), CALLS[name]
    entry = f"ral_cuda_{name}".replace("target_", "policy_")
    entry = entry.replace("policy_loss", "policy_divergence_loss")
    scratch, stream = ctypes.c_void_p(64), ctypes.c_void_p()
    rest: tuple[Any, ...] = (ctypes.c_int64(2**20), scratch, stream)
    if name.startswith("attention"):
        rest = (scratch, stream) if name.endswith("bwd") else (stream,)
    elif name == "policy_fwd":
        lists = policy_structs.SpanLists(keys=64, starts=64)
        rest = (*rest, ctypes.byref(lists))
    for path, values in faults.items():
        for value in values:
            if path.endswith("num_threads"):
                continue  # of the CPU alone
            if (path, value) == ("0.target.first_key", 1):
                continue  # here packed calls take some sequences at a time
            call = replace(make(), entry=entry)
            call.set(path, value)
            assert call.run(library, *rest) == REFUSED_ON_A_GPU, f"{path} = {value}"
            if not name.startswith("attention"):
                count = getattr(library, f"{entry}_scratch")
                count.restype = ctypes.c_int64
                assert count(ctypes.byref(call.structs[0]), ctypes.c_int64(2**20)) == 0
    reason = library.ral_cuda_error_string(REFUSED_ON_A_GPU)
    assert reason == b"pointers or sizes that do not fit together"
