"""How users call the package, as mypy --strict must see it: `tests/packaging/test_types.py`."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import assert_type

import ral_kernels as rk


def marginals_are_there_with_spans(q: Tensor, spans: rk.Spans, either: rk.Spans | None) -> Tensor:
    out, marginals, lse = rk.attention(q, q, q, spans, is_causal=True, backend="cpu")
    assert_type(marginals, Tensor)
    assert_type(rk.attention(q, q, q, spans=spans).marginals, Tensor)
    assert_type(rk.attention(q, q, q).marginals, None)
    assert_type(rk.attention(q, q, q, None).out, Tensor)
    assert_type(rk.attention(q, q, q, either).marginals, Tensor | None)
    rk.attention(q, q, q, spans, head_reduction="mean", rows=slice(1, None), window=(4, None))
    return marginals.sum() + lse.sum() + out.sum()


def any_output(given: rk.AttentionOutput) -> float:
    return 0.0 if given.marginals is None else float(given.marginals.sum())


def no_spans(q: Tensor) -> rk.AttentionOutput[None]:
    return rk.attention(q, q, q)


def passed_on(q: Tensor, spans: rk.Spans) -> float:
    return any_output(rk.attention(q, q, q, spans)) + any_output(rk.attention(q, q, q))


def drop_ins(q: Tensor, spans: rk.Spans, cu: Tensor, flag: bool) -> Tensor:
    assert_type(rk.scaled_dot_product_attention(q, q, q, None, 0.0, True), Tensor)
    out, marginals = rk.scaled_dot_product_attention(q, q, q, is_causal=True, spans=spans)
    assert_type(marginals, Tensor)
    assert_type(rk.flash_attn_func(q, q, q, 0.0, None, True), Tensor)
    assert_type(rk.flash_attn_func(q, q, q, causal=True, spans=spans), tuple[Tensor, Tensor])
    out, lse, probs = rk.flash_attn_func(q, q, q, 0.0, causal=True, return_attn_probs=True)
    assert_type(probs, None)
    assert_type(
        rk.flash_attn_qkvpacked_func(q, return_attn_probs=True, spans=spans),
        tuple[Tensor, Tensor, None, Tensor],
    )
    rk.flash_attn_kvpacked_func(q, q, return_attn_probs=flag)
    assert_type(rk.flash_attn_varlen_func(q, q, q, cu, cu, 5, 5, causal=True), Tensor)
    assert_type(rk.flash_attn_varlen_kvpacked_func(q, q, cu, cu, 5, 5), Tensor)
    assert_type(rk.flash_attn_varlen_qkvpacked_func(q, cu, 5, spans=spans), tuple[Tensor, Tensor])
    assert_type(rk.flash_attn_with_kvcache(q, q, q, cache_seqlens=3), Tensor)
    out, lse = rk.flash_attn_with_kvcache(q, q, q, cache_seqlens=3, return_softmax_lse=True)
    assert_type(lse, Tensor)
    return out


def a_layer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A function that took torch's, and takes ours as it is."""
    attend = rk.scaled_dot_product_attention if query.is_cpu else torch.compile(a_layer)
    result: Tensor = attend(query, key, value)
    return result


def objective(q: Tensor, k: Tensor, advantages: Tensor, cu: Tensor) -> Tensor:
    old = rk.AttentionSnapshot(q, k, rows=(4, 8))
    assert_type(rk.attention_policy(q, k, rows=(4, 8), head_weights=torch.ones(2)), Tensor)
    distance = rk.attention_divergence(q, k, old, "reverse_kl", rows=(4, 8))
    loss = rk.ral_loss(q, k, old, advantages, kind="jsd", reduction="sum", rows=(4, 8))
    target = rk.AttentionTarget(advantages[:, None], cu[None, None], index=cu[None]).to(q.device)
    loss = loss + rk.ral_loss(q, k, target, advantages, kind="cross_entropy", rows=(4, 8))
    assert_type(rk.policy_loss(q, q, advantages, logits=True, kind="kl"), Tensor)
    return loss + distance.mean() + rk.divergence(q, k, "kl", backend="reference").mean()


def packed_objective(q: Tensor, k: Tensor, advantages: Tensor, cu: Tensor) -> Tensor:
    rows: list[tuple[int, int] | slice] = [(4, 8), slice(-2, None)]
    old = rk.AttentionSnapshot(q, k, rows=rows, cu_seqlens_q=cu, cu_seqlens_k=cu)
    assert_type(old[1:], rk.AttentionSnapshot)
    p = rk.attention_policy(q, k, rows=rows, cu_seqlens_q=cu, cu_seqlens_k=cu)
    distance = rk.attention_divergence(q, k, old, rows=rows, cu_seqlens_q=cu, cu_seqlens_k=cu)
    loss = rk.ral_loss(q, k, old, advantages, rows=rows, cu_seqlens_q=cu, cu_seqlens_k=cu)
    return assert_type(p, Tensor).sum() + assert_type(distance, Tensor).mean() + loss


def regions(processor: object, inputs: dict[str, Tensor], q: Tensor) -> Tensor:
    found = rk.region_weights(
        processor,
        inputs,
        [[{"image": 0, "box": [0, 0, 9, 9]}], [[{"frames": [0, 1]}, {"image": 2}]]],
        image_sizes=[(9, 9)] * 3,
        sigma=1.5,
    )
    spans, matrix = assert_type(found, rk.RegionWeights).partition(q.shape[2])
    assert_type(found.values, Tensor)
    return rk.attention(q, q, q, spans).marginals @ matrix[:, None]


def what_is_here() -> list[str]:
    return [name for name, answer in rk.available_backends().items() if answer == "yes"]


def over_ranks(q: Tensor, k: Tensor, advantages: Tensor) -> Tensor:
    sharded = rk.ShardedPolicy(q, k, rows=(3, 9), layout="head_tail", window=4, moves="keys")
    reference = sharded.snapshot(dtype=torch.bfloat16).to("cpu")
    assert_type(reference, rk.ShardedSnapshot)
    assert_type(rk.sharded_bytes(64, 4, num_heads=4, num_kv_heads=2, head_dim=8).busiest, int)
    packed = rk.ShardedPolicy(q, k, cu_seqlens=[0, 4, 9], layout=[[(0, 4)], [(4, 9)]])
    packed.divergence(packed.snapshot(), "kl")
    return sharded.ral_loss(reference, advantages, reduction="sum")
