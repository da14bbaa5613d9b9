"""`capture` as an object: several forwards, nesting, exceptions, bad input, what it refuses."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

import ral_kernels as rk
from ral_kernels.integrations.transformers import register
from ral_kernels.integrations.transformers.capture import capture
from tests.integrations.eager_maps import eager_policy, footprint, leaves_nothing
from tests.integrations.models import FAMILIES, TEXT, build, inputs


@pytest.fixture(autouse=True, scope="module")
def implementations():
    register()


@pytest.fixture
def model() -> Any:
    return build("qwen2", "sdpa")


BATCH = inputs("qwen2")
SPAN = rk.Spans.from_lengths([3])
OTHER = {"input_ids": BATCH["input_ids"].flip(-1)}


def _run(model: Any, batch: dict[str, torch.Tensor] = BATCH) -> Any:
    return model(**batch, use_cache=False)


# -- one capture, several forwards ----------------------------------------------------------------


def test_methods_are_about_the_last_forward_and_all_are_kept(model):
    with capture(model) as captured:
        _run(model)
        first = captured.policy()  # inside of the `with`, too
        _run(model, OTHER)
        second = captured.policy()
    assert len(captured) == 2 and not torch.equal(first, second)
    assert torch.equal(captured[0].policy(), first) and torch.equal(captured[-1].policy(), second)
    assert torch.equal(captured.policy(), second)
    with pytest.raises(IndexError):
        captured[2]


def test_opening_again_starts_anew_and_clear_forgets(model):
    captured = capture(model)
    for _ in range(2):
        with leaves_nothing(model), captured:
            _run(model)
        assert len(captured) == 1
    with captured:
        _run(model)
        captured.clear()
        assert len(captured) == 0
        _run(model, OTHER)
    assert len(captured) == 1
    captured.clear()
    with pytest.raises(RuntimeError, match="a forward must run inside the `with`"):
        captured.policy()


def test_layers_by_number(model):
    with capture(model, [1, -2]) as captured, capture(model, "all") as everything:
        _run(model)
    assert captured.layers == everything.layers == [0, 1]
    assert torch.equal(captured.policy(-1), everything.policy(1))
    assert not torch.equal(captured.policy(0), captured.policy(1))
    with pytest.raises(ValueError, match="layer must be one of 0, 1; got None"):
        captured.policy()
    with capture(model, 0) as only:
        _run(model)
    assert torch.equal(only.policy(), captured.policy(0))
    with pytest.raises(ValueError, match="layer must be one of 0; got -1"):
        only.policy(-1)


def test_defaults_of_the_capture_and_arguments_of_the_call(model):
    spans = rk.Spans.from_lengths([2, 2])  # of 7 keys
    scope = torch.tensor([True, True, False])
    with capture(model, rows=(4, 7), spans=spans, scope=scope) as captured:
        _run(model)
    wanted = rk.attention_policy(
        captured.q(),
        captured.k(),
        rows=(4, 7),
        spans=spans.extend_to(7),
        scope=torch.tensor([True, True, False, False, False, False, False]),
    )
    assert torch.equal(captured.policy(), wanted) and wanted.shape == (2, 3, 2)
    assert captured.policy(rows=(6, 7), spans=rk.Spans.from_lengths([7])).shape == (2, 1, 1)
    assert captured.snapshot().num_rows == 3
    kept = captured.policy(exclude_self=False, spans=rk.Spans.from_lengths([1] * 7))
    assert kept.shape == (2, 3, 7)
    with pytest.raises(ValueError, match=r"rows must satisfy 0 <= start <= stop <= T=7"):
        captured.policy(rows=(4, 8))
    with pytest.raises(ValueError, match="spans must have ids"):
        captured.policy(spans=rk.Spans.from_lengths([8]))


def test_marginals_need_spans(model):
    with capture(model) as captured:
        _run(model)
    with pytest.raises(ValueError, match=r"capture\.marginals: spans must be given"):
        captured.marginals()


def test_detach(model):
    with capture(model) as captured, capture(model, detach=True) as detached:
        _run(model)
    assert captured.q().requires_grad and captured.k().requires_grad
    assert not detached.q().requires_grad and not detached.policy().requires_grad
    assert torch.equal(detached.q(), captured.q())


# -- leaving the model as it was ------------------------------------------------------------------


def test_nothing_is_left_after_an_exception(model):
    model.gradient_checkpointing_enable()
    with leaves_nothing(model), pytest.raises(RuntimeError, match="boom"), capture(model, "all"):
        _run(model)
        raise RuntimeError("boom")
    _run(model)


def test_an_interrupted_forward(model):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with leaves_nothing(model), capture(model, "all") as captured:
        _run(model)
        handle = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            _run(model)
        handle.remove()
        with pytest.raises(RuntimeError, match="one was interrupted"):
            captured.policy(0)
        captured.clear()
        _run(model)
    assert len(captured) == 1


def test_an_exception_in_attention_restores_the_configuration(model):
    attention = model.model.layers[1].self_attn
    with leaves_nothing(model), capture(model):
        tapped = attention.config
        attention.k_proj.weight.data = attention.k_proj.weight.data.double()
        with pytest.raises(RuntimeError):
            _run(model)
        assert attention.config is tapped
        attention.k_proj.weight.data = attention.k_proj.weight.data.float()


def test_nested_and_interleaved(model):
    outer, inner = capture(model, "all"), capture(model, 1)
    before = footprint(model)
    outer.__enter__()
    _run(model)
    inner.__enter__()
    _run(model)
    outer.__exit__(None, None, None)  # not in the order of opening
    assert footprint(model) != before
    _run(model)
    inner.__exit__(None, None, None)
    assert footprint(model) == before
    _run(model)
    assert (len(outer), len(inner)) == (2, 2)
    assert torch.equal(outer[1].policy(1), inner[0].policy())
    with outer, pytest.raises(RuntimeError, match="open already"):
        outer.__enter__()
    assert footprint(model) == before


def test_state_dict_and_copies_while_open(model):
    import copy

    keys = list(model.state_dict())
    with capture(model):
        assert list(model.state_dict()) == keys
        clone = copy.deepcopy(model)
        logits = _run(model).logits
    assert torch.equal(_run(clone).logits, logits)


def test_the_models_implementation_may_change(model):
    batch = inputs("qwen2", padding="left")
    before = model.config._attn_implementation
    with capture(model) as captured:
        _run(model, batch)
        model.set_attn_implementation("eager")
        _run(model, batch)
    assert before == "sdpa" and model.model.layers[1].self_attn.config is model.config
    torch.testing.assert_close(captured[0].policy(), captured[1].policy(), atol=1e-6, rtol=1e-5)


# -- what it is given -----------------------------------------------------------------------------


class Wrapper(nn.Module):
    """A trainer's module around one model or several."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_decoder_is_found(family):
    whole = build(family)
    wrapped = Wrapper(nn.Sequential(whole))
    (layer,) = capture(wrapped)._found
    assert layer.attention.config is whole.config.get_text_config()
    assert (layer.index, layer.count) == (1, 2)
    assert capture(whole.get_decoder())._found == [layer]


