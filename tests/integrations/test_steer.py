"""`steer`: a bias per span in chosen layers, in forwards and in generation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import ral_kernels as rk
from ral_kernels.integrations.transformers import register
from ral_kernels.integrations.transformers.capture import capture
from ral_kernels.integrations.transformers.steer import steer
from tests.integrations.eager_maps import leaves_nothing
from tests.integrations.models import FAMILIES, VISION_FAMILIES, build, inputs


@pytest.fixture(autouse=True, scope="module")
def implementations():
    register()


def _real(batch: dict[str, Tensor]) -> Tensor:
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


def _spans(batch: dict[str, Tensor]) -> rk.Spans:
    """Two spans in the middle; text before and behind them belongs to none."""
    return rk.Spans.from_lengths([2, 2], start=2, seqlen_k=batch["input_ids"].shape[1])


def _biased_eager(model: Any, batch: dict[str, Tensor], spans: rk.Spans, bias: Tensor) -> Any:
    """Logits and maps of eager attention with the bias [S] added to its mask, in every layer."""
    seqlen = spans.seqlen_k
    seen = torch.ones(seqlen, seqlen, dtype=torch.bool).tril() & _real(batch)[:, None]
    padded = torch.cat([bias, bias.new_zeros(1)])  # −1 is the last
    mask = torch.where(seen, padded[spans.ids.long()].expand_as(seen), torch.finfo().min)
    positions = (_real(batch).cumsum(-1) - 1).clamp(min=0)
    return model(
        input_ids=batch["input_ids"],
        attention_mask=mask[:, None],
        position_ids=positions,
        output_attentions=True,
        use_cache=False,
    )


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "ral"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_bias_of_zero_changes_nothing(family, padding, implementation):
    batch = inputs(family, padding=padding)
    model = build(family, implementation)
    with torch.no_grad():
        wanted = model(**batch, use_cache=False).logits
        with leaves_nothing(model), steer(model, torch.zeros(2), spans=_spans(batch)):
            got = model(**batch, use_cache=False).logits
    real = _real(batch)
    torch.testing.assert_close(got[real], wanted[real], atol=2e-5, rtol=1e-5)


@pytest.mark.slow(stands_in="test_a_bias_of_zero_changes_nothing")
def test_a_bias_of_zero_under_flex_attention():
    batch = inputs("qwen2", padding="left")
    model = build("qwen2", "flex_attention")
    with torch.no_grad():
        wanted = build("qwen2", "sdpa")(**batch, use_cache=False).logits
        with steer(model, torch.zeros(2), spans=_spans(batch)):
            got = model(**batch, use_cache=False).logits
    torch.testing.assert_close(got[_real(batch)], wanted[_real(batch)], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "ral"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_logits_and_gradients_are_those_of_a_biased_mask(padding, implementation):
    batch = inputs("qwen2", padding=padding)
    spans, real = _spans(batch), _real(batch)
    direction = torch.randn(2, 7, 320, generator=torch.Generator().manual_seed(1))[real]
    bias = torch.tensor([1.5, -0.8], requires_grad=True)
    wanted = _biased_eager(build("qwen2", "eager"), batch, spans, bias)
    (wanted_gradient,) = torch.autograd.grad((wanted.logits[real] * direction).sum(), bias)

    model = build("qwen2", implementation)
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    with steer(model, bias, spans=spans), capture(model, "all", spans=spans) as captured:
        logits = model(**batch, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(logits[real], wanted.logits[real], atol=2e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad((logits[real] * direction).sum(), bias, retain_graph=True)
    torch.testing.assert_close(gradient, wanted_gradient, atol=1e-4, rtol=1e-4)
    # A capture knows of the bias: its marginals are those of the biased maps.
    for layer in range(2):
        maps = wanted.attentions[layer]
        shares = torch.stack([maps[..., 2:4].sum(-1), maps[..., 4:6].sum(-1)], -1)
        got = captured.marginals(layer).transpose(1, 2)[real]
        torch.testing.assert_close(got, shares.transpose(1, 2)[real], atol=2e-6, rtol=1e-5)
    # ∂ of the policy, through the bias of its own layer as well as through q and k
    (gradient,) = torch.autograd.grad(captured.policy(1, rows=(6, 7))[0, 0, 0], bias)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("implementation", ["sdpa", "ral"])
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_a_large_bias_moves_attention_to_the_picture(family, implementation):
    batch = inputs(family, padding="left")
    picture = torch.where(batch["input_ids"] == 300, 0, -1).int()
    spans = rk.Spans(picture, 1)
    model = build(family, implementation)
    rows = slice(-3, None)

    def shares(bias: float) -> Tensor:
        with (
            torch.no_grad(),
            steer(model, torch.tensor([bias]), spans=spans, layers=-1),
            capture(model, spans=spans, rows=rows) as captured,
        ):
            model(**batch, use_cache=False)
        return captured.marginals()[..., 0]

    low, zero, high = shares(-20.0), shares(0.0), shares(20.0)
    assert (low < 1e-3).all() and (high > 0.99).all()
    assert (zero > 0.01).all() and (zero < 0.99).all()
    odds = (shares(math.log(2)) / (1 - shares(math.log(2)))) / (zero / (1 - zero))
    torch.testing.assert_close(odds, torch.full_like(odds, 2.0), atol=1e-3, rtol=1e-3)


def test_only_the_chosen_layers():
    batch = inputs("qwen2")
    model, spans = build("qwen2"), _spans(batch)
    with (
        torch.no_grad(),
        steer(model, torch.tensor([30.0, 0.0]), spans=spans, layers=1),
        capture(model, "all", spans=spans, rows=slice(-1, None)) as captured,
    ):
        model(**batch, use_cache=False)
    assert captured.marginals(1)[..., 0].min() > 0.999
    assert captured.marginals(0)[..., 0].max() < 0.9


def test_shapes_of_the_bias():
    batch = inputs("qwen2")
    model, spans = build("qwen2"), _spans(batch)
    generator = torch.Generator().manual_seed(2)

    def logits(bias: Tensor, keys: rk.Spans = spans) -> Tensor:
        with torch.no_grad(), steer(model, bias, spans=keys):
            return model(**batch, use_cache=False).logits

    per_sample = torch.randn(2, 2, generator=generator)
    got = logits(per_sample)
    for sample in range(2):
        assert torch.equal(got[sample], logits(per_sample[sample])[sample])
    assert torch.equal(got, logits(per_sample[:, None, None].expand(2, 4, 7, 2)))
    per_row = torch.randn(1, 4, 7, 2, generator=generator)
    assert not torch.equal(logits(per_row), logits(per_row[:, :, :1]))
    # Spans of each sample, and spans over the first keys only
    ids = spans.ids.expand(2, -1).contiguous()
    assert torch.equal(got, logits(per_sample, rk.Spans(ids, 2)))
    assert torch.equal(got, logits(per_sample, rk.Spans(spans.ids[:6], 2)))


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "ral"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "qwen2"])
def test_generate(family, implementation):
    batch = inputs(family, padding="left")
    model, spans = build(family, implementation), _spans(batch)
    options = {"max_new_tokens": 6, "do_sample": False}
    alone = model.generate(**batch, **options)
    with leaves_nothing(model), steer(model, torch.zeros(2), spans=spans):
        assert torch.equal(model.generate(**batch, **options), alone)
    # All 6 rows are steered; keys of generated tokens belong to no span.
    bias = torch.tensor([[25.0, 0.0], [0.0, 25.0]])
    layer = 1  # which has no window
    with steer(model, bias, spans=spans, layers=layer), capture(model, layer) as captured:
        tokens = model.generate(**batch, **options)
    marginals = captured.marginals(spans=spans, head_reduction="mean")
    assert marginals.shape == (2, 6, 2) and tokens.shape == alone.shape
    assert marginals[0, :, 0].min() > 0.99 and marginals[1, :, 1].min() > 0.99
    assert not torch.equal(model(tokens[:, -1:]).logits, tokens)  # the model still runs


def test_generated_tokens_are_those_of_steered_forwards():
    """Greedy tokens of `generate` under a bias are the ones that whole forwards choose under it."""
    batch = inputs("qwen2")
    model, spans = build("qwen2"), _spans(batch)
    bias = torch.tensor([4.0, -4.0])
    alone = model.generate(**batch, max_new_tokens=5, do_sample=False)
    with torch.no_grad(), steer(model, bias, spans=spans):
        tokens = model.generate(**batch, max_new_tokens=5, do_sample=False)
        for length in range(7, 12):
            logits = model(tokens[:, :length], use_cache=False).logits[:, -1]
            assert torch.equal(logits.argmax(-1), tokens[:, length])
    assert not torch.equal(tokens, alone)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    batch = inputs("qwen2")
    spans = _spans(batch)
    wanted: dict[str, Any] = {}
    for checkpointing in (False, True):
        model = build("qwen2").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        bias = torch.tensor([1.0, -1.0], requires_grad=True)
        with leaves_nothing(model), steer(model, bias, spans=spans):
            loss = model(**batch, use_cache=False).logits.square().mean()
        loss.backward()  # after the end of the `with`
        found = {name: x.grad for name, x in model.named_parameters()} | {"bias": bias.grad}
        if checkpointing:
            for name, grad in found.items():
                torch.testing.assert_close(grad, wanted[name], atol=1e-6, rtol=1e-5)
        wanted = found
    assert wanted["bias"].abs().max() > 1e-4


@pytest.mark.slow(stands_in="test_gradient_checkpointing")
def test_lora_autocast_and_compile():
    import peft
    from torch._dynamo.testing import CompileCounterWithBackend

    batch, bias = {"input_ids": inputs("qwen2")["input_ids"]}, torch.tensor([2.0, -1.0])
    spans = _spans(batch)
    model = peft.get_peft_model(build("qwen2"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad(), steer(model, bias, spans=spans):
        wanted = model(**batch, use_cache=False).logits
        with torch.autocast("cpu", torch.bfloat16):
            half = model(**batch, use_cache=False).logits
    torch.testing.assert_close(half.float(), wanted, atol=0.1, rtol=0.1)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        with torch.no_grad(), steer(compiled, bias, spans=spans):
            got = compiled(**batch, use_cache=False).logits
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad(), steer(compiled, bias.expand(2, 2), spans=spans):  # one row a sample
        got = compiled(**batch, use_cache=False).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


def test_policy_of_a_steered_layer():
    batch = inputs("qwen2")
    model, spans = build("qwen2"), _spans(batch)
    with steer(model, torch.tensor([3.0, 0.0]), spans=spans), capture(model) as captured:
        model(**batch, use_cache=False)
    steered = captured.policy(spans=spans)
    clean = captured.policy(spans=spans, steered=False)
    assert (steered[:, 5:, 0] > clean[:, 5:, 0]).all()
    assert torch.equal(clean, rk.attention_policy(captured.q(), captured.k(), spans=spans))
    with pytest.raises(NotImplementedError, match="or steered must be False; got other spans"):
        captured.policy()
    assert captured.policy(steered=False).shape == (2, 7, 7)
    # A snapshot takes the bias along: against it the steered policy is where it was.
    snapshot = captured.snapshot()
    assert captured.divergence(snapshot, spans=spans).abs().max().item() == 0.0
    assert captured.divergence(snapshot, spans=spans, steered=False).max().item() > 1e-3
    assert captured.snapshot(steered=False).span_bias is None


def test_several_steers():
    batch = inputs("qwen2")
    model, spans = build("qwen2"), _spans(batch)
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    with leaves_nothing(model), steer(model, one, spans=spans, layers=0):
        with steer(model, other, spans=spans, layers=1), capture(model, "all") as captured:
            model(**batch, use_cache=False)
        with pytest.raises(ValueError, match="layer 0 is"), steer(model, other, spans=spans):
            pass
        assert not hasattr(model.model.layers[1].self_attn, "_ral_tap")
    for layer, bias in enumerate((one, other)):
        kept = captured.snapshot(layer).span_bias
        assert kept is not None and torch.equal(kept.flatten(), bias.repeat(2))


def test_nothing_is_left_after_an_exception():
    model = build("qwen2")
    again = steer(model, torch.zeros(2), spans=_spans(inputs("qwen2")))
    for _ in range(2):
        with leaves_nothing(model), pytest.raises(RuntimeError, match="boom"), again:
            raise RuntimeError("boom")
    with again, pytest.raises(RuntimeError, match="already open"):
        again.__enter__()


def test_bad_input():
    batch = inputs("qwen2")
    model, spans = build("qwen2"), _spans(batch)
    with pytest.raises(TypeError, match="steer: spans must be Spans; got NoneType"):
        steer(model, torch.zeros(2), spans=None)
    with pytest.raises(TypeError, match="steer: span_bias must be a tensor"):
        steer(model, [0.0, 0.0], spans=spans)
    with pytest.raises(TypeError, match="steer: span_bias must be floating; got int64"):
        steer(model, torch.zeros(2, dtype=torch.int64), spans=spans)
    for shape in ((3,), (2, 3), (7, 1, 2)):
        with pytest.raises(ValueError, match=r"span_bias must be \[S\], \[B, S\] or broadcast"):
            steer(model, torch.zeros(shape), spans=spans)
    with pytest.raises(ValueError, match=r"steer: layers must lie in \[-2, 2\)"):
        steer(model, torch.zeros(2), spans=spans, layers=5)
    many = r"with B=2, T=7; got \(3, 1, 1, 2\)"
    with pytest.raises(ValueError, match=many), steer(model, torch.zeros(3, 2), spans=spans):
        model(**batch)
    long, message = rk.Spans.from_lengths([5, 5]), "cover no more than the keys, N=7; got 10"
    with pytest.raises(ValueError, match=message), steer(model, torch.zeros(2), spans=long):
        model(**batch)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_what_is_not_supported_is_refused_by_name(implementation):
    batch = inputs("qwen2")
    model = build("qwen2", implementation, attention_dropout=0.1).train()
    steered = steer(model, torch.zeros(2), spans=_spans(batch))
    with pytest.raises(NotImplementedError, match=r"dropout must be 0; got 0\.1"), steered:
        model(**batch, use_cache=False)
    with leaves_nothing(model):
        model(**batch, use_cache=False)
