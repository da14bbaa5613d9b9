"""`record_attention`: captures of modules that call their attention kernel themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, apply_rotary_pos_emb

import ral_kernels as rk
from tests.integrations.eager_maps import assert_same_gradients, gradients, leaves_nothing
from tests.integrations.models import PAD_TOKEN, build

ROWS = (9, 12)
IDS = torch.arange(20, 46).view(2, 13)


def _own_forward(
    self: Any, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any, **_: Any
) -> tuple[Tensor, None]:
    """As trainers replace it: the kernel is called by its name, and nothing by the interface."""
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    q, k, v = (
        project(hidden_states).view(shape).transpose(1, 2)
        for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    rk.record_attention(self, q, k, attention_mask, scaling=self.scaling)
    causal = attention_mask is None
    out = scaled_dot_product_attention(
        q, k, v, attention_mask, is_causal=causal, scale=self.scaling, enable_gqa=True
    )
    return self.o_proj(out.transpose(1, 2).flatten(2)), None


@pytest.fixture
def own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Qwen2Attention, "forward", _own_forward)


def _policy_and_gradients(model: Any, **batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    with rk.capture(model, -1, rows=ROWS) as captured:
        model(**batch, use_cache=False)
    policy = captured.policy()
    weights = torch.linspace(-1, 1, policy.numel()).view_as(policy)
    return policy, gradients(model, (policy * weights).sum())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_recorded_layer_has_the_policy_of_one_that_passes_the_interface(
    monkeypatch: pytest.MonkeyPatch, padded: bool, checkpointed: bool
) -> None:
    batch = {"input_ids": IDS.clone()}
    if padded:
        batch["input_ids"][1, :4] = PAD_TOKEN
        batch["attention_mask"] = (batch["input_ids"] != PAD_TOKEN).long()
    model = build("qwen2", "sdpa").train()
    wanted, wanted_gradients = _policy_and_gradients(model, **batch)
    monkeypatch.setattr(Qwen2Attention, "forward", _own_forward)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with leaves_nothing(model):
        policy, own_gradients = _policy_and_gradients(model, **batch)
    torch.testing.assert_close(policy, wanted, rtol=0, atol=1e-6)
    assert_same_gradients(own_gradients, wanted_gradients)


def test_without_a_capture_nothing_is_recorded(own_forward: None) -> None:
    model = build("qwen2", "sdpa")
    with rk.capture(model, 0) as captured:
        model(input_ids=IDS)
    model(input_ids=IDS)
    assert len(captured) == 1 and captured.layers == [0]


def test_the_scale_window_and_cap_that_were_recorded_are_those_of_the_layer(
    own_forward: None,
) -> None:
    model = build("qwen2", "sdpa")
    attention = model.model.layers[1].self_attn
    q, k = torch.randn(2, 4, 13, 16), torch.randn(2, 2, 13, 16)
    with rk.capture(model, 1) as captured:
        rk.record_attention(attention, q, k, scaling=0.5, sliding_window=4, softcap=2.0)
    layer = captured.layer()
    assert layer.scoring == {"scale": 0.5, "window": (3, None), "softcap": 2.0}
    wanted = rk.attention_policy(q, k, scale=0.5, window=(3, None), softcap=2.0)
    torch.testing.assert_close(layer.policy(), wanted)


def test_a_layer_that_records_nothing_is_named_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rk, "record_attention", lambda *_, **__: None)
    monkeypatch.setattr(Qwen2Attention, "forward", _own_forward)
    model = build("qwen2", "sdpa")
    with rk.capture(model, -1) as captured:
        model(input_ids=IDS)
    with pytest.raises(RuntimeError, match=r"must call rk\.record_attention"):
        captured.policy()


def test_a_steered_layer_is_refused(own_forward: None) -> None:
    model = build("qwen2", "sdpa")
    spans = rk.Spans.from_lengths([5, 8])
    with (
        rk.steer(model, torch.zeros(2), spans=spans),
        pytest.raises(NotImplementedError, match="must call its attention through transformers'"),
    ):
        model(input_ids=IDS)


@pytest.mark.parametrize(
    ("q", "k", "message"),
    [
        ((2, 4, 5, 8), (2, 5, 8), r"k must be \[B, Hk, N, D\]; got \(2, 5, 8\)"),
        ((4, 5, 8), (2, 2, 5, 8), r"q must be \[B, H, T, D\]; got \(4, 5, 8\)"),
        ((2, 4, 5, 8), (2, 3, 5, 8), r"with B=2, D=8 and Hk a divisor of 4; got \(2, 3, 5, 8\)"),
        ((2, 4, 5, 8), (2, 2, 5, 4), r"with B=2, D=8 .* got \(2, 2, 5, 4\)"),
        ((2, 4, 5, 8), (2, 0, 5, 8), r"Hk a divisor of 4; got \(2, 0, 5, 8\)"),
    ],
)
def test_tensors_of_another_form_are_refused(q: Any, k: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"record_attention: .*{message}"):
        rk.record_attention(torch.nn.Identity(), torch.zeros(q), torch.zeros(k))


def test_what_is_no_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="record_attention: q must be"):
        rk.record_attention(torch.nn.Identity(), None, torch.zeros(1, 1, 1, 1))  # type: ignore[arg-type]