def test_bad_models(model):
    with pytest.raises(TypeError, match=r"capture: model must be a transformers model.*got str"):
        capture("qwen2")
    with pytest.raises(ValueError, match="must hold one transformers model; got Linear with none"):
        capture(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got Wrapper with Qwen2ForCausalLM, Qwen2ForCausalLM"):
        capture(Wrapper(model, build("qwen2")))
    from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

    tiny = {"vocab_size": 8, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    with pytest.raises(NotImplementedError, match="must have its decoder layers in a ModuleList"):
        capture(BertModel(BertConfig(**tiny, num_hidden_layers=1)))
    with pytest.raises(NotImplementedError, match="must have its decoder layers in a ModuleList"):
        capture(GPT2Model(GPT2Config(vocab_size=8, n_embd=8, n_head=2, n_layer=1)))


def test_attention_that_reads_its_own_name_is_refused(model):
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

    class NameReader(Qwen2Attention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if self.config._attn_implementation == "sdpa":
                return super().forward(*args, **kwargs)
            raise AssertionError("another path")

    model.model.layers[1].self_attn.__class__ = NameReader
    with pytest.raises(NotImplementedError, match="NameReader compares the name"):
        capture(model)
    capture(model, 0)


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (2, ValueError, r"layers must lie in \[-2, 2\); got 2"),
        (-3, ValueError, r"layers must lie in \[-2, 2\); got -3"),
        ([], ValueError, "layers must pick at least one layer"),
        ("last", TypeError, "layers must be an int, a sequence of ints or 'all'; got 'last'"),
        (True, TypeError, "layers must be an int"),
        (None, TypeError, "layers must be an int"),
    ],
)
def test_bad_layers(model, layers, error, message):
    with pytest.raises(error, match=message):
        capture(model, layers)


def test_other_bad_arguments(model):
    with pytest.raises(ValueError, match=r"rows must be None, a slice, \(start, stop\) or 'all'"):
        capture(model, rows="generated")
    with pytest.raises(TypeError, match="spans must be None or Spans; got list"):
        capture(model, spans=[1, 2])
    with pytest.raises(TypeError, match="detach must be True or False"):
        capture(model, detach=1)
    with capture(model) as captured:
        _run(model)
    with pytest.raises(TypeError, match="steered must be True or False"):
        captured.policy(steered=None)
    with pytest.raises(TypeError, match="layer must be None or an int; got '1'"):
        captured.policy("1")


def test_eager_without_a_mask_attends_both_ways():
    """None means causal to sdpa and flash attention, and nothing at all to eager."""
    model = build("qwen2", "eager")
    with capture(model) as captured:
        out = model(
            **BATCH,
            attention_mask={"full_attention": None},
            output_attentions=True,
            use_cache=False,
        )
    wanted = eager_policy(out.attentions[-1])
    assert wanted[:, 0, 1:].min() > 0.0
    torch.testing.assert_close(captured.policy(), wanted, atol=1e-6, rtol=1e-5)
    with_self = captured.marginals(spans=rk.Spans.from_lengths([1] * 7))
    torch.testing.assert_close(with_self, out.attentions[-1], atol=1e-6, rtol=1e-5)


# -- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_several_packed_rows_are_refused(implementation):
    """One packed row is supported: test_capture_packed.py."""
    model = build("qwen2", implementation)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]]).expand(2, -1)
    with capture(model) as captured:
        model(**BATCH, position_ids=positions, use_cache=False)
    assert captured.cu_seqlens is None
    with pytest.raises(NotImplementedError, match="packed sequences in a batch of more than one"):
        captured.policy()
    assert captured.policy(rows=(0, 4)).shape == (2, 4, 7)  # the first sequence is alone
    assert captured.q().shape[2] == 7


