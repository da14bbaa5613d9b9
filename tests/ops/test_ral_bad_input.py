"""Malformed calls of the RAL objective: exception, op and argument as promised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import ral_kernels as rk
from ral_kernels.ops.divergence import divergence
from ral_kernels.ops.divergence.arguments import KINDS
from ral_kernels.ops.policy import attention_divergence, attention_policy, ral_loss
from ral_kernels.ops.policy.divergence import BACKENDS
from ral_kernels.snapshot import AttentionSnapshot

B, H, HK, T, N, D, S = 2, 4, 2, 5, 7, 8, 3
NAN, INF = float("nan"), float("inf")


def tensor(*shape: int, dtype: torch.dtype = torch.float32, **kwargs: Any) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, **kwargs)


def qk() -> dict[str, Any]:
    return {"q": tensor(B, H, T, D), "k": tensor(B, HK, N, D)}


SPANS = rk.Spans.from_lengths([3, 2, 2])


def policy(**changes: Any) -> Any:
    return attention_policy(**{**qk(), **changes})


def diverge(**changes: Any) -> Any:
    return divergence(**{"p": tensor(B, T, N), "r": tensor(B, T, N), **changes})


def snap(**changes: Any) -> AttentionSnapshot:
    return AttentionSnapshot(**{**qk(), **changes})


def pick(index: Any) -> AttentionSnapshot:
    return snap()[index]


def against(**changes: Any) -> Any:
    return attention_divergence(**{**qk(), "reference": tensor(B, T, N), **changes})


def loss(**changes: Any) -> Any:
    arguments = {**qk(), "reference": tensor(B, T, N), "advantages": tensor(B)}
    return ral_loss(**{**arguments, **changes})


def offsets(*bounds: int, **kwargs: Any) -> torch.Tensor:
    return torch.tensor(bounds, dtype=torch.int32, **kwargs)


def packing() -> dict[str, Any]:
    """2 + 3 queries and 3 + 4 keys."""
    return {
        "q": tensor(1, H, T, D), "k": tensor(1, HK, N, D), "cu_seqlens_q": offsets(0, 2, T),
        "cu_seqlens_k": offsets(0, 3, N),
    }  # fmt: skip


def packed(**changes: Any) -> Any:
    return attention_policy(**{**packing(), **changes})


def packed_snap(**changes: Any) -> AttentionSnapshot:
    return AttentionSnapshot(**{**packing(), **changes})


def packed_loss(**changes: Any) -> Any:
    arguments = {**packing(), "reference": packed_snap(), "advantages": tensor(2)}
    return ral_loss(**{**arguments, **changes})


# (name, call, exception, regular expression of the message)
# fmt: off
BAD: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    # attention_policy: q and k
    ("q_list", lambda: policy(q=[1.0]), TypeError,
     r"^attention_policy: q must be a \[B, H, T, D\] tensor; got list"),
    ("q_rank", lambda: policy(q=tensor(H, T, D)), ValueError,
     r"^attention_policy: q must be \[B, H, T, D\]; got \(4, 5, 8\)"),
    ("q_int", lambda: policy(q=tensor(B, H, T, D, dtype=torch.int64)), TypeError,
     r"^attention_policy: q must be float32.*int64"),
    ("q_stride", lambda: policy(q=tensor(B, H, D, T).mT), ValueError,
     r"^attention_policy: q must have a unit last stride"),
    ("k_none", lambda: policy(k=None), TypeError,
     r"^attention_policy: k must be a \[B, Hk, N, D\] tensor; got NoneType"),
    ("k_dtype", lambda: policy(k=tensor(B, HK, N, D, dtype=torch.bfloat16)), TypeError,
     r"^attention_policy: k must have q's dtype float32; got bfloat16"),
    ("k_batch", lambda: policy(k=tensor(3, HK, N, D)), ValueError,
     r"^attention_policy: k must be .*B=2.*got \(3, 2, 7, 8\)"),
    ("k_head_dim", lambda: policy(k=tensor(B, HK, N, 4)), ValueError,
     r"^attention_policy: k must be .*D=8"),
    ("k_head_ratio", lambda: policy(k=tensor(B, 3, N, D)), ValueError,
     r"^attention_policy: k must have a number of heads Hk that divides H=4; got Hk=3"),
    ("k_device", lambda: policy(k=tensor(B, HK, N, D, device="meta")), ValueError,
     r"^attention_policy: k must be on the device of q, cpu; got meta"),
    # attention_policy: options
    ("rows_type", lambda: policy(rows=[0, 1, 2]), ValueError,
     r"^attention_policy: rows must be \(start, stop\); got 3 elements"),
    ("rows_tensor", lambda: policy(rows=torch.arange(2)), TypeError,
     r"^attention_policy: rows must be None, a slice.*got Tensor"),
    ("rows_step", lambda: policy(rows=slice(0, 4, 2)), ValueError,
     r"^attention_policy: rows must be a slice of step 1; got step 2"),
    ("rows_beyond", lambda: policy(rows=(0, T + 1)), ValueError,
     r"^attention_policy: rows must satisfy .* T=5; got 0, 6"),
    ("spans_tensor", lambda: policy(spans=tensor(N, dtype=torch.int32)), TypeError,
     r"^attention_policy: spans must be None or Spans; got Tensor"),
    ("spans_length", lambda: policy(spans=rk.Spans.from_lengths([3, 2])), ValueError,
     r"^attention_policy: spans must have ids .*N=7; got \(5,\)"),
    ("span_bias_alone", lambda: policy(span_bias=tensor(S)), ValueError,
     r"^attention_policy: span_bias needs spans"),
    ("span_bias_int", lambda: policy(spans=SPANS, span_bias=tensor(S, dtype=torch.int32)),
     TypeError, r"^attention_policy: span_bias must be floating; got int32"),
    ("span_bias_shape", lambda: policy(spans=SPANS, span_bias=tensor(T, S + 1)), ValueError,
     r"^attention_policy: span_bias must be broadcastable to \[B, H, T, S\] = \(2, 4, 5, 3\)"),
    ("span_bias_all_rows", lambda: policy(spans=SPANS, span_bias=tensor(T, S), rows=(0, 2)),
     ValueError, r"^attention_policy: span_bias must be broadcastable to .* = \(2, 4, 2, 3\)"),
    ("weights_list", lambda: policy(head_weights=[1.0] * H), TypeError,
     r"^attention_policy: head_weights must be None or a floating tensor \[H\] or .*; got list"),
    ("weights_int", lambda: policy(head_weights=tensor(H, dtype=torch.int64)), TypeError,
     r"^attention_policy: head_weights must be floating; got int64"),
    ("weights_shape", lambda: policy(head_weights=tensor(1, H)), ValueError,
     r"^attention_policy: head_weights must be \[H\] or \[B, H\] with B=2, H=4; got \(1, 4\)"),
    ("weights_kv_heads", lambda: against(head_weights=tensor(HK)), ValueError,
     r"^attention_divergence: head_weights must be .*; got \(2,\)"),
    ("weights_packed", lambda: packed(head_weights=tensor(1, H)), ValueError,
     r"^attention_policy: head_weights must be \[H\] or \[S, H\] with S=2, H=4; got \(1, 4\)"),
    ("weights_device", lambda: policy(head_weights=tensor(H, device="meta")), ValueError,
     r"^attention_policy: head_weights must be on the device of q, cpu; got meta"),
    ("weights_negative", lambda: loss(head_weights=torch.tensor([1.0, -1.0, 0.0, 2.0])), ValueError,
     r"^ral_loss: head_weights must be finite and >= 0, and some of them > 0; got \[1.0, -1.0, "),
    ("weights_nan", lambda: policy(head_weights=torch.tensor([1.0, float("nan"), 0.0, 2.0])),
     ValueError, r"^attention_policy: head_weights must be finite .* got \[1.0, nan, "),
    ("weights_inf", lambda: policy(head_weights=torch.tensor([1.0, float("inf"), 0.0, 2.0])),
     ValueError, r"^attention_policy: head_weights must be finite .* got \[1.0, inf, "),
    ("weights_zero", lambda: policy(head_weights=torch.eye(4)[:B] * torch.arange(B)[:, None]),
     ValueError, r"^attention_policy: head_weights must be .* got \[0.0, 0.0, 0.0, 0.0\]"),
    ("weights_of_snapshot", lambda: snap(head_weights=tensor(H)), ValueError,
     r"^AttentionSnapshot: head_weights must be finite .* got \[0.0, 0.0, 0.0, 0.0\]"),
    ("weights_for_other_heads", lambda: against(
        reference=snap(q=tensor(B, 2, T, D)), head_weights=torch.ones(H)), ValueError,
     r"^attention_divergence: reference must have head_weights of its own, or H=4 heads, .* got 2"),
    ("scope_list", lambda: policy(scope=[True] * N), TypeError,
     r"^attention_policy: scope must be None, Spans or a bool tensor .*; got list"),
    ("scope_float", lambda: policy(scope=tensor(N)), TypeError,
     r"^attention_policy: scope must be .*True = in the scope\); got float32"),
    ("scope_length", lambda: policy(scope=tensor(N - 1, dtype=torch.bool)), ValueError,
     r"^attention_policy: scope must be \[N\] or \[B, N\] with B=2, N=7; got \(6,\)"),
    ("scope_batch", lambda: policy(scope=tensor(1, N, dtype=torch.bool)), ValueError,
     r"^attention_policy: scope must be .* got \(1, 7\)"),
    ("scope_spans", lambda: policy(scope=rk.Spans.from_lengths([1])), ValueError,
     r"^attention_policy: scope must be .* got \(1,\)"),
    ("scope_device", lambda: policy(scope=tensor(N, dtype=torch.bool, device="meta")), ValueError,
     r"^attention_policy: scope must be on the device of k"),
    ("exclude_self", lambda: policy(exclude_self=1), TypeError,
     r"^attention_policy: exclude_self must be True or False; got 1"),
    ("is_causal", lambda: policy(is_causal=None), TypeError,
     r"^attention_policy: is_causal must be True or False; got None"),
    ("scale_negative", lambda: policy(scale=-1.0), ValueError,
     r"^attention_policy: scale must be None or a finite number > 0; got -1"),
    ("scale_nan", lambda: policy(scale=NAN), ValueError,
     r"^attention_policy: scale must be .* nan"),
    ("window", lambda: policy(window=(1, 2, 3)), ValueError,
     r"^attention_policy: window must be .*; got 3 elements"),
    ("softcap", lambda: policy(softcap=0.0), ValueError,
     r"^attention_policy: softcap must be None or a finite number > 0; got 0"),
    ("padding_dtype", lambda: policy(key_padding_mask=tensor(B, N)), TypeError,
     r"^attention_policy: key_padding_mask must be bool .*; got float32"),
    ("padding_shape", lambda: policy(key_padding_mask=tensor(N, dtype=torch.bool)), ValueError,
     r"^attention_policy: key_padding_mask must be \[B, N\] = \(2, 7\); got \(7,\)"),
    ("backend_name", lambda: policy(backend="gpu"), ValueError,
     r"^attention_policy: backend must be None or one of .*; got 'gpu'"),
    ("backend_type", lambda: policy(backend=3), TypeError,
     r"^attention_policy: backend must be None or a name; got int"),
    # divergence
    ("p_list", lambda: diverge(p=[0.5]), TypeError,
     r"^divergence: p must be a \[\.\.\., N\] tensor; got list"),
    ("p_int", lambda: diverge(p=tensor(B, T, N, dtype=torch.int64)), TypeError,
     r"^divergence: p must be floating; got int64"),
    ("p_scalar", lambda: diverge(p=tensor(), r=tensor()), ValueError,
     r"^divergence: p must be \[\.\.\., N\]; got \(\)"),
    ("r_complex", lambda: diverge(r=tensor(B, T, N, dtype=torch.complex64)), TypeError,
     r"^divergence: r must be floating; got complex64"),
    ("r_shape", lambda: diverge(r=tensor(T, N)), ValueError,
     r"^divergence: r must have p's shape \(2, 5, 7\); got \(5, 7\)"),
    ("r_device", lambda: diverge(r=tensor(B, T, N, device="meta")), ValueError,
     r"^divergence: r must be on the device of p"),
    ("kind_name", lambda: diverge(kind="js"), ValueError,
     r"^divergence: kind must be one of jsd, kl, reverse_kl, cross_entropy; got 'js'"),
    ("kind_type", lambda: diverge(kind=None), TypeError,
     r"^divergence: kind must be one of jsd, kl, reverse_kl, cross_entropy; got NoneType"),
    ("divergence_backend", lambda: diverge(backend="cuda"), NotImplementedError,
     r"^divergence: backend 'cuda' has no kernels"),
    # attention_divergence
    ("reference_none", lambda: against(reference=None), TypeError,
     r"^attention_divergence: reference must be a .* or an AttentionTarget; got NoneType"),
    ("reference_int", lambda: against(reference=tensor(B, T, N, dtype=torch.int64)), TypeError,
     r"^attention_divergence: reference must be floating, an AttentionSnapshot .* got int64"),
    ("reference_shape", lambda: against(reference=tensor(B, H, T, N)), ValueError,
     r"^attention_divergence: reference must be \[B, T, N\] = \(2, 5, 7\); got \(2, 4, 5, 7\)"),
    ("reference_spans", lambda: against(spans=SPANS), ValueError,
     r"^attention_divergence: reference must be \[B, T, S\] = \(2, 5, 3\); got \(2, 5, 7\)"),
    ("reference_rows", lambda: against(rows=(0, 2)), ValueError,
     r"^attention_divergence: reference must be \[B, T, N\] = \(2, 2, 7\); got \(2, 5, 7\)"),
    ("reference_device", lambda: against(reference=tensor(B, T, N, device="meta")), ValueError,
     r"^attention_divergence: reference must be on the device of q"),
    ("snapshot_batch", lambda: against(reference=snap()[:1]), ValueError,
     r"^attention_divergence: reference must be a snapshot of batch size B=2; got 1"),
    ("snapshot_rows", lambda: against(reference=snap(rows=(1, 5))), ValueError,
     r"^attention_divergence: reference must be a snapshot of T rows, T=5; got 4"),
    ("snapshot_keys", lambda: against(reference=snap(k=tensor(B, HK, N + 1, D))), ValueError,
     r"^attention_divergence: reference must be a snapshot over N keys, N=7; got 8"),
    ("snapshot_position", lambda: against(reference=snap(rows=(0, 4)), rows=(1, 5)), ValueError,
     r"^attention_divergence: reference must be a snapshot whose rows start at key=3; got 2"),
    ("snapshot_device", lambda: against(reference=snap(device="meta")), ValueError,
     r"^attention_divergence: reference must be on the device of q, cpu; got meta"),
    ("snapshot_bias", lambda: against(reference=snap(span_bias=tensor(S))), ValueError,
     r"^attention_divergence: reference has a span_bias, which needs spans"),
    ("snapshot_bias_shape",
     lambda: against(reference=snap(span_bias=tensor(S + 1)), spans=SPANS), ValueError,
     r"^attention_divergence: reference.span_bias must be broadcastable to \[B, H, T, S\]"),
    ("divergence_kind", lambda: against(kind="tv"), ValueError,
     r"^attention_divergence: kind must be one of jsd, kl, reverse_kl, cross_entropy; got 'tv'"),
    ("divergence_q", lambda: against(q=tensor(T, D)), ValueError,
     r"^attention_divergence: q must be"),
    ("divergence_scope", lambda: against(scope=3), TypeError,
     r"^attention_divergence: scope must be .*; got int"),
    # ral_loss
    ("loss_q", lambda: loss(q=None), TypeError, r"^ral_loss: q must be"),
    ("loss_reference", lambda: loss(reference="old"), TypeError,
     r"^ral_loss: reference must be .*; got str"),
    ("advantages_none", lambda: loss(advantages=None), TypeError,
     r"^ral_loss: advantages must be a \[B\] or \[B, T\] tensor; got NoneType"),
    ("advantages_float", lambda: loss(advantages=1.0), TypeError,
     r"^ral_loss: advantages must be .*; got float"),
    ("advantages_int", lambda: loss(advantages=tensor(B, dtype=torch.int64)), TypeError,
     r"^ral_loss: advantages must be floating; got int64"),
    ("advantages_shape", lambda: loss(advantages=tensor(T)), ValueError,
     r"^ral_loss: advantages must be \[B\] or \[B, T\] with B=2, T=5; got \(5,\)"),
    ("advantages_device", lambda: loss(advantages=tensor(B, device="meta")), ValueError,
     r"^ral_loss: advantages must be on the device of q"),
    ("advantages_grad", lambda: loss(advantages=tensor(B, requires_grad=True)),
     NotImplementedError, r"^ral_loss: advantages get no gradient.*advantages\.detach\(\)"),
    ("mask_list", lambda: loss(mask=[[True] * T] * B), TypeError,
     r"^ral_loss: mask must be None or a bool \[B, T\] tensor; got list"),
    ("mask_int", lambda: loss(mask=tensor(B, T, dtype=torch.int64)), TypeError,
     r"^ral_loss: mask must be bool \(True = a token that counts\); got int64"),
    ("mask_shape", lambda: loss(mask=tensor(B, N, dtype=torch.bool)), ValueError,
     r"^ral_loss: mask must be \[B, T\] = \(2, 5\); got \(2, 7\)"),
    ("mask_device", lambda: loss(mask=tensor(B, T, dtype=torch.bool, device="meta")), ValueError,
     r"^ral_loss: mask must be on the device of q"),
    ("reduction_name", lambda: loss(reduction="mean"), ValueError,
     r"^ral_loss: reduction must be one of token_mean, sequence_mean, sum; got 'mean'"),
    ("reduction_type", lambda: loss(reduction=None), TypeError,
     r"^ral_loss: reduction must be one of .*; got NoneType"),
    ("loss_kind", lambda: loss(kind="mse"), ValueError, r"^ral_loss: kind must be one of"),
    ("loss_backend", lambda: loss(backend="fast"), ValueError, r"^ral_loss: backend must be"),
    # AttentionSnapshot
    ("snap_q", lambda: snap(q=tensor(H, T, D)), ValueError,
     r"^AttentionSnapshot: q must be \[B, H, T, D\]"),
    ("snap_k", lambda: snap(k=tensor(B, 3, N, D)), ValueError,
     r"^AttentionSnapshot: k must have a number of heads"),
    ("snap_rows", lambda: snap(rows=(3, 2)), ValueError,
     r"^AttentionSnapshot: rows must satisfy"),
    ("snap_scale", lambda: snap(scale=INF), ValueError, r"^AttentionSnapshot: scale must be"),
    ("snap_dtype", lambda: snap(dtype=torch.int8), TypeError,
     r"^AttentionSnapshot: dtype must be None or one of float32, .*; got torch.int8"),
    ("snap_to_dtype", lambda: snap().to(torch.int8), TypeError,
     r"^AttentionSnapshot: dtype must be"),
    ("snap_pin_type", lambda: snap(pin_memory=1), TypeError,
     r"^AttentionSnapshot: pin_memory must be True or False"),
    ("snap_pin_device", lambda: snap(pin_memory=True, device="meta"), ValueError,
     r"^AttentionSnapshot: pin_memory must go with device=None or 'cpu'; got meta"),
    ("snap_group_type", lambda: snap(group_size=2.0), TypeError,
     r"^AttentionSnapshot: group_size must be an int; got float"),
    ("snap_group_zero", lambda: snap(group_size=0), ValueError,
     r"^AttentionSnapshot: group_size must be >= 1; got 0"),
    ("snap_group_ratio", lambda: snap(group_size=3), ValueError,
     r"^AttentionSnapshot: group_size must divide the batch size B=2; got 3"),
    ("snap_prefix_negative", lambda: snap(shared_prefix=-1), ValueError,
     r"^AttentionSnapshot: shared_prefix must be >= 0; got -1"),
    ("snap_prefix_long", lambda: snap(group_size=2, shared_prefix=N + 1), ValueError,
     r"^AttentionSnapshot: shared_prefix must be at most N=7; got 8"),
    ("snap_bias_type", lambda: snap(span_bias=[0.0]), TypeError,
     r"^AttentionSnapshot: span_bias must be None or a tensor"),
    ("snap_bias_int", lambda: snap(span_bias=tensor(S, dtype=torch.int32)), TypeError,
     r"^AttentionSnapshot: span_bias must be floating; got int32"),
    ("snap_bias_scalar", lambda: snap(span_bias=tensor()), ValueError,
     r"^AttentionSnapshot: span_bias must have a last dimension S; got a scalar"),
    ("snap_bias_shape", lambda: snap(span_bias=tensor(T + 1, S)), ValueError,
     r"^AttentionSnapshot: span_bias must be broadcastable to \[B, H, T, S\] = \(2, 4, 5, 3\)"),
    ("index_int", lambda: pick(0), TypeError, r"^AttentionSnapshot: index must be .*; got int"),
    ("index_list", lambda: pick([0, 1]), TypeError,
     r"^AttentionSnapshot: index must be .*; got list"),
    ("index_float", lambda: pick(tensor(2)), TypeError,
     r"^AttentionSnapshot: index must be .*; got float32 \(2,\)"),
    ("index_rank", lambda: pick(tensor(1, 2, dtype=torch.int64)), TypeError,
     r"^AttentionSnapshot: index must be .*; got int64 \(1, 2\)"),
    ("index_mask", lambda: pick(tensor(3, dtype=torch.bool)), ValueError,
     r"^AttentionSnapshot: index must be a mask \[B\] = \(2,\); got \(3,\)"),
    # packed sequences
    ("packed_alone", lambda: packed(cu_seqlens_k=None), ValueError,
     r"^attention_policy: cu_seqlens_q needs cu_seqlens_k; got cu_seqlens_k=None"),
    ("packed_alone_k", lambda: packed(cu_seqlens_q=None), ValueError,
     r"^attention_policy: cu_seqlens_k needs cu_seqlens_q; got cu_seqlens_q=None"),
    ("packed_list", lambda: packed(cu_seqlens_q=[0, 2, T]), TypeError,
     r"^attention_policy: cu_seqlens_q must be None or an int32 tensor \[S \+ 1\]; got list"),
    ("packed_dtype", lambda: packed(cu_seqlens_k=offsets(0, 3, N).long()), TypeError,
     r"^attention_policy: cu_seqlens_k must be int32; got int64"),
    ("packed_rank", lambda: packed(cu_seqlens_q=offsets(0, T)[None]), ValueError,
     r"^attention_policy: cu_seqlens_q must be \[S \+ 1\]; got \(1, 2\)"),
    ("packed_empty", lambda: packed(cu_seqlens_q=offsets()), ValueError,
     r"^attention_policy: cu_seqlens_q must be \[S \+ 1\]; got \(0,\)"),
    ("packed_device", lambda: packed(cu_seqlens_q=offsets(0, 2, T, device="meta")), ValueError,
     r"^attention_policy: cu_seqlens_q must be on the device of q, cpu; got meta"),
    ("packed_counts", lambda: packed(cu_seqlens_k=offsets(0, N)), ValueError,
     r"^attention_policy: cu_seqlens_k must be \[S \+ 1\] = \(3,\) like cu_seqlens_q; got \(2,\)"),
    ("packed_batch", lambda: packed(**qk()), ValueError,
     r"^attention_policy: q must be \[1, H, Tq, D\] with cu_seqlens_q, .*; got \(2, 4, 5, 8\)"),
    ("packed_start", lambda: packed(cu_seqlens_q=offsets(1, 2, T)), ValueError,
     r"^attention_policy: cu_seqlens_q must start at 0; got 1"),
    ("packed_decrease", lambda: packed(cu_seqlens_k=offsets(0, 3, 2)), ValueError,
     r"^attention_policy: cu_seqlens_k must never decrease; got 2 after 3 at index 2"),
    ("packed_negative", lambda: packed(cu_seqlens_k=offsets(0, -1, 2)), ValueError,
     r"^attention_policy: cu_seqlens_k must never decrease; got -1 after 0 at index 1"),
    ("packed_beyond", lambda: packed(cu_seqlens_k=offsets(0, 3, N + 1)), ValueError,
     r"^attention_policy: cu_seqlens_k must end at most at 7, the tokens of k; got 8"),
    ("packed_padding", lambda: packed(key_padding_mask=tensor(1, N, dtype=torch.bool)), ValueError,
     r"^attention_policy: key_padding_mask is not supported with cu_seqlens_k, .* use scope"),
    ("packed_rows", lambda: packed(rows=slice(0, 2)), TypeError,
     r"^attention_policy: rows must be None or a sequence of .* with cu_seqlens_q; got slice"),
    ("packed_rows_pair", lambda: packed(rows=(0, 2)), TypeError,
     r"^attention_policy: rows\[0\] must be None, a slice of step 1 or \(start, stop\); got int"),
    ("packed_rows_count", lambda: packed(rows=[(0, 2)]), ValueError,
     r"^attention_policy: rows must hold one slice .* each of S=2 sequences; got 1"),
    ("packed_rows_beyond", lambda: packed(rows=[(0, 2), (0, 4)]), ValueError,
     r"^attention_policy: rows\[1\] must satisfy 0 <= start <= stop <= T=3; got 0, 4"),
    ("padded_rows_pairs", lambda: policy(rows=[(0, 2), (0, 3)]), TypeError,
     r"^attention_policy: rows must hold integers; got \(0, 2\)"),
    ("packed_bias", lambda: packed(spans=SPANS, span_bias=tensor(T + 1, S)), ValueError,
     r"^attention_policy: span_bias must be broadcastable to \[B, H, T, S\] = \(1, 4, 5, 3\)"),
    ("packed_scope", lambda: packed(scope=tensor(2, N, dtype=torch.bool)), ValueError,
     r"^attention_policy: scope must be \[N\] or \[B, N\] with B=1, N=7"),
    ("packed_dense", lambda: packed_loss(reference=tensor(1, T, N)), ValueError,
     r"^ral_loss: reference must be \[B, T, max N_i\] = \(1, 5, 4\); got \(1, 5, 7\)"),
    ("packed_advantages", lambda: packed_loss(advantages=tensor(3)), ValueError,
     r"^ral_loss: advantages must be \[S\] or \[1, T\] with S=2, T=5; got \(3,\)"),
    ("packed_mask", lambda: packed_loss(mask=tensor(2, T, dtype=torch.bool)), ValueError,
     r"^ral_loss: mask must be \[B, T\] = \(1, 5\); got \(2, 5\)"),
    ("packed_snapshot_device", lambda: packed_loss(reference=packed_snap(device="meta")),
     ValueError, r"^ral_loss: reference must be on the device of q, cpu; got meta"),
    ("packed_prefix", lambda: packed_snap(shared_prefix=2), ValueError,
     r"^AttentionSnapshot: group_size and shared_prefix are not supported with cu_seqlens_q; .* 2"),
    ("packed_tensors", lambda: packed_snap().tensors(), ValueError,
     r"^AttentionSnapshot: tensors are not along a batch where sequences are packed"),
    ("packed_index", lambda: packed_snap()[tensor(3, dtype=torch.bool)], ValueError,
     r"^AttentionSnapshot: index must be a mask \[B\] = \(2,\); got \(3,\)"),
]
# fmt: on


@pytest.mark.parametrize(
    ("call", "exception", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD]
)
def test_bad_input(call: Callable[[], Any], exception: type[Exception], message: str) -> None:
    with pytest.raises(exception, match=message) as raised:
        call()
    assert raised.type is exception


def test_backend_that_is_missing_or_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS["cuda"], "available", lambda: "no such device")
    with pytest.raises(RuntimeError) as caught:
        against(reference=snap(), backend="cuda")
    assert str(caught.value) == "policy_divergence: backend 'cuda' is not available: no such device"
    assert caught.type is RuntimeError
    monkeypatch.setattr(BACKENDS["cuda"], "available", lambda: None)
    with pytest.raises(NotImplementedError, match="cannot run this call: needs CUDA tensors"):
        against(reference=snap(), backend="cuda")


def test_the_good_calls_are_good() -> None:
    """Every case above differs from a call that works."""
    assert policy().shape == (B, T, N) and policy(spans=SPANS).shape == (B, T, S)
    assert diverge().shape == (B, T)
    assert against().shape == (B, T) and against(reference=snap()).shape == (B, T)
    assert loss().shape == ()
    assert packed().shape == (1, T, 4) and packed(spans=SPANS).shape == (1, T, S)
    assert packed_loss().shape == ()


def test_float64_needs_the_reference() -> None:
    """The compiled backends say so by name; the automatic choice finds the reference."""
    q, k = tensor(B, H, T, D, dtype=torch.float64), tensor(B, HK, N, D, dtype=torch.float64)
    if rk.available_backends()["cpu"] == "yes":
        with pytest.raises(
            NotImplementedError, match=r"^policy: backend 'cpu' cannot run .*float64"
        ):
            attention_policy(q, k, backend="cpu")
        with pytest.raises(NotImplementedError, match=r"^policy_divergence: backend 'cpu' cannot"):
            attention_divergence(q, k, AttentionSnapshot(q, k), backend="cpu")
    assert attention_policy(q, k).dtype == torch.float64


def test_nothing_is_nan() -> None:
    """Empty batches, rows and keys give empty or zero results."""
    for b, t, n in ((0, T, N), (B, 0, N), (B, T, 0)):
        q, k = tensor(b, H, t, D, requires_grad=True), tensor(b, HK, n, D, requires_grad=True)
        for kind in KINDS:
            value = ral_loss(q, k, AttentionSnapshot(q, k), tensor(b), kind=kind)
            assert float(value.detach()) == 0.0
            for gradient in torch.autograd.grad(value, (q, k)):
                assert not gradient.any()
