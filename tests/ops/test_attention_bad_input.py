"""Malformed calls of `attention` and its drop-ins: exception, op and argument as promised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention.bias import causal_upper_left

import ral_kernels as rk
from ral_kernels.ops.attention import interface
from ral_kernels.ops.attention.reference import TorchAttention

B, H, HK, T, N, D, S = 2, 4, 2, 5, 7, 8, 3
NAN, INF = float("nan"), float("inf")


def tensor(*shape: int, dtype: torch.dtype = torch.float32, **kwargs: Any) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, **kwargs)


def call(**changes: Any) -> Any:
    """A well-formed call of `attention`, with changes."""
    arguments: dict[str, Any] = {
        "q": tensor(B, H, T, D),
        "k": tensor(B, HK, N, D),
        "v": tensor(B, HK, N, D),
        "spans": rk.Spans.from_lengths([3, 2, 2]),
    }
    return rk.attention(**{**arguments, **changes})


def torch_like(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "query": tensor(B, H, T, D),
        "key": tensor(B, H, N, D),
        "value": tensor(B, H, N, D),
    }
    return rk.scaled_dot_product_attention(**{**arguments, **changes})


def flash(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "q": tensor(B, T, H, D),
        "k": tensor(B, N, HK, D),
        "v": tensor(B, N, HK, D),
    }
    return rk.flash_attn_func(**{**arguments, **changes})


def cached(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "q": tensor(B, 1, H, D),
        "k_cache": tensor(B, N, HK, D),
        "v_cache": tensor(B, N, HK, D),
    }
    return rk.flash_attn_with_kvcache(**{**arguments, **changes})


class Tagged(torch.Tensor):
    """A subclass: what its memory means, only it knows."""


def cu_seqlens(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def varlen(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "q": tensor(T, H, D),
        "k": tensor(N, HK, D),
        "v": tensor(N, HK, D),
        "cu_seqlens_q": cu_seqlens(0, 2, T),
        "cu_seqlens_k": cu_seqlens(0, 3, N),
        "max_seqlen_q": 3,
        "max_seqlen_k": 4,
    }
    return rk.flash_attn_varlen_func(**{**arguments, **changes})


def spans_out_of_range() -> rk.Spans:
    return rk.Spans(torch.tensor([0, 1, 2, 3, 0, 0, 0]), 3)


# (name, call, exception, regular expression of the message)
# fmt: off
BAD: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    # q
    ("q_list", lambda: call(q=[1.0]), TypeError,
     r"^attention: q must be a \[B, H, T, D\] tensor; got list"),
    ("q_none", lambda: call(q=None), TypeError, r"^attention: q must be .*; got NoneType"),
    ("q_rank_3", lambda: call(q=tensor(H, T, D)), ValueError,
     r"^attention: q must be \[B, H, T, D\]; got \(4, 5, 8\)"),
    ("q_rank_5", lambda: call(q=tensor(1, B, H, T, D)), ValueError,
     r"^attention: q must be \[B, H, T, D\]"),
    ("q_int", lambda: call(q=tensor(B, H, T, D, dtype=torch.int64)), TypeError,
     r"^attention: q must be float32.*int64"),
    ("q_complex", lambda: call(q=tensor(B, H, T, D, dtype=torch.complex64)), TypeError,
     r"^attention: q must be .*complex64"),
    ("q_no_heads", lambda: call(q=tensor(B, 0, T, D)), ValueError,
     r"^attention: q must be .* H >= 1 .*\(2, 0, 5, 8\)"),
    ("q_no_head_dim", lambda: call(q=tensor(B, H, T, 0), k=tensor(B, HK, N, 0)), ValueError,
     r"^attention: q must be .* D >= 1"),
    ("q_stride", lambda: call(q=tensor(B, H, D, T).mT), ValueError,
     r"^attention: q must have a unit last stride; .*\.contiguous\(\)"),
    # k
    ("k_numpy", lambda: call(k=tensor(B, HK, N, D).numpy()), TypeError,
     r"^attention: k must be .*; got ndarray"),
    ("k_rank", lambda: call(k=tensor(HK, N, D)), ValueError,
     r"^attention: k must be \[B, Hk, N, D\] with B=2, D=8; got \(2, 7, 8\)"),
    ("k_batch", lambda: call(k=tensor(3, HK, N, D)), ValueError,
     r"^attention: k must be .*B=2.*got \(3, 2, 7, 8\)"),
    ("k_head_dim", lambda: call(k=tensor(B, HK, N, 16)), ValueError,
     r"^attention: k must be .*D=8; got \(2, 2, 7, 16\)"),
    ("k_head_ratio", lambda: call(k=tensor(B, 3, N, D), v=tensor(B, 3, N, D)), ValueError,
     r"^attention: k must have .* Hk that divides H=4; got Hk=3"),
    ("k_more_heads", lambda: call(k=tensor(B, 8, N, D), v=tensor(B, 8, N, D)), ValueError,
     r"^attention: k must have .*got Hk=8"),
    ("k_no_heads", lambda: call(k=tensor(B, 0, N, D), v=tensor(B, 0, N, D)), ValueError,
     r"^attention: k must have .*got Hk=0"),
    ("k_dtype", lambda: call(k=tensor(B, HK, N, D, dtype=torch.bfloat16)), TypeError,
     r"^attention: k must have q's dtype float32; got bfloat16"),
    ("k_device", lambda: call(k=tensor(B, HK, N, D, device="meta")), ValueError,
     r"^attention: k must be on the device of q, cpu; got meta"),
    ("k_stride", lambda: call(k=tensor(B, HK, N, 2 * D)[..., ::2]), ValueError,
     r"^attention: k must have a unit last stride"),
    # v
    ("v_none", lambda: call(v=None), TypeError, r"^attention: v must be .*; got NoneType"),
    ("v_rank", lambda: call(v=tensor(B, HK, N)), ValueError,
     r"^attention: v must be \[B, Hk, N, Dv\]"),
    ("v_heads", lambda: call(v=tensor(B, H, N, D)), ValueError,
     r"^attention: v must be .*Hk=2.*got \(2, 4, 7, 8\)"),
    ("v_keys", lambda: call(v=tensor(B, HK, N + 1, D)), ValueError,
     r"^attention: v must be .*N=7.*got \(2, 2, 8, 8\)"),
    ("v_empty", lambda: call(v=tensor(B, HK, N, 0)), ValueError,
     r"^attention: v must be .*Dv >= 1; got \(2, 2, 7, 0\)"),
    ("v_dtype", lambda: call(v=tensor(B, HK, N, D, dtype=torch.float64)), TypeError,
     r"^attention: v must have q's dtype float32; got float64"),
    ("v_device", lambda: call(v=tensor(B, HK, N, D, device="meta")), ValueError,
     r"^attention: v must be on the device"),
    ("v_stride", lambda: call(v=tensor(B, HK, D, N).mT), ValueError,
     r"^attention: v must have a unit last stride"),
    # spans
    ("spans_tensor", lambda: call(spans=torch.zeros(N, dtype=torch.int32)), TypeError,
     r"^attention: spans must be None or Spans; got Tensor"),
    ("spans_length", lambda: call(spans=rk.Spans.from_lengths([8])), ValueError,
     r"^attention: spans must have ids .*N=7; got \(8,\)"),
    ("spans_batch",
     lambda: call(spans=rk.Spans(torch.zeros(3, N, dtype=torch.int32), 1)), ValueError,
     r"^attention: spans must .*B=2.*got \(3, 7\)"),
    ("spans_device", lambda: call(spans=rk.Spans.from_lengths([7]).to("meta")), ValueError,
     r"^attention: spans must be on the device"),
    ("spans_ids_too_big", spans_out_of_range, ValueError,
     r"^Spans: ids must be in \[-1, num_spans=3\); got values from 0 to 3"),
    ("spans_ids_negative", lambda: rk.Spans(torch.tensor([-2, 0]), 3), ValueError,
     r"^Spans: ids must be in .*from -2 to 0"),
    ("spans_ids_float", lambda: rk.Spans(torch.zeros(7), 3), TypeError,
     r"^Spans: ids must be int32 or int64; got float32"),
    ("spans_ids_bool", lambda: rk.Spans(torch.zeros(7, dtype=torch.bool), 3), TypeError,
     r"^Spans: ids must be .*got bool"),
    ("spans_ids_list", lambda: rk.Spans([0, 1], 3), TypeError,
     r"^Spans: ids must be an int32 tensor; got list"),  # type: ignore[arg-type]
    ("spans_ids_subclass", lambda: rk.Spans(torch.zeros(7).int().as_subclass(Tagged), 3), TypeError,
     r"^Spans: ids must be an int32 tensor; got Tagged, a subclass of Tensor"),
    ("spans_ids_sparse", lambda: rk.Spans(torch.zeros(7).int().to_sparse(), 3), TypeError,
     r"^Spans: ids must be a dense tensor; got a sparse_coo one"),
    ("spans_ids_rank", lambda: rk.Spans(torch.zeros(1, 2, 3, dtype=torch.int32), 3), ValueError,
     r"^Spans: ids must be \[N\] or \[B, N\]; got \(1, 2, 3\)"),
    ("spans_number_float", lambda: rk.Spans(torch.zeros(7, dtype=torch.int32), 3.0), TypeError,
     r"^Spans: num_spans must be an int; got float"),  # type: ignore[arg-type]
    ("spans_number_negative", lambda: rk.Spans(torch.zeros(0, dtype=torch.int32), -1), ValueError,
     r"^Spans: num_spans must be in .*got -1"),
    # span_bias
    ("span_bias_alone", lambda: call(spans=None, span_bias=tensor(S)), ValueError,
     r"^attention: span_bias needs spans"),
    ("span_bias_shape", lambda: call(span_bias=tensor(B, H, T, S + 1)), ValueError,
     r"^attention: span_bias must be broadcastable to \[B, H, T, S\] = \(2, 4, 5, 3\); got"),
    ("span_bias_rank", lambda: call(span_bias=tensor(1, B, H, T, S)), ValueError,
     r"^attention: span_bias must be broadcastable"),
    ("span_bias_int", lambda: call(span_bias=tensor(S, dtype=torch.int32)), TypeError,
     r"^attention: span_bias must be floating; got int32"),
    ("span_bias_float", lambda: call(span_bias=0.5), TypeError,
     r"^attention: span_bias must be None or a tensor .*; got float"),
    ("span_bias_device", lambda: call(span_bias=tensor(S, device="meta")), ValueError,
     r"^attention: span_bias must be on the device"),
    # attn_mask
    ("mask_shape", lambda: call(attn_mask=tensor(T, N + 1)), ValueError,
     r"^attention: attn_mask must be broadcastable to \[B, H, T, N\] = \(2, 4, 5, 7\); got \(5, "
     r"8\)"),
    ("mask_kv_heads", lambda: call(attn_mask=tensor(B, HK, T, N)), ValueError,
     r"^attention: attn_mask must be broadcastable"),
    ("mask_int", lambda: call(attn_mask=tensor(T, N, dtype=torch.int64)), TypeError,
     r"^attention: attn_mask must be bool .*got int64"),
    ("mask_half", lambda: call(attn_mask=tensor(T, N, dtype=torch.float16)), TypeError,
     r"^attention: attn_mask must be bool .*got float16"),
    ("mask_grad", lambda: call(attn_mask=tensor(T, N, requires_grad=True)), NotImplementedError,
     r"^attention: attn_mask .*span_bias"),
    ("mask_device", lambda: call(attn_mask=tensor(T, N, device="meta")), ValueError,
     r"^attention: attn_mask must be on the device"),
    ("mask_flag", lambda: call(attn_mask=True), TypeError,
     r"^attention: attn_mask must be None or a tensor .*; got bool"),
    # key_padding_mask
    ("padding_int", lambda: call(key_padding_mask=tensor(B, N, dtype=torch.int64)), TypeError,
     r"^attention: key_padding_mask must be bool .*got int64"),
    ("padding_float", lambda: call(key_padding_mask=tensor(B, N)), TypeError,
     r"^attention: key_padding_mask must be bool .*got float32"),
    ("padding_shape", lambda: call(key_padding_mask=tensor(B, T, dtype=torch.bool)), ValueError,
     r"^attention: key_padding_mask must be \[B, N\] = \(2, 7\); got \(2, 5\)"),
    ("padding_rank", lambda: call(key_padding_mask=tensor(N, dtype=torch.bool)), ValueError,
     r"^attention: key_padding_mask must be"),
    ("padding_device",
     lambda: call(key_padding_mask=tensor(B, N, dtype=torch.bool, device="meta")), ValueError,
     r"^attention: key_padding_mask must be on the device"),
    # scale, softcap
    ("scale_negative", lambda: call(scale=-0.1), ValueError,
     r"^attention: scale must be None or a finite number > 0; got -0.1"),
    ("scale_zero", lambda: call(scale=0), ValueError, r"^attention: scale must .*got 0"),
    ("scale_nan", lambda: call(scale=NAN), ValueError, r"^attention: scale must .*got nan"),
    ("scale_inf", lambda: call(scale=INF), ValueError, r"^attention: scale must .*got inf"),
    ("scale_tensor", lambda: call(scale=torch.ones(())), TypeError,
     r"^attention: scale must .*got Tensor"),
    ("scale_flag", lambda: call(scale=True), TypeError, r"^attention: scale must .*got bool"),
    ("softcap_zero", lambda: call(softcap=0.0), ValueError,
     r"^attention: softcap must be None or a finite number > 0; got 0.0"),
    ("softcap_negative", lambda: call(softcap=-3), ValueError,
     r"^attention: softcap must .*got -3"),
    ("softcap_nan", lambda: call(softcap=NAN), ValueError, r"^attention: softcap must .*got nan"),
    ("softcap_text", lambda: call(softcap="30"), TypeError, r"^attention: softcap must .*got str"),
    ("scale_above_float32", lambda: call(scale=1e39), ValueError,
     r"^attention: scale must be None or a finite number > 0 that float32 holds, .*; got 1e\+39"),
    ("scale_below_float32", lambda: call(scale=1e-60), ValueError,
     r"^attention: scale must .* that float32 holds, .*; got 1e-60"),
    ("softcap_below_float32", lambda: call(softcap=np.float64(1e-60)), ValueError,
     r"^attention: softcap must .* that float32 holds, .*; got 1e-60"),
    ("softcap_above_float32", lambda: call(softcap=10**300), ValueError,
     r"^attention: softcap must .* that float32 holds, .*; got 1000"),
    # is_causal, window, rows
    ("causal_int", lambda: call(is_causal=1), TypeError,
     r"^attention: is_causal must be True or False; got 1"),
    ("causal_none", lambda: call(is_causal=None), TypeError,
     r"^attention: is_causal must be True or False; got None"),
    ("window_float", lambda: call(window=2.0), TypeError,
     r"^attention: window must be None, an int or \(left, right\); got float"),
    ("window_flag", lambda: call(window=True), TypeError, r"^attention: window must be .*got bool"),
    ("window_negative", lambda: call(window=-2), ValueError,
     r"^attention: window must hold bounds >= 0.*got -2"),
    ("window_triple", lambda: call(window=(1, 2, 3)), ValueError,
     r"^attention: window must be .*got 3 elements"),
    ("window_element", lambda: call(window=(1.5, 2)), TypeError,
     r"^attention: window must hold integers or None; got 1.5"),
    ("rows_step", lambda: call(rows=slice(0, 4, 2)), ValueError,
     r"^attention: rows must be a slice of step 1; got step 2"),
    ("rows_beyond", lambda: call(rows=slice(0, T + 1)), ValueError,
     r"^attention: rows must satisfy .*T=5; got 0, 6"),
    ("rows_before", lambda: call(rows=(-T - 1, None)), ValueError,
     r"^attention: rows must satisfy .*got -6, None"),
    ("rows_reversed", lambda: call(rows=(4, 2)), ValueError,
     r"^attention: rows must satisfy .*got 4, 2"),
    ("rows_int", lambda: call(rows=3), TypeError,
     r"^attention: rows must be None, a slice of step 1 or \(start, stop\); got int"),
    ("rows_tensor", lambda: call(rows=torch.arange(3)), TypeError,
     r"^attention: rows must be .*got Tensor"),
    ("rows_float", lambda: call(rows=(0.0, 3.0)), TypeError,
     r"^attention: rows must hold integers; got 0.0"),
    ("rows_triple", lambda: call(rows=(0, 1, 2)), ValueError,
     r"^attention: rows must be \(start, stop\); got 3 elements"),
    # head_reduction, backend
    ("reduction_unknown", lambda: call(head_reduction="sum"), ValueError,
     r"^attention: head_reduction must be None or 'mean'; got 'sum'"),
    ("reduction_flag", lambda: call(head_reduction=True), ValueError,
     r"^attention: head_reduction must be .*got True"),
    ("backend_unknown", lambda: call(backend="tpu"), ValueError,
     r"^attention: backend must be None or one of cuda, triton, cpu, reference; got 'tpu'"),
    ("backend_type", lambda: call(backend=3), TypeError,
     r"^attention: backend must be None or a name; got int"),
    # dense tensors of no subclass
    ("q_nested", lambda: call(q=torch.nested.nested_tensor([tensor(H, T, D)] * B)), TypeError,
     r"^attention: q must be a dense tensor; got a nested one"),
    ("q_sparse", lambda: call(q=tensor(B, H, T, D).to_sparse()), TypeError,
     r"^attention: q must be a dense tensor; got a sparse_coo one"),
    ("k_jagged",
     lambda: call(k=torch.nested.nested_tensor([tensor(HK, N, D)] * B, layout=torch.jagged)),
     TypeError, r"^attention: k must be .*got NestedTensor, a subclass of Tensor"),
    *((f"{name}_subclass", lambda name=name, x=x: call(**{name: x.as_subclass(Tagged)}), TypeError,
       rf"^attention: {name} must be .*got Tagged, a subclass of Tensor that is not supported")
      for name, x in {
          "q": tensor(B, H, T, D), "k": tensor(B, HK, N, D), "v": tensor(B, HK, N, D),
          "span_bias": tensor(S), "attn_mask": tensor(T, N),
          "key_padding_mask": tensor(B, N, dtype=torch.bool),
      }.items()),
    ("causal_bias_sizes", lambda: call(attn_mask=causal_upper_left(T, T)), ValueError,
     r"^attention: attn_mask must be a CausalBias of 5 queries and 7 keys; got one of 5 and 5"),
    ("causal_bias_window", lambda: call(attn_mask=causal_upper_left(T, N), window=2), ValueError,
     r"^attention: attn_mask must not be causal_upper_left with is_causal or a window"),
    ("sdpa_causal_bias",
     lambda: torch_like(attn_mask=causal_upper_left(T, N), is_causal=True), ValueError,
     r"^scaled_dot_product_attention: attn_mask must be None with is_causal=True; got CausalBias"),
    ("sdpa_mask_subclass", lambda: torch_like(attn_mask=tensor(T, N).as_subclass(Tagged)),
     TypeError, r"^scaled_dot_product_attention: attn_mask must be .*got Tagged"),
    ("sdpa_nested", lambda: torch_like(query=torch.nested.nested_tensor([tensor(H, T, D)] * B)),
     TypeError, r"^scaled_dot_product_attention: query must be a dense tensor; got a nested"),
    # scaled_dot_product_attention
    ("sdpa_dropout", lambda: torch_like(dropout_p=0.1), NotImplementedError,
     r"^scaled_dot_product_attention: dropout is not supported: dropout_p must be 0.0; got 0.1"),
    ("sdpa_mask_causal", lambda: torch_like(attn_mask=tensor(T, N), is_causal=True), ValueError,
     r"^scaled_dot_product_attention: attn_mask must be None with is_causal=True"),
    ("sdpa_rank", lambda: torch_like(query=tensor(D)), ValueError,
     r"^scaled_dot_product_attention: query must have two or more dimensions; got \(8,\)"),
    ("sdpa_type", lambda: torch_like(key=None), TypeError,
     r"^scaled_dot_product_attention: key must be .*got NoneType"),
    ("sdpa_gqa_unasked",
     lambda: torch_like(key=tensor(B, HK, N, D), value=tensor(B, HK, N, D)), ValueError,
     r"^scaled_dot_product_attention: query, key and value .*enable_gqa=True"),
    ("sdpa_gqa_ratio",
     lambda: torch_like(key=tensor(B, 3, N, D), value=tensor(B, 3, N, D), enable_gqa=True),
     ValueError,
     r"^scaled_dot_product_attention: key must have heads that divide Hq=4"),
    ("sdpa_gqa_no_heads",
     lambda: torch_like(key=tensor(B, 0, N, D), enable_gqa=True), ValueError,
     r"^scaled_dot_product_attention: key must have heads that divide Hq=.*got"),
    ("sdpa_gqa_rank",
     lambda: torch_like(key=tensor(N, D), value=tensor(N, D), enable_gqa=True), ValueError,
     r"^scaled_dot_product_attention: key must have heads"),
    ("sdpa_batch", lambda: torch_like(key=tensor(3, H, N, D), value=tensor(3, H, N, D)), ValueError,
     r"^scaled_dot_product_attention: .*leading dimensions that broadcast"),
    ("sdpa_embedding", lambda: torch_like(key=tensor(B, H, N, D + 1)), ValueError,
     r"^scaled_dot_product_attention: key must be \[\.\.\., S, E\] with E=8"),
    ("sdpa_keys", lambda: torch_like(value=tensor(B, H, N + 1, D)), ValueError,
     r"^scaled_dot_product_attention: value must be .*S=7"),
    ("sdpa_mask_shape", lambda: torch_like(attn_mask=tensor(T, T)), ValueError,
     r"^scaled_dot_product_attention: attn_mask must be broadcastable"),
    ("sdpa_mask_dtype", lambda: torch_like(attn_mask=tensor(T, N, dtype=torch.int32)), TypeError,
     r"^scaled_dot_product_attention: attn_mask must be bool"),
    ("sdpa_mask_grad",
     lambda: torch_like(attn_mask=tensor(T, N, requires_grad=True)), NotImplementedError,
     r"^scaled_dot_product_attention: attn_mask"),
    ("sdpa_dtype", lambda: torch_like(value=tensor(B, H, N, D, dtype=torch.float16)), TypeError,
     r"^scaled_dot_product_attention: value must have query's dtype"),
    ("sdpa_causal", lambda: torch_like(is_causal=1), TypeError,
     r"^scaled_dot_product_attention: is_causal must be True or False"),
    ("sdpa_scale", lambda: torch_like(scale=-1.0), ValueError,
     r"^scaled_dot_product_attention: scale must be"),
    ("sdpa_spans", lambda: torch_like(spans=rk.Spans.from_lengths([N + 1])), ValueError,
     r"^scaled_dot_product_attention: spans must"),
    # flash_attn_func
    ("flash_dropout", lambda: flash(dropout_p=0.5), NotImplementedError,
     r"^flash_attn_func: dropout is not supported: dropout_p must be 0.0; got 0.5"),
    ("flash_alibi", lambda: flash(alibi_slopes=tensor(H)), NotImplementedError,
     r"^flash_attn_func: alibi_slopes is not supported: it must be None; got Tensor"),
    ("flash_rank", lambda: flash(q=tensor(T, H, D)), ValueError,
     r"^flash_attn_func: q must be \[B, S, H, D\]; got \(5, 4, 8\)"),
    ("flash_window", lambda: flash(window_size=3), TypeError,
     r"^flash_attn_func: window_size must be \(left, right\); got int"),
    ("flash_window_triple", lambda: flash(window_size=torch.tensor([1, 2, 3])), ValueError,
     r"^flash_attn_func: window_size must be .*got 3 elements"),
    ("flash_softcap", lambda: flash(softcap=NAN), ValueError, r"^flash_attn_func: softcap must"),
    ("flash_subclass", lambda: flash(v=tensor(B, N, HK, D).as_subclass(Tagged)), TypeError,
     r"^flash_attn_func: v must be .*got Tagged"),
    ("flash_scale", lambda: flash(softmax_scale=NAN), ValueError,
     r"^flash_attn_func: softmax_scale must .*got nan"),
    ("flash_head_ratio", lambda: flash(k=tensor(B, N, 3, D), v=tensor(B, N, 3, D)), ValueError,
     r"^flash_attn_func: k must have .*divides H=4; got Hk=3"),
    ("flash_causal", lambda: flash(causal="yes"), TypeError,
     r"^flash_attn_func: causal must be True or False"),
    ("kvpacked_shape",
     lambda: rk.flash_attn_kvpacked_func(tensor(B, T, H, D), tensor(B, N, 3, HK, D)), ValueError,
     r"^flash_attn_kvpacked_func: kv must be \[B, S, 2, Hk, D\]; got \(2, 7, 3, 2, 8\)"),
    ("qkvpacked_rank", lambda: rk.flash_attn_qkvpacked_func(tensor(B, T, H, D)), ValueError,
     r"^flash_attn_qkvpacked_func: qkv must be \[B, S, 3, H, D\]; got \(2, 5, 4, 8\)"),
    ("qkvpacked_varlen", lambda: rk.flash_attn_varlen_qkvpacked_func(
        tensor(T, 3, H, D), cu_seqlens(0, 2, T), 2), ValueError,
     r"^flash_attn_varlen_qkvpacked_func: max_seqlen must be at least the longest sequence, 3"),
    # flash_attn_with_kvcache
    *((f"kvcache_{name}", lambda name=name: cached(**{name: tensor(1)}), NotImplementedError,
       rf"^flash_attn_with_kvcache: {name} is not supported: it must be None; got Tensor")
      for name in ("rotary_cos", "rotary_sin", "block_table", "alibi_slopes")),
    ("kvcache_half", lambda: cached(k=tensor(B, 1, HK, D), cache_seqlens=3), ValueError,
     r"^flash_attn_with_kvcache: k and v must be given together"),
    ("kvcache_full", lambda: cached(k=tensor(B, 1, HK, D), v=tensor(B, 1, HK, D)), ValueError,
     r"^flash_attn_with_kvcache: cache_seqlens must lie in 0 to 6, .*; got 7"),
    ("kvcache_beyond", lambda: cached(cache_seqlens=cu_seqlens(3, 8)), ValueError,
     r"^flash_attn_with_kvcache: cache_seqlens must lie in 0 to 7; got values from 3 to 8"),
    ("kvcache_lengths_float", lambda: cached(cache_seqlens=tensor(B)), TypeError,
     r"^flash_attn_with_kvcache: cache_seqlens must be int32; got float32"),
    ("kvcache_lengths_text", lambda: cached(cache_seqlens="3"), TypeError,
     r"^flash_attn_with_kvcache: cache_seqlens must be None, an int or .*; got str"),
    ("kvcache_sample", lambda: cached(cache_batch_idx=cu_seqlens(0, 2)), ValueError,
     r"^flash_attn_with_kvcache: cache_batch_idx must lie in 0 to 1; got values from 0 to 2"),
    ("kvcache_new_shape", lambda: cached(
        k=tensor(B, 1, H, D), v=tensor(B, 1, HK, D), cache_seqlens=3), ValueError,
     r"^flash_attn_with_kvcache: k must be \(2, 1, 2, 8\); got \(2, 1, 4, 8\)"),
    # flash_attn_varlen_func
    ("varlen_dropout", lambda: varlen(dropout_p=0.5), NotImplementedError,
     r"^flash_attn_varlen_func: dropout is not supported"),
    ("varlen_pages", lambda: varlen(block_table=tensor(1, 1)), NotImplementedError,
     r"^flash_attn_varlen_func: block_table is not supported: it must be None"),
    ("varlen_rank", lambda: varlen(q=tensor(1, T, H, D)), ValueError,
     r"^flash_attn_varlen_func: q must be \[total, H, D\]"),
    ("varlen_cu_int64",
     lambda: varlen(cu_seqlens_q=cu_seqlens(0, 2, T, dtype=torch.int64)), TypeError,
     r"^flash_attn_varlen_func: cu_seqlens_q must be int32; got int64"),
    ("varlen_cu_list", lambda: varlen(cu_seqlens_k=[0, 3, N]), TypeError,
     r"^flash_attn_varlen_func: cu_seqlens_k must be an int32 tensor .*got list"),
    ("varlen_cu_rank", lambda: varlen(cu_seqlens_k=cu_seqlens(0, 3, N)[None]), ValueError,
     r"^flash_attn_varlen_func: cu_seqlens_k must be \[number of sequences \+ 1\]; got \(1, 3\)"),
    ("varlen_cu_decreasing", lambda: varlen(cu_seqlens_q=cu_seqlens(0, 6, T)), ValueError,
     r"^flash_attn_varlen_func: cu_seqlens_q must start at 0, never decrease and end at 5"),
    ("varlen_cu_end", lambda: varlen(cu_seqlens_k=cu_seqlens(0, 3, 6)), ValueError,
     r"^flash_attn_varlen_func: cu_seqlens_k must .*end at 7.*got \[0, 3, 6\]"),
    ("varlen_cu_start", lambda: varlen(cu_seqlens_k=cu_seqlens(1, 3, N)), ValueError,
     r"^flash_attn_varlen_func: cu_seqlens_k must start at 0"),
    ("varlen_cu_count", lambda: varlen(cu_seqlens_k=cu_seqlens(0, N), max_seqlen_k=N), ValueError,
     r"^flash_attn_varlen_func: cu_seqlens_k must have the length of cu_seqlens_q, 3; got 2"),
    ("varlen_cu_device", lambda: varlen(cu_seqlens_q=cu_seqlens(0, 2, T).to("meta")), ValueError,
     r"^flash_attn_varlen_func: cu_seqlens_q must be on the device"),
    ("varlen_max", lambda: varlen(max_seqlen_q=2), ValueError,
     r"^flash_attn_varlen_func: max_seqlen_q must be at least the longest sequence, 3; got 2"),
    ("varlen_max_type", lambda: varlen(max_seqlen_k=4.0), TypeError,
     r"^flash_attn_varlen_func: max_seqlen_k must be an int; got float"),
    ("varlen_max_vector", lambda: varlen(max_seqlen_q=torch.tensor([3])), TypeError,
     r"^flash_attn_varlen_func: max_seqlen_q must be an int; got Tensor"),
    ("varlen_spans_batch",
     lambda: varlen(spans=rk.Spans(torch.zeros(1, N, dtype=torch.int32), 1)), ValueError,
     r"^flash_attn_varlen_func: spans must have ids \[total_k\]=7"),
]
# fmt: on


@pytest.mark.parametrize(
    ("bad", "exception", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_bad_input(bad: Callable[[], Any], exception: type[Exception], message: str) -> None:
    with pytest.raises(exception, match=message) as caught:
        bad()
    assert caught.type is exception  # not a subclass: NotImplementedError is a RuntimeError


def test_backend_that_is_missing_or_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface.BACKENDS["cuda"], "available", lambda: "no such device")
    with pytest.raises(RuntimeError) as caught:
        call(backend="cuda")
    assert str(caught.value) == "attention: backend 'cuda' is not available: no such device"
    assert caught.type is RuntimeError
    monkeypatch.setattr(interface.BACKENDS["cuda"], "available", lambda: None)
    with pytest.raises(NotImplementedError, match="cannot run this call: needs CUDA tensors"):
        call(backend="cuda")


def test_well_formed_calls_pass() -> None:
    """The calls that the table spoils are good ones."""
    for good in (call, torch_like, flash, varlen, cached):
        good()
    call(q=torch.nn.Parameter(tensor(B, H, T, D)))  # the one subclass that means what it holds


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, T, N), (B, 0, N), (B, T, 0), (0, 0, 0)])
def test_zero_sizes_are_valid(batch: int, queries: int, keys: int, backend: str) -> None:
    q = torch.randn(batch, H, queries, D, requires_grad=True)
    k = torch.randn(batch, HK, keys, D, requires_grad=True)
    v = torch.randn(batch, HK, keys, D + 1, requires_grad=True)
    spans = rk.Spans(torch.full((keys,), 1, dtype=torch.int32), S)
    result = rk.attention(q, k, v, spans, is_causal=True, backend=backend)
    assert result.marginals is not None
    assert result.out.shape == (batch, H, queries, D + 1) and not result.out.any()
    assert result.marginals.shape == (batch, H, queries, S) and not result.marginals.any()
    assert result.lse.shape == (batch, H, queries) and (result.lse == -INF).all()
    (result.out.sum() + result.marginals.sum()).backward()
    for tensor in (q, k, v):
        assert tensor.grad is not None and not tensor.grad.any()


@pytest.mark.parametrize(
    "change", [{"q": tensor(B, 1, H, D, dtype=torch.float16)}, {"softcap": NAN}]
)
def test_a_refused_call_leaves_the_cache_alone(change: dict[str, Any]) -> None:
    caches = {"k_cache": tensor(B, N, HK, D), "v_cache": tensor(B, N, HK, D)}
    new = torch.ones(B, 1, HK, D)
    with pytest.raises((TypeError, ValueError), match=r"^flash_attn_with_kvcache: "):
        cached(**caches, k=new, v=new, cache_seqlens=3, **change)
    assert not any(cache.any() for cache in caches.values())


def test_missing_build_is_a_runtime_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """An explicit backend runs or raises; the automatic choice goes on to the next."""

    class Missing(TorchAttention):
        def available(self) -> str:
            return "the library is not built"

    monkeypatch.setitem(interface.BACKENDS, "cpu", Missing())
    with pytest.raises(
        RuntimeError, match=r"^attention: backend 'cpu' is not available: the library is not built"
    ) as e:
        call(backend="cpu")
    assert e.type is RuntimeError
    assert rk.available_backends()["cpu"] == "the library is not built"
    call()


def test_a_backend_that_cannot_take_the_tensors_is_not_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A library that was not built would be searched for, and its note read, in every call."""

    def look() -> None:
        raise AssertionError("these tensors are on the CPU")

    monkeypatch.setattr(interface.BACKENDS["cuda"], "available", look)
    call()


def test_incapable_backends_give_their_reasons(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Incapable(TorchAttention):
        def can_run(self, args: Any) -> str:
            return f"head_dim {args.head_dim} is no prime"

    monkeypatch.setitem(interface.BACKENDS, "cpu", Incapable())
    with caplog.at_level("DEBUG", logger="ral_kernels.runtime.backends"):
        call()
    assert "attention: backend cpu skipped: head_dim 8 is no prime" in caplog.text
    with pytest.raises(
        NotImplementedError, match=r"^attention: backend 'cpu' cannot run this call: head_dim 8"
    ):
        call(backend="cpu")
    monkeypatch.setitem(interface.BACKENDS, "reference", Incapable())
    with pytest.raises(
        NotImplementedError,
        match=r"no backend can run this call .*cpu: head_dim 8.*reference: head_dim 8",
    ):
        call()


def test_mask_that_requires_grad_passes_without_grad() -> None:
    with torch.no_grad():
        call(attn_mask=tensor(T, N, requires_grad=True))