def test_rows_that_attend_both_ways_are_refused():
    batch = inputs("gemma3")
    model = build("gemma3", "sdpa")
    with capture(model) as captured:
        _run(model, batch)
    with pytest.raises(NotImplementedError, match="images that attend both ways: choose rows"):
        captured.policy()
    image = int((batch["input_ids"][0] == 300).nonzero()[0, 0])
    assert captured.policy(rows=(0, image)).shape[1] == image
    assert captured.policy(rows=(image + 4, None)) is not None


def test_sinks_are_refused():
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = GptOssForCausalLM(config).eval()
    with capture(model) as captured:
        _run(model)
    with pytest.raises(NotImplementedError, match="layer 1 was given 's_aux'"):
        captured.policy()
    assert captured.q().shape == (2, 4, 7, 8)


def test_a_bias_in_the_mask_is_refused(model):
    bias = torch.randn(2, 1, 7, 7).tril()
    with capture(model) as captured:
        model(**BATCH, attention_mask=bias, use_cache=False)
    with pytest.raises(NotImplementedError, match="must hold 0 and -inf"):
        captured.policy()


def test_a_step_that_does_not_see_the_whole_prompt_is_refused(model):
    mask = torch.ones(2, 8, dtype=torch.int64)
    with torch.no_grad(), capture(model) as captured:
        for hidden in (None, 3):  # a prompt's key that only the step does not see
            cache = _cached(model)
            if hidden is not None:
                mask[:, hidden] = 0
            model(BATCH["input_ids"][:, :1], attention_mask=mask, past_key_values=cache)
    assert captured[0].policy().shape == (2, 2, 8)
    with pytest.raises(NotImplementedError, match="the mask of the last step differs"):
        captured.policy()


def _cached(model: Any) -> Any:
    return model(**BATCH, use_cache=True).past_key_values


def test_a_static_cache_is_refused_in_single_steps_too(model):
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=12)
    with torch.no_grad():
        with capture(model) as captured:
            model(**BATCH, past_key_values=cache, use_cache=True)
        assert captured.k().shape[2] == 7  # without its empty tail
        with capture(model) as captured:
            model(BATCH["input_ids"][:, :1], past_key_values=cache, use_cache=True)
    with pytest.raises(NotImplementedError, match="static cache"):
        captured.policy()


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("Lfm2", {"layer_types": ["conv", "full_attention", "conv"]}, "1 .*got 2, a Lfm2Decoder"),
        (
            "MllamaText",
            {"cross_attention_layers": [2], "rope_parameters": {"rope_type": "default"}},
            "0, 1 .*got 2, a MllamaCrossAttentionDecoderLayer",
        ),
    ],
)
def test_layers_without_self_attention_are_told_from_those_with_it(
    name: str, options: dict[str, Any], wanted: str
) -> None:
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**TEXT, "num_hidden_layers": 3, **options})
    model_class = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")
    hybrid = model_class._from_config(config, attn_implementation="sdpa")
    for user in (capture, functools.partial(rk.steer, span_bias=torch.zeros(1), spans=SPAN)):
        with pytest.raises(
            NotImplementedError, match=f"layers must pick .* self-attention .* are {wanted}"
        ):
            user(hybrid, layers=-1)


# -- a target that rows share ---------------------------------------------------------------------


def test_against_a_target(model):
    """It is handed on to the ops, and so is a tensor; the loss pulls on the model's parameters."""
    with capture(model) as captured:
        _run(model)
    p = captured.policy()
    values = torch.rand(p.shape[0], 1, p.shape[2], generator=torch.Generator().manual_seed(1)) + 0.1
    r = values * (p > 0)
    wanted = rk.divergence(p, r / r.sum(-1, keepdim=True).clamp_min(1e-9), "reverse_kl")
    for target in (rk.AttentionTarget(values), values):
        got = captured.divergence(target, "reverse_kl")
        torch.testing.assert_close(got[:, 1:], wanted[:, 1:])
        assert not got[:, 0].any()  # the first row has no key but its own
        advantages = torch.ones(p.shape[0])
        loss = captured.ral_loss(target, advantages, kind="cross_entropy")
        weight = model.model.layers[-1].self_attn.q_proj.weight
        assert torch.autograd.grad(loss, weight, retain_graph=True)[0].any()
